"""The demo page without a browser: its actions, limits, views and options, and the Space that it writes."""

import os
import struct
import subprocess
import sys
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


gr = pytest.importorskip("gradio")
from demo import actions, limits, models, space, uploads, views  # noqa: E402

from dnd_hf.bundled import bundled_names  # noqa: E402
from dnd_hf.data.images import to_images  # noqa: E402


SCRIPT = Path(__file__).parents[2] / "examples" / "app.py"
LIMITS = limits.Limits(max_upload_megapixels=1)
SETTINGS = dict(temperature=[0.9, 0.8], top_k=[0, 5], top_p=[1, 0.9], guidance_scale=1.5)


@pytest.fixture(autouse=True)
def pillow_as_it_was():
    most = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = most


@pytest.fixture(scope="module")
def app():
    spec = spec_from_file_location("app", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["app"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["app"]


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize(("by", "frames"), [("rows", 2), ("depth", 2)])
def test_generate_streams_the_image_and_the_codes_of_a_call_of_the_pipeline(by, frames, make_pipeline):
    pipe = make_pipeline()
    *streamed, (last, codes) = actions.generate(pipe, {"class_labels": 1}, 3, SETTINGS, by=by)
    assert len(streamed) == frames and all(none is None for _, none in streamed)
    np.testing.assert_array_equal(pixels(last), pixels(pipe(1, generator=3, **SETTINGS).images[0]))
    assert torch.equal(codes, pipe(1, generator=3, output_type="codes", **SETTINGS).images)


def test_generate_gives_the_best_of_several_candidates_and_says_how_far_it_is(make_pipeline):
    pipe, steps = make_pipeline(), []
    ranked = dict(num_candidates=3, rank_by="guidance")
    ((image, _),) = actions.generate(pipe, {"class_labels": 1}, 3, SETTINGS, **ranked, on_step=steps.append)
    np.testing.assert_array_equal(pixels(image), pixels(pipe(1, generator=3, **ranked, **SETTINGS).images[0]))
    assert steps == list(range(6))


@pytest.mark.parametrize("condition", [{"class_labels": 2}, {}])
def test_a_look_inside_has_the_probabilities_of_score_and_the_distributions_of_the_model(condition, make_pipeline):
    pipe = make_pipeline()
    codes = pipe(2, generator=0, output_type="codes").images
    look = actions.look_inside(pipe, condition, codes, num_top_codes=3)
    labels = [2] if condition else None
    np.testing.assert_allclose(look.probabilities, pipe.transformer.score(labels, codes).log_probs[0].exp(), rtol=1e-5)
    expected = pipe.transformer.code_distributions(labels, codes, num_top_codes=3)
    np.testing.assert_array_equal(look.entropies, expected.entropies[0])
    np.testing.assert_array_equal(look.top_codes, expected.top_codes[0])
    assert look.codes.shape == (2, 3, 2) and look.stride == (2, 2) and look.image.size == (6, 4)


def test_a_part_is_filled_in_as_by_the_pipeline(make_pipeline):
    pipe, image, mask = make_pipeline(), noise(4, 6), Image.new("L", (6, 4))
    mask.paste(255, (5, 0, 6, 4))
    filled = actions.fill_in(pipe, {"class_labels": 1}, image, mask, 5, SETTINGS, num_particles=2, feather=1)
    call = dict(image=image, mask_image=mask, generator=5, num_particles=2, feather=1)
    np.testing.assert_array_equal(pixels(filled), pixels(pipe(1, **call, **SETTINGS).images[0]))


def test_reading_an_image_gives_scores_classes_and_reconstructions_by_depth(make_pipeline):
    pipe, image = make_pipeline(), noise(4, 6)
    reading = actions.read(pipe, image, {"class_labels": 1}, classify=True)
    assert torch.equal(reading.scores.total, pipe.score(image, 1).total)
    assert torch.equal(reading.classes.log_probs, pipe.classify(image).log_probs)
    codes = pipe.vqvae.encode(pipe.image_processor.preprocess(image)).codes
    for depth, shown in enumerate(reading.reconstructions, start=1):
        with torch.no_grad():
            (expected,) = to_images(pipe.vqvae.decode_codes(codes, depth=depth).sample)
        assert abs(pixels(shown) - pixels(expected)).max() <= 1  # another order of rounding
    assert len(reading.reconstructions) == 2
    assert actions.read(pipe, image, {}, classify=False).classes is None
    with pytest.raises(ValueError, match="must be 6×4 pixels, got 5×4"):
        actions.read(pipe, noise(4, 5), {}, classify=False)


def test_what_a_model_is_told_is_a_label_or_a_prompt(make_pipeline, make_rq_pipeline):
    assert actions.condition_of(make_pipeline(), 3, "not read") == {"class_labels": 3}
    one_class = make_pipeline(num_classes=1, class_dropout_prob=0.0, id2label=None)
    assert actions.condition_of(one_class, None, "") == {"class_labels": 0}
    reader = make_rq_pipeline(prompt_length=3, prompt_vocab_size=7, id2label=None)
    assert actions.condition_of(reader, None, "a word") == {"prompt": "a word"}
    with pytest.raises(ValueError, match="Write a prompt"):
        actions.condition_of(reader, None, "  ")


def test_the_table_gives_one_value_per_depth():
    table = [[1, 0.9, 0, 1], [2, "0.8", 5, 0.9]]
    assert actions.sampling_settings(1.5, table) == SETTINGS
    assert "guidance_scale" not in actions.sampling_settings(None, table)
    with pytest.raises(ValueError, match="`top_k` must be a number for each depth"):
        actions.sampling_settings(1.5, [[1, 1, None, 1]])


def test_uploads_are_opened_in_the_formats_of_the_web_only(tmp_path):
    image = noise(9, 7)
    for suffix in ("png", "bmp", "webp", "gif", "jpg"):
        image.save(tmp_path / f"image.{suffix}")
        assert uploads.open_upload(tmp_path / f"image.{suffix}", LIMITS).size == (7, 9)
    image.save(tmp_path / "image.eps")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:100])
    for name in ("image.eps", "text.png", "cut.png"):
        with pytest.raises(ValueError, match="must be an image"):
            uploads.open_upload(tmp_path / name, LIMITS)
    with pytest.raises(ValueError, match="Upload an image first"):
        uploads.open_upload(None, LIMITS)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_too_many_pixels_or_bytes_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    noise(1001, 1000).save(tmp_path / "large.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for name in ("bomb.png", "large.png"):
        with pytest.raises(ValueError, match="at most 1 million pixels"):
            uploads.open_upload(tmp_path / name, LIMITS)
    (tmp_path / "long.png").write_bytes(bomb + bytes(9_000_000))
    with pytest.raises(ValueError, match=r"at most 8 MB, got 9\.0 MB"):
        uploads.open_upload(tmp_path / "long.png", LIMITS)


def test_an_upload_of_another_size_is_cropped_and_resized_and_that_is_said():
    image, note = uploads.fitted(noise(32, 64), (4, 6))
    assert image.size == (6, 4) and "from 64×32 to 6×4" in note
    same, note = uploads.fitted(noise(4, 6), (4, 6))
    np.testing.assert_array_equal(pixels(same), pixels(noise(4, 6)))
    assert note == ""


def test_an_enlarged_image_has_squares_for_pixels():
    image = noise(4, 6)
    large = uploads.enlarged(image, 64)
    assert large.size == (66, 44) and uploads.enlargement(image, 64) == 11
    np.testing.assert_array_equal(pixels(large), pixels(image).repeat(11, 0).repeat(11, 1))


def test_a_pixel_is_masked_where_anything_above_it_was_painted():
    layer = Image.new("RGBA", (60, 40))
    layer.putpixel((59, 0), (200, 0, 0, 1))
    layer.putpixel((10, 39), (200, 0, 0, 255))
    mask = pixels(uploads.painted_mask({"layers": [None, layer]}, (4, 6)))
    assert mask.sum() == 2 and mask[0, 5] and mask[3, 1]
    for empty in (None, {"layers": []}, {"layers": [Image.new("RGBA", (60, 40))]}):
        with pytest.raises(ValueError, match="Paint over the part"):
            uploads.painted_mask(empty, (4, 6))


def test_halves_are_masked_by_name():
    masks = {region: pixels(uploads.region_mask(region, (4, 6))) // 255 for region in uploads.REGIONS[1:]}
    assert all(mask.sum() == 12 for mask in masks.values())
    assert masks["right half"][:, 3:].all() and masks["bottom half"][2:].all()
    np.testing.assert_array_equal(masks["left half"] + masks["right half"], np.ones((4, 6)))
    np.testing.assert_array_equal(masks["top half"] + masks["bottom half"], np.ones((4, 6)))
    with pytest.raises(ValueError, match="must be one of"):
        uploads.region_mask("all", (4, 6))


def test_only_offered_models_are_loaded_and_the_last_ones_kept(make_pipeline, tmp_path, monkeypatch):
    for name in ("one", "two", "three"):
        make_pipeline().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    offered = models.Models(["one", "two", "three"], kept=2)
    first = offered.get("one")
    assert offered.get("one") is first
    offered.get("two")
    offered.get("three")
    assert offered.get("one") is not first
    for name in (str(tmp_path / "one"), "../one", "owner/name", None, ["one"]):
        with pytest.raises(ValueError, match="must be one of one, two, three"):
            offered.get(name)
    for wrong in ([], ["one", "one"]):
        with pytest.raises(ValueError, match="`models` must be"):
            models.Models(wrong)


def test_other_models_are_ids_of_the_hub_and_never_files_of_the_server(make_pipeline, tmp_path, monkeypatch):
    make_pipeline().save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    offered = models.Models(["words"], allow_others=True)
    assert offered.check("you/model") == "you/model"
    for name in ("owner/name", str(tmp_path / "owner/name"), "./owner", "..", "a/b/c", "../x", "a/..", "", None):
        with pytest.raises(ValueError, match="must be an id of the Hub"):
            offered.get(name)
    with pytest.raises(ValueError, match="There is no model 'you/model'") as error:  # the tests are offline
        offered.get("you/model")
    assert str(tmp_path) not in str(error.value)


def test_labels_are_offered_by_name_and_by_number_where_there_are_none(make_pipeline):
    assert models.label_choices(make_pipeline())[1] == ("goldfish, Carassius auratus", 1)
    assert models.label_choices(make_pipeline(id2label=None)) == [("0", 0), ("1", 1), ("2", 2), ("3", 3)]


def test_a_value_error_is_shown_and_any_other_only_logged(caplog):
    @limits.as_message
    def wrong(error):
        raise error

    @limits.as_message
    def late(error):
        yield 1
        raise error

    for action in (wrong, lambda error: list(late(error))):
        with pytest.raises(gr.Error) as shown:
            action(ValueError("`top_p` must be <1"))
        assert shown.value.message == "`top_p` must be <1" and not shown.value.print_exception
        with pytest.raises(gr.Error) as shown:
            action(RuntimeError("/secret/file"))
        assert "/secret" not in shown.value.message and "/secret/file" in caplog.text


@pytest.mark.parametrize("value", [0, 9, 1.5, None, float("nan"), float("inf"), "3"])
def test_numbers_beyond_the_limits_are_refused(value):
    with pytest.raises(ValueError, match="Particles must be a whole number from 1 to 8, got"):
        limits.check_whole("Particles", value, 8)
    assert limits.check_whole("Particles", 8.0, 8) == 8


def test_heat_maps_go_from_the_first_to_the_last_colour_of_the_scale():
    heat = pixels(views.heat_image(np.array([[0.0, 2.0, 4.0]]), 4.0))
    expected = [[int(views.SCALE[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (0, 4, 8)]
    assert heat.tolist() == [expected]


def test_clicks_choose_the_last_two_cells(make_pipeline):
    pipe = make_pipeline()
    look = actions.look_inside(pipe, {}, pipe(1, generator=0, output_type="codes").images)
    cells = views.clicked(look, [], 0, 0)
    assert cells == [(0, 0)] and "Click one more cell" in views.inspector(look, cells)
    cells = views.clicked(look, cells, 5.9, 3.9)
    assert cells == [(0, 0), (1, 2)]
    assert views.clicked(look, cells, 2.5, 1) == [(1, 2), (0, 1)]
    assert views.clicked(look, cells, 1, 1) == [(1, 2), (0, 0)]
    shown = views.inspector(look, cells)
    for name, (row, column) in zip("AB", cells):
        assert f"{name}: row {row + 1}, column {column + 1}" in shown
        for depth in range(2):
            drawn = f"<b>{look.codes[row, column, depth]}</b><br>{look.probabilities[row, column, depth]:.1%}"
            assert drawn in shown and f"{look.entropies[row, column, depth]:.2f}" in shown


def test_names_of_a_models_labels_are_text_on_the_page(make_pipeline):
    reading = actions.read(make_pipeline(), noise(4, 6), {"class_labels": 1}, classify=True)
    shown = views.class_view(reading, ["<script>1</script>"] * 4)
    assert "<script>" not in shown and shown.count("&lt;script&gt;") == 4
    assert views.side_by_side([(noise(2, 2), '"><b>')]).count("<b>") == 0


def test_a_page_that_others_can_reach_loads_no_other_models(app, monkeypatch):
    for name in ("SPACE_ID", "GRADIO_SHARE", "GRADIO_SERVER_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert app.AppArguments(allow_other_models=True).allow_other_models
    for shared in (dict(share=True), dict(host="0.0.0.0")):
        with pytest.raises(ValueError, match="`allow_other_models` must be False"):
            app.AppArguments(allow_other_models=True, **shared)
    for name, value in (("SPACE_ID", "you/space"), ("GRADIO_SHARE", "True"), ("GRADIO_SERVER_NAME", "0.0.0.0")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="`allow_other_models` must be False"):
            patch.setenv(name, value)
            app.AppArguments(allow_other_models=True)
    for wrong in (dict(max_particles=0), dict(concurrency=0), dict(max_upload_megapixels=0)):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be positive"):
            app.AppArguments(**wrong)


def test_the_offered_models_are_the_bundled_ones_or_those_of_the_environment(app, monkeypatch):
    monkeypatch.delenv("DND_HF_MODELS", raising=False)
    assert sorted(app.AppArguments().models) == bundled_names()
    assert app.AppArguments().models[0] == "words"
    monkeypatch.setenv("DND_HF_MODELS", " words  you/model ")
    assert app.AppArguments().models == ["words", "you/model"]


def test_an_exported_space_runs_by_itself_and_states_its_versions(tmp_path):
    space.export_space(tmp_path / "space")
    readme = (tmp_path / "space" / "README.md").read_text()
    assert f"sdk_version: {gr.__version__}\n" in readme and "app_file: app.py\n" in readme
    lines = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if "==" in line]
    assert {"torch", "transformers", "diffusers"} <= set(pinned) and not any("gradio" in line for line in lines)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import app, dnd_hf; print(dnd_hf.__file__, app.AppArguments().models)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "space",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "space" / "dnd_hf")) and "'words'" in done.stdout
    with pytest.raises(ValueError, match="`export_space` must be an empty or a new folder"):
        space.export_space(tmp_path / "space")
