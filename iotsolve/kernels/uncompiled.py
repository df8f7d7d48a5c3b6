"""What ``torch.compile`` is to leave as it is: loops that numba or Triton has compiled already, and questions about data."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["uncompiled"]


def uncompiled(function: Callable) -> Callable:
    """A function that a compiled caller calls as it is, one graph before it and one after.

    Without Dynamo, which takes seconds to import, it is not asked for.
    """
    known: list[Callable] = []

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not hasattr(dynamo, "disable"):  # as while it is being imported
            return function(*args, **given)
        if not known:
            known.append(dynamo.disable(function))
        return known[0](*args, **given)

    call._torchdynamo_disable = True  # what Dynamo looks for before it reads a function
    return call
