# SPDX-License-Identifier: Apache-2.0
"""Policy and value function under one module with one forward.

The forward goes from tokens to hidden states, keeps the positions that choose response tokens, and
hands those to a function of the caller that ends in a loss (or in log-probs). The language-model
head is therefore never applied outside the forward, nor to a prompt: an engine that shards
parameters gathers the head once, and logits of whole sequences never exist.

The value function is a float32 linear layer that starts at zero, V = 0, either on the policy's own
trunk ("head") or on a second trunk ("separate"). It lives in its own file next to the model.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from klq.config import KLQConfig

HEAD_FILE = "value_head.safetensors"
TRUNK_DIR = "value_model"
log = logging.getLogger("klq")


class PolicyValueModel(nn.Module):
    """A causal language model and, unless this is a reference, its value function.

    policy: a transformers causal LM, or a peft model around one.
    value_head: nn.Linear(hidden size, 1) in float32, or None.
    value_trunk: the trunk the head reads, or None for the policy's own.
    trunk_grad_scale: factor on the value gradient that enters a trunk shared with the policy.

    `trunk_grad_sq` holds, since it was last cleared, the squared norms of the gradient that the
    policy part ("policy") and the value part ("value", after the scale) send into the trunk's
    output, summed over tokens. It is taken from hooks on gradients the backward makes anyway: two
    reductions over [B, R, D], no further backward and no host sync. (The split of the *parameter*
    gradient would cost a second backward through the trunk.)
    """

    def __init__(
        self,
        policy: nn.Module,
        value_head: nn.Linear | None = None,
        value_trunk: nn.Module | None = None,
        trunk_grad_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head
        self.value_trunk = value_trunk
        self.trunk_grad_scale = trunk_grad_scale
        self.trunk_grad_sq: dict[str, Tensor] = {}
        # Log-probs under a dropout mask are not those of the policy: everything stays in eval mode.
        self.eval()

    @property
    def lm(self) -> nn.Module:
        """The transformers model itself, adapters injected where there are any."""
        return self.policy.get_base_model() if is_peft(self.policy) else self.policy

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)

    def value_parameters(self) -> list[nn.Parameter]:
        parts = [m for m in (self.value_head, self.value_trunk) if m is not None]
        return [p for part in parts for p in part.parameters()]

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def forward(self, tokens: Tensor, positions: Tensor, compute: Callable[..., Any]) -> Any:
        """compute(hidden [B, R, D], weight [V, D], bias [V] or None, values [B, R] or None).

        tokens [B, L]: prompt and response, padded on the right. No attention mask goes in: with a
        causal model no position sees what is to its right, and without a mask attention keeps its
        fast path and needs no look at the mask's values.
        positions [B, R]: the states to read; position p has seen tokens 0..p.
        """
        trunk = self.lm.base_model
        hidden = _states(trunk, tokens, positions)
        values = None
        if self.value_head is not None:
            if self.value_trunk is None:
                seen = self._branch(hidden, "value", self.trunk_grad_scale)
            else:
                seen = self._branch(_states(self.value_trunk, tokens, positions), "value", 1.0)
            with torch.autocast(hidden.device.type, enabled=False):
                values = self.value_head(seen.float()).squeeze(-1)  # [B, R]
        head = self.lm.get_output_embeddings()
        return compute(self._branch(hidden, "policy", 1.0), head.weight, head.bias, values)

    def _branch(self, hidden: Tensor, name: str, scale: float) -> Tensor:
        """The same hidden states, whose gradient is scaled and measured on its way back."""
        if scale == 0:
            return hidden.detach()
        if not hidden.requires_grad:
            return hidden
        hidden = hidden.view_as(hidden)
        hidden.register_hook(partial(self._on_grad, name, scale))
        return hidden

    def _on_grad(self, name: str, scale: float, grad: Tensor) -> Tensor:
        grad = grad if scale == 1 else grad * scale
        square = grad.float().pow(2).sum()
        known = self.trunk_grad_sq.get(name)
        self.trunk_grad_sq[name] = square if known is None else known + square
        return grad


def _states(trunk: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state  # [B, L, D]
    index = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)  # [B, R, D]


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def load_policy(model: str | nn.Module, peft_config: Any = None) -> nn.Module:
    """The policy, wrapped by peft if so configured.

    Loaded by name it is float32, and bfloat16 is a matter of autocast (`bf16`). A module given
    keeps its dtype, also in the optimiser: give a float32 one unless that is meant.

    Raises ValueError if the model's logits are not a linear head on its last hidden state, or its
    generation config is one that transformers refuses to save.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = peft_config or getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(adapter).__name__} puts its own tokens before the prompt, which the loop does "
            "not know of: use an adapter of weights, such as LoraConfig"
        )
    if peft_config is not None:
        try:
            import peft
        except ImportError:
            raise ImportError("peft_config needs the package peft: pip install peft") from None
        model = peft.get_peft_model(model, peft_config)
    check_linear_head(PolicyValueModel(model).lm)
    try:  # now: a mistake in it must not wait for the first checkpoint
        with tempfile.TemporaryDirectory() as nowhere:
            PolicyValueModel(model).lm.generation_config.save_pretrained(nowhere)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the model's generation_config cannot be saved: {reason}") from error
    return model


