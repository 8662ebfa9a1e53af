# SPDX-License-Identifier: Apache-2.0
"""The identities of the specification as oracles: where the kernels and the paper must meet.

Each is solved or summed from its own definition; no kernel checks itself.
"""

import pytest
import torch
from oracle import everywhere

from klq_kernels import (
    boltzmann_values,
    gae,
    klq_loss,
    lambda_returns,
    q_values,
    token_logprobs,
    token_stats,
)

everything = everywhere("lambda_returns", "gae", "klq_loss", "q_values", "boltzmann_values")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def sequence(n, device):
    return [draw(n, seed=s, device=device) for s in range(3)]


@everything
@pytest.mark.parametrize(
    ("gamma", "lam", "boot"), [(0.9, 0.8, 0.0), (1.0, 0.95, 1.5), (0.5, 1.0, 2.0)]
)
def test_g_is_the_mixture_of_n_step_returns(device, backend, gamma, lam, boot):
    """alpha = 1: weights (1 - lam) lam^{n-1}, the last lam^{N-1}; g_n = r_{t+1} + sum_{k<n} gamma^k
    (r_{t+k+1} - tau rho_{t+k}) + gamma^n V(s_{t+n})."""
    length, tau = 9, 0.3
    rho, v, r = sequence(length, device)
    out = lambda_returns(
        *(rho, v, r), tau=tau, gamma=gamma, lam=lam, backend=backend,
        bootstrap=torch.tensor(boot, device=device),
    )  # fmt: skip
    p, u, w = rho.tolist(), [*v.tolist(), boot], r.tolist()
    for t in range(length):
        steps = length - t
        total = 0.0
        for n in range(1, steps + 1):
            g = w[t] + sum(gamma**k * (w[t + k] - tau * p[t + k]) for k in range(1, n))
            g += gamma**n * u[t + n]
            total += g * (lam ** (steps - 1) if n == steps else (1 - lam) * lam ** (n - 1))
        assert abs(float(out.returns[t]) - total) < 2e-6 * (1 + abs(total))


@everything
def test_case_34_advantages_are_gae_on_kl_penalised_rewards(device, backend):
    """Rule 4: with r - tau rho as rewards GAE gives the same A; KL is counted once."""
    rho, v, r = (x.view(4, 10) for x in sequence(40, device))
    mask = draw(4, 10, seed=7, device=device) < 0.5
    boot = draw(4, seed=8, device=device)
    how = {"gamma": 0.97, "lam": 0.9, "mask": mask, "bootstrap": boot, "backend": backend}
    ours = lambda_returns(rho, v, r, tau=0.3, **how)
    theirs = gae(r - 0.3 * rho, v, **how)
    torch.testing.assert_close(ours.advantages, theirs.advantages, rtol=1e-5, atol=2e-6)
    wrong = lambda_returns(rho, v, r - 0.3 * rho, tau=0.3, **how)
    assert (wrong.advantages - theirs.advantages).abs().max() > 1e-2


@everything
@pytest.mark.parametrize("tau", [0.05, 1.0, 10.0])
def test_boltzmann_value_of_q_is_v_and_its_policy_is_pi(device, backend, tau):
    """Both exactly: tau log sum pi_b e^{Q/tau} = V and pi_b e^{(Q - V)/tau} = pi."""
    logits, ref = draw(6, 53, seed=1, device=device), draw(6, 53, seed=2, device=device)
    v = draw(6, seed=3, device=device)
    scaling = {"temperature": 0.7, "logit_softcap": 5.0, "backend": backend}
    q = q_values(logits, ref, v, tau=tau, **scaling)
    value = boltzmann_values(q, ref, tau=tau, **scaling)
    torch.testing.assert_close(value, v, rtol=1e-6, atol=4e-6 * max(1.0, tau))

    def log_softmax(z):
        return torch.log_softmax(5.0 * torch.tanh(z.double() / 5.0) / 0.7, -1)

    policy = log_softmax(ref) + (q.double() - v.double()[:, None]) / tau
    torch.testing.assert_close(policy.exp(), log_softmax(logits).exp(), rtol=5e-5, atol=1e-7)


