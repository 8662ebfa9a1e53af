# SPDX-License-Identifier: Apache-2.0
"""The exact testbed: its enumeration against literal sums, and the learning it exists to judge."""

import itertools
import json
import math

import pytest
import torch

from klq.cli import main
from klq.presets.exact import LENGTH, VOCAB, Truth, joint_logprobs, reward_table, tiny_model


@pytest.fixture(scope="module")
def truth():
    return Truth(joint_logprobs(tiny_model(0)), reward_table(0), 0.05)


def test_joint_log_probs_are_those_of_the_model(truth):
    model, generator = tiny_model(0), torch.Generator().manual_seed(0)
    completions = torch.randint(VOCAB, (50, LENGTH), generator=generator)
    tokens = torch.cat([torch.zeros(50, 1, dtype=torch.long), completions], dim=1)
    with torch.no_grad():
        logprobs = model(tokens[:, :-1]).logits.double().log_softmax(-1)
    literal = logprobs.gather(2, completions[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(truth.ref[tuple(completions.T)], literal, rtol=0, atol=1e-5)
    assert float(truth.ref.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_optimum_is_the_literal_boltzmann_policy(truth):
    ref, reward = truth.ref.exp().flatten().tolist(), truth.reward.flatten().tolist()
    literal = 0.05 * math.log(sum(p * math.exp(r / 0.05) for p, r in zip(ref, reward, strict=True)))
    assert truth.best == pytest.approx(literal, abs=1e-9)
    judged = truth.judge(truth.optimum)
    assert judged["J"] == pytest.approx(truth.best, abs=1e-9)
    assert judged["gain"] == pytest.approx(1, abs=1e-9)
    assert judged["kl_to_optimum"] == pytest.approx(0, abs=1e-9)
    start = truth.judge(truth.ref)
    assert start["gain"] == 0 and start["kl"] == 0
    assert start["kl_to_optimum"] * 0.05 == pytest.approx(truth.best - start["J"], abs=1e-9)


def test_optimal_values_satisfy_the_soft_bellman_equation(truth):
    """V*(s) = tau log E_ref[exp(V*(s') / tau) | s], and exp(R / tau) after the last token."""
    values = truth.values().reshape([VOCAB] * 3 + [LENGTH])
    assert float(values[0, 0, 0, 0]) == pytest.approx(truth.best, abs=1e-9)
    ref = truth.ref.exp()
    for a, b in itertools.product((0, 5), (3, 11)):
        given = ref[a, b].sum(-1) / ref[a, b].sum()
        after = 0.05 * float((given * (values[a, b, :, 3] / 0.05).exp()).sum().log())
        assert float(values[a, b, 0, 2]) == pytest.approx(after, abs=1e-9)
        last = ref[a, b, 7] / ref[a, b, 7].sum()
        end = 0.05 * float((last * (truth.reward[a, b, 7] / 0.05).exp()).sum().log())
        assert float(values[a, b, 7, 3]) == pytest.approx(end, abs=1e-9)


def test_preset_makes_95_percent_of_the_possible_gain(tmp_path, capsys):
    """The command a newcomer runs first. Measured: .972 in 30 s on one core (seed 0)."""
    out = tmp_path / "run"
    command = ["train", "--preset", "exact", "--output_dir", str(out), "--disable_tqdm"]
    assert main([*command, "--use_cpu"]) == 0
    report, printed = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    assert report["gain"] >= 0.95
    assert f"{report['J_star']:.4f}" in printed and f"{report['trained']['J']:.4f}" in printed
    assert "curves.png" in printed and "checkpoint-000200" in printed
    assert (out / "curves.png").stat().st_size > 10_000


def test_second_trunk_learns_as_well(tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--preset", "exact", "--num_updates", "30", "--value_model", "separate",
                 "--output_dir", str(out), "--disable_tqdm", "--use_cpu"]) == 0  # fmt: skip
    assert json.loads((out / "report.json").read_text())["gain"] > 0.85
