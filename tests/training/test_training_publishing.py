"""Publishing: what a run puts on the Hub, that it can be loaded from there, and what happens when it does not work."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from hub_stand_in import HubStandIn, Repository
from huggingface_hub import ModelCard

from dnd_hf import DnDConfig
from dnd_hf.arguments import RunArguments
from dnd_hf.command_line import parse_arguments
from dnd_hf.training.environment import RunEnvironment
from dnd_hf.training.publishing import write_model_card


REPOSITORY = Path(__file__).parents[2]
DATA = "--dataset_name words --num_train_images 40 --num_validation_images 8 --dataloader_num_workers 0"
SHORT = "--max_train_steps 2 --train_batch_size 4 --logging_steps 1"
TOKENIZER = (
    f"{DATA} {SHORT} --sample_size 16 64 --block_out_channels 8 8 8 8 --layers_per_block 1 --norm_num_groups 4"
    " --latent_channels 8 --num_vq_embeddings 16 --code_depth 2 --output_dir rqvae"
)
TRANSFORMER = (
    f"{DATA} {SHORT} --vqvae me/tokenizer --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2"
    " --num_samples 4 --lr_warmup_steps 0 --learning_rate 0.01 --output_dir words --push_to_hub"
)
CODE = {"pipeline.py", "modeling_dnd.py", "transformer/modeling_dnd.py", "vqvae/autoencoder_rqvae.py"}

TRAIN_AND_PUBLISH = """
    import json, os, runpy, sys
    from types import SimpleNamespace

    import huggingface_hub.utils._http as http
    from accelerate.state import AcceleratorState, GradientState

    from dnd_hf.command_line import parse_arguments

    http.time = SimpleNamespace(sleep=lambda seconds: None)  # its waits before it tries again
    examples, tokenizer, transformer = sys.argv[1:]

    def run(script, options):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        names = runpy.run_path(f"{examples}/{script}")
        arguments = {"train.py": "DnDArguments", "train_rqvae.py": "RQVAEArguments"}[script]
        try:
            names["main"](parse_arguments(names[arguments], options.split()))
        except (ValueError, RuntimeError) as error:
            return str(error)

    token = os.environ.pop("HF_TOKEN")
    messages = {"no token": run("train.py", transformer)}
    os.environ["HF_TOKEN"] = token
    messages["not ours"] = run("train.py", f"{transformer} --hub_model_id you/words")
    messages["read only"] = run("train.py", f"{transformer} --hub_model_id you/open")
    messages["licence"] = run("train.py", f"{transformer} --hub_license free")
    started = os.listdir()

    messages["only trained"] = run("train_rqvae.py", tokenizer)
    assert os.path.exists("rqvae/README.md"), messages
    with open("rqvae/README.md") as file:
        card = file.read()
    options = "--resume_from_checkpoint latest --push_to_hub --hub_model_id tokenizer --hub_private --hub_license mit"
    messages["published"] = run("train_rqvae.py", f"{tokenizer} {options}")
    messages["cut"] = run("train.py", transformer)
    with open("result.json", "w") as file:
        json.dump({"messages": messages, "started": started, "unpublished_card": card}, file)
