# SPDX-License-Identifier: Apache-2.0
"""The scan on packed sequences, off-policy traces, long rows within rule 7, and its invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import everywhere, same_bits

from klq_kernels import lambda_returns

places = everywhere("lambda_returns")
HOW = {"tau": 0.3, "gamma": 0.97, "alpha": 0.6}


def tokens(n: int, device: str = "cpu", seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, generator=made) for _ in range(3)]
    return [*(y.to(device) for y in x), (torch.rand(n, generator=made) < 0.7).to(device)]


def ends(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


@places
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_case_23_zero_length_sequences(device, backend, dtype):
    """First, in the middle, twice in a row and last; each is as if alone; the tail is 0."""
    lengths = [0, 4, 0, 0, 1, 9, 0]
    rho, v, r, mask = tokens(17, device)
    boot = torch.arange(1.0, 8.0, device=device)
    cu = ends(lengths, device, dtype)
    out = lambda_returns(
        *(rho, v, r), mask=mask, cu_seqlens=cu, bootstrap=boot, backend=backend, **HOW
    )
    at = 0
    for s, n in enumerate(lengths):
        part = slice(at, at + n)
        one = lambda_returns(
            *(rho[part], v[part], r[part]),
            mask=mask[part],
            bootstrap=boot[s],
            backend=backend,
            **HOW,
        )
        for got, want in zip(out, one, strict=True):
            torch.testing.assert_close(got[part], want, rtol=1e-6, atol=1e-6)
        at += n
    assert all(torch.count_nonzero(x[at:]) == 0 for x in out)


@places
def test_case_24_skewed_lengths(device, backend):
    if backend == "reference":
        return  # thousands of eager steps
    lengths = [8192] + [1] * 1000
    rho, v, r, _ = tokens(9192, device)
    out = lambda_returns(rho, v, r, cu_seqlens=ends(lengths, device), backend=backend, **HOW)
    q = 0.3 * rho + v
    torch.testing.assert_close(out.advantages[8192:], (r - q)[8192:], rtol=1e-6, atol=1e-6)
    one = lambda_returns(rho[:8192], v[:8192], r[:8192], backend=backend, **HOW)
    torch.testing.assert_close(out.advantages[:8192], one.advantages, rtol=1e-5, atol=1e-5)


@places
def test_case_60_packed_padded_and_left_padded_agree(device, backend):
    lengths = [5, 1, 8, 3]
    rho, v, r, _ = tokens(sum(lengths), device)
    packed = lambda_returns(rho, v, r, cu_seqlens=ends(lengths, device), backend=backend, **HOW)
    for left in (False, True):
        wide = [torch.full((4, 8), torch.nan, device=device) for _ in range(3)]
        mask = torch.zeros(4, 8, dtype=torch.bool, device=device)
        for s, n in enumerate(lengths):
            mask[s, 8 - n :] = True if left else mask[s, 8 - n :]
            if not left:
                mask[s, :n] = True
        for w, x in zip(wide, (rho, v, r), strict=True):
            w[mask] = x
        out = lambda_returns(*wide, mask=mask, backend=backend, **HOW)
        for got, want in zip(out, packed, strict=True):
            torch.testing.assert_close(got[mask], want, rtol=1e-6, atol=1e-6)


@places
def test_more_sequences_than_a_grid_has_rows(device, backend):
    """Rule 10, case 52: more than 65535 rows, padded and packed."""
    rows = 65536 + 7
    rho, v, r, _ = tokens(rows * 2, device)
    shaped = [x.view(rows, 2) for x in (rho, v, r)]
    padded = lambda_returns(*shaped, backend=backend, **HOW)
    last = 0.3 * rho[1::2] + v[1::2]
    torch.testing.assert_close(padded.advantages[:, 1], r[1::2] - last, rtol=1e-6, atol=1e-6)
    if backend != "reference":
        cu = torch.arange(0, 2 * rows + 1, 2, device=device)
        packed = lambda_returns(rho, v, r, cu_seqlens=cu, backend=backend, **HOW)
        for a, b in zip(padded, packed, strict=True):
            torch.testing.assert_close(a.view(-1), b, rtol=1e-6, atol=1e-6)


def python_scan(q, v, r, decay, gamma, boot=0.0):
    """A in Python floats, right to left: the float64 truth of rows too long for sums."""
    a, out, v_next, a_next = [], [], boot, 0.0
    for t in range(len(v) - 1, -1, -1):
        a_next = r[t] + gamma * v_next - q[t] + decay * a_next
        v_next = v[t]
        out.append(a_next)
    a = out[::-1]
    return torch.tensor(a, dtype=torch.float64)


@places
@pytest.mark.parametrize(
    ("length", "gamma", "lam"), [(131072, 1.0, 0.9999), (4096, 0.999, 0.95), (131072, 1.0, 1.0)]
)
def test_rule_7_long_rows(device, backend, length, gamma, lam):
    """Within the scan bound at every token, and within 5e-4 at T=131072, gamma lam = 0.9999."""
    if backend == "reference":
        return  # 131072 eager steps
    rho, v, r, _ = tokens(length, device)
    out = lambda_returns(
        *(rho, v, r), tau=0.3, gamma=gamma, lam=lam, bootstrap=torch.tensor(2.0, device=device),
        backend=backend,
    )  # fmt: skip
    q = 0.3 * rho.double() + v.double()
    listed = [x.tolist() for x in (q, v.double(), r.double())]
    truth = python_scan(*listed, gamma * lam, gamma, 2.0)
    terms = (r.abs() + v.abs() + q.abs()).tolist()
    zero = [0.0] * length
    weighted = python_scan(zero, zero, terms, gamma * lam, gamma, 2.0)
    bound = 2 * 2**-24 * (math.log2(length) + 16) * weighted
    off = (out.advantages.cpu().double() - truth).abs()
    assert (off <= bound).all(), f"{(off / bound).max():.3f} of the bound"
    if lam == 0.9999:
        assert off.max() <= 5e-4, f"{off.max():.2e}"


@places
def test_trace_is_read_at_the_later_token(device, backend):
    """A_t = delta_t + gamma c_{t+1} A_{t+1}: c of the first token is never read, the last one's is
    (case 32: c_t against c_{t+1})."""
    rho, v, r, _ = tokens(4, device)
    c = torch.tensor([torch.nan, 0.5, 0.25, 2.0], device=device)
    out = lambda_returns(rho, v, r, tau=0.3, gamma=0.9, trace=c, backend=backend)
    q = 0.3 * rho + v
    v_next = torch.cat([v[1:], v.new_zeros(1)])
    d = r + 0.9 * v_next - q
    a = [d[3]]
    for t in (2, 1, 0):
        a.append(d[t] + 0.9 * c[t + 1] * a[-1])
    torch.testing.assert_close(out.advantages, torch.stack(a[::-1]), rtol=1e-6, atol=1e-6)


@places
def test_case_32_retrace_and_tree_backup(device, backend):
    """c = lam min(c_max, e^x), x = log pi - log mu: on-policy it is lam, bit for bit; extreme
    ratios stay finite; c = lam pi is tree-backup; delta carries no ratio."""
    rho, v, r, mask = tokens(12, device)
    lam, c_max = 0.9, 1.0

    def retrace(x):
        trace = lam * torch.exp(x.clamp(max=math.log(c_max)))
        how = {"mask": mask, "trace": trace, "backend": backend}
        return lambda_returns(rho, v, r, **HOW, **how)

    on_policy = lambda_returns(rho, v, r, lam=lam, mask=mask, backend=backend, **HOW)
    for a, b in zip(retrace(torch.zeros_like(v)), on_policy, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    far = torch.tensor([200.0, -200.0] * 6, device=device)
    assert all(x.isfinite().all() for x in retrace(far))
    cut = lambda_returns(rho, v, r, lam=0.0, mask=mask, backend=backend, **HOW)
    for a, b in zip(retrace(torch.full_like(v, -200.0)), cut, strict=True):
        torch.testing.assert_close(a, b)

    pi = torch.rand(12, generator=torch.Generator().manual_seed(1)).to(device)
    out = lambda_returns(rho, v, r, mask=mask, trace=lam * pi, backend=backend, **HOW)
    live = mask.nonzero().squeeze(-1).tolist()
    for i, t in enumerate(live):  # the forward view: products of lam pi over later tokens
        total, weight = 0.0, 1.0
        for j, k in enumerate(live[i:]):
            weight *= 0.97 * lam * float(pi[k]) if j else 1.0
            v_next = float(v[live[i + j + 1]]) if i + j + 1 < len(live) else 0.0
            total += weight * (float(r[k]) + 0.97 * v_next - float(0.3 * rho[k] + v[k]))
        assert abs(float(out.advantages[t]) - total) < 1e-5


@places
def test_case_32_a_trace_of_lam_is_lam(device, backend):
    rho, v, r, mask = tokens(30, device)
    shape = (3, 10)
    rho, v, r, mask = (x.view(shape) for x in (rho, v, r, mask))
    trace = torch.full(shape, 0.75, device=device)
    with_trace = lambda_returns(rho, v, r, mask=mask, trace=trace, backend=backend, **HOW)
    with_lam = lambda_returns(rho, v, r, mask=mask, lam=0.75, backend=backend, **HOW)
    for a, b in zip(with_trace, with_lam, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


runs = settings(max_examples=40, deadline=None, derandomize=True)
numbers = st.integers(0, 2**31 - 1)


@runs
@given(seed=numbers, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_property_packing_is_separate_runs(seed, lengths):
    rho, v, r, mask = tokens(sum(lengths), seed=seed)
    boot = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed))
    out = lambda_returns(
        *(rho, v, r), mask=mask, cu_seqlens=ends(lengths), bootstrap=boot, backend="cpp", **HOW
    )
    at = 0
    for s, n in enumerate(lengths):
        p = slice(at, at + n)
        one = lambda_returns(
            *(rho[p], v[p], r[p]), mask=mask[p], bootstrap=boot[s], backend="reference", **HOW
        )
        for a, b in zip(out, one, strict=True):
            torch.testing.assert_close(a[p], b, rtol=1e-5, atol=1e-5)
        at += n


@runs
@given(seed=numbers, length=st.integers(1, 12), gap=st.integers(1, 5), where=st.integers(0, 12))
def test_property_inserting_inactive_tokens_changes_no_bit(seed, length, gap, where):
    rho, v, r, mask = tokens(length, seed=seed)
    where = min(where, length)
    out = lambda_returns(rho, v, r, mask=mask, backend="cpp", **HOW)

    def opened(x, fill):
        return torch.cat([x[:where], torch.full((gap,), fill).to(x.dtype), x[where:]])

    wide = lambda_returns(
        *(opened(x, torch.nan) for x in (rho, v, r)), mask=opened(mask, False), backend="cpp", **HOW
    )
    for a, b in zip(out, wide, strict=True):
        kept = torch.cat([b[:where], b[where + gap :]])
        assert same_bits(a, kept)


@runs
@given(seed=numbers, length=st.integers(1, 10), lam=st.sampled_from([0.0, 1.0]))
def test_property_closed_forms_at_lam_0_and_1(seed, length, lam):
    rho, v, r, _ = tokens(length, seed=seed)
    out = lambda_returns(rho, v, r, tau=0.3, gamma=0.9, lam=lam, backend="cpp")
    q, v_next = 0.3 * rho + v, torch.cat([v[1:], v.new_zeros(1)])
    d = r + 0.9 * v_next - q
    if lam:
        k = torch.arange(length)
        d = (0.9 ** (k[None] - k[:, None]).clamp(min=0)).triu() @ d
    torch.testing.assert_close(out.advantages, d, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.returns, q + d, rtol=1e-5, atol=1e-5)
