# SPDX-License-Identifier: Apache-2.0
"""What the optimiser is given: the paper's gradient, however it is split or computed (case 78)."""

import pytest
import torch

from klq import KLQTrainer, load_preset
from klq.logging import Clock
from klq_kernels import gae, use_backend

TAU, ALPHA, GAMMA, LAM = 0.3, 0.7, 0.9, 0.8
CONFIG = {"tau": TAU, "alpha": ALPHA, "gamma": GAMMA, "lam": LAM, "max_grad_norm": 0.0}
PROMPTS = [[1, 2, 3], [4], [5, 6], [2, 9], [3], [8, 8, 8], [7], [11, 1]]
RESPONSES = [[5, 6, 15], [7, 8, 9, 10], [15], [4, 4, 15], [1], [2, 3, 4, 5, 6], [], [12, 15]]


def moved(trainer, seed=0):
    """Off the reference, with a value head that says something: nothing is zero by symmetry."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trainer.unwrapped.parameters():
            p.add_(0.05 * torch.randn_like(p))
        trainer.unwrapped.value_head.weight.normal_(std=0.3)
    return trainer


def gradient(trainer, prompts):
    """The gradient of the first optimiser step on scripted responses, by parameter name."""
    batch = trainer.sample([{"prompt": p} for p in prompts], prompts, Clock())
    trainer.measure(batch)
    trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **_: None
    trainer.args.update_epochs = 1
    trainer.learn(batch)
    return {n: p.grad.clone() for n, p in trainer.unwrapped.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_first_gradient_is_ppo_policy_gradient_and_value_part(make_trainer, script, scale):
    """grad L = -2 alpha E[A (tau grad log pi + scale grad V)]; the head itself is never scaled."""
    prompts, responses = PROMPTS[:4], RESPONSES[:4]
    config = {**CONFIG, "value_trunk_grad_scale": scale}
    trainer = moved(make_trainer(engine=script(responses), **config))
    found = gradient(trainer, prompts)

    model, policy_loss, value_loss, count = trainer.unwrapped, 0.0, 0.0, 0
    model.zero_grad()
    for prompt, response in zip(prompts, responses, strict=True):
        tokens, start = torch.tensor([prompt + response]), len(prompt)
        index = torch.tensor(response)[:, None]
        with torch.no_grad():
            reference = trainer.reference.lm(tokens).logits[0, start - 1 : -1]
            reference = reference.log_softmax(-1).gather(1, index).squeeze(1)
        logprobs = model.lm(tokens).logits[0, start - 1 : -1].log_softmax(-1)
        logprobs = logprobs.gather(1, index).squeeze(1)
        hidden = model.lm.base_model(tokens).last_hidden_state[0, start - 1 : -1]
        values = model.value_head(hidden).squeeze(-1)
        rewards = -TAU * (logprobs - reference).detach()
        rewards[-1] += sum(response) / 20
        a = gae(rewards[None], values.detach()[None], gamma=GAMMA, lam=LAM).advantages[0]
        policy_loss, value_loss = (
            policy_loss - (a * logprobs).sum(),
            value_loss - (a * values).sum(),
        )
        count += len(response)
    parameters = dict(model.named_parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    policy = torch.autograd.grad(policy_loss / count, parameters.values(), **options)
    value = torch.autograd.grad(value_loss / count, parameters.values(), **options)
    for name, p, v in zip(parameters, policy, value, strict=True):
        own = 1.0 if name.startswith("value_head") else scale
        want = 2 * ALPHA * TAU * p + 2 * ALPHA * own * v
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
@pytest.mark.parametrize("responses", [RESPONSES, [[5, 6, 15], [7, 8]] + [[]] * 6])
def test_case_78_splits_give_the_same_gradient(make_trainer, script, algorithm, responses):
    """1 x 8, 2 x 4 and 4 x 2, uneven lengths; in the second case micro-batches are empty."""
    grads = []
    for size, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make_trainer(
            engine=script(responses),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            algorithm=algorithm,
            **CONFIG,
        )
        grads.append(gradient(moved(trainer), PROMPTS))
    assert max(float(g.abs().max()) for g in grads[0].values()) > 1e-3
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-4, atol=1e-7, msg=name)


def test_minibatches_partition_the_batch(make_trainer, script, monkeypatch):
    trainer = make_trainer(
        engine=script(RESPONSES), num_mini_batches=2, gradient_accumulation_steps=1, **CONFIG
    )
    seen, rows = [], trainer._passes

    def spy(batch, chosen, extra=0):
        seen.append(sorted(chosen.tolist()))
        return rows(batch, chosen, extra)

    monkeypatch.setattr(trainer, "_passes", spy)
    trainer.step()
    measured, *steps = seen
    assert measured == list(range(8)) and len(steps) == 4  # 2 epochs of 2
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == measured


def test_value_warmup_moves_value_parameters_only(make_trainer):
    for value_model in ("head", "separate"):
        trainer = make_trainer(value_warmup_updates=1, trainer_kwargs={"value_model": value_model})
        model = trainer.unwrapped
        policy = [p.detach().clone() for p in model.policy_parameters()]
        value = [p.detach().clone() for p in model.value_parameters()]
        trainer.step()
        pairs = list(zip(policy, model.policy_parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert any((a != b).any() for a, b in zip(value, model.value_parameters(), strict=True))
        trainer.step()
        assert any((a != b).any() for a, b in pairs)


def test_gradient_norms_of_policy_and_value_are_those_at_the_trunk(make_trainer, script):
    """The two parts, taken apart by switching the other off."""
    runs = {}
    for scale in (1.0, 0.0, 0.5):
        trainer = make_trainer(
            engine=script(RESPONSES[:4]), value_trunk_grad_scale=scale, update_epochs=1, **CONFIG
        )
        _, runs[scale] = moved(trainer).step()
    value = {scale: run["klq/grad_norm_value"] for scale, run in runs.items()}
    assert value[0.0] == 0 and value[0.5] == pytest.approx(0.5 * value[1.0], rel=1e-5)
    policy = [run["klq/grad_norm_policy"] for run in runs.values()]
    assert policy[0] > 0 and policy == pytest.approx([policy[0]] * 3)


def test_loop_agrees_between_reference_and_cpp(tmp_path):
    """20 updates on the exact testbed: every parameter within 1e-5 on both backends."""
    parameters = []
    for backend in ("reference", "cpp"):
        preset = load_preset(
            "exact",
            output_dir=str(tmp_path / backend),
            per_device_train_batch_size=64,
            num_updates=20,
            learning_rate=5e-4,
            use_cpu=True,
            disable_tqdm=True,
        )
        with use_backend(backend):
            trainer = KLQTrainer(args=preset.args, **preset.trainer_kwargs)
            trainer.train()
        parameters.append([p.detach() for p in trainer.unwrapped.parameters()])
    for a, b in zip(*parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
