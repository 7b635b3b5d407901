"""Proves that transformers' Trainer trains the model, predicts with it, and resumes it exactly."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from dnd_hf import DnDForImageGeneration


@pytest.fixture
def make_trainer(make_config, make_inputs, tmp_path):
    """A function that makes a Trainer of a tiny new model with dropout; keywords go to TrainingArguments."""

    def make(**options) -> Trainer:
        torch.manual_seed(0)
        model = DnDForImageGeneration(make_config(residual_dropout=0.2))
        labels, codes = make_inputs(model, batch=16)
        dataset = [dict(class_labels=label, codes=code, labels=code) for label, code in zip(labels, codes)]
        settings = dict(
            output_dir=str(tmp_path / "trained"),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=2,
        )
        arguments = TrainingArguments(**{**settings, **options})
        return Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)

    return make


def test_trainer_lowers_the_loss_and_predicts_logits_alone(make_trainer):
    trainer = make_trainer(max_steps=4)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.train().global_step == 4
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_loss"] == trainer.evaluate()["eval_loss"] < before
    assert predicted.predictions.shape == (16, 6, 2, 11)  # not the losses of each depth beside them


@pytest.mark.parametrize("precision", [dict(), dict(bf16=True), dict(bf16=True, gradient_checkpointing=True)])
def test_a_resumed_trainer_ends_with_the_weights_of_one_that_ran_through(precision, make_trainer, tmp_path):
    through = make_trainer(max_steps=4, output_dir=str(tmp_path / "through"), **precision)
    through.train()
    make_trainer(max_steps=2, **precision).train()
    resumed = make_trainer(max_steps=4, **precision)
    resumed.train(resume_from_checkpoint=True)
    new = make_trainer(max_steps=1).model
    for parameter, expected, initial in zip(
        resumed.model.parameters(), through.model.parameters(), new.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected) and not torch.equal(parameter, initial)
    saved = DnDForImageGeneration.from_pretrained(tmp_path / "trained" / "checkpoint-4")
    assert torch.equal(saved.generate([0, 1], do_sample=False), resumed.model.generate([0, 1], do_sample=False))
