# SPDX-License-Identifier: Apache-2.0
"""The LM head over chunks of tokens, forward and backward.

On Hopper the products of a bfloat16 head are our own (csrc/cuda/gemm.cuh): one sums up rows while
their logits are in registers, in float32, and stores exponentials in their place where a gradient
follows, which is then plain products of them; one adds the weight's gradient into its float32 sum;
one scales and narrows the hidden states' gradient, which at other sizes is the library's.
Everywhere else all products are the library's and row kernels run between them.

A chunk's logits fit in `chunk_bytes` and live in one buffer, which the row kernels read and, where
a gradient is made, overwrite with it. No tensor of size tokens x vocabulary ever exists. The
gradient of the weight is summed over the chunks in float32: the error of rounding each chunk's to
16 bits would grow with their number.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from klq_kernels import _checks as check
from klq_kernels._dispatch import operator
from klq_kernels._extension import BUILD_INFO
from klq_kernels._linear import Rows
from klq_kernels._linear_cut import (
    OWN_TILE,
    TILE,
    along_rows,
    chunks,
    copyable,
    multiplies,
    needs_space,
    own_hidden,
    pitch,
    spaced,
)

HALVES = (torch.float16, torch.bfloat16)
SLICE_BYTES = 16 << 20  # of float32 copies, where a product takes its operands in float32
SUM_BYTES = 32 << 20  # of what is on its way: sums into 16 bits, rows' results, scaled rows


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether our own product was built for `device`, which may be a fake one."""
    built = device.type == "cuda" and "9.0a" in BUILD_INFO["archs"] and torch.cuda.is_available()
    return built and torch.cuda.get_device_capability(device)[0] == 9


def ours(backend: str, hidden: Tensor, weight: Tensor) -> bool:
    """Whether our own products take this head: by device, type and layout of the weight, never by
    the number of tokens, so that log-probs of one model always come the same way; nor by memory, so
    that fakes know what is kept."""
    return (
        backend != "triton"
        and hidden.dtype == torch.bfloat16  # of float16 the exponentials would overflow
        and is_hopper(hidden.device)
        and along_rows(weight)
    )


def sharded_logits(
    backend: str, hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None, shard
) -> torch.dtype | None:
    """A vocabulary over ranks takes the library's product, which must not round logits either where
    our own would not: the sharded result is the unsharded one."""
    narrow = shard is not None and logits_dtype != torch.float32
    return torch.float32 if narrow and ours(backend, hidden, weight) else logits_dtype


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b or, with `add`, out += a @ b; a float32 `out` of 16-bit operands is never rounded
    on its way (CUDA)."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


