# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[pdf]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Cuts random crops from the pages of PDFs, each kept with the text inside it, as in the paper's arXiv-Image data set.

python examples/make_pdf_images.py --pdf_dir papers --output_dir pdf-images

The same command resumes where the last one was stopped, however it was. docs/data.md describes the result.
"""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.data.image_shards import ShardArguments, in_batches
from dnd_hf.data.pdf import PdfCrops


@dataclass
class PdfImageArguments(ShardArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    pdf_dir: str | None = HfArg(default=None, help="Folder of the PDFs, with its subfolders.")
    page_size: list[int] = HfArg(
        default_factory=lambda: [1782, 1260],
        help="Height and width in pixels that pages are scaled to fit into, with their proportions.",
    )
    crop_size: list[int] = HfArg(default_factory=lambda: [512], help="Height and width of the crops in pixels.")
    crops_per_page: int = HfArg(default=10, help="Random crops of each page.")
    min_ink: float = HfArg(default=0.01, help="Crops with a smaller share of dark pixels are left out.")
    shard_pages: int = HfArg(default=50, help="Pages that a file is made of.")

    def __post_init__(self):
        super().__post_init__()
        if self.pdf_dir is None:
            raise ValueError("--pdf_dir is needed.")
        if self.shard_pages < 1:
            raise ValueError(f"--shard_pages must be positive, got {self.shard_pages}.")
        self.crops = PdfCrops(
            self.pdf_dir, self.page_size, self.crop_size, self.crops_per_page, self.min_ink, self.seed
        )


def main(args: PdfImageArguments) -> None:
    shards = args.open_shards(args.crops, pdfs_digest=args.crops.pdfs_digest())
    if shards.is_complete:
        print(f"{args.output_dir} is complete already.")
    else:
        shards.make(in_batches(args.crops.pages(), args.shard_pages), args.num_processes)


if __name__ == "__main__":
    run_script(main, PdfImageArguments)
