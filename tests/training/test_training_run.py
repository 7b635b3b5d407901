"""dnd_hf.training: a run is a function of its arguments, wherever it was interrupted."""

import json
import sqlite3
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from dnd_hf.arguments import RunArguments
from dnd_hf.command_line import parse_arguments
from dnd_hf.figures import plot_training_curves
from dnd_hf.training.checkpoints import find_checkpoint, list_checkpoints
from dnd_hf.training.data_order import TrainingStream, hold_out
from dnd_hf.training.environment import RunEnvironment, choose_precision
from dnd_hf.training.metrics import JsonlTracker, read_metrics
from dnd_hf.training.optimization import WeightAverage, averaged_weights, weight_decay_groups
from dnd_hf.training.run import TrainingRun


class NoisyPoints(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"x": index + torch.rand(3), "index": index}


class SmallRun(TrainingRun):
    """A small network with dropout, trained towards 0; `diverge` says what becomes infinite or NaN."""

    result_name = "result"

    def __init__(self, args: RunArguments, diverge: str | None = None):
        environment = RunEnvironment(args)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        super().__init__(
            environment, network, optimizer, NoisyPoints(), default_collate, tokens_per_sample=3, flops_per_sample=10
        )
        self.diverge = diverge

    def train_step(self, batch, step):
        with self.accelerator.accumulate(self.wrapped_model):
            loss = self.wrapped_model(batch["x"]).square().mean()
            if self.diverge == "loss" and step == 4:
                loss = loss * torch.inf
            self.accelerator.backward(loss)
            if self.diverge == "gradient" and step == 5:
                self.model[0].weight.grad[0, 0] = torch.nan
            metrics = self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss, **metrics}

    def validate(self, model, step):
        self.show([Image.new("RGB", (2, 2))] * 2, 2, step)
        return {"score": step}

    def export(self, model, folder):
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")


SHORT = dict(
    train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=6, checkpointing_steps=2, validation_steps=6,
    logging_steps=2, lr_warmup_steps=2, lr_scheduler="cosine", dataloader_num_workers=0,
)  # fmt: skip


