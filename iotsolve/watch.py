"""Whether what came in is as it was. Arrays are the caller's and are not copied; outputs are made when asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Watch"]

_WHOLE = 2**14  # entries up to which all are remembered
_MOST = 2**16  # rows of which an entry is remembered otherwise
_PRIME = 1021  # sums of an array: few enough that they stay in the nearest cache
_STRIDE = 7919  # a prime: entries are not those of a diagonal, and of all columns


@dataclass(frozen=True)
class Watch:
    """What is known of some tensors: torch counts its own changes in place; of NumPy's arrays the entries are remembered, of
    large ones one of every row and every column, and sums of all, as bits: what changes one entry, or its place, changes those.
    """

    seen: tuple[tuple[str, Tensor, int | np.ndarray], ...] = ()

    @classmethod
    def over(cls, named: dict[str, Tensor], *, as_numpy: bool) -> Watch:
        """A watch over tensors by name, that share memory with NumPy's arrays or, as a number beside them may, do not."""
        seen = []
        for name, x in named.items():
            if as_numpy and x.device.type == "cpu" and x.dtype != torch.bfloat16:
                seen.append((name, x.detach(), _sample(x.detach())))
            elif not x.is_inference():
                seen.append((name, x, x._version))
        return cls(tuple(seen))

    def changed(self) -> str | None:
        """The name of something that has been changed in place."""
        for name, x, known in self.seen:
            if isinstance(known, int):
                if x._version != known:
                    return name
            elif not np.array_equal(_sample(x), known):
                return name
        return None

    def check(self) -> None:
        """Raise a ValueError if something has been changed in place: what is computed now would be of other data."""
        if (name := self.changed()) is not None:
            raise ValueError(
                f"{name} was changed in place after the problem had been solved: outputs are computed when they are asked for, "
                "and would be of other data. Read what you need before you change it, or make the problem of a copy."
            )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Watch, ()  # a copy has tensors of its own, that nobody else knows


def _sample(x: Tensor) -> np.ndarray:
    """The bits of all entries, or of one of every row and every column, up to many, and sums of all, without a carry."""
    values = x.numpy()
    values = values.view(f"u{values.itemsize}")
    if 0 in values.strides:  # what a batch shares is looked at once
        values = values[tuple(0 if stride == 0 else slice(None) for stride in values.strides)]
    if values.size <= _WHOLE:
        return values.copy()
    *batch, m = values.shape
    n = math.prod(batch)
    total = _sums(values)
    rows = np.arange(0, n, -(-n // _MOST))
    each = -(-m // len(rows))
    columns = (rows[:, None] * each + np.arange(each)) * _STRIDE % m
    some = values[(*(z[:, None] for z in np.unravel_index(rows, batch)), columns)] if batch else values[columns[0]]
    return np.append(some.ravel().astype(np.uint64), total)


def _sums(values: np.ndarray) -> np.ndarray:
    """Over places that differ by a multiple of a prime, of an array in one piece; else over rows and over columns."""
    if not (values.flags.c_contiguous or values.flags.f_contiguous):
        return np.r_[values.sum(0, dtype=np.uint64).ravel(), values.sum(-1, dtype=np.uint64).ravel()]
    flat = values.ravel(order="K")
    whole = len(flat) // _PRIME * _PRIME
    return np.r_[flat[:whole].reshape(-1, _PRIME).sum(0, dtype=np.uint64), flat[whole:]]
