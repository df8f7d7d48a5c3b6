"""Marginal objects: what a side of the plan pays for departing from its weights.

A side with weights ``a`` and marginal ``r = P 1`` pays ``D(r | a) = sum_i a_i psi(r_i / a_i)``. Everything a solver,
a certificate or a gradient needs of ``psi`` is here, so that a new regime is a new class of this file and nothing else.
The formulas, with their derivations, stand in ``docs/definitions.md``.

Every method works elementwise on tensors of any shape; potentials are in cost units, conjugates per unit of ``a``.
A potential of ``+inf`` is meaningful (a bin that nothing may reach) and never turns into NaN here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "AT_MOST",
    "FIXED",
    "FREE",
    "KL",
    "L2",
    "TV",
    "Between",
    "ChiSquared",
    "Marginal",
    "Piece",
    "Scalar",
    "kl_divergence",
    "number",
    "times",
]

Scalar = float | Tensor


def number(x: Scalar) -> float:
    """A float, or the value of a tensor without its history."""
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def times(x: Tensor, factor: Scalar) -> Tensor:
    """The product with a positive factor; an infinite ``x`` stays as it is, and the factor's derivative of it is 0, not NaN."""
    if not (isinstance(factor, Tensor) and factor.requires_grad):
        return x * factor
    finite = x.isfinite()
    return torch.where(finite, torch.where(finite, x, 0.0) * factor, x.detach())


def _settle(side: Marginal) -> list[float]:
    """The parameters' values; those that are no tensors are floats from here on, whatever kind of number they came as."""
    values = {name: _given(type(side).__name__, x) for name, x in vars(side).items()}
    for name, value in values.items():
        if not isinstance(getattr(side, name), Tensor):
            object.__setattr__(side, name, value)
    return list(values.values())


def _given(name: str, x: Scalar) -> float:
    try:
        if isinstance(x, str | bytes) or (isinstance(x, Tensor) and x.dim()):
            raise TypeError
        return number(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}({x!r}): its parameters must be single numbers, or tensors without dimensions."
        ) from error


def kl_divergence(x: Tensor, y: Tensor) -> Tensor:
    """Generalised KL divergence ``x log(x/y) - x + y``, elementwise, without cancellation where x is close to y.

    Args:
        x: non-negative, any shape.
        y: non-negative, same shape; ``+inf`` is returned where ``x > 0 = y``.

    Example:
        >>> kl_divergence(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]))
        tensor([2., 0., inf])
    """
    if x.device.type == "cpu" and x.numel() and not torch.is_grad_enabled():  # where a look costs less than the masks
        delta = (y - x) / x
        if bool(delta.abs().max() < 0.5):
            return x * (delta - torch.log1p(delta))
    usual = (x > 0) & (y > 0)
    safe_x, safe_y = torch.where(usual, x, 1.0), torch.where(usual, y, 1.0)
    delta = (safe_y - safe_x) / safe_x
    near = delta.abs() < 0.5
    small = torch.where(near, delta, 0.0)
    close = safe_x * (small - torch.log1p(small))
    far = safe_x * (safe_x.log() - safe_y.log()) - safe_x + safe_y
    return torch.where(usual, torch.where(near, close, far), torch.where(x > 0, math.inf, y))


