# SPDX-License-Identifier: Apache-2.0
"""gae against the loop every PPO trainer has, and against lambda_returns."""

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import gae, lambda_returns

places = everywhere("gae", "lambda_returns")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def trainer_loop(rewards, values, gamma, lam, last):
    """The loop of the PPO trainers, in float64, without masks."""
    r, v = rewards.double(), values.double()
    running, out = torch.zeros_like(v[:, 0]), []
    for t in reversed(range(v.shape[1])):
        v_next = v[:, t + 1] if t + 1 < v.shape[1] else last.double()
        running = r[:, t] + gamma * v_next - v[:, t] + gamma * lam * running
        out.append(running)
    return torch.stack(out[::-1], 1)


@places
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.5, 0.5), (0.0, 0.95), (1.0, 0.0)]
)
def test_the_trainers_loop(device, backend, gamma, lam):
    r, v, last = draw(5, 33, device=device), draw(5, 33, seed=1, device=device), draw(5, seed=2)
    last = last.to(device)
    out = gae(r, v, gamma=gamma, lam=lam, bootstrap=last, backend=backend)
    want = trainer_loop(r, v, gamma, lam, last)
    torch.testing.assert_close(out.advantages.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out.returns.double(), want + v.double(), rtol=1e-5, atol=2e-6)


@places
def test_case_14_gae_is_the_scan_with_q_equal_v(device, backend):
    """Each public variant is launched under its own name: at tau = 0 both give the same numbers."""
    r, v, boot = draw(6, 40, device=device), draw(6, 40, seed=1, device=device), draw(6, seed=2)
    mask = draw(6, 40, seed=3, device=device) < 0.4
    how = {
        "gamma": 0.97,
        "lam": 0.9,
        "mask": mask,
        "bootstrap": boot.to(device),
        "backend": backend,
    }
    ours = gae(r, v, **how)
    scan = lambda_returns(torch.zeros_like(v), v, r, tau=0.0, alpha=1.0, **how)
    torch.testing.assert_close(ours.advantages, scan.advantages, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.returns, scan.returns, rtol=1e-6, atol=1e-6)
    assert same_bits(scan.q, torch.where(mask, v, 0.0))


@places
def test_telescoping_at_lam_1(device, backend):
    """gamma = lam = 1: A + V is the reward still to come plus the bootstrap, once."""
    r, v, boot = draw(3, 20, device=device), draw(3, 20, seed=1, device=device), draw(3, seed=2)
    boot = boot.to(device)
    out = gae(r, v, gamma=1.0, lam=1.0, bootstrap=boot, backend=backend)
    to_come = r.flip(1).cumsum(1).flip(1) + boot[:, None]
    torch.testing.assert_close(out.returns, to_come, rtol=1e-5, atol=1e-5)
