"""The options of the benchmark, which all suites share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from dnd_hf.figures import import_figure


SECTIONS = ("decode", "train", "quantize", "tokenize", "extract", "growth", "architectures", "memory", "trained")
ARCHITECTURE_JOBS = ("sampling", "training")


@dataclass
class BenchmarkArguments:
    """Options of this script; they can also be in a YAML file given as `--config`."""

    sections: list[str] = HfArg(
        default_factory=lambda: list(SECTIONS[:-1]),
        help=f"What to time: {', '.join(SECTIONS)}. Default: all but the last, which needs --pipeline.",
    )
    reference: str | None = HfArg(
        default=None, help="Checkout of the official repository; without it, its columns stay out."
    )
    rq_reference: str | None = HfArg(
        default=None, help="Checkout of kakaobrain/rq-vae-transformer, for the section architectures."
    )
    output_dir: str | None = HfArg(default=None, help="Also write benchmark.json and benchmark.md there.")
    repeats: int = HfArg(default=5, help="Times that each is run, after one that does not count.")
    device: str | None = HfArg(default=None, help="Default: a GPU where there is one.")
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None,
        help="Of decoding and training. Default: bfloat16, or float32 on CPUs that have no instructions for it.",
    )
    torch_compile: bool = HfArg(
        default=False,
        help="Compile training steps and tokenizers, ours and the official ones, and our layers in decoding.",
    )
    cuda_graphs: bool = HfArg(default=True, help="On GPUs: replay our decoding steps as CUDA graphs.")
    cpu_kernels: bool = HfArg(default=False, help="On CPUs: compile C++ kernels for our decoding steps.")
    channels_last: bool = HfArg(default=False, help="Memory format of our tokenizer in tokenize.")
    size: Literal["B", "L", "XL", "XXL", "XXXL"] = HfArg(default="B", help="Transformer of decode and train.")
    code_depth: int = HfArg(default=2, help="Codes per position in decode, train and extract.")
    grid_size: int = HfArg(default=16, help="Rows, and columns, of decode and train.")
    guidance_scale: float = HfArg(default=2.0, help="Of decode.")
    decode_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 8], help="Images decoded at once.")
    positions_per_pass: list[str] = HfArg(
        default_factory=lambda: ["1"], help="Of decode and trained, a row for each: numbers, or auto."
    )
    train_batch_size: int = HfArg(default=8, help="Images of a training step.")
    quantizer_depth: int = HfArg(default=8, help="Codes per position in quantize, of 16,384.")
    quantizer_batch_size: int = HfArg(default=8, help="Images of 16 x 16 positions in quantize.")
    tokenize_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 32], help="256-pixel images in tokenize.")
    extract_images: int = HfArg(default=8, help="Images of ten crops in extract.")
    image_size: int = HfArg(default=256, help="Pixels, of tokenize and extract.")
    growth_batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8, 16], help="Of growth.")
    growth_grid_sizes: list[int] = HfArg(default_factory=lambda: [8, 12, 16, 24, 32], help="Of growth, at batch 1.")
    growth_depths: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8], help="Of growth, at batch 1.")
    architecture_jobs: list[str] = HfArg(
        default_factory=lambda: list(ARCHITECTURE_JOBS), help="Of architectures; default: sampling training."
    )
    attn_implementation: Literal["sdpa", "eager"] = HfArg(
        default="sdpa", help="Of our training steps in architectures; the official ones have their own."
    )
    architecture_depths: list[int] = HfArg(default_factory=lambda: [2, 4, 8], help="Of architectures.")

    pipeline: str | None = HfArg(
        default=None, help="Of trained: a pipeline (a folder, or `words`: the bundled one) that makes the images."
    )
    trained_images: int = HfArg(default=16, help="Of trained: images, made one by one.")
    trained_temperature: float | None = HfArg(default=None, help="Of trained; default: the pipeline's own.")
    trained_guidance_scale: float | None = HfArg(default=None, help="Of trained; default: the pipeline's own.")
    training_text: str | None = HfArg(
        default=None,
        help="Of trained, for pages of monospaced text: .txt, .jsonl or .parquet files; the share of words in it.",
    )

    @property
    def widths(self) -> list[int | str]:
        """`positions_per_pass` as `generate` takes them."""
        return [width if width == "auto" else int(width) for width in self.positions_per_pass]

    def __post_init__(self):
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"`sections` must be of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}.")
        if not self.architecture_jobs or set(self.architecture_jobs) - set(ARCHITECTURE_JOBS):
            raise ValueError(f"`architecture_jobs` must be sampling or training, got {self.architecture_jobs}.")
        for name in (
            "repeats",
            "code_depth",
            "grid_size",
            "train_batch_size",
            "quantizer_depth",
            "extract_images",
            "trained_images",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in (
            "decode_batch_sizes",
            "tokenize_batch_sizes",
            "growth_batch_sizes",
            "growth_grid_sizes",
            "growth_depths",
            "architecture_depths",
        ):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be positive numbers, got {getattr(self, name)}.")
        if not self.positions_per_pass or not all(w == "auto" or w.isdecimal() for w in self.positions_per_pass):
            raise ValueError(f"`positions_per_pass` must be numbers or auto, got {self.positions_per_pass}.")
        if "trained" in self.sections and self.pipeline is None:
            raise ValueError("`pipeline` is needed for the section trained.")
        if "growth" in self.sections and self.output_dir:
            import_figure()
        if self.reference is not None and not Path(self.reference, "src", "dnd_transformer").is_dir():
            raise ValueError(f"`reference` {self.reference} is no checkout of the official repository.")
        if self.rq_reference is not None and not Path(self.rq_reference, "rqvae", "models", "rqtransformer").is_dir():
            raise ValueError(f"`rq_reference` {self.rq_reference} is no checkout of kakaobrain/rq-vae-transformer.")
