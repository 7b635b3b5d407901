"""Conversion of official checkpoints, against results of the official code kept in tests/fixtures."""

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.make_official_cases import random_weights
from safetensors.torch import load_file

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline, convert_rqvae, convert_transformer
from dnd_hf.conversion import convert_pipeline, export_original
from dnd_hf.conversion.transformer import PAPER_SAMPLING
from dnd_hf.files import new_folder


FIXTURES = Path(__file__).parents[1] / "fixtures"
PARITY = FIXTURES / "imagenet_depth2"
SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"
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


def run_script(*arguments) -> None:
    """The script in this process."""
    spec = spec_from_file_location("convert_checkpoint", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.parse_arguments(module.ConversionArguments, [str(argument) for argument in arguments]))


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
        folder, files = (
            parity_folder,
            {name: torch.load(PARITY / name, weights_only=False) for name in ("transformer.pt", "rqvae.pt")},
        )
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
    for name in ("prediction_layers", "grid_size", "num_classes", "class_dropout_prob", "tie_prediction_heads"):
        assert getattr(pipe.transformer.config, name) == getattr(again.transformer.config, name)


def test_a_llamagen_pipeline_goes_there_and_back_in_llamagens_format(tmp_path):
    transformer, _, transformer_weights, _ = write_case("llamagen", tmp_path)
    tokenizer, _, tokenizer_weights, _ = write_case("llamagen_vq_16", tmp_path)
    pipe = convert_pipeline(transformer, tokenizer)
    assert pipe.vqvae.config.sample_size == (64, 64) and pipe.transformer.config.embedding_dropout == 0.3
    pipe.save_pretrained(tmp_path / "converted")
    export_original(tmp_path / "converted", tmp_path / "original")
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == ["rqvae.pt", "transformer.pt"]
    for name, weights in (("transformer", transformer_weights), ("rqvae", tokenizer_weights)):
        written = torch.load(tmp_path / "original" / f"{name}.pt")["model"]
        assert all(torch.equal(written[key], weight) for key, weight in weights.items())
        assert written.keys() - weights.keys() <= {"quantize.codebook_used"}


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


@pytest.mark.parametrize(
    ("args", "options", "sides"),
    [
        ({"num_pred_heads": 3}, {}, ["2 (`output.*`)", "3 (`args.num_pred_heads`)"]),
        ({"vocab_size": 65}, {}, ["64 (`tok_embeddings.weight`)", "65 (`args.vocab_size`)"]),
        ({"num_classes": 12}, {}, ["12 classes", "got 11 rows"]),
        ({"class_dropout_prob": 0.0}, {}, ["10 classes", "dropout 0.0", "got 11 rows"]),
        ({"pred_head_positions": "0,1,2"}, {}, ["each of 2 `output.*`", "[0, 1, 2]"]),
        ({"share_prediction_heads": True}, {}, ["`output.*`", "`args.share_prediction_heads`"]),
        ({}, {"prediction_layers": [1]}, ["each of 2 `output.*`", "[1]"]),
        ({}, {"prediction_layers": [1, 3]}, ["[0, 3)", "[1, 3]"]),
        ({}, {"num_attention_heads": 3}, ["width of `tok_embeddings.weight`, 128", "3"]),
        ({}, {"num_classes": 4}, ["4 classes", "got 11 rows"]),
        ({"gpt_type": "t2i"}, {}, ["class-conditional", "text-conditional"]),
    ],
)
def test_a_contradiction_in_a_transformer_names_both_sides(args, options, sides, tmp_path):
    namespace = torch.load(PARITY / "transformer.pt", weights_only=False)["args"]
    folder = parity_copy(tmp_path, args=argparse.Namespace(**{**vars(namespace), **args}))
    with pytest.raises(ValueError) as error:
        convert_transformer(folder / "transformer.pt", **options)
    assert all(side in str(error.value) for side in sides), error.value


