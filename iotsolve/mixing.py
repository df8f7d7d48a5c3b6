"""Anderson's mixing of a fixed-point iteration, in tensors: for a batch, on any device, without waiting for it.

Of the last iterates and of what the map made of them, the combination whose residual is least takes the place of the last (type
II; Walker and Ni, SIAM J. Numer. Anal. 2011). :mod:`iotsolve.kernels.scaling` has the same in compiled steps, for one problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from iotsolve.marginals import Scalar

__all__ = ["Mixing"]


@dataclass(frozen=True)
class Mixing:
    """What is remembered: the iterate whose image comes next, the one before and its residual, and differences of both between
    earlier ones, the latest last.
    """

    at: Float[Tensor, "b n"]
    x: Float[Tensor, "b n"]
    r: Float[Tensor, "b n"]
    dx: Float[Tensor, "b window n"]
    dr: Float[Tensor, "b window n"]
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
        nothing = like.new_zeros(len(like), window, like.shape[1])
        zero, none = torch.zeros_like(like), like.new_full((len(like),), -1.0)
        endless = torch.full_like(none, torch.inf)
        return cls(zero, zero, zero, nothing, nothing, none, endless, endless, zero, torch.zeros_like(none))

    def mixed(self, image: Float[Tensor, "b n"], weights: Float[Tensor, "b n"], most: Scalar = math.inf) -> Mixing:
        """What is remembered when the map has made ``image`` of the iterate; the next one is its ``at``.

        Residuals are measured in the metric of the weights. Where the residual has grown fourfold since its least, or a number is
        not finite, the iterate is the image, and what was known is forgotten. No entry with a weight is ``most`` or more from its
        image. Where the residual has not fallen by a tenth for four windows, mixing is given up: the iterate is the best one's
        image, and from then on always the image.
        """
        begun = self.known.unsqueeze(-1) >= 0
        finite = self.at.isfinite() & image.isfinite()
        here, r = torch.where(finite, self.at, 0.0), torch.where(finite & begun, image - self.at, 0.0)
        size = torch.where(self.known >= 0, (weights * r.square()).sum(-1), torch.inf)
        grown = size > _GROWTH**2 * self.least
        known = torch.where(grown, 0.0, self.known)
        dx, dr = (
            torch.cat([old[:, 1:], (new - last).unsqueeze(1)], 1)
            for old, new, last in ((self.dx, here, self.x), (self.dr, r, self.r))
        )
        window = dx.shape[1]
        valid = torch.arange(window, device=image.device) >= window - known.unsqueeze(-1)
        back = (_shares(dr, r, weights, valid).unsqueeze(-1) * torch.where(valid.unsqueeze(-1), dx + dr, 0.0)).sum(1)
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
        return Mixing(following, here, r, dx, dr, known, least, lowest, best, idle)

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


def _shares(dr: Tensor, r: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Of each difference, how much to take back: those that leave least of the residual. Of none that is not valid."""
    dr = torch.where(valid.unsqueeze(-1), dr, 0.0).double()
    weighed = dr * weights.double().unsqueeze(-2)
    gram = weighed @ dr.mT
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    ridge = torch.where(valid, _RIDGE * largest, 1.0) + torch.where(largest > 0, 0.0, 1.0)
    gram, right = gram + torch.diag_embed(ridge), weighed @ r.double().unsqueeze(-1)
    if gram.is_cuda:
        return eliminated(gram, right).squeeze(-1).to(r.dtype)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right, factor).squeeze(-1).to(r.dtype)


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
