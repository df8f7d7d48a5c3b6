"""Earlier representations as further candidates: MoCo's queue, as a module of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iotsolve.distributed import meet
from iotsolve.kernels.directions import normalised

__all__ = ["FeatureQueue"]


class FeatureQueue(nn.Module):
    """The last ``size`` representations, oldest out first (He et al., CVPR 2020).

    A loss reads it, and nothing but :meth:`update` writes to it, so that a symmetric loss or an evaluation leaves it alone.
    Slots that are not filled yet carry no mass. Contents, ids, pointer and fill are buffers: saved, loaded and moved with the
    module they are part of.

    Args:
        size: number of slots.
        dim: dimension of the representations; None: that of the first ones.

    Raises:
        ValueError: on sizes below 1, and in :meth:`update` on representations that do not fit.

    Example:
        >>> from contrastive import InfoNCELoss
        >>> queue, loss = FeatureQueue(8, 4), InfoNCELoss(0.5)
        >>> value = loss(torch.eye(4), torch.eye(4), queue=queue)
        >>> queue.update(torch.eye(4))
        >>> int(queue.fill), bool(loss(torch.eye(4), torch.eye(4), queue=queue) > value)
        (4, True)
    """

    def __init__(self, size: int, dim: int | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} = {value!r}: must be a whole number, at least 1.")
        self.size = size
        self.register_buffer("features", None if dim is None else torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), _NONE))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("fill", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(
        self, z: Tensor, ids: Any = None, *, gather_distributed: bool = False, process_group: Any = None
    ) -> None:
        """Put representations in, normalised; in evaluation nothing happens.

        Args:
            z: shape ``(N, D)``; of more than ``size`` the last ones stay.
            ids: what the loss is given as ``ids`` or ``labels``, shape ``(N,)``; without them a slot is nobody's positive.
            gather_distributed: put in those of all ranks, so that every rank's queue is the same.
            process_group: the ranks to gather from; None is all.
        """
        if not self.training:
            return
        ranks = meet(gather_distributed, process_group, z, check=lambda: self._admit(z, ids))
        features = ranks.gather(normalised(z.detach()))
        labels = torch.full((len(z),), _NONE, device=z.device) if ids is None else torch.as_tensor(ids, device=z.device)
        labels = ranks.gather(labels.long())[-self.size :]
        features = features[-self.size :]
        if self.features is None:
            self.features = features.new_zeros(self.size, features.shape[1])
        slots = (self.pointer + torch.arange(len(features), device=self.pointer.device)) % self.size
        self.features[slots] = features.to(self.features)
        self.ids[slots] = labels.to(self.ids.device)
        self.pointer.copy_((self.pointer + len(features)) % self.size)
        self.fill.copy_((self.fill + len(features)).clamp(max=self.size))

    def candidates(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The features in ``z``'s dtype and on its device, shape ``(size, D)``, and which slots are filled."""
        features = z.new_zeros(self.size, z.shape[1]) if self.features is None else self.features.to(z)
        return features, torch.arange(self.size, device=z.device) < self.fill.to(z.device)

    def check(self, z: Tensor) -> None:
        """Whether representations fit."""
        if z.dim() != 2 or (self.features is not None and z.shape[1] != self.features.shape[1]):
            dim = "D" if self.features is None else self.features.shape[1]
            raise ValueError(
                f"representations of shape {tuple(z.shape)} for a queue of (N, {dim}): they must have its dimension."
            )

    def _admit(self, z: Tensor, ids: Any) -> None:
        """Whether representations and their ids may go in."""
        self.check(z)
        if not bool(z.isfinite().all()):
            raise ValueError(
                "representations that are NaN or infinite: a queue would keep them for many batches. Has training diverged?"
            )
        given = torch.empty(0) if ids is None else torch.as_tensor(ids)
        if ids is not None and (tuple(given.shape) != (len(z),) or given.is_floating_point()):
            raise ValueError(
                f"ids have shape {tuple(given.shape)} and dtype {given.dtype}: must be ({len(z)},) whole numbers."
            )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}features")
        if self.features is None and saved is not None:
            self.features = torch.zeros_like(saved, device=self.ids.device)
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, dim={None if self.features is None else self.features.shape[1]}, fill={int(self.fill)}"
        )


def told_of(queue: FeatureQueue | None) -> dict[str, float]:
    """What the queues of many ranks must have in common, as numbers; of none, 0."""
    size, fill = (0, 0) if queue is None else (queue.size, int(queue.fill))
    features = 0.0 if queue is None or queue.features is None else float(queue.features.double().sum())
    return {"size of queue": size, "its fill": fill, "sum of its features": features}


_NONE = -(2**62)  # the id of a slot without one, which no anchor has
