# SPDX-License-Identifier: Apache-2.0
"""Fused kernels against eager PyTorch on the CPU, in one process: `make bench`.

The eager side is the shortest code people write, not our references, which also handle masks, bans
and bad ids. Read the `Min` column: on shared machines the minimum of the rounds is what repeats.
"""

import pytest
import torch

import klq_kernels as klq

ROWS = 512, 50304  # tokens, vocabulary


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def batch(request):
    torch.manual_seed(0)
    n, v = ROWS
    return {
        "logits": torch.randn(n, v).to(request.param).requires_grad_(),
        "actions": torch.randint(v, (n,)),
        "values": torch.randn(n, requires_grad=True),
        "ref_logprobs": -torch.rand(n) - 1,
        "returns": torch.randn(n),
    }


def eager_logprobs(logits, actions):
    return torch.log_softmax(logits.float(), -1).gather(-1, actions[:, None]).squeeze(-1)


def eager_loss(logits, actions, values, ref_logprobs, returns, tau):
    q = tau * (eager_logprobs(logits, actions) - ref_logprobs) + values
    return (q - returns).square().mean()


def klq_loss(*, tau, **batch):
    return klq.klq_loss(**batch, tau=tau).loss


@pytest.mark.parametrize("side", [eager_logprobs, klq.token_logprobs], ids=["eager", "klq"])
def test_token_logprobs(benchmark, batch, side):
    logits, actions = batch["logits"].detach(), batch["actions"]
    benchmark.group = f"token_logprobs forward, {ROWS}, {logits.dtype}"
    result = benchmark.pedantic(side, (logits, actions), rounds=15, warmup_rounds=2)
    truth = eager_logprobs(logits.double(), actions)
    assert (result - truth).abs().max() < 1e-5


@pytest.mark.parametrize("side", [eager_loss, klq_loss], ids=["eager", "klq"])
def test_klq_loss(benchmark, batch, side):
    benchmark.group = f"klq_loss forward + backward, {ROWS}, {batch['logits'].dtype}"

    def step():
        batch["logits"].grad = batch["values"].grad = None
        loss = side(**batch, tau=0.05)
        loss.backward()
        return loss

    loss = benchmark.pedantic(step, rounds=9, warmup_rounds=2)
    truth = eager_loss(
        **{k: x.double() for k, x in batch.items() if x.is_floating_point()}
        | {"actions": batch["actions"]},
        tau=0.05,
    )
    assert abs(loss.item() - truth.item()) < 1e-5


def eager_returns(log_ratios, values, rewards, mask, tau, gamma=1.0, lam=0.95):
    """The loop over time that trainers run: inactive tokens pass value and advantage on."""
    q = tau * log_ratios + values
    after, advantage, advantages = torch.zeros(len(q)), torch.zeros(len(q)), []
    for t in reversed(range(q.shape[1])):
        delta = rewards[:, t] + gamma * after - q[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        after = torch.where(mask[:, t], values[:, t], after)
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], 1)
    return [torch.where(mask, x, 0.0) for x in (q, advantages, q + advantages)]


def klq_returns(log_ratios, values, rewards, mask, tau):
    return klq.lambda_returns(log_ratios, values, rewards, tau=tau, mask=mask)


@pytest.mark.parametrize("side", [eager_returns, klq_returns], ids=["eager", "klq"])
def test_lambda_returns(benchmark, side):
    torch.manual_seed(0)
    inputs = *torch.randn(3, 64, 1024), torch.rand(64, 1024) < 0.9
    benchmark.group = "lambda_returns, (64, 1024), float32, 10 % masked"
    result = benchmark.pedantic(
        side,
        inputs,
        {"tau": 0.05},
        rounds=15 if side is eager_returns else 300,
        warmup_rounds=3,
    )
    truth = eager_returns(*(x.double() for x in inputs[:3]), inputs[3], tau=0.05)
    for ours, exact in zip(result, truth, strict=True):
        assert (ours - exact).abs().max() < 1e-4
