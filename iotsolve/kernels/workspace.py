"""Buffers for stored kernels, used again: the pages of a fresh one cost as much as the exponentials that go into it.

A buffer is lent to one borrower at a time. What is given back is kept for the next, up to :data:`KEPT` bytes in all; more goes
back to the system, so that a large problem leaves no large memory behind.
"""

from __future__ import annotations

import math
import os
from threading import Lock
from weakref import finalize

import numpy as np

__all__ = ["KEPT", "STORED", "borrow", "lend_to"]

KEPT = 2**27
STORED = 2**29  # bytes of a kernel of points, whose costs nobody holds, that is stored for as long as it is read
_free: list[np.ndarray] = []
_lock = Lock()


def _after_fork() -> None:
    global _lock
    _lock = Lock()
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _take(size: int) -> np.ndarray:
    with _lock:
        fitting = [k for k, buffer in enumerate(_free) if size <= buffer.nbytes <= 2 * size]
        if fitting:
            return _free.pop(min(fitting, key=lambda k: _free[k].nbytes))
    return np.empty(size, np.uint8)


def _give(buffer: np.ndarray) -> None:
    with _lock:
        _free.append(buffer)
        while sum(x.nbytes for x in _free) > KEPT:
            _free.pop(0)


class borrow:
    """``with borrow(shape, dtype) as array``: an array of arbitrary content, given back at the end.

    Example:
        >>> with borrow((2, 3), np.float32) as array:
        ...     array.shape
        (2, 3)
    """

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        self.buffer = _take(math.prod(shape) * np.dtype(dtype).itemsize)
        self.array = _as(self.buffer, shape, dtype)

    def __enter__(self) -> np.ndarray:
        return self.array

    def __exit__(self, *_: object) -> None:
        _give(self.buffer)


def lend_to(borrower: object, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of arbitrary content for as long as the borrower lives; nobody else may hold on to it."""
    buffer = _take(math.prod(shape) * np.dtype(dtype).itemsize)
    finalize(borrower, _give, buffer)
    return _as(buffer, shape, dtype)


def _as(buffer: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return buffer[: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
