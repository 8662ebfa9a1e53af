# SPDX-License-Identifier: Apache-2.0
"""The LM head past 2^31 elements on a GPU: exponentials and logits of all tokens in one chunk, and
a weight and its gradient."""

import pytest
import torch
from gpu_calls import BF16, DEVICE, as_in_production
from oracle import same_bits

from klq_kernels import linear_token_logprobs

pytestmark = pytest.mark.gpu
ROWS, WIDTH, VOCABULARY = 17000, 64, 131072  # element 2^31 of the logits is in row 16384


@pytest.fixture(autouse=True)
def memory():
    """Enough of it, and given back: other workers need it."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 30:
        pytest.skip(f"needs 30 GiB of free device memory, has {free:.1f}")
    as_in_production()
    yield
    torch.cuda.empty_cache()


def gradients(h, w, a, up, **how):
    h, w = (x.detach().requires_grad_() for x in (h, w))
    out = linear_token_logprobs(h, w, a, **how)
    return out.detach(), *torch.autograd.grad(out, (h, w), up)


@pytest.mark.parametrize("keep", [0, 1 << 40], ids=["made again", "kept"])
def test_logits_past_2_31_elements(keep):
    h = torch.randn(ROWS, WIDTH, device=DEVICE).to(BF16)
    w = (torch.randn(VOCABULARY, WIDTH, device=DEVICE) * WIDTH**-0.5).to(BF16)
    a = torch.randint(VOCABULARY, (ROWS,), device=DEVICE)
    up = torch.randn(ROWS, device=DEVICE)
    lp, dh, dw = gradients(h, w, a, up, chunk_bytes=1 << 40, keep_bytes=keep)
    few = torch.tensor([0, 1, *range(16380, 16388), ROWS - 1], device=DEVICE)
    logits = (h[few].double() @ w.double().T).requires_grad_()
    want = logits.log_softmax(-1).gather(-1, a[few, None])[:, 0]
    (g,) = torch.autograd.grad(want, logits, up[few].double())
    assert ((lp[few] - want.detach()).abs() <= 0.05).all()  # of rounded logits, where they are
    off = (dh[few].double() - g @ w.double()).norm() / (g @ w.double()).norm()
    assert off <= 2**-6
    small = gradients(h, w, a, up, chunk_bytes=64 << 20)
    assert same_bits(lp, small[0])
    for x, y in ((dh, small[1]), (dw, small[2])):
        assert (x.double() - y.double()).norm() <= 2**-7 * y.double().norm()


@pytest.mark.parametrize("chunks", [1, 2])
def test_weight_past_2_31_elements(chunks):
    width, vocabulary, rows = 16400, 131080, 64  # the border is in row 130944
    h = torch.randn(rows, width, device=DEVICE).to(BF16)
    w = torch.empty(vocabulary, width, dtype=BF16, device=DEVICE).normal_(0, width**-0.5)
    a = torch.randint(vocabulary, (rows,), device=DEVICE)
    few = torch.tensor([0, 7, *range(130942, 130947), vocabulary - 1], device=DEVICE)
    a[: len(few)] = few
    up = torch.randn(rows, device=DEVICE)
    bytes_a_row = 2 * vocabulary
    _, _, dw = gradients(h, w, a, up, chunk_bytes=bytes_a_row * -(-rows // chunks))
    got = dw[few].double()
    del dw
    logits = torch.cat([h @ part.T for part in w.split(8192)], 1).double()
    g = -logits.softmax(-1)[:, few]
    g += (a[:, None] == few).double()
    want = (g * up.double()[:, None]).T @ h.double()
    assert (got - want).norm() <= 2**-7 * want.norm()
