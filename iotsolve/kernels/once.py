"""Derivatives that are to be had once: asking for the next one raises, and never gives one with a part missing.

torch's own ``once_differentiable`` raises only where the upstream derivative has a history; that of a mean has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Backward", "Refuse", "check_reverse", "final", "single"]

_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)
_ONE = (
    "many derivatives at once (is_grads_batched=True, or vectorize=True of torch.autograd.functional): these are made by loops "
    "that take one at a time. Leave that argument out; a Jacobian is one torch.autograd.grad a row."
)
_FORWARD = (
    "derivatives in forward mode (torch.autograd.forward_ad, jvp): those of the library are made backwards. Take "
    "torch.autograd.grad; the derivative of a number along a direction is the sum of its gradient times that."
)


class Backward(torch.autograd.Function):
    """What is differentiated backwards; in forward mode it raises in words."""

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> None:
        raise RuntimeError(_FORWARD)


def check_reverse(named: dict[str, Tensor]) -> None:
    """Raise if one of the tensors carries a derivative in forward mode, which would be lost, or followed in a part only."""
    for name, x in named.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{name} is followed by {_FORWARD}")


def single(*upstream: Tensor | None) -> None:
    """Raise if an upstream derivative stands for many."""
    if any(x is not None and _is_batched(x) for x in upstream):
        raise RuntimeError(_ONE)


class Refuse(Backward):
    """The identity, connected to the inputs by a derivative that is not to be had."""

    @staticmethod
    def forward(ctx, message: str, x: Tensor, *inputs: Tensor) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        raise RuntimeError(ctx.message)


def final(message: str, found: Sequence[Tensor | None], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients found, which raise if they are differentiated in turn."""
    if not torch.is_grad_enabled():
        return tuple(found)
    inputs = tuple(x for x in inputs if x is not None)
    return tuple(None if x is None else Refuse.apply(message, x, *inputs) for x in found)
