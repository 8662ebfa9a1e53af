# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel rows: every rank holds a slice of the vocabulary.

One collective moves three floats a row and rank, (max, sum of exponentials without the target's
term, target logit); from their merge each rank forms the global log-prob and its own slice of the
gradient.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from klq_kernels._autograd import first_order
from klq_kernels._dispatch import operator


class Shard(NamedTuple):
    """This rank's slice [start, start + size) of the vocabulary (`vocabulary` None: unknown)."""

    group: dist.ProcessGroup
    start: int
    size: int
    vocabulary: int | None

    def local(self, actions: Tensor) -> Tensor:
        """Ids relative to the slice; -1 where another rank owns the token."""
        ids = actions.long() - self.start
        return torch.where((ids >= 0) & (ids < self.size), ids, -1)


def several(op: str, tp_group):
    """`tp_group`, or None where one rank holds the whole vocabulary and nothing is to be merged."""
    if tp_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{op}: tp_group needs an initialised process group; "
            "call torch.distributed.init_process_group first"
        )
    group = tp_group[0] if isinstance(tp_group, tuple) else tp_group
    return None if dist.get_world_size(group) == 1 else tp_group


def shard(tp_group, size: int) -> Shard:
    """`tp_group` is (group, vocab_start), or a group alone for equal slices in rank order."""
    if isinstance(tp_group, tuple):
        group, start = tp_group
        return Shard(group, int(start), size, None)
    world, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    return Shard(tp_group, rank * size, size, world * size)


def shard_of(op: str, tp_group, size: int) -> Shard | None:
    """This rank's slice, None where one rank holds the whole vocabulary."""
    tp_group = several(op, tp_group)
    return None if tp_group is None else shard(tp_group, size)


def local(shard: Shard | None, actions: Tensor) -> Tensor:
    return actions if shard is None else shard.local(actions)


def complete(grads: tuple[Tensor, Tensor, Tensor], shard: Shard | None):
    """(dH, dW, db) with dH summed over the ranks: each made its slice's part of it."""
    if shard is not None and grads[0].numel():
        dist.all_reduce(grads[0], group=shard.group)
    return grads


def local_rows(logits, ids, mask, temperature, softcap, backend) -> Tensor:
    """(max, rest, z_a) of this rank's slice, [3, ...]; z_a is -inf where it is elsewhere."""
    if backend != "reference":
        return operator(backend, "token_logprobs")(logits, ids, mask, temperature, softcap)[1]
    from klq_kernels.token_logprobs.reference import scaled, select_rows

    z = scaled(select_rows(logits, mask), temperature, softcap or None)
    owned = ids >= 0
    z_a = z.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~owned, -torch.inf)
    largest = z.amax(-1)
    safe = largest.masked_fill(largest == -torch.inf, 0.0)
    e = (z - safe.unsqueeze(-1)).exp()
    e = e.scatter(-1, ids.clamp(min=0).unsqueeze(-1), torch.where(owned, 0.0, e[..., 0])[..., None])
    return torch.stack([largest, e.sum(-1), z_a])


def merge(rows: Tensor, ids: Tensor, mask: Tensor | None, group) -> tuple[Tensor, Tensor]:
    """Log-probs and the global (max, rest, z_a) from every rank's local ones, formed in float64 as
    the kernels do, so that one rank gives their bits."""
    packed = rows.clone()
    packed[2] = packed[2].masked_fill(ids < 0, torch.nan)  # NaN = owned elsewhere
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, packed, group=group)
    largest, rest, z_a = torch.stack(parts, 1).double()  # each [ranks, ...]
    top = largest.amax(0)
    scale = torch.where(largest == -torch.inf, 0.0, (largest - top).exp())
    owned = ~z_a.isnan()
    z_a = torch.where(owned, z_a, -torch.inf).amax(0).masked_fill(~owned.any(0), torch.nan)
    # a slice far below the top adds nothing, but a NaN in it is not lost
    rest = torch.where((scale == 0) & ~rest.isnan(), 0.0, rest * scale).sum(0)
    chosen = (z_a - top).exp()
    logprobs = torch.where(z_a == top, -rest.log1p(), (z_a - top) - (rest + chosen).log())
    if mask is not None:
        logprobs = torch.where(mask, logprobs, 0.0)
    return logprobs.to(rows.dtype), torch.stack([top, rest, z_a]).to(rows.dtype)