def train(output_dir: Path, run_class: type = SmallRun, diverge: str | None = None, **options) -> dict:
    """Trains a small network; returns its averaged weights as exported."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    run_class(RunArguments(output_dir=str(output_dir), **{**SHORT, **options}), diverge).train()
    return torch.load(output_dir / "weights.pt")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, num_workers):
    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
                    dataloader_num_workers=num_workers)  # fmt: skip
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_from_latest_repeats_no_line_of_the_metrics(tmp_path):
    train(tmp_path, max_train_steps=4, checkpoints_total_limit=1)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "train/loss": 0.0}) + '\n{"step": 5, "cut o')
    train(tmp_path, resume_from_checkpoint="latest")
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert steps == [2, 4, 6]


@pytest.mark.parametrize(("schedule", "rates"), [("constant_with_warmup", [1, 1, 1]), ("linear", [1, 0.5, 0])])
def test_the_learning_rate_follows_its_schedule(tmp_path, schedule, rates):
    train(tmp_path, lr_scheduler=schedule)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["train/learning_rate"] / 0.01 for line in lines if "train/loss" in line] == pytest.approx(rates)


def test_a_run_does_not_overwrite_the_checkpoints_of_another(tmp_path):
    train(tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match="holds checkpoints"):
        train(tmp_path)


def test_a_checkpoint_holds_the_result_so_far(tmp_path):
    final = train(tmp_path)
    assert torch.equal(torch.load(tmp_path / "checkpoint-6" / "result" / "weights.pt")["0.weight"], final["0.weight"])
    assert {line["validation/score"] for line in read_metrics(tmp_path / "metrics.jsonl") if len(line) == 2} == {6}
    assert (tmp_path / "training_curves.png").exists()


def test_a_validation_that_fails_costs_no_step_and_is_made_up_for(tmp_path):
    class FailingRun(SmallRun):
        def validate(self, model, step):
            raise MemoryError

    with pytest.raises(MemoryError):
        train(tmp_path, FailingRun)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    train(tmp_path, resume_from_checkpoint="latest")
    train(tmp_path, resume_from_checkpoint="latest")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation/score" in line] == [6]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]


def test_after_an_error_of_a_worker_no_worker_is_left_that_the_end_of_the_program_would_wait_for(tmp_path, monkeypatch):
    def fail(dataset, index):
        raise RuntimeError("every image is broken.")

    monkeypatch.setattr(NoisyPoints, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="every image is broken") as caught:
        train(tmp_path, dataloader_num_workers=1)
    left = active_children()
    for process in left:
        process.kill()
    assert caught.tb and left == []


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 4), (0.1, 1)])
def test_epochs_are_passes_over_the_data(tmp_path, epochs, steps):
    train(tmp_path, num_train_epochs=epochs)  # 7 samples, 4 a step
    assert list_checkpoints(tmp_path)[-1] == (steps, tmp_path / f"checkpoint-{steps}")


def test_the_console_says_what_the_run_does_what_it_measures_and_where_the_result_is(tmp_path, capsys):
    train(tmp_path)
    said = capsys.readouterr().out
    for part in (
        "41 parameters",
        "7 samples",
        "CPU",
        "float32",
        "0 to 6, epochs in all: 3.43",
        "4 samples a step: 2 x 2",
    ):
        assert part in said
    assert "Validation after step 6: score 6\n" in said and f"Saved to {tmp_path}. Next: " in said


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path):
    train(tmp_path, max_train_steps=4)
    with pytest.raises(ValueError, match=r"`max_train_steps` is 2, .*checkpoint-4 is beyond it"):
        train(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_run_that_diverges_ends_and_keeps_the_last_good_checkpoint(tmp_path, broken):
    with pytest.raises(RuntimeError, match=r"diverged by step 6: .*not finite.*checkpoint-4.*learning_rate"):
        train(tmp_path, diverge=broken, logging_steps=3)
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert not any("train/loss" in line and line["step"] > 4 for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_the_rates_of_a_run_are_logged(tmp_path):
    train(tmp_path)
    line = next(line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line)
    assert line["train/tokens_per_second"] == pytest.approx(3 * line["train/images_per_second"])
    assert line["train/mfu"] > 0 and line["train/peak_memory_gb"] > 0.01 and line["train/grad_norm"] > 0


@pytest.mark.parametrize(
    ("option", "launched", "has_bf16", "expected"),
    [
        (None, None, True, "bf16"),
        (None, "no", True, "bf16"),  # what `accelerate launch` says without a configuration
        (None, "no", False, "no"),
        (None, "bf16", False, "bf16"),
        ("no", "bf16", True, "no"),
    ],
)
def test_bf16_is_the_default_of_gpus_that_have_it(monkeypatch, option, launched, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision(RunArguments(mixed_precision=option)) == expected


def test_a_share_of_the_peak_is_at_most_one(tmp_path):
    class FastRun(SmallRun):
        def __init__(self, *args):
            super().__init__(*args)
            self.peak_flops, self.flops_per_sample = 1e3, 10**9

    train(tmp_path, FastRun)
    shares = [line["train/mfu"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/mfu" in line]
    assert len(shares) == 3 and max(shares) == 1 and min(shares) > 0


def test_trackers_get_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "dnd_hf"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (6, 4, 2)


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(tmp_path / "run", report_to=["wandb"])
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples_6_*.png")
    assert Image.open(picture).size == (4, 2)


def test_trackio_gets_numbers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(tmp_path / "run", report_to=["trackio"])
    with sqlite3.connect(tmp_path / "trackio" / "dnd_hf.db") as database:
        logged = [(step, json.loads(line)) for step, line in database.execute("select step, metrics from metrics")]
    assert [step for step, line in logged if "train/loss" in line] == [2, 4, 6]
    assert [step for step, line in logged if "samples" in line] == [6]
    (picture,) = tmp_path.glob("trackio/media/dnd_hf/*/6/*.png")
    assert Image.open(picture).size == (4, 2)


def test_unfinished_checkpoints_are_never_resumed_from(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.0a.unfinished"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest") == (10, tmp_path / "checkpoint-10")
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")) == (9, tmp_path / "checkpoint-9")
    assert find_checkpoint(tmp_path, None) == find_checkpoint(tmp_path / "nothing", "latest") == (0, None)
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        find_checkpoint(tmp_path, str(tmp_path / ".checkpoint-11.0a.unfinished"))


def test_every_epoch_has_every_item_once_in_an_order_of_its_own():
    stream = TrainingStream(NoisyPoints(), 21, seed=3)
    epochs = [[stream[i]["index"] for i in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_depends_on_the_seed_and_its_place_alone():
    whole = [item["x"] for item in TrainingStream(NoisyPoints(), 20, seed=3)]
    loader = DataLoader(TrainingStream(NoisyPoints(), 20, seed=3, first_sample=8), 4, num_workers=2)
    assert torch.equal(torch.cat([batch["x"] for batch in loader]), torch.stack(whole[8:]))
    assert not torch.equal(whole[0], TrainingStream(NoisyPoints(), 20, seed=4)[0]["x"])


def test_reading_a_sample_leaves_torchs_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TrainingStream(NoisyPoints(), 7, seed=0)[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_items_are_whole_groups_and_nowhere_else():
    rest, held_out = hold_out(range(30), 5, seed=0, group_size=3)
    assert sorted([*rest.indices, *held_out.indices]) == list(range(30)) and len(held_out) == 6
    assert {i // 3 for i in rest.indices}.isdisjoint(i // 3 for i in held_out.indices)
    with pytest.raises(ValueError, match="cannot hold 30"):
        hold_out(range(30), 30, seed=0)


def test_matrices_and_embeddings_decay_and_vectors_and_frozen_parameters_do_not():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    decayed, kept = weight_decay_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert {id(p) for p in kept["params"]} == {id(model[1].bias), id(model[2].weight), id(model[2].bias)}


def test_averaged_weights_keep_the_models_own_buffers_and_give_its_weights_back():
    model = nn.BatchNorm1d(2).train()
    ema = EMAModel(model.parameters(), 0.5)
    with torch.no_grad():
        model.weight.fill_(3)
        model.running_mean.fill_(7)
    with averaged_weights(ema, model):
        assert model.weight.tolist() == [1, 1] and model.running_mean.tolist() == [7, 7] and not model.training
    assert model.weight.tolist() == [3, 3] and model.training


def test_averages_of_bfloat16_weights_are_float32_and_survive_a_checkpoint():
    model = nn.Linear(2, 1, bias=False).bfloat16()
    average = WeightAverage(model.parameters(), 0.999)
    for weight in (2, 4, 8):
        with torch.no_grad():
            model.weight.fill_(weight)
        average.step(model.parameters())
    # EMAModel starts from the first weights; its decay is (1 + n) / (10 + n) n steps later, up to the one asked for.
    by_hand = 2.0
    for decay, weight in ((2 / 11, 4), (3 / 12, 8)):
        by_hand = decay * by_hand + (1 - decay) * weight
    (shadow,) = average.shadow_params
    assert shadow.dtype == torch.float32 and shadow[0, 0].item() == pytest.approx(by_hand, rel=1e-6)
    again = WeightAverage(model.parameters(), 0.999)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.shadow_params[0], shadow) and again.optimization_step == 3


def test_a_new_run_starts_a_new_metrics_file(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for _ in range(2):
        tracker.start()
        tracker.log({"loss": 0.5}, step=1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    plot_training_curves(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_overrides_the_yaml_file(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 3\nlearning_rate: 0.001\nreport_to: [tensorboard]\n")
    args = parse_arguments(RunArguments, ["--config", str(tmp_path / "run.yaml"), "--seed", "4"])
    assert (args.seed, args.learning_rate, args.report_to) == (4, 0.001, ["tensorboard"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_batch_size", "0"], "--train_batch_size must be positive"),
        (["--ema_decay", "1"], "--ema_decay must lie in"),
        (["--seed", "-1"], "--seed must lie in"),
        (["--learning_rate", "0"], "--learning_rate must be positive"),
        (["--report_to", "tensorbored"], "--report_to tensorbored: no such tracker"),
        (["--config", "wrong.yaml"], "unknown options: sead"),
    ],
)
def test_bad_arguments_end_the_program_with_a_message(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("sead: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments(RunArguments, argv)
    assert message in capsys.readouterr().err
