"""Anderson's mixing of a fixed-point iteration, in tensors: for a batch, on any device, without waiting for it.

Of the last iterates and of what the map made of them, the combination whose residual is least takes the place of the last (type
II; Walker and Ni, SIAM J. Numer. Anal. 2011). :mod:`iotsolve.kernels.scaling` has the same in compiled steps, for one problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iotsolve.kernels.backends import usable
from iotsolve.marginals import Scalar

__all__ = ["Mixing"]


@dataclass(frozen=True)
class Mixing:
    """What is remembered: the iterate whose image comes next, the one before and its residual, and differences of both between
    earlier ones.
    """

    at: Float[Tensor, "b n"]
    x: Float[Tensor, "b n"]
    r: Float[Tensor, "b n"]
    dx: Float[Tensor, "b window n"]
    dr: Float[Tensor, "b window n"]
    gram: Float[Tensor, "b window window"]
    """The products of the differences of residuals with each other, in float64."""
    place: Int[Tensor, " b"]
    """Where the next differences go: each takes the place of the one before the others."""
    known: Float[Tensor, " b"]
    """How many of the differences are any, per problem; -1 before the first iterate."""
    least: Float[Tensor, " b"]
    """Squared residuals, the least since the memory was empty."""
    lowest: Float[Tensor, " b"]
    """The least of all; ``best`` is the image of its iterate, ``idle`` the steps since it fell by a tenth."""
    best: Float[Tensor, "b n"]
    idle: Float[Tensor, " b"]

    @classmethod
    def empty(cls, like: Float[Tensor, "b n"], window: int) -> Mixing:
        """To begin with, for iterates of this shape."""
        b, n = like.shape

        def full(value: float, *shape: int) -> Tensor:  # a tensor of its own: what is remembered is overwritten
            return like.new_full((b, *shape), value)

        at, x, r, best = (full(0.0, n) for _ in range(4))
        dx, dr = (full(0.0, window, n) for _ in range(2))
        gram, place = full(0.0, window, window).double(), full(0.0).long()
        return cls(at, x, r, dx, dr, gram, place, full(-1.0), full(math.inf), full(math.inf), best, full(0.0))

    def mixed(self, image: Float[Tensor, "b n"], weights: Float[Tensor, "b n"], most: Scalar = math.inf) -> Mixing:
        """What is remembered when the map has made ``image`` of the iterate; the next one is its ``at``. What was remembered may
        be overwritten, and is not to be used again.

        Residuals are measured in the metric of the weights, the same at every step. Where the residual has grown fourfold since
        its least, or a number is not finite, the iterate is the image, and what was known is forgotten. No entry with a weight is
        ``most`` or more from its image. Where the residual has not fallen by a tenth for four windows, mixing is given up: the
        iterate is the best one's image, and from then on always the image.
        """
        if self._fits(image) and usable(image, _agree):
            return self._by_kernels(image, weights, most)
        return self._in_torch(image, weights, most)

    def _fits(self, image: Tensor) -> bool:
        """Whether the kernels are made for such iterates; there are none of their derivatives."""
        if image.dtype not in (torch.float32, torch.float64) or (image.requires_grad and torch.is_grad_enabled()):
            return False
        return 0 < self.dx.shape[1] <= _WIDEST and 0 < image.shape[1] <= _LONGEST and len(image) > 0

    def _by_kernels(self, image: Tensor, weights: Tensor, most: Scalar) -> Mixing:
        from iotsolve.kernels import mixed

        rules = {"growth": _GROWTH**2, "fallen": _FALLEN**2, "patience": _PATIENCE, "ridge": _RIDGE}
        return replace(self, at=mixed.mixed(self, image, weights, most, **rules))

    def _in_torch(self, image: Tensor, weights: Tensor, most: Scalar) -> Mixing:
        begun, window = self.known.unsqueeze(-1) >= 0, self.dx.shape[1]
        finite = self.at.isfinite() & image.isfinite()
        here, r = torch.where(finite, self.at, 0.0), torch.where(finite & begun, image - self.at, 0.0)
        places, place = torch.arange(window, device=image.device), self.place.unsqueeze(-1)
        fresh, change = places == place, r - self.r
        dx, dr = (
            torch.where(fresh.unsqueeze(-1), new.unsqueeze(1), old)
            for old, new in ((self.dx, here - self.x), (self.dr, change))
        )
        weighed = torch.stack([change, r], 1).double() * weights.double().unsqueeze(1)
        size = (weighed[:, 1] * r).sum(-1).to(r.dtype).where(self.known >= 0, math.inf)
        grown = size > _GROWTH**2 * self.least
        known = torch.where(grown, 0.0, self.known)
        valid = (place - places) % window < known.unsqueeze(-1)
        new, right = (weighed @ dr.double().mT).unbind(1)
        gram = torch.where(fresh.unsqueeze(-1), new.unsqueeze(1), self.gram)
        gram = torch.where(fresh.unsqueeze(1), new.unsqueeze(-1), gram)
        shares = _shares(gram, right, valid).to(r.dtype)
        back = (shares.unsqueeze(-1) * torch.where(valid.unsqueeze(-1), dx + dr, 0.0)).sum(1)
        longest = torch.where(weights > 0, back, 0.0).abs().amax(-1, keepdim=True)
        step = r - torch.where(longest > most, back * (most / longest), back)
        sound = step.isfinite().all(-1, keepdim=True)
        following = torch.where(finite & begun, here + torch.where(sound, step, r), image)
        known = torch.where(sound.squeeze(-1), known + 1, (known + 1).clamp(max=0.0)).clamp(max=window)
        better, most_idle = size < _FALLEN**2 * self.lowest, _PATIENCE * window
        best, lowest = torch.where(better.unsqueeze(-1), image, self.best), torch.where(better, size, self.lowest)
        idle = torch.where(better & (self.idle <= most_idle), 0.0, self.idle + 1)
        given_up, now = (idle > most_idle).unsqueeze(-1), ((self.idle <= most_idle) & lowest.isfinite()).unsqueeze(-1)
        following = torch.where(given_up, torch.where(now, best, image), following)
        least = torch.where(grown, size, torch.minimum(self.least, size))
        return Mixing(following, here, r, dx, dr, gram, (self.place + 1) % window, known, least, lowest, best, idle)

    def restarted(self, those: Tensor) -> Mixing:
        """For some problems an empty memory; of mixing that was given up it stays known."""
        empty = those & (self.idle <= _PATIENCE * self.dx.shape[1])
        known, least = torch.where(those, -1.0, self.known), torch.where(those, torch.inf, self.least)
        lowest, idle = torch.where(empty, torch.inf, self.lowest), torch.where(empty, 0.0, self.idle)
        return replace(self, known=known, least=least, lowest=lowest, idle=idle)

    def given_up(self, those: Tensor) -> Mixing:
        """For some problems no more mixing."""
        return replace(self, idle=torch.where(those, torch.inf, self.idle))

    def where(self, mine: Tensor, other: Mixing) -> Mixing:
        """This memory for some problems of the batch, another for the rest."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Mixing(*(torch.where(mine.reshape(-1, *[1] * (x.dim() - 1)), x, y) for x, y in pairs))

    def select(self, index: Tensor) -> Mixing:
        return Mixing(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


_GROWTH, _FALLEN = 4.0, 0.9
_PATIENCE = 4  # windows
_RIDGE = 1e-10  # of the Gram matrix, relative
_WIDEST, _LONGEST = 31, 2**23  # the window and the iterate that the kernels are made for


def _agree(_: ModuleType, device: torch.device) -> bool:
    """Whether on a device the kernels mix a slow map's iterates as torch does on a CPU."""
    shift = torch.rand(1, 272, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    weights = shift.flip(-1)
    ours, theirs = (Mixing.empty(shift.to(place), 15) for place in (device, "cpu"))
    for _ in range(20):
        ours = ours._by_kernels(0.98 * ours.at.roll(1, -1) + shift.to(device), weights.to(device), 30.0)
        theirs = theirs._in_torch(0.98 * theirs.at.roll(1, -1) + shift, weights, 30.0)
    return torch.allclose(ours.at.cpu(), theirs.at, rtol=1e-3, atol=1e-3)


def _shares(gram: Tensor, right: Tensor, valid: Tensor) -> Tensor:
    """Of each difference, how much to take back: those that leave least of the residual. Of none that is not valid."""
    gram = torch.where(valid.unsqueeze(-1) & valid.unsqueeze(-2), gram, 0.0)
    right = torch.where(valid, right, 0.0).unsqueeze(-1)
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    ridge = torch.where(valid, _RIDGE * largest, 1.0) + torch.where(largest > 0, 0.0, 1.0)
    gram = gram + torch.diag_embed(ridge)
    if gram.is_cuda:
        return eliminated(gram, right).squeeze(-1)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right, factor).squeeze(-1)


def eliminated(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions of small positive definite systems, ``(b, k, k)`` and ``(b, k, 1)``, by operations that a CUDA graph may record,
    as those of cuSOLVER may not be.
    """
    both = torch.cat([matrix, right], -1)
    for k in range(matrix.shape[-1]):
        row = both[:, k : k + 1] / both[:, k : k + 1, k : k + 1]
        both = torch.addcmul(both, both[:, :, k : k + 1], row, value=-1.0)
        both[:, k : k + 1] = row
    return both[..., -1:]