@torch.no_grad()
def check_linear_head(lm: nn.Module) -> None:
    """The loss applies head and soft-cap itself, so the model must do exactly that and no more."""
    name, head = type(lm).__name__, lm.get_output_embeddings()
    if lm.base_model is lm or not isinstance(head, nn.Linear):
        raise ValueError(f"model {name} has no trunk with a plain linear head on it")
    tokens = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    logits = head(lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    cap = PolicyValueModel(lm).logit_softcap
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    found = lm(input_ids=tokens, use_cache=False).logits
    if not torch.allclose(found.float(), logits.float(), rtol=1e-2, atol=1e-3):
        raise ValueError(f"the logits of {name} are not a linear head on its last hidden state")


def frozen(model: nn.Module, policy: nn.Module) -> PolicyValueModel:
    """`model` as the reference of `policy`: no gradients, no value function.

    ValueError if the two share a parameter: training would move the reference too.
    """
    own = {p.data_ptr() for p in policy.parameters() if p.numel()}
    if any(p.numel() and p.data_ptr() in own for p in model.parameters()):
        raise ValueError("ref_model shares parameters with the policy: give a copy, or None")
    return PolicyValueModel(model.requires_grad_(False))


def with_value(
    policy: nn.Module, value_model: str | nn.Module, trunk_grad_scale: float
) -> PolicyValueModel:
    """Give the policy a value function.

    value_model: "head"; "separate" (a second trunk that starts as a copy of the policy's); a
        transformers model, whose trunk becomes the separate one; or the directory of a checkpoint
        that holds a value function, which is loaded strictly.
    """
    model = PolicyValueModel(policy, trunk_grad_scale=trunk_grad_scale)
    if not model.policy_parameters():
        raise ValueError("the policy has no parameter with requires_grad: nothing could be trained")
    lm, trunk, source = model.lm, None, None
    if isinstance(value_model, nn.Module):
        trunk = value_model.base_model
    elif value_model == "separate":
        if is_peft(policy):
            raise ValueError("value_model='separate' with peft needs the second model itself")
        trunk = copy.deepcopy(lm.base_model)
    elif value_model != "head":
        source = Path(value_model)
        if not source.is_dir():
            raise ValueError(
                f"value_model must be 'head', 'separate', a model or a directory: {value_model!r}"
            )
        if (source / TRUNK_DIR).is_dir():
            trunk = AutoModel.from_pretrained(source / TRUNK_DIR, dtype=torch.float32)
    device = lm.get_output_embeddings().weight.device
    config = (trunk or lm).config.get_text_config()
    head = nn.Linear(config.hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.value_head, model.value_trunk = head, trunk and trunk.to(device)
    if source is not None:
        load_value_head(head, source)
        log.warning("value head: loaded from %s", source)
    else:
        log.warning("value head: FRESH, all zeros (V = 0), nothing is loaded")
    return model.eval()


def adamw(model: PolicyValueModel, args: KLQConfig) -> torch.optim.AdamW:
    """One optimiser, two groups: value parameters, policy parameters."""
    value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    groups = [(model.value_parameters(), value_lr), (model.policy_parameters(), args.learning_rate)]
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups],
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def save_value(model: PolicyValueModel, directory: Path) -> None:
    """Write the value function next to the model: `value_head.safetensors` (and its trunk)."""
    state = {k: v.detach().cpu() for k, v in model.value_head.state_dict().items()}
    save_file(state, directory / HEAD_FILE)
    if model.value_trunk is not None:
        model.value_trunk.save_pretrained(directory / TRUNK_DIR)


def load_value_head(head: nn.Linear, directory: Path) -> None:
    """Fill `head` from `directory`; FileNotFoundError or ValueError if the file does not fit."""
    path = Path(directory) / HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this directory holds no value head")
    state = load_file(path)
    wanted = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if wanted != found:
        raise ValueError(f"{path} holds {found}, the model needs {wanted}")
    head.load_state_dict(state)
