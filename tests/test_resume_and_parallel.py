"""The training scripts end with the same weights however often they are killed, and however many processes train."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dnd_hf import RQVAE
from dnd_hf.training.checkpoints import list_checkpoints
from dnd_hf.training.metrics import read_metrics


REPOSITORY = Path(__file__).parents[1]
DATA = "--dataset_name words --num_train_images 60 --num_validation_images 8 --dataloader_num_workers 1"
RUN = "--max_train_steps 12 --checkpointing_steps 3 --validation_steps 6 --logging_steps 1 --lr_warmup_steps 2"
TOKENIZER = (
    f"train_rqvae.py {DATA} {RUN} --train_batch_size 4 --sample_size 16 64 --block_out_channels 8 8 8 8"
    " --layers_per_block 1 --norm_num_groups 4 --latent_channels 8 --num_vq_embeddings 16 --code_depth 2"
    " --learning_rate 0.001 --gan_weight 0.75 --gan_start_step 2 --discriminator_layers 2 --quantizer_start_step 1"
)
TRANSFORMER = (
    f"train.py {DATA} {RUN} --vqvae vqvae --train_batch_size 4 --hidden_size 16 --num_hidden_layers 2"
    " --num_attention_heads 2 --num_samples 4 --learning_rate 0.01"
)
SCRIPTS = {
    "train_rqvae": f"{TOKENIZER} --random_crop true --random_flip true --gradient_accumulation_steps 2",
    "train": f"{TRANSFORMER} --gradient_accumulation_steps 2 --drop_path_rate 0.1",
    "train_rq_transformer": (
        f"{TRANSFORMER} --architecture rq_transformer --num_depth_layers 1 --class_dropout_prob 0.1"
        " --soft_code_temperature 0.5 --gradient_accumulation_steps 2"
    ),
}
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def command(options: str, launcher: list[str] = ONE) -> list[str]:
    script, *arguments = options.split()
    return [*launcher, str(REPOSITORY / "examples" / script), *arguments]


def start(
    folder: Path, options: str, launcher: list[str] = ONE, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.Popen:
    """Starts a script as a user would, in a process group of its own; its output goes to a file in `folder`."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command(options, launcher),
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(timeout=600) == 0, (folder / "output.txt").read_text()[-4000:]


