# SPDX-License-Identifier: Apache-2.0
"""What the LM head is in a training step: `python -m benchmarks.update_phase`, on one GPU.

A GPT-NeoX of the shape of Pythia-1B with random weights in bfloat16, 64 prompts of 512 tokens with
53 tokens of response. One epoch of `KLQTrainer.learn` (trunk forward and backward, head and loss on
the response rows, optimiser), with the loop's own objective, whose head is `linear_klq_loss`, and
with eager log-probs of the same rows in its place. Then each head alone, forward and backward, on
the rows that the loop gave it: on the device, which in the loop is all that counts, since the host
is ahead by the trunk's work, and by the clock, where the host is not; and what it allocates.
"""

import gc
import json
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.measure import quantile
from klq.config import KLQConfig
from klq.data import Batch
from klq.logging import Clock
from klq.objective import klq_objective
from klq.rollout import Rollout
from klq.trainer import KLQTrainer

PYTHIA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
}
PROMPTS, PROMPT, RESPONSE = 64, 512, 53
MICRO_BATCH = 16  # rows of one forward and backward
REPEATS = 3
SLEEP_CYCLES = 200_000_000  # over 66 ms at any clock


def eager_objective(hidden, weight, bias, values, *, rows, normalizer, args, **scale):
    """`klq_objective` written out: logits of all response rows, and their log-softmax."""
    x = F.linear(hidden, weight, bias).float() / scale["temperature"]
    logprobs = x.log_softmax(-1).gather(-1, rows.actions[..., None]).squeeze(-1)
    stored = rows.stored
    target = stored["old_values"] + args.alpha * stored["advantages"]
    off = args.tau * (logprobs - stored["old_logprobs"]) + values - target
    square = torch.where(rows.mask, off.square(), 0.0).sum()
    return square / normalizer, {"residual_sq": square.detach()}


OBJECTIVES = {"klq": klq_objective, "eager": eager_objective}


class RandomResponses:
    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def generate(self, prompt_ids: list[list[int]]) -> Rollout:
        ids = torch.randint(self.vocabulary, (len(prompt_ids), self.length)).tolist()
        return Rollout(ids, ["stop"] * len(ids))