@dataclass(frozen=True)
class Piece:
    """One variable per bin, ``0 <= x <= cap``, that adds ``sign * x`` to the marginal at a convex price.

    It pays ``price x + entropy KL(x | a) + bend x^2 / 2``. What a side is to a solver that moves marginals rather than
    potentials: a linear program has prices alone, an interior point takes them all.
    """

    sign: float
    cap: np.ndarray
    price: np.ndarray
    entropy: float = 0.0
    bend: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Marginal:
    """One side's penalty. Subclasses give the formulas; nothing else in the library knows which one it has."""

    def at(self, a: Tensor) -> Marginal:
        """The side once its weights are known: itself, unless its formula per unit of weight depends on the weight."""
        return self

    def pieces(self, a: np.ndarray) -> tuple[np.ndarray, list[Piece]]:
        """The marginal as a constant and bounded variables: ``P 1 = base + sum sign x``."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[Scalar, Scalar]:
        """Smallest and largest allowed ratio of marginal to weight: ``(0, inf)`` for a soft side."""
        return 0.0, math.inf

    @property
    def recession(self) -> float:
        """Price of one more unit of mass when there is already a great deal of it: the slope of ``psi`` at infinity."""
        return math.inf

    @property
    def floor(self) -> Scalar:
        """Smallest potential at which the conjugate is finite."""
        return -math.inf

    @property
    def kinks(self) -> tuple[float, ...]:
        """Potentials at which the conjugate has a kink, in rising order; between them it is smooth."""
        return ()

    @property
    def is_free(self) -> bool:
        """True if the side pays nothing at all, so that its potential is 0 and needs no soft-min."""
        return False

    @property
    def is_fixed(self) -> bool:
        """True if the marginal must equal the weights."""
        return False

    @property
    def softness(self) -> Scalar | None:
        """Rate at which the total mass asked for decays as all potentials rise; None where it is no exponential."""
        return None

    @property
    def is_hard(self) -> bool:
        """True if some non-negative marginals are forbidden: such a side is judged by its violation."""
        lo, hi = self.bounds
        return number(lo) > 0 or not math.isinf(number(hi))

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        """``D(r | a)`` per bin. A hard side pays 0 here: feasibility is asked of :meth:`violation`."""
        raise NotImplementedError

    def idle(self, a: Tensor) -> Tensor:
        """``D(0 | a)`` per bin: the price of no plan."""
        return self.divergence(torch.zeros_like(a), a)

    def conjugate(self, f: Tensor) -> Tensor:
        """``phi(f) = -psi*(-f) = min_t psi(t) + f t``, the dual objective per unit of weight."""
        raise NotImplementedError

    def response(self, f: Tensor) -> Tensor:
        """``phi'(f)``: the marginal, per unit of weight, that the potential asks for."""
        raise NotImplementedError

    def aprox(self, s: Tensor, epsilon: Scalar) -> Tensor:
        """The potential that maximises ``phi(f) - epsilon exp((f - s) / epsilon)``, ``s`` the soft-min."""
        raise NotImplementedError

    def clipped_line(self, epsilon: Scalar) -> tuple[float, float, float, float, float] | None:
        """The aprox as five numbers, for compiled loops; None if it is no such function.

        In units of epsilon ``(slope, low, up, down, high)`` with ``aprox(s) = max(min(high, slope s + up), max(low, slope s +
        down))``.
        """
        return None

    def curvature(self, f: Tensor) -> Tensor:
        """``-phi''(f)``; ``+inf`` where the potential is held by a kink and does not move."""
        raise NotImplementedError

    def fenchel_young(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        """``D(r | a) + D*(-f) + <f, r>`` per bin, in a form whose terms are non-negative when ``r`` is allowed."""
        raise NotImplementedError

    def project(self, f: Tensor) -> Tensor:
        """The nearest potential at which the conjugate is finite; and, where a side says so, beyond which it asks for nothing."""
        return f

    def snapped(self, f: Tensor, rounding: float) -> Tensor:
        """The potentials, exactly at the kinks from which no more than rounding, of this relative size, keeps them."""
        for kink in self.kinks:
            f = torch.where((f - kink).abs() <= rounding * abs(kink), kink, f)
        return f

    def moved(self, f: Tensor) -> Tensor:
        """The potential as a function of the penalty's own parameter, where a kink ties the two together."""
        return f

    def violation(self, r: Tensor, a: Tensor) -> Tensor:
        """Distance of each ``r_i`` from its allowed interval; 0 on a soft side."""
        if not self.is_hard:
            return torch.zeros_like(r)
        allowed = self.allowed(r, a)
        return torch.where(r == allowed, 0.0, (r - allowed).abs())  # an infinite marginal may be allowed

    def residual(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        """Distance of each ``r_i`` from the marginals for which ``f_i`` is optimal: the optimality condition of the side."""
        return (r - a * self.response(f)).abs()

    def allowed(self, r: Tensor, a: Tensor) -> Tensor:
        """``r`` clipped to the allowed interval ``[lo a, hi a]``."""
        if not self.is_hard:
            return r
        lo, hi = self.bounds
        r = torch.maximum(r, lo * a)
        return r if math.isinf(number(hi)) else torch.minimum(r, hi * a)

    def target(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        """The allowed marginal that a feasible rounding of a plan with marginal ``r`` should have."""
        return self.allowed(r, a)

    def pinned(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        """Bins whose marginal the potential ties to :meth:`target`; the others may move a little at no first-order price."""
        return torch.zeros_like(r, dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters given as tensors, by name: the ones a gradient can flow to."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


@dataclass(frozen=True)
class Between(Marginal):
    """Hard bounds ``lo * a <= P 1 <= hi * a``.

    ``FIXED = Between(1, 1)`` is a balanced side, ``FREE = Between(0, inf)`` a semi-relaxed one and
    ``AT_MOST = Between(0, 1)`` a partial one.

    Args:
        lo: smallest ratio of marginal to weight, ``0 <= lo <= hi``.
        hi: largest ratio, ``0 < hi <= inf``.

    Raises:
        ValueError: if the bounds are negative, NaN, crossed, or leave only zero mass.

    Example:
        >>> Between(0.5, 2.0).aprox(torch.tensor([-1.0, 0.1, 1.0]), 0.1)
        tensor([-0.9307,  0.0307,  0.9307])
    """

    lo: Scalar
    hi: Scalar

    def __post_init__(self) -> None:
        lo, hi = _settle(self)
        if not (0 <= lo <= hi and hi > 0 and not math.isinf(lo)):
            raise ValueError(
                f"Between(lo={lo}, hi={hi}): needs 0 <= lo <= hi, lo finite and hi > 0. The two are ratios to the "
                "weights, not masses; did you swap them? Between(0, 1) allows at most the weights."
            )

    @property
    def bounds(self) -> tuple[Scalar, Scalar]:
        return self.lo, self.hi

    @property
    def recession(self) -> float:
        return 0.0 if math.isinf(number(self.hi)) else math.inf

    @property
    def floor(self) -> Scalar:
        return 0.0 if math.isinf(number(self.hi)) else -math.inf

    @property
    def kinks(self) -> tuple[float, ...]:
        return () if self.is_fixed else (0.0,)

    @property
    def is_free(self) -> bool:
        return number(self.lo) == 0 and math.isinf(number(self.hi))

    @property
    def is_fixed(self) -> bool:
        return number(self.lo) == number(self.hi)

    @property
    def softness(self) -> Scalar | None:
        return 0.0 if self.is_fixed else None

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        return torch.zeros_like(r)

    def allowed(self, r: Tensor, a: Tensor) -> Tensor:
        return (self.lo * a).expand_as(r) if self.is_fixed else super().allowed(r, a)

    def violation(self, r: Tensor, a: Tensor) -> Tensor:
        if not self.is_fixed:
            return super().violation(r, a)
        return (r - self.lo * a if isinstance(self.lo, Tensor) else torch.sub(r, a, alpha=self.lo)).abs()

    def conjugate(self, f: Tensor) -> Tensor:
        if self.lo is self.hi or (isinstance(self.lo, float) and self.lo == self.hi):
            return f if self.lo == 1.0 and not isinstance(self.lo, Tensor) else self.lo * f
        lower = self.lo * torch.where(f > 0, f, 0.0) if number(self.lo) > 0 else torch.zeros_like(f)
        if math.isinf(number(self.hi)):
            return torch.where(f < 0, -math.inf, lower)
        return lower + self.hi * torch.where(f < 0, f, 0.0)

    def response(self, f: Tensor) -> Tensor:
        lo, hi = (torch.as_tensor(x, dtype=f.dtype, device=f.device) for x in self.bounds)
        return torch.where(f >= 0, lo, hi)

    def pieces(self, a: np.ndarray) -> tuple[np.ndarray, list[Piece]]:
        lo, hi = number(self.lo), number(self.hi)
        spare = np.full_like(a, math.inf) if math.isinf(hi) else (hi - lo) * a
        return lo * a, [] if self.is_fixed else [Piece(1.0, spare, 0.0 * a)]

    def aprox(self, s: Tensor, epsilon: Scalar) -> Tensor:
        if self.is_free:
            return torch.zeros_like(s)
        if self.is_fixed and not isinstance(self.hi, Tensor) and self.hi == 1.0:
            return s
        if math.isinf(number(self.hi)):
            upper = torch.zeros_like(s)
        else:
            upper = s + epsilon * _log(self.hi)
            upper = upper if self.is_fixed else upper.clamp(max=0.0)
        return upper if self.is_fixed or number(self.lo) == 0 else torch.maximum(upper, s + epsilon * _log(self.lo))

    def clipped_line(self, epsilon: Scalar) -> tuple[float, float, float, float, float]:
        lo, hi = number(self.lo), number(self.hi)
        return 1.0, -math.inf, math.log(hi), math.log(lo) if lo > 0 else -math.inf, 0.0

    def curvature(self, f: Tensor) -> Tensor:
        return torch.zeros_like(f) if self.is_fixed else torch.where(f == 0, math.inf, 0.0).to(f)

    def fenchel_young(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        if self.is_fixed:
            off = r - self.lo * a
            return torch.where(off == 0, 0.0, f * off)
        above, below = r - self.lo * a, r - (a if math.isinf(number(self.hi)) else self.hi * a)
        down = -math.inf if math.isinf(number(self.hi)) else f * below
        slope = torch.where(f > 0, f * above, torch.where(f < 0, down, 0.0))
        return torch.where(f.isinf() & (above == 0), 0.0, slope)

    def residual(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        return self.violation(r, a) if self.is_fixed else (r - self.target(r, f, a)).abs()

    def project(self, f: Tensor) -> Tensor:
        return f.clamp(min=0.0) if math.isinf(number(self.hi)) else f

    def target(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        pinned = self.lo * a
        if not math.isinf(number(self.hi)):
            pinned = torch.where(f < 0, self.hi * a, pinned)
        return torch.where(f == 0, self.allowed(r, a), pinned)

    def pinned(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        return (f != 0) | (self.violation(r, a) > 0) | torch.full_like(r, self.is_fixed, dtype=torch.bool)


FIXED = Between(1.0, 1.0)
FREE = Between(0.0, math.inf)
AT_MOST = Between(0.0, 1.0)


@dataclass(frozen=True)
class KL(Marginal):
    """Soft side paying ``rho * KL(P 1 | a)``: unbalanced transport (Chizat et al., Math. Comp. 2018).

    Args:
        rho: strength in cost units, positive and finite; ``rho -> inf`` is FIXED, ``rho -> 0`` is FREE.

    Raises:
        ValueError: if rho is not positive and finite.

    Example:
        >>> KL(1.0).aprox(torch.tensor(0.5), 0.25)
        tensor(0.4000)
    """

    rho: Scalar

    def __post_init__(self) -> None:
        _check_rho(self)

    @property
    def softness(self) -> Scalar | None:
        return 1.0 / self.rho

    def pieces(self, a: np.ndarray) -> tuple[np.ndarray, list[Piece]]:
        return 0.0 * a, [Piece(1.0, np.full_like(a, math.inf), 0.0 * a, entropy=number(self.rho))]

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        return self.rho * kl_divergence(r, a)

    def idle(self, a: Tensor) -> Tensor:
        return self.rho * a

    def conjugate(self, f: Tensor) -> Tensor:
        return torch.expm1(-times(f, 1 / self.rho)) * -self.rho

    def response(self, f: Tensor) -> Tensor:
        return torch.exp(-times(f, 1 / self.rho))

    def aprox(self, s: Tensor, epsilon: Scalar) -> Tensor:
        return times(s, self.rho / (self.rho + epsilon))

    def clipped_line(self, epsilon: Scalar) -> tuple[float, float, float, float, float]:
        rho = number(self.rho)
        return rho / (rho + number(epsilon)), -math.inf, 0.0, -math.inf, math.inf

    def curvature(self, f: Tensor) -> Tensor:
        return torch.exp(-f / self.rho) / self.rho

    def fenchel_young(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        return self.rho * kl_divergence(r, torch.where(a > 0, a * self.response(f), 0.0))


@dataclass(frozen=True)
class TV(Marginal):
    """Soft side paying ``rho * sum |P 1 - a|``: mass may be dropped or made at the price ``rho`` (total variation).

    Args:
        rho: price per unit of mass, in cost units, positive and finite.

    Raises:
        ValueError: if rho is not positive and finite.

    Example:
        >>> TV(1.0).aprox(torch.tensor([-3.0, 0.5, 2.0]), 0.1)
        tensor([-1.0000,  0.5000,  1.0000])
    """

    rho: Scalar

    def __post_init__(self) -> None:
        _check_rho(self)

    @property
    def recession(self) -> float:
        return number(self.rho)

    @property
    def floor(self) -> Scalar:
        return -self.rho

    @property
    def kinks(self) -> tuple[float, ...]:
        return -number(self.rho), number(self.rho)

    def pieces(self, a: np.ndarray) -> tuple[np.ndarray, list[Piece]]:
        unbounded, price = np.full_like(a, math.inf), np.full_like(a, number(self.rho))
        return a, [Piece(1.0, unbounded, price), Piece(-1.0, unbounded, price)]

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        return self.rho * (r - a).abs()

    def conjugate(self, f: Tensor) -> Tensor:
        return torch.where(f < -self.rho, -math.inf, torch.where(f > self.rho, self.rho, f))

    def response(self, f: Tensor) -> Tensor:
        return torch.where(f >= self.rho, 0.0, 1.0).to(f)

    def aprox(self, s: Tensor, epsilon: Scalar) -> Tensor:
        return torch.minimum(self.project(s), _like(self.rho, s))

    def clipped_line(self, epsilon: Scalar) -> tuple[float, float, float, float, float]:
        held = number(self.rho) / number(epsilon)
        return 1.0, -held, 0.0, -math.inf, held

    def curvature(self, f: Tensor) -> Tensor:
        return torch.where(f.abs() >= self.rho, math.inf, 0.0).to(f)

    def fenchel_young(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        held = torch.minimum(f, _like(self.rho, f))
        beyond = torch.where(r > 0, (f - held) * r, 0.0)
        return torch.where(r > a, (self.rho + held) * (r - a), (self.rho - held) * (a - r)) + beyond

    def residual(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        lack, excess = (a - r).clamp(min=0.0), (r - a).clamp(min=0.0)
        return torch.where(f < self.rho, lack, 0.0) + torch.where(f > -self.rho, excess, 0.0)

    def project(self, f: Tensor) -> Tensor:
        return torch.maximum(f, -_like(self.rho, f))

    def target(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        return torch.where(self.pinned(r, f, a), a, r)

    def pinned(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        return f.abs() < self.rho

    def moved(self, f: Tensor) -> Tensor:
        if not isinstance(self.rho, Tensor):
            return f
        return torch.where(f.abs() >= self.rho.detach(), f / self.rho.detach() * self.rho, f)


@dataclass(frozen=True)
class ChiSquared(Marginal):
    """Soft side paying ``rho / 2 * sum (P 1 - a)^2 / a``: the chi-squared divergence of the marginal from its weights.

    Args:
        rho: strength in cost units, positive and finite; ``rho -> inf`` is FIXED, ``rho -> 0`` is FREE.

    Raises:
        ValueError: if rho is not positive and finite.

    Example:
        >>> side = ChiSquared(1.0)
        >>> f = side.aprox(torch.tensor(0.5), 0.25)  # 1 - f / rho = exp((f - s) / epsilon)
        >>> bool(torch.isclose(1 - f, torch.exp((f - 0.5) / 0.25)))
        True
    """

    rho: Scalar

    def __post_init__(self) -> None:
        _check_rho(self)

    def pieces(self, a: np.ndarray) -> tuple[np.ndarray, list[Piece]]:
        rho = np.asarray(self.rho.detach().cpu().numpy() if isinstance(self.rho, Tensor) else self.rho)
        bend = np.divide(rho, a, out=np.ones_like(a), where=a > 0)
        return 0.0 * a, [Piece(1.0, np.full_like(a, math.inf), -rho + 0.0 * a, bend=bend)]

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        empty = a <= 0
        usual = self.rho / 2 * (r - a) ** 2 / torch.where(empty, 1.0, a)
        return torch.where(empty, torch.where(r > 0, math.inf, 0.0), usual)

    def conjugate(self, f: Tensor) -> Tensor:
        held = torch.minimum(f, _like(self.rho, f))
        return held * (1 - held / (2 * self.rho))

    def response(self, f: Tensor) -> Tensor:
        return (1 - torch.where(f < math.inf, f, self.rho) / self.rho).clamp(min=0.0)

    def aprox(self, s: Tensor, epsilon: Scalar) -> Tensor:
        rho = _like(self.rho, s)
        if number(epsilon) == 0:
            return torch.where(_vanishing(rho), 0.0, torch.minimum(s, rho))
        reached = s < math.inf
        s = torch.where(reached, s, rho)
        w = _wright_omega(torch.log(rho / epsilon) + (rho - s) / epsilon)
        f = rho - epsilon * w
        # rho - epsilon w loses digits where f is far below rho: one Newton step on the equation in f itself
        small = f < rho / 2
        x = torch.where(small, f, 0.0).detach()
        off = x - torch.where(small, s, 0.0) - epsilon * torch.log1p(-x / rho)
        f = torch.where(reached, torch.where(small, x - off / (1 + epsilon / (rho - x)), f), rho)
        if not _vanishing(rho).any():
            return f
        range_ = math.log(torch.finfo(s.dtype).max) / 2
        return torch.where(_vanishing(rho), -rho * torch.expm1((-s / epsilon).clamp(max=range_)), f)

    def project(self, f: Tensor) -> Tensor:
        return torch.minimum(f, _like(self.rho, f))  # beyond, nothing is asked for and the plan alone grows

    def snapped(self, f: Tensor, rounding: float) -> Tensor:
        rho = _like(self.rho, f)  # from where on nothing is asked for: no kink of the conjugate, but one of its derivative
        beside = (f != rho) & ((f - rho).abs() <= rounding * rho)
        return torch.where(beside, rho, f) if beside.any() else f

    def curvature(self, f: Tensor) -> Tensor:
        bends = f <= self.rho  # at rho too, where rounding leaves a marginal that is nearly 0 and `response` has a derivative
        return torch.where(bends, 1 / _like(self.rho, f), 0.0).to(f)

    def fenchel_young(self, r: Tensor, f: Tensor, a: Tensor) -> Tensor:
        t = r / torch.where(a > 0, a, 1.0)
        off = t - self.response(f)
        beyond = torch.where(r > 0, (f - self.rho).clamp(min=0.0) * r, 0.0)
        return torch.where(a > 0, a * off**2 * self.rho / 2 + beyond, torch.where(r > 0, math.inf, 0.0))


@dataclass(frozen=True)
class L2(Marginal):
    """Soft side paying ``rho / 2 * sum (P 1 - a)^2``: the squared Euclidean distance of the marginal from its weights.

    Unlike the other penalties it is no divergence: it does not scale with the weights. Bin by bin it is the chi-squared
    penalty of strength ``rho a_i``.

    Args:
        rho: strength in cost units per unit of mass, positive and finite.

    Raises:
        ValueError: if rho is not positive and finite.

    Example:
        >>> L2(2.0).at(torch.tensor([0.5, 1.5]))
        ChiSquared(rho=tensor([1., 3.]))
    """

    rho: Scalar

    def __post_init__(self) -> None:
        _check_rho(self)

    def at(self, a: Tensor) -> Marginal:
        side = object.__new__(ChiSquared)  # one strength per bin: nothing a user could have asked for
        # towards weight 0 the side pays nothing and the potential is 0, but not so their derivatives
        object.__setattr__(side, "rho", torch.where(a > 0, self.rho * a, torch.finfo(a.dtype).tiny))
        return side

    def divergence(self, r: Tensor, a: Tensor) -> Tensor:
        return self.rho / 2 * (r - a) ** 2


def _vanishing(rho: Tensor) -> Tensor:
    """Bins of weight 0 under L2."""
    return rho <= torch.finfo(rho.dtype).tiny


def _wright_omega(x: Tensor) -> Tensor:
    """``w`` with ``w + log w = x``, by Newton's method; the last step carries the derivative."""
    with torch.no_grad():
        low = x.clamp(max=1.0)
        y = low
        for _ in range(6):  # in log w, from above: y + exp(y) = x
            y = y - (y + y.exp() - low) / (1 + y.exp())
        high = x.clamp(min=1.0)
        w = high - high.log()
        for _ in range(4):
            w = w - (w + w.log() - high) * (w / (1 + w))
        w = torch.where(x > 1, w, torch.where(x == -math.inf, 0.0, y.exp()))
    there = (w > 0) & w.isfinite()
    safe, target = torch.where(there, w, 1.0), torch.where(there, x, 1.0)
    return torch.where(there, safe - (safe + safe.log() - target) * (safe / (1 + safe)), w)


def _check_rho(side: Marginal) -> None:
    (value,) = _settle(side)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{type(side).__name__}(rho={value}): rho must be positive and finite, in the units of the cost. "
            "For a side that must match its weights use FIXED, for one that pays nothing use FREE."
        )


def _like(x: Scalar, other: Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=other.dtype, device=other.device)


def _log(x: Scalar) -> Scalar:
    return x.log() if isinstance(x, Tensor) else math.log(x)
