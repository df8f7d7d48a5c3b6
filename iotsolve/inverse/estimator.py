"""``InverseOT``: the coefficients whose optimal plan has the observed moments.

Found by Newton's method, see :mod:`iotsolve.inverse.search`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from iotsolve.inverse.data import Coupling
from iotsolve.inverse.features import FeatureMap
from iotsolve.inverse.fit import Fit, IdentifiabilityWarning, predicted
from iotsolve.inverse.market import Market, check_totals
from iotsolve.inverse.penalties import Penalty, Ridge
from iotsolve.inverse.search import Search
from iotsolve.inverse.steps import Constraints
from iotsolve.marginals import FIXED, Marginal

__all__ = ["InverseOT"]


@dataclass(frozen=True, eq=False)
class InverseOT:
    """Estimate the score ``Phi = sum theta_k phi^k`` behind observed couplings, or the cost ``-Phi``, which is the same.

    The loss is the Fenchel-Young loss of the forward problem (:func:`iotsolve.inverse_loss`). Between fixed sides its minimum is
    that of Poisson pseudo-maximum likelihood with effects of rows and columns; with ``columns=FREE``, of conditional logit.

    Args:
        features: what the score is made of, a :class:`FeatureMap`; for a panel a list of them, or one for all.
        epsilon: strength of the entropy. The data tell ``theta / epsilon`` and no more, so that it is a unit: leave it 1.
        rows: marginal object of the rows; the weights are the observed ones unless the coupling has its own, all the same of a
            FREE side.
        columns: marginal object of the columns.
        penalty: :class:`L1`, :class:`Ridge`, :class:`Group`, :class:`Nuclear`; or a pair of a ridge and another one.
        nonnegative: whether coefficients must not be negative.
        fixed: coefficients that are known, by name or number.
        equalities: ``(A, r)``: linear equations ``A theta = r``.
        tolerance: size of the last step, in standard deviations of the score: 1e-9 is far below any standard error.
        max_steps: Newton steps.

    Raises:
        ValueError: when fitted, on features and data that do not belong together.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((20, 1)), rng.standard_normal((30, 1))
        >>> from iotsolve import inverse
        >>> model = InverseOT(inverse.Bilinear(x, y))
        >>> fit = model.fit(Coupling(plan=model.plan([1.5], np.ones(20) / 20, np.ones(30) / 30)))
        >>> round(float(fit.coefficients[0]), 8)
        1.5
    """

    features: FeatureMap | Sequence[FeatureMap]
    epsilon: float = 1.0
    rows: Marginal = FIXED
    columns: Marginal = FIXED
    penalty: Penalty | Sequence[Penalty] | None = None
    nonnegative: bool = False
    fixed: Mapping[Any, float] | None = None
    equalities: tuple[Any, Any] | None = None
    tolerance: float = 1e-9
    max_steps: int = 100

    # -- scikit-learn's conventions ----------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def set_params(self, **params: Any) -> InverseOT:
        """The same estimator with other arguments; this one stays as it is."""
        return replace(self, **params)

    # -- the forward problem -----------------------------------------------------------------------------------------

    def plan(self, theta: Any, a: Any, b: Any) -> np.ndarray:
        """The optimal plan at known coefficients, for one coupling's features; what :meth:`fit` takes back apart.

        Weights and plan are in any unit; a problem with a soft side is posed per unit of the rows' weights.
        """
        score = self._maps(1)[0].apply(np.asarray(theta, dtype=np.float64))
        return predicted(self, -score, a, b, unit=float(np.sum(a)))

    # -- the inverse problem -----------------------------------------------------------------------------------------

    def fit(self, data: Coupling | Any, *, start: Any = None) -> Fit:
        """The coefficients that explain the data best.

        Args:
            data: a :class:`Coupling`, a table of counts, or a list of couplings that share the coefficients.
            start: coefficients to start from: a :class:`Fit`, or an array.

        Raises:
            ValueError: on data that are none.

        Returns:
            A :class:`Fit`. Coefficients that the data cannot tell apart get the smallest values that explain them, and an
            :class:`IdentifiabilityWarning` names them.
        """
        panel = isinstance(data, list | tuple) and any(isinstance(x, Coupling) or np.ndim(x) > 1 for x in data)
        couplings = list(data) if panel else [data]
        couplings = [x if isinstance(x, Coupling) else Coupling(x) for x in couplings]
        maps = self._maps(len(couplings))
        for name, side in (("rows", self.rows), ("columns", self.columns)):
            if not isinstance(side, Marginal):
                raise ValueError(f"{name} = {side!r}: must be a marginal object, such as FIXED, FREE or KL(1.0).")
        if not 0 < self.tolerance < math.inf or not self.max_steps >= 1:
            raise ValueError(
                f"tolerance = {self.tolerance!r}, max_steps = {self.max_steps!r}: the one must be positive and finite, such as "
                "1e-9, the other at least 1."
            )
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"epsilon = {self.epsilon!r}: must be positive and finite; for epsilon = 0 see inverse.ExactInverse."
            )
        sides = self.rows, self.columns
        tables = [coupling.table(features.shape, *sides) for coupling, features in zip(couplings, maps, strict=True)]
        for table in tables:
            check_totals(table, self.rows, self.columns)
        sizes = np.array([table.scale for table in tables])
        shares = sizes / sizes.sum()
        absorbing = self.rows.is_fixed and self.columns.is_fixed
        markets = [
            Market(f.centred(t.a, t.b) if absorbing else f, t, self.epsilon, self.rows, self.columns)
            for f, t in zip(maps, tables, strict=True)
        ]
        smooth, other = self._penalties()
        constraints = Constraints.of(maps[0], self.nonnegative, self.fixed, self.equalities)
        theta = np.zeros(maps[0].count) if start is None else _coefficients(start, maps[0])
        search = Search(self, maps, markets, shares, smooth, other, constraints)
        end = search.run(constraints.projected(theta))
        if start is not None and not end.converged:  # a start that leads nowhere is no reason to fail
            end = search.run(constraints.projected(np.zeros_like(theta)))
        fit = Fit(self, maps, end.points, shares, end.hessian, end.effects, float(sizes.sum()), end.steps, end.converged,
                  end.residual, end.unseen, end.diverging, constraints)  # fmt: skip
        for message in fit.warnings:
            warnings.warn(message, IdentifiabilityWarning, stacklevel=2)
        return fit

    def _maps(self, count: int) -> list[FeatureMap]:
        maps = [self.features] * count if isinstance(self.features, FeatureMap) else list(self.features)
        if len(maps) != count or not all(isinstance(x, FeatureMap) for x in maps):
            raise ValueError(
                f"{len(maps)} feature maps for {count} couplings: give one for all, or one for each, such as Bilinear(X, Y)."
            )
        if len({x.names for x in maps}) > 1:
            raise ValueError(
                "the couplings of a panel share their coefficients: their features must have the same names."
            )
        return maps

    def _penalties(self) -> tuple[float, Penalty | None]:
        given = self.penalty if isinstance(self.penalty, list | tuple) else [self.penalty]
        given = [x for x in given if x is not None]
        if not all(isinstance(x, Penalty) for x in given):
            raise ValueError(
                f"penalty = {self.penalty!r}: must be L1, Ridge, Group or Nuclear, or a pair with a Ridge."
            )
        ridges, others = [x for x in given if isinstance(x, Ridge)], [x for x in given if not isinstance(x, Ridge)]
        if len(others) > 1:
            raise ValueError(f"penalty = {self.penalty!r}: at most one besides a Ridge.")
        return sum(x.strength for x in ridges), others[0] if others else None


def _coefficients(start: Any, features: FeatureMap) -> np.ndarray:
    theta = np.array(getattr(start, "coefficients", start), dtype=np.float64).reshape(-1)
    if theta.shape != (features.count,):
        raise ValueError(f"start has {theta.size} coefficients, the features have {features.count}.")
    return theta
