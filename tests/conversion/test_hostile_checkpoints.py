"""Conversion of hostile files ends at once with an error that says what is wrong: within little memory and time."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.official_cases import FIXTURES, PARITY, parity_copy

from dnd_hf import convert_rqvae, convert_transformer


MEMORY_LIMIT, TIME_LIMIT = 1 << 30, 10
"""Bytes beyond what the libraries take, and seconds, for each file."""

SCRIPT = """
import json, resource, signal, sys, time
from dnd_hf.conversion import convert_pipeline, convert_rqvae, convert_transformer, export_original

status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + {memory}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def stop(*_):
    raise TimeoutError("it took too long")

signal.signal(signal.SIGALRM, stop)
for folder in sys.argv[1:]:
    signal.alarm({seconds})
    try:
        if folder.endswith("export"):
            export_original(folder, folder + "-original")
        elif folder.endswith("rq"):
            convert_pipeline(folder + "/stage2/model.pt", folder + "/stage1/model.pt")
        else:
            convert_pipeline(folder + "/transformer.pt", folder + "/rqvae.pt")
        result = "converted"
    except Exception as error:
        result = type(error).__name__ + ": " + str(error)
    signal.alarm(0)
    print(json.dumps([folder, result]))
"""


def in_transformer(key: str):
    """A hostile file with one more tensor of this name."""

    def make(folder) -> None:
        content = torch.load(folder / "transformer.pt", weights_only=False)
        content["model"][key] = torch.zeros(1)
        torch.save(content, folder / "transformer.pt")

    return make


def in_tokenizer(key: str):
    def make(folder) -> None:
        content = torch.load(folder / "rqvae.pt", weights_only=False)
        content["state_dict"][key] = torch.zeros(1)
        torch.save(content, folder / "rqvae.pt")

    return make


def in_args(**values):
    def make(folder) -> None:
        content = torch.load(folder / "transformer.pt", weights_only=False)
        torch.save({**content, "args": vars(content["args"]) | values}, folder / "transformer.pt")

    return make


def in_config(section: str, **values):
    def make(folder) -> None:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["arch"][section] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    return make


def in_arch(*parts: str, **values):
    """A hostile configuration of an RQ-Transformer."""

    def make(folder) -> None:
        file = folder / "stage2" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        section = config["arch"]
        for part in parts:
            section = section[part]
        section |= values
        file.write_text(yaml.safe_dump(config))

    return make


def config_text(text: str):
    return lambda folder: (folder / "config.yaml").write_text(text)


def nested(levels: int) -> list:
    value = [0]
    for _ in range(levels):
        value = [value] * 10  # ten references to one list: nothing in the file, 10 ** levels values when written out
    return value


def alias_bomb() -> str:
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join([*lines, "arch: {type: *a11, hparams: {n_embed: *a11}, ddconfig: {ch: *a11}}"])


def merge_bomb() -> str:
    lines = ["a0: &a0 {x: 0}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    return "\n".join([*lines, "arch: *a11"])


def repeated_tensor(folder) -> None:
    content = torch.load(folder / "transformer.pt", weights_only=False)
    content["model"]["tok_embeddings.weight"] = torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)
    torch.save(content, folder / "transformer.pt")


def compressed(folder) -> None:
    with zipfile.ZipFile(folder / "transformer.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("transformer/data.pkl", "w", force_zip64=True) as member:
            for _ in range(160):  # 1.3 GB
                member.write(bytes(2**23))
        file.writestr("transformer/version", "3")


CASES = {
    "layer number": (in_transformer("layers.999999999.attention_norm.weight"), "without a gap, got 999999999"),
    "long layer number": (in_transformer(f"layers.{'9' * 5000}.attention_norm.weight"), "without a gap, got "),
    "head number": (in_transformer("output.999999999.weight"), "without a gap, got 999999999"),
    "level number": (in_tokenizer("encoder.down.999999999.block.0.conv1.weight"), "without a gap, got 999999999"),
    "decoder level": (in_tokenizer("decoder.up.999999999.block.0.conv1.weight"), "surplus keys: `decoder.up.999999999"),
    "long decoder level": (in_tokenizer(f"decoder.up.{'9' * 5000}.w"), "surplus keys: `"),
    "block number": (in_tokenizer("encoder.down.0.block.999999999.conv1.weight"), "without a gap, got 999999999"),
    "codebook number": (in_tokenizer("quantizer.codebooks.999999999.weight"), "without a gap, got 999999999"),
    "classes": (in_args(num_classes=10**9), "1000000000 classes"),
    "codebook size": (in_args(vocab_size=10**9), "1000000000 (`args.vocab_size`)"),
    "grid": (in_args(image_size=16 * 10**9, downsample_size=16), "at most 1048576 cells, got (1000000000, 1000000000)"),
    "head layers": (in_args(pred_head_positions=",".join(["9" * 5000] * 2)), "must be numbers with commas"),
    "nested argument": (in_args(vocab_size=nested(12)), "`args.vocab_size` of"),
    "nested heads": (in_args(pred_head_positions=nested(12)), "must be one for each of 2 `output.*`"),
    "argument of another type": (in_args(class_dropout_prob="0.1"), "`args.class_dropout_prob` of"),
    "repeated tensor": (repeated_tensor, "`tok_embeddings.weight` of"),
    "compressed": (compressed, "must be a PyTorch checkpoint"),
    "aliases": (config_text(alias_bomb()), "it has an alias"),
    "merged aliases": (config_text(merge_bomb()), "it has an alias"),
    "deep YAML": (config_text("[" * 100_000), "must be YAML of plain values"),
    "large YAML": (config_text("# " + "x" * 2**21), "must be at most 1048576 bytes"),
    "YAML codes": (in_config("hparams", n_embed=10**9), "1000000000"),
    "YAML depth": (in_config("hparams", code_shape=[4, 4, 10**9]), "1000000000"),
    "YAML latents": (in_config("hparams", latent_shape=[10**9, 10**9, 32]), "at most 1048576 cells"),
    "YAML number": (in_config("hparams", n_embed=10**400), "`hparams.n_embed` of"),
    "YAML channels": (in_config("ddconfig", ch=10**9), "1000000000"),
    "YAML text": (in_config("ddconfig", ch=2**30, ch_mult=["a"]), "`ddconfig.ch_mult` of"),
    "YAML blocks": (in_config("ddconfig", num_res_blocks=10**9), "1000000000"),
}

RQ_CASES = {
    "prior's layers": (in_arch("body", n_layer=10**9), "1000000000"),
    "prior's depth layers": (in_arch("head", n_layer=10**9), "1000000000"),
    "prior's grid": (in_arch(block_size=[10**9, 10**9, 4]), "1000000000000000000"),
    "prior's depth": (in_arch(block_size=[4, 4, 10**9]), "1000000000"),
    "prior's classes": (in_arch(vocab_size_cond=10**9), "1000000000"),
    "prior's aliases": (lambda folder: (folder / "stage2" / "config.yaml").write_text(alias_bomb()), "it has an alias"),
}

EXPORTS = {
    "layers": ("transformer", {"num_hidden_layers": 10**9}, "`num_hidden_layers` must be 3 as the weights are"),
    "classes": ("transformer", {"num_classes": 10**9}, "`num_classes` must be 11 or 10 as the weights are"),
    "depth": ("transformer", {"code_depth": 10**9}, "`code_depth` must be 2 as the weights are"),
    "depth, tied": ("transformer", {"code_depth": 10**9, "tie_prediction_heads": True}, "`code_depth` must be 2"),
    "codes": ("transformer", {"vocab_size": 10**9}, "`vocab_size` must be 64 as the weights are"),
    "layers of no type": ("transformer", {"num_hidden_layers": "3"}, "`num_hidden_layers` must be 3"),
    "tokenizer depth": ("vqvae", {"code_depth": 10**9}, "`code_depth` must be 1 to 1024"),
    "tokenizer depth, separate": (
        "vqvae",
        {"code_depth": 10**9, "shared_codebook": False},
        "`code_depth` must be 1 as",
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What became of each case, in one process of limited memory."""
    root, folders = tmp_path_factory.mktemp("hostile"), {}
    for number, (name, (make, _)) in enumerate(CASES.items()):
        folders[name] = parity_copy(root / str(number))
        make(folders[name])
    convert_transformer(PARITY / "transformer.pt").save_pretrained(root / "transformer")
    convert_rqvae(PARITY / "rqvae.pt").save_pretrained(root / "vqvae")
    for number, (name, (part, values, _)) in enumerate(EXPORTS.items()):
        folder = folders[f"export of {name}"] = root / f"{number}-export"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(next((root / part).glob("*.safetensors")))
        config = json.loads((root / part / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
    for number, (name, (make, _)) in enumerate(RQ_CASES.items()):
        folders[name] = Path(shutil.copytree(FIXTURES / "rqtransformer_class", root / f"{number}-rq"))
        make(folders[name])
    folders["harmless"] = parity_copy(root / "harmless")
    folders["harmless prior"] = Path(shutil.copytree(FIXTURES / "rqtransformer_class", root / "harmless-rq"))
    script = SCRIPT.format(memory=MEMORY_LIMIT, seconds=TIME_LIMIT)
    command = [sys.executable, "-c", script, *map(str, folders.values())]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith('["/'))
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("case", [*CASES, *RQ_CASES, *(f"export of {name}" for name in EXPORTS)])
def test_a_hostile_file_ends_at_once_with_an_error_that_says_what_is_wrong(case, results):
    expected = (CASES | RQ_CASES | {f"export of {name}": export for name, export in EXPORTS.items()})[case][-1]
    assert results[case].startswith("ValueError: ") and expected in results[case], results[case]
    assert len(results[case]) < 2000


def test_within_the_same_limits_a_harmless_checkpoint_is_converted(results):
    assert results["harmless"] == results["harmless prior"] == "converted"
