"""Conversion of kakaobrain's RQ-Transformers, against results of their code kept in tests/fixtures."""

import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.make_official_cases import random_weights
from safetensors.torch import load_file

from dnd_hf import DnDPipeline, RQTransformerForImageGeneration, convert_rqvae, convert_transformer
from dnd_hf.command_line import parse_arguments
from dnd_hf.conversion import convert_pipeline, convert_prompt_tokenizer, convert_rq_transformer, export_original


FIXTURES = Path(__file__).parents[1] / "fixtures"
PARITY = FIXTURES / "rqtransformer_class"
SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"
CASES = ("rq_unconditional", "rq_text", "rq_separate", "rq_mixed")


def write_archive(case: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An archive in the official format, and what the official code computes from it."""
    if case == "rqtransformer_class":
        shutil.copytree(PARITY, folder, dirs_exist_ok=True)
        expected = load_file(PARITY / "expected.safetensors")
        names = {"logits": "teacher_forced_logits", "loss": "teacher_forced_loss"}
        return folder, expected | {ours: expected[theirs] for ours, theirs in names.items()}
    description = json.loads((FIXTURES / "official" / f"{case}.json").read_text())
    for stage in ("stage1", "stage2"):
        config = description[stage]["config"]
        weights = random_weights(description[stage]["shapes"], description[stage]["same"])
        if "tok_emb.weight" in weights and not config["arch"]["shared_tok_emb"]:
            weights["tok_emb.offsets"] = 32 * torch.arange(config["arch"]["block_size"][2])
        (folder / stage).mkdir(parents=True)
        torch.save({"state_dict": weights, "epoch": 1}, folder / stage / "model.pt")
        (folder / stage / "config.yaml").write_text(yaml.safe_dump(config))
    return folder, load_file(FIXTURES / "official" / f"{case}.safetensors")


def converted(archive: Path, **options) -> RQTransformerForImageGeneration:
    vae = convert_rqvae(archive / "stage1" / "model.pt")
    return convert_rq_transformer(archive / "stage2" / "model.pt", vae, **options)


def run_script(*arguments) -> None:
    """examples/convert_checkpoint.py in this process."""
    spec = spec_from_file_location("convert_checkpoint", SCRIPT)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(parse_arguments(module.ConversionArguments, [str(argument) for argument in arguments]))


def with_config(archive: Path, *path: str, value) -> None:
    """Changes one value of the config.yaml of the second stage."""
    file = archive / "stage2" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    part = content
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file.write_text(yaml.safe_dump(content))


@torch.no_grad()
@pytest.mark.parametrize("case", ("rqtransformer_class", *CASES))
def test_a_converted_model_computes_what_the_official_code_does(case, tmp_path):
    archive, expected = write_archive(case, tmp_path / "archive")
    converted(archive).save_pretrained(tmp_path / "model")
    model = RQTransformerForImageGeneration.from_pretrained(tmp_path / "model")
    conditions = expected["cond"] if model.config.prompt_length else expected["cond"][:, 0]
    output = model(conditions, expected["codes"], labels=expected["codes"])
    logits = output.logits.view_as(expected["logits"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.depth_losses.mean(), expected["loss"], rtol=0, atol=1e-5)
    if case == "rq_text":
        torch.testing.assert_close(output.prompt_logits, expected["cond_logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(output.prompt_loss, expected["cond_loss"], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, 0.9 * expected["loss"] + 0.1 * expected["cond_loss"])
    else:
        torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=1e-5)
    assert torch.equal(model.generate(conditions, do_sample=False), expected["greedy_codes"])


@pytest.mark.parametrize("case", ("rqtransformer_class", *CASES))
def test_there_and_back_gives_every_tensor_bit_for_bit(case, tmp_path):
    archive, _ = write_archive(case, tmp_path / "archive")
    converted(archive).save_pretrained(tmp_path / "model")
    export_original(tmp_path / "model", tmp_path / "back")
    original = torch.load(archive / "stage2" / "model.pt", weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back" / "stage2" / "model.pt", weights_only=True)["state_dict"]
    assert back.keys() == original.keys()
    for name, weight in original.items():
        assert weight.dtype == back[name].dtype and torch.equal(back[name], weight), name

    configs = (
        yaml.safe_load((folder / "stage2" / "config.yaml").read_text()) for folder in (archive, tmp_path / "back")
    )
    original, back = configs
    depth = original["arch"]["block_size"][2]
    for name, value in original["arch"].items():
        if name in ("body", "head"):
            assert value["n_layer"] == back["arch"][name]["n_layer"]
            assert value["block"].items() <= back["arch"][name]["block"].items()
        elif name == "vocab_size":
            assert value in (back["arch"]["vocab_size"], [back["arch"]["vocab_size"]] * depth)
        elif name != "input_embed_dim" or original["arch"].get("input_emb_vqvae"):
            assert back["arch"].get(name) == value, name
    assert original.get("sampling", {}).items() <= back["sampling"].items()


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("rqtransformer_class", dict(temperature=1.0, top_k=32, top_p=0.92)),
        ("rq_unconditional", dict(temperature=1.0, top_k=[32, 16, 8], top_p=[0.9, 0.95, 1.0])),
        ("rq_text", dict(temperature=0.95, top_k=16, top_p=0.95)),
        ("rq_separate", dict(temperature=1.0, top_k=0, top_p=1.0)),
    ],
)
def test_sampling_becomes_the_generation_configuration(case, settings, tmp_path):
    archive, _ = write_archive(case, tmp_path / "archive")
    converted(archive).save_pretrained(tmp_path / "model")
    model = RQTransformerForImageGeneration.from_pretrained(tmp_path / "model")
    assert {name: getattr(model.generation_config, name) for name in settings} == settings
    assert model.generation_config.do_sample and model.generation_config.guidance_scale == 1.0


def test_one_setting_for_all_depths_may_stand_in_a_list(tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    with_config(archive, "sampling", "top_k", value=[7])
    assert converted(archive).generation_config.top_k == 7
    with_config(archive, "sampling", "top_k", value=[7, 8])
    with pytest.raises(ValueError, match=r"`sampling.top_k` .* must be one value or one per depth \(3\)"):
        converted(archive)


def test_averaged_weights_and_another_precision_are_options(tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    content = torch.load(archive / "stage2" / "model.pt", weights_only=True)
    averaged = {name: weight + 1 for name, weight in content["state_dict"].items()}
    torch.save({**content, "state_dict_ema": averaged}, archive / "stage2" / "model.pt")
    plain, ema = converted(archive), converted(archive, use_ema=True, dtype=torch.bfloat16)
    assert torch.equal(ema.norm.weight, (plain.norm.weight + 1).bfloat16())
    assert {weight.dtype for weight in ema.state_dict().values()} == {torch.bfloat16}


def test_imagenet_names_are_those_of_a_model_of_1000_classes(tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    assert len(converted(archive, id2label=dict(enumerate("abcdefghij"))).config.id2label) == 10
    content = torch.load(archive / "stage2" / "model.pt", weights_only=True)
    content["state_dict"]["cond_emb.weight"] = torch.zeros(1000, 64)
    torch.save(content, archive / "stage2" / "model.pt")
    with_config(archive, "arch", "vocab_size_cond", value=1000)
    assert converted(archive).config.id2label[0] == "tench, Tinca tinca"


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_file_that_could_run_code_is_refused(tmp_path, capsys):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    torch.save({"state_dict": Harmful()}, archive / "stage2" / "model.pt")
    with pytest.raises(ValueError, match=r"which could run code"):
        converted(archive)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("arch", "type"), "rq-vae", r"`arch.type` .* must be rq-transformer"),
        (("arch", "use_padding_emb"), True, r"`arch.use_padding_emb` .* must be False"),
        (("arch", "body", "block", "attn_bias"), False, r"`arch.body.block.attn_bias` .* must be True"),
        (("arch", "body", "block", "gelu"), "v3", r"`gelu` .* must be v1 or v2"),
        (("arch", "head", "block", "resid_pdrop"), 0.3, "resid_pdrop"),
        (("arch", "head", "n_layer"), 3, r"`arch.head.n_layer` must be the same everywhere, got 3"),
        (("arch", "body", "n_layer"), 2, r"`arch.body.n_layer` must be the same everywhere, got 2"),
        (("arch", "block_size"), [4, 4, 2], r"`arch.block_size, depth` must be the same everywhere, got 2"),
        (("arch", "block_size"), [4, 4], r"`arch.block_size` .* must be \[height, width, depth\]"),
        (("arch", "vocab_size"), [64, 32, 16], r"`arch.vocab_size` .* must be the same at all 3 depths"),
        (("arch", "vocab_size"), 32, r"other shapes"),
        (("arch", "vocab_size_cond"), 12, r"`arch.vocab_size_cond` must be the same everywhere, got 12"),
        (("arch", "input_embed_dim"), 16, "The size of code vectors must be the same everywhere"),
        (("arch", "shared_cls_emb"), False, "classifier.linear"),
        (("arch", "body"), {}, "must be YAML with `arch.body.block`"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(path, value, message, tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    with_config(archive, *path, value=value)
    with pytest.raises(ValueError, match=message):
        converted(archive)


def test_what_is_missing_is_named(tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path)
    path = archive / "stage2" / "model.pt"
    with pytest.raises(ValueError, match="`vqvae` must be given"):
        convert_rq_transformer(path)
    with pytest.raises(ValueError, match=r"use `convert_rq_transformer`"):
        convert_transformer(path)
    with pytest.raises(ValueError, match=r"must be an RQ-Transformer"):
        convert_rq_transformer(archive / "stage1" / "model.pt")
    (archive / "stage2" / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        converted(archive)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        converted(archive)


def test_both_stages_become_one_pipeline_and_an_archive_again(tmp_path):
    archive, expected = write_archive("rqtransformer_class", tmp_path / "archive")
    paths = [archive / stage / "model.pt" for stage in ("stage2", "stage1")]
    options = ["--transformer_checkpoint", paths[0], "--rqvae_checkpoint", paths[1], "--output_dir", tmp_path / "pipe"]
    run_script(*options, "--top_k", 5)
    pipe = DnDPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.transformer) is RQTransformerForImageGeneration and pipe.transformer.generation_config.top_k == 5
    assert torch.equal(pipe.transformer.code_vectors, pipe.vqvae.quantizer.codebooks)
    assert torch.equal(pipe.vqvae.encode(expected["images"]).codes, expected["image_codes"])
    pipe.set_progress_bar_config(disable=True)
    images = pipe(expected["cond"][:, 0].tolist(), top_k=1, output_type="pt").images
    torch.testing.assert_close(images, (expected["greedy_images"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)

    run_script("--to_original", tmp_path / "pipe", "--output_dir", tmp_path / "back")
    for stage in ("stage1", "stage2"):
        original, back = (
            torch.load(folder / stage / "model.pt", weights_only=True)["state_dict"]
            for folder in (archive, tmp_path / "back")
        )
        assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in back)
    codes = expected["codes"]
    again = convert_pipeline(tmp_path / "back" / "stage2" / "model.pt", tmp_path / "back" / "stage1" / "model.pt")
    assert again.transformer.config.to_diff_dict() == converted(archive).config.to_diff_dict()
    with torch.no_grad():
        logits = (one.transformer(expected["cond"][:, 0], codes).logits for one in (pipe, again))
        assert torch.equal(*logits)


def test_a_pipeline_of_stages_that_do_not_fit_is_refused(tmp_path):
    archive, _ = write_archive("rqtransformer_class", tmp_path / "archive")
    paths = [archive / stage / "model.pt" for stage in ("stage2", "stage1")]
    with pytest.raises(ValueError, match=r"`num_classes` must be None"):
        convert_pipeline(*paths, num_classes=10)
    with pytest.raises(ValueError, match=r"code grid"):
        convert_pipeline(*paths, grid_size=(2, 8))
    pipe = convert_pipeline(*paths)
    pipe.vqvae.quantizer.codebooks[0, 3, 2] += 1
    with pytest.raises(ValueError, match=r"`vqvae` must have the code vectors"):
        DnDPipeline(pipe.transformer, pipe.vqvae)


@torch.no_grad()
def test_a_model_that_reads_nothing_of_the_tokenizer_converts_by_itself(tmp_path):
    archive, expected = write_archive("rq_separate", tmp_path / "archive")
    file = archive / "config of another name.yaml"
    (archive / "stage2" / "config.yaml").rename(file)
    checkpoint = archive / "stage2" / "model.pt"
    run_script("--transformer_checkpoint", checkpoint, "--transformer_config", file, "--output_dir", tmp_path / "model")
    model = RQTransformerForImageGeneration.from_pretrained(tmp_path / "model")
    logits = model(expected["cond"][:, 0], expected["codes"]).logits.view_as(expected["logits"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_a_text_conditional_archive_becomes_a_pipeline_that_takes_prompts(tmp_path):
    archive, expected = write_archive("rq_text", tmp_path / "archive")
    tokens = ["[PAD]", "[UNK]", *"abcdefgh", "a</w>", "b</w>", "ab</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    options = ["--transformer_checkpoint", archive / "stage2" / "model.pt", "--prompt_vocab", tmp_path / "vocab.json"]
    options += ["--rqvae_checkpoint", archive / "stage1" / "model.pt", "--output_dir", tmp_path / "pipe"]
    with pytest.raises(ValueError, match="`prompt_vocab` and `prompt_merges` must be given both"):
        run_script(*options)
    assert not (tmp_path / "pipe").exists()
    run_script(*options, "--prompt_merges", tmp_path / "merges.txt")
    pipe = DnDPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    codes = pipe(prompt="AB a", top_k=1, output_type="codes").images
    assert torch.equal(codes, pipe.transformer.generate([[12, 10, 0, 0, 0]], do_sample=False))
    greedy = pipe(expected["cond"], top_k=1, output_type="codes").images
    assert torch.equal(greedy, expected["greedy_codes"])


def test_the_official_code_cannot_have_a_null_class(make_rq_model, tmp_path):
    make_rq_model(class_dropout_prob=0.1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`class_dropout_prob` must be 0\.0"):
        export_original(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_text_tokenizer_pads_cuts_and_lower_cases(tmp_path):
    vocab = ["[PAD]", "[UNK]", "a", "b", "a</w>", "b</w>", "ab</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = convert_prompt_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", prompt_length=5)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    encode = dict(padding="max_length", truncation=True)
    assert tokenizer("AB a bb", **encode).input_ids == [6, 4, 3, 5, 0]
    assert tokenizer("a a a a a b", **encode).input_ids == [4, 4, 4, 4, 4]
    assert tokenizer("z", **encode).input_ids == [1, 0, 0, 0, 0]
    with pytest.raises(FileNotFoundError, match="vocabulary and merges"):
        convert_prompt_tokenizer(tmp_path / "none.json", tmp_path / "merges.txt", 5)
