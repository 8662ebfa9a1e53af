# SPDX-License-Identifier: Apache-2.0
"""The reverse scan of eq. (7) in Triton, in its W form: W_t = V_t + c_t A_t and
A_t = (r_t - Q_t) + gamma W_next; the bootstrap is the first carry.

A token maps the carry affinely, W = d + f W_next with f = c gamma (the identity if inactive). Tiles
are loaded backwards, so that a forward scan runs right to left; maps compose in float64, which
keeps (gamma lam)^n exact enough at any length. A tile is [A, 32]: each line of 32 tokens is scanned
inside a warp, and where the lines are one sequence their A maps are scanned after that. Regimes,
chosen from shapes only: lines that are sequences; a program a sequence, tile after tile; few long
sequences cut into tiles, of which a first launch makes each tile's map and a second applies the
maps to its right.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton import wide

_LINE = 32  # tokens scanned inside a warp
_LINES = 32  # lines a program holds at a time
_FEW = 512  # fewer sequences than this leave the device idle when each is one program


@triton.jit
def compose(d, f, d_left, f_left):
    """The map of tokens to the right, then the map of those to their left."""
    return d_left + f_left * d, f_left * f


@triton.jit
def number(high, low):
    """A float64 scalar from two float32 arguments: Triton passes Python floats as float32."""
    return wide(high) + wide(low)


@triton.jit
def token_maps(log_ratios, values, rewards, trace, at, use, tau, gamma, lam):
    """(q, u = r - q, d, f) of the tokens `at`; 0 and the identity map where not `use`."""
    v = tl.load(values + at, mask=use, other=0.0).to(tl.float64)
    r = tl.load(rewards + at, mask=use, other=0.0).to(tl.float64)
    q = v
    if log_ratios is not None:
        q = wide(tau) * tl.load(log_ratios + at, mask=use, other=0.0).to(tl.float64) + v
    c = lam
    if trace is not None:
        c = tl.load(trace + at, mask=use, other=0.0).to(tl.float64)
    u = r - q
    return q, u, tl.where(use, v + c * u, 0.0), tl.where(use, c * gamma, 1.0)


@triton.jit
def past(x, first):
    """The elements to the right of x's along the last axis (index - 1), `first` for the first."""
    i = tl.arange(0, x.shape[-1])
    if len(x.shape) == 2:
        i = tl.broadcast_to(i[None, :], x.shape)
    return tl.where(i == 0, first, tl.gather(x, tl.maximum(i - 1, 0), len(x.shape) - 1))


@triton.jit
def last(x, L: tl.constexpr):
    """The last elements along the last axis; a NaN elsewhere does not show."""
    if len(x.shape) == 2:
        y = tl.sum(tl.where(tl.arange(0, L)[None, :] == L - 1, x, 0.0), 1)
    else:
        y = tl.sum(tl.where(tl.arange(0, L) == L - 1, x, 0.0), 0)
    return y


@triton.jit
def places(A: tl.constexpr, L: tl.constexpr):
    """Distances of a tile's tokens from its right end, [A, L]."""
    return tl.arange(0, A)[:, None] * L + tl.arange(0, L)[None, :]


@triton.jit
def scan_tile(
    log_ratios,
    values,
    rewards,
    trace,
    mask,
    q_out,
    a_out,
    g_out,
    at,
    inside,
    carry,
    tau,
    gamma,
    lam,
    alpha,
    ONE: tl.constexpr,
    A: tl.constexpr,
    L: tl.constexpr,
):
    """Writes one tile [A, L], its tokens from right to left, and returns the new carry: a number if
    the lines are ONE sequence, else [A]."""
    use = inside
    if mask is not None:
        use = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    q, u, d, f = token_maps(log_ratios, values, rewards, trace, at, use, tau, gamma, lam)
    d, f = tl.associative_scan((d, f), 1, compose)
    if ONE:
        line_d, line_f = tl.associative_scan((last(d, L), last(f, L)), 0, compose)
        ends = line_d + line_f * carry
        carry = past(ends, carry)[:, None]
        w = d + f * carry
        after = last(ends, A)
    else:
        carry = carry[:, None]
        w = d + f * carry
        after = last(w, L)
    a = u + gamma * past(w, carry)
    if q_out is not None:
        tl.store(q_out + at, tl.where(use, q, 0.0).to(tl.float32), mask=inside)
    tl.store(a_out + at, tl.where(use, a, 0.0).to(tl.float32), mask=inside)
    g = q + wide(alpha) * a
    tl.store(g_out + at, tl.where(use, g, 0.0).to(tl.float32), mask=inside)
    return after


