"""dnd_hf.conversion.checkpoint_file: official files are found in every wrapping and read without running code."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from fixtures.official_cases import PARITY, parity_copy

from dnd_hf import convert_rqvae, convert_transformer


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


@pytest.mark.parametrize("name", ("transformer.pt", "rqvae.pt"))
def test_missing_and_surplus_keys_are_named_as_in_the_file(name, tmp_path):
    folder = parity_copy(tmp_path)
    content = torch.load(folder / name, weights_only=False)
    state = content.get("model", content.get("state_dict"))
    removed = "layers.1.attention.wqkv.weight" if name == "transformer.pt" else "decoder.up.1.attn.0.q.weight"
    tensor = state.pop(removed)
    convert = convert_transformer if name == "transformer.pt" else convert_rqvae
    torch.save(content, folder / name)
    with pytest.raises(ValueError, match=rf"{name} must .* got missing keys: `{removed}`\.$"):
        convert(folder / name)
    state.update({removed: tensor, "extra.weight": tensor})
    torch.save(content, folder / name)
    with pytest.raises(ValueError, match=r"surplus keys: `extra\.weight`"):
        convert(folder / name)
    del state["extra.weight"]
    state[removed] = tensor[:-1]
    torch.save(content, folder / name)
    with pytest.raises(ValueError, match=rf"(other shapes: |surplus keys: )`{removed}`"):
        convert(folder / name)


class RunsCode:
    """Unpickled in the ordinary way, this makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("convert", (convert_transformer, convert_rqvae))
@pytest.mark.parametrize("where", ("args", "model", "state", "bare pickle"))
def test_a_malicious_pickle_is_refused_and_runs_nothing(where, convert, tmp_path):
    target, path = tmp_path / "ran", tmp_path / "checkpoint.pt"
    evil = RunsCode(target)
    if where == "bare pickle":
        path.write_bytes(pickle.dumps({"model": evil}, protocol=2))
    else:
        content = torch.load(PARITY / "transformer.pt", weights_only=False)
        torch.save({**content, where: {"weight": evil} if where == "model" else evil}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be .* `\w+\.mkdir`, which could run code"):
        convert(path)
    assert not target.exists()
    torch.load(path, weights_only=False) if where != "bare pickle" else pickle.loads(path.read_bytes())
    assert target.exists()  # so the file was dangerous


@pytest.mark.parametrize("convert", (convert_transformer, convert_rqvae))
def test_other_files_are_refused_with_what_was_expected(convert, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="must be a file, there is none"):
        convert(path)
    whole = (PARITY / "rqvae.pt").read_bytes()
    image = io.BytesIO(b"\x89PNG\r\n" + bytes(100)).getvalue()
    for content in (whole[: len(whole) // 2], whole[:100], image, b"", pickle.dumps([1], protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt must (be a PyTorch checkpoint|hold a dict)"):
            convert(path)
    for content in ([torch.ones(1)], {"step": 1}, {"model": {}}, {"model": {"weight": 1}}, {"a": torch.ones(1)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt must "):
            convert(path)
