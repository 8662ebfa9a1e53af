# SPDX-License-Identifier: Apache-2.0
"""The configuration refuses what cannot work, in one line that names field and remedy."""

import json
from dataclasses import asdict, replace

import pytest

from klq import KLQConfig, load_preset
from klq.config import merged


def test_tau_has_three_names_and_one_value():
    assert KLQConfig().tau == 0.05
    assert KLQConfig(beta=0.1).tau == KLQConfig(kl_coef=0.1).tau == KLQConfig(tau=0.1).tau == 0.1
    with pytest.raises(ValueError, match="tau and beta are names of one setting"):
        KLQConfig(tau=0.1, beta=0.1)


def test_override_of_tau_under_another_name_wins():
    assert merged({"tau": 0.3}, {"kl_coef": 0.2}).tau == 0.2


def test_config_survives_json_and_replace():
    args = KLQConfig(beta=0.2, reward_weights=[1, 2])
    assert KLQConfig(**json.loads(json.dumps(asdict(args)))) == args
    assert replace(args, tau=0.4).tau == 0.4


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("alpha", 0, ValueError),
        ("alpha", 1.5, ValueError),
        ("lam", -0.1, ValueError),
        ("gamma", 2, ValueError),
        ("tau", float("nan"), ValueError),
        ("tau", 0, ValueError),
        ("tau", "big", TypeError),
        ("temperature", 0, ValueError),
        ("algorithm", "dpo", ValueError),
        ("truncation", "both", ValueError),
        ("lr_scheduler_type", "cosine", ValueError),
        ("num_updates", 0, ValueError),
        ("num_updates", 1.5, TypeError),
        ("bf16", 1, TypeError),
        ("update_epochs", True, TypeError),
        ("max_prompt_length", 0, ValueError),
        ("report_to", 3, TypeError),
    ],
)
def test_impossible_value_names_the_field(field, value, error):
    with pytest.raises(error, match=field) as caught:
        KLQConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_score_and_bootstrap_of_a_cut_response_exclude_each_other():
    with pytest.raises(ValueError, match="never both"):
        KLQConfig(truncation="bootstrap", missing_eos_penalty=1.0)


def test_preset_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown preset 'nope': choose one of docsum, exact"):
        load_preset("nope")
    with pytest.raises(ValueError, match="'exact' has no setting lamda"):
        load_preset("exact", lamda=0.5)
