# SPDX-License-Identifier: Apache-2.0
"""The hf engine: where responses end (case 77), temperature and other sampling settings (79)."""

import logging

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GenerationConfig

from klq.rollout import HFRollout, eos_ids

EOS, STOP = 15, 14


def engine(lm, eos=frozenset({EOS}), pad_id=0, length=8, temperature=1.0, **settings):
    return HFRollout(
        lm,
        eos=set(eos),
        pad_id=pad_id,
        max_completion_length=length,
        temperature=temperature,
        generation_kwargs=settings,
    )


def biased(lm, token, by=50.0):
    """The same model, which prefers one token by far."""
    head = lm.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[token] = by
    return lm


def test_case_77_response_ends_at_eos_and_is_cut_at_the_limit(tiny):
    torch.manual_seed(0)
    out = engine(tiny()).generate([[1, 2, 3], [4]] * 16)
    for ids, reason in zip(out.response_ids, out.finish_reasons, strict=True):
        assert (ids[-1] == EOS) == (reason == "stop")
        assert EOS not in ids[:-1]
        assert len(ids) == 8 or reason == "stop"
    assert {"stop", "length"} == set(out.finish_reasons)


def test_case_77_pad_equal_to_eos_and_eos_in_the_prompt_change_nothing(tiny):
    prompts = [[EOS, 2, EOS], [EOS]] * 8
    runs = []
    for pad_id in (0, EOS):
        torch.manual_seed(1)
        runs.append(engine(tiny(), pad_id=pad_id).generate(prompts))
    assert runs[0] == runs[1]
    assert min(map(len, runs[0].response_ids)) >= 1


def test_case_77_any_stop_token_of_tokenizer_and_generation_config_ends(tiny):
    lm = tiny()
    lm.generation_config.eos_token_id = [EOS, STOP]

    class Tokenizer:
        eos_token_id = 9

    assert eos_ids(Tokenizer(), lm) == {9, STOP, EOS}
    out = engine(biased(lm, STOP), eos_ids(Tokenizer(), lm)).generate([[1, 2]])
    assert (out.response_ids, out.finish_reasons) == ([[STOP]], ["stop"])


def test_model_without_eos_always_runs_to_the_limit(tiny):
    out = engine(tiny(eos=None), eos=()).generate([[1], [2, 3]])
    assert out.finish_reasons == ["length"] * 2
    assert [len(ids) for ids in out.response_ids] == [8, 8]


def test_left_padding_does_not_change_what_a_prompt_gets(tiny):
    lm = biased(tiny(), 3)
    alone = engine(lm).generate([[4, 5]]).response_ids[0]
    assert engine(lm).generate([[1] * 12, [4, 5]]).response_ids[1] == alone


def test_case_79_own_generation_config_is_set_aside_and_put_back(tiny):
    lm = tiny()
    own = GenerationConfig(do_sample=True, top_k=1, eos_token_id=EOS)
    lm.generation_config = own
    torch.manual_seed(0)
    out = engine(lm).generate([[1, 2]] * 32)
    assert len({tuple(ids) for ids in out.response_ids}) > 1, "top_k=1 was in force"
    assert lm.generation_config is own


def test_case_79_samples_follow_the_tempered_distribution(tiny):
    lm, temperature, n = tiny(), 0.7, 4000
    torch.manual_seed(0)
    out = engine(lm, length=1, temperature=temperature).generate([[1, 2, 3]] * n)
    counts = torch.bincount(torch.tensor([ids[0] for ids in out.response_ids]), minlength=16)
    with torch.no_grad():
        p = (lm(torch.tensor([[1, 2, 3]])).logits[0, -1] / temperature).softmax(-1)
    assert (counts / n - p).abs().max() < 4 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}, {"bad_words_ids": [[3]]}])
def test_case_79_other_sampling_settings_warn(tiny, caplog, settings):
    logging.getLogger("klq").setLevel(logging.WARNING)
    made = engine(tiny(), **settings)
    assert "bias the log-ratio" in caplog.text and next(iter(settings)) in caplog.text
    assert {k: getattr(made.config, k) for k in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": 3}, "eos_token_id cannot be set there.*stop_token_ids"),
        ({"stop_strings": ["."], "max_time": 1.0}, "max_time, stop_strings cannot be set"),
        ({"num_return_sequences": 2}, "num_return_sequences cannot"),
        ({"top_kk": 5}, "top_kk cannot"),
        ({"top_k": -1}, "top_k"),
        ({"bad_words_ids": 3}, "bad_words_ids"),
    ],
)
def test_settings_that_do_more_than_sample_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(generation_kwargs=settings)


def test_stop_token_ids_end_a_response(make_trainer, tiny):
    trainer = make_trainer(model=biased(tiny(), 3), stop_token_ids=[3, STOP])
    rollout = trainer.rollout_engine.generate([[1, 2], [5]])
    assert (rollout.response_ids, rollout.finish_reasons) == ([[3], [3]], ["stop", "stop"])
    for bad in ([-1], [3.0], ["w"]):
        with pytest.raises((ValueError, TypeError), match="stop_token_ids"):
            make_trainer(stop_token_ids=bad)


def test_case_79_log_probs_everywhere_are_of_the_sampling_temperature(make_trainer, tiny):
    lm = tiny()
    trainer = make_trainer(model=lm, temperature=0.7)
    batch, _ = trainer.step()
    for row, ids in enumerate(batch.rollout.response_ids):
        start = batch.prompt_lengths[row]
        tokens = batch.tokens[row : row + 1, : start + len(ids)]
        with torch.no_grad():
            logits = trainer.reference.lm(tokens).logits[0, start - 1 : -1] / 0.7
        truth = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        found = batch.stored["old_logprobs"][row, : len(ids)]
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_bf16_samples_from_the_model_that_training_sees(make_trainer, tiny):
    lm, seen = tiny(), []
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is the process's
    try:
        trainer = make_trainer(model=lm, bf16=True)
        head = lm.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        trainer.rollout_engine.generate([[1, 2]])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen and set(seen) == {torch.bfloat16}
