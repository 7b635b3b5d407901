"""examples/convert_checkpoint.py: there and back from the command line."""

import json
import runpy
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from fixtures.official_cases import PARITY

from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline
from dnd_hf.command_line import parse_arguments


SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"


def run_script(*arguments) -> None:
    """The script in this process."""
    spec = spec_from_file_location("convert_checkpoint", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(parse_arguments(module.ConversionArguments, [str(argument) for argument in arguments]))


def test_the_script_makes_a_pipeline_and_writes_it_back(tmp_path):
    out = tmp_path / "out"
    both = ("--transformer_checkpoint", PARITY / "transformer.pt", "--rqvae_checkpoint", PARITY / "rqvae.pt")
    options = ("--dtype", "float32", "--max_shard_size", "1MB", "--top_k", 20, "--guidance_scale", 3)
    (tmp_path / "names.json").write_text(json.dumps([f"name {i}" for i in range(10)]))
    run_script(*both, *options, "--id2label", tmp_path / "names.json", "--output_dir", out)
    assert (out / "transformer" / "model.safetensors.index.json").is_file()  # several shards
    pipe = DnDPipeline.from_pretrained(out)
    assert pipe("name 3", output_type="pt").images.shape == (1, 3, 8, 8)
    settings = pipe.transformer.generation_config
    assert (settings.top_k, settings.guidance_scale, settings.top_p) == (20, 3, 1)
    run_script("--to_original", out, "--output_dir", tmp_path / "original")
    written = torch.load(tmp_path / "original" / "transformer.pt")["model"]["output.1.weight"]
    assert torch.equal(
        written, torch.load(PARITY / "transformer.pt", weights_only=False)["model"]["output.1.weight"].float()
    )


def test_the_script_makes_a_folder_of_one_model_alone(tmp_path):
    run_script("--rqvae_checkpoint", PARITY / "rqvae.pt", "--output_dir", tmp_path / "rqvae")
    assert RQVAE.from_pretrained(tmp_path / "rqvae").config.code_depth == 2
    run_script("--transformer_checkpoint", PARITY / "transformer.pt", "--output_dir", tmp_path / "transformer")
    assert DnDForImageGeneration.from_pretrained(tmp_path / "transformer").dtype == torch.float16


@pytest.mark.parametrize(
    ("files", "script", "arguments"),
    [
        (["transformer", "rqvae"], "generate.py", "GenerationArguments"),
        (["transformer"], "train.py", "DnDArguments"),
        (["rqvae"], "extract_codes.py", "ExtractionArguments"),
    ],
)
def test_the_command_that_it_names_for_the_result_is_one_that_the_other_script_takes(
    tmp_path, capsys, monkeypatch, files, script, arguments
):
    monkeypatch.chdir(tmp_path)
    checkpoints = [word for file in files for word in (f"--{file}_checkpoint", PARITY / f"{file}.pt")]
    run_script(*checkpoints, "--output_dir", "the result")
    python, path, *options = shlex.split(capsys.readouterr().out.rpartition("Next: ")[2])
    assert (python, path) == ("python", f"examples/{script}")
    parsed = parse_arguments(runpy.run_path(str(SCRIPT.with_name(script)))[arguments], options)
    assert "the result" in vars(parsed).values()


def test_the_script_ends_with_a_message_and_leaves_nothing_behind(tmp_path):
    arguments = ("--transformer_checkpoint", PARITY / "transformer.pt", "--prediction_layers", "0", "1", "2")
    command = [sys.executable, SCRIPT, *arguments, "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--prediction_layers must be one for each of 2 `output.*`, got [0, 1, 2]" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
    for wrong in (["--output_dir", "x"], ["--to_original", "x"], ["--rqvae_checkpoint", "x", "--to_original", "y"]):
        with pytest.raises(SystemExit):
            run_script(*wrong)
