"""Data: images to tensors, datasets of codes, rendered text, PDF pages."""
