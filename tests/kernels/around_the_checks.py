# SPDX-License-Identifier: Apache-2.0
"""Calls the CUDA operators around the Python checks: every wrong argument is an error with the op's
name, met before any launch, after which the right calls give the bits they gave before.

A process of its own (`test_errors_around_the_checks_leave_the_process_usable`): a launch that reads
what is not there would take the device away from every later test.
"""

import torch

from klq_kernels._linear_head import is_hopper  # and registers the operators

DEVICE, ELSEWHERE = "cuda", "cpu"
OPS = torch.ops.klq
T, SCAN = (1.0, 0.0), (0.3, 0.9, 0.9, None, 0.7)


def right_calls() -> tuple[dict[str, list], torch.Tensor, torch.Tensor]:
    """(arguments of every operator, the mask, the ends among them)."""
    z, a, x = torch.randn(6, 300), torch.arange(6), torch.randn(6)
    mask, ends = torch.ones(6, dtype=torch.bool), torch.tensor([0, 2, 6])
    stats, one = torch.randn(3, 6), torch.ones(())
    z, a, x, mask, ends, stats, one = (y.to(DEVICE) for y in (z, a, x, mask, ends, stats, one))
    ref, y, boot = z + 1, x + 1, x[:2].clone()
    return (
        {
            "token_logprobs": [z, a, mask, *T],
            "token_logprobs_backward": [x, z, a, mask, stats, *T],
            "token_logprobs_backward_": [z, x, a, mask, stats, *T],
            "token_log_ratios": [z, ref, a, mask, *T],
            "token_stats": [z, a, ref, mask, *T],
            "q_values": [z, ref, x, 0.3, *T],
            "boltzmann_values": [z, ref, 0.3, *T],
            "lambda_returns": [x, y, x, *SCAN, mask, ends, boot, y],
            "gae": [x, y, 0.9, 0.9, mask, ends, boot],
            "klq_targets": [z, a, x, y, ref, None, *SCAN, mask, ends, boot, *T],
            "klq_loss": [z, a, x, y, x, 0.3, mask, y, one, *T, True],
            "klq_loss_": [z, a, x, y, x, 0.3, mask, y, one, *T],
            "klq_loss_backward_": [z, x, one],
            "place_scores": [boot, mask, ends],
        },
        mask,
        ends,
    )


def head_calls() -> dict[str, dict]:
    """{argument: value} of the operators of the LM head's own products and of what goes with them:
    6 tokens, 64 wide, 40 ids."""
    h, w, d = torch.randn(6, 64), torch.randn(40, 64) / 8, torch.randn(6, 40)
    h, w, d, bias = (y.to(DEVICE, torch.bfloat16) for y in (h, w, d, torch.randn(40)))
    a, mask = torch.arange(6, device=DEVICE) * 7, torch.arange(6, device=DEVICE) % 3 > 0
    scale, own, reference = torch.randn(3, 6).to(DEVICE)
    slots = torch.full((2, 40), -1, dtype=torch.int32, device=DEVICE)
    slots[0, 7] = 1
    wide, scaling = h.float(), {"temperature": 0.7, "softcap": 5.0}
    head = {"hidden": h, "weight": w, "bias": bias, "actions": a}
    stats = {"scale": scale, "own": own, "reference": reference}
    rows = {**head, "mask": mask, **scaling, "entropy": False, "out": d}
    weight = {"out": w, "dlogits": d, "hidden": h, "add": False, "slots": slots, "extra": wide}
    chosen = {"out": wide, "slots": slots, "hidden": h, "actions": a, "scale": scale, "own": own}
    return {
        "linear_rows_": rows,
        "linear_dlogits_": {"out": d, **head, **stats, **scaling},
        "linear_hidden_": {"out": h, "dlogits": d, "weight": w, "scale": scale},
        "linear_weight_": weight,
        "linear_chosen_": {**chosen, "apart": True, "bias": bias.float()},
        "compact_tokens": {"mask": mask, "size": 5},
    }


def runs_here(name: str) -> bool:
    """Wrong calls never get as far as the products, which need a Hopper GPU."""
    return name in ("linear_chosen_", "compact_tokens") or is_hopper(torch.device(DEVICE))


