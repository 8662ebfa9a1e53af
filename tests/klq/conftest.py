# SPDX-License-Identifier: Apache-2.0
"""Tiny models, scripted rollouts and a trainer factory for the tests of the loop."""

import logging

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from klq import KLQConfig, KLQTrainer, Rollout

torch.set_num_threads(1)
EOS = 15


class Script:
    """A rollout engine that answers with prepared responses, whatever the prompts are."""

    def __init__(self, responses, reasons=None, masks=None, logprobs=None):
        reasons = reasons or ["stop"] * len(responses)
        self.rollout = Rollout(responses, reasons, logprobs, masks)

    def generate(self, prompt_ids):
        return self.rollout


def tiny_model(seed=0, eos=EOS, hidden=16, context=32):
    config = GPTNeoXConfig(
        vocab_size=16,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=eos,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config).eval()


def token_sum(completion_ids, **_):
    """A reward that every test can compute in its head."""
    return [sum(ids) / 20 for ids in completion_ids]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("klq").setLevel(logging.ERROR)
    yield
    logging.getLogger("klq").setLevel(logging.NOTSET)


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(model=..., engine=..., prompts=..., value_model=..., **config) -> KLQTrainer"""

    def make(
        *, model=None, engine=None, prompts=None, rewards=token_sum, trainer_kwargs=None, **config
    ):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_completion_length": 6,
            "per_device_train_batch_size": 4,
            "num_updates": 3,
            "update_epochs": 2,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        prompts = prompts or [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 3]]
        return KLQTrainer(
            model=model if model is not None else tiny_model(),
            reward_funcs=rewards,
            args=KLQConfig(**{**defaults, **config}),
            train_dataset=[{"prompt": p} for p in prompts],
            rollout_engine=engine,
            **(trainer_kwargs or {}),
        )

    return make


@pytest.fixture
def script():
    return Script


@pytest.fixture
def tiny():
    return tiny_model