"""

LOAD_AND_PUBLISH = """
    import json

    import diffusers
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub import upload_file
    from transformers import AutoModel

    from dnd_hf import RQVAE, DnDForImageGeneration, DnDPipeline

    def pictures(pipe):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        return pipe(list(range(8)), generator=generators, output_type="np").images

    def same_weights(one, other):
        one, other = one.state_dict(), other.state_dict()
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    local = DnDPipeline.from_pretrained("words")
    expected = pictures(local)
    assert all(head.weight.any() for head in local.transformer.heads) and expected.std() > 0.01

    def same(pipe):
        assert type(pipe) is DnDPipeline
        weights = same_weights(pipe.transformer, local.transformer) and same_weights(pipe.vqvae, local.vqvae)
        return weights and np.array_equal(pictures(pipe), expected)

    transformer = DnDForImageGeneration.from_pretrained("me/words", subfolder="transformer")
    made = DnDPipeline(transformer=transformer, vqvae=RQVAE.from_pretrained("me/words", subfolder="vqvae"))
    auto = AutoModel.from_pretrained("me/words", subfolder="transformer", trust_remote_code=True)
    auto_vqvae = diffusers.AutoModel.from_pretrained("me/words", subfolder="vqvae", trust_remote_code=True)
    local.push_to_hub("me/again", private=True)
    local.push_to_hub("me/again")
    made.push_to_hub("me/made")
    made.push_to_hub("me/edited")
    card = b"---\\nlicense: mit\\nlibrary_name: diffusers\\n---\\n# Mine\\n"
    upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/edited")
    made.push_to_hub("me/edited")
    results = {
        "DnDPipeline": same(DnDPipeline.from_pretrained("me/words")),
        "DiffusionPipeline": same(DiffusionPipeline.from_pretrained("me/words", trust_remote_code=True)),
        "its models": same(made),
        "AutoModel": same(DnDPipeline(transformer=auto, vqvae=auto_vqvae)),
        "the tokenizer": same_weights(RQVAE.from_pretrained("me/tokenizer"), local.vqvae),
        "pushed by itself": same(DiffusionPipeline.from_pretrained("me/again", trust_remote_code=True)),
    }
    with open("loaded.json", "w") as file:
        json.dump(results, file)
"""


def run_client(hub: HubStandIn, folder: Path, home: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | hub.environment(folder / home) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub, a folder of runs, and what they said: after a tokenizer went up, a pipeline was cut off, and went on."""
    hub, folder = HubStandIn(), tmp_path_factory.mktemp("published")
    hub.repositories["you/open"] = Repository("you/open")
    hub.uploads_until_cut["me/words"] = 1
    with hub.running():
        program = [dedent(TRAIN_AND_PUBLISH), str(REPOSITORY / "examples"), TOKENIZER, TRANSFORMER]
        run_client(hub, folder, "home", "-c", *program)
        result = json.loads((folder / "result.json").read_text())
        on_disk = {str(path.relative_to(folder / "words")) for path in (folder / "words").rglob("*") if path.is_file()}
        words = hub.repositories["me/words"]
        before = SimpleNamespace(files=dict(words.files), sent=sum(words.sent.values()))
        hub.uploads_until_cut.clear()
        hub.is_down = False
        (command,) = re.findall(r"^ +hf (upload .*)$", result["messages"]["cut"], flags=re.MULTILINE)
        run_client(hub, folder, "home", "-m", "huggingface_hub.cli.hf", *shlex.split(command))
        yield SimpleNamespace(hub=hub, folder=folder, before=before, on_disk=on_disk, **result)


@pytest.fixture(scope="module")
def loaded(published):
    """The same after another machine has loaded what is there, and published pipelines of its own."""
    run_client(published.hub, published.folder, "elsewhere", "-c", dedent(LOAD_AND_PUBLISH))
    published.same = json.loads((published.folder / "loaded.json").read_text())
    return published


def card_of(repository: Repository) -> ModelCard:
    """The card on the Hub, whose pictures are there too."""
    card = ModelCard(repository.read("README.md").decode())
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card.text)) <= set(repository.files)
    return card


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "no token, give one with `hf auth login` or the environment variable HF_TOKEN"),
        ("not ours", "cannot write to 'you/words': 403"),
        ("read only", "cannot write to 'you/open': 403"),
        ("licence", "must be one of ('apache-2.0', 'mit', 'other')"),
    ],
)
def test_what_cannot_be_published_is_refused_before_any_work(published, case, message):
    assert published.messages[case].startswith("`push_to_hub` cannot write to") and message in published.messages[case]
    assert published.started == []
    assert len(published.hub.repositories["you/open"].commits) == 1


