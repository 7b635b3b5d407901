"""Times decoding, training, quantizing, tokenizing and extraction, beside the official code and beside the floor.

python examples/benchmark.py --sections decode quantize --reference DnD-Transformer --output_dir benchmarks

`--reference` is a checkout of github.com/chenllliang/DnD-Transformer, which is not part of this project; it gets the
same weights. Ours, the reference and the floor take turns in one process, so that whatever else the machine does meets
all of them; the figures are medians. The floor is what the hardware needs for the arithmetic and the memory alone: see
`decode_floors` and `train`.
"""

import contextlib
import gc
import importlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration
from dnd_hf.arguments import parse_arguments
from dnd_hf.conversion import export_original
from dnd_hf.data.codes import CodesWriter, ShardReader, codes_features
from dnd_hf.data.images import ImageDataset, TenCrop
from dnd_hf.figures import import_figure
from dnd_hf.generation.packed_decoder import packed_runner
from dnd_hf.models.residual_quantizer import ResidualQuantizer
from dnd_hf.training.throughput import matmul_rate, synchronize, transformer_training_flops


SECTIONS = ("decode", "train", "quantize", "tokenize", "extract", "growth")


@dataclass
class BenchmarkArguments:
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    sections: list[str] = HfArg(default_factory=lambda: list(SECTIONS), help=f"What to time: {', '.join(SECTIONS)}.")
    reference: str | None = HfArg(
        default=None, help="Checkout of the official repository; without it, its columns stay out."
    )
    output_dir: str | None = HfArg(default=None, help="Also write benchmark.json and benchmark.md there.")
    repeats: int = HfArg(default=5, help="Times that each is run, after one that does not count.")
    device: str | None = HfArg(default=None, help="Default: a GPU where there is one.")
    dtype: Literal["float32", "bfloat16"] = HfArg(default="bfloat16", help="Of decoding and training.")
    torch_compile: bool = HfArg(
        default=False,
        help="Compile training steps and tokenizers, ours and the official ones, and our layers in decoding.",
    )
    cuda_graphs: bool = HfArg(default=True, help="On GPUs: replay our decoding steps as CUDA graphs.")
    channels_last: bool = HfArg(default=False, help="Memory format of our tokenizer in tokenize.")
    size: Literal["B", "L", "XL", "XXL", "XXXL"] = HfArg(default="B", help="Transformer of decode and train.")
    code_depth: int = HfArg(default=2, help="Codes a position in decode, train and extract.")
    grid_size: int = HfArg(default=16, help="Rows, and columns, of decode and train.")
    guidance_scale: float = HfArg(default=2.0, help="Of decode.")
    decode_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 8], help="Pictures decoded at once.")
    train_batch_size: int = HfArg(default=8, help="Pictures of a training step.")
    quantizer_depth: int = HfArg(default=8, help="Codes a position in quantize, of 16,384.")
    quantizer_batch_size: int = HfArg(default=8, help="Pictures of 16 x 16 positions in quantize.")
    tokenize_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 32], help="256-pixel pictures in tokenize.")
    extract_images: int = HfArg(default=8, help="Pictures of ten crops in extract.")
    image_size: int = HfArg(default=256, help="Pixels, of tokenize and extract.")
    growth_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8, 16], help="Of growth.")
    growth_grid_sizes: list[int] = HfArg(default_factory=lambda: [8, 12, 16, 24, 32], help="Of growth, at batch 1.")
    growth_depths: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8], help="Of growth, at batch 1.")

    def __post_init__(self):
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"--sections must be of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}.")
        for name in ("repeats", "code_depth", "grid_size", "train_batch_size", "quantizer_depth", "extract_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in (
            "decode_batch_sizes",
            "tokenize_batch_sizes",
            "growth_batch_sizes",
            "growth_grid_sizes",
            "growth_depths",
        ):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be positive numbers, got {getattr(self, name)}.")
        if "growth" in self.sections and self.output_dir:
            import_figure()
        if self.reference is not None and not Path(self.reference, "src", "dnd_transformer").is_dir():
            raise ValueError(f"--reference {self.reference} is no checkout of the official repository.")


