# SPDX-License-Identifier: Apache-2.0
"""lambda_returns against hand-made numbers and sums written out literally, never another scan."""

import itertools
import math

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import lambda_returns

places = everywhere("lambda_returns")


def tensor(*rows, device="cpu"):
    return torch.tensor(rows, device=device)


def literal(rho, v, r, *, tau, gamma, lam, alpha, mask=None, boot=0.0, trace=None):
    """(7), (13), (14) of one sequence as sums over its active tokens, in Python floats."""
    n = len(v)
    active = [t for t in range(n) if mask is None or mask[t]]
    q, a, g = [0.0] * n, [0.0] * n, [0.0] * n
    v_next = {t: v[u] for t, u in itertools.pairwise(active)}
    for t in active:
        q[t] = tau * rho[t] + v[t]
    for i, t in enumerate(active):
        weight = 1.0
        for k in active[i:]:
            if k != t:
                weight *= gamma * (lam if trace is None else trace[k])
            a[t] += weight * (r[k] + gamma * v_next.get(k, boot) - q[k])
        g[t] = q[t] + alpha * a[t]
    return q, a, g


def batch(rows: int, length: int, device: str = "cpu", seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    one = [torch.randn(rows, length, generator=made) for _ in range(3)]
    boot = torch.randn(rows, generator=made)
    mask = torch.rand(rows, length, generator=made) < 0.6
    return [x.to(device) for x in (*one, boot, mask)]


@places
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("rows", [0, 1, 17, 133])
def test_case_12_lengths_and_case_13_odd_row_counts(device, backend, length, rows):
    rho, v, r, boot, mask = batch(rows, length, device)
    how = {"tau": 0.3, "gamma": 0.98, "lam": 0.9, "alpha": 0.5}
    out = lambda_returns(rho, v, r, mask=mask, bootstrap=boot, backend=backend, **how)
    for i in range(0, rows, 16):
        lists = [x[i].tolist() for x in (rho, v, r)]
        truth = literal(*lists, mask=mask[i].tolist(), boot=float(boot[i]), **how)
        for got, want in zip(out, truth, strict=True):
            want = torch.tensor(want, dtype=torch.float64)
            assert (got[i].cpu() - want).abs().max().item() <= 2e-5 if length else True


@places
@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_case_12_long_rows(device, backend, length):
    if backend == "reference":
        return  # one second a call; the same code as the short rows
    rho, v, r, boot, mask = batch(2, length, device)
    how = {"tau": 0.3, "gamma": 0.99, "alpha": 0.5}
    out = lambda_returns(rho, v, r, mask=mask, bootstrap=boot, backend=backend, lam=0.9, **how)
    wide = [x.double().cpu() for x in (rho, v, r)]
    there = {"mask": mask.cpu(), "bootstrap": boot.cpu()}
    truth = lambda_returns(*wide, **there, lam=0.9, backend="cpp", **how)
    for got, want in zip(out, truth, strict=True):
        assert (got.cpu() - want).abs().max() <= 1e-5


@places
def test_worked_example(device, backend):
    """Two sequences of five by hand: gamma = lam = 1/2, tau = 1, alpha = 1/2."""
    rho = tensor([1.0, 0.0, 2.0, 9.0, 9.0], [0.0, 1.0, 0.0, 1.0, 0.0], device=device)
    v = tensor([2.0, 4.0, 0.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0], device=device)
    r = tensor([0.0, 0.0, 4.0, 9.0, 9.0], [1.0, 0.0, 0.0, 0.0, 0.0], device=device)
    mask = tensor([1, 1, 1, 0, 0], [0, 1, 0, 1, 0], device=device)
    boot = torch.tensor([0.0, 4.0], device=device)
    out = lambda_returns(
        *(rho, v, r),
        **{"tau": 1.0, "gamma": 0.5, "lam": 0.5, "alpha": 0.5, "mask": mask, "bootstrap": boot},
        backend=backend,
    )
    # row 0: Q = 3, 4, 2; delta = 0+2-3 = -1, 0+0-4 = -4, 4-2 = 2; A_2 = 2, A_1 = -3.5, A_0 = -1.875
    # row 1: Q_1 = Q_3 = 2; delta_1 = .5*1 - 2 = -1.5, delta_3 = .5*4 - 2 = 0
    q = tensor([3.0, 4.0, 2.0, 0.0, 0.0], [0.0, 2.0, 0.0, 2.0, 0.0], device=device)
    a = tensor([-1.875, -3.5, 2.0, 0.0, 0.0], [0.0, -1.5, 0.0, 0.0, 0.0], device=device)
    assert torch.equal(out.q, q) and torch.equal(out.advantages, a)
    assert torch.equal(out.returns, q + 0.5 * a)


@places
def test_case_2_terminal_reward_survives_a_masked_tail_at_gamma_0(device, backend):
    zero, r = torch.zeros(1, 5, device=device), tensor([0.0, 0.0, 3.0, 0.0, 0.0], device=device)
    mask = tensor([1, 1, 1, 0, 0], device=device)
    out = lambda_returns(zero, zero, r, tau=0.1, gamma=0.0, mask=mask, backend=backend)
    assert torch.equal(out.returns, r)


@places
def test_case_3_credit_crosses_a_gap(device, backend):
    zero, r = torch.zeros(1, 3, device=device), tensor([0.0, 0.0, 1.0], device=device)
    mask = tensor([1, 0, 1], device=device)
    out = lambda_returns(*(zero, zero, r), tau=0.1, gamma=0.5, lam=1.0, mask=mask, backend=backend)
    assert torch.equal(out.advantages, tensor([0.5, 0.0, 1.0], device=device))


@places
def test_case_4_the_width_of_a_gap_is_nothing(device, backend):
    """Rule 1, cases 4, 5: one gamma lam a transition; masked values of 100 count for nothing. Left
    pad, right pad and gaps give the same numbers, bit for bit on rows of one length."""
    rho, v, r, boot, _ = batch(1, 4, device)
    how = {"tau": 0.3, "gamma": 0.9, "lam": 0.8, "bootstrap": boot, "backend": backend}
    dense = lambda_returns(rho, v, r, **how)
    for places_ in ([0, 1, 2, 3], [9, 10, 11, 12], [0, 2, 3, 4], [0, 6, 7, 8], [3, 5, 9, 12]):
        wide = [torch.full((1, 13), 100.0, device=device) for _ in range(3)]
        mask = torch.zeros(1, 13, dtype=torch.bool, device=device)
        mask[0, places_] = True
        for w, x in zip(wide, (rho, v, r), strict=True):
            w[0, places_] = x
        out = lambda_returns(*wide, mask=mask, **how)
        for got, want in zip(out, dense, strict=True):
            torch.testing.assert_close(got[:, places_], want, rtol=1e-6, atol=1e-6)
            assert torch.count_nonzero(got[~mask]) == 0


@places
def test_case_7_bootstrap_of_an_empty_row_is_ignored(device, backend):
    rho, v, r, boot, mask = batch(3, 6, device)
    mask[1] = False
    out = lambda_returns(rho, v, r, tau=0.3, mask=mask, bootstrap=boot, backend=backend)
    boot[1] = torch.nan
    again = lambda_returns(rho, v, r, tau=0.3, mask=mask, bootstrap=boot, backend=backend)
    for a, b in zip(out, again, strict=True):
        assert same_bits(a, b) and torch.count_nonzero(a[1]) == 0


@places
def test_case_8_one_active_token(device, backend):
    """A = r + gamma bootstrap - Q and nothing else."""
    rho, v, r, boot, mask = batch(4, 5, device)
    mask[:] = False
    mask[:, 2] = True
    out = lambda_returns(
        *(rho, v, r), tau=0.3, gamma=0.5, mask=mask, bootstrap=boot, backend=backend
    )
    q = 0.3 * rho[:, 2] + v[:, 2]
    torch.testing.assert_close(out.advantages[:, 2], r[:, 2] + 0.5 * boot - q)


@places
def test_case_9_bootstrap_is_counted_once(device, backend):
    """gamma = lam = alpha = 1: G_t = sum_{k>=t} r + bootstrap - tau sum_{k>t} rho (Monte-Carlo)."""
    rho, v, r, boot, _ = batch(5, 40, device)
    out = lambda_returns(
        *(rho, v, r), tau=0.3, gamma=1.0, lam=1.0, alpha=1.0, bootstrap=boot, backend=backend
    )
    total = r.double().flip(1).cumsum(1).flip(1) + boot.double()[:, None]
    later = rho.double().flip(1).cumsum(1).flip(1) - rho.double()
    torch.testing.assert_close(out.returns.double(), total - 0.3 * later, rtol=0, atol=2e-5)


@places
def test_case_10_neither_rewards_nor_values_are_shifted(device, backend):
    """r_t belongs to a_t and reaches A_t and earlier tokens; V_t enters Q_t and delta_{t-1}."""
    zero = torch.zeros(1, 6, device=device)
    for t in range(6):
        one = zero.clone()
        one[0, t] = 1.0
        how = {"tau": 1.0, "gamma": 0.5, "lam": 0.5, "backend": backend}
        by_reward = lambda_returns(zero, zero, one, **how).advantages[0]
        want = torch.tensor([0.25 ** (t - k) if k <= t else 0.0 for k in range(6)], device=device)
        assert torch.equal(by_reward, want)
        by_value = lambda_returns(zero, one, zero, **how).advantages[0]
        want = [0.25 ** (t - k) * (-1.0) + 0.25 ** (t - k - 1) * 0.5 if k < t else 0.0
                for k in range(6)]  # fmt: skip
        want[t] = -1.0
        assert torch.equal(by_value, torch.tensor(want, device=device))


@places
def test_case_25_values_of_length_t_plus_1(device, backend):
    """The documented call for them."""
    rho, v, r, boot, _ = batch(3, 7, device)
    longer = torch.cat([v, boot[:, None]], 1)
    how = {"tau": 0.3, "gamma": 0.9, "backend": backend}
    out = lambda_returns(rho, longer[:, :-1], r, bootstrap=longer[:, -1], **how)
    want = lambda_returns(rho, v, r, bootstrap=boot, **how)
    assert all(same_bits(a, b) for a, b in zip(out, want, strict=True))


@places
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 1e-8, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_case_26_corners_of_the_scalars(device, backend, gamma, lam, alpha):
    rho, v, r, boot, mask = batch(2, 9, device, seed=3)
    how = {"tau": 0.3, "gamma": gamma, "lam": lam, "alpha": alpha}
    out = lambda_returns(rho, v, r, mask=mask, bootstrap=boot, backend=backend, **how)
    for i in range(2):
        lists = [x[i].tolist() for x in (rho, v, r)]
        truth = literal(*lists, mask=mask[i].tolist(), boot=float(boot[i]), **how)
        for got, want in zip(out, truth, strict=True):
            torch.testing.assert_close(got[i].cpu(), torch.tensor(want), rtol=1e-5, atol=1e-5)


@places
def test_case_27_long_decay_underflows_quietly(device, backend):
    if backend == "reference":
        return  # 65536 eager steps
    rho, v, r, boot, _ = batch(1, 65536, device)
    out = lambda_returns(*(rho, v, r), tau=0.3, gamma=1.0, lam=0.5, bootstrap=boot, backend=backend)
    assert all(x.isfinite().all() for x in out)


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_case_28_large_values_in_a_narrow_dtype(device, backend, dtype):
    """V around 1000: accumulation in bfloat16 or float16 would miss the bound by far."""
    rho, v, r, boot, mask = batch(3, 200, device)
    v, boot = (v + 1000).to(dtype), (boot + 1000).to(dtype)
    how = {"tau": 0.3, "gamma": 0.999, "lam": 0.95}
    out = lambda_returns(rho, v, r, mask=mask, bootstrap=boot, backend=backend, **how)
    assert all(x.dtype == torch.float32 for x in out)
    for i in range(3):
        lists = [x[i].tolist() for x in (rho, v, r)]
        truth = literal(*lists, mask=mask[i].tolist(), boot=float(boot[i]), alpha=1.0, **how)
        terms = [abs(a) + 2 * abs(b) for a, b in zip(lists[2], lists[1], strict=True)]
        bound = 2 * 2**-24 * (math.log2(200) + 16) * sum(0.95**k for k in range(200)) * max(terms)
        assert (out.advantages[i].cpu().double() - torch.tensor(truth[1])).abs().max() <= bound


@places
def test_case_29_alpha_scales_once(device, backend):
    """Rule 3: Q and A do not know alpha; G - Q is linear in it."""
    rho, v, r, boot, mask = batch(3, 30, device)
    how = {"tau": 0.3, "gamma": 0.99, "mask": mask, "bootstrap": boot, "backend": backend}
    full, part = (lambda_returns(rho, v, r, alpha=a, **how) for a in (1.0, 0.25))
    assert same_bits(full.q, part.q) and same_bits(full.advantages, part.advantages)
    torch.testing.assert_close(part.returns, part.q + 0.25 * part.advantages, rtol=0, atol=1e-6)


@places
def test_case_30_the_first_advantage_uses_the_value_at_the_prompts_end(device, backend):
    """With the prompt masked, A of the first response token holds -V there, and no prompt value."""
    zero = torch.zeros(1, 6, device=device)
    v = tensor(
        [50.0, 60.0, 7.0, 1.0, 1.0, 1.0], device=device
    )  # V(s_2) is read at the prompt's end
    mask = tensor([0, 0, 1, 1, 1, 1], device=device)
    out = lambda_returns(zero, v, zero, tau=0.1, gamma=1.0, lam=0.0, mask=mask, backend=backend)
    assert torch.equal(out.advantages, tensor([0.0, 0, -6, 0, 0, -1], device=device))


@places
def test_case_35_lam_per_row_equals_scalar_calls(device, backend):
    rho, v, r, boot, mask = batch(5, 12, device)
    lam = torch.linspace(0, 1, 5, device=device)
    how = {"tau": 0.3, "gamma": 0.97, "alpha": 0.5, "backend": backend}
    out = lambda_returns(rho, v, r, lam=lam, mask=mask, bootstrap=boot, **how)
    for i in range(5):
        s = slice(i, i + 1)
        one = lambda_returns(
            *(rho[s], v[s], r[s]), lam=float(lam[i]), mask=mask[s], bootstrap=boot[s], **how
        )
        for got, want in zip(out, one, strict=True):
            torch.testing.assert_close(got[s], want, rtol=1e-6, atol=1e-6)


@places
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_case_36_masks_of_any_integer_type_agree(device, backend, dtype):
    rho, v, r, _boot, mask = batch(3, 12, device)
    out = lambda_returns(rho, v, r, tau=0.3, mask=mask.to(dtype), backend=backend)
    want = lambda_returns(rho, v, r, tau=0.3, mask=mask, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(out, want, strict=True))
    with pytest.raises(TypeError, match="mask"):
        lambda_returns(rho, v, r, tau=0.3, mask=mask * 0.5, backend=backend)


@places
def test_case_37_tf32_changes_nothing(device, backend):
    rho, v, r, _boot, mask = batch(3, 40, device)
    outs = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            outs.append(lambda_returns(rho, v, r, tau=0.3, mask=mask, backend=backend))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(same_bits(a, b) for a, b in zip(*outs, strict=True))
