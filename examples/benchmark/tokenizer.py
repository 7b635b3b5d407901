"""The suites tokenize and extract: images to codes and back, and the codes of a data set to disk."""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from official import Reference
from options import BenchmarkArguments
from PIL import Image
from timing import extra_memory, row, side_by_side, with_kept_memory
from torch.utils.data import DataLoader

from dnd_hf import RQVAE
from dnd_hf.data.codes import CodesWriter, ShardReader, codes_features
from dnd_hf.data.images import ImageDataset, TenCrop
from dnd_hf.ops.cpu_precision import has_instructions


@torch.no_grad()
def tokenize(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Images to codes, in float32, and back, in bfloat16 too, but on CPUs that have no instructions for it: grey levels
    (of 255) say how far off that is."""
    vae = make_tokenizer(args, args.code_depth, device)
    official = reference.tokenizer(vae).to(device) if reference else None
    half = deepcopy(vae).to(torch.bfloat16) if has_instructions(device, torch.bfloat16) else None
    if args.channels_last:
        for model in filter(None, (vae, half)):
            model.to(memory_format=torch.channels_last)
    if args.torch_compile:
        for model in filter(None, (vae, half, official)):
            model.encoder.compile()
            model.decoder.compile()
    for batch in args.tokenize_batch_sizes:
        images = torch.rand(batch, 3, args.image_size, args.image_size, device=device) * 2 - 1
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        codes = vae.encode(images).codes
        encoding = {"ours": partial(vae.encode, images)}
        decoding = {"ours": partial(vae.decode_codes, codes)}
        if half:
            decoding["half"] = partial(half.decode_codes, codes)
        if official:
            encoding["reference"] = partial(official.get_codes, images)
            decoding["reference"] = partial(official.decode_code, codes)
        seconds = side_by_side(encoding, device, args.repeats)
        what = f"{args.image_size} px, batch {batch}{', channels last' * args.channels_last}"
        what += ", compiled" * args.torch_compile
        memory = extra_memory(encoding["ours"], device)
        yield row("tokenize", f"encode, {what}", "images/s", batch, seconds, memory_mb=memory)
        seconds = side_by_side(decoding, device, args.repeats)
        half_seconds = seconds.pop("half", None)
        memory = extra_memory(decoding["ours"], device)
        yield row("tokenize", f"decode, {what}", "images/s", batch, seconds, memory_mb=memory)
        if half:
            exact, rounded = (decoding[name]().sample.float().clamp(-1, 1) for name in ("ours", "half"))
            off = {"grey_levels": (exact - rounded).abs().mean().item() * 127.5}
            memory, seconds = extra_memory(decoding["half"], device), {**seconds, "ours": half_seconds}
            yield row("tokenize", f"decode in bfloat16, {what}", "images/s", batch, seconds, memory_mb=memory, **off)


def extract(args: BenchmarkArguments, device: torch.device, reference: Reference | None) -> Iterator[dict]:
    """Ten crops of each image to codes on disk: extract_codes.py's way, and the official: one image per batch, its
    whole autoencoder, two files per image."""
    vae = make_tokenizer(args, args.code_depth, device)
    vae.use_slicing = device.type == "cpu"
    generator = np.random.default_rng(0)
    side = args.image_size * 5 // 4
    images = [
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(args.extract_images)
    ]
    transform = TenCrop(args.image_size)
    dataset = ImageDataset([{"image": image, "label": 0} for image in images], transform, ["image"])
    rows, columns = vae.grid_size

    @torch.inference_mode()
    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = CodesWriter(folder, codes_features((rows, columns, args.code_depth), ["image"]), {})
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
    for memory, seconds in with_kept_memory(functions, device, args.repeats).items():
        yield row("extract", f"ten crops, {args.image_size} px{memory}", "images/s", args.extract_images, seconds)


def make_tokenizer(args: BenchmarkArguments, depth: int, device: torch.device) -> RQVAE:
    """The paper's tokenizer, f = 16, with random weights."""
    torch.manual_seed(0)
    return RQVAE(sample_size=args.image_size, code_depth=depth).eval().to(device)