def call(name: str, args: list) -> tuple:
    """The results and what the operator wrote to, of copies."""
    op = getattr(OPS, name)
    given = [y.clone() if isinstance(y, torch.Tensor) else y for y in args]
    made = op(*given)
    aliases = [a.alias_info for a in op.default._schema.arguments]
    written = [y for y, alias in zip(given, aliases, strict=True) if alias and alias.is_write]
    made = made if isinstance(made, tuple) else () if made is None else (made,)
    return *made, *written


def wrong(name: str, args: list, mask: torch.Tensor, ends: torch.Tensor):
    """(what is wrong, argument, its index), for every tensor among the arguments."""
    wide = sum(isinstance(y, torch.Tensor) and y.dim() == 2 and y.shape[1] == 300 for y in args)
    for i, y in enumerate(args):
        if not isinstance(y, torch.Tensor):
            continue
        yield "on another device", y.to(ELSEWHERE), i
        if y is ends:
            yield "of floats", y.float(), i
            yield "of no ends", y[:0], i
        elif y.dim() and not (name == "place_scores" and y is mask):  # ends may leave tokens over
            yield "too long", torch.cat([y, y]), i
            if not (y.dim() == 2 and y.shape[1] == 300):
                yield "too short", y[:-1].clone(), i
            elif wide > 1:
                yield "too narrow", y[:, :-1].clone(), i
        if y.dim() == 2 and y.shape[1] == 300:
            yield "of integers", y.long(), i
            yield "with strides over the vocabulary", y.T, i
            deep = torch.randn(2, 3, 4, 300, device=y.device)[:, :2, :3]
            yield "with three leading strides", deep, i
        if name in ("lambda_returns", "gae"):
            yield "of another rank", y[None], i
        if name in ("lambda_returns", "gae", "place_scores") and y is not ends:
            yield "of another type", y.float() if y is mask else y.long(), i


def shifted(y: torch.Tensor) -> torch.Tensor:
    """The same, one element after a multiple of 16 bytes."""
    return torch.cat([y.new_zeros(1), y.flatten()])[1:].view_as(y)


def wrong_matrix(y: torch.Tensor):
    """(what the error says, value) for one that the copy engine reads or writes."""
    yield "must be a bfloat16 matrix", y.float()
    yield "must be a bfloat16 matrix", y[:, None]
    yield "must have unit stride", y.T.contiguous().T
    yield "must have unit stride", torch.cat([y, y[:, :1]], 1)[:, :-1]
    yield "must begin at a multiple of 16 bytes", shifted(y)


def wrong_rows(y: torch.Tensor):
    """The same for a contiguous one."""
    yield "must be a contiguous matrix as wide as hidden", y[:, :56]
    yield "must be a contiguous matrix as wide as hidden", y[:, :56].contiguous()
    yield "must be a contiguous matrix as wide as hidden", y[None]
    yield "must have rows of whole 16 bytes", shifted(y)


def wrong_vector(y: torch.Tensor):
    for x in (torch.cat([y, y]), y[:-1]):
        yield f"has {x.numel()} elements, expected {y.numel()}", x


# how arguments of the head's operators are looked at, other than as vectors
MATRICES = {"hidden", "weight", "dlogits", "out"}
ROWS = {("linear_weight_", "out"), ("linear_weight_", "extra"), ("linear_chosen_", "out")}
OTHERS = {("linear_chosen_", x) for x in ("slots", "bias")} | {("compact_tokens", "mask")}


