# SPDX-License-Identifier: Apache-2.0
"""boltzmann_values: limits in tau, skipped terms, shifts."""

import torch
from oracle import everywhere

from klq_kernels import boltzmann_values

places = everywhere("boltzmann_values")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@places
def test_tau_to_0_is_the_max_and_large_tau_the_mean(device, backend):
    q, b = draw(4, 500, device=device), draw(4, 500, seed=1, device=device)
    low = boltzmann_values(q, b, tau=1e-3, backend=backend)
    floor = 1e-3 * b.log_softmax(-1).amin()
    assert (low <= q.amax(-1) + 1e-6).all() and (low >= q.amax(-1) + floor - 1e-6).all()
    high = boltzmann_values(q, b, tau=1e4, backend=backend)
    torch.testing.assert_close(high, (b.softmax(-1) * q).sum(-1), rtol=0, atol=3e-2)


@places
def test_a_constant_adds(device, backend):
    """V(Q + c) = V(Q) + c; Q all equal gives Q."""
    q, b = draw(4, 500, device=device), draw(4, 500, seed=1, device=device)
    base = boltzmann_values(q, b, tau=0.5, backend=backend)
    shifted = boltzmann_values(q + 16, b, tau=0.5, backend=backend)
    torch.testing.assert_close(shifted, base + 16, rtol=0, atol=1e-5)
    flat = boltzmann_values(torch.full_like(q, 2.5), b, tau=0.5, backend=backend)
    torch.testing.assert_close(flat, torch.full_like(flat, 2.5), rtol=1e-6, atol=0)


@places
def test_rule_8_skipped_terms(device, backend):
    """Q = -inf or pi_b = 0 (or both) drop out; with nothing left the value is -inf; +inf wins only
    where pi_b > 0."""
    q, b = draw(5, 9, device=device), draw(5, 9, seed=1, device=device)
    q[0, 1] = b[1, 1] = q[2, 1] = b[2, 1] = -torch.inf
    q[3] = -torch.inf
    q[4, 1], b[4, 1] = torch.inf, -torch.inf
    v = boltzmann_values(q, b, tau=0.5, backend=backend)
    log_b, q64 = b.double().log_softmax(-1), q.double()
    keep = torch.arange(9, device=device) != 1
    want = 0.5 * (log_b[:, keep] + q64[:, keep] / 0.5).logsumexp(-1)
    for row in (0, 1, 2, 4):
        torch.testing.assert_close(v[row].double(), want[row], rtol=1e-5, atol=1e-5)
    assert v[3] == -torch.inf
    q[4, 1], b[4, 1] = torch.inf, 0.0
    assert boltzmann_values(q, b, tau=0.5, backend=backend)[4] == torch.inf


@places
def test_a_reference_that_is_no_distribution_is_nan(device, backend):
    """Also where Q of its bad entry is -inf, another's is inf, or no term is left; but not where
    all Q are -inf."""
    inf, nan = torch.inf, torch.nan
    q = torch.tensor([[-inf, -0.1, 0], [inf, -inf, 0], [-inf, 1, -inf], [-inf] * 3], device=device)
    b = torch.tensor([[inf, -20.0, 0], [5, nan, 0], [inf, -inf, -2], [nan] * 3], device=device)
    v = boltzmann_values(q, b, tau=0.5, backend=backend)
    assert v[:3].isnan().all() and v[3] == -inf
