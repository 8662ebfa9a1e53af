# SPDX-License-Identifier: Apache-2.0
"""From a rollout to advantages: where scores land, ends, gaps, empty responses (cases 77, 82)."""

import pytest
import torch

from klq_kernels import gae

TAU = 0.3


def measured(trainer, prompts):
    """One measurement of scripted responses; returns batch, values at every state, log-ratios."""
    from klq.logging import Clock

    rows = [{"prompt": p} for p in prompts]
    batch = trainer.sample(rows, prompts, Clock())
    sums = trainer.measure(batch)
    return batch, trainer._sum(sums)


def with_value(trainer, seed=0):
    """Give the fresh value head something to say, and move the policy off its reference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trainer.unwrapped.value_head.parameters():
            p.normal_(std=0.5)
        trainer.unwrapped.lm.get_output_embeddings().weight.add_(
            0.1 * torch.randn_like(trainer.unwrapped.lm.get_output_embeddings().weight)
        )
    return trainer


def plain(trainer, prompt, response):
    """Values of the states before each response token and after the last; log-ratios."""
    tokens = torch.tensor([prompt + response])
    start = len(prompt)
    with torch.no_grad():
        hidden = trainer.unwrapped.lm.base_model(tokens).last_hidden_state[0, start - 1 :]
        values = trainer.unwrapped.value_head(hidden).squeeze(-1)
        logprobs = [
            model.lm(tokens).logits[0, start - 1 : -1].log_softmax(-1)
            for model in (trainer.unwrapped, trainer.reference)
        ]
    index = torch.tensor(response)[:, None]
    policy, reference = (x.gather(1, index).squeeze(1) for x in logprobs)
    return values, policy - reference


def expected(trainer, prompt, response, score, bootstrap, keep=None):
    """GAE of rewards - tau * rho over the kept tokens of one response."""
    values, rho = plain(trainer, prompt, response)
    keep = torch.tensor(keep if keep is not None else [True] * len(response))
    rewards = torch.zeros(int(keep.sum()))
    rewards[-1] = score
    rewards -= TAU * rho[keep]
    v = values[:-1][keep]
    end = values[-1:] * bootstrap
    out = gae(rewards[None], v[None], gamma=0.9, lam=0.8, bootstrap=end)
    return out.advantages[0]


CONFIG = {"tau": TAU, "gamma": 0.9, "lam": 0.8}
PROMPTS = [[1, 2, 3], [4]]
RESPONSES = [[5, 6, 15], [7, 8, 9, 10]]


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_case_77_score_lands_on_eos_and_on_the_last_token_of_a_cut_response(
    make_trainer, script, algorithm
):
    engine = script(RESPONSES, ["stop", "length"])
    trainer = with_value(make_trainer(engine=engine, algorithm=algorithm, **CONFIG))
    batch, sums = measured(trainer, PROMPTS)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        want = expected(trainer, prompt, response, sum(response) / 20, bootstrap=0.0)
        found = batch.stored["advantages"][row]
        torch.testing.assert_close(found[: len(response)], want, rtol=1e-5, atol=1e-5)
        assert (found[len(response) :] == 0).all()
    assert sums["truncated"] == 1 and sums["tokens"] == 7


def test_case_77_cut_response_bootstraps_and_gives_up_its_score(make_trainer, script):
    engine = script(RESPONSES, ["stop", "length"])
    trainer = with_value(make_trainer(engine=engine, truncation="bootstrap", **CONFIG))
    batch, _ = measured(trainer, PROMPTS)
    ends = [(sum(RESPONSES[0]) / 20, 0.0), (0.0, 1.0)]  # a score or V(s_T), never both
    for row, (score, bootstrap) in enumerate(ends):
        want = expected(trainer, PROMPTS[row], RESPONSES[row], score, bootstrap)
        found = batch.stored["advantages"][row, : len(RESPONSES[row])]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_case_77_missing_eos_penalty_is_paid_by_cut_responses_only(make_trainer, script):
    engine = script(RESPONSES, ["stop", "length"])
    trainer = make_trainer(engine=engine, missing_eos_penalty=2.0)
    batch, _ = measured(trainer, PROMPTS)
    assert batch.scores == pytest.approx([26 / 20, 34 / 20 - 2.0])


def test_two_turn_tool_dialogue(make_trainer, script):
    """The policy speaks, a tool answers, the policy speaks again: the tool's tokens do not exist.

    Values and log-probs see them as context; credit crosses them as one step; the score lands on
    the policy's last token although the dialogue may end with the tool's.
    """
    response = [5, 6, 12, 13, 11, 7, 15, 12]
    mask = [True, True, False, False, False, True, True, False]
    engine = script([response], masks=[mask])
    config = {"max_completion_length": 8, "per_device_train_batch_size": 1, **CONFIG}
    trainer = with_value(make_trainer(engine=engine, **config))
    batch, sums = measured(trainer, [[1, 2]])
    want = expected(trainer, [1, 2], response, sum(response) / 20, 0.0, keep=mask)
    found, on = batch.stored["advantages"][0], torch.tensor(mask)
    torch.testing.assert_close(found[on], want, rtol=1e-5, atol=1e-5)
    assert (found[~on] == 0).all() and sums["tokens"] == 4

    before = [p.clone() for p in trainer.unwrapped.parameters()]
    _, metrics = trainer.step()
    assert metrics["completions/mean_length"] == 4
    assert any((a != b).any() for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


def test_dialogue_longer_than_the_model_is_an_error_before_any_model_sees_it(
    make_trainer, script, tmp_path
):
    """Each turn of the policy keeps max_completion_length; the tool's answer breaks the limit."""
    response = [5, 6, *[12] * 26, 7, 15]
    mask = [True] * 2 + [False] * 26 + [True] * 2
    engine = script([[5, 15], response, [7, 15], response], masks=[[1, 1], mask, [1, 1], mask])
    fits = [[1], [1, 2], [3], [4, 5]]
    trainer = make_trainer(engine=engine, prompts=fits, max_completion_length=2)
    batch, sums = measured(trainer, fits)  # 2 + 30 tokens: exactly the model's 32 positions
    assert batch.tokens.shape == (4, 32) and sums["tokens"] == 12

    seen = []
    for model in (trainer.unwrapped, trainer.reference):
        model.register_forward_pre_hook(lambda *_: seen.append(1))
    trainer.rewards = lambda *_: seen.append(1)
    message = (
        r"rollout 1: a prompt of 3 and a response of 30 tokens .*tool.* do not fit the model's 32 "
        r"positions; .* cut tool results"
    )
    with pytest.raises(ValueError, match=message):
        measured(trainer, [[1], [1, 2, 3], [3], [4, 5]])
    assert not seen


