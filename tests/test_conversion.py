"""Conversion of official checkpoints, against results of the official code kept in tests/fixtures."""

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.make_official_cases import random_weights
from safetensors.torch import load_file

from dnd_hf import DnDConfig, DnDForImageGeneration, DnDPipeline, convert_rqvae, convert_transformer
from dnd_hf.conversion import PAPER_SAMPLING, Checkpoint, convert_pipeline, export_original, new_folder


FIXTURES = Path(__file__).parent / "fixtures"
PARITY = FIXTURES / "imagenet_depth2"
SCRIPT = Path(__file__).parent.parent / "examples" / "convert_checkpoint.py"
TRANSFORMERS = ("dnd_depth1", "dnd_depth3_tied", "dnd_depth4", "llamagen", "llamagen_heads_of_100")
RQVAES = ("rqvae_separate", "rqvae_folded")
LLAMAGEN_TOKENIZERS = ("llamagen_vq_16", "llamagen_vq_8")


def load_case(name: str) -> tuple[dict, dict, dict]:
    """Description, weights and official results of a case in tests/fixtures/official."""
    description = json.loads((FIXTURES / "official" / f"{name}.json").read_text())
    weights = random_weights(description["shapes"], description["same"])
    return description, weights, load_file(FIXTURES / "official" / f"{name}.safetensors")


def write_case(name: str, folder: Path) -> tuple[Path, dict, dict, dict]:
    """The checkpoint of a case, in the official format."""
    description, weights, expected = load_case(name)
    path, wrapping = folder / f"{name}.pt", description.get("checkpoint", "state_dict")
    if wrapping == "bare":
        torch.save(weights, path)
    elif isinstance(wrapping, dict):
        content = {"args": argparse.Namespace(**wrapping["args"]), "steps": 1, "optimizer": {"state": {}}}
        torch.save({wrapping["key"]: {f"module._orig_mod.{k}": v for k, v in weights.items()}, **content}, path)
    else:
        torch.save({wrapping: weights, "epoch": 1}, path)
    if "config" in description:
        (folder / "config.yaml").write_text(yaml.safe_dump(description["config"]))
    return path, description, weights, expected


def parity_copy(folder: Path, **changes) -> Path:
    """The parity case in `folder`, with keys of its transformer checkpoint replaced."""
    shutil.copytree(PARITY, folder, dirs_exist_ok=True)
    content = torch.load(folder / "transformer.pt", weights_only=False)
    torch.save({**content, **changes}, folder / "transformer.pt")
    return folder


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def parity_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "converted"
    with new_folder(folder) as output:
        convert_pipeline(PARITY / "transformer.pt", PARITY / "rqvae.pt").save_pretrained(output)
    return folder


