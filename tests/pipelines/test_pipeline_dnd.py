"""The pipeline: labels, outputs, defaults, callbacks."""

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback

from dnd_hf import DnDPipeline


IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
HOLE = PIL.Image.fromarray(np.repeat([[0] * 6, [255] * 6], 2, axis=0).astype(np.uint8))


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


@pytest.mark.parametrize("returned", ["tensors", "nothing", "other"])
def test_a_callback_may_look_at_the_codes_and_not_change_them(returned, make_pipeline):
    pipe = make_pipeline()

    def callback(pipeline, step, timestep, tensors):
        answer = {"tensors": tensors, "nothing": {}, "other": {"other": torch.zeros(1)}}[returned]
        if returned != "tensors":
            tensors["codes"][:] = 0  # of a copy
        return answer

    codes = pipe(1, generator=generators(0), callback_on_step_end=callback, output_type="codes").images
    assert torch.equal(codes, codes_of(pipe, 1, 0))


@pytest.mark.parametrize("new", [lambda codes: codes.zero_(), lambda codes: codes[:, :1]], ids=["values", "shape"])
def test_a_callback_that_replaces_the_codes_is_an_error(new, make_pipeline):
    with pytest.raises(ValueError, match="`callback_on_step_end` must not change the codes"):
        make_pipeline()(1, callback_on_step_end=lambda pipe, step, _, tensors: {"codes": new(tensors["codes"])})