def test_tool_tokens_have_no_gradient(make_trainer, script):
    """Whatever the log-prob of a tool's token does, the loss does not notice."""
    grads = []
    for advantage in (0.0, 1e6):
        mask = [True, False, True]
        trainer = with_value(make_trainer(engine=script([[5, 6, 15]], masks=[mask])))
        batch, _ = measured(trainer, [[1, 2]])
        batch.stored["advantages"][0, 1] = advantage
        batch.stored["old_logprobs"][0, 1] = float("nan") if advantage else 0.0
        trainer.optimizer.step = lambda: None
        trainer.optimizer.zero_grad = lambda **_: None
        trainer.args.update_epochs = 1
        trainer.learn(batch)
        grads.append([p.grad.clone() for p in trainer.unwrapped.policy_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_case_82_completion_of_length_0(make_trainer, script):
    engine = script([[], [5, 15], [], []])
    trainer = with_value(make_trainer(engine=engine, truncation="bootstrap", **CONFIG))
    _, metrics = trainer.step()
    assert metrics["completions/mean_length"] == 0.5
    nothing = with_value(make_trainer(engine=script([[]] * 4), **CONFIG))
    before = [p.clone() for p in nothing.unwrapped.parameters()]
    nothing.step()
    after = nothing.unwrapped.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_log_ratio_of_the_untouched_policy_is_exactly_zero(make_trainer):
    _, metrics = make_trainer().step()
    assert metrics["objective/kl"] == 0.0


def test_engine_log_probs_are_compared_and_not_trained_on(make_trainer, script):
    responses = [[5, 15]] * 4
    plain_run = make_trainer(engine=script(responses))
    theirs = make_trainer(engine=script(responses, logprobs=[[-1.0, -2.0]] * 4))
    (batch, _), (_, metrics) = plain_run.step(), theirs.step()
    gap = (torch.tensor([-1.0, -2.0]) - batch.stored["old_logprobs"][:, :2]).abs().mean()
    assert metrics["rollout/logprob_gap"] == pytest.approx(float(gap), rel=1e-5)
    for a, b in zip(plain_run.unwrapped.parameters(), theirs.unwrapped.parameters(), strict=True):
        assert torch.equal(a, b)
