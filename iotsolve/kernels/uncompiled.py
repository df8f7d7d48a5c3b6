"""What ``torch.compile`` is to leave as it is, and ``torch.func`` cannot enter: loops that numba or Triton has compiled already,
and questions about data.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["uncompiled"]

_is_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def uncompiled(function: Callable) -> Callable:
    """A function that a compiled caller calls as it is, one graph before it and one after.

    Without Dynamo, which takes seconds to import, it is not asked for.

    Raises:
        RuntimeError: in the call, inside a transform of ``torch.func``.
    """
    known: list[Callable] = []

    def checked(*args: Any, **given: Any) -> Any:
        if _is_transformed():
            raise RuntimeError(
                f"{function.__qualname__} inside torch.func (grad, vjp, jvp, vmap, ...): its derivatives are those of "
                "torch.autograd. Take torch.autograd.grad of the value; many problems at once are a batch, costs with leading "
                "dimensions."
            )
        return function(*args, **given)

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not hasattr(dynamo, "disable"):  # as while it is being imported
            return checked(*args, **given)
        if not known:
            known.append(dynamo.disable(checked))
        return known[0](*args, **given)

    call._torchdynamo_disable = True  # what Dynamo looks for before it reads a function
    return call