def test_offline_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with pytest.raises(ValueError, match=r"`push_to_hub` cannot write to 'run'.*offline mode"):
        RunEnvironment(RunArguments(output_dir=str(tmp_path / "run"), push_to_hub=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    ["--hub_model_id a/b/c", "--push_to_hub --hub_model_id no!", "--push_to_hub --output_dir out/-run"],
)
def test_an_unusable_repository_name_is_refused_with_the_option_to_change(options, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(RunArguments, options.split())
    assert re.search("error: --hub_model_id: Repo id must", capsys.readouterr().err)


def test_a_tokenizer_is_published_with_its_card_and_without_its_checkpoints(published):
    assert published.messages["only trained"] is None and published.messages["published"] is None
    repository = published.hub.repositories["me/tokenizer"]
    assert repository.private and len(repository.commits) == 2
    assert set(repository.files) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "metrics.jsonl",
        "samples/step-2.png",
        "training_curves.png",
    }
    card = card_of(repository)
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert 'RQVAE.from_pretrained("me/tokenizer")' in card.text and "Weights: mit." in card.text
    assert "--num_vq_embeddings 16 \\\n" in card.text and "| psnr |" in card.text and "samples/step-2.png" in card.text


def test_a_run_that_is_not_published_has_its_card_all_the_same(published):
    card = ModelCard(published.unpublished_card)
    assert 'RQVAE.from_pretrained("rqvae")' in card.text and "Weights: not stated." in card.text
    assert card.data.license is None


def test_an_upload_that_is_cut_leaves_the_whole_result_and_the_command_that_goes_on_with_it(published):
    assert published.messages["cut"].startswith("the result is complete in words, but its upload failed: ")
    assert published.before.files == {} and published.before.sent == 1
    uploaded = {path for path in published.on_disk if not path.startswith("checkpoint-")}
    words = published.hub.repositories["me/words"]
    assert set(words.files) == uploaded and len(uploaded) < len(published.on_disk)
    assert {"model_index.json", "README.md", "vqvae/diffusion_pytorch_model.safetensors", *CODE} < uploaded
    assert len(words.sent) == 4 and set(words.sent.values()) == {1}  # two weights, two pictures: none was sent twice
    assert 'from_pretrained("me/words", trust_remote_code=True)' in card_of(words).text


@pytest.mark.parametrize(
    "what", ["DnDPipeline", "DiffusionPipeline", "its models", "AutoModel", "the tokenizer", "pushed by itself"]
)
def test_what_is_published_loads_by_its_name_with_the_same_weights_and_pictures(loaded, what):
    assert loaded.same[what]


def test_the_client_asked_for_nothing_that_the_stand_in_lacks(loaded):
    assert loaded.hub.unknown_requests == []


def test_a_pipeline_pushed_by_itself_has_the_card_of_its_run_and_is_sent_once(loaded):
    again, words = (loaded.hub.repositories[name] for name in ("me/again", "me/words"))
    assert again.private and len(again.commits) == 2
    assert again.read("README.md") == words.read("README.md") and card_of(again)
    assert set(again.files) > CODE and "metrics.jsonl" not in again.files
    assert len(again.sent) == 4 and set(again.sent.values()) == {1}


def test_a_pipeline_without_a_run_has_a_card_that_says_how_to_use_it(loaded):
    card = card_of(loaded.hub.repositories["me/made"])
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert 'DiffusionPipeline.from_pretrained("me/made", trust_remote_code=True)' in card.text


def test_pushing_does_not_overwrite_the_card_that_is_there(loaded):
    repository = loaded.hub.repositories["me/edited"]
    assert repository.read("README.md") == b"---\nlicense: mit\nlibrary_name: diffusers\n---\n# Mine\n"


@dataclass
class Arguments(RunArguments):
    codes_dir: str | None = None
    pretrained_transformer: str | None = None
    prediction_layers: list[int] | None = None


def write_card(folder: Path, **options) -> ModelCard:
    """The card of a run of a pipeline with two lines of metrics and three sample grids."""
    (folder / "samples").mkdir()
    DnDConfig(num_classes=5).save_pretrained(folder / "transformer")
    for name in ("samples/step-9.png", "samples/step-10.png", "samples/step-8.png", "model_index.json"):
        (folder / name).touch()
    lines = [
        {"step": 5, "validation/loss": 9.0, "validation/loss_depth_1": 9.0},
        {"step": 10, "train/loss": 7.0},
        {"step": 10, "validation/loss": 1.25, "validation/loss_depth_1": 1.0, "validation/loss_depth_2": 1.5},
        {"step": 10, "validation/usage_depth_2": 0.1234567},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), mixed_precision="bf16")
    args = Arguments(output_dir=str(folder), train_batch_size=8, gradient_accumulation_steps=3, **options)
    write_model_card(args, None, accelerator, 1234)
    return ModelCard.load(folder / "README.md")