def kill_when(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    """Kills the process with SIGKILL as soon as something that matches `pattern` is in the folder."""
    while not any(folder.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, codebook, averages, optimizers, schedule; names tell the file."""
    tensors = {}

    def collect(name: str, value) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f"{name}/{key}", entry)
        elif isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                collect(f"{name}/{index}", entry)
        elif isinstance(value, (int, float)):
            tensors[name] = torch.tensor(value)

    for path in sorted(checkpoint.glob("*")):
        if path.suffix == ".safetensors":
            collect(path.name, load_file(path))
        elif path.suffix in (".bin", ".pkl") and not path.name.startswith("random_states"):
            collect(path.name, torch.load(path))
    return tensors


def assert_same_state(one: Path, other: Path) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys() and len(first) > 50
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    torch.manual_seed(0)
    RQVAE(
        sample_size=(16, 64),
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        num_vq_embeddings=16,
        code_depth=2,
    ).save_pretrained(folder / "vqvae")
    return folder


@pytest.mark.parametrize(
    "script", ["train_rqvae", "train", pytest.param("train_rq_transformer", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(folder, script):
    whole, killed = f"{script}-whole", f"{script}-killed"
    uninterrupted = start(folder, f"{SCRIPTS[script]} --output_dir {whole}")
    resuming = f"{SCRIPTS[script]} --output_dir {killed} --resume_from_checkpoint latest"

    process = start(folder, resuming)
    kill_when(folder / killed, "checkpoint-3", process)
    # While a checkpoint is being written: half of it lies there, under another name.
    process = start(folder, resuming)
    kill_when(folder / killed, ".checkpoint-*.unfinished", process)
    resumed_from = max(step for step, _ in list_checkpoints(folder / killed))
    assert 3 <= resumed_from < 12
    finish(start(folder, resuming), folder)
    finish(uninterrupted, folder)

    assert_same_state(folder / whole / "checkpoint-12", folder / killed / "checkpoint-12")
    assert [step for step, _ in list_checkpoints(folder / killed)] == [9, 12]
    metrics = [read_metrics(folder / name / "metrics.jsonl") for name in (whole, killed)]
    losses = [[(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] for lines in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def signal_after_a_step(folder: Path, output: str, process: subprocess.Popen, send: Callable[[], None]) -> int:
    """Sends a signal while the run trains; returns the step after which it stopped."""
    while not any("train/loss" in line for line in read_metrics(folder / output / "metrics.jsonl")):
        assert process.poll() is None, (folder / "output.txt").read_text()[-4000:]
        time.sleep(0.005)
    send()
    assert process.wait(timeout=600) != 0
    ((step, _),) = list_checkpoints(folder / output)
    assert f"after step {step}; {output}/checkpoint-{step} is written. To resume" in (folder / "output.txt").read_text()
    return step


@pytest.mark.parametrize(("name", "launcher"), [("SIGINT", ONE), ("SIGTERM", TWO)])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_resumes_exactly(folder, name, launcher):
    options = f"{TRANSFORMER} --max_train_steps 60 --checkpointing_steps 60 --validation_steps 60"
    whole, stopped = f"{name}-whole", f"{name}-stopped"
    uninterrupted = start(folder, f"{options} --output_dir {whole}", launcher)
    resuming = f"{options} --output_dir {stopped} --resume_from_checkpoint latest"
    process = start(folder, resuming, launcher)
    # Ctrl-C in a terminal reaches all processes, workers too; SIGTERM here only the launcher, which passes it on.
    send = {
        "SIGINT": lambda: os.killpg(process.pid, signal.SIGINT),
        "SIGTERM": lambda: os.kill(process.pid, signal.SIGTERM),
    }[name]
    assert 1 <= signal_after_a_step(folder, stopped, process, send) < 60
    assert launcher == TWO or process.returncode == 128 + signal.SIGINT
    assert f"Stopped by {name}" in (folder / "output.txt").read_text()
    finish(uninterrupted, folder)
    finish(start(folder, resuming, launcher), folder)
    assert_same_state(folder / whole / "checkpoint-60", folder / stopped / "checkpoint-60")


def test_a_collapsing_codebook_ends_the_run_and_says_what_to_try(folder):
    # Of 16 codes no more than 16 can be in use.
    options = f"{TOKENIZER} --min_perplexity 16.5 --lr_warmup_steps 4 --output_dir collapsed"
    failed = subprocess.run(command(options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert failed.returncode == 1
    assert "the codebook has collapsed by step 6" in failed.stderr and "checkpoint-3. Try a lower" in failed.stderr
    assert [step for step, _ in list_checkpoints(folder / "collapsed")] == [3]


def test_a_full_disk_leaves_the_checkpoint_before_it(folder):
    run = f"{TRANSFORMER} --dataloader_num_workers 0 --output_dir full --resume_from_checkpoint latest"
    kill_when(folder / "full", "checkpoint-3", start(folder, run))
    ((step, checkpoint),) = list_checkpoints(folder / "full")[-1:]
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    # No file may grow beyond 8 kB, which is less than the weights take.
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command(run)]
    failed = subprocess.run(limited, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert failed.returncode == 1 and "File too large" in failed.stderr
    assert list_checkpoints(folder / "full")[-1] == (step, checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    finish(start(folder, run), folder)
    assert list_checkpoints(folder / "full")[-1][0] == 12


NO_DROPOUT = "--embedding_dropout 0 --residual_dropout 0 --mlp_dropout 0 --class_dropout_prob 0"


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("", id="dnd"),
        pytest.param(
            "--architecture rq_transformer --num_depth_layers 1 --tie_prediction_heads false",
            id="rq_transformer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sharded_processes_follow_one_and_resume_exactly(model, folder):
    # Accelerate shards on accelerators alone: its state is told that these two processes have some.
    (folder / "sharded.py").write_text(
        "import runpy, sys\n"
        "from accelerate import PartialState\n"
        "PartialState(cpu=True).distributed_type = 'MULTI_GPU'\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    config = yaml.safe_load((REPOSITORY / "examples" / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in config.items()}
    sharded = [*TWO, str(folder / "sharded.py")]
    dropout = NO_DROPOUT.replace("--mlp_dropout 0", "") if model else NO_DROPOUT
    options = f"{TRANSFORMER} {dropout} {model}"
    halves = options.replace("--train_batch_size 4", "--train_batch_size 2")
    environment = ENVIRONMENT | environment | {"ACCELERATE_USE_FSDP": "true"}
    folder = folder / f"sharded{len(model)}"
    folder.mkdir()
    (folder / "vqvae").symlink_to("../vqvae")
    finish(start(folder, f"{options} --output_dir whole"), folder)
    finish(start(folder, f"{halves} --output_dir shards", sharded, environment), folder)
    again = f"{halves} --output_dir shards-again --resume_from_checkpoint shards/checkpoint-9"
    finish(start(folder, again, sharded, environment), folder)

    assert len(list((folder / "shards" / "checkpoint-12" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    losses = [
        [line["train/loss"] for line in read_metrics(folder / name / "metrics.jsonl") if "train/loss" in line]
        for name in ("whole", "shards", "shards-again")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == losses[1][9:]
    whole, shards, again = (
        load_file(folder / name / "transformer" / "model.safetensors") for name in ("whole", "shards", "shards-again")
    )
    for name in whole:
        torch.testing.assert_close(shards[name], whole[name], rtol=0, atol=1e-4)
        assert torch.equal(again[name], shards[name])


@pytest.mark.parametrize("script", ["train_rqvae", "train"])
def test_two_processes_with_half_the_batch_follow_one_with_all_of_it(folder, script):
    options = f"{TRANSFORMER} {NO_DROPOUT}" if script == "train" else TOKENIZER
    finish(start(folder, f"{options} --output_dir {script}-one"), folder)
    halves = options.replace("--train_batch_size 4", "--train_batch_size 2")
    finish(start(folder, f"{halves} --output_dir {script}-two", TWO), folder)

    one, two = (
        [line for line in read_metrics(folder / f"{script}-{name}" / "metrics.jsonl") if "train/loss" in line]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 12
    for alone, together in zip(one, two):
        for name in alone:
            if "loss" in name or name in ("train/l2", "train/commitment", "train/generator", "train/discriminator"):
                assert together[name] == pytest.approx(alone[name], abs=1e-5), (alone["step"], name)
    if script == "train_rqvae":
        first, second = (RQVAE.from_pretrained(folder / f"{script}-{name}").quantizer for name in ("one", "two"))
        torch.testing.assert_close(second.codebooks, first.codebooks, rtol=0, atol=1e-4)
        torch.testing.assert_close(second.cluster_sizes, first.cluster_sizes, rtol=0, atol=1e-3)
