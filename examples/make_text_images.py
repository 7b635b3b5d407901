# /// script
# requires-python = ">=3.11"
# dependencies = ["dnd-hf[text]"]
#
# [tool.uv.sources]
# dnd-hf = { path = "..", editable = true }
# ///
"""Draws prose: images of consecutive words, each kept with its text, as in the paper's Text-Image data set.

python examples/make_text_images.py --dataset_name "books/*.txt" --output_dir text-images
python examples/make_text_images.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT \
    --streaming --num_texts 100000 --output_dir text-images

The same command resumes where the last one was stopped, however it was. docs/data.md describes the result.
"""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.data.image_shards import ShardArguments, in_batches
from dnd_hf.data.text import DEFAULT_FONTS, TextImages, load_texts


@dataclass
class TextImageArguments(ShardArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    dataset_name: str | None = HfArg(
        default=None,
        help="A data set on the Hub, a folder, or .txt, .jsonl, .json, .csv or .parquet files; patterns in quotes.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set on the Hub.")
    dataset_split: str = HfArg(default="train", help="Split of the data set.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    sample_by: Literal["line", "paragraph", "document"] = HfArg(
        default="paragraph", help="What one text of .txt files is; a paragraph ends with an empty line."
    )
    streaming: bool = HfArg(default=False, help="Read the data set as it arrives instead of downloading it whole.")
    num_texts: int | None = HfArg(default=None, help="How many texts to use, the first ones; default: all.")
    fonts: list[str] = HfArg(
        default_factory=lambda: list(DEFAULT_FONTS),
        help="Files (.ttf, .otf), or names of the faces that matplotlib ships; each image takes one at random.",
    )
    image_size: list[int] = HfArg(default_factory=lambda: [512], help="Height and width in pixels.")
    font_size: int = HfArg(default=32, help="Size of the font, pixels an em.")
    margin: int = HfArg(default=20, help="Pixels along each edge that no ink touches.")
    max_words: int = HfArg(default=100, help="Most words of an image.")
    min_words: int = HfArg(default=1, help="Images of fewer words, such as the end of a text, are left out.")
    line_spacing: float = HfArg(default=1.0, help="Distance of lines, in heights of a line.")
    line_height: int | None = HfArg(
        default=None,
        help="Pixels of a line; default: the font's ascent and descent. Words with ink beyond it are left out.",
    )
    max_images: int | None = HfArg(default=None, help="Most images of a text, its first ones; default: all.")
    shard_characters: int = HfArg(default=200_000, help="Characters of text that a file is made of, at least.")

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("--dataset_name is needed.")
        if self.shard_characters < 1:
            raise ValueError(f"--shard_characters must be positive, got {self.shard_characters}.")
        if self.num_texts is not None and self.num_texts < 1:
            raise ValueError(f"--num_texts must be positive, got {self.num_texts}.")
        self.images = TextImages(
            self.fonts,
            self.image_size,
            self.font_size,
            self.margin,
            self.max_words,
            self.min_words,
            self.line_spacing,
            self.seed,
            self.line_height,
            self.max_images,
        )


def main(args: TextImageArguments) -> None:
    shards = args.open_shards(args.images, font_digests=args.images.font_digests())
    if shards.is_complete:
        print(f"{args.output_dir} is complete already.")
        return
    texts = load_texts(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.text_column,
        args.streaming,
        args.sample_by,
        args.num_texts,
    )
    shards.make(in_batches(texts, args.shard_characters, lambda item: len(item[1])), args.num_processes)


if __name__ == "__main__":
    run_script(main, TextImageArguments)