@everything
def test_kl_of_the_stats_is_the_mean_log_ratio(device, backend):
    """KL(pi || pi_b) = E_pi[Q - V] / tau for the Q of (13)."""
    logits, ref = draw(5, 31, seed=1, device=device), draw(5, 31, seed=2, device=device)
    v = draw(5, seed=3, device=device)
    q = q_values(logits, ref, v, tau=0.4, backend=backend)
    pi = logits.softmax(-1)
    mean = (pi * (q - v[:, None])).sum(-1) / 0.4
    actions = torch.zeros(5, dtype=torch.long, device=device)
    stats = token_stats(logits, actions, ref_logits=ref, backend=backend)
    torch.testing.assert_close(stats.kl, mean, rtol=1e-5, atol=1e-5)


@everything
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_proposition_4_1(device, backend, alpha):
    """Tabular, on-policy: the minimiser of (6) is pi_{k+1} ~ pi_k^{1-alpha} pi_b^alpha
    e^{alpha A' / tau} with V_{k+1} = V_k + alpha max_pi {E_pi[A'] - tau KL(pi, pi_b)
    - beta KL(pi, pi_k)}, and that pi is the maximiser at beta = tau (1 - alpha) / alpha (18).

    Minimises the loss itself, in float64 by Gauss-Newton, over every (state, action) pair weighted
    with its on-policy probability; advantages come from `lambda_returns` on one-step episodes.
    """
    states, actions, tau = 3, 4, 0.5
    float64 = backend not in ("triton", "cuda")
    how = {"backend": backend if float64 else "reference"}  # the oracle is in float64
    z_k, z_b = (draw(states, actions, seed=s, device=device).double() for s in (1, 2))
    v_k, reward = draw(states, seed=3).double(), draw(states, actions, seed=4).double()
    v_k, reward = v_k.to(device), reward.to(device)
    log_k, log_b = z_k.log_softmax(-1), z_b.log_softmax(-1)
    flat_a = torch.arange(actions, device=device).repeat(states)
    rho = (log_k - log_b).reshape(-1, 1)
    v_rows = v_k.repeat_interleave(actions)
    target = lambda_returns(
        rho, v_rows[:, None], reward.reshape(-1, 1), tau=tau, alpha=alpha, **how
    )
    advantage = target.advantages.view(states, actions)  # one step: E[A | s, a] is A itself
    returns = target.returns.view(-1)

    def loss(x):
        z = torch.cat([x[:, : actions - 1], torch.zeros_like(x[:, :1])], -1)  # the gauge z_last = 0
        rows = z.repeat_interleave(actions, 0)
        return klq_loss(
            *(rows, flat_a, x[:, -1].repeat_interleave(actions)),
            ref_logprobs=log_b.reshape(-1), returns=returns, tau=tau, normalizer=1.0,
            weights=log_k.exp().reshape(-1), **how,
        ).loss  # fmt: skip

    x = torch.cat([z_k[:, :-1] - z_k[:, -1:], v_k[:, None]], -1)

    def residual(x):
        z = torch.cat([x[:, : actions - 1], torch.zeros_like(x[:, :1])], -1)
        q = tau * (z.log_softmax(-1) - log_b) + x[:, -1:]
        return (log_k.exp().sqrt() * (q - returns.view(states, actions))).reshape(-1)

    for _ in range(30):  # Gauss-Newton to the minimum
        jacobian = torch.autograd.functional.jacobian(residual, x).reshape(-1, x.numel())
        step = torch.linalg.lstsq(jacobian, residual(x)[:, None]).solution.view_as(x)
        x = x - step
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.abs().max() < 1e-9  # the kernel agrees that this is the minimum
    x = x.detach()
    log_pi = torch.cat([x[:, :-1], torch.zeros_like(x[:, :1])], -1).log_softmax(-1)

    a_prime = advantage + tau * (log_k - log_b)
    closed = (1 - alpha) * log_k + alpha * log_b + alpha * a_prime / tau
    torch.testing.assert_close(log_pi, closed.log_softmax(-1), rtol=0, atol=1e-8)

    beta = tau * (1 - alpha) / alpha

    def objective(log_p):
        p = log_p.exp()
        kl_b, kl_k = (p * (log_p - log_b)).sum(-1), (p * (log_p - log_k)).sum(-1)
        return (p * a_prime).sum(-1) - tau * kl_b - beta * kl_k

    best = objective(log_pi)
    torch.testing.assert_close(x[:, -1], v_k + alpha * best, rtol=0, atol=1e-8)
    for seed in range(20):  # no other policy does better
        other = log_pi + 0.3 * draw(states, actions, seed=seed, device=device).double()
        assert (objective(other.log_softmax(-1)) < best).all()


