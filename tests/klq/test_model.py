# SPDX-License-Identifier: Apache-2.0
"""The value head's life (case 81), the linear-head check, the reference, the saved model."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from klq.checkpoint import checkpoints
from klq.model import HEAD_FILE, load_policy, with_value


@pytest.fixture
def announced(caplog):
    logging.getLogger("klq").setLevel(logging.WARNING)
    return lambda: caplog.text


def test_case_81_fresh_head_is_zero_float32_and_announced(tiny, announced):
    model = with_value(tiny().bfloat16(), "head", 1.0)
    assert "FRESH" in announced()
    assert [p.dtype for p in model.value_parameters()] == [torch.float32] * 2
    assert all((p == 0).all() for p in model.value_parameters())
    values = model(
        torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), lambda hidden, weight, bias, values: values
    )
    assert values.dtype == torch.float32 and (values == 0).all()


@pytest.mark.parametrize("value_model", ["head", "separate"])
def test_case_81_saved_value_function_is_loaded_and_announced(
    make_trainer, tiny, tmp_path, announced, value_model
):
    first = make_trainer(trainer_kwargs={"value_model": value_model})
    first.train()
    saved = checkpoints(tmp_path / "run")[-1]
    capped = make_trainer(trainer_kwargs={"value_model": str(saved)})
    assert f"loaded from {saved}" in announced()
    pairs = zip(
        first.unwrapped.value_parameters(), capped.unwrapped.value_parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    state = load_file(saved / HEAD_FILE)
    assert {k: tuple(v.shape) for k, v in state.items()} == {"weight": (1, 16), "bias": (1,)}


def test_case_81_missing_or_mismatched_head_is_an_error(make_trainer, tiny, tmp_path):
    make_trainer(num_updates=1).train()
    saved = checkpoints(tmp_path / "run")[-1]
    with pytest.raises(ValueError, match="value_model must be 'head', 'separate'"):
        with_value(tiny(), "tail", 1.0)
    with pytest.raises(ValueError, match=r"holds .*\(1, 16\).* the model needs .*\(1, 32\)"):
        with_value(tiny(hidden=32), str(saved), 1.0)
    damaged = shutil.copytree(saved, tmp_path / "run" / "checkpoint-000002")
    save_file({"weight": torch.zeros(1, 16)}, damaged / HEAD_FILE)
    with pytest.raises(ValueError, match="the model needs"):
        make_trainer(num_updates=3).train(resume=True)
    (damaged / HEAD_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="holds no value head"):
        make_trainer(num_updates=3).train(resume=True)


@pytest.mark.parametrize("kind", ["head", "separate", "tied", "lora"])
def test_printed_checkpoint_is_a_model_transformers_can_load(
    make_trainer, tiny, tmp_path, capsys, kind
):
    """The path as it is printed gives the trained policy, with nothing made up and bit for bit."""
    lm, kwargs = tiny(), {"value_model": "separate" if kind == "separate" else "head"}
    if kind == "tied":
        config = lm.config
        config.tie_word_embeddings = True
        lm = type(lm)(config)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        lm.save_pretrained(tmp_path / "base")  # an adapter finds its base by the path it came from
        lm = str(tmp_path / "base")
        kwargs["peft_config"] = peft.LoraConfig(r=4, target_modules=["query_key_value"])
    trainer, tokens = make_trainer(model=lm, trainer_kwargs=kwargs), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = trainer.policy(tokens).logits
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    path = lines[-1].removeprefix("model: ")
    assert path == str(tmp_path / "run" / "checkpoint-000003")
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        found, trained = loaded(tokens).logits, trainer.policy(tokens).logits
    torch.testing.assert_close(found, trained, rtol=0, atol=0)
    assert (found - before).abs().max() > 1e-3, "nothing was trained, so nothing is tested"


def test_training_moves_the_policy_and_never_the_reference(make_trainer, tiny):
    trainer = make_trainer()
    trainer.train()
    start = tiny().state_dict()
    reference, policy = trainer.reference.lm.state_dict(), trainer.policy.state_dict()
    assert all(torch.equal(start[k], reference[k]) for k in start)
    assert any((start[k] != policy[k]).any() for k in start)
    with pytest.raises(ValueError, match="ref_model shares parameters"):
        lm = tiny()
        make_trainer(model=lm, trainer_kwargs={"ref_model": lm})


def test_given_reference_is_used(make_trainer, tiny):
    trainer = make_trainer(trainer_kwargs={"ref_model": tiny(seed=7)})
    _, metrics = trainer.step()
    assert metrics["objective/kl"] > 0.01


def test_model_whose_logits_are_not_a_linear_head_is_refused(tiny):
    class Scaled(type(tiny())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    with pytest.raises(ValueError, match="not a linear head"):
        load_policy(Scaled(tiny().config))
    lm = tiny()
    lm.set_output_embeddings(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="no trunk with a plain linear head"):
        load_policy(lm)


def test_soft_capped_logits_are_accepted_and_used(tiny):
    """A model that caps its logits says so in its config; the kernels then cap them too."""

    class Capped(type(tiny())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2.0 * torch.tanh(out.logits / 2.0)
            return out

    config = tiny().config
    with pytest.raises(ValueError, match="not a linear head"):
        load_policy(Capped(config))
    config.final_logit_softcapping = 2.0
    assert with_value(load_policy(Capped(config)), "head", 1.0).logit_softcap == 2.0


def test_dropout_is_off_in_the_loop(make_trainer, tiny):
    lm = tiny()
    lm.config.hidden_dropout = lm.config.attention_dropout = 0.5
    trainer = make_trainer(model=type(lm)(lm.config).train())
    trainer.step()
    assert not trainer.model.training
    _, metrics = make_trainer(model=type(lm)(lm.config).train()).step()
    assert metrics["objective/kl"] == 0.0


def test_peft_adapters_off_are_the_reference(make_trainer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    torch.manual_seed(0)
    trainer = make_trainer(trainer_kwargs={"peft_config": config})
    assert trainer.reference is None
    _, metrics = trainer.step()
    assert metrics["objective/kl"] != 0
    trainer.train(resume=True)
    again = make_trainer(num_updates=4, trainer_kwargs={"peft_config": config})
    again.train(resume=True)
    assert again.update == 4


def test_peft_config_without_peft_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        load_policy(tiny(), peft_config=object())


def test_reference_that_shares_parameters_is_refused(make_trainer, tiny):
    peft = pytest.importorskip("peft")
    lm = tiny()
    with pytest.raises(ValueError, match="ref_model shares parameters with the policy"):
        make_trainer(model=lm, trainer_kwargs={"ref_model": lm})
    assert all(p.requires_grad for p in lm.parameters())
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"])
    with pytest.raises(ValueError, match="ref_model shares parameters with the policy"):
        make_trainer(model=lm, trainer_kwargs={"ref_model": lm, "peft_config": config})
    other = tiny()
    other.get_output_embeddings().weight = lm.get_output_embeddings().weight
    with pytest.raises(ValueError, match="ref_model shares parameters with the policy"):
        make_trainer(model=lm, trainer_kwargs={"ref_model": other})


def test_prompt_learning_and_frozen_policies_are_refused(make_trainer, tiny):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PromptTuningConfig puts its own tokens before"):
        make_trainer(trainer_kwargs={"peft_config": config})
    with pytest.raises(ValueError, match="PromptTuningConfig puts its own tokens before"):
        make_trainer(model=peft.get_peft_model(tiny(), config))
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        make_trainer(model=tiny().requires_grad_(False))
