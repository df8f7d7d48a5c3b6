"""Whether what came in is as it was. Arrays are the caller's and are not copied; outputs are made when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Watch"]

_WHOLE = 2**16  # entries up to which all are remembered
_COLUMNS = 16  # entries that are remembered of a row otherwise


@dataclass(frozen=True)
class Watch:
    """What is known of some tensors: torch counts its own changes in place; of NumPy's arrays the entries are remembered, of
    large ones some of every row and every column.
    """

    seen: tuple[tuple[str, Tensor, int | np.ndarray], ...] = ()

    @classmethod
    def over(cls, named: dict[str, Tensor], *, as_numpy: bool) -> Watch:
        """A watch over tensors by name, that share memory with NumPy's arrays or do not."""
        if as_numpy:
            return cls(tuple((name, x.detach(), _sample(x.detach())) for name, x in named.items()))
        return cls(tuple((name, x, x._version) for name, x in named.items() if not x.is_inference()))

    def changed(self) -> str | None:
        """The name of something that has been changed in place."""
        for name, x, known in self.seen:
            if isinstance(known, int):
                if x._version != known:
                    return name
            elif not np.array_equal(_sample(x), known, equal_nan=True):
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
    """All entries, or some of every row and not the same of the next one."""
    if 0 in x.stride():  # what a batch shares is looked at once
        x = x[tuple(0 if stride == 0 else slice(None) for stride in x.stride())]
    if x.numel() <= _WHOLE or x.dim() < 2:
        return x.numpy().copy()
    rows = x.reshape(-1, x.shape[-1]) if x.is_contiguous() or x.dim() == 2 else x[(0,) * (x.dim() - 2)]
    n, m = rows.shape
    index = torch.arange(n, device="cpu")[:, None] * 7 + torch.arange(_COLUMNS, device="cpu") * (m // _COLUMNS + 1)
    return rows.gather(1, index % m).numpy()
