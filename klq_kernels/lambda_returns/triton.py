# SPDX-License-Identifier: Apache-2.0
"""The reverse scan of eq. (7) in Triton, in its W form: W_t = V_t + c_t A_t and
A_t = (r_t - Q_t) + gamma W_next; the bootstrap is the first carry. Numerics as in
csrc/cuda/scan.cuh.

A lane holds four neighbouring tokens (one 16-byte load an input), runs them right to left in
float32, and describes them to the others as an affine map W = d + f W_next in float64, which keeps
(gamma lam)^n exact at any length. Maps are composed over the lanes of a tile, and with the W that
then enters it a lane runs its tokens again. A factor of zero cuts: nothing from its right enters,
not even a NaN.

A tile is [R, P] lanes of R rows, counted from the right, so that a forward scan runs right to left.
Regimes, chosen from shapes only: R rows a program, tile after tile; or, for few long rows and
everything packed, flat tiles in two launches: the first writes each tile's map (only of its part
that the tile to its left needs), the second composes the maps right of a tile and scans the tile.
Nobody waits for a neighbour, and short sequences cost the first launch almost nothing.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton_host as host
from klq_kernels._triton_scan import (
    compose,
    enter,
    lane_maps,
    load,
    load_tokens,
    number,
    places,
    write_tokens,
)

_LANES = 256  # most lanes of a tile; a thread each
_LONG, _FEW = 4096, 256  # fewer rows, if longer, leave the device idle when each is one program
_MAPS = 256  # most maps composed at a time
_ENDS = tl.constexpr(128)  # ends a search looks at together


@triton.jit
def row_tile(
    inputs,
    out,
    first,
    begin,
    end,
    carry,
    tau,
    gamma,
    lam,
    alpha,
    WHOLE: tl.constexpr,
    CUT: tl.constexpr,
):
    """Writes a tile; returns the W that enters its last lane, the `carry` of the next tile.

    Each lane describes the one to its right: a scan of these maps is the W that enters, where a
    scan of its own would have to be handed on to the next thread. The tokens come from the cache.
    """
    R: tl.constexpr = carry.shape[0]
    P: tl.constexpr = carry.shape[1]
    no, zero = tl.zeros([R, P, 4], tl.int1), tl.zeros([R, P, 4], tl.float32)
    at, inside = places(first, begin, end, P, WHOLE)
    q, u, v, c, use = load_tokens(inputs, at, inside, tau, lam)
    tl.debug_barrier()  # these loads are on their way now, not when they are used
    right, there = places(first + 4, begin, end, P, WHOLE)
    _q, u_1, v_1, c_1, use_1 = load_tokens(inputs, right, there, tau, lam)
    d, f = lane_maps((u_1, v_1, c_1, use_1, no, zero), gamma, CUT)
    w = enter(d, f, carry, CUT)
    write_tokens(out, at, inside, q, (u, v, c, use, no, zero), w, gamma, alpha, CUT)
    w = tl.sum(tl.where(tl.arange(0, P)[None, :] == P - 1, w, 0.0), 1)
    return tl.broadcast_to(w[:, None], [R, P])


@triton.jit(do_not_specialize=["rows", "length"])
def rows_kernel(
    log_ratios,  # None: Q = V (GAE)
    values,
    rewards,
    trace,  # None: lam
    lam_rows,
    mask,
    bootstrap,
    q_out,  # None: not wanted
    a_out,
    g_out,
    rows,
    length,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    alpha,
    R: tl.constexpr,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    CUT: tl.constexpr,
):
    """R rows a program, tile after tile from their right end."""
    inputs, out = (log_ratios, values, rewards, trace, mask), (q_out, a_out, g_out)
    gamma = number(gamma_high, gamma_low)
    lam = number(lam_high, lam_low)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    there = row < rows
    if lam_rows is not None:
        lam = load(lam_rows, row, there, 0.0).to(tl.float64)[:, :, None]
    carry = tl.broadcast_to(load(bootstrap, row, there, 0.0).to(tl.float64), [R, P])
    begin = (row * length)[:, :, None]
    end = tl.where(there[:, :, None], begin + length, begin)
    # lanes begin at multiples of four tokens of the whole tensor, so that vectors are aligned
    first = (begin + length + 3) // 4 * 4 - 4 * P
    tiles = tl.cdiv(length if WHOLE else length + 3, 4 * P)
    for _ in range(tiles):
        carry = row_tile(
            *(inputs, out, first, begin, end, carry, tau, gamma, lam, alpha), WHOLE, CUT
        )
        first -= 4 * P


# --- device: flat tiles -------------------------------------------------------------------------


@triton.jit
def bound(ends, s, length):
    """Where sequence s begins, and the one before it ends."""
    return s * length if ends is None else tl.load(ends + s).to(tl.int64)


@triton.jit
def sequences_of(ends, t, t_2, sequences, length):
    """The sequences of two tokens: the last ones that do not begin after them.

    Many ends a round: two dependent loads find one of 16 000, where bisection takes fourteen.
    """
    if ends is None:
        s = t // length
        s_2 = t_2 // length
    else:
        s = tl.zeros([], tl.int64)
        s_2 = tl.zeros([], tl.int64)
        size = tl.zeros([], tl.int64) + sequences
        while size > 1:
            size = tl.cdiv(size, _ENDS)
            i = s + tl.arange(0, _ENDS) * size
            i_2 = s_2 + tl.arange(0, _ENDS) * size
            begin = tl.load(ends + i, mask=i < sequences, other=0)
            begin_2 = tl.load(ends + i_2, mask=i_2 < sequences, other=0)
            before = tl.sum(((i < sequences) & (begin <= t)).to(tl.int32), 0)
            before_2 = tl.sum(((i_2 < sequences) & (begin_2 <= t_2)).to(tl.int32), 0)
            s += tl.maximum(before - 1, 0) * size
            s_2 += tl.maximum(before_2 - 1, 0) * size
    return s, s_2


@triton.jit
def look_up(rows, at, use, inside, s, s_2, lam):
    """(active tokens, which ones end a sequence, the bootstraps of these, trace decays) of tokens
    in sequences s .. s_2, or in none."""
    ends, lam_rows, bootstrap, length = rows
    if ends is None:
        end = (s + 1) * length
        i = tl.where(at < end, s, s_2)  # rows are longer than a tile
    else:
        k = tl.zeros(at.shape, tl.int32)
        size = (s_2 + 1 - s).to(tl.int32)
        stop = k + size
        while size > 1:
            middle = (k + stop) // 2
            is_right = tl.load(ends + s + middle) <= at
            k = tl.where(is_right, middle, k)
            stop = tl.where(is_right, stop, middle)
            size = tl.cdiv(size, 2)
        i = s + k
        end = tl.load(ends + s + 1 + k)
        inside = inside & (at < end) & (at >= tl.load(ends))
    last = inside & (at + 1 == end)
    if lam_rows is not None:
        lam = load(lam_rows, i, inside, 0.0).to(tl.float64)
    return use & inside, last, load(bootstrap, i, last, 0.0), lam


@triton.jit(do_not_specialize=["sequences", "length", "tokens"])
def tile_map_kernel(
    log_ratios,
    values,
    rewards,
    trace,
    lam_rows,
    mask,
    ends,
    bootstrap,
    maps,  # [tiles, 2] float64
    sequences,
    length,
    tokens,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The map of each tile up to the end of the sequence that it begins in, if that began before
    it: nobody asks for others. Where that sequence ends its bootstrap is folded in."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * (4 * P)
    s, _s = sequences_of(ends, first, first, sequences, length)
    end = bound(ends, s + 1, length)
    if (bound(ends, s, length) < first) & (first < end):
        inputs, yes = (log_ratios, values, rewards, trace, mask), tl.full([], 1, tl.int1)
        gamma = number(gamma_high, gamma_low)
        lam = number(lam_high, lam_low)
        if lam_rows is not None:
            lam = load(lam_rows, s, yes, 0.0).to(tl.float64)
        at, inside = places(first, first, tokens, P, WHOLE)
        _q, u, v, c, use = load_tokens(inputs, at, inside, tau, lam)
        seed = tl.zeros(at.shape, tl.float32) + load(bootstrap, s, yes, 0.0)
        d, f = lane_maps((u, v, c, use, at + 1 == end, seed), gamma, True)
        d, f = tl.associative_scan((d, f), 1, compose)
        beyond = tl.arange(0, P)[None, :] - (P - 1)
        to = maps + tile + beyond
        tl.store(to, d, mask=beyond == 0)
        tl.store(to + tl.num_programs(0), f, mask=beyond == 0)


@triton.jit
def composed(maps, tiles, begin, end, MAPS: tl.constexpr):
    """The W that leaves tiles begin .. end - 1, the last of which ends a sequence."""
    w = tl.zeros([], tl.float64)
    i = tl.arange(0, MAPS)
    while end > begin:
        d = tl.load(maps + end - 1 - i, mask=end - i > begin, other=0.0)
        f = tl.load(maps + tiles + end - 1 - i, mask=end - i > begin, other=1.0)
        d_0, _f = compose(w, f, d, f)
        d, f = tl.where(i == 0, d_0, d), tl.where(i == 0, 0.0, f)
        d, f = tl.associative_scan((d, f), 0, compose)
        w = tl.sum(tl.where(i == MAPS - 1, d, 0.0), 0)
        end -= MAPS
    return w


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
    sequences,
    length,
    tokens,
    tau,
    gamma_high,
    gamma_low,
    lam_high,
    lam_low,
    alpha,
    P: tl.constexpr,
    WHOLE: tl.constexpr,
    MAPS: tl.constexpr,  # maps composed at a time
):
    """Each tile from the maps to its right, composed in their order."""
    inputs, out = (log_ratios, values, rewards, trace, mask), (q_out, a_out, g_out)
    gamma = number(gamma_high, gamma_low)
    lam = number(lam_high, lam_low)
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = tile * (4 * P)
    stop = tl.minimum(first + 4 * P, tokens)
    at, inside = places(first, first, stop, P, WHOLE)
    q, u, v, c, use = load_tokens(inputs, at, inside, tau, lam)
    tl.debug_barrier()  # as in row_tile
    s, s_2 = sequences_of(ends, first, stop - 1, sequences, length)
    end = bound(ends, s_2 + 1, length)
    carry = tl.zeros([], tl.float64)
    if end > stop:
        beyond = tl.minimum((end - 1) // (4 * P) + 1, tiles)
        carry = composed(maps, tiles, tile + 1, beyond, MAPS)
    rows = (ends, lam_rows, bootstrap, length)
    use, last, seed, c = look_up(rows, at, use, inside, s, s_2, c)
    right, inside_1 = places(first + 4, first, stop, P, WHOLE)
    _q, u_1, v_1, c_1, use_1 = load_tokens(inputs, right, inside_1, tau, lam)
    use_1, last_1, seed_1, c_1 = look_up(rows, right, use_1, inside_1, s, s_2, c_1)
    d, f = lane_maps((u_1, v_1, c_1, use_1, last_1, seed_1), gamma, True)
    w = enter(d, f, tl.zeros([1, P], tl.float64) + carry, True)
    write_tokens(out, at, inside, q, (u, v, c, use, last, seed), w, gamma, alpha, True)


# --- host ---------------------------------------------------------------------------------------


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
    lam_rows = lam_rows if trace is None else None
    out = [None if log_ratios is None else host.like(values, shape)]
    out += host.like(values, shape), host.like(values, shape)
    packed = cu_seqlens is not None
    length = 0 if packed else shape[-1]
    rows = cu_seqlens.shape[0] - 1 if packed else tokens // max(1, length)
    if tokens == 0 or rows == 0:  # tokens without a sequence
        return tuple(x if x is None else x.zero_() for x in out)
    inputs = [host.compact(x) for x in (log_ratios, values, rewards, trace, lam_rows, mask)]
    bootstrap = host.compact(bootstrap)
    scalars = (tau, *split(gamma), *split(lam))
    if packed or (length > _LONG and rows < _FEW):
        lanes = min(_LANES, max(32, host.power_of_2(host.tiles_of(tokens, 4))))
        tiles, whole = host.tiles_of(tokens, 4 * lanes), tokens % 4 == 0
        inputs += host.compact(cu_seqlens), bootstrap
        maps = host.like(values, (2, tiles), torch.float64)
        scalars = (rows, length, tokens, *scalars)
        how = {"num_warps": max(1, lanes // 32)}
        if tiles > 1:
            host.launch(
                tile_map_kernel, tiles, values, *inputs, maps, *scalars, lanes, whole, **how
            )
        most = min(_MAPS, host.power_of_2(host.tiles_of(length or tokens, 4 * lanes)))
        host.launch(
            *(tile_scan_kernel, tiles, values, *inputs, *out, maps, *scalars, alpha),
            *(lanes, whole, most),
            **how,
        )
    else:
        whole = length % 4 == 0
        cut = trace is not None or lam_rows is not None or not (scalars[1] and scalars[3])
        lanes = min(_LANES, host.power_of_2(host.tiles_of(length + 3 * (not whole), 4)))
        group = min(host.power_of_2(rows), max(1, 128 // lanes) if lanes <= 32 else 1)
        host.launch(
            *(rows_kernel, host.tiles_of(rows, group), values),
            *(*inputs, bootstrap, *out, rows, length, *scalars, alpha),
            *(group, lanes, whole, cut),
            num_warps=max(1, group * lanes // 32),
        )
    return tuple(out)


def lambda_returns(*args) -> tuple[Tensor, Tensor, Tensor]:
    return scan(*args)
