"""Proves the pipeline: labels, outputs, defaults, and every way a saved pipeline is loaded again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline, bundled_checkpoint


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


def test_a_saved_pipeline_is_safetensors_json_and_code(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "pipeline.py",
        "transformer/config.json",
        "transformer/generation_config.json",
        "transformer/model.safetensors",
        "transformer/modeling_dnd.py",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
        "vqvae/autoencoder_rqvae.py",
    }
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DnDPipeline"]
    assert index["transformer"] == ["modeling_dnd", "DnDForImageGeneration"]
    assert index["vqvae"] == ["autoencoder_rqvae", "RQVAE"]


def assert_same(loaded, pipe) -> None:
    """The loaded pipeline is made of this package's classes and does what the original does."""
    assert type(loaded) is DnDPipeline
    assert type(loaded.transformer) is DnDForImageGeneration and type(loaded.vqvae) is RQVAE
    assert not loaded.transformer.training and not loaded.vqvae.training
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(codes_of(loaded, ["tench", 2], 1, 2), codes_of(pipe, ["tench", 2], 1, 2))
    ours, theirs = (one([1], generator=generators(3), output_type="pt").images for one in (loaded, pipe))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_saved_pipeline_loads_without_trust_and_never_runs_the_code_in_the_folder(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.py"):
        file.write_text("raise RuntimeError('this code must not run')")
    assert_same(DnDPipeline.from_pretrained(tmp_path), pipe)
    assert_same(DnDPipeline.from_pretrained(str(tmp_path)), pipe)


def test_diffusion_pipeline_loads_it_with_trust_alone(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    assert_same(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True), pipe)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["ours", "diffusers"])
def test_a_pipeline_saved_again_loads_both_ways_again(first, make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    if first == "ours":
        loaded = DnDPipeline.from_pretrained(tmp_path / "a")
    else:
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("pipeline.py", "transformer/modeling_dnd.py", "vqvae/autoencoder_rqvae.py"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    before, after = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in "ab")
    assert after == before
    assert not [path for path in (tmp_path / "b").rglob("*.json") if str(tmp_path) in path.read_text()]
    shutil.rmtree(tmp_path / "a")
    assert_same(DnDPipeline.from_pretrained(tmp_path / "b"), pipe)
    assert_same(DiffusionPipeline.from_pretrained(tmp_path / "b", trust_remote_code=True), pipe)


def test_components_load_by_themselves_and_may_be_passed_in(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    vqvae = RQVAE.from_pretrained(tmp_path, subfolder="vqvae")
    transformer = DnDForImageGeneration.from_pretrained(tmp_path / "transformer")
    assert_same(DnDPipeline(transformer=transformer, vqvae=vqvae), pipe)
    loaded = DnDPipeline.from_pretrained(tmp_path, vqvae=vqvae)
    assert loaded.vqvae is vqvae
    assert_same(loaded, pipe)


def test_it_loads_from_its_own_code_where_dnd_hf_is_not_installed(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    program = """
        import sys

        sys.modules["dnd_hf"] = None  # imports of it fail and find_spec finds none, as where it is not installed
        try:
            import dnd_hf
        except ImportError:
            pass
        else:
            raise SystemExit("dnd_hf is there")
        import torch
        from diffusers import DiffusionPipeline

        torch.set_num_threads(1)

        def show(folder):
            pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
            pipe.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            images = pipe(["tench", 2], generator=generators, output_type="codes").images
            classes = (type(pipe), type(pipe.transformer), type(pipe.vqvae))
            assert [one.__name__ for one in classes] == ["DnDPipeline", "DnDForImageGeneration", "RQVAE"]
            assert not any(one.__module__.startswith("dnd_hf") for one in classes)
            pictures = pipe.vqvae.decode_codes(images).sample
            assert pictures.shape == (2, 3, 4, 6)
            assert pipe.vqvae.quantizer.codebooks.dtype == torch.float32
            return pipe, images.tolist()

        pipe, images = show(sys.argv[1])
        pipe.save_pretrained(sys.argv[2])
        assert show(sys.argv[2])[1] == images
        print("codes", images)
    """
    arguments = [sys.executable, "-c", dedent(program), str(tmp_path / "a"), str(tmp_path / "b")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"codes {codes_of(pipe, ['tench', 2], 1, 2).tolist()}" in done.stdout
    assert_same(DnDPipeline.from_pretrained(tmp_path / "b"), pipe)  # and back here, where it is installed
    assert (tmp_path / "b" / "pipeline.py").read_text() == (tmp_path / "a" / "pipeline.py").read_text()


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_models_are_float32_unless_a_dtype_is_asked_for(option, make_pipeline, tmp_path):
    pipe = make_pipeline().to(torch.float16)
    codebooks = pipe.vqvae.quantizer.codebooks
    assert pipe.transformer.dtype == pipe.vqvae.dtype == torch.float16
    pipe.save_pretrained(tmp_path)
    cases = (({}, torch.float32), ({option: None}, torch.float32), ({option: torch.bfloat16}, torch.bfloat16))
    for choice, expected in cases:
        loaded = DnDPipeline.from_pretrained(tmp_path, **choice)
        parameters = [*loaded.transformer.parameters(), *loaded.vqvae.parameters()]
        assert {parameter.dtype for parameter in parameters} == {expected}
        assert loaded.vqvae.quantizer.codebooks.dtype == torch.float32
        assert torch.equal(loaded.vqvae.quantizer.codebooks, codebooks)
        loaded.set_progress_bar_config(disable=True)
        images = loaded([0], output_type="np").images
        assert np.isfinite(images).all()


def make_hub_cache(folder: Path, cache: Path) -> str:
    """A folder as huggingface_hub keeps a downloaded repository; returns its id."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--fishes"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "someone/fishes"


@pytest.mark.parametrize("listed", [False, True], ids=["offline", "listed-by-the-hub"])
def test_it_loads_from_a_hub_id_both_ways(listed, make_pipeline, tmp_path, monkeypatch):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    name = make_hub_cache(tmp_path / "a", tmp_path / "cache")
    if listed:  # as online: the Hub lists the files, diffusers decides which it needs and finds them in the cache
        files = [str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()]
        info = SimpleNamespace(
            sha="0123456789abcdef0123456789abcdef01234567", siblings=[SimpleNamespace(rfilename=one) for one in files]
        )
        for module in ("pipelines.pipeline_utils", "utils.dynamic_modules_utils"):
            monkeypatch.setattr(f"diffusers.{module}.model_info", lambda *_, **__: info)
    assert_same(DnDPipeline.from_pretrained(name, cache_dir=tmp_path / "cache"), pipe)
    loaded = DiffusionPipeline.from_pretrained(name, cache_dir=tmp_path / "cache", trust_remote_code=True)
    assert_same(loaded, pipe)


def test_an_unknown_bundled_checkpoint_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"`name` must be one of \[.*\], got 'no such'"):
        bundled_checkpoint("no such")
