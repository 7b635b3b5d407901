"""Evaluation: fidelity, reconstruction, use of the codebook, and text read back from images."""
