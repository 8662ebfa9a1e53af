# SPDX-License-Identifier: Apache-2.0
"""What the Triton twins share: rows of logits read where they lie, one pass of online softmax, and
the launch.

A program walks a row in tiles of [R, L, V]: R vectors of V elements in each of L lanes. A lane is
what one thread loads; it keeps its own (max, sum), so that the loop needs no exchange between
threads and one exponential an element plus one a tile. Lanes meet once, at the end of the row, in
float64. A lane's elements and the order of its sum follow from the row's width and dtype alone, so
a row gives the same bits alone and in a batch, whatever its address.

The loops are bound by instructions. So a term e^((y - max) / T) is formed as in csrc/cuda/vec.cuh,
2^fma(y, factor, -point) with factor = log2(e) / T and point = fl(max factor); what the rounding of
the point did to all terms alike is undone once a row; and what only a rare row or tile needs
(products beyond float32, coefficients that are not finite, the chosen token) is asked once a row or
once a tile.

Imported by the modules named triton.py only, and by those lazily.
"""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LARGEST = tl.constexpr(3.4028234663852886e38)


# --- device: one row ----------------------------------------------------------------------------


@triton.jit
def row_at(base, row, inner, near, far, UNIT: tl.constexpr):
    """Pointer to row `row` (int64: 16384 x 151936 logits already pass 2^31 elements)."""
    return base + ((row // inner) * far + (row % inner) * near) * UNIT


@triton.jit
def wide(x):
    """A scalar argument as float64; the interpreter leaves arguments Python numbers."""
    return tl.zeros([], tl.float64) + x


@triton.jit
def is_active(mask, i):
    """Whether token i is active; a mask of None is all of them."""
    return tl.full([], 1, tl.int1) if mask is None else tl.load(mask + i) != 0


@triton.jit
def exp_ratio(x, cap):
    """exp(-2 |x / cap|), from which both tanh and its slope are made."""
    return tl.exp2(tl.abs(x / cap) * (-2.0 * _LOG2E))


@triton.jit
def capped(x, cap, KIND: tl.constexpr):
    """y = c tanh(z / c) in float32, z without a soft-cap; -inf stays -inf."""
    z = x.to(tl.float32)
    if KIND == 2:
        a = z / cap
        e = exp_ratio(z, cap)
        far_out = (1.0 - e) / (1.0 + e)
        far_out = tl.where(a < 0, -far_out, far_out)
        # near 0 the difference above loses digits: odd polynomial of tanh
        s = a * a
        p = -5.70498872745e-3 * s + 2.06390887954e-2
        p = p * s - 5.37397155531e-2
        p = p * s + 1.33314422036e-1
        p = p * s - 3.33332819422e-1
        near_0 = p * s * a + a
        z = tl.where(z == -_INF, z, cap * tl.where(tl.abs(a) < 0.625, near_0, far_out))
    return z


@triton.jit
def slope(x, cap):
    """1 - tanh^2(x / c), from the logit itself: a rounded tanh has lost a saturated slope."""
    e = exp_ratio(x, cap)
    d = 1.0 + e
    return 4.0 * e / (d * d)


@triton.jit
def load_tile(row, i, col, width, TILE: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Elements i TILE + col of a row; -inf past the end of the row.

    Only the last tile is masked: a mask that ends anywhere forbids vector loads. `width` must be
    the argument itself, which Triton may know to be divisible by 16.
    """
    at = row + i * TILE
    if MASKED:
        return tl.load(at + col, mask=i * TILE + col < width, other=-_INF, eviction_policy=KEEP)
    return tl.load(at + col, eviction_policy=KEEP)


@triton.jit
def store_tile(to, i, col, width, g, TILE: tl.constexpr, MASKED: tl.constexpr):
    at, g = to + i * TILE, g.to(to.dtype.element_ty)
    if MASKED:
        tl.store(at + col, g, mask=i * TILE + col < width)
    else:
        tl.store(at + col, g)


# --- device: exponents in base 2 ----------------------------------------------------------------


@triton.jit
def factor_of(inverse_t):
    return tl.zeros([], tl.float32) + inverse_t * _LOG2E


@triton.jit
def finite_or_0(m):
    """A point to subtract: -inf - -inf would be NaN where there is only nothing to add."""
    return tl.where(m == -_INF, 0.0, m)


@triton.jit
def limit(factor):
    """Up to here the rounding of a point does not show; beyond, only differences are scaled."""
    return tl.minimum(16384.0 / factor, _LARGEST)


@triton.jit
def is_huge(m, factor):
    return (tl.abs(m) > limit(factor)) & (tl.abs(m) < _INF)


@triton.jit
def point_of(m, factor):
    """Where exponents are reckoned from: m factor; 0 for -inf, and for what is next to it."""
    return tl.where(m < -limit(factor), 0.0, m * factor)


@triton.jit
def excess_of(m, factor):
    """What the rounding of the point left out."""
    excess = tl.fma(m, factor, -point_of(m, factor))
    return tl.where(tl.abs(m) > limit(factor), 0.0, excess)


@triton.jit
def shift(frm, to, factor, CAREFUL: tl.constexpr):
    """How far exponents fall, at most 16384, where the max they are reckoned from rises."""
    if CAREFUL:
        by = (frm - finite_or_0(to)) * factor
    else:
        by = point_of(frm, factor) - point_of(to, factor)
    return tl.minimum(tl.maximum(by, -16384.0), 0.0)


@triton.jit
def exponent(y, m, factor, huge):
    """(y - m) factor, whatever their size."""
    return tl.where(huge, (y - m) * factor, tl.fma(y, factor, -point_of(m, factor)))


@triton.jit
def exponents(y, m, factor, CAREFUL: tl.constexpr):
    """(y - m) factor of elements [R, L, V] and points of their lanes [L]; -inf stays -inf."""
    if CAREFUL:
        return (y - finite_or_0(m)[None, :, None]) * factor
    return tl.fma(y, factor, -point_of(m, factor)[None, :, None])


@triton.jit
def lane_max(y):
    return tl.max(tl.max(y, 2), 0)


@triton.jit
def lane_sum(e):
    """Sums of [R, L, V] as [L], in pairs of a fixed order whichever threads hold them."""
    R: tl.constexpr = e.shape[0]
    L: tl.constexpr = e.shape[1]
    V: tl.constexpr = e.shape[2]
    for i in tl.static_range(3):
        if V >> i > 1:
            e = tl.sum(tl.reshape(e, [R * L * (V >> (i + 1)), 2]), 1)
    for i in tl.static_range(5):
        if R >> i > 1:
            e = tl.sum(tl.reshape(e, [2, (R >> (i + 1)) * L]), 0)
    return tl.reshape(e, [L])


@triton.jit
def absorb(m, s, y, factor, CAREFUL: tl.constexpr):
    """(max, sum of 2^exponent) of every lane after one more tile."""
    top = tl.maximum(m, lane_max(y))
    e = tl.exp2(exponents(y, top, factor, CAREFUL))
    return top, s * tl.exp2(shift(m, top, factor, CAREFUL)) + lane_sum(e)


@triton.jit
def lanes_meet(m, s, factor, CAREFUL: tl.constexpr):
    """(max, sum) of the row; the sum in float64, so that no thread layout shows in float32."""
    top = tl.max(m, 0)
    return top, lanes_sum(s * tl.exp2(shift(m, top, factor, CAREFUL)))


@triton.jit
def lanes_sum(s):
    return tl.sum(s.to(tl.float64), 0).to(tl.float32)


@triton.jit
def column(action, width):
    """(id as int32, whether it is one of the row's columns); -1 if it is none."""
    here = (action >= 0) & (action < width)
    return tl.where(here, action, -1).to(tl.int32), here


@triton.jit
def cut(width, action, some, TILE: tl.constexpr):
    """(hit, whole, fast, tiles): a row's tiles are [0, fast), which need no question an element, as
    `inner_tile` counts them, and [fast, tiles), as `edge_tile` counts them: the tile of the chosen
    token and the end of the row. Not `some` is no tile."""
    hit = tl.maximum(action, 0) // TILE
    whole = width // TILE
    fast = tl.where(some, whole - (hit < whole).to(tl.int32), 0)
    return hit, whole, fast, tl.where(some, tl.cdiv(width, TILE), 0)


@triton.jit
def inner_tile(i, hit):
    return i + (i >= hit).to(tl.int32)


@triton.jit
def edge_tile(i, hit, whole):
    return tl.where(i < whole, hit, i)


@triton.jit
def without(y, i, col, action, TILE: tl.constexpr):
    """Tile i without column `action`."""
    return tl.where(i * TILE + col == action, -_INF, y)


@triton.jit
def row_target(
    row,
    width,
    active,
    action,
    here,
    inverse_t,
    cap,
    KIND: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    V: tl.constexpr,
    KEEP: tl.constexpr,
):
    """(max, rest, y_a, the chosen logit) of one row in one read; not `active` reads nothing.

    rest, the sum of e^((y - max) / T) over all tokens but the chosen one, keeps 1 - p exact when p
    is close to 1.
    """
    TILE: tl.constexpr = R * L * V
    col = tl.arange(0, TILE)
    factor = factor_of(inverse_t)
    hit, whole, fast, tiles = cut(width, action, active, TILE)
    m = tl.full([L], -_INF, tl.float32)
    s = tl.zeros([L], tl.float32)
    for i in range(0, fast):
        x = load_tile(row, inner_tile(i, hit), col, width, TILE, False, KEEP)
        m, s = absorb(m, s, tl.reshape(capped(x, cap, KIND), [R, L, V]), factor, False)
    for i in range(fast, tiles):
        t = edge_tile(i, hit, whole)
        y = capped(load_tile(row, t, col, width, TILE, True, KEEP), cap, KIND)
        y = tl.reshape(without(y, t, col, action, TILE), [R, L, V])
        m, s = absorb(m, s, y, factor, False)
    others, rest = lanes_meet(m, s, factor, False)
    if is_huge(others, factor):
        m = tl.full([L], -_INF, tl.float32)
        s = tl.zeros([L], tl.float32)
        for i in range(0, tiles):
            y = capped(load_tile(row, i, col, width, TILE, True, KEEP), cap, KIND)
            y = tl.reshape(without(y, i, col, action, TILE), [R, L, V])
            m, s = absorb(m, s, y, factor, True)
        others, rest = lanes_meet(m, s, factor, True)
    x_a = tl.load(row + action, mask=here & active, other=-_INF).to(tl.float32)
    y_a = capped(x_a, cap, KIND)
    top, rest = with_chosen(others, rest, y_a, factor, excess_of(others, factor))
    return top, rest, y_a, x_a


@triton.jit
def with_chosen(others, rest, y_a, factor, excess):
    """(max of the row, `rest` at it) from the max of the others and `rest` at its point."""
    top = tl.maximum(others, y_a)
    d = others - top
    by = d * factor  # in two parts
    off = (tl.where(by > -1000.0, tl.fma(d, factor, -by), 0.0) - excess) * _LN2
    return top, tl.where(rest == 0, 0.0, rest * tl.exp2(by) * (1.0 + off * (1.0 + 0.5 * off)))


@triton.jit
def log_total(top, rest, y_a, inverse_t):
    """log(rest + e^((y_a - max) / T)) in float64, exact relative to a small rest."""
    r = rest.to(tl.float64)
    e = tl.exp2((y_a - top) * factor_of(inverse_t)).to(tl.float64)
    total = r + e
    lost = (r - (total - e)).to(tl.float32)
    return tl.log(total) + (lost / total.to(tl.float32)).to(tl.float64)


@triton.jit
def logprob_of(top, rest, y_a, here, inverse_t):
    """log pi = (y_a - max) / T - log sum in float64; NaN for an id that is no column of the row,
    and where the row's max is not finite."""
    x = (y_a.to(tl.float64) - top.to(tl.float64)) * wide(inverse_t)
    logprob = x - log_total(top, rest, y_a, inverse_t)
    return tl.where(here & (tl.abs(top) < _INF), logprob, float("nan"))
