"""Turns pictures into a dataset of codes, so that training the transformer need not run the tokenizer.

python examples/extract_codes.py --dataset_name words --num_train_images 50000 --vqvae rqvae-words --output_dir codes
accelerate launch examples/extract_codes.py --dataset_name photos --ten_crop --vqvae rqvae --output_dir codes-photos

Each process encodes its share of the pictures in their order; no picture is lost or doubled. Codes are computed in
float32, whatever the hardware prefers, because rounding changes them.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE
from dnd_hf.data.codes import MAX_VOCAB_SIZE, codes_features, join_codes, write_codes
from dnd_hf.data.images import ImageTransform, TenCrop, as_size, check_stride, collate_images
from dnd_hf.training.arguments import ImageArguments, parse_arguments


@dataclass
class ExtractionArguments(ImageArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    vqvae: str | None = HfArg(default=None, help="The tokenizer: a folder or a Hub id.")
    output_dir: str | None = HfArg(default=None, help="Folder of the codes and a copy of the tokenizer.")
    sample_size: list[int] | None = HfArg(default=None, help="Height and width in pixels; default: the tokenizer's.")
    ten_crop: bool = HfArg(
        default=False, help="Ten rows a picture: four corners, the center, and their mirror images; not for text."
    )
    crop_range: float = HfArg(default=1.1, help="For --ten_crop: the picture first covers this many times its size.")
    batch_size: int = HfArg(default=32, help="Pictures a forward pass, for each process.")

    def __post_init__(self):
        for name in ("dataset_name", "vqvae", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is needed.")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be positive, got {self.batch_size}.")
        if Path(self.output_dir, "dataset_info.json").exists():
            raise ValueError(f"--output_dir {self.output_dir} holds a data set already.")


@torch.inference_mode()
def encode(vae: RQVAE, loader: DataLoader, first_image: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Codes, labels and image indices of each batch; several crops of a picture become several rows."""
    for batch in loader:
        pixels, labels = batch["pixel_values"], batch["labels"]
        image_index = torch.arange(first_image, first_image + len(labels))
        first_image += len(labels)
        crops = pixels.shape[1] if pixels.ndim == 5 else 1
        codes = vae.encode(pixels.view(-1, *pixels.shape[-3:]).to(vae.device)).codes
        yield codes, labels.repeat_interleave(crops), image_index.repeat_interleave(crops)


def main(args: ExtractionArguments) -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())
    torch.backends.cudnn.allow_tf32 = False
    vae = RQVAE.from_pretrained(args.vqvae).to(state.device).eval()
    if vae.config.num_vq_embeddings > MAX_VOCAB_SIZE:
        raise ValueError(f"codes are stored in 16 bits; the codebook has {vae.config.num_vq_embeddings} entries.")
    size = as_size(args.sample_size or vae.config.sample_size)
    check_stride(size, vae.code_stride)
    dataset = args.load_images(TenCrop(size, args.crop_range) if args.ten_crop else ImageTransform(size))
    shape = (size[0] // vae.code_stride[0], size[1] // vae.code_stride[1], vae.config.code_depth)

    first, end = (len(dataset) * rank // state.num_processes for rank in (state.process_index, state.process_index + 1))
    loader = DataLoader(
        Subset(dataset, range(first, end)),
        args.batch_size,
        collate_fn=collate_images,
        num_workers=args.dataloader_num_workers,
    )
    output_dir = Path(args.output_dir)
    shards = output_dir / "unfinished"
    if state.is_main_process:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
    state.wait_for_everyone()
    batches = encode(vae, tqdm(loader, unit="batch", disable=not state.is_main_process), first)
    write_codes(shards / f"{state.process_index:05d}.arrow", codes_features(shape, dataset.class_names), batches)
    state.wait_for_everyone()
    if state.is_main_process:
        join_codes(shards, output_dir)
        vae.save_pretrained(output_dir / "vqvae")
        print(f"{args.output_dir}: codes of {len(dataset)} pictures, {shape[0]} x {shape[1]} x {shape[2]} each.")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse_arguments(ExtractionArguments))
