"""Saving and loading: every way in which a saved pipeline, or one of its models, is loaded again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel

from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def codes_of(pipe, class_labels, *seeds) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels, generator=generators(*seeds), output_type="codes").images


@pytest.fixture(params=["make_pipeline", "make_rq_pipeline"])
def pipe(request) -> DnDPipeline:
    """A pipeline of each architecture."""
    return request.getfixturevalue(request.param)()


def test_a_saved_pipeline_is_safetensors_json_and_code(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "pipeline.py",
        "modeling_dnd.py",
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


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("transformer", ["modeling_dnd", "DnDForImageGeneration"]),
        ("tokenizer", ["evil", "Tokenizer"]),
        ("another", ["evil", "Model"]),
    ],
)
def test_no_file_of_a_folder_is_run_whatever_its_name_and_index(component, entry, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, component: entry}))
    (tmp_path / component).mkdir(exist_ok=True)
    for name in (entry[0], f"dnd_hf.models.{entry[0]}"):  # also by the name under which the package has its module
        (tmp_path / component / f"{name}.py").write_text("raise RuntimeError('this code must not run')")
    if component == "another":  # which a pipeline does not have
        assert type(DnDPipeline.from_pretrained(tmp_path)) is DnDPipeline
    else:
        with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
            DnDPipeline.from_pretrained(tmp_path)


def test_diffusion_pipeline_loads_it_with_trust_alone(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    assert_same(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True), pipe)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_folder_that_names_foreign_modules_is_refused(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for module in ("subprocess", "dnd_hf.files", "../evil", ""):
        index["vqvae"][0] = module
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"names the module '{module}', which dnd_hf.models does not have"):
            DnDPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["ours", "diffusers"])
def test_a_pipeline_saved_again_loads_both_ways_again(first, make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    if first == "ours":
        loaded = DnDPipeline.from_pretrained(tmp_path / "a")
    else:
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("pipeline.py", "modeling_dnd.py", "transformer/modeling_dnd.py", "vqvae/autoencoder_rqvae.py"):
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


def run_without_dnd_hf(program: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a program for which dnd_hf is not installed; nobody may ask it to install anything."""
    start = """
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

        def codes_of(pipe):
            pipe.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            return pipe(["tench", 2], generator=generators, output_type="codes").images
    """
    command = [sys.executable, "-c", dedent(start) + dedent(program), *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout + done.stderr
    return done


def test_it_loads_and_is_saved_again_by_its_own_code_where_dnd_hf_is_not_installed(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "a")
    pipe = DnDPipeline.from_pretrained(tmp_path / "a")
    program = """
        def show(pipe):
            images = codes_of(pipe)
            classes = (type(pipe), type(pipe.transformer), type(pipe.vqvae))
            assert [one.__name__ for one in classes] == ["DnDPipeline", sys.argv[3], "RQVAE"]
            assert not any(one.__module__.startswith("dnd_hf") for one in classes)
            pictures = pipe.vqvae.decode_codes(images).sample
            assert pictures.shape == (2, 3, 4, 6)
            for model in (pipe.transformer, pipe.vqvae):
                assert {weight.dtype for weight in model.state_dict().values()} <= {torch.float32, torch.int64}
            return images.tolist()

        pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        images = show(pipe)
        pipe.save_pretrained(sys.argv[2])
        assert show(DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)) == images
        assert show(type(pipe).from_pretrained(sys.argv[2], trust_remote_code=True)) == images
        print("codes", images)
    """
    name = type(pipe.transformer).__name__
    done = run_without_dnd_hf(program, tmp_path, tmp_path / "a", tmp_path / "b", name)
    assert f"codes {codes_of(pipe, ['tench', 2], 1, 2).tolist()}" in done.stdout
    loaded = DnDPipeline.from_pretrained(tmp_path / "b")  # and back here, where it is installed
    assert type(loaded.transformer) is type(pipe.transformer)
    assert torch.equal(codes_of(loaded, ["tench", 2], 1, 2), codes_of(pipe, ["tench", 2], 1, 2))
    for file in (tmp_path / "a").rglob("*.py"):
        assert (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() == file.read_bytes()


def test_its_models_load_by_the_auto_classes_of_the_libraries_where_dnd_hf_is_not_installed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a")
    program = """
        import diffusers
        from transformers import AutoConfig, AutoModel

        folder, whole = sys.argv[1], DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        config = AutoConfig.from_pretrained(f"{folder}/transformer", trust_remote_code=True)
        assert type(config).__name__ == sys.argv[3] and config.num_classes == 4
        models = [
            AutoModel.from_pretrained(f"{folder}/transformer", trust_remote_code=True),
            AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True),
            diffusers.AutoModel.from_pretrained(f"{folder}/transformer", trust_remote_code=True),
        ]
        for model in models:
            assert type(model).__name__ == sys.argv[2] and not type(model).__module__.startswith("dnd_hf")
            assert torch.equal(codes_of(type(whole)(transformer=model, vqvae=whole.vqvae)), codes_of(whole))
        codes = codes_of(whole)
        for place, options in ((f"{folder}/vqvae", {}), (folder, dict(subfolder="vqvae"))):
            vqvae = diffusers.AutoModel.from_pretrained(place, trust_remote_code=True, **options)
            assert torch.equal(vqvae.decode_codes(codes).sample, whole.vqvae.decode_codes(codes).sample)
    """
    names = type(pipe.transformer).__name__, type(pipe.transformer.config).__name__
    done = run_without_dnd_hf(program, tmp_path, tmp_path / "a", *names)
    assert "will be ignored" not in done.stderr


def test_the_auto_classes_load_its_models_here_and_they_are_saved_without_the_code(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "a")
    for trusted in (True, False):
        model = AutoModel.from_pretrained(tmp_path / "a" / "transformer", trust_remote_code=trusted)
        assert type(model) is DnDForImageGeneration
    model.save_pretrained(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert "auto_map" not in (tmp_path / "b" / "config.json").read_text()
    vqvae = diffusers.AutoModel.from_pretrained(str(tmp_path / "a" / "vqvae"), trust_remote_code=True)
    assert type(vqvae) is RQVAE
    vqvae.save_pretrained(tmp_path / "c")
    assert "auto_map" not in (tmp_path / "c" / "config.json").read_text()


def test_a_model_with_adapters_is_refused_before_anything_is_written(make_pipeline, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = make_pipeline()
    adapted = peft.get_peft_model(pipe.transformer, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for transformer in (adapted, adapted.base_model.model):
        pipe.transformer = transformer
        with pytest.raises(ValueError, match="`transformer` has unmerged PEFT layers"):
            pipe.save_pretrained(tmp_path / "a")
        with pytest.raises(ValueError, match="`transformer` has unmerged PEFT layers"):
            pipe.push_to_hub("me/adapted")  # without a connection, creating it would be another error
    assert not (tmp_path / "a").exists()
    pipe.transformer = adapted.merge_and_unload()
    pipe.save_pretrained(tmp_path / "a")
    assert_same(DnDPipeline.from_pretrained(tmp_path / "a"), pipe)


def by_remote_code(folder: Path, **options) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("load", [DnDPipeline.from_pretrained, by_remote_code], ids=["ours", "diffusers"])
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_models_are_float32_unless_a_dtype_is_asked_for(option, load, pipe, tmp_path):
    pipe.to(torch.float16)
    codebooks = pipe.vqvae.quantizer.codebooks
    assert pipe.transformer.dtype == pipe.vqvae.dtype == torch.float16
    pipe.save_pretrained(tmp_path)
    cases = (({}, torch.float32), ({option: None}, torch.float32), ({option: torch.bfloat16}, torch.bfloat16))
    for choice, expected in cases:
        loaded = load(tmp_path, **choice)
        parameters = [*loaded.transformer.parameters(), *loaded.vqvae.parameters()]
        assert {parameter.dtype for parameter in parameters} == {expected}
        assert loaded.vqvae.quantizer.codebooks.dtype == torch.float32
        assert torch.equal(loaded.vqvae.quantizer.codebooks, codebooks)
        ours = DnDPipeline.from_pretrained(tmp_path, **choice)
        assert torch.equal(codes_of(loaded, ["tench", 2], 1, 2), codes_of(ours, ["tench", 2], 1, 2))
        assert np.isfinite(loaded([0], output_type="np").images).all()


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
