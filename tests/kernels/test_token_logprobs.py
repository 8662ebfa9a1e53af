# SPDX-License-Identifier: Apache-2.0
"""token_logprobs: the rows that broke other kernels, layouts, and the promises of its docstring."""

import pytest
import torch
from oracle import everywhere, largest, same_bits

from klq_kernels import token_logprobs

places = everywhere("token_logprobs")
WIDTHS = (1, 2, 127, 1021, 1024, 1025, 32001, 50257, 50304, 128257, 129920, 151936, 152064)


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(device, dtype)


@places
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("peaked", [False, True])
def test_case_47_vocabularies_of_no_tile(device, backend, width, peaked):
    """Near-flat and very peaked rows, chosen token in the first and the last place."""
    logits = draw(2, width, device=device) * (30.0 if peaked else 1e-3)
    actions = torch.tensor([0, width - 1], device=device)
    got = token_logprobs(logits, actions, backend=backend)
    truth = logits.double().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    own = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    bound = 2 * (own.double() - truth).abs().max() + 2**-22 * largest(truth)
    bound += 2**-52  # the float64 truth itself rounds 1 + e
    assert (got.double() - truth).abs().max() <= bound


@places
def test_rule_6_never_above_zero(device, backend):
    """Case 72: p within rounding of 1, in every dtype, at every offset."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for offset in (0.0, 100.0, -1000.0):
            logits = (draw(64, 37, device=device) + offset).to(dtype)
            actions = logits.argmax(-1)
            logits[torch.arange(64, device=device), actions] += torch.linspace(
                0, 40, 64, device=device, dtype=torch.float32
            ).to(dtype)
            assert (token_logprobs(logits, actions, backend=backend) <= 0).all()


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_case_44_confident_target_gradient(device, backend, dtype, p):
    """dlogit of the chosen token is upstream times 1 - p: relative error, where a kernel that forms
    1 - softmax loses every digit."""
    if backend == "reference":
        return  # PyTorch's own onehot - softmax is such a kernel
    logits = torch.zeros(1, 101, device=device, dtype=torch.float64)
    logits[0, 7] = torch.logit(torch.tensor(p, dtype=torch.float64)) + torch.tensor(100.0).log()
    z = logits.to(dtype).requires_grad_()
    actions = torch.tensor([7], device=device)
    token_logprobs(z, actions, backend=backend).sum().backward()
    others = z.detach().double().clone()
    others[0, 7] = -torch.inf
    rest = (others.logsumexp(-1) - z.detach().double()[0, 7]).exp()
    truth = rest / (1 + rest)
    u = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    grain = 2.0**-25 if dtype == torch.float16 else 0.0
    assert (z.grad[0, 7].double() - truth).abs() <= u * truth + grain


@places
@pytest.mark.parametrize("block", [64, 1024, 2048])
def test_case_45_first_blocks_banned(device, backend, block):
    logits = draw(3, 5000, device=device)
    logits[:, :block] = -torch.inf
    logits[1, : block * 2] = -torch.inf
    logits[2, :4999] = -torch.inf
    z = logits.requires_grad_()
    actions = torch.tensor([4500, 4999, 4999], device=device)
    out = token_logprobs(z, actions, backend=backend)
    truth = z.detach().double().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-6)
    assert out[2] == 0
    out.sum().backward()
    assert z.grad.isfinite().all() and torch.count_nonzero(z.grad[:, :block]) == 0
    assert torch.count_nonzero(z.grad[2]) == 0


@places
def test_rule_8_banned_chosen_token(device, backend):
    """Case 45: -inf at the target is -inf, its gradient 0, every other entry -softmax; no NaN."""
    logits = draw(2, 9, device=device)
    logits[0, 4] = -torch.inf
    z = logits.requires_grad_()
    actions = torch.tensor([4, 4], device=device)
    out = token_logprobs(z, actions, backend=backend)
    assert out[0] == -torch.inf and out[1].isfinite()
    (grad,) = torch.autograd.grad(out, z, torch.ones_like(out))
    want = -z.detach()[0].softmax(-1)
    torch.testing.assert_close(grad[0], want, rtol=1e-5, atol=1e-7)
    assert grad[0, 4] == 0 and grad.isfinite().all()


@places
def test_case_46_rows_without_a_distribution(device, backend):
    """All -inf, +inf or NaN: that row's result is NaN when it is active and nothing when not; its
    neighbours never notice."""
    logits = draw(4, 33, device=device)
    clean = token_logprobs(logits, torch.arange(4, device=device), backend=backend)
    logits[0] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, 5] = torch.nan
    got = token_logprobs(logits, torch.arange(4, device=device), backend=backend)
    assert got[:3].isnan().all() and same_bits(got[3:], clean[3:])
    z = logits.requires_grad_()
    mask = torch.tensor([False, False, False, True], device=device)
    got = token_logprobs(z, torch.arange(4, device=device), mask=mask, backend=backend)
    got.sum().backward()
    assert torch.count_nonzero(got[:3]) == 0 and torch.count_nonzero(z.grad[:3]) == 0
    assert z.grad.isfinite().all()


@places
@pytest.mark.parametrize("offset", [-1e9, -1000.0, -100.0, 1000.0, 1e5, 1e6, 3e38])
def test_case_48_rows_far_from_zero(device, backend, offset):
    """Padded lanes and a zero-initialised max must not win; distance costs no precision."""
    logits = torch.full((1, 37), offset, device=device)
    out = token_logprobs(logits, torch.tensor([36], device=device), backend=backend)
    torch.testing.assert_close(out, torch.tensor([-37.0], device=device).neg().log().neg())
    if abs(offset) > 1e6:
        return
    logits = offset + torch.randn(4, 50304, generator=torch.Generator().manual_seed(1)).to(device)
    actions = torch.arange(4, device=device)
    out = token_logprobs(logits, actions, backend=backend)
    truth = token_logprobs(logits.double(), actions, backend="reference")
    plain = token_logprobs(logits, actions, backend="reference")
    bound = 2 * (plain - truth).abs().max() + 2.0**-22 * truth.abs().max()
    assert (out - truth).abs().max() <= bound


@places
def test_case_49_small_softcap_on_negative_logits(device, backend):
    """c = 1 on logits far below: every logit saturates at -c, so the row is flat, and zero-filled
    lanes would win."""
    logits = torch.full((2, 1500), -50.0, device=device)
    actions = torch.tensor([0, 1499], device=device)
    out = token_logprobs(logits, actions, logit_softcap=1.0, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 1500.0).log().neg(), rtol=1e-6, atol=0)


@places
@pytest.mark.parametrize("temperature", [0.1, 0.7, 10.0])
def test_case_50_softcap_first_then_temperature(device, backend, temperature):
    logits = draw(5, 41, device=device) * 4
    logits[0, 3] = -torch.inf  # stays banned under a soft-cap
    actions = torch.arange(5, device=device) + 5
    out = token_logprobs(
        logits, actions, temperature=temperature, logit_softcap=2.0, backend=backend
    )
    z = 2.0 * torch.tanh(logits.double() / 2.0) / temperature
    z = torch.where(logits == -torch.inf, -torch.inf, z)
    truth = z.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    banned = token_logprobs(
        logits[:1], torch.tensor([3], device=device), logit_softcap=2.0, backend=backend
    )
    assert banned[0] == -torch.inf


@places
def test_case_52_more_rows_than_a_grid(device, backend):
    logits = draw(65536 + 3, 5, device=device)
    actions = torch.arange(logits.shape[0], device=device) % 5
    z = logits.requires_grad_()
    out = token_logprobs(z, actions, backend=backend)
    truth = z.detach().log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    torch.testing.assert_close(z.grad.sum(-1), torch.zeros_like(out), rtol=0, atol=1e-6)


@places
def test_case_54_masks_of_one_token_and_one_percent(device, backend):
    logits = draw(40, 10, 23, device=device)
    actions = torch.zeros(40, 10, dtype=torch.long, device=device)
    full = token_logprobs(logits, actions, backend=backend)
    for mask in (
        torch.arange(400, device=device).view(40, 10) == 0,
        torch.arange(400, device=device).view(40, 10) == 399,
        draw(40, 10, seed=3, device=device) > 2.3,
        (draw(10, 40, seed=4, device=device) > 0).T,
    ):
        out = token_logprobs(logits, actions, mask=mask, backend=backend)
        assert same_bits(out, torch.where(mask, full, 0.0))


@places
def test_case_56_the_mask_decides_not_the_id(device, backend):
    """pad id 0, V - 1 or the end-of-text id under an active mask counts, under none does not."""
    logits = draw(1, 4, 11, device=device)
    actions = torch.tensor([[0, 10, 0, 10]], device=device)
    mask = torch.tensor([[True, True, False, False]], device=device)
    out = token_logprobs(logits, actions, mask=mask, backend=backend)
    assert (out[0, :2] < 0).all() and torch.count_nonzero(out[0, 2:]) == 0


@places
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_case_57_ids_of_any_integer_type_and_stride(device, backend, dtype):
    logits = draw(3, 6, 40, device=device)
    actions = torch.arange(18, device=device).view(3, 6)
    want = token_logprobs(logits, actions, backend=backend)
    odd = torch.cat([actions.new_zeros(1), actions.reshape(-1)]).to(dtype)[1:].view(3, 6)
    assert same_bits(token_logprobs(logits, odd, backend=backend), want)
    same = token_logprobs(logits, actions[:, :1].expand(3, 6), backend=backend)
    assert same_bits(same[:, 0], want[:, 0])


@places
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_case_58_upstream_of_another_dtype_or_stride(device, backend, dtype):
    z = draw(3, 7, device=device).requires_grad_()
    out = token_logprobs(z, torch.arange(3, device=device), backend=backend)
    (want,) = torch.autograd.grad(out, z, torch.full_like(out, 0.5), retain_graph=True)
    (wide,) = torch.autograd.grad(out.to(dtype), z, torch.full_like(out, 0.5).to(dtype),
                                  retain_graph=True)  # fmt: skip
    (stride,) = torch.autograd.grad(out, z, torch.tensor(0.5, device=device).expand(3))
    assert same_bits(wide, want) and same_bits(stride, want)


@places
def test_case_75_float16_near_its_limit(device, backend):
    logits = (draw(4, 64, device=device) * 30000).clamp(-65504, 65504).half()
    z = logits.requires_grad_()
    out = token_logprobs(z, z.detach().argmax(-1), backend=backend)
    out.sum().backward()
    assert out.isfinite().all() and z.grad.isfinite().all()


@places
def test_views_are_read_where_they_lie(device, backend):
    """logits[:, p-1:-1], a transposed batch, a slice of the vocabulary: same numbers as copies."""
    base = draw(4, 9, 64, device=device)
    views = {
        "response": base[:, 3:-1],
        "time first": base.transpose(0, 1),
        "vocabulary slice": base[..., 5:50],
        "every other row": base[:, ::2],
        "one row": base[1, 2],
    }
    for name, view in views.items():
        actions = torch.zeros(view.shape[:-1], dtype=torch.long, device=device)
        got = token_logprobs(view, actions, backend=backend)
        assert same_bits(got, token_logprobs(view.contiguous(), actions, backend=backend)), name
    for refused in (
        base.transpose(1, 2),
        base[..., ::2],
        base.as_strided((2, 3, 2, 8), (64, 9, 1000, 1)),
    ):
        if refused.shape[-1] != 8 or backend != "reference":
            with pytest.raises(ValueError, match="cannot be read where it lies"):
                ids = torch.zeros(refused.shape[:-1], dtype=torch.long, device=device)
                token_logprobs(refused, ids, backend=backend)