@triton.jit
def span(ends, s, there, length, tokens):
    """[begin, end) of sequences; clamped, so that ends nobody checked cannot leave the buffers."""
    if ends is None:
        begin = s * length
        end = begin + tl.where(there, length, 0)
    else:
        begin = tl.load(ends + s, mask=there, other=0).to(tl.int64)
        end = tl.load(ends + s + 1, mask=there, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.minimum(tl.maximum(end, begin), tokens)
    return begin, end


@triton.jit
def per_sequence(x, s, there, default):
    if x is None:
        y = tl.zeros(s.shape, tl.float64) + default
    else:
        y = tl.load(x + s, mask=there, other=0.0).to(tl.float64)
    return y


@triton.jit(do_not_specialize=["sequences", "length", "tokens"])
def walk_kernel(
    log_ratios,  # None: Q = V (GAE)
    values,
    rewards,
    trace,  # None: lam
    lam_rows,
    mask,
    ends,
    bootstrap,
    q_out,  # None: not wanted
    a_out,
    g_out,
    sequences,
    length,
    tokens,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    alpha,
    ONE: tl.constexpr,
    A: tl.constexpr,
    L: tl.constexpr,
):
    """One sequence a program, or a sequence a line; each tile after tile from its right end."""
    gamma = number(gamma_high, gamma_low)
    lam = number(lam_high, lam_low)
    s = tl.program_id(0).to(tl.int64)
    if not ONE:
        s = s * A + tl.arange(0, A)
    there = s < sequences
    begin, end = span(ends, s, there, length, tokens)
    lam = per_sequence(lam_rows, s, there, lam)
    carry = per_sequence(bootstrap, s, there, 0.0)
    if ONE:
        for first in tl.range(0, end - begin, A * L, num_stages=2):
            at = end - 1 - first - places(A, L)
            carry = scan_tile(
                log_ratios, values, rewards, trace, mask, q_out, a_out, g_out,
                at, at >= begin, carry, tau, gamma, lam, alpha, True, A, L,
            )  # fmt: skip
    else:
        at = end[:, None] - 1 - tl.arange(0, L)[None, :]
        inside = (at >= begin[:, None]) & there[:, None]
        scan_tile(
            log_ratios, values, rewards, trace, mask, q_out, a_out, g_out,
            at, inside, carry, tau, gamma, lam[:, None], alpha, False, A, L,
        )  # fmt: skip


@triton.jit
def tile_of(ends, p, sequences, length, tokens, TILE: tl.constexpr):
    """Tile p as (sequence, number from the right, begin, end); a tile that does not exist is empty.

    Tiles hang from the right end of their sequence. Packed, sequence s owns the numbers from
    begin_s // TILE + s on: enough for every sequence, and found by bisection.
    """
    if ends is None:
        each = tl.cdiv(length, TILE)
        s = p // each
        k = p % each
    else:
        low = tl.zeros([], tl.int64)
        high = tl.zeros([], tl.int64) + sequences
        while high - low > 1:
            middle = (low + high) // 2
            begin = tl.minimum(tl.maximum(tl.load(ends + middle).to(tl.int64), 0), tokens)
            if begin // TILE + middle <= p:
                low = middle
            else:
                high = middle
        s = low
        k = p - (tl.minimum(tl.maximum(tl.load(ends + s).to(tl.int64), 0), tokens) // TILE + s)
    begin, end = span(ends, s, s < sequences, length, tokens)
    return s, k, begin, end


@triton.jit(do_not_specialize=["sequences", "length", "tokens"])
def tile_map_kernel(
    log_ratios,
    values,
    rewards,
    trace,
    lam_rows,
    mask,
    ends,
    maps,  # [2, tiles] float64
    tiles,
    sequences,
    length,
    tokens,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    A: tl.constexpr,
    L: tl.constexpr,
):
    """The map of each tile as a whole."""
    p = tl.program_id(0).to(tl.int64)
    s, k, begin, end = tile_of(ends, p, sequences, length, tokens, A * L)
    at = end - 1 - k * (A * L) - places(A, L)
    use = at >= begin
    if mask is not None:
        use = use & (tl.load(mask + at, mask=use, other=0) != 0)
    lam = per_sequence(lam_rows, s, s < sequences, number(lam_high, lam_low))
    gamma = number(gamma_high, gamma_low)
    _q, _u, d, f = token_maps(log_ratios, values, rewards, trace, at, use, tau, gamma, lam)
    d, f = tl.associative_scan((d, f), 1, compose)
    d, f = tl.associative_scan((last(d, L), last(f, L)), 0, compose)
    tl.store(maps + p, last(d, A))
    tl.store(maps + tiles + p, last(f, A))


@triton.jit(do_not_specialize=["sequences", "length", "tokens"])
def tile_scan_kernel(
    log_ratios,
    values,
    rewards,
    trace,
    lam_rows,
    mask,
    ends,
    bootstrap,
    q_out,
    a_out,
    g_out,
    maps,
    tiles,
    sequences,
    length,
    tokens,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    alpha,
    A: tl.constexpr,
    L: tl.constexpr,
    MAPS: tl.constexpr,  # maps composed at a time
):
    """Each tile from the maps to its right, composed in their order."""
    p = tl.program_id(0).to(tl.int64)
    s, k, begin, end = tile_of(ends, p, sequences, length, tokens, A * L)
    if end - k * (A * L) > begin:
        gamma = number(gamma_high, gamma_low)
        lam = per_sequence(lam_rows, s, s < sequences, number(lam_high, lam_low))
        carry = per_sequence(bootstrap, s, s < sequences, 0.0)
        j = tl.arange(0, MAPS)
        for first in range(0, k, MAPS):
            use = first + j < k
            at = maps + (p - k) + first + j
            d = tl.load(at, mask=use, other=0.0)
            f = tl.load(at + tiles, mask=use, other=1.0)
            d, f = tl.associative_scan((d, f), 0, compose)
            carry = last(d, MAPS) + last(f, MAPS) * carry
        at = end - 1 - k * (A * L) - places(A, L)
        scan_tile(
            log_ratios, values, rewards, trace, mask, q_out, a_out, g_out,
            at, at >= begin, carry, tau, gamma, lam, alpha, True, A, L,
        )  # fmt: skip


def split(x: float) -> tuple[float, float]:
    """x as float32 and what that leaves, for `number`."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def scan(
    log_ratios: Tensor | None,
    values: Tensor,
    rewards: Tensor,
    tau: float,
    gamma: float,
    lam: float,
    lam_rows: Tensor | None,
    alpha: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    trace: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(q, advantages, returns); q is None without log-ratios."""
    tokens, shape = values.numel(), values.shape
    packed, cu_seqlens = cu_seqlens is not None, host.compact(cu_seqlens)
    if packed:
        sequences, length = cu_seqlens.shape[0] - 1, 0
    else:
        length = shape[-1]
        sequences = tokens // length if length else 0
    q = None if log_ratios is None else host.like(values, shape)
    a, g = host.like(values, shape), host.like(values, shape)
    if packed:  # tokens past the last end belong to no sequence and are never visited
        for x in (q, a, g):
            if x is not None:
                x.zero_()
    if tokens == 0 or sequences == 0:
        return q, a, g
    inputs = [host.compact(x) for x in (log_ratios, values, rewards, trace, lam_rows, mask)]
    bootstrap = host.compact(bootstrap)
    sizes = sequences, length, tokens
    scalars = (tau, *split(gamma), *split(lam))
    reach = tokens if packed else length  # the longest a sequence can be
    if reach <= _LINE and not packed:
        lines = min(_LINES, host.power_of_2(sequences))
        host.launch(
            walk_kernel,
            host.tiles_of(sequences, lines),
            values,
            *(*inputs, cu_seqlens, bootstrap, q, a, g, *sizes, *scalars, alpha),
            *(False, lines, host.power_of_2(reach)),
            num_warps=max(1, lines // 8),
        )
        return q, a, g
    lines = min(_LINES, host.power_of_2(host.tiles_of(reach, _LINE)))
    warps = max(1, lines // 8)
    most = host.tiles_of(reach, lines * _LINE)  # tiles of one sequence
    if most < 4 or (sequences >= _FEW and not packed):
        host.launch(
            walk_kernel,
            sequences,
            values,
            *(*inputs, cu_seqlens, bootstrap, q, a, g, *sizes, *scalars, alpha),
            *(True, lines, _LINE),
            num_warps=warps,
        )
        return q, a, g
    tiles = tokens // (lines * _LINE) + sequences if packed else sequences * most
    maps = host.like(values, (2, tiles), torch.float64)
    host.launch(
        tile_map_kernel,
        tiles,
        values,
        *(*inputs, cu_seqlens, maps, tiles, *sizes, *scalars, lines, _LINE),
        num_warps=warps,
    )
    host.launch(
        tile_scan_kernel,
        tiles,
        values,
        *(*inputs, cu_seqlens, bootstrap, q, a, g, maps, tiles, *sizes, *scalars, alpha),
        *(lines, _LINE, min(256, host.power_of_2(most))),
        num_warps=warps,
    )
    return q, a, g


def lambda_returns(*args) -> tuple[Tensor, Tensor, Tensor]:
    return scan(*args)