def local_gradient(grad, logits, ids, mask, row_stats, temperature, softcap, backend) -> Tensor:
    """This rank's slice of grad * (onehot - softmax) * dz/dlogits."""
    if backend != "reference":
        backward = operator(backend, "token_logprobs_backward")
        return backward(grad, logits, ids, mask, row_stats, temperature, softcap)
    from klq_kernels.token_logprobs.reference import scaled, select_rows

    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        z = scaled(select_rows(leaf, mask), temperature, softcap or None)
    top, rest, z_a = row_stats
    p = (z.detach() - top.unsqueeze(-1)).exp() / (rest + (z_a - top).exp()).unsqueeze(-1)
    hit = torch.zeros_like(p).scatter(
        -1, ids.clamp(min=0).unsqueeze(-1), (ids >= 0).to(p.dtype).unsqueeze(-1)
    )
    dz = grad.unsqueeze(-1) * (hit - p)
    if mask is not None:
        dz = torch.where(mask.unsqueeze(-1), dz, 0.0)
    return torch.autograd.grad(z, leaf, dz)[0]


class TokenLogprobs(torch.autograd.Function):
    """Global log-probs from this rank's slice of the logits; its gradient is this rank's slice."""

    @staticmethod
    def forward(ctx, logits, ids, mask, temperature, softcap, shard, backend):
        rows = local_rows(logits, ids, mask, temperature, softcap, backend)
        logprobs, row_stats = merge(rows, ids, mask, shard.group)
        ctx.save_for_backward(logits, ids, mask, row_stats)
        ctx.rest = temperature, softcap, backend
        return logprobs

    @staticmethod
    @first_order("tp_group")
    def backward(ctx, grad):
        logits, ids, mask, row_stats = ctx.saved_tensors
        dlogits = local_gradient(grad, logits, ids, mask, row_stats, *ctx.rest)
        return dlogits, None, None, None, None, None, None


class SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group: the complete dH of a sharded head."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @first_order("tp_group")
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def unwrap(op: str, weight: Tensor, tp_group):
    """(local weight, tp_group): a DTensor sharded on dim 0 enters as its local part and group."""
    if not hasattr(weight, "placements"):
        return weight, tp_group
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if weight.device_mesh.ndim != 1 or weight.placements != (Sharded(0),):
        raise ValueError(
            f"{op}: weight is a DTensor with placements {weight.placements}; only (Shard(0),) on a "
            "1-D mesh enters sharded. Gather it with weight.full_tensor() and pass the result"
        )
    _, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return weight.to_local(), (weight.device_mesh.get_group(), offset[0])


def stats(logits, ids, mask, temperature, softcap, group, backend) -> tuple[Tensor, Tensor]:
    """Global log-prob and entropy from this rank's slice of the logits; no gradient.

    H = log S - sum_j p_j (z_j - max). The slice's share of the sum follows from its own entropy h,
    sum s and maximum m: e^(m - max) s (log s - h + m - max); adding the shares is a second
    reduction, of one float a row.
    """
    rows = local_rows(logits, ids, mask, temperature, softcap, backend)
    logprobs, (top, rest, z_a) = merge(rows, ids, mask, group)
    if backend == "reference":
        from klq_kernels.token_stats.reference import token_stats

        how = {"mask": mask, "temperature": temperature, "logit_softcap": softcap or None}
        h = token_stats(logits, ids.clamp(min=0), **how).entropy
    else:
        token_stats = operator(backend, "token_stats")
        h = token_stats(logits, ids.clamp(min=0), None, mask, temperature, softcap)[1]
    m, s, z = rows.double()
    s = s + torch.where(z == -torch.inf, 0.0, (z - m).exp())
    share = (m - top).exp() * s * (s.log() - h + m - top)
    share = torch.where(m == -torch.inf, 0.0, share)
    dist.all_reduce(share, group=group)
    total = rest.double() + (z_a.double() - top.double()).exp()
    entropy = (total.log() - share / total).to(logprobs.dtype)
    if mask is not None:
        entropy = torch.where(mask, entropy, 0.0)
    return logprobs, entropy