def test_a_card_holds_data_settings_metrics_samples_and_licence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/train.py"])
    card = write_card(
        tmp_path,
        dataset_name="org/birds",
        dataset_split="all birds",
        pretrained_transformer="org/dnd",
        prediction_layers=[1, 2],
        random_flip=True,
        hub_license="cc-by-4.0",
        hub_model_id="org/birds-dnd",
        resume_from_checkpoint="latest",
    )
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dnd-transformer", "class-conditional-image-generation"],
        "license": "cc-by-4.0",
        "datasets": ["org/birds"],
        "base_model": "org/dnd",
    }
    assert 'from_pretrained("org/birds-dnd", trust_remote_code=True)' in card.text
    assert "[org/birds](https://huggingface.co/datasets/org/birds), all birds, 1,234 samples" in card.text
    command = re.search(r"```sh\n(.*?)```", card.text, flags=re.DOTALL)[1]
    launch, *options = command.replace("\\\n", "").split("--")
    assert launch.split() == ["accelerate", "launch", "train.py"]
    assert sorted(shlex.split(option) for option in options) == [
        ["dataset_name", "org/birds"],
        ["dataset_split", "all birds"],
        ["gradient_accumulation_steps", "3"],
        ["output_dir", tmp_path.name],
        ["prediction_layers", "1", "2"],
        ["pretrained_transformer", "org/dnd"],
        ["random_flip", "True"],
        ["train_batch_size", "8"],
    ]
    assert "100,000 steps of 48 samples" in card.text and f"torch {torch.__version__.split('+')[0]}" in card.text
    assert "after step 10:" in card.text
    table = "| depth | loss | usage |\n|---|---|---|\n| 1 | 1 |  |\n| 2 | 1.5 | 0.12346 |\n| all | 1.25 |  |\n"
    assert table in card.text
    assert re.findall(r"!\[.*?\]\((.*?)\)", card.text) == ["samples/step-10.png"]
    assert "Weights: cc-by-4.0." in card.text


def test_a_card_names_the_data_set_that_the_codes_were_made_of(tmp_path):
    (tmp_path / "codes").mkdir()
    settings = {"dataset_name": "org/birds", "dataset_split": "test"}
    (tmp_path / "codes" / "extraction.json").write_text(json.dumps(settings))
    (tmp_path / "run").mkdir()
    card = write_card(tmp_path / "run", codes_dir=str(tmp_path / "codes"))
    assert card.data.datasets == ["org/birds"] and "[org/birds]" in card.text and "birds), test, 1,234" in card.text


def test_a_card_says_nothing_of_where_local_folders_lie(tmp_path, monkeypatch):
    for name in ("secret/codes", "secret/dnd", "run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pretrained = str(tmp_path / "secret" / "dnd")
    card = write_card(tmp_path / "run", codes_dir="secret/codes", pretrained_transformer=pretrained)
    assert "secret" not in card.content and "--pretrained_transformer dnd" in card.text and "Not named" in card.text
    assert card.data.datasets is None and card.data.base_model is None and card.data.license is None
    assert "Weights: not stated." in card.text
