"""Options that tasks share: their checks, and what they load."""

from dataclasses import dataclass

import pytest
import torch

from dnd_hf.evaluation.options import PipelineOptions, RealImageOptions, SamplesOptions, TaskOptions, option


def test_an_option_has_its_help_and_a_list_of_its_own():
    @dataclass
    class Options:
        numbers: list[int] = option([1], "Some numbers.")

    first, second = Options(), Options()
    first.numbers.append(2)
    assert second.numbers == [1] and Options.__dataclass_fields__["numbers"].metadata == {"help": "Some numbers."}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_dir=None), "`output_dir` is needed"),
        (dict(model=[]), "`model` is needed.$"),
        (dict(model=["a", "a"]), "names one twice"),
        (dict(model=["a", "b", "c"]), "takes 2 `model`, got 3"),
        (dict(batch_size=0), "`batch_size` must be positive, got 0"),
        (dict(num_workers=-1), "`num_workers` must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TaskOptions(**{"model": ["a"], "output_dir": "out", **options}).check_task("words", max_models=2)


def test_the_check_fills_in_what_depends_on_the_task():
    options = SamplesOptions(model=["a"], output_dir="out")
    options.check_task("ppl_ocr", default_batch_size=7)
    options.check_samples(default_num_images=30)
    assert options.batch_size == 7 and options.num_images == 30
    given = SamplesOptions(samples=["a"], output_dir="out", batch_size=2)
    given.check_task("ppl_ocr", default_batch_size=7)
    given.check_samples(default_num_images=30)
    assert given.batch_size == 2 and given.num_images is None  # all of the samples


def test_real_images_come_at_the_size_of_the_tokenizer_or_at_the_one_given(make_vae):
    options = RealImageOptions(dataset_name="words", num_dataset_images=3)
    assert options.texts_known and options.size_for(make_vae(sample_size=(16, 64))) == (16, 64)
    dataset = options.load_dataset((16, 64))
    assert len(dataset) == 3 and dataset[0]["pixel_values"].shape == (3, 16, 64)
    assert RealImageOptions(sample_size=[8, 6]).size_for(make_vae()) == (8, 6)
    with pytest.raises(ValueError, match="do not divide"):
        RealImageOptions(sample_size=[7, 6]).size_for(make_vae())
    with pytest.raises(ValueError, match="`background` must be"):
        RealImageOptions(background="grey").check_real_images()
    with pytest.raises(ValueError, match="`dataset_name` is needed: the real images that rocr measures"):
        RealImageOptions().check_real_images("rocr")


def test_a_pipeline_and_its_tokenizer_may_have_two_precisions(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    options = PipelineOptions(dtype="bfloat16", vqvae_dtype="float32", device="cpu")
    pipe = options.load_pipeline(str(tmp_path))
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vqvae.dtype == torch.float32
    pipe = PipelineOptions(dtype="bfloat16", device="cpu").load_pipeline(str(tmp_path))
    assert pipe.transformer.dtype == pipe.vqvae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`top_p` must be within"):
        PipelineOptions(top_p=0.0).check_sampling()


def test_names_of_models_become_names_of_folders():
    options = SamplesOptions(output_dir="out")
    assert str(options.sample_path("me/dnd b@2")) == "out/samples/me-dnd-b-2"
    assert str(options.sample_path("../dnd/", ".npz")) == "out/samples/..-dnd.npz"