def trainer_of(shape: dict, prompts: int, prompt: int, response: int, micro: int, device: str):
    """The loop around a random model, and one measured batch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    finally:
        torch.set_default_dtype(before)
    vocabulary = shape["vocab_size"]
    args = KLQConfig(
        per_device_train_batch_size=micro,
        num_mini_batches=prompts // micro,
        update_epochs=1,
        learning_rate=1e-6,
        max_completion_length=response,
        use_cpu=device == "cpu",
    )
    ids = torch.randint(vocabulary, (prompts, prompt)).tolist()
    trainer = KLQTrainer(
        model,
        lambda completions, **_: [float(len(set(c)) % 7) for c in completions],
        args,
        [{"prompt_ids": x} for x in ids],
        rollout_engine=RandomResponses(vocabulary, response),
    )
    batch = trainer.sample(*trainer.train_prompts.take(0, prompts), Clock())
    trainer.measure(batch)
    return trainer, batch


def recorded(trainer: KLQTrainer, batch: Batch) -> list[tuple]:
    """What `learn` hands to the objective, one entry a pass."""
    calls, objective = [], trainer.objective

    def record(hidden, weight, bias, values, **how):
        # the values are those of the value head, whose gradient is not the LM head's
        calls.append((hidden.detach(), weight, bias, values.detach(), how))
        return objective(hidden, weight, bias, values, **how)

    trainer.objective = record
    trainer.learn(batch)
    trainer.objective = objective
    return calls


def head_alone(objective, calls: list[tuple]) -> Tensor:
    """Forward and backward of the head on the recorded rows; gradients of rows, head, values."""
    for hidden, weight, bias, values, how in calls:
        leaves = [x.requires_grad_() for x in (hidden.detach(), values.detach())]
        loss, _ = objective(leaves[0], weight, bias, leaves[1], **how)
        wanted = [*leaves, weight] if weight.requires_grad else leaves
        grads = torch.autograd.grad(loss, wanted)
    return grads[0]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run) -> float:
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def device_seconds(run) -> float | None:
    """What it takes of the device once all its work has been asked for; None without a device, or
    where the host is too slow for that."""
    if not torch.cuda.is_available():
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait()
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    begun = time.perf_counter()
    run()
    asked = time.perf_counter() - begun
    end.record()
    wait()
    return start.elapsed_time(end) / 1e3 if asked < SLEEP_CYCLES / 3e9 else None


def peak(run) -> int | None:
    """Bytes allocated at the most while it runs, with what was there before."""
    if not torch.cuda.is_available():
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return torch.cuda.max_memory_allocated()


def allocations(run, least: int) -> list[int] | None:
    """Sizes of what it allocates, of `least` bytes and more, in order."""
    if not torch.cuda.is_available():
        return None

    def events() -> list[dict]:
        return torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]

    wait()
    torch.cuda.memory._record_memory_history(enabled="all", context=None)
    try:
        before = len(events())
        run()
        wait()
        made = events()[before:]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return [e["size"] for e in made if e["action"] == "alloc" and e["size"] >= least]


def measure(trainer: KLQTrainer, batch: Batch, repeats: int) -> dict[str, dict]:
    """Everything of both, in turn."""
    found = {name: {k: [] for k in ("update_s", "head_s", "device_s")} for name in OBJECTIVES}
    trainer.objective = klq_objective
    calls = recorded(trainer, batch)
    one = calls[0]
    tokens = one[0].shape[0] * one[0].shape[1]
    logits = tokens * one[1].shape[0] * one[0].element_size()
    for name, objective in OBJECTIVES.items():  # untimed: allocator, cuBLAS, lazily built kernels
        trainer.objective = objective
        found[name]["peak_bytes"] = peak(partial(trainer.learn, batch))
        head = partial(head_alone, objective, calls[:1])
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        most = peak(head)
        found[name]["head_extra_bytes"] = None if most is None else most - before
        found[name]["head_allocations"] = allocations(head, logits)
    for turn in range(repeats):
        for name in list(OBJECTIVES)[:: 1 if turn % 2 else -1]:
            trainer.objective = OBJECTIVES[name]
            found[name]["update_s"].append(seconds(partial(trainer.learn, batch)))
            head = partial(head_alone, OBJECTIVES[name], calls)
            found[name]["head_s"].append(seconds(head))
            found[name]["device_s"].append(device_seconds(head))
    every = sum(batch.prompt_lengths) + sum(batch.response_lengths)
    for x in found.values():
        update, head = (quantile(x[k], 0.5) for k in ("update_s", "head_s"))
        device = None if None in x["device_s"] else quantile(x["device_s"], 0.5)
        x |= {"tokens_per_s": every / update, "response_tokens_per_s": sum(batch.active) / update}
        x |= {"median_s": update, "head_median_s": head, "device_median_s": device}
        x["head_share"] = (device or head) / update
    weight = one[1]
    sizes = {"logits_bytes": logits, "weight_bytes": weight.numel() * weight.element_size()}
    return {"rows_a_pass": tokens, **sizes, "passes": len(calls), **found}


def report(found: dict) -> str:
    mib = lambda n: "–" if n is None else f"{n / 2**20:.0f}"  # noqa: E731
    ms = lambda s: "–" if s is None else f"{s * 1e3:.2f}"  # noqa: E731
    lines = [
        f"{found['passes']} passes of {found['rows_a_pass']} response rows; logits of a pass in "
        f"bfloat16 {mib(found['logits_bytes'])} MiB, head {mib(found['weight_bytes'])} MiB",
        "",
        "| objective | update ms | tokens/s | response tokens/s | peak MiB "
        "| head on the device ms | by the clock ms | share "
        "| a head's extra MiB | its allocations of the size of the logits and more, MiB |",
        "| --- " * 10 + "|",
    ]
    for name in OBJECTIVES:
        x = found[name]
        sizes = x["head_allocations"]
        lines.append(
            f"| {name} | {x['median_s'] * 1e3:.1f} | {x['tokens_per_s']:.0f} "
            f"| {x['response_tokens_per_s']:.0f} | {mib(x['peak_bytes'])} "
            f"| {ms(x['device_median_s'])} | {ms(x['head_median_s'])} | {x['head_share']:.1%} "
            f"| {mib(x['head_extra_bytes'])} "
            f"| {'–' if sizes is None else ', '.join(map(mib, sizes))} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks.update_phase: needs a CUDA device")
    torch.manual_seed(0)
    trainer, batch = trainer_of(PYTHIA_1B, PROMPTS, PROMPT, RESPONSE, MICRO_BATCH, "cuda")
    gc.collect()
    found = measure(trainer, batch, REPEATS)
    print(json.dumps(found))
    print(report(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
