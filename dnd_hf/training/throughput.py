"""How fast a run trains, and how much of what the machine's matrix products could do (MFU) that is."""

import copy
import resource
import sys
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models.autoencoder_rqvae import RQVAE
from ..models.configuration_dnd import DnDConfig
from ..models.configuration_rq_transformer import RQTransformerConfig
from ..ops.cpu_precision import has_instructions


def transformer_training_flops(config: DnDConfig | RQTransformerConfig) -> int:
    """Floating point operations of one training sample: forward and backward pass, nothing computed twice.

    6 for each weight of a matrix product and token, and `12 * layers * hidden_size * tokens` for each token's attention
    (PaLM, arXiv 2204.02311, Appendix B), which counts the masked half of the attention too.
    """
    if isinstance(config, RQTransformerConfig):
        return _rq_transformer_training_flops(config)
    layers, width, tokens = config.prediction_layers[-1] + 1, config.hidden_size, config.sequence_length
    attention = 2 * width * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    weights = layers * (attention + 3 * width * config.intermediate_size)
    weights += config.code_depth * config.vocab_size * width
    return tokens * (6 * weights + 12 * layers * width * tokens)


def _rq_transformer_training_flops(config: RQTransformerConfig) -> int:
    width, cells, depth, prompt = config.hidden_size, config.sequence_length, config.code_depth, config.prompt_length
    block = 4 * width**2 + 2 * width * config.intermediate_size
    tokens = cells + max(prompt, 1) - 1
    body = config.num_hidden_layers * tokens * (6 * block + 12 * width * tokens)
    stack = config.num_depth_layers * cells * depth * (6 * block + 12 * width * depth)
    heads = 6 * width * (cells * depth * config.vocab_size + max(prompt - 1, 0) * config.prompt_vocab_size)
    # Nobody reads the last cell, or the last code of a cell; code vectors are not trained.
    read = config.body_reads_code_vectors * (cells - 1) * depth + config.depth_reads_code_vectors * cells * (depth - 1)
    return body + stack + heads + 4 * width * read * config.code_vector_size


def tokenizer_training_flops(vae: RQVAE, size: tuple[int, int]) -> int:
    """Floating point operations of one image of `size` (height, width) through encoder and decoder, times 3 for the
    backward pass; the search of the codes and a discriminator are not counted."""
    networks = copy.deepcopy(torch.nn.ModuleList([vae.encoder, vae.decoder])).to("meta")
    latents = (size[0] // vae.stride, size[1] // vae.stride)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        networks[0](torch.empty(1, 3, *size, device="meta"))
        networks[1](torch.empty(1, vae.config.latent_channels, *latents, device="meta"))
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device, *dtypes: torch.dtype) -> float:
    """Floating point operations a second of the fastest matrix product in one of `dtypes`, measured now.

    Several sizes are tried, each a few times, which takes a second or two; precisions that a CPU can only emulate are
    left out, if there are others. Float32 on a GPU is TF32 where convolutions may use it, as they do by default.
    """
    dtypes = tuple(dtype for dtype in dtypes if has_instructions(device, dtype)) or dtypes
    sizes = (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
    earlier = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    try:
        return max(_product_rate(size, device, dtype) for dtype in dtypes for size in sizes)
    finally:
        torch.set_float32_matmul_precision(earlier)


def _product_rate(size: int, device: torch.device, dtype: torch.dtype, budget: float = 0.3) -> float:
    """The best rate of a square matrix product, repeated until `budget` seconds are over, twice at least."""
    factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < budget:
        synchronize(device)
        started = perf_counter()
        torch.mm(*factors)
        synchronize(device)
        seconds.append(perf_counter() - started)
    return 2 * size**3 / min(seconds)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory in use since the program started, GB (10^9 bytes): of a GPU its tensors', else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
