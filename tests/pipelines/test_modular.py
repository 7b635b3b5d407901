"""The blocks of the ModularPipeline make the images of DnDPipeline, and load and save as the library says."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from dnd_hf import DnDPipeline, bundled_checkpoint
from dnd_hf.pipelines.modular import DnDBlocks, DnDModularPipeline


COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
IMAGE = PIL.Image.fromarray(COLOURS)
WHITE = PIL.Image.fromarray(np.repeat([[0] * 6, [255] * 6], 2, axis=0).astype(np.uint8))
USES = {
    "labels": dict(class_labels=["goldfish", 0], num_images_per_label=2, generator=[1, 2, 3, 4], temperature=0.8),
    "completion": dict(class_labels=1, image=IMAGE.crop((0, 0, 6, 2)), mask_ring=0, generator=5),
    "inpainting": dict(class_labels=[1, 2], image=IMAGE, mask_image=WHITE, mask_ring=0, feather=1, generator=[5, 6]),
    "particles": dict(class_labels=1, image=IMAGE, mask_image=WHITE, mask_ring=0, num_particles=3, generator=5),
    "a larger image": dict(class_labels=1, height=8, width=8, overlap=1, top_k=[4, 6], generator=7),
    "going on from an image": dict(class_labels=1, image=IMAGE, mask_ring=0, height=8, output_type="np", generator=7),
    "codes": dict(class_labels=1, output_type="codes", guidance_scale=1.0, generator=7),
    "several positions per pass": dict(class_labels=1, positions_per_pass=4, generator=7),
}


def modular_pipeline(pipe: DnDPipeline) -> DnDModularPipeline:
    modular = DnDBlocks().init_pipeline()
    modular.update_components(transformer=pipe.transformer, vqvae=pipe.vqvae)
    modular.set_progress_bar_config(disable=True)
    return modular


def arrays(images) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("make", ["make_pipeline", "make_rq_pipeline"])
@pytest.mark.parametrize("use", USES)
def test_the_blocks_make_the_images_of_the_pipeline(use, make, request):
    pipe = request.getfixturevalue(make)()
    options = USES[use]
    if not pipe.transformer.config.has_null_class:
        options = {**options, "guidance_scale": 1.0}
    expected = pipe(**options).images
    made = modular_pipeline(pipe)(output="images", **options)
    assert len(made) == len(expected)
    for one, other in zip(arrays(made), arrays(expected)):
        np.testing.assert_array_equal(one, other)


def test_a_workflow_has_only_the_blocks_that_it_needs():
    steps = {
        name: [type(step).__name__ for step in DnDBlocks().get_workflow(name).sub_blocks.values()]
        for name in DnDBlocks().available_workflows
    }
    first, last = ["DnDConditionStep", "DnDCanvasStep"], ["DnDSampleStep", "DnDDecodeStep"]
    assert steps == {
        "label": [*first, *last],
        "prompt": [*first, *last],
        "completion": [*first, "DnDCompletionStep", *last],
        "inpainting": [*first, "DnDInpaintingStep", *last],
    }


def test_a_workflow_runs_by_itself(make_pipeline):
    pipe = make_pipeline()
    modular = DnDModularPipeline(DnDBlocks().get_workflow("label"))
    modular.update_components(transformer=pipe.transformer, vqvae=pipe.vqvae)
    assert torch.equal(
        modular(class_labels=1, generator=3, output_type="codes", output="images"),
        pipe(1, generator=3, output_type="codes").images,
    )


def test_blocks_may_be_exchanged_and_left_out(make_pipeline):
    """Codes that another block has made are decoded; nothing is sampled."""
    pipe = make_pipeline()
    blocks = DnDBlocks()
    for name in ("conditions", "image", "sample"):
        blocks.sub_blocks.pop(name)
    modular = DnDModularPipeline(blocks)
    modular.update_components(transformer=pipe.transformer, vqvae=pipe.vqvae)
    codes = pipe(1, generator=3, output_type="codes").images
    (made,) = modular(codes=codes, output="images")
    np.testing.assert_array_equal(np.asarray(made), np.asarray(pipe(1, generator=3).images[0]))


@pytest.mark.parametrize("loaded_by", ["from_pretrained", "init_pipeline"])
def test_they_load_from_the_folders_of_the_pipeline(loaded_by, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipe = DnDPipeline.from_pretrained(tmp_path)
    modular = DnDModularPipeline if loaded_by == "from_pretrained" else DnDBlocks()
    modular = getattr(modular, loaded_by)(str(tmp_path))
    assert modular.transformer is None
    modular.load_components()
    assert modular.tokenizer is None
    options = dict(class_labels=1, generator=3, output_type="codes")
    assert torch.equal(modular(output="images", **options), pipe(**options).images)


def test_the_bundled_model_loads_in_float32_unless_a_dtype_is_given():
    modular = DnDModularPipeline.from_pretrained(str(bundled_checkpoint("words")))
    modular.load_components()
    assert modular.transformer.dtype == modular.vqvae.dtype == torch.float32
    modular = DnDModularPipeline.from_pretrained(str(bundled_checkpoint("words")))
    modular.load_components(dtype=torch.bfloat16)
    assert modular.transformer.dtype == torch.bfloat16


def test_a_modular_pipeline_is_saved_and_loaded_from_where_it_lies(make_pipeline, tmp_path):
    pipe = make_pipeline()
    modular_pipeline(pipe).save_pretrained(str(tmp_path / "first"), overwrite_modular_index=True)
    (tmp_path / "first").rename(tmp_path / "moved")
    index = json.loads((tmp_path / "moved" / "modular_model_index.json").read_text())
    assert index["transformer"][:2] == ["dnd_hf.models.modeling_dnd", "DnDForImageGeneration"]
    again = DnDModularPipeline.from_pretrained(str(tmp_path / "moved"))
    again.load_components()
    options = dict(class_labels=1, generator=3, output_type="codes")
    assert torch.equal(again(output="images", **options), pipe(**options).images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_labels="cat"), "`class_labels` must be names"),
        (dict(class_labels=1, height=5), "`height` must be a multiple of 2"),
        (dict(class_labels=1, mask_image=WHITE), "`mask_image` needs an `image`"),
        (dict(class_labels=1, image=IMAGE), "`image` without a `mask_image` must be smaller"),
        (dict(class_labels=1, num_particles=2), "`num_particles` above 1 needs an `image`"),
        (dict(class_labels=1, num_images_per_label=0), "`num_images_per_label` must be at least 1"),
        (dict(class_labels=1, temperature=0), "`temperature` must be"),
        (dict(class_labels=1, positions_per_pass=0), "`positions_per_pass` must be"),
        (dict(class_labels=1, output_type="gif"), "`output_type` must be one of"),
    ],
)
def test_wrong_arguments_are_refused(options, message, make_pipeline):
    with pytest.raises(ValueError, match=message):
        modular_pipeline(make_pipeline())(**options)