@everything
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_first_update_is_the_scaled_ppo_gradient(device, backend, alpha):
    """From theta_k: grad L = -2 alpha E[A (tau grad log pi + grad V)]; the policy's part is
    2 alpha tau times the policy gradient of PPO with GAE on r - tau rho."""
    tau, v_size = 0.3, 19
    logits = draw(3, 8, v_size, seed=1, device=device)
    ref = draw(3, 8, seed=2, device=device) - 3.0
    actions = torch.arange(24, device=device).view(3, 8) % v_size
    values, r = draw(3, 8, seed=3, device=device), draw(3, 8, seed=4, device=device)
    mask = draw(3, 8, seed=5, device=device) < 0.8
    how = {"mask": mask, "backend": backend}
    rho = token_logprobs(logits, actions, **how) - torch.where(mask, ref, 0.0)
    targets = lambda_returns(rho, values, r, tau=tau, gamma=0.97, lam=0.9, alpha=alpha, **how)

    z, v = logits.clone().requires_grad_(), values.clone().requires_grad_()
    loss = klq_loss(z, actions, v, ref_logprobs=ref, returns=targets.returns, tau=tau, **how).loss
    dz, dv = torch.autograd.grad(loss, (z, v))

    a = gae(r - tau * rho, values, gamma=0.97, lam=0.9, **how).advantages
    count = mask.sum()
    y = logits.clone().requires_grad_()
    log_pi = y.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
    ratio = (log_pi - log_pi.detach()).exp()
    ppo = -torch.where(mask, a * ratio, 0.0).sum() / count  # the clipped objective at ratio 1
    (dy,) = torch.autograd.grad(ppo, y)
    torch.testing.assert_close(dz, 2 * alpha * tau * dy, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        dv, -2 * alpha * torch.where(mask, a, 0.0) / count, rtol=1e-4, atol=1e-7
    )


@everything
def test_residual_form_equals_the_direct_form(device, backend):
    """ref_logprobs=old_logprobs, returns=old_values + alpha A: tau (log pi - log pi_old) + V
    - V_old - alpha A is Q - G."""
    tau, alpha = 0.3, 0.6
    old, new = draw(2, 6, 17, seed=1, device=device), draw(2, 6, 17, seed=2, device=device)
    ref_lp = draw(2, 6, seed=3, device=device) - 3
    old_v, new_v, r = (draw(2, 6, seed=s, device=device) for s in (4, 5, 6))
    actions = torch.arange(12, device=device).view(2, 6)
    how = {"backend": backend}
    old_lp = token_logprobs(old, actions, **how)
    t = lambda_returns(old_lp - ref_lp, old_v, r, tau=tau, alpha=alpha, **how)
    results = []
    for reference, returns in ((ref_lp, t.returns), (old_lp, old_v + alpha * t.advantages)):
        z, v = new.clone().requires_grad_(), new_v.clone().requires_grad_()
        loss = klq_loss(z, actions, v, ref_logprobs=reference, returns=returns, tau=tau, **how).loss
        results.append((loss, *torch.autograd.grad(loss, (z, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