@pytest.mark.parametrize(
    ("section", "changes", "sides"),
    [
        ("hparams", {"n_embed": 65}, ["65", "64"]),
        ("hparams", {"n_embed": [64, 32]}, ["same size", "[64, 32]"]),
        ("hparams", {"code_shape": [4, 4, 3]}, ["3 (", "2 ("]),
        ("hparams", {"code_shape": [3, 4, 2]}, ["[3, 4, 2]", "[4, 4, 32]"]),
        ("hparams", {"embed_dim": 16}, ["16", "32"]),
        ("hparams", {"bottleneck_type": "vlrq"}, ["`rq`", "vlrq"]),
        ("ddconfig", {"attn_resolutions": [8]}, ["[True, False]", "[False, True]"]),
        ("ddconfig", {"ch_mult": [1, 4]}, ["[32, 128]", "[32, 64]"]),
        ("ddconfig", {"num_res_blocks": 1}, ["1 (", "2 ("]),
    ],
)
def test_a_contradiction_between_tokenizer_and_configuration_names_both_sides(section, changes, sides, tmp_path):
    config = yaml.safe_load((PARITY / "config.yaml").read_text())
    config["arch"][section].update(changes)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError) as error:
        convert_rqvae(PARITY / "rqvae.pt", tmp_path / "other.yaml")
    assert all(side in str(error.value) for side in sides), error.value


def test_separate_codebooks_are_not_taken_for_a_shared_one(tmp_path):
    path, description, _, _ = write_case("rqvae_separate", tmp_path)
    description["config"]["arch"]["hparams"]["shared_codebook"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(description["config"]))
    with pytest.raises(ValueError, match=r"codebooks\.\*` of .* must be equal as .*config\.yaml says"):
        convert_rqvae(path)


def test_what_a_bare_checkpoint_does_not_tell_must_be_given(tmp_path):
    torch.save(torch.load(PARITY / "transformer.pt", weights_only=False)["model"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="`grid_size` must be given"):
        convert_transformer(tmp_path / "bare.pt", prediction_layers=[0, 2])
    with pytest.raises(ValueError, match="`prediction_layers` must be given"):
        convert_transformer(tmp_path / "bare.pt", grid_size=4)
    pipe = convert_pipeline(tmp_path / "bare.pt", PARITY / "rqvae.pt", prediction_layers=[0, 2])
    assert pipe.transformer.config.grid_size == [4, 4]  # the tokenizer's


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"code grid must .* \(5, 5\) .* \(4, 4\)"):
        convert_pipeline(PARITY / "transformer.pt", PARITY / "rqvae.pt", grid_size=(5, 5))
    tokenizer = write_case("rqvae_separate", tmp_path)[0]
    with pytest.raises(ValueError, match=r"`vocab_size` 64, `vqvae` has `num_vq_embeddings` 32"):
        convert_pipeline(PARITY / "transformer.pt", tokenizer)


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


