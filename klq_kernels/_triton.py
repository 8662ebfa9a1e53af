# SPDX-License-Identifier: Apache-2.0
"""What the Triton twins share: rows of logits read where they lie, one pass of online softmax, the
gradient of a tile, and the launch.

A program walks a row in tiles [R, C]: R elements of each of C lanes. Every lane keeps its own
(max, sum), so that the loop needs no exchange between threads and one exponential an element plus
one in R; lanes meet once, at the end of the row, in float64. A lane's elements follow from V alone,
so a row gives the same bits alone and in a batch, whatever its address.

Imported by the modules named triton.py only, and by those lazily.
"""

import torch
import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
MOST_WARPS_HIP = 16  # AMD's wavefronts are 64 lanes wide, and a workgroup ends at 1024


# --- host: launches, layouts, tiles ------------------------------------------------------------


def launch(kernel, programs: int, like: torch.Tensor, *args, num_warps: int, **meta) -> None:
    """Enqueues `kernel` on the current stream of `like`'s device; nothing to do is no launch.

    FP fusion is off: a product that is fused into a difference in one kernel and not in another
    would round policy and reference, or a tile and its chosen element, differently.
    """
    if programs == 0:
        return
    meta["num_warps"] = min(num_warps, MOST_WARPS_HIP) if torch.version.hip else num_warps
    meta["enable_fp_fusion"] = False
    if like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


