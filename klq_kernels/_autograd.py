# SPDX-License-Identifier: Apache-2.0
"""What every backward here shares: it can be differentiated once, and says so."""

from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_order(op: str):
    """For `backward` of an autograd.Function: a backward with create_graph=True raises.

    Without it a gradient penalty would silently add nothing: the gradients are made by kernels that
    autograd does not see into.
    """

    def decorate(backward):
        inner = once_differentiable(backward)

        @wraps(backward)
        def run(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{op}: cannot be differentiated twice (create_graph=True); "
                    "use backend='reference'"
                )
            return inner(ctx, *grads)

        return run

    return decorate


def times(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream, where 0 stays 0: inactive tokens and banned logits stay out of an upstream
    that is not finite."""
    return torch.where(grad == 0, 0.0, grad * upstream)
