# SPDX-License-Identifier: Apache-2.0
"""Accelerate around the loop: trackers, and an environment that must not change the numbers."""

import pytest
import torch
from accelerate.tracking import GeneralTracker


class Tracker(GeneralTracker):
    """As strict about parameters as tensorboard's."""

    name, requires_logging_directory, main_process_only = "strict", False, True

    def __init__(self):
        super().__init__()
        self.settings, self.steps, self.finished = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        bad = {k: v for k, v in values.items() if not isinstance(v, (bool, int, float, str))}
        assert not bad
        self.settings = values

    def log(self, values, step=None, **_):
        self.steps.append(step)

    def finish(self):
        self.finished = True


def test_trackers_get_numbers_and_text_only(make_trainer):
    trainer, tracker = make_trainer(generation_kwargs={"top_k": 5}, reward_weights=[0.5]), Tracker()
    trainer.args.report_to = ["strict"]
    trainer.accelerator.log_with = [tracker]
    trainer.train()
    assert tracker.settings["reward_weights"] == "[0.5]" and tracker.settings["tau"] == 0.05
    assert tracker.settings["max_prompt_length"] == "None" and tracker.settings["use_cpu"] is True
    assert tracker.steps == [1, 2, 3] and tracker.finished


def test_tensorboard_takes_the_configuration(make_trainer, tmp_path):
    pytest.importorskip("tensorboard")
    make_trainer(report_to=["tensorboard"], num_updates=1).train()
    assert list((tmp_path / "run").rglob("*tfevents*"))


def test_launcher_environment_does_not_scale_the_gradient(make_trainer, script, monkeypatch):
    def stepped():
        trainer = make_trainer(engine=script([[5, 15]] * 4), update_epochs=1)
        _, metrics = trainer.step()
        return metrics["grad_norm"], torch.cat([p.flatten() for p in trainer.policy.parameters()])

    plain = stepped()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    launched = stepped()
    assert plain[0] == launched[0] and torch.equal(plain[1], launched[1])
