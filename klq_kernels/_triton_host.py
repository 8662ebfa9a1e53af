# SPDX-License-Identifier: Apache-2.0
"""The host side of the Triton twins: launches, layouts of rows, sizes of tiles. Needs no Triton."""

import torch


def hip_warps(num_warps: int) -> int:
    """As many threads in AMD's wavefronts, which are 64 lanes wide."""
    return max(1, num_warps // 2)


def launch(kernel, programs: int, like: torch.Tensor, *args, num_warps: int, **meta) -> None:
    """Enqueues `kernel` on the current stream of `like`'s device; nothing to do is no launch.

    FP fusion is off: a product that is fused into a difference in one kernel and not in another
    would round policy and reference, or a tile and its chosen element, differently.
    """
    if programs == 0:
        return
    meta["num_warps"] = hip_warps(num_warps) if torch.version.hip else num_warps
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


def tile(width: int, kind: int, most_warps: int, rounds: int, dtype) -> tuple[int, ...]:
    """(R, L, V, warps) for rows of `width`: V elements are 16 bytes, one where the width forbids
    vector loads.

    Half the rounds where an element takes more registers: for a soft-cap, and for a width that
    needs an address an element.
    """
    rounds = max(1, rounds >> ((width % 8 != 0) + (kind == 2)))
    block = max(128, power_of_2(width))
    warps = min(most_warps, max(1, block // (256 * rounds)))
    lanes = min(block, 256 * warps)
    rounds, vector = min(rounds, block // lanes), 1 if width % 8 else 16 // dtype.itemsize
    if vector == 4:  # float32: as many bytes a thread
        rounds, lanes = rounds * 2, lanes // 2
    return rounds, lanes // vector, vector, warps


def scaling(temperature: float, softcap: float) -> tuple[float, float, int]:
    """(1 / T, c, kind) with kind 0 none, 1 temperature, 2 soft-cap as well."""
    kind = 2 if softcap else int(temperature != 1.0)
    return 1.0 / temperature, softcap or 1.0, kind


def compact(x: torch.Tensor | None) -> torch.Tensor | None:
    """A small per-token or per-sequence input as a contiguous array; kernels convert its dtype."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def like(x: torch.Tensor, shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.new_empty(shape, dtype=dtype)
