# SPDX-License-Identifier: Apache-2.0
"""q_values: eq. (13) over the whole vocabulary, and banned tokens."""

import torch
from oracle import everywhere, same_bits

from klq_kernels import q_values, token_log_ratios

places = everywhere("q_values")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@places
def test_rule_8_banned_tokens(device, backend):
    """-inf where pi = 0, also where pi_b = 0 too; +inf where only pi_b = 0."""
    z, b, v = draw(3, 7, device=device), draw(3, 7, seed=1, device=device), draw(3, device=device)
    z[0, 2] = z[1, 2] = b[1, 2] = b[2, 2] = -torch.inf
    q = q_values(z, b, v, tau=0.5, backend=backend)
    assert q[0, 2] == q[1, 2] == -torch.inf and q[2, 2] == torch.inf
    others = torch.arange(7, device=device) != 2
    assert q[:, others].isfinite().all()


@places
def test_at_tau_0_q_is_v(device, backend):
    z, b, v = draw(3, 7, device=device), draw(3, 7, seed=1, device=device), draw(3, device=device)
    assert torch.equal(q_values(z, b, v, tau=0.0, backend=backend), v[:, None].expand(3, 7))


@places
def test_the_chosen_column_is_tau_rho_plus_v(device, backend):
    z, b, v = draw(5, 1500, device=device), draw(5, 1500, seed=1, device=device), draw(5)
    v = v.to(device)
    a = torch.arange(5, device=device) * 300
    q = q_values(z, b, v, tau=0.5, backend=backend)
    want = 0.5 * token_log_ratios(z, b, a, backend=backend) + v
    torch.testing.assert_close(q.gather(1, a[:, None])[:, 0], want, rtol=1e-6, atol=2e-6)


@places
def test_same_model_gives_v_exactly(device, backend):
    z, v = draw(5, 1500, device=device), draw(5, device=device)
    q = q_values(z, z.clone(), v, tau=0.5, backend=backend)
    assert same_bits(q, v[:, None].expand(5, 1500).contiguous())
