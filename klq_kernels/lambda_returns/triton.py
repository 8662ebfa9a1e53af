# SPDX-License-Identifier: Apache-2.0
"""The reverse scan of eq. (7) in Triton, in its W form: W_t = V_t + c_t A_t and
A_t = (r_t - Q_t) + gamma W_next; the bootstrap is the first carry.

A token maps the carry affinely, W = d + f W_next with f = c gamma (the identity if inactive). Tiles
are loaded backwards, so that a forward scan runs right to left; maps compose in float64, which
keeps (gamma lam)^n exact enough at any length. Three regimes, chosen from shapes only: many short
rows a program; one program a sequence, tile after tile; few long sequences cut into tiles, of which
a first launch makes each tile's map and a second applies the maps to its right.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from klq_kernels import _triton as tt
from klq_kernels._triton import wide

_TILE = 1024  # tokens a program holds at a time
_WARPS = 4
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes one tile [ROWS, TILE], its tokens from right to left, and returns the new carry."""
    use = inside
    if mask is not None:
        use = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    q, u, d, f = token_maps(log_ratios, values, rewards, trace, at, use, tau, gamma, lam)
    d, f = tl.associative_scan((d, f), 1, compose)
    w = d + f * carry[:, None]
    j = tl.broadcast_to(tl.arange(0, TILE)[None, :], [ROWS, TILE])
    right = tl.gather(w, tl.maximum(j - 1, 0), 1)
    a = u + gamma * tl.where(j == 0, carry[:, None], right)
    if q_out is not None:
        tl.store(q_out + at, tl.where(use, q, 0.0).to(tl.float32), mask=inside)
    tl.store(a_out + at, tl.where(use, a, 0.0).to(tl.float32), mask=inside)
    g = q + wide(alpha) * a
    tl.store(g_out + at, tl.where(use, g, 0.0).to(tl.float32), mask=inside)
    return tl.sum(tl.where(j == TILE - 1, w, 0.0), 1)


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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """ROWS sequences a program, each tile after tile from its right end."""
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = s < sequences
    begin, end = span(ends, s, there, length, tokens)
    gamma = number(gamma_high, gamma_low)
    lam = per_sequence(lam_rows, s, there, number(lam_high, lam_low))[:, None]
    carry = per_sequence(bootstrap, s, there, 0.0)
    longest = tl.max(end - begin, 0)
    for first in range(0, longest, TILE):
        at = end[:, None] - 1 - first - tl.arange(0, TILE)[None, :]
        inside = (at >= begin[:, None]) & there[:, None]
        carry = scan_tile(
            log_ratios, values, rewards, trace, mask, q_out, a_out, g_out,
            at, inside, carry, tau, gamma, lam, alpha, ROWS, TILE,
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
    TILE: tl.constexpr,
):
    """The map of each tile as a whole."""
    p = tl.program_id(0).to(tl.int64)
    s, k, begin, end = tile_of(ends, p, sequences, length, tokens, TILE)
    j = tl.arange(0, TILE)
    at = end - 1 - k * TILE - j
    use = at >= begin
    if mask is not None:
        use = use & (tl.load(mask + at, mask=use, other=0) != 0)
    lam = number(lam_high, lam_low)
    if lam_rows is not None:
        lam = tl.load(lam_rows + s).to(tl.float64)
    gamma = number(gamma_high, gamma_low)
    _, _, d, f = token_maps(log_ratios, values, rewards, trace, at, use, tau, gamma, lam)
    d, f = tl.associative_scan((d, f), 0, compose)
    tl.store(maps + p, tl.sum(tl.where(j == TILE - 1, d, 0.0), 0))
    tl.store(maps + tiles + p, tl.sum(tl.where(j == TILE - 1, f, 0.0), 0))


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
    TILE: tl.constexpr,
    MAPS: tl.constexpr,  # maps composed at a time
):
    """Each tile from the maps to its right, composed in their order."""
    p = tl.program_id(0).to(tl.int64)
    s, k, begin, end = tile_of(ends, p, sequences, length, tokens, TILE)
    if end - k * TILE > begin:
        gamma = number(gamma_high, gamma_low)
        one = tl.zeros([1], tl.int64) + s
        there = one < sequences
        lam = per_sequence(lam_rows, one, there, number(lam_high, lam_low))[:, None]
        carry = per_sequence(bootstrap, one, there, 0.0)
        j = tl.arange(0, MAPS)
        for first in range(0, k, MAPS):
            use = first + j < k
            d = tl.load(maps + (p - k) + first + j, mask=use, other=0.0)
            f = tl.load(maps + tiles + (p - k) + first + j, mask=use, other=1.0)
            d, f = tl.associative_scan((d, f), 0, compose)
            d = tl.sum(tl.where(j == MAPS - 1, d, 0.0), 0)
            f = tl.sum(tl.where(j == MAPS - 1, f, 0.0), 0)
            carry = d + f * carry
        at = end - 1 - k * TILE - tl.arange(0, TILE)[None, :]
        scan_tile(
            log_ratios, values, rewards, trace, mask, q_out, a_out, g_out,
            at, at >= begin, carry, tau, gamma, lam, alpha, 1, TILE,
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
    packed, cu_seqlens = cu_seqlens is not None, tt.compact(cu_seqlens)
    if packed:
        sequences, length = cu_seqlens.shape[0] - 1, 0
    else:
        length = shape[-1]
        sequences = tokens // length if length else 0
    # packed tokens past the last end belong to no sequence and are never visited
    new = torch.zeros if packed else torch.empty
    q, a, g = (
        None if skip else new(shape, dtype=torch.float32, device=values.device)
        for skip in (log_ratios is None, False, False)
    )
    if tokens == 0 or sequences == 0:
        return q, a, g
    reach = max(16, triton.next_power_of_2(tokens if packed else length))
    inputs = [tt.compact(x) for x in (log_ratios, values, rewards, trace, lam_rows, mask)]
    sizes = sequences, length, tokens
    scalars = (tau, *split(gamma), *split(lam))
    tile = min(_TILE, reach)
    most = triton.cdiv(tokens if packed else length, tile)  # tiles of one sequence
    if most < 4 or (sequences >= _FEW and not packed):
        rows = 1 if packed else max(1, _TILE // tile)
        tt.launch(
            walk_kernel,
            triton.cdiv(sequences, rows),
            values,
            *(*inputs, cu_seqlens, tt.compact(bootstrap), q, a, g),
            *(*sizes, *scalars, alpha, rows, tile),
            num_warps=max(1, rows * tile * _WARPS // _TILE),
        )
        return q, a, g
    tiles = tokens // tile + sequences if packed else sequences * most
    maps = torch.empty((2, tiles), dtype=torch.float64, device=values.device)
    tt.launch(
        tile_map_kernel,
        tiles,
        values,
        *(*inputs, cu_seqlens, maps, tiles, *sizes, *scalars, tile),
        num_warps=_WARPS,
    )
    tt.launch(
        tile_scan_kernel,
        tiles,
        values,
        *(*inputs, cu_seqlens, tt.compact(bootstrap), q, a, g, maps, tiles),
        *(*sizes, *scalars, alpha, tile, min(1024, triton.next_power_of_2(most))),
        num_warps=_WARPS,
    )
    return q, a, g


def lambda_returns(*args) -> tuple[Tensor, Tensor, Tensor]:
    return scan(*args)
