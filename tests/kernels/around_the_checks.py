# SPDX-License-Identifier: Apache-2.0
"""Calls the CUDA operators around the Python checks: every wrong argument is an error with the op's
name, met before any launch, after which the right calls give the bits they gave before.

A process of its own (`test_errors_around_the_checks_leave_the_process_usable`): a launch that reads
what is not there would take the device away from every later test.
"""

import torch

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


def call(name: str, args: list) -> tuple:
    """The results, of copies: some operators write to their first argument."""
    made = getattr(OPS, name)(*(y.clone() if isinstance(y, torch.Tensor) else y for y in args))
    return made if isinstance(made, tuple) else () if made is None else (made,)


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


def raises(name: str, args: list, why: str) -> None:
    try:
        # no copies: those would undo the layout
        getattr(OPS, name)(*args)
    except RuntimeError as error:
        named = f"klq::{name}" in str(error)
        assert named or "on another device" in why, (name, why, str(error))
        return
    raise AssertionError(f"{name} took {why}")


def main() -> None:
    calls, mask, ends = right_calls()
    before = {name: call(name, args) for name, args in calls.items()}
    count = 0
    for name, args in calls.items():
        for why, y, i in wrong(name, args, mask, ends):
            raises(name, [*args[:i], y, *args[i + 1 :]], f"argument {i} {why}")
            count += 1
    targets = calls["klq_targets"]
    raises("klq_targets", [*targets[:5], targets[2], *targets[6:]], "two references")
    raises("klq_targets", [*targets[:4], None, None, *targets[6:]], "no reference")
    getattr(torch, DEVICE).synchronize()
    for name, args in calls.items():
        for p, q in zip(before[name], call(name, args), strict=True):
            assert torch.equal(p, q), name
    print(count)


if __name__ == "__main__":
    import klq_kernels  # noqa: F401 (registers the operators)

    main()
