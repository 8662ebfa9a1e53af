# SPDX-License-Identifier: Apache-2.0
"""TRL 1.12's PPO step by phases, for `benchmarks.step`; runs in an environment with trl==1.12.0.

TRL removed its PPO in 1.13. Its loop is not changed: `batch_generation` ends the rollout, the first
forward with gradients begins the update, and `on_step_end` ends it. The reward model is one layer.
"""

import argparse
import json
import tempfile
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks import step_model
from benchmarks.step_model import EPOCHS, REPEATS, SIZES, WARM, Stopwatch


def tokenizer(size: step_model.Size) -> PreTrainedTokenizerFast:
    """Of ids; the loop looks for an end token, which stops nothing here."""
    words = {f"w{i}": i for i in range(size.vocabulary - 1)} | {"[PAD]": size.vocabulary - 1}
    made = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="w0")


class Phases(TrainerCallback):
    """Laps at the seams of the loop."""

    def __init__(self, watch: Stopwatch):
        self.watch, self.updating = watch, True
        generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def generate(*args, **kwargs):
            watch.start()
            out = generation(*args, **kwargs)
            watch.lap("rollout")
            self.updating = False
            return out

        def passed(*args, **kwargs):
            if torch.is_grad_enabled() and not self.updating:
                watch.lap("targets")
                self.updating = True
            return forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = generate, passed

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.lap("update")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args()
    size, watch = SIZES[args.size], Stopwatch(args.device)
    rows = [{"input_ids": ids} for ids in step_model.prompts(size)]
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=size.micro,
                gradient_accumulation_steps=size.prompts // size.micro,
                num_mini_batches=1,
                num_ppo_epochs=EPOCHS,
                total_episodes=size.prompts * (WARM + REPEATS),
                response_length=size.response,
                temperature=1.0,
                learning_rate=1e-6,
                num_sample_generations=0,
                bf16=False,  # the weights are bfloat16 already
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                use_cpu=args.device == "cpu",
                disable_tqdm=True,
            ),
            tokenizer(size),
            step_model.policy(size, args.device),
            step_model.policy(size, args.device),
            step_model.scorer(size, args.device, **small),
            Dataset.from_list(rows),
            step_model.scorer(size, args.device),
            callbacks=[Phases(watch)],
        )
        trainer.train()
    about = {"trl": version("trl"), "transformers": version("transformers")}
    print(json.dumps({**watch.found(), "versions": {**about, "torch": torch.__version__}}))


if __name__ == "__main__":
    main()
