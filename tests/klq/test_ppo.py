# SPDX-License-Identifier: Apache-2.0
"""The PPO baseline's own pieces, and that it learns in the same loop."""

import pytest
import torch

from klq import KLQTrainer, load_preset
from klq.ppo import whitened
from klq.presets.exact import Truth, joint_logprobs, reward_table


def test_whitening_is_over_active_tokens_and_guards_small_counts():
    a = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, float("nan")]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    out = whitened(a, mask)
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(out[mask], (x - x.mean()) / x.std(), rtol=1e-5, atol=1e-6)
    assert (out[~mask] == 0).all()
    for active in ([[True, False, False], [False] * 3], [[False] * 3] * 2):
        one = torch.tensor(active)
        assert torch.equal(whitened(a, one), torch.where(one, a, 0.0))


def test_first_update_has_ratio_one_and_the_plain_gradient(make_trainer):
    """On the sampling policy nothing is clipped: the approximate KL and clip fraction are 0."""
    _, metrics = make_trainer(algorithm="ppo", update_epochs=1).step()
    assert metrics["policy/clipfrac_avg"] == 0 and metrics["policy/approxkl_avg"] < 1e-10
    assert "klq/residual_rms" not in metrics


def test_clipping_stops_the_gradient_of_a_ratio_that_went_far(make_trainer, script):
    """Old log-probs far below the present ones: a good action gains nothing more."""
    from klq.logging import Clock

    trainer = make_trainer(
        engine=script([[5, 15]]), algorithm="ppo", vf_coef=0.0, update_epochs=1, cliprange=0.2
    )
    batch = trainer.sample([{"prompt": [1]}], [[1]], Clock())
    trainer.measure(batch)
    norms = {}
    for name, sign in (("good", 1.0), ("bad", -1.0)):
        batch.stored["policy_advantages"] = sign * torch.ones(1, 2)
        batch.stored["old_logprobs"] = batch.stored["old_logprobs"] - 1.0
        norms[name] = float(trainer.learn(batch)["grad_norm"])
        batch.stored["old_logprobs"] = batch.stored["old_logprobs"] + 1.0
    assert norms["good"] == 0 and norms["bad"] > 1e-3


@pytest.mark.parametrize("whiten", [True, False])
def test_ppo_learns_on_the_exact_testbed(tmp_path, whiten):
    preset = load_preset(
        "exact",
        output_dir=str(tmp_path),
        algorithm="ppo",
        whiten_advantages=whiten,
        num_updates=12,
        per_device_train_batch_size=128,
        vf_coef=1.0,
        disable_tqdm=True,
        use_cpu=True,
    )
    truth = Truth(joint_logprobs(preset.trainer_kwargs["model"]), reward_table(0), preset.args.tau)
    trainer = KLQTrainer(args=preset.args, **preset.trainer_kwargs)
    for _ in range(12):
        trainer.step()
    assert truth.judge(joint_logprobs(trainer.unwrapped.lm))["gain"] > 0.3
