# SPDX-License-Identifier: Apache-2.0
"""How the LM head's work is cut: chunks of tokens, tiles of products; and what products ask of
memory and of the processor."""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, cpu

DEFAULT_CHUNK_BYTES = 512 << 20
AMX_TILE = 32  # columns
TILE = 128  # rows of a matrix product's tile: a chunk that ends inside one pays for all of it
OWN_TILE = 256  # of our own products


def along_rows(x: Tensor) -> bool:
    """What the copy engine asks of a matrix: rows of whole 16 bytes, at multiples of 16 bytes of
    the memory it is part of."""
    whole = x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return whole and x.stride(1) == 1 and x.storage_offset() % 8 == 0


def copyable(x: Tensor) -> Tensor:
    """x, or a copy where the copy engine cannot read it."""
    fit = along_rows(x) and x.data_ptr() % 16 == 0
    return x if fit else x.clone(memory_format=torch.contiguous_format)


def pitch(vocabulary: int, cuda: bool) -> int:
    """Logits from row to row: on a GPU rows of 16 bits begin at multiples of 16 bytes; on a CPU
    they are whole tiles of oneDNN's AMX product, which reads them whole."""
    tile = 8 if cuda else AMX_TILE
    return -(-vocabulary // tile) * tile


def needs_space(x: Tensor) -> bool:
    """Whether x [n, k] as a left factor wants zeros behind its rows: oneDNN's AMX product of
    bfloat16 multiplies what follows a row, up to a whole tile, by 0; a NaN would stay one."""
    return not x.is_cuda and x.dtype == torch.bfloat16 and x.shape[1] % AMX_TILE != 0


def spaced(x: Tensor) -> Tensor:
    """x, or a copy with zeros behind its rows where a product needs them."""
    if not needs_space(x):
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % AMX_TILE))[:, : x.shape[1]]


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of these 16-bit numbers; where it does not, their
    product takes several times as long as one through float32."""
    asked = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(cpu, name, lambda: False)() for name in asked[dtype])


def chunks(
    first: int, end: int, bytes_a_row: int, chunk_bytes: int | None, tile: int = TILE
) -> Iterator[slice]:
    """Slices of first:end of at most chunk_bytes, nearly equal and of whole tiles if they may, be
    it for one slice more."""
    rows = end - first
    fit = max(1, (chunk_bytes or DEFAULT_CHUNK_BYTES) // bytes_a_row)
    least = max(1, -(-rows // fit))
    equal = max(1, -(-rows // least))
    sizes = [-(-equal // tile) * tile, fit // tile * tile, -(-equal // TILE) * TILE, equal]
    size = next(n for n in sizes if 0 < n <= fit and -(-rows // n) <= least + 1)
    for start in range(first, end, size):
        yield slice(start, min(start + size, end))


@cache
def clusters(device: torch.device) -> int:
    """Pairs of multiprocessors, on which our product runs a tile at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2


def fills(down: float, across: float, slots: int) -> float:
    """The share of the slots that the tiles of a product keep at work, until the last is done."""
    tiles = math.ceil(down) * math.ceil(across)
    return down * across / (slots * math.ceil(tiles / slots))


def own_hidden(rows: int, width: int, device: torch.device) -> bool:
    """Whether dH of a chunk is our own product: where its tiles come out even on the device and the
    library's, 256 x 128 and one a multiprocessor, do not."""
    n = clusters(device)
    own = fills(width / 256, rows / 192, n)
    return own > 0.9 and own > fills(rows / 256, width / 128, 2 * n)
