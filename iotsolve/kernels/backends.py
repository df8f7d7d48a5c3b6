"""Which code makes a pass: eager torch everywhere, Triton on a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["BACKENDS", "check", "chosen", "usable"]

BACKENDS = ("auto", "eager", "triton")


def check(backend: str) -> str:
    """The name, if it is one."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}; 'auto' is Triton on a GPU and torch elsewhere."
        )
    return backend


def chosen(backend: str, x: Tensor, agrees: Callable[[ModuleType, torch.device], bool]) -> ModuleType | None:
    """The module of Triton kernels, or None for eager torch.

    Args:
        backend: "auto" takes Triton for float32 on a GPU, if it is installed and, tried once on a small case, agrees with
            eager; a warning says once why not. "triton" takes it or raises. "eager" does not.
        x: what is to be read.
        agrees: tries the kernels on a device.

    Raises:
        ValueError: "triton" is impossible.
    """
    if backend == "eager" or (backend == "auto" and (x.device.type != "cuda" or x.dtype == torch.float64)):
        return None
    why = "the kernels sum in float32, and float64 asks for more" if x.dtype == torch.float64 else _obstacle(x)
    if why is None:
        if backend == "triton" or _trusted(x.device, agrees):
            return _module()
        return None
    if backend == "triton":
        raise ValueError(
            f"backend = 'triton' on {x.device.type}, {x.dtype}: {why}. backend='auto' takes it where it can."
        )
    _warn_once(why)
    return None


def usable(x: Tensor, agrees: Callable[[ModuleType, torch.device], bool]) -> bool:
    """Whether kernels that count in the inputs' own precision are used for ``x``; a warning says once why not on a GPU."""
    if x.device.type != "cuda" and not _is_interpreted(x):
        return False
    why = _obstacle(x)
    if why is not None:
        _warn_once(why)
    return why is None and _trusted(x.device, agrees)


def _is_interpreted(x: Tensor) -> bool:
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(x: Tensor) -> str | None:
    if x.device.type == "cpu" and not _is_interpreted(x):
        return "Triton needs a GPU (or its interpreter, by TRITON_INTERPRET=1 in the environment)"
    if x.device.type not in ("cpu", "cuda"):
        return "the kernels are for CUDA"
    try:
        _module()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


@cache
def _module() -> ModuleType:
    from iotsolve.kernels import streamed

    return streamed


@cache
def _trusted(device: torch.device, agrees: Callable[[ModuleType, torch.device], bool]) -> bool:
    """Whether the kernels, on this very device, give what eager torch gives; asked once a process."""
    try:
        right = agrees(_module(), device)
        why = "they disagreed with torch on a small case"
    except Exception as error:  # a compiler or a driver may raise anything, and what works without them must go on
        right, why = False, f"they could not be run ({type(error).__name__}: {error})"
    if not right:
        _warn_once(f"the kernels are not used on {device}, since {why}")
    return right


@cache
def _warn_once(why: str) -> None:
    warnings.warn(f"torch does what kernels of Triton would: {why}.", RuntimeWarning, stacklevel=4)
