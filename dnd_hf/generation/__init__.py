"""How codes are drawn from a model.

One step, from label to code, in the order in which to read it: `mixin.py` (`generate`: settings, noise, the loop),
`windows.py` (which cells a pass samples), `loop.py` (`step` and `choose`), the `decode` of a model (`interface.py` says
what it is asked for), `decoders.py` (its layers as they are, or static for CUDA graphs) and `packed_decoder.py` (packed
for CPUs; its blocks are in `packed_layers.py`, its weights in `packed_weights.py`, and `packing.py` has them take the
place of the model's own). The rest is one small thing a file: `settings.py`, `given_codes.py`, `guidance.py`,
`noise.py`, `filters.py`, `cuda_graphs.py`, `evaluation_mode.py`, `scoring.py`.
"""
