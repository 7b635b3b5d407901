"""stream: its frames, its end, its inputs."""

import numpy as np
import pytest
import torch

from dnd_hf import DnDPipeline


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)()


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("by", "frames"), [("rows", 2), ("depth", 2)])
def test_the_last_frame_is_the_image_of_a_call(by, frames, pipe):
    (expected,) = pipe("goldfish", generator=3, temperature=0.7).images
    streamed = list(pipe.stream("goldfish", by=by, generator=3, temperature=0.7))
    assert len(streamed) == frames and {frame.size for frame in streamed} == {(6, 4)}
    np.testing.assert_array_equal(pixels(streamed[-1]), pixels(expected))
    assert (pixels(streamed[0]) != pixels(expected)).any()


def test_a_frame_shows_the_rows_so_far_and_grey_below(pipe):
    frame = pixels(next(pipe.stream(1, generator=3)))
    codes = pipe(1, generator=3, output_type="codes").images[:, [0, 0]]
    with torch.no_grad():
        known = pipe.image_processor.postprocess(pipe.vqvae.decode_codes(codes).sample, output_type="pil")[0]
    np.testing.assert_array_equal(frame[:2], pixels(known)[:2])
    assert np.isin(frame[2:], (127, 128)).all()


def test_depth_frames_use_one_more_code_each(pipe):
    codes = pipe(2, generator=0, output_type="codes").images
    for depth, frame in enumerate(pipe.stream(2, by="depth", generator=0), start=1):
        with torch.no_grad():
            sample = pipe.vqvae.decode_codes(codes, depth=depth).sample
        np.testing.assert_array_equal(pixels(frame), pixels(pipe.image_processor.postprocess(sample)[0]))


def test_a_stream_computes_only_what_is_asked_for(make_pipeline):
    pipe, passes = make_pipeline(), []
    pipe.transformer.layers[0].register_forward_hook(lambda *_: passes.append(1))
    stream = pipe.stream(1)
    assert passes == []
    next(stream)
    assert len(passes) == 3  # the cells of the first row
    stream.close()
    assert len(passes) == 3 and list(stream) == []


def test_frames_of_an_offloaded_transformer_are_the_same(make_pipeline):
    pipe = make_pipeline()
    expected = [pixels(frame) for frame in pipe.stream(1, generator=0)]
    pipe.enable_model_cpu_offload(device="cpu")
    for frame, pixels_before in zip(pipe.stream(1, generator=0), expected, strict=True):
        np.testing.assert_array_equal(pixels(frame), pixels_before)


def test_the_progress_bar_counts_the_cells(make_pipeline, capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    list(pipe.stream(1))
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(by="columns"), r"`by` must be one of \('rows', 'depth'\), got 'columns'"),
        (dict(class_labels=[0, 1]), "`class_labels` must be one label"),
        (dict(class_labels=None), "`class_labels` must be given"),
        (dict(class_labels="cat"), "`class_labels` must be names"),
        (dict(temperature=0), "`temperature` must be"),
        (dict(generator="a"), "`generator` must be"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_frame(options, message, make_pipeline):
    with pytest.raises(ValueError, match=message):
        make_pipeline().stream(**{"class_labels": 0, **options})


def test_without_a_tokenizer_there_is_nothing_to_show(make_pipeline):
    with pytest.raises(ValueError, match="needs a pipeline with a `vqvae`"):
        DnDPipeline(make_pipeline().transformer, None).stream(0)


@pytest.mark.parametrize("by", ["rows", "depth"])
def test_a_callback_sees_the_codes_after_each_position_as_in_a_call(by, pipe):
    seen = []
    list(pipe.stream(1, by=by, generator=3, callback_on_step_end=lambda *step: seen.append(step)))
    assert [step[:3] for step in seen] == [(pipe, cell, cell) for cell in range(6)]
    assert torch.equal(seen[-1][3]["codes"], pipe(1, generator=3, output_type="codes").images)
    assert seen[0][3]["codes"][0, 0, 1:].count_nonzero() == 0  # a copy, of the codes so far


def test_an_interrupted_stream_ends_with_the_codes_so_far(pipe):
    def stop(pipe, step, _, tensors):
        pipe._interrupt = step == 3

    _, last = pipe.stream(1, generator=3, callback_on_step_end=stop)
    (expected,) = pipe(1, generator=3, callback_on_step_end=stop).images
    np.testing.assert_array_equal(pixels(last), pixels(expected))
    assert len(list(pipe.stream(1, generator=3))) == 2  # the next one is whole again


def test_a_callback_that_changes_codes_or_wants_other_tensors_is_refused(pipe):
    with pytest.raises(ValueError, match="`callback_on_step_end` must not change the codes"):
        list(pipe.stream(1, callback_on_step_end=lambda pipe, step, _, tensors: {"codes": tensors["codes"] + 1}))
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be of"):
        pipe.stream(1, callback_on_step_end_tensor_inputs=["latents"])
