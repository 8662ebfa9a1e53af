# SPDX-License-Identifier: Apache-2.0
"""What the Triton scans share: lanes of four tokens as maps, tiles of lanes, loads and stores."""

import triton
import triton.language as tl

from klq_kernels._triton import wide

# --- device: lanes ------------------------------------------------------------------------------


@triton.jit
def compose(d, f, d_left, f_left):
    """The map of tokens to the right, then the map of those to their left."""
    cut = f_left == 0
    return tl.where(cut, d_left, tl.fma(f_left, d, d_left)), tl.where(cut, f_left, f_left * f)


@triton.jit
def compose_plain(d, f, d_left, f_left):
    """The same where no factor is zero by intent."""
    return tl.fma(f_left, d, d_left), f_left * f


@triton.jit
def number(high, low):
    """A float64 scalar from two float32 arguments: Triton passes Python floats as float32."""
    return wide(high) + wide(low)


@triton.jit
def load(x, i, use, default):
    """x[i] as float32; `default`, which may be a tensor, where there is no x."""
    if x is None:
        y = tl.zeros(use.shape, tl.float32) + default
    else:
        y = tl.load(x + i, mask=use, other=0.0).to(tl.float32)
    return y


@triton.jit
def four(x):
    """The tokens of lanes [R, P, 4] as four of [R, P], which stay in their registers."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def step(w, u, v, c, use, last, seed, gamma, CUT: tl.constexpr):
    """(A, W) of a token from the W right of it; right of a `last` one that is its seed."""
    w = tl.where(last, seed, w)
    a = tl.fma(gamma, w, u)
    if CUT:
        a = tl.where(gamma == 0, u, a)
    a = tl.where(use, a, 0.0)
    w_left = tl.fma(c, a, v)
    if CUT:
        w_left = tl.where(c == 0, v, w_left)
    return a, tl.where(use, w_left, w)


@triton.jit
def lane_steps(w, tokens, gamma, CUT: tl.constexpr):
    """(A of the tokens, W that leaves the lanes) from the W that enters them."""
    u, v, lam, use, last, seed = tokens
    gamma = gamma.to(tl.float32)
    u, v, c, use = four(u), four(v), four(lam.to(tl.float32)), four(use)
    last, seed = four(last), four(seed)
    a3, w = step(w, u[3], v[3], c[3], use[3], last[3], seed[3], gamma, CUT)
    a2, w = step(w, u[2], v[2], c[2], use[2], last[2], seed[2], gamma, CUT)
    a1, w = step(w, u[1], v[1], c[1], use[1], last[1], seed[1], gamma, CUT)
    a0, w = step(w, u[0], v[0], c[0], use[0], last[0], seed[0], gamma, CUT)
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    return tl.reshape(a, [w.shape[0], w.shape[1], 4]), w


@triton.jit
def times(f, f_left, CUT: tl.constexpr):
    return tl.where(f_left == 0, 0.0, f * f_left) if CUT else f * f_left


@triton.jit
def lane_maps(tokens, gamma, CUT: tl.constexpr):
    """Lanes as maps (d, f), [R, P]."""
    _u, _v, lam, use, last, _seed = tokens
    f = lam * gamma
    if CUT:
        f = tl.where(lam.to(tl.float32) == 0, 0.0, f)
    f0, f1, f2, f3 = four(tl.where(last, 0.0, tl.where(use, f, 1.0)))
    f = times(times(times(f3, f2, CUT), f1, CUT), f0, CUT)
    _a, w = lane_steps(tl.zeros(f.shape, tl.float32), tokens, gamma, CUT)
    return w.to(tl.float64), f


@triton.jit
def enter(d, f, carry, CUT: tl.constexpr):
    """The W that leaves each lane, from lane maps and the `carry` that enters the first one."""
    at_0 = tl.arange(0, d.shape[1])[None, :] == 0
    d_0, _f = compose(carry, f, d, f)
    d, f = tl.where(at_0, d_0, d), tl.where(at_0, 0.0, f)
    if CUT:
        d, f = tl.associative_scan((d, f), 1, compose)
    else:
        d, f = tl.associative_scan((d, f), 1, compose_plain)
    return d


# --- device: tiles ------------------------------------------------------------------------------


@triton.jit
def places(first, begin, end, P: tl.constexpr, WHOLE: tl.constexpr):
    """(the tokens [R, P, 4] of a tile that begins at `first`, which of them are in [begin, end)).

    Lanes are counted from the right, so that a forward scan runs right to left: one with
    reverse=True is wrong for pairs in some versions of Triton (issue 4362). WHOLE: no lane is in by
    a part only; said so that loads and stores become vectors.
    """
    lane = first + 4 * (P - 1 - tl.arange(0, P)[None, :, None])
    at = lane + tl.arange(0, 4)[None, None, :]
    asked = tl.broadcast_to(lane, at.shape) if WHOLE else at
    return at, (asked >= begin) & (asked < end)


@triton.jit
def load_tokens(inputs, at, inside, tau, lam):
    """(Q, r - Q, V, trace decay in float64, whether active) of tokens."""
    log_ratios, values, rewards, trace, mask = inputs
    v = load(values, at, inside, 0.0)
    r = load(rewards, at, inside, 0.0)
    q = v
    if log_ratios is not None:
        q = tl.fma(wide(tau).to(tl.float32), load(log_ratios, at, inside, 0.0), v)
    if trace is not None:
        lam = load(trace, at, inside, 0.0).to(tl.float64)
    use = inside
    if mask is not None:
        use = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return q, r - q, v, tl.broadcast_to(lam, at.shape), use


@triton.jit
def write_tokens(out, at, inside, q, tokens, w, gamma, alpha, CUT: tl.constexpr):
    """The outputs of tokens from the W that enters each lane."""
    q_out, a_out, g_out = out
    use = tokens[3]
    a, _w = lane_steps(w.to(tl.float32), tokens, gamma, CUT)
    g = tl.fma(wide(alpha).to(tl.float32), a, q)
    if q_out is not None:
        tl.store(q_out + at, tl.where(use, q, 0.0), mask=inside)
    tl.store(a_out + at, a, mask=inside)
    tl.store(g_out + at, tl.where(use, g, 0.0), mask=inside)