def rows_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    """(inner, inner stride, outer stride, unit) of [..., V]: row i begins
    unit ((i // inner) outer + (i % inner) inner) elements after the data pointer.

    unit is 8 where every row may be read in aligned vectors, if the pointer is aligned.
    """
    width = x.shape[-1]
    if x.is_contiguous():
        inner, near, far = max(1, x.numel() // width), width, 0
    else:
        inner, near, far, groups, follows = 1, 0, 0, 0, None
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if stride != follows:
                groups += 1
                near, far = (stride, far) if groups == 1 else (near, stride)
            if groups == 1:
                inner *= size
            follows = stride * size
        if groups > 2 or (width > 1 and x.stride(-1) != 1 and x.numel() > 0):
            raise RuntimeError("klq_triton: rows need unit stride and at most two leading strides")
    unit = 8 if (near | far) % 8 == 0 else 1
    return inner, near // unit, far // unit, unit


def tiles_of(n: int, size: int) -> int:
    """n / size rounded up; Triton's own helpers cost microseconds a call on the host."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tile(width: int, kind: int, most_warps: int, rounds: int) -> tuple[int, int, int]:
    """(R, C, warps) for rows of `width`: 8 elements of each of `rounds` vectors a thread.

    Half the rounds where an element takes more registers: for a soft-cap, and for a width that
    forbids vector loads and so needs an address an element.
    """
    rounds = max(1, rounds >> ((width % 8 != 0) + (kind == 2)))
    block = max(128, power_of_2(width))
    warps = min(most_warps, max(1, block // (256 * rounds)))
    lanes = min(block, 256 * warps)
    return min(rounds, block // lanes), lanes, warps


def scaling(temperature: float, softcap: float) -> tuple[float, float, int]:
    """(1 / T, c, kind) with kind 0 none, 1 temperature, 2 soft-cap as well."""
    kind = 2 if softcap else int(temperature != 1.0)
    return 1.0 / temperature, softcap or 1.0, kind


def compact(x: torch.Tensor | None) -> torch.Tensor | None:
    """A small per-token or per-sequence input as a contiguous array; kernels convert its dtype."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def like(x: torch.Tensor, shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.new_empty(shape, dtype=dtype)


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
    return tl.exp(tl.abs(x / cap) * -2.0)


@triton.jit
def scaled(x, inverse_t, cap, KIND: tl.constexpr):
    """z' = c tanh(z / c) / T in float32; -inf stays -inf."""
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
        y = cap * tl.where(tl.abs(a) < 0.625, near_0, far_out) * inverse_t
        z = tl.where(z == -_INF, z, y)
    elif KIND == 1:
        z = z * inverse_t
    return z


@triton.jit
def load_tile(
    row, i, width, R: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr
):
    """Tile i of a row, [R, C], and its columns; -inf past the end of the row.

    Only the last tile is masked: a mask that ends anywhere forbids vector loads. `width` must be
    the argument itself, which Triton may know to be divisible by 16.
    """
    col = i * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    if MASKED:
        x = tl.load(row + col, mask=col < width, other=-_INF, eviction_policy=KEEP)
    else:
        x = tl.load(row + col, eviction_policy=KEEP)
    return x, col


@triton.jit
def finite_or_0(m):
    """A point to subtract: -inf - -inf would be NaN where there is only nothing to add."""
    return tl.where(m == -_INF, 0.0, m)


@triton.jit
def absorb(m, s, z, skip):
    """(max, sum of exp(z - max)) of every lane after one more tile; `skip` adds nothing."""
    top = tl.maximum(m, tl.max(z, 0))
    point = finite_or_0(top)
    e = tl.exp(tl.where(skip, -_INF, z) - point[None, :])
    return top, s * tl.exp(m - point) + tl.sum(e, 0)


@triton.jit
def lanes_meet(m, s):
    """(max, sum) of the row; the sum in float64, so that no thread layout shows in float32."""
    top = tl.max(m, 0)
    return top, tl.sum((s * tl.exp(m - finite_or_0(top))).to(tl.float64), 0)


@triton.jit
def column(action, width):
    """(id as int32, whether it is one of the row's columns); -1 if it is none."""
    here = (action >= 0) & (action < width)
    return tl.where(here, action, -1).to(tl.int32), here


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
    C: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """(max, rest, z_a, the chosen logit) of one row in one read; not `active` reads nothing.

    rest leaves the chosen token out of the sum, which keeps 1 - p exact when p is close to 1.
    """
    m = tl.full([C], -_INF, tl.float32)
    s = tl.zeros([C], tl.float32)
    whole = tl.where(active, width // (R * C), 0)
    for i in tl.range(0, whole, num_stages=STAGES):
        x, col = load_tile(row, i, width, R, C, False, KEEP)
        m, s = absorb(m, s, scaled(x, inverse_t, cap, KIND), col == action)
    for i in range(whole, tl.where(active, tl.cdiv(width, R * C), 0)):
        x, col = load_tile(row, i, width, R, C, True, KEEP)
        m, s = absorb(m, s, scaled(x, inverse_t, cap, KIND), col == action)
    top, rest = lanes_meet(m, s)
    x_a = tl.load(row + action, mask=here & active, other=-_INF)
    return top, rest.to(tl.float32), scaled(x_a, inverse_t, cap, KIND), x_a.to(tl.float32)


@triton.jit
def log1p(x):
    """log(1 + x) in float64: exact relative to x, however small."""
    y = 1.0 + x
    off = tl.where(y == 1.0, 1.0, y - 1.0)
    return tl.where(y == 1.0, x, tl.log(y) * (x / off))


@triton.jit
def logprob_of(top, rest, z_a, here):
    """log pi = (z_a - max) - log sum in float64; NaN for an id that is no column of the row, and
    where the row's max is not finite."""
    x = z_a.to(tl.float64) - top.to(tl.float64)
    r = rest.to(tl.float64)
    total = r + tl.exp(x.to(tl.float32)).to(tl.float64)
    log_sum = tl.where(z_a == top, log1p(r), tl.log(total))
    return tl.where(here & (tl.abs(top) < _INF), x - log_sum, float("nan"))


@triton.jit
def gradient_factors(coefficient, top, rest, z_a, x_a, inverse_t, cap, KIND: tl.constexpr):
    """What `write_gradient` needs of a row: the factor of exp(z - max), and the chosen entry."""
    r = rest.to(tl.float64)
    share = coefficient * wide(inverse_t) / (r + tl.exp(z_a - top).to(tl.float64))
    chosen = (share * r).to(tl.float32)
    if KIND == 2:
        chosen = chosen * slope(x_a, cap)
    return (-share).to(tl.float32), tl.where(z_a == -_INF, 0.0, chosen)


@triton.jit
def slope(x, cap):
    """1 - tanh^2(x / c), from the logit itself: a rounded tanh has lost a saturated slope."""
    e = exp_ratio(x, cap)
    d = 1.0 + e
    return 4.0 * e / (d * d)


@triton.jit
def write_gradient(
    row,
    to,
    i,
    width,
    active,
    action,
    top,
    share,
    chosen,
    inverse_t,
    cap,
    KIND: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """coefficient (onehot - softmax) dz/dlogits of tile i; `to` may be the row itself.

    Banned tokens get 0 by select. Tiles of inactive rows are MASKED: not read, and written as 0.
    """
    col = i * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    inside = col < width
    if MASKED:
        # a select: the interpreter gives `inside & active` the dtype of what `active` compared
        keep = tl.where(active, inside, False)
        x = tl.load(row + col, mask=keep, other=-_INF, eviction_policy="evict_first")
    else:
        x = tl.load(row + col, eviction_policy="evict_first")
    z = scaled(x, inverse_t, cap, KIND)
    g = tl.exp(z - top) * share
    if KIND == 2:
        g = g * slope(x.to(tl.float32), cap)
    g = tl.where(col == action, chosen, tl.where(z == -_INF, 0.0, g))
    if MASKED:
        g = tl.where(active, g, 0.0).to(to.dtype.element_ty)
        tl.store(to + col, g, mask=inside, eviction_policy="evict_first")
    else:
        tl.store(to + col, g.to(to.dtype.element_ty), eviction_policy="evict_first")
