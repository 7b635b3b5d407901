"""What holds of all uses of a pipeline: callbacks, the end that a callback may set, progress bars."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from dnd_hf import DnDPipeline
from dnd_hf.pipelines.modular import DnDBlocks


IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
WHITE = PIL.Image.fromarray(np.repeat([[0] * 6, [255] * 6], 2, axis=0).astype(np.uint8))
MASKED = dict(image=IMAGE, mask_image=WHITE, mask_ring=0)


def call(**options) -> Callable[..., Any]:
    return lambda pipe, **others: pipe(1, **options, **others)


def stream(by: str) -> Callable[..., Iterator]:
    return lambda pipe, **options: list(pipe.stream(1, by=by, **options))


def modular(**options) -> Callable[..., Any]:
    def run(pipe, **others):
        blocks = DnDBlocks().init_pipeline()
        blocks.update_components(transformer=pipe.transformer, vqvae=pipe.vqvae)
        return blocks(class_labels=1, **options, **others)

    return run


USES = {  # and the grid's cells
    "a label": (call(), 6),
    "completion": (call(image=IMAGE.crop((0, 0, 6, 2)), mask_ring=0), 6),
    "inpainting": (call(**MASKED), 6),
    "inpainting with particles": (call(**MASKED, num_particles=3), 6),
    "a larger image": (call(height=8, width=8), 16),
    "a larger image with particles": (call(width=10, num_particles=2), 10),
    "going on from an image": (call(image=IMAGE, height=8, mask_ring=0), 12),
    "candidates": (call(num_candidates=2), 6),
    "candidates of a larger image": (call(num_candidates=2, height=6), 9),
    "a stream of rows": (stream("rows"), 6),
    "a stream of depths": (stream("depth"), 6),
    "blocks": (modular(), 6),
    "blocks for inpainting": (modular(**MASKED), 6),
    "blocks for a larger image": (modular(height=8), 12),
}


PARTICLES = [USES["inpainting with particles"][0], USES["a larger image with particles"][0]]
"""Where the first particle is replaced, all its codes may change."""


def with_progress_bar(pipe: DnDPipeline) -> DnDPipeline:
    pipe.set_progress_bar_config(disable=False)
    return pipe


@pytest.mark.parametrize("make", ["make_pipeline", "make_rq_pipeline"])
@pytest.mark.parametrize(("use", "cells"), USES.values(), ids=USES)
def test_the_callback_and_the_progress_bar_see_each_cell_once(use, cells, make, request, capsys):
    pipe, seen = with_progress_bar(request.getfixturevalue(make)()), []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline.transformer is pipe.transformer and timestep == step
        seen.append(tensors["codes"])

    use(pipe, callback_on_step_end=callback)
    assert f"{cells}/{cells}" in capsys.readouterr().err
    assert len(seen) == cells and {codes.shape[1] * codes.shape[2] for codes in seen} == {cells}
    if use not in PARTICLES:
        changed = [(before != after).any(-1).flatten(1).sum(1).max() for before, after in zip(seen, seen[1:])]
        assert max(changed) == 1


@pytest.mark.parametrize(("use", "cells"), USES.values(), ids=USES)
def test_a_callback_ends_the_sampling_and_the_images_come_as_they_are(use, cells, make_pipeline):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append(step)
        pipeline._interrupt = step == cells - 2

    assert use(make_pipeline(), callback_on_step_end=callback)
    assert seen == list(range(cells - 1))


@pytest.mark.parametrize(("use", "cells"), USES.values(), ids=USES)
def test_a_callback_must_not_change_the_codes(use, cells, make_pipeline):
    with pytest.raises(ValueError, match="`callback_on_step_end` must not change the codes"):
        use(make_pipeline(), callback_on_step_end=lambda pipe, step, _, tensors: {"codes": tensors["codes"] + 1})