class Head:
    """hidden @ weight.T + bias for the tokens of one call that meet the head, chunk by chunk:

    for part in head.parts():
        logits = head.logits(part)
        ...                           # a row kernel, which may write the gradient over them
        head.backward(part, dlogits)
    dh, dw, db = head.gradients()
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        logits_dtype: torch.dtype | None,
        chunk_bytes: int | None,
        needs: tuple[bool, bool, bool] = (False, False, False),
        backend: str | None = None,  # None: row kernels must see the logits
    ):
        self.tokens, self.rows = hidden.shape[0], rows
        self.hidden, self.weight, self.bias = rows.take(hidden), weight, bias
        self.ours = backend is not None and ours(backend, hidden, weight)
        if self.ours:  # a row's factor, if poisoned, makes NaN of all its gradients
            self.hidden, self.weight = copyable(self.hidden), copyable(weight)
        else:  # and here every logit, and dW, which is too large to be passed over
            self.hidden = spaced(rows.poison(self.hidden))
        self.count = self.hidden.shape[0]
        # of what a chunk is stored as: in place of logits, exponentials of 16 bits
        self.dtype = hidden.dtype if self.ours else logits_dtype or hidden.dtype
        self.chunk_bytes = chunk_bytes
        self.need_hidden, self.need_weight, self.need_bias = needs
        half = hidden.dtype in HALVES
        # float32 gradients of bfloat16 products are narrowed; of float16 they would flush to zero
        self.narrowed = half and self.dtype != hidden.dtype and hidden.dtype != torch.float16
        self.bytes_a_logit = self.dtype.itemsize
        if self.narrowed and any(needs):
            self.bytes_a_logit += hidden.dtype.itemsize
        self.buffer = None
        self.dhidden = self.dweight = self.dbias = None
        self.chosen: list[tuple[Tensor, Tensor, Tensor]] = []  # of chunks: actions, scale, own
        self.safe: tuple[slice, Tensor] | None = None
        self.whole = False  # ranks that do not know each other's widths must cut alike: not at all

    def parts(self, first: int = 0, end: int | None = None) -> Iterator[slice]:
        end = self.count if end is None else end
        if self.whole:
            return iter([slice(first, end)] if end > first else [])
        bytes_a_row = self.weight.shape[0] * self.bytes_a_logit
        return chunks(first, end, bytes_a_row, self.chunk_bytes, OWN_TILE if self.ours else TILE)

    def rows_of(self, part: slice) -> Tensor:
        """Hidden rows of a chunk; NaN in inactive ones must meet neither product."""
        if self.rows.mask is None:
            return self.hidden[part]
        if self.safe is None or self.safe[0] != part:
            use = self.rows.mask[part].unsqueeze(-1)
            self.safe = part, spaced(torch.where(use, self.hidden[part], 0.0))
        return self.safe[1]

    def mask(self, part: slice) -> Tensor | None:
        return None if self.rows.mask is None else self.rows.mask[part]

    def logits(self, part: slice, out: Tensor | None = None) -> Tensor:
        """Logits of a chunk, in `out` or in the buffer until the next call."""
        h, w, b = self.rows_of(part), self.weight, self.bias
        out = self.room(part) if out is None else out
        if out.dtype != h.dtype and not h.is_cuda:
            h = h.float()
            for s in self.slices():
                torch.mm(h, w[s].float().T, out=out[:, s])
        else:
            product(h, w.T, out)
        return out if b is None else out.add_(b)

    def room(self, part: slice) -> Tensor:
        """The buffer, as long as a chunk."""
        rows, vocabulary = part.stop - part.start, self.weight.shape[0]
        if self.buffer is None:  # the first chunk is the longest
            width = pitch(vocabulary, self.weight.is_cuda)
            self.buffer = self.weight.new_empty((rows, width), dtype=self.dtype)
            if not self.weight.is_cuda:  # `spaced`, without a copy
                self.buffer[:, vocabulary:].zero_()
        return self.buffer[:rows, :vocabulary]

    def parts_to_sum(self, first: int = 0, end: int | None = None) -> Iterator[slice]:
        """Chunks for our product where their logits need no room."""
        tiles = self.weight.shape[0] // 192 + 1  # csrc/cuda/linear_rows_kernel.cu
        return chunks(first, self.count if end is None else end, tiles * 12, SUM_BYTES, OWN_TILE)

    def parts_to_scale(self, end: int) -> Iterator[slice]:
        """Chunks of kept exponentials for the backward: their scaled hidden states need room."""
        return chunks(0, end, self.weight.shape[1] * self.hidden.itemsize, SUM_BYTES, OWN_TILE)

    def sums(
        self,
        part: slice,
        actions: Tensor,
        t: float,
        cap: float,
        entropy: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, row_stats, entropy or an empty tensor) of a chunk, from logits that are never
        rounded. With row_stats (factor, own, reference), factor x `out` is the gradient of the
        log-probs by the logits, and own what `out` is at the action before it is rounded
        (csrc/cuda/linear_rows.h)."""
        # without products to come, a row of NaN stays in its row
        h = self.hidden[part] if out is None else self.rows_of(part)
        use, linear_rows_ = self.mask(part), operator("cuda", "linear_rows_")
        return linear_rows_(h, self.weight, self.bias, actions, use, t, cap, entropy, out)

    def dlogits(
        self, part: slice, actions: Tensor, grad: Tensor, row_stats: Tensor, t: float, cap: float
    ) -> Tensor:
        """The gradient of the logits, in the buffer, given that of the log-probs."""
        factors, own, reference = row_stats
        head, out = (self.rows_of(part), self.weight, self.bias), self.room(part)
        linear_dlogits_ = operator("cuda", "linear_dlogits_")
        linear_dlogits_(out, *head, actions, grad * factors, own, reference, t, cap)
        return out

    def slices(self) -> Iterator[slice]:
        """Of the vocabulary, for what needs float32 copies of the operands."""
        widest = max(self.weight.shape[1], self.hidden.shape[0])
        step = max(1, SLICE_BYTES // (4 * widest))
        for start in range(0, self.weight.shape[0], step):
            yield slice(start, start + step)

    def times_weight(self, x: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
        """out = x @ weight, or scale x that, through float32: of a few rows cuBLAS adds up partial
        sums in the result's type."""
        width = self.weight.shape[1]
        for part in chunks(0, len(x), 4 * width, SUM_BYTES):
            wide = x.new_empty((part.stop - part.start, width), dtype=torch.float32)
            product(x[part], self.weight, wide)
            if scale is None:
                out[part] = wide
            else:
                torch.mul(wide, scale[part], out=out[part])

    def backward(self, part: slice, dlogits: Tensor) -> None:
        """Adds a chunk's gradients to those of hidden, weight and bias that are wanted."""
        h, w, first = self.rows_of(part), self.weight, part.start == 0
        if self.need_bias:
            db = dlogits.sum(0, dtype=check.wide(dlogits))
            self.dbias = db if first else self.dbias.add_(db)
        if self.narrowed:
            dlogits = dlogits.to(h.dtype)
        wide = dlogits.dtype != h.dtype  # a float16 head
        if self.need_hidden:
            if first:
                self.dhidden = dlogits.new_empty(self.hidden.shape)
            if self.ours:
                self.hidden_product(part, dlogits)
            elif wide:
                dh = self.dhidden[part].zero_()
                for s in self.slices():
                    dh.addmm_(dlogits[:, s], w[s].float())
            elif w.dtype in HALVES and w.is_cuda:
                self.times_weight(dlogits, self.dhidden[part])
            else:
                # in the buffer zeros lie between the rows; others are copied, some at a time
                copied = needs_space(dlogits) and dlogits.stride(0) == dlogits.shape[1]
                few = chunks(0, len(dlogits), w.shape[0] * w.itemsize, SLICE_BYTES)
                for s in few if copied else [slice(None)]:
                    x = spaced(dlogits[s]) if copied else dlogits
                    torch.mm(x, w, out=self.dhidden[part][s])
        if self.need_weight:
            half = w.dtype in HALVES
            if first:
                # the one chunk's product is rounded once, as if it had been summed in float32
                alone = half and not wide and part.stop == self.count
                alone = alone and (h.is_cuda or multiplies(h.dtype))
                self.dweight = w.new_empty(w.shape, dtype=w.dtype if alone else check.wide(w))
            if self.ours:
                operator("cuda", "linear_weight_")(self.dweight, dlogits, h, not first, None, None)
            elif wide or (half and not h.is_cuda and self.dweight.dtype != w.dtype):
                h = h.float()
                for s in self.slices():
                    product(dlogits[:, s].T.float(), h, self.dweight[s], not first)
            else:
                product(dlogits.T, h, self.dweight, not first)

    def hidden_product(self, part: slice, x: Tensor, scale: Tensor | None = None) -> None:
        """dH of a chunk: x @ weight, or scale x that."""
        if own_hidden(len(x), self.weight.shape[1], x.device):
            operator("cuda", "linear_hidden_")(self.dhidden[part], x, self.weight, scale)
        else:
            wide = None if scale is None else scale.unsqueeze(-1)
            self.times_weight(x, self.dhidden[part], wide)

    def backward_scaled(
        self,
        part: slice,
        e: Tensor,
        scale: Tensor,
        own: Tensor,
        actions: Tensor,
        end: int | None = None,  # of the last part that comes this way; None: of all rows
    ) -> None:
        """Adds the gradients of dlogits = scale x e. dW takes the scale to the hidden states, one
        rounding more than a stored gradient has, and db one; which is mended where it shows: in the
        rows of the actions (csrc/cuda/linear_weight.h)."""
        w, first = self.weight, part.start == 0
        if self.need_hidden:
            if self.dhidden is None:
                self.dhidden = torch.empty_like(self.hidden)
            self.hidden_product(part, e, scale)
        if self.need_bias:
            # a column sum as a product that reads e once: the scale in three 16-bit pieces
            pieces, left = [], scale
            for _ in range(3):
                pieces.append(left.to(e.dtype))
                left = left - pieces[-1].float()
            zero = torch.zeros_like(pieces[0])
            db = e.new_empty((len(w), 8), dtype=torch.float32)
            product(e.T, torch.stack([*pieces, *[zero] * 5], 1), db)
            self.dbias = db.sum(1) if first else self.dbias.add_(db.sum(1))
        if self.need_weight or self.need_bias:
            self.chosen.append((actions, scale, own))
        end = self.count if end is None else end
        if self.need_weight and first and part.stop == self.count and self.count <= len(w) // 4:
            # one chunk: its sum needs no float32 memory, only what is missing in it does
            extra = w.new_empty((self.count, w.shape[1]), dtype=torch.float32)
            slots = self.add_chosen(extra, apart=True)
            self.dweight = torch.empty_like(w, memory_format=torch.contiguous_format)
            self.weight_product(part, e, scale, slots, extra)
            return
        if self.need_weight:
            if first:
                self.dweight = w.new_empty(w.shape, dtype=torch.float32)
            for some in chunks(part.start, part.stop, w.shape[1] * e.itemsize, SUM_BYTES):
                here = slice(some.start - part.start, some.stop - part.start)
                self.weight_product(some, e[here], scale[here])
        if part.stop == end and self.chosen:
            self.add_chosen(self.dweight)

    def weight_product(self, part: slice, e: Tensor, scale: Tensor, *extra: Tensor) -> None:
        """dW of some rows; what is extra comes with the only ones."""
        h = self.rows_of(part)
        if self.rows.mask is None:
            scaled = torch.empty_like(h)
        else:  # h is a copy
            scaled, self.safe = h, None
        torch.mul(h, scale.unsqueeze(-1), out=scaled)
        add = part.start > 0
        operator("cuda", "linear_weight_")(self.dweight, e, scaled, add, *(extra or (None, None)))

    def add_chosen(self, out: Tensor | None, apart: bool = False) -> Tensor:
        """Of all chunks so far, into their sums, or dW's apart, by first token; which that is of
        each action."""
        one = len(self.chosen) == 1
        rest = self.chosen[0] if one else map(torch.cat, zip(*self.chosen, strict=True))
        actions, *rest = rest
        slots = actions.new_empty((2, len(self.weight)), dtype=torch.int32)
        hidden, bias = self.hidden[: len(actions)], self.dbias if self.need_bias else None
        operator("cuda", "linear_chosen_")(out, slots, hidden, actions, *rest, apart, bias)
        return slots

    def gradients(self, *, keep_wide: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(dH, dW, db), empty where not wanted; dH of all tokens. In the dtypes of hidden, weight
        and bias, or with `keep_wide` in those they were made in."""
        self.buffer = None
        out = []
        needs = self.need_hidden, self.need_weight, self.need_bias
        like = self.hidden, self.weight, self.bias
        for name, x, need in zip(("dhidden", "dweight", "dbias"), like, needs, strict=True):
            grad = getattr(self, name)
            setattr(self, name, None)
            if not need:
                grad = self.weight.new_empty(0)
            elif grad is None:  # no token at all
                dtype = check.wide(x) if keep_wide else x.dtype
                grad = self.rows.poison(x.new_zeros(x.shape, dtype=dtype))
            elif not keep_wide:
                grad = grad.to(x.dtype)
            out.append(grad)
        if self.need_hidden:
            out[0] = self.rows.put(out[0], self.tokens)
        out[2] = self.rows.poison(out[2])  # a banned token's is 0 of any logits
        return tuple(out)


@torch.library.register_fake("klq::linear_rows_")
def _(hidden, weight, bias, actions, mask, t, cap, entropy, out):
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return rows, rows.new_empty((3, *rows.shape)), rows.new_empty(rows.shape if entropy else (0,))


@torch.library.register_fake("klq::linear_dlogits_")
def _(out, hidden, weight, bias, actions, scale, own, reference, t, cap):
    return None


@torch.library.register_fake("klq::linear_hidden_")
def _(out, dlogits, weight, scale):
    return None


@torch.library.register_fake("klq::linear_weight_")
def _(out, dlogits, hidden, add, slots, extra):
    return None


@torch.library.register_fake("klq::linear_chosen_")
def _(out, slots, hidden, actions, scale, own, apart, bias):
    return None


@torch.library.register_fake("klq::klq_loss_tokens")
def _(logprobs, values, ref_logprobs, returns, tau, mask, weights, normalizer):
    tokens = [logprobs.new_empty(logprobs.shape[0]) for _ in range(2)]
    return logprobs.new_empty(()), logprobs.new_empty(4), *tokens
