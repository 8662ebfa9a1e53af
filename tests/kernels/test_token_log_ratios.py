# SPDX-License-Identifier: Apache-2.0
"""token_log_ratios: exact zeros, exact antisymmetry, banned tokens."""

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import token_log_ratios, token_logprobs

places = everywhere("token_log_ratios")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(device, dtype)


@places
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_case_73_same_model_is_exactly_zero_and_swapping_negates(device, backend, dtype, softcap):
    """Rule 6, in another layout of the reference too."""
    policy = draw(6, 50, 301, device=device, dtype=dtype)
    ref = draw(6, 50, 301, seed=1, device=device, dtype=dtype)
    actions = torch.arange(300, device=device).view(6, 50)
    how = {"temperature": 0.7, "logit_softcap": softcap, "backend": backend}
    copy = policy.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.count_nonzero(token_log_ratios(policy, copy, actions, **how)) == 0
    forth = token_log_ratios(policy, ref, actions, **how)
    back = token_log_ratios(ref, policy, actions, **how)
    assert same_bits(forth, -back)


@places
def test_rule_8_banned_tokens(device, backend):
    """-inf banned by the policy, +inf by the reference, NaN by both; neighbours finite."""
    policy, ref = draw(4, 9, device=device), draw(4, 9, seed=1, device=device)
    policy[0, 2] = policy[2, 2] = ref[1, 2] = ref[2, 2] = -torch.inf
    actions = torch.full((4,), 2, device=device)
    z = policy.requires_grad_()
    out = token_log_ratios(z, ref, actions, backend=backend)
    assert out[0] == -torch.inf and out[1] == torch.inf and out[2].isnan() and out[3].isfinite()
    (grad,) = torch.autograd.grad(out, z, torch.ones_like(out))
    assert grad.isfinite().all() and torch.count_nonzero(grad[[0, 2], 2]) == 0


@places
def test_mixed_dtypes(device, backend):
    """A bfloat16 policy against a float32 reference: each is read in its own dtype."""
    policy = draw(5, 31, device=device, dtype=torch.bfloat16)
    ref = draw(5, 31, seed=1, device=device)
    actions = torch.arange(5, device=device)
    got = token_log_ratios(policy, ref, actions, backend=backend)
    parts = [token_logprobs(z, actions, backend=backend) for z in (policy, ref)]
    torch.testing.assert_close(got, parts[0] - parts[1], rtol=0, atol=1e-6)


@places
def test_the_reference_is_a_constant(device, backend):
    z, ref = (draw(5, 31, seed=s, device=device).requires_grad_() for s in (0, 1))
    token_log_ratios(z, ref, torch.arange(5, device=device), backend=backend).sum().backward()
    assert z.grad is not None and ref.grad is None
