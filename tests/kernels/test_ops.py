# SPDX-License-Identifier: Apache-2.0
"""What holds for every op on every backend, device and dtype: the truth within rule 7."""

import torch
from oracle import check, check_row_sums, grid


@grid()
def test_matches_the_float64_truth(spec, case, device, backend, dtype):
    """Outputs and gradients, over every case of the registry (6-cases 11, 12, 15, 28, 39, 43-50,
    52-57, 59, 61, 72); inputs are left as they were."""
    inputs = spec.inputs(device, dtype, case)
    got = check(spec, inputs, backend, dtype)
    capped = inputs.get("logit_softcap") is not None
    if backend != "reference" and "logits" in got.grads and not capped:
        rows = got.grads["logits"]
        check_row_sums(rows[rows.isfinite().all(-1)])
    if spec.name == "token_logprobs":
        assert (got.outputs["out"] <= 0).all()
    if "mask" in inputs:
        inactive = inputs["mask"] == 0
        for name, x in got.outputs.items():
            if x.shape == inactive.shape:
                assert (x[inactive] == 0).all(), name
        for name in ("logits", "values", "hidden"):
            if name in got.grads:
                assert (got.grads[name][inactive] == 0).all(), name
    if inputs.get("mask") is not None and not inputs["mask"].any():
        for name, x in (got.outputs | got.grads).items():
            assert torch.count_nonzero(x) == 0, name
