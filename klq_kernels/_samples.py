# SPDX-License-Identifier: Apache-2.0
"""Inputs to try the ops on: one `world` of named tensors feeds all of them, each op takes the names
in its signature. A `Case` changes the world: shape, layout, values or scalars.

Only tests and benchmarks import this.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PER_TOKEN = (
    *("logits", "ref_logits", "q", "hidden", "actions", "mask", "values", "rewards", "log_ratios"),
    *("ref_logprobs", "returns", "weights", "trace"),
)
PER_SEQUENCE = ("scores", "bootstrap", "lam")
ROWS = ("logits", "ref_logits", "q")  # [..., V]


def world(
    device="cpu",
    dtype=torch.float32,
    *,
    leading: tuple[int, ...] = (3, 5),
    vocabulary: int = 257,
    width: int = 24,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All tensors any op takes, of order one; packed with `cu_seqlens` when `lengths` are given.

    Wide per-token inputs (rewards, returns, weights, ref_logprobs) stay float32 in a narrow dtype,
    as they are in training; float64 is float64 throughout.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, to=wide, scale=1.0):
        x = torch.randn(shape, generator=generator, device=device, dtype=wide)
        return (x * scale).to(to)

    rows = leading[:-1] if lengths is None else (len(lengths),)
    logits = normal(*leading, vocabulary, to=dtype, scale=2.0)
    uniform = torch.rand(leading, generator=generator, device=device, dtype=wide)
    made = {
        "logits": logits,
        "ref_logits": (logits.to(wide) + normal(*leading, vocabulary, scale=0.5)).to(dtype),
        "q": normal(*leading, vocabulary, to=dtype),
        "actions": torch.randint(vocabulary, leading, generator=generator, device=device),
        "mask": uniform < 0.7,
        "values": normal(*leading, to=dtype),
        "rewards": normal(*leading),
        "log_ratios": normal(*leading, scale=0.5),
        "ref_logprobs": -normal(*leading).abs() - 1.0,
        "returns": normal(*leading),
        "weights": uniform + 0.5,
        "scores": normal(*rows),
        "bootstrap": normal(*rows),
        "hidden": normal(*leading, width, to=dtype),
        "weight": normal(vocabulary, width, to=dtype, scale=width**-0.5),
        "bias": normal(vocabulary, to=dtype, scale=0.1),
    }
    if lengths is not None:
        ends = torch.tensor((0, *lengths), device=device).cumsum(0)
        made["cu_seqlens"] = ends.to(torch.int32)
    return made


@dataclass(frozen=True)
class Case:
    """A change to the world: its size, its tensors (`edit`), or the scalars."""

    name: str
    kinds: tuple[str, ...]
    edit: Callable[[dict], None] = lambda made: None
    size: dict = field(default_factory=dict)
    scalars: dict = field(default_factory=dict)
    drop: tuple[str, ...] = ()  # optional tensors left out
    needs: tuple[str, ...] = ()  # only for ops that take these


def _strided(made: dict) -> None:
    """Views with two leading strides, odd offsets, and per-token inputs that are no block."""
    for name in ROWS:
        x = made[name]
        base = torch.full_like(x[:, :1], 3.0).repeat(1, x.shape[1] + 3, 1)
        base[:, 2:-1] = x
        made[name] = base[:, 2:-1]  # like logits[:, p-1:-1]
    made["ref_logits"] = made["ref_logits"].transpose(0, 1).contiguous().transpose(0, 1)
    h = made["hidden"]
    made["hidden"] = torch.cat([h, h], -1)[..., : h.shape[-1]]
    made["weight"] = made["weight"].T.contiguous().T
    for name in ("actions", "mask", "rewards", "returns", "bootstrap", "weights"):
        made[name] = torch.stack([made[name]] * 2, -1)[..., 1]
    made["values"] = made["values"].T.contiguous().T
    made["log_ratios"] = made["log_ratios"][..., :1].expand(made["log_ratios"].shape)


def _unaligned(made: dict) -> None:
    for name in (*ROWS, "hidden", "actions", "mask", "values", "rewards", "log_ratios", "returns"):
        x = made[name]
        flat = torch.cat([x.new_zeros(1), x.reshape(-1)])
        made[name] = flat[1:].view(x.shape)


def _narrow_ids(made: dict) -> None:
    made["actions"] = made["actions"].to(torch.int32)
    made["mask"] = made["mask"].to(torch.uint8) * 2


def _all_masked(made: dict) -> None:
    made["mask"] = torch.zeros_like(made["mask"])


def _one_active(made: dict) -> None:
    made["mask"] = torch.zeros_like(made["mask"])
    made["mask"][..., -1, 1] = True


def _shift(by: float) -> Callable[[dict], None]:
    def edit(made: dict) -> None:
        for name in ("logits", "ref_logits"):
            made[name] = made[name] + by

    return edit


def _stretch(by: float) -> Callable[[dict], None]:
    def edit(made: dict) -> None:
        for name in ("logits", "ref_logits"):
            made[name] = made[name] * by
        made["hidden"] = made["hidden"] * (by / 16)

    return edit


def _far(made: dict) -> None:
    """Targets far above: the residual of large negative log-probs is then no cancellation."""
    made["returns"] = made["returns"] + 20.0


def _flat(made: dict) -> None:
    for name in ("logits", "ref_logits"):
        made[name] = torch.full_like(made[name], 0.5)


def _peaked(made: dict) -> None:
    """Chosen tokens with p from 0.9 to 1 - 1e-6 in the policy."""
    x, a = made["logits"], made["actions"].unsqueeze(-1)
    p = torch.linspace(0.9, 1 - 1e-6, max(1, a.numel()), device=x.device, dtype=torch.float64)
    others = x.double().scatter(-1, a, -torch.inf).logsumexp(-1, keepdim=True)
    made["logits"] = x.scatter(-1, a, (others + torch.logit(p).view(a.shape)).to(x.dtype))


def _banned(made: dict) -> None:
    """-inf at every third token, the chosen one spared, and over the whole front of some rows."""
    v = made["logits"].shape[-1]
    front = torch.arange(v, device=made["logits"].device) < v // 2
    some = torch.arange(v, device=made["logits"].device) % 3 == 1
    made["actions"] = made["actions"] // 2 + v // 2
    chosen = torch.zeros_like(made["logits"], dtype=torch.bool)
    chosen.scatter_(-1, made["actions"].unsqueeze(-1), True)
    ban = (some | (front & (made["actions"] % 2 == 0).unsqueeze(-1))) & ~chosen
    for name in ROWS:
        made[name] = made[name].masked_fill(ban, -torch.inf)
    made["bias"] = made["bias"].masked_fill(some, -torch.inf)


def _only_chosen(made: dict) -> None:
    chosen = torch.zeros_like(made["logits"], dtype=torch.bool)
    chosen.scatter_(-1, made["actions"].unsqueeze(-1), True)
    made["logits"] = made["logits"].masked_fill(~chosen, -torch.inf)


def _packed_int64(made: dict) -> None:
    made["cu_seqlens"] = made["cu_seqlens"].long()


def _lam_rows(made: dict) -> None:
    made["lam"] = made["bootstrap"].sigmoid()


def _trace(made: dict) -> None:
    made["trace"] = made["rewards"].sigmoid()


def _no_sequence(made: dict) -> None:
    made["cu_seqlens"] = made["cu_seqlens"][:1]
    for name in ("scores", "bootstrap"):
        made[name] = made[name][:0]


_ALL = ("rows", "scan", "targets", "linear")
_LOGITS = ("rows", "targets")
_TIME = ("scan", "targets")
_GAPS = (0, 5, 0, 0, 1, 7, 0)  # zero-length sequences first, twice in a row, last

CASES = (
    Case("plain", _ALL),
    Case("no_options", _ALL, drop=("bootstrap", "weights", "bias")),
    Case("unmasked", ("rows", "targets", "linear"), drop=("mask",)),
    Case("unmasked_scan", ("scan",), drop=("mask",), needs=("values",)),
    Case("one_token", _ALL, size={"leading": (1, 1)}, drop=("mask",), needs=("values",)),
    Case("one_row", _ALL, size={"leading": (1, 9)}),
    Case("one_step", _ALL, size={"leading": (7, 1)}),
    Case("one_sequence", _ALL, size={"leading": (33,)}),
    Case("deep", _ALL, size={"leading": (2, 1, 3, 4)}),
    Case("no_rows", _ALL, size={"leading": (0, 5)}),
    Case("no_time", _ALL, size={"leading": (3, 0)}),
    Case("all_masked", _ALL, _all_masked, needs=("mask",)),
    Case("one_active", _ALL, _one_active, needs=("mask",)),
    Case("strided", _ALL, _strided),
    Case("unaligned", _ALL, _unaligned),
    Case("narrow_ids", _ALL, _narrow_ids, needs=("mask",)),
    Case("vocabulary_1", _LOGITS, size={"vocabulary": 1}),
    Case("vocabulary_1_head", ("linear",), size={"vocabulary": 1, "width": 1}),
    Case("vocabulary_4099", _LOGITS, size={"leading": (2, 3), "vocabulary": 4099}),
    Case("vocabulary_2048", _LOGITS, size={"leading": (2, 3), "vocabulary": 2048}),
    Case("vocabulary_4099_head", ("linear",), size={"leading": (2, 3), "vocabulary": 4099}),
    Case("offset_minus_100", _LOGITS, _shift(-100.0)),
    Case("offset_minus_1000", _LOGITS, _shift(-1000.0)),
    Case("offset_1000", _LOGITS, _shift(1000.0)),
    Case("extreme", ("rows", "targets", "linear"), _stretch(6000.0)),
    Case("flat", _LOGITS, _flat),
    Case("peaked", _LOGITS, _peaked),
    Case("banned", ("rows", "targets"), _banned),
    Case("only_chosen", ("rows",), _only_chosen, needs=("logits", "actions", "mask")),
    Case("cold", ("rows", "targets", "linear"), _far, scalars={"temperature": 0.1}),
    Case("hot", ("rows", "targets", "linear"), scalars={"temperature": 10.0}),
    Case("capped", ("rows", "linear"), scalars={"temperature": 1.3, "logit_softcap": 3.0}),
    Case("capped_low", _LOGITS, _shift(-3.0), scalars={"temperature": 0.7, "logit_softcap": 1.0}),
    Case("capped_banned", ("rows",), _banned, scalars={"temperature": 0.7, "logit_softcap": 5.0}),
    Case("packed", _TIME, size={"leading": (17,), "lengths": _GAPS}),
    Case("packed_int64", _TIME, _packed_int64, size={"leading": (13,), "lengths": _GAPS}),
    Case("packed_empty", _TIME, size={"leading": (0,), "lengths": (0, 0)}),
    Case("packed_no_sequence", _TIME, _no_sequence, size={"leading": (4,), "lengths": (0,)}),
    Case("lam_rows", _TIME, _lam_rows, needs=("lam",)),
    Case(
        "lam_rows_packed",
        _TIME,
        _lam_rows,
        size={"leading": (17,), "lengths": _GAPS},
        needs=("lam",),
    ),
    Case("trace", ("scan",), _trace, needs=("trace",)),
    Case(
        "trace_packed",
        ("scan",),
        _trace,
        size={"leading": (17,), "lengths": _GAPS},
        needs=("trace",),
    ),
    Case(
        "undiscounted", _TIME, scalars={"gamma": 1.0, "lam": 1.0, "alpha": 1.0}, needs=("values",)
    ),
    Case("bandit", _TIME, scalars={"gamma": 0.0}, needs=("values",)),
    Case("one_step_lam", _TIME, scalars={"lam": 0.0}, needs=("values",)),
    Case("tiny_lam", _TIME, scalars={"lam": 1e-8, "alpha": 0.1}, needs=("values",)),
    Case("compacted", ("linear",), scalars={"num_active": 15}),
    Case("chunked", ("linear",), scalars={"chunk_bytes": 4 * 4 * 257}),
    Case("tau_0", ("rows",), scalars={"tau": 0.0}, needs=("values",)),
    Case("tau_100", ("rows", "linear"), scalars={"tau": 100.0}, needs=("values",)),
)