class Reference:
    """The official code, with the weights of our models."""

    def __init__(self, folder: str):
        source = Path(folder, "src")
        torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()  # gone from PyTorch
        for name, path in (("rqvae", ""), ("rqvae.models", "models")):  # without what their __init__ imports
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(source / "rqvae" / path)]
        sys.path.insert(0, str(source / "dnd_transformer"))
        self.rqvae = importlib.import_module("rqvae.models.rqvae.rqvae")
        self.quantizations = importlib.import_module("rqvae.models.rqvae.quantizations")
        self.gpt = importlib.import_module("gpt_multitoken_v3")
        self.generate = importlib.import_module("generate_multitoken_v3").generate

    def transformer(self, model: DnDForImageGeneration) -> nn.Module:
        config = model.config
        sizes = dict(
            dim=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            num_classes=config.num_classes,
            vocab_size=config.vocab_size,
            block_size=config.sequence_length,
            num_pred_heads=config.code_depth,
            pred_head_positions=list(config.prediction_layers),
            class_dropout_prob=config.class_dropout_prob,
        )
        official = self.gpt.Transformer(self.gpt.ModelArgs(**sizes))
        return self._filled(official, model, "transformer.pt", "model")

    def tokenizer(self, vae: RQVAE) -> nn.Module:
        config, (rows, columns) = vae.config, vae.grid_size
        latents = [rows, columns, config.vq_embed_dim or config.latent_channels]
        widths, size = config.block_out_channels, config.sample_size
        official = self.rqvae.RQVAE(
            embed_dim=latents[2],
            n_embed=config.num_vq_embeddings,
            bottleneck_type="rq",
            latent_shape=latents,
            code_shape=[rows, columns, config.code_depth],
            shared_codebook=config.shared_codebook,
            restart_unused_codes=config.restart_unused_codes,
            ddconfig=dict(
                double_z=False,
                z_channels=config.latent_channels,
                resolution=size if isinstance(size, int) else size[0],
                in_channels=3,
                out_ch=3,
                ch=widths[0],
                ch_mult=[width // widths[0] for width in widths],
                num_res_blocks=config.layers_per_block,
                attn_resolutions=[rows],
                dropout=0.0,
            ),
        )
        return self._filled(official, vae, "rqvae.pt", "state_dict")

    @staticmethod
    def _filled(official: nn.Module, ours: nn.Module, file: str, key: str) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(f"{folder}/ours")
            export_original(f"{folder}/ours", f"{folder}/official")
            official.load_state_dict(torch.load(f"{folder}/official/{file}")[key], strict=False)
        return official.eval()


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def side_by_side(functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, run in turns `repeats` times, after one turn that does not count."""
    turns = [{name: timed(function, device) for name, function in functions.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in functions}


def extra_memory(function: Callable[[], Any], device: torch.device) -> float:
    """The most memory, in MB (10^6 bytes), that a call needs above what is in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    page, done, most = os.sysconf("SC_PAGE_SIZE"), threading.Event(), 0
    with contextlib.suppress(AttributeError, OSError):  # of glibc: what is free goes back to the system first
        importlib.import_module("ctypes").CDLL(None).malloc_trim(0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, most - before) / 1e6


def row(section: str, what: str, unit: str, amount: float, seconds: dict[str, list[float]], **more: float) -> dict:
    """One line of the table: rates in `unit` a second, the ratio to the reference, the share of the floor."""
    middle = {name: median(values) for name, values in seconds.items()}
    line = {"section": section, "what": what, "unit": unit, "ours": amount / middle["ours"]}
    line["spread"] = (max(seconds["ours"]) - min(seconds["ours"])) / middle["ours"]
    if "reference" in middle:
        line["reference"] = amount / middle["reference"]
        line["ratio"] = middle["reference"] / middle["ours"]
    for floor in middle.keys() & {"floor", "packed_floor"}:
        line[f"times_{floor}"] = middle["ours"] / middle[floor]
    return line | more


def read_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second: of a sum over 512 MB on CPUs, of a copy (read and written) on GPUs."""
    block = torch.ones(2**27, device=device)
    if device.type == "cpu":
        return block.nbytes / median(side_by_side({"sum": block.sum}, device, repeats)["sum"])
    copy = torch.empty_like(block)
    return 2 * block.nbytes / median(side_by_side({"copy": lambda: copy.copy_(block)}, device, repeats)["copy"])


def decode_floors(model: DnDForImageGeneration, sequences: int, repeats: int) -> dict[str, Callable[[], None]]:
    """Functions that take as long as decoding must.

    On CPUs: the matrix products of all steps, with the model's own weights, and then the time of reading the part of
    the cache that is filled, at the measured bandwidth; in `floor` by PyTorch's linear layers, in `packed_floor` as
    `generate` multiplies, which is faster. On GPUs: the larger of bytes (weights and cache) over the measured bandwidth
    and operations over the measured matrix rate.
    """
    config, device, dtype = model.config, model.device, model.dtype
    steps = config.sequence_length
    layers = config.prediction_layers[-1] + 1
    item = torch.finfo(dtype).bits // 8
    entries = 2 * layers * sequences * config.num_key_value_heads * config.head_dim
    cache_bytes = item * entries * steps * (steps + 1) / 2
    weights = [m.weight for layer in model.layers[:layers] for m in layer.modules() if isinstance(m, nn.Linear)]
    weights += [model.head(k).weight for k in range(config.code_depth)]
    bandwidth = read_bandwidth(device, repeats)
    if device.type == "cpu":
        inputs = {weight.shape[1]: torch.randn(sequences, weight.shape[1], dtype=dtype) for weight in weights}
        plain = [(inputs[weight.shape[1]], partial(F.linear, weight=weight)) for weight in weights]
        runner = packed_runner(model, sequences)
        products = [*runner.heads, *(product for layer in runner.decoders[0].layers for product in layer.products)]
        packed = [(inputs[product.in_features], product) for product in products]

        def run(products: list[tuple[Tensor, Callable]]) -> None:
            with torch.inference_mode():
                for _ in range(steps):
                    for values, product in products:
                        product(values)
            time.sleep(cache_bytes / bandwidth)

        return {"floor": partial(run, plain), "packed_floor": partial(run, packed)}
    weight_count = sum(weight.numel() for weight in weights)
    by_memory = (steps * weight_count * item + cache_bytes) / bandwidth
    by_arithmetic = 2 * steps * weight_count * sequences / matmul_rate(device, dtype)
    return {"floor": partial(time.sleep, max(by_memory, by_arithmetic))}


def make_transformer(args: BenchmarkArguments, device: torch.device, dtype: torch.dtype) -> DnDForImageGeneration:
    """A transformer of the size asked for, with random weights in its heads too."""
    torch.manual_seed(0)
    config = DnDConfig.from_size(args.size, code_depth=args.code_depth, grid_size=args.grid_size)
    model = DnDForImageGeneration(config)
    for head in model.heads:
        nn.init.normal_(head.weight, std=0.02)
    return model.to(device, dtype)


def decode(
    args: BenchmarkArguments, device: torch.device, reference: Reference | None, more: bool = True
) -> Iterator[dict]:
    """Sampling codes from labels, with guidance; the official code at the better of its two precisions on CPUs.

    `more`: also the time of the first call and the memory, which take two calls.
    """
    dtype = getattr(torch, args.dtype)
    model = make_transformer(args, device, torch.float32)
    officials = {}
    if reference:
        precisions = (torch.float32, torch.bfloat16) if device.type == "cpu" else (dtype,)
        officials = {precision: reference.transformer(model).to(device, precision) for precision in precisions}
    model.to(dtype)
    model.cuda_graphs = args.cuda_graphs and device.type == "cuda"
    if args.torch_compile:
        model.compile_repeated_blocks()
    for batch in args.decode_batch_sizes:
        labels = torch.arange(batch, device=device) % model.config.num_classes
        options = dict(guidance_scale=args.guidance_scale, generator=torch.Generator(device).manual_seed(0))
        functions = {"ours": partial(model.generate, labels, **options)}
        once = {"first_call_s": timed(functions["ours"], device)} if more else {}
        guided = 2 if args.guidance_scale != 1 else 1
        functions |= decode_floors(model, guided * batch, args.repeats)
        for precision, official in officials.items():
            functions[str(precision)] = partial(
                reference.generate, official, labels, model.config.sequence_length,
                num_prediction_heads=args.code_depth, cfg_scale=args.guidance_scale, top_k=0, sample_logits=True,
            )  # fmt: skip
        seconds = side_by_side(functions, device, args.repeats)
        if officials:
            times = [seconds.pop(str(precision)) for precision in officials]
            seconds["reference"] = min(times, key=median)
        what = f"{args.size}, depth {args.code_depth}, batch {batch}, guidance {args.guidance_scale:g}, {args.dtype}"
        if more:
            once["memory_mb"] = extra_memory(functions["ours"], device)
        yield row("decode", what, "images/s", batch, seconds, **once)


def train(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """A training step: forward, backward, clipping, AdamW. MFU is its floor: operations over the measured rate."""
    dtype = getattr(torch, args.dtype)
    model = make_transformer(args, device, torch.float32).train()
    config, batch = model.config, args.train_batch_size
    labels = torch.arange(batch, device=device) % config.num_classes
    shape = (batch, *config.grid_size, config.code_depth)
    codes = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    flat = codes.flatten(1, 2)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def make_step(network: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        return partial(step, network, optimizer, loss_of)

    functions = {"ours": make_step(model, lambda: model(labels, codes, labels=codes, output_logits=False).loss)}
    if reference:
        official = reference.transformer(model).to(device).train()
        functions["reference"] = make_step(
            official, lambda: official(idx=flat[:, :-1], cond_idx=labels, targets=flat)[1]
        )
        if args.torch_compile:
            official.compile()
    if args.torch_compile:
        model.compile()
    seconds = side_by_side(functions, device, args.repeats)
    rate = matmul_rate(device, dtype)
    mfu = batch * transformer_training_flops(config) / median(seconds["ours"]) / rate
    memory = {f"memory_mb_{name}": extra_memory(function, device) for name, function in functions.items()}
    what = f"{args.size}, depth {args.code_depth}, batch {batch}, {args.dtype}{', compiled' * args.torch_compile}"
    yield row("train", what, "images/s", batch, seconds, mfu=mfu, **memory)


def quantize(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """The residual quantizer alone, in evaluation and in training (with the update of its codebook)."""
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


def make_tokenizer(args: BenchmarkArguments, depth: int, device: torch.device) -> RQVAE:
    """The paper's tokenizer, f = 16, with random weights."""
    torch.manual_seed(0)
    return RQVAE(sample_size=args.image_size, code_depth=depth).eval().to(device)


@torch.no_grad()
def tokenize(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Pictures to codes, in float32, and back, in bfloat16 too: grey levels (of 255) say how far off that is."""
    vae = make_tokenizer(args, args.code_depth, device)
    official = reference.tokenizer(vae).to(device) if reference else None
    half = deepcopy(vae).to(torch.bfloat16)
    if args.channels_last:
        vae, half = (one.to(memory_format=torch.channels_last) for one in (vae, half))
    if args.torch_compile:
        for model in filter(None, (vae, half, official)):
            model.encoder.compile()
            model.decoder.compile()
    for batch in args.tokenize_batch_sizes:
        images = torch.rand(batch, 3, args.image_size, args.image_size, device=device) * 2 - 1
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        codes = vae.encode(images).codes
        exact, rounded = (one.decode_codes(codes).sample.float().clamp(-1, 1) for one in (vae, half))
        off = {"grey_levels": (exact - rounded).abs().mean().item() * 127.5}
        encoding = {"ours": partial(vae.encode, images)}
        decoding = {"ours": partial(vae.decode_codes, codes), "half": partial(half.decode_codes, codes)}
        if official:
            encoding["reference"] = partial(official.get_codes, images)
            decoding["reference"] = partial(official.decode_code, codes)
        seconds = side_by_side(encoding, device, args.repeats)
        what = f"{args.image_size} px, batch {batch}{', channels last' * args.channels_last}"
        what += ", compiled" * args.torch_compile
        memory = extra_memory(encoding["ours"], device)
        yield row("tokenize", f"encode, {what}", "images/s", batch, seconds, memory_mb=memory)
        seconds = side_by_side(decoding, device, args.repeats)
        half_seconds = {**seconds, "ours": seconds.pop("half")}
        memory = extra_memory(decoding["ours"], device)
        yield row("tokenize", f"decode, {what}", "images/s", batch, seconds, memory_mb=memory)
        memory = extra_memory(decoding["half"], device)
        yield row("tokenize", f"decode in bfloat16, {what}", "images/s", batch, half_seconds, memory_mb=memory, **off)


def extract(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Ten crops of each picture to codes on disk: extract_codes.py's way, and the official: one picture a batch, its
    whole autoencoder, two files a picture."""
    vae = make_tokenizer(args, args.code_depth, device)
    generator = np.random.default_rng(0)
    side = args.image_size * 5 // 4
    pictures = [
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(args.extract_images)
    ]
    transform = TenCrop(args.image_size)
    dataset = ImageDataset([{"image": picture, "label": 0} for picture in pictures], transform, ["picture"])
    rows, columns = vae.grid_size

    @torch.inference_mode()
    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = CodesWriter(folder, codes_features((rows, columns, args.code_depth), ["picture"]), {})
            encoded = []
            for batch in DataLoader(ShardReader(dataset, [(0, 0)], len(dataset), 6), batch_size=None):
                if "shard" in batch:
                    writer.write(0, 0, True, encoded, batch.get("broken", []))
                    continue
                codes = vae.encode(batch["pixel_values"].flatten(0, 1).to(device)).codes.int().cpu()
                places = (batch[name].repeat_interleave(10) for name in ("labels", "image_index"))
                encoded.append((codes, *places))
            writer.finish()

    functions = {"ours": ours}
    if reference:
        official = reference.tokenizer(vae).to(device)

        @torch.no_grad()
        def theirs() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for i, item in enumerate(DataLoader(dataset, batch_size=1)):
                    _, _, codes = official(item["pixel_values"].flatten(0, 1).to(device))
                    np.save(f"{folder}/{i}.npy", codes.cpu().numpy())
                    np.save(f"{folder}/{i}-label.npy", item["label"].numpy())

        functions["reference"] = theirs
    seconds = side_by_side(functions, device, args.repeats)
    yield row("extract", f"ten crops, {args.image_size} px", "pictures/s", args.extract_images, seconds)


def growth(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Decoding, without the official code, against the batch, the grid and the depth."""
    sweeps = {
        "batch": (args.growth_batch_sizes, lambda batch: dict(decode_batch_sizes=[batch])),
        "grid": (args.growth_grid_sizes, lambda grid: dict(decode_batch_sizes=[1], grid_size=grid)),
        "depth": (args.growth_depths, lambda depth: dict(decode_batch_sizes=[1], code_depth=depth)),
    }
    for kind, (values, settings) in sweeps.items():
        for value in values:
            for line in decode(replace(args, **settings(value)), device, None, more=False):
                yield line | {"section": "growth", "against": kind, "value": value}


def plot_growth(rows: list[dict], folder: Path) -> None:
    """growth_batch.png: images/s against the batch; growth_grid_depth.png: seconds an image against grid and depth."""

    def draw(axes, kind: str, label: str, of: Callable[[float], float]) -> None:
        lines = [line for line in rows if line.get("against") == kind]
        values = [line["value"] for line in lines]
        axes.plot(values, [of(line["ours"]) for line in lines], "o-", label="ours")
        for name in ("floor", "packed_floor"):
            rates = [line["ours"] * line[f"times_{name}"] for line in lines if f"times_{name}" in line]
            if rates:
                axes.plot(values, [of(rate) for rate in rates], "o--", label=name.replace("_", " "))
        axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()

    figure = import_figure()(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    draw(axes, "batch", "pictures at once", lambda rate: rate)
    axes.set_ylabel("pictures/s")
    figure.savefig(folder / "growth_batch.png", dpi=120)
    figure = import_figure()(figsize=(9, 3.5), layout="constrained")
    grid, depth = figure.subplots(1, 2)
    draw(grid, "grid", "rows and columns of the grid", lambda rate: 1 / rate)
    draw(depth, "depth", "codes a position", lambda rate: 1 / rate)
    grid.set_ylabel("seconds a picture")
    figure.savefig(folder / "growth_grid_depth.png", dpi=120)


def as_markdown(rows: list[dict]) -> str:
    """A table of the rows; figures that only some have come last, by name."""
    columns = ["section", "what", "unit", "ours", "spread", "reference", "ratio", "times_floor", "times_packed_floor"]
    columns = [name for name in columns if any(name in line for line in rows)]
    columns += sorted({name for line in rows for name in line} - set(columns))

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(line.get(name, "")) for name in columns] for line in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: BenchmarkArguments) -> None:
    device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    reference = Reference(args.reference) if args.reference else None
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    rows = []
    for section in args.sections:
        for line in globals()[section](args, device, reference):
            rows.append(line)
            print(as_markdown([line]), flush=True)
    print(f"\n{as_markdown(rows)}\n\n{', '.join(machine.values())}; medians of {args.repeats}.")
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "arguments": asdict(args), "rows": rows}
        (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "benchmark.md").write_text(f"{as_markdown(rows)}\n")
        if "growth" in args.sections:
            plot_growth(rows, folder)


if __name__ == "__main__":
    main(parse_arguments(BenchmarkArguments))
