"""Derivatives that are to be had once: asking for the next one raises, and never gives one with a part missing.

torch's own ``once_differentiable`` raises only where the upstream derivative has a history; that of a mean has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Refuse", "final"]


class Refuse(torch.autograd.Function):
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