def wrong_heads(calls: dict[str, dict]):
    """(operator, what takes the place of its arguments, what the error says)."""
    for name, args in calls.items():
        for key, y in args.items():
            if not isinstance(y, torch.Tensor) or (name, key) in OTHERS:
                continue
            yield name, {key: y.to(ELSEWHERE)}, f"{key} must be on "
            rows, matrix = (name, key) in ROWS, key in MATRICES
            for says, x in (wrong_rows if rows else wrong_matrix if matrix else wrong_vector)(y):
                yield name, {key: x}, f"{key} {says}"
    for name in ("linear_rows_", "linear_dlogits_"):
        h, w, b, out = (calls[name][key] for key in ("hidden", "weight", "bias", "out"))
        yield name, {"hidden": h[:, :56]}, "hidden and weight must be as deep"
        yield name, {"hidden": h[:, :60], "weight": w[:, :60]}, "a multiple of 8"
        yield name, {"weight": w[:0], "bias": None}, "weight must have rows"
        yield name, {"bias": b.float()}, "bias must be bfloat16"
        for x in (out[:-1], out[:, :-8]):
            yield name, {"out": x}, "out must be [rows of hidden, rows of weight]"
    yield "linear_rows_", {"entropy": True}, "entropy and out exclude each other"

    name = "linear_hidden_"
    out, d, w = (calls[name][key] for key in ("out", "dlogits", "weight"))
    shapes = {"out": out[:-1]}, {"out": out[:, :56]}, {"dlogits": d[:, :-8]}, {"weight": w[:-8]}
    for changed in (*shapes, {"out": out[:, :60], "weight": w[:, :60]}):
        yield name, changed, "out must be [rows of dlogits, columns of weight], a multiple of 8"
    yield name, {"dlogits": d[:, :0], "weight": w[:0]}, "weight must have rows"

    name = "linear_weight_"
    out, d, h, extra = (calls[name][key] for key in ("out", "dlogits", "hidden", "extra"))
    yield name, {"out": out.half()}, "out must be float32 or bfloat16"
    for changed in ({"out": out[:-1]}, {"dlogits": d[:-1]}, {"dlogits": d[:, :-8]}):
        yield name, changed, "dlogits must be [rows of hidden, rows of out]"
    narrow = {"hidden": h[:, :60], "out": out[:, :60].contiguous()}
    yield name, narrow, "out must have rows of whole 16 bytes"
    yield name, {"hidden": h[:0], "dlogits": d[:0]}, "hidden must have rows"
    yield name, {"out": out.float()}, "slots are for a bfloat16 out"
    yield name, {"add": True}, "only a float32 out is added to"
    for one in ("slots", "extra"):
        yield name, {one: None}, "slots and extra go together"
    yield name, {"extra": extra.bfloat16()}, "extra must be float32"

    name = "linear_chosen_"
    out, slots, b = (calls[name][key] for key in ("out", "slots", "bias"))
    yield name, {"out": out.bfloat16()}, "out must be float32"
    yield name, {"out": out[:-1]}, "out must be as long as hidden"
    yield name, {"apart": False}, "out must be as long as the vocabulary"
    wrong_slots = slots.to(ELSEWHERE), slots.long(), slots[:1], slots[0], slots.T.contiguous().T
    for x in wrong_slots:
        yield name, {"slots": x}, "slots must be [2, vocabulary] in int32, contiguous, on the devi"
    for x in (b.to(ELSEWHERE), b.bfloat16(), b[:-1], torch.cat([b, b])[::2]):
        yield name, {"bias": x}, "bias must be [vocabulary] in float32, contiguous"

    name, mask = "compact_tokens", calls["compact_tokens"]["mask"]
    yield name, {"mask": mask.to(ELSEWHERE)}, ""  # there is no such operator elsewhere
    for changed in ({"mask": mask[None]}, {"mask": mask[:0]}, {"size": -1}):
        yield name, changed, "mask must be a vector that is not empty, and the size not negative"


def raises(name: str, args: list, why: str, says: str = "") -> None:
    try:
        # no copies: those would undo the layout
        getattr(OPS, name)(*args)
    except RuntimeError as error:
        named = f"klq::{name}" in str(error)
        assert named or "on another device" in why, (name, why, str(error))
        assert says in str(error), (name, why, says, str(error))
        return
    raise AssertionError(f"{name} took {why}")


def main() -> None:
    calls, mask, ends = right_calls()
    heads = head_calls()
    wanted = {name: list(args.values()) for name, args in heads.items() if runs_here(name)}
    before = {name: call(name, args) for name, args in (calls | wanted).items()}
    count = 0
    for name, args in calls.items():
        for why, y, i in wrong(name, args, mask, ends):
            raises(name, [*args[:i], y, *args[i + 1 :]], f"argument {i} {why}")
            count += 1
    targets = calls["klq_targets"]
    raises("klq_targets", [*targets[:5], targets[2], *targets[6:]], "two references")
    raises("klq_targets", [*targets[:4], None, None, *targets[6:]], "no reference")
    for name, changed, says in wrong_heads(heads):
        args = [*(heads[name] | changed).values()]
        raises(name, args, f"another {' and '.join(changed)}", says)
        count += 1
    getattr(torch, DEVICE).synchronize()
    for name, args in (calls | wanted).items():
        for p, q in zip(before[name], call(name, args), strict=True):
            assert torch.equal(p, q), name
    print(count)


if __name__ == "__main__":
    main()
