"""dnd_hf.training: a run resumes with the settings that its checkpoint claims, and a checkpoint cannot run code."""

import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as sharded
from test_training_run import train

from dnd_hf.training.safe_loading import check_pickles
from dnd_hf.training.settings import FILE


def resume(folder: Path, **options) -> None:
    train(folder, resume_from_checkpoint="latest", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"ema_decay": 0.5}, r"ema_decay was 0\.999 and is 0\.5"),
        ({"lr_scheduler": "linear"}, "lr_scheduler was 'cosine' and is 'linear'"),
        ({"train_batch_size": 3}, "samples_per_step was 4 and is 6"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no' and is 'bf16'"),
        (
            {"seed": 1, "max_grad_norm": 2.0},
            r"seed was 0 and is 1; .*max_grad_norm was 1\.0 and is 2\.0",
        ),
    ],
)
def test_other_settings_are_refused_with_the_old_and_the_new_value(tmp_path, changes, message):
    train(tmp_path, max_train_steps=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"checkpoint-2 was trained with other settings: .*{message}"):
        resume(tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_length_of_a_run_and_what_it_reports_may_change_and_is_told(tmp_path, capsys):
    train(tmp_path, max_train_steps=2)
    resume(tmp_path, max_train_steps=4, logging_steps=1, train_batch_size=4, gradient_accumulation_steps=1)
    said = capsys.readouterr().out
    assert "Resumed at step 2 from" in said and "max_train_steps was 2 and is 4" in said
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_run_without_a_record_resumes_and_says_so(tmp_path, capsys):
    train(tmp_path, max_train_steps=2)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    resume(tmp_path, seed=1)
    assert "has no record of its settings" in capsys.readouterr().out


def test_a_second_run_in_one_folder_is_refused_while_the_first_one_lives(tmp_path):
    program = (
        "import sys, time\n"
        "from dnd_hf.files import locked\n"
        "with locked(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"another run is writing to .*process {first.pid} on "):
            train(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        first.kill()
        first.wait()
    train(tmp_path)
    assert not (tmp_path / ".lock").exists()


class Attack:
    """What runs when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_with_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, name, old_format):
    train(tmp_path / "run", max_train_steps=2)
    file = tmp_path / "run" / "checkpoint-2" / name
    state = torch.load(file, weights_only=False)
    torch.save({**state, "attack": Attack(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=f"{name} is not loaded, because it could run code"):
        resume(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def save_shards(folder: Path, value: object) -> None:
    sharded.save({"weight": torch.ones(3), "value": value}, checkpoint_id=folder, no_dist=True)


def test_sharded_checkpoints_are_read_as_data(tmp_path):
    save_shards(tmp_path / "good", {"lr": 0.1, "steps": [1, 2]})
    check_pickles(tmp_path)


@pytest.mark.parametrize("where", ["description", "shard"])
def test_a_sharded_checkpoint_with_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, where):
    attack = Attack(tmp_path / "ran")
    save_shards(tmp_path / "shards", attack if where == "shard" else 1)
    if where == "description":
        (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(ValueError, match=r"\.metadata is not loaded, because it could run code"):
        check_pickles(tmp_path)
    assert not (tmp_path / "ran").exists()
    # The attack is one: what PyTorch itself does with the folder runs it.
    with suppress(BaseException):  # CheckpointException is one
        sharded.load({"weight": torch.ones(3), "value": None}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert (tmp_path / "ran").exists()