def test_a_callback_gets_the_tensors_that_are_asked_for(make_pipeline):
    pipe, calls = make_pipeline(), []

    def callback(pipeline, step, timestep, tensors):
        calls.append(sorted(tensors))
        return tensors

    pipe(1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    pipe(1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["codes"])
    assert calls == [[]] * 6 + [["codes"]] * 6
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` must be of .*, got \['latents'\]"):
        pipe(1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "codes"])


def test_a_callback_object_of_diffusers_names_its_tensors(make_pipeline):
    class Watch(PipelineCallback):
        tensor_inputs = ["codes"]

        def callback_fn(self, pipeline, step, timestep, tensors):
            seen.append(tensors["codes"])
            return tensors

    seen = []
    watch = Watch(cutoff_step_ratio=None, cutoff_step_index=0)
    codes = make_pipeline()(1, callback_on_step_end=watch, output_type="codes").images
    assert torch.equal(seen[-1], codes)


def test_an_interrupt_ends_the_sampling_with_the_codes_so_far(make_pipeline):
    pipe, steps = make_pipeline(), []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = step == 2
        return tensors

    part = pipe(1, generator=generators(0), callback_on_step_end=callback, output_type="codes").images
    assert steps == [0, 1, 2] and pipe.interrupt
    whole = codes_of(pipe, 1, 0)
    assert not pipe.interrupt
    assert torch.equal(part.flatten(1, 2)[:, :3], whole.flatten(1, 2)[:, :3])
    assert not part.flatten(1, 2)[:, 3:].any() and whole.flatten(1, 2)[:, 3:].any()
    (image,) = pipe(1, callback_on_step_end=callback).images
    assert image.size == (6, 4)


def test_without_a_tokenizer_it_makes_codes_and_nothing_else(make_pipeline, tmp_path):
    whole = make_pipeline()
    whole.save_pretrained(tmp_path / "whole")
    pipe = DnDPipeline(transformer=whole.transformer, vqvae=None)
    pipe.save_pretrained(tmp_path / "codes")
    assert not (tmp_path / "codes" / "vqvae").exists()
    loaded = [
        DnDPipeline.from_pretrained(tmp_path / "whole", vqvae=None),
        DiffusionPipeline.from_pretrained(tmp_path / "whole", vqvae=None, trust_remote_code=True),
        DnDPipeline.from_pretrained(tmp_path / "codes"),
        DiffusionPipeline.from_pretrained(tmp_path / "codes", trust_remote_code=True),
    ]
    for one in [pipe, *loaded]:
        assert one.vqvae is None
        assert torch.equal(codes_of(one, [1, 2], 0, 1), codes_of(whole, [1, 2], 0, 1))
        with pytest.raises(ValueError, match=r"`output_type` of a pipeline without a `vqvae` must be .*, got 'pil'"):
            one(1)
    again = DnDPipeline.from_pretrained(tmp_path / "codes", vqvae=whole.vqvae)
    assert again(1, output_type="pt").images.shape == (1, 3, 4, 6)


def test_a_pipeline_is_made_of_the_models_of_another(make_pipeline):
    pipe = make_pipeline()
    pipe(0)
    made = DnDPipeline.from_pipe(pipe)
    assert made is not pipe and made.transformer is pipe.transformer and made.vqvae is pipe.vqvae
    assert torch.equal(codes_of(made, 1, 0), codes_of(pipe, 1, 0))
    assert DnDPipeline.from_pipe(pipe, vqvae=None).vqvae is None
    assert DnDPipeline.from_pipe(DnDPipeline(pipe.transformer, None), vqvae=pipe.vqvae).vqvae is pipe.vqvae
    assert DnDPipeline.from_pipe(pipe, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    assert pipe.vqvae.quantizer.codebooks.dtype == torch.float32


def test_a_near_name_is_proposed_whatever_its_case(make_pipeline):
    pipe = make_pipeline(id2label={0: "WHALE", 1: "Tiger", 2: "b", 3: "c"})
    for name, proposed in (("whale", "'WHALE'"), ("TIGERS", "'Tiger'"), ("xyzzy", "'WHALE', 'Tiger', 'b', 'c'")):
        with pytest.raises(ValueError, match=f"got '{name}'.*{proposed}"):
            pipe(name)


def test_counts_and_seeds_may_be_numbers_of_numpy(make_pipeline):
    pipe = make_pipeline()
    codes = pipe(1, num_images_per_label=np.int64(2), generator=np.int64(3), output_type="codes").images
    expected = pipe.transformer.generate([1, 1], generator=torch.Generator().manual_seed(3))
    assert torch.equal(codes, expected)
    assert torch.equal(pipe([1, 2], generator=[4, 5], output_type="codes").images, codes_of(pipe, [1, 2], 4, 5))
    for wrong in (0, True, 1.0, np.float64(2), "2", None):
        with pytest.raises(ValueError, match=r"`num_images_per_label` must be (a whole number|at least 1), got"):
            pipe(1, num_images_per_label=wrong)


def offload_layer_by_layer(pipe):
    """`enable_sequential_cpu_offload` as for a GPU, which names the device "cpu:0" and fails there in accelerate."""
    for model in (pipe.transformer, pipe.vqvae):
        cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("offload", [lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), offload_layer_by_layer])
@pytest.mark.parametrize("architecture", ["make_pipeline", "make_rq_pipeline"])
def test_offloaded_models_make_the_same_codes_and_images(offload, architecture, request):
    pipe = request.getfixturevalue(architecture)()
    codes, image = (pipe(1, generator=generators(0), output_type=kind).images for kind in ("codes", "pt"))
    offload(pipe)
    for _ in range(2):
        assert torch.equal(pipe(1, generator=generators(0), output_type="codes").images, codes)
        torch.testing.assert_close(pipe(1, generator=generators(0), output_type="pt").images, image)


def test_progress_bar_counts_the_cells(make_pipeline, capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe([0])
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        dict(class_labels=[1, 2], generator=[3, 4]),
        dict(class_labels=1, num_candidates=2, generator=3),
        dict(class_labels=1, height=8, width=8, overlap=1, generator=3),
        dict(class_labels=1, image=IMAGE, mask_image=HOLE, mask_ring=0, generator=3),
    ],
    ids=["labels", "candidates", "a larger image", "inpainting"],
)
def test_passes_of_several_positions_give_the_same_codes(options, make_pipeline, monkeypatch):
    pipe, counts = make_pipeline(), []
    decode = pipe.transformer.decode
    monkeypatch.setattr(pipe.transformer, "decode", lambda *args: counts.append(args[-1]) or decode(*args))
    one_by_one = pipe(**options, output_type="codes", positions_per_pass=1).images
    assert set(counts) == {1}
    counts.clear()
    assert torch.equal(pipe(**options, output_type="codes", positions_per_pass=3).images, one_by_one)
    assert max(counts) == 3


def test_particles_go_position_by_position(make_pipeline):
    pipe = make_pipeline()
    options = dict(class_labels=1, image=IMAGE, mask_image=HOLE, mask_ring=0, num_particles=2, generator=3)
    assert pipe(**options, positions_per_pass=1).images[0].tobytes() == pipe(**options).images[0].tobytes()
    with pytest.raises(ValueError, match=r"`positions_per_pass` must be .* with particles.* got 4"):
        pipe(**options, positions_per_pass=4)


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
