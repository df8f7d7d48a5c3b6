"""Products of float32 numbers in float32: never in tf32 or bfloat16, whatever torch was told for the networks beside us, autocast
included.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from iotsolve.kernels.once import Backward

__all__ = ["in_full", "product"]

_EXACT = ("none", "ieee")


def _settings() -> tuple[tuple[Any, str], ...]:
    """Where torch keeps the precision of products of float32 numbers; it has moved."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return ()
    return tuple((owner, "fp32_precision") for owner in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul))


def _cast() -> list[str]:
    """For which devices autocast makes products of float32 ones in half precision."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


def _is_loose() -> bool:
    if not (settings := _settings()):
        return torch.get_float32_matmul_precision() != "highest"
    everywhere = getattr(torch.backends, "fp32_precision", "none")
    return any(value not in _EXACT for value in (everywhere, *(getattr(*setting) for setting in settings)))


class in_full:
    """``with in_full():`` products in the precision of their numbers. The setting is the process's: whoever comes first sets it,
    and who leaves last puts it back. Autocast is the thread's.
    """

    _lock, _inside = threading.Lock(), 0
    _before: list[Any]

    def __enter__(self) -> None:
        self._uncast = ExitStack()
        for device in _cast():
            self._uncast.enter_context(torch.autocast(device, enabled=False))
        with self._lock:
            if in_full._inside == 0:
                in_full._before = self._tightened() if _is_loose() else []
            in_full._inside += 1

    def __exit__(self, *_: object) -> None:
        self._uncast.close()
        with self._lock:
            in_full._inside -= 1
            if in_full._inside == 0:
                for put_back in in_full._before:
                    put_back()

    def _tightened(self) -> list[Any]:
        if not (settings := _settings()):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            return [lambda: torch.set_float32_matmul_precision(before)]
        known = [(*setting, getattr(*setting)) for setting in settings]
        for owner, name, _ in known:
            setattr(owner, name, "ieee")
        return [lambda owner=owner, name=name, value=value: setattr(owner, name, value) for owner, name, value in known]


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in the precision of its numbers, as are the derivatives of any order."""
    loose = x.dtype == torch.float32 and (_is_loose() or bool(_cast()))
    return _Product.apply(x, y) if loose else x @ y


class _Product(Backward):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with in_full():
            return x @ y

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, y = ctx.saved_tensors
        of_x, of_y = ctx.needs_input_grad
        gx = _Product.apply(upstream, y.mT) if of_x else None
        gy = _Product.apply(x.mT, upstream) if of_y else None
        return None if gx is None else gx.sum_to_size(x.shape), None if gy is None else gy.sum_to_size(y.shape)
