"""The suite quantize: the residual quantizer, beside the official one and that of vector-quantize-pytorch."""

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from statistics import median

import torch
from official import Reference
from options import BenchmarkArguments
from timing import extra_memory, row, side_by_side
from torch import nn

from dnd_hf.models.residual_quantizer import ResidualQuantizer


def quantize(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """The residual quantizer by itself, in evaluation and in training (with the update of its codebook)."""
    depth, batch = args.quantizer_depth, args.quantizer_batch_size
    torch.manual_seed(0)
    ours = ResidualQuantizer(16384, 256, depth).to(device)
    # New vectors each time: codes restarted from the same ones again would be equal.
    batches = torch.randn(args.repeats + 2, batch, 16, 16, 256).to(device)
    modules = {"ours": ours}
    if reference:
        official = reference.quantizations.RQBottleneck([16, 16, 256], [16, 16, depth], 16384, shared_codebook=True)
        with torch.no_grad():
            official.codebooks[0].weight[:-1] = ours.codebooks[0]
            official.codebooks[0].embed_ema[:] = ours.codebooks[0]
        modules["reference"] = official.to(device)
    with contextlib.suppress(ImportError):
        from vector_quantize_pytorch import ResidualVQ

        library = ResidualVQ(
            dim=256, codebook_size=16384, num_quantizers=depth, shared_codebook=True, threshold_ema_dead_code=1,
            commitment_weight=0.25, decay=0.99,
        )  # fmt: skip
        modules["vector_quantize_pytorch"] = nn.Sequential(nn.Flatten(1, 2), library).to(device)
    for mode in ("eval", "train"):
        functions = {}
        for name, module in modules.items():
            getattr(module, mode)()
            functions[name] = partial(lambda module, of: module(next(of)), module, cycle(batches))
        grad = torch.enable_grad if mode == "train" else torch.no_grad
        with grad():
            seconds = side_by_side(functions, device, args.repeats)
            memory = {f"memory_mb_{name}": extra_memory(function, device) for name, function in functions.items()}
        library_seconds = seconds.pop("vector_quantize_pytorch", None)
        if library_seconds:
            memory["ratio_to_vector_quantize_pytorch"] = median(library_seconds) / median(seconds["ours"])
        what = f"16384 codes, depth {depth}, batch {batch}, {mode}"
        yield row("quantize", what, "images/s", batch, seconds, **memory)
