"""The pipeline: labels, outputs, defaults, callbacks."""

import numpy as np
import PIL.Image
import pytest
import torch

from dnd_hf import DnDPipeline


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def codes_of(pipe, class_labels, *seeds) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels, generator=generators(*seeds), output_type="codes").images


@pytest.mark.parametrize(
    "class_labels",
    [
        1,
        "goldfish",
        "Carassius auratus",
        "goldfish, Carassius auratus",
        [1],
        ["goldfish"],
        (1,),
        torch.tensor(1),
        torch.tensor([1]),
        np.array([1]),
        np.int64(1),
        [np.int64(1)],
    ],
    ids=repr,
)
def test_a_label_may_be_a_number_a_name_or_part_of_a_name_one_or_a_list(class_labels, make_pipeline):
    pipe = make_pipeline()
    expected = pipe.transformer.generate([1], generator=generators(0))
    assert torch.equal(codes_of(pipe, class_labels, 0), expected)


def test_numbers_and_names_may_be_mixed_and_keep_their_order(make_pipeline):
    pipe = make_pipeline()
    expected = pipe.transformer.generate([3, 0, 2], generator=generators(0, 1, 2))
    assert torch.equal(codes_of(pipe, ["tiger shark", 0, "great white shark"], 0, 1, 2), expected)


def test_names_and_their_parts_have_ids(make_pipeline):
    pipe = make_pipeline()
    assert pipe.get_label_ids(["tench", "tiger shark", "Tinca tinca", "tench, Tinca tinca"]) == [0, 3, 0, 0]
    assert pipe.get_label_ids("goldfish") == [1]
    assert set(pipe.labels.values()) == {0, 1, 2, 3} and len(pipe.labels) == 8


def test_a_part_of_two_names_means_the_first(make_pipeline):
    names = {0: "crane, bird", 1: "crane", 2: "b", 3: "bird"}
    assert make_pipeline(id2label=names).get_label_ids(["crane", "bird"]) == [0, 0]


def test_images_of_one_label_stand_side_by_side(make_pipeline):
    pipe = make_pipeline()
    expected = pipe.transformer.generate([2, 2, 0, 0], generator=generators(0, 1, 2, 3))
    codes = pipe([2, 0], num_images_per_label=2, generator=generators(0, 1, 2, 3), output_type="codes").images
    assert torch.equal(codes, expected)
    assert pipe(["tench"], num_images_per_label=3, output_type="codes").images.shape == (3, 2, 3, 2)


def test_every_output_type_is_the_decoded_codes(make_pipeline):
    pipe = make_pipeline()
    images = {kind: pipe([0, 1], generator=generators(5, 6), output_type=kind).images for kind in ("codes", "pt", "np")}
    images["pil"] = pipe([0, 1], generator=generators(5, 6)).images
    assert images["codes"].shape == (2, 2, 3, 2) and images["codes"].dtype == torch.int64
    with torch.no_grad():
        samples = pipe.vqvae.decode_codes(images["codes"]).sample
    expected = ((samples + 1) / 2).clamp(0, 1)
    assert expected.std() > 0.01
    assert images["pt"].shape == (2, 3, 4, 6)
    torch.testing.assert_close(images["pt"], expected, rtol=0, atol=1e-6)
    assert images["np"].shape == (2, 4, 6, 3)
    np.testing.assert_allclose(images["np"], expected.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-6)
    for image, array in zip(images["pil"], images["np"]):
        assert isinstance(image, PIL.Image.Image) and image.size == (6, 4)
        np.testing.assert_allclose(np.asarray(image), 255 * array, rtol=0, atol=0.5 + 1e-3)


def test_a_tuple_comes_on_request(make_pipeline):
    pipe = make_pipeline()
    (images,) = pipe([0], generator=generators(0), output_type="codes", return_dict=False)
    assert torch.equal(images, codes_of(pipe, [0], 0))


def test_callback_is_called_after_every_cell(make_pipeline):
    pipe, calls = make_pipeline(), []

    def callback(pipeline, step, timestep, tensors):
        calls.append((pipeline, step, timestep, tensors["codes"].clone()))

    codes = pipe([0, 1], callback_on_step_end=callback, output_type="codes").images
    assert [(step, timestep) for _, step, timestep, _ in calls] == [(i, i) for i in range(6)]
    assert all(pipeline is pipe for pipeline, *_ in calls)
    assert torch.equal(calls[2][3].flatten(1, 2)[:, :3], codes.flatten(1, 2)[:, :3])
    assert torch.equal(calls[-1][3], codes)


def test_progress_bar_counts_the_cells(make_pipeline, capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe([0])
    assert "6/6" in capsys.readouterr().err


def test_a_model_of_one_class_needs_no_label(make_pipeline):
    pipe = make_pipeline(num_classes=1, id2label=None)
    assert torch.equal(codes_of(pipe, None, 4), codes_of(pipe, 0, 4))
    assert len(pipe(num_images_per_label=2).images) == 2


def test_settings_go_to_generate_and_default_to_the_generation_config(make_pipeline, tmp_path):
    pipe = make_pipeline()
    settings = dict(guidance_scale=1.5, temperature=[0.5, 1.5], top_k=4, top_p=0.8)
    explicit = pipe([0, 1, 2], generator=generators(0, 1, 2), output_type="codes", **settings).images
    expected = pipe.transformer.generate([0, 1, 2], generator=generators(0, 1, 2), **settings)
    assert torch.equal(explicit, expected)
    assert not torch.equal(codes_of(pipe, [0, 1, 2], 0, 1, 2), expected)
    settings["temperature"] = 0.5
    expected = pipe.transformer.generate([0, 1, 2], generator=generators(0, 1, 2), **settings)
    pipe.transformer.generation_config.update(**settings)
    assert torch.equal(codes_of(pipe, [0, 1, 2], 0, 1, 2), expected)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(codes_of(DnDPipeline.from_pretrained(tmp_path), [0, 1, 2], 0, 1, 2), expected)
