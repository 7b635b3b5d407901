"""The bundled pipelines: complete, small, and without code."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from dnd_hf import DnDPipeline, bundled_checkpoint
from dnd_hf.bundled import bundled_names
from dnd_hf.data.words import WORDS
from dnd_hf.evaluation.glyphs import GlyphReader
from dnd_hf.evaluation.reference_text import words_of


MEGABYTES = {"verses": 16, "words": 10}
FREQUENT_WORDS = words_of("""
    the and of to in that he shall for unto i his a lord they be is them him not with it all thou thy god was my which
    their me will thee but said ye have from as are upon out when were this israel by you man up
""")
"""The 50 most frequent words of the text that `verses` was trained on: 0.51 of the words of the held-out books."""


@pytest.fixture(scope="module")
def words() -> DnDPipeline:
    pipe = DnDPipeline.from_pretrained(bundled_checkpoint("words"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_words_names_its_classes_and_makes_pictures_of_its_size(words):
    assert list(words.transformer.config.id2label.values()) == list(WORDS)
    images = words(["QUEEN", "TIGER"], generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(128, 32)] * 2


def test_words_pictures_depend_on_their_own_seed_alone(words):
    def codes(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return words([seed % 100 for seed in seeds], generator=generators, output_type="codes").images

    assert torch.equal(codes([3, 141, 59])[1:2], codes([141]))


def test_verses_writes_pages_of_words_without_labels():
    pipe = DnDPipeline.from_pretrained(bundled_checkpoint("verses"))
    pipe.set_progress_bar_config(disable=True)
    pages = pipe(num_images_per_label=16, generator=list(range(16))).images
    assert [page.size for page in pages] == [(128, 128)] * 16
    read = GlyphReader("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz,;:.?!'()-")(pages)
    words = [word.lower() for page in read for word in words_of(page)]
    assert len(words) > 16 * 15
    assert sum(word in FREQUENT_WORDS for word in words) / len(words) > 0.4


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_bundled_pipeline_keeps_to_its_size(name):
    files = [path for path in Path(bundled_checkpoint(name)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MEGABYTES[name] * 1_000_000


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_bundled_pipeline_is_weights_and_json(name):
    suffixes = {path.suffix for path in Path(bundled_checkpoint(name)).rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_words_loads_in_a_new_process_by_diffusers_with_the_installed_package():
    program = """
        from diffusers import DiffusionPipeline

        from dnd_hf import DnDPipeline, bundled_checkpoint

        folder = bundled_checkpoint("words")
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert type(pipe) is DnDPipeline
        assert {str(model.dtype) for model in (pipe.transformer, pipe.vqvae)} == {"torch.float32"}
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_unknown_bundled_checkpoint_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"`name` must be one of \[.*\], got 'no such'"):
        bundled_checkpoint("no such")


def test_every_bundled_pipeline_is_named():
    assert bundled_names() == sorted(MEGABYTES)
    for name in bundled_names():
        assert (Path(bundled_checkpoint(name)) / "model_index.json").is_file()