def test_a_malicious_configuration_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text(f"arch: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    with pytest.raises(ValueError, match=r"must be YAML with `arch\.hparams`"):
        convert_rqvae(PARITY / "rqvae.pt", tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("convert", (convert_transformer, convert_rqvae))
def test_other_files_are_refused_with_what_was_expected(convert, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="must be a file, there is none"):
        convert(path)
    whole = (PARITY / "rqvae.pt").read_bytes()
    picture = io.BytesIO(b"\x89PNG\r\n" + bytes(100)).getvalue()
    for content in (whole[: len(whole) // 2], whole[:100], picture, b"", pickle.dumps([1], protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt must (be a PyTorch checkpoint|hold a dict)"):
            convert(path)
    for content in ([torch.ones(1)], {"step": 1}, {"model": {}}, {"model": {"weight": 1}}, {"a": torch.ones(1)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt must "):
            convert(path)


def test_an_rq_vae_needs_its_configuration(tmp_path):
    shutil.copy(PARITY / "rqvae.pt", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"needs its config\.yaml"):
        convert_rqvae(tmp_path / "rqvae.pt")
    for text in ("arch: {hparams: {}}", "[", "1", "arch: {hparams: {}, ddconfig: {}}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml must "):
            convert_rqvae(tmp_path / "rqvae.pt")
    with pytest.raises(ValueError, match="`config` must be None"):
        convert_rqvae(write_case("llamagen_vq_8", tmp_path)[0], PARITY / "config.yaml")


@pytest.mark.parametrize(("width", "depth", "classes"), [(3200, 1, 1000), (2048, 2, 1000), (1536, 8, 1)])
def test_published_sizes_get_their_heads_names_and_sampling_settings(width, depth, classes, tmp_path):
    layers = max(2, depth)
    weights = {
        "tok_embeddings.weight": (16384, width),
        "cls_embedding.embedding_table.weight": (classes + (classes > 1), width),
        **{f"norm.{k}.weight": (width,) for k in range(depth)},
        **{f"output.{k}.weight": (16384, width) for k in range(depth)},
    }
    for i in range(layers):
        rows = {"attention.wqkv": 3 * width, "attention.wo": width, "feed_forward.w1": 256, "feed_forward.w3": 256}
        weights |= {f"layers.{i}.{name}.weight": (count, width) for name, count in rows.items()}
        weights[f"layers.{i}.feed_forward.w2.weight"] = (width, 256)
        weights |= {f"layers.{i}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    one = torch.ones((), dtype=torch.float16)
    torch.save({name: one.expand(shape) for name, shape in weights.items()}, tmp_path / "checkpoint.pt")
    model = convert_transformer(
        tmp_path / "checkpoint.pt", grid_size=24, prediction_layers=range(layers - depth, layers), dtype=torch.bfloat16
    )
    assert model.config.num_attention_heads == (32 if width == 3200 else width // 64)
    assert model.config.num_classes == classes and model.dtype == torch.bfloat16
    for name, value in PAPER_SAMPLING[width, depth, classes].items():
        assert getattr(model.generation_config, name) == value
    if classes == 1000:
        assert model.config.id2label[0] == "tench, Tinca tinca" and model.config.id2label[999].startswith(
            "toilet tissue"
        )
    else:
        assert model.generation_config.guidance_scale == 1


def test_the_output_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list((tmp_path / "a").iterdir())
    (tmp_path / "a" / "out").mkdir()
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "whole").touch()
        assert not list((tmp_path / "a" / "out").iterdir())
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["out", "whole"]
    with pytest.raises(FileExistsError, match="must be new or empty"), new_folder(tmp_path / "a" / "out"):
        raise AssertionError("the block must not begin")


def test_models_the_official_code_cannot_compute_are_not_written_back(tmp_path):
    config = dict(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, num_classes=2)
    for name, options in {"`depth_mode`": {"depth_mode": "vertical"}, "`grid_size`": {"grid_size": (2, 4)}}.items():
        DnDForImageGeneration(DnDConfig(**config, **options)).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.* for the official code"):
            export_original(tmp_path / name, tmp_path / "original")
    with pytest.raises(ValueError, match=r"must have a config\.json"):
        export_original(tmp_path / "nothing", tmp_path / "original")
    assert not (tmp_path / "original").exists()


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


def test_the_script_ends_with_a_message_and_leaves_nothing_behind(tmp_path):
    arguments = ("--transformer_checkpoint", PARITY / "transformer.pt", "--prediction_layers", "0", "1", "2")
    command = [sys.executable, SCRIPT, *arguments, "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "one for each of 2 `output.*`, got [0, 1, 2]" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
    for wrong in (["--output_dir", "x"], ["--to_original", "x"], ["--rqvae_checkpoint", "x", "--to_original", "y"]):
        with pytest.raises(SystemExit):
            run_script(*wrong)


def test_codes_of_unit_length_need_depth_1():
    with pytest.raises(ValueError, match="`depth` must be 1 with `normalize_codes`"):
        RQVAE(block_out_channels=(32,), code_depth=2, normalize_codes=True)
    vae = RQVAE(block_out_channels=(32,), code_depth=1, num_vq_embeddings=8, vq_embed_dim=4, normalize_codes=True)
    output = vae.train()(torch.rand(2, 3, 4, 4))  # trains as any other: the code vectors follow the unit vectors
    output.sample.mean().backward()
    assert torch.all(vae.quantizer.codebook(0).norm(dim=-1) < 1 + 1e-5)