@torch.no_grad()
def test_the_parity_case_computes_what_the_official_code_does(parity_folder):
    expected = load_file(PARITY / "expected.safetensors")
    pipe = DnDPipeline.from_pretrained(parity_folder)
    codes = expected["codes"].view(2, 4, 4, 2).long()
    output = pipe.transformer(expected["class_labels"], codes, labels=codes)
    logits = output.logits.transpose(1, 2)
    torch.testing.assert_close(logits, expected["teacher_forced_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, expected["teacher_forced_loss"], rtol=0, atol=1e-6)
    greedy = pipe.transformer.generate(
        expected["class_labels"], guidance_scale=expected["guidance_scale"].item(), do_sample=False
    )
    assert torch.equal(greedy, expected["greedy_codes"].long())
    images = pipe.vqvae.decode_codes(greedy).sample
    torch.testing.assert_close(images, expected["greedy_images"], rtol=0, atol=1e-4)

    encoded = pipe.vqvae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents.permute(0, 2, 3, 1), expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["image_codes"].long())
    torch.testing.assert_close(encoded.commitment_loss, expected["commitment_loss"], rtol=0, atol=1e-6)
    reconstructions = pipe.vqvae(expected["images"]).sample
    torch.testing.assert_close(reconstructions, expected["reconstructions"], rtol=0, atol=1e-4)
    for depth in (1, 2):
        partial = pipe.vqvae.decode_codes(encoded.codes, depth=depth).sample
        torch.testing.assert_close(partial, expected[f"partial_reconstruction_{depth}"], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_compute_what_the_official_code_does(case, tmp_path):
    path, description, _, expected = write_case(case, tmp_path)
    model = convert_transformer(path, **description["options"])
    config, labels = model.config, expected["class_labels"]
    codes = expected["codes"].view(2, *config.grid_size, config.code_depth)
    output = model(labels, codes, labels=codes)
    logits = output.logits.transpose(1, 2)
    torch.testing.assert_close(logits, expected["logits"].view(logits.shape), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=1e-6)
    greedy = model.generate(labels, guidance_scale=description["guidance_scale"], do_sample=False)
    assert torch.equal(greedy, expected["greedy_codes"].view(codes.shape).long())
    assert config.tie_prediction_heads == ("tied" in case)
    assert model.config.has_null_class == (case != "dnd_depth1")


@torch.no_grad()
@pytest.mark.parametrize("case", RQVAES)
def test_rq_vaes_compute_what_the_official_code_does(case, tmp_path):
    path, description, _, expected = write_case(case, tmp_path)
    vae = convert_rqvae(path)
    encoded = vae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents.permute(0, 2, 3, 1), expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["codes"])
    torch.testing.assert_close(encoded.commitment_loss, expected["loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(vae(expected["images"]).sample, expected["sample"], rtol=0, atol=1e-4)
    partial = vae.decode_codes(encoded.codes, depth=1).sample
    torch.testing.assert_close(partial, expected["partial"], rtol=0, atol=1e-4)
    hparams = description["config"]["arch"]["hparams"]
    assert vae.config.shared_codebook == hparams["shared_codebook"]
    assert [*vae.grid_size, vae.config.code_depth] == hparams["code_shape"]
    assert (vae.config.ema_decay, vae.config.commitment_weight) == (0.98, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("case", LLAMAGEN_TOKENIZERS)
def test_llamagen_tokenizers_compute_what_the_official_code_does(case, tmp_path):
    path, _, _, expected = write_case(case, tmp_path)
    vae = convert_rqvae(path)
    assert vae.stride == int(case.split("_")[-1]) and vae.config.sample_size == (256, 256)
    encoded = vae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents, expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["codes"])
    torch.testing.assert_close(vae.decode_codes(encoded.codes).sample, expected["sample"], rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.decode(encoded.latents).sample, expected["sample"], rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.train()(expected["images"]).sample, expected["sample"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ("parity", "dnd_depth3_tied", "rqvae_separate", "rqvae_folded", "llamagen_vq_8"))
def test_the_way_back_gives_every_tensor_bit_for_bit(case, tmp_path, parity_folder):
    if case == "parity":
        folder, files = parity_folder, {name: torch.load(PARITY / name, weights_only=False) for name in
                                        ("transformer.pt", "rqvae.pt")}
        wanted = {"transformer.pt": files["transformer.pt"]["model"], "rqvae.pt": files["rqvae.pt"]["state_dict"]}
    else:
        path, description, weights, _ = write_case(case, tmp_path)
        is_transformer = "options" in description
        model = convert_transformer(path, **description["options"]) if is_transformer else convert_rqvae(path)
        folder, wanted = tmp_path / "converted", {"transformer.pt" if is_transformer else "rqvae.pt": weights}
        model.save_pretrained(folder)
    export_original(folder, tmp_path / "original")
    for name, tensors in wanted.items():
        content = torch.load(tmp_path / "original" / name)
        written = content.get("model", content.get("state_dict"))
        written.pop("quantize.codebook_used", None)
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key


def test_what_was_written_back_converts_to_the_same_pipeline(tmp_path, parity_folder):
    export_original(parity_folder, tmp_path / "original")
    pipe = convert_pipeline(tmp_path / "original" / "transformer.pt", tmp_path / "original" / "rqvae.pt")
    again = DnDPipeline.from_pretrained(parity_folder, dtype=torch.float16)
    for model in ("transformer", "vqvae"):
        weights, others = getattr(pipe, model).state_dict(), getattr(again, model).state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert pipe.transformer.config.to_diff_dict().keys() == again.transformer.config.to_diff_dict().keys()


def test_a_llamagen_pipeline_is_written_back_in_llamagen_format(tmp_path):
    transformer, _, weights, _ = write_case("llamagen", tmp_path)
    tokenizer, description, _, _ = write_case("llamagen_vq_16", tmp_path)
    pipe = convert_pipeline(transformer, tokenizer) if description["shapes"]["quantize.embedding.weight"][0] == 32 else None
    assert pipe is None


@pytest.mark.parametrize("wrapper", ("model", "module", "state_dict", None))
def test_weights_are_found_under_every_wrapping(wrapper, tmp_path):
    state = torch.load(PARITY / "transformer.pt", weights_only=False)["model"]
    torch.save({wrapper: state} if wrapper else state, tmp_path / "transformer.pt")
    model = convert_transformer(tmp_path / "transformer.pt", prediction_layers=[0, 2], grid_size=(2, 8))
    assert model.dtype == torch.float16
    assert model.config.num_classes == 10 and model.config.has_null_class and model.config.grid_size == [2, 8]


def test_averaged_weights_are_taken_where_asked(tmp_path):
    state = torch.load(PARITY / "transformer.pt", weights_only=False)["model"]
    folder = parity_copy(tmp_path, ema={name: tensor + 1 for name, tensor in state.items()})
    plain, ema = (convert_transformer(folder / "transformer.pt", use_ema=use) for use in (False, True))
    assert torch.equal(ema.embed_tokens.weight, plain.embed_tokens.weight + 1)
    rqvae = torch.load(PARITY / "rqvae.pt", weights_only=False)
    rqvae["state_dict_ema"] = {name: tensor + 1 for name, tensor in rqvae["state_dict"].items()}
    torch.save(rqvae, folder / "rqvae.pt")
    plain, ema = (convert_rqvae(folder / "rqvae.pt", use_ema=use) for use in (False, True))
    assert torch.equal(ema.quant_conv.bias, plain.quant_conv.bias + 1)
    with pytest.raises(ValueError, match="averaged weights under ema or state_dict_ema, got keys `model`"):
        convert_transformer(PARITY / "transformer.pt", use_ema=True)
