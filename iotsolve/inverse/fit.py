"""``Fit``: what an estimate says, how sure it is, and what it cannot know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from iotsolve.gradient import Implicit
from iotsolve.inverse.data import Coupling, Table, possible
from iotsolve.inverse.features import Bilinear, FeatureMap
from iotsolve.inverse.market import Market, Point
from iotsolve.inverse.steps import Constraints
from iotsolve.marginals import number
from iotsolve.problem import Problem
from iotsolve.solve import solve

if TYPE_CHECKING:
    from iotsolve.inverse.estimator import InverseOT
    from iotsolve.inverse.module import Module

__all__ = ["Fit", "IdentifiabilityWarning", "Saliency", "Test", "log_likelihood", "predicted"]

_KINDS = ("model", "robust", "clustered")


class IdentifiabilityWarning(UserWarning):
    """The data do not determine all coefficients; the message names those they leave open."""


@dataclass(frozen=True)
class Test:
    """A chi-squared test: the statistic, its degrees of freedom and the probability of a larger one under the hypothesis."""

    __test__ = False  # not one of pytest's

    statistic: float
    degrees: int
    p_value: float


@dataclass(frozen=True, eq=False)
class Saliency:
    """Dimensions of sorting: the singular values of the affinity between traits of unit covariance.

    Indices ``x @ rows`` and ``y @ columns`` are uncorrelated, of variance 1 (where the traits' covariance is regular), and matter
    one by one: ``rows @ diag(values) @ columns.T`` is the affinity of the traits.

    Args:
        values: singular values, falling, shape ``(r,)``.
        shares: of their sum.
        intervals: of the shares, shape ``(r, 2)``; None without standard errors.
        rows: weights of the rows' traits in each index, one over the units of the traits, shape ``(p, r)``.
        columns: weights of the columns' traits, shape ``(q, r)``.
    """

    values: np.ndarray
    shares: np.ndarray
    intervals: np.ndarray | None
    rows: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True, eq=False)
class Fit:
    """An estimate; made by :meth:`InverseOT.fit`."""

    model: InverseOT
    features: list[FeatureMap]
    points: list[Point]
    shares: np.ndarray
    hessian: np.ndarray
    effects: list[tuple[np.ndarray, np.ndarray]]
    weight: float
    steps: int
    converged: bool
    kkt_residual: float
    unseen: np.ndarray
    diverging: np.ndarray
    constraints: Constraints

    # -- the estimate ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """One per coefficient."""
        return self.features[0].names

    @property
    def coefficients(self) -> np.ndarray:
        """``theta``, shape ``(K,)``, in cost units per unit of the feature."""
        return self.points[0].theta

    @property
    def matrix(self) -> np.ndarray | None:
        """The coefficients as the matrix they are: the affinity of :class:`Bilinear`, the metric of :class:`Mahalanobis`."""
        return self.features[0].gains(self.coefficients)

    @property
    def observations(self) -> float | None:
        """How many there were in all couplings; None where the data do not tell."""
        known = [point.market.table.observations for point in self.points]
        return None if None in known else float(sum(known))

    @property
    def separated(self) -> bool:
        """Whether some coefficients go to infinity: some combination of features is never observed against another."""
        return self.diverging.shape[1] > 0

    @property
    def endless(self) -> np.ndarray:
        """Which coefficients do, boolean, shape ``(K,)``: their sizes say nothing."""
        return abs(self.diverging).max(1, initial=0.0) > 1e-8

    @property
    def _open(self) -> np.ndarray:
        """Directions of which the data say nothing, or everything."""
        return np.hstack([self.unseen, self.diverging])

    def _each(self, of: Any) -> Any:
        found = [of(k) for k in range(len(self.points))]
        return found[0] if len(found) == 1 else found

    @property
    def plan(self) -> Any:
        """The fitted plan per unit of the rows' weights, shape ``(n, m)``; one for each coupling of a panel."""
        return self._each(lambda k: self.points[k].plan)

    @property
    def cost(self) -> Any:
        """``-Phi``, ``+inf`` where the mask forbids a match."""

        def one(k: int) -> np.ndarray:
            allowed = self.points[k].market.table.allowed
            cost = -self.features[k].apply(self.coefficients)
            return cost if allowed is None else np.where(allowed, cost, np.inf)

        return self._each(one)

    @property
    def potentials(self) -> Any:
        """``(f, g)`` of :attr:`cost`, in the gauge of :class:`iotsolve.Problem`."""

        def one(k: int) -> tuple[np.ndarray, np.ndarray]:
            point = self.points[k]
            moved = self.features[k].apply(self.coefficients) - point.market.features.apply(self.coefficients)
            f, g = point.solution.f - moved[:, 0], point.solution.g - (moved[0] - moved[0, 0])
            if not (self.model.rows.is_fixed and self.model.columns.is_fixed):
                return f, g
            a, b = point.market.table.a, point.market.table.b
            shift = (a @ np.where(a > 0, f, 0.0) - b @ np.where(b > 0, g, 0.0)) / (a.sum() + b.sum())
            return f - shift, g + shift

        return self._each(one)

    @property
    def log_likelihood(self) -> float:
        """Of all observations, given their number; of one on average where it is not known. ``-inf`` if one was impossible."""
        each = (log_likelihood(p.market.table.plan, p.plan) for p in self.points)
        total = float(sum(s * x for s, x in zip(self.shares, each, strict=True)))
        return total * self.weight / (len(self.points) if self.observations is None else 1)

    # -- inference ---------------------------------------------------------------------------------------------------

    @property
    def information(self) -> np.ndarray:
        """Fisher information of the coefficients, ``(K, K)``: of all observations, of one where their number is not known.

        With soft sides, where the loss is no likelihood, its curvature.
        """
        return self.hessian * self.weight / self.model.epsilon

    def covariance(self, kind: str = "model", *, small_sample: bool = False) -> np.ndarray:
        """Covariance matrix of the coefficients.

        Args:
            kind: ``"model"``: for independent matches; between FIXED and FREE sides the inverse information. ``"robust"``: cells
                whose variance is not their mean. ``"clustered"``: cells that vary together by the coupling's ``cluster``, times
                ``G / (G - 1)``.
            small_sample: multiply by ``cells / (cells - K - n - m + 1)``, as for least squares with two-way effects.

        Raises:
            ValueError: without a number of observations, with a penalty that biases the coefficients, without two clusters, or
                with ``small_sample`` and no more cells than coefficients and effects.
        """
        if kind not in _KINDS:
            raise ValueError(f"kind = {kind!r}: must be one of {', '.join(_KINDS)}.")
        if self.observations is None:
            raise ValueError(
                "standard errors need the number of observations, and shares do not tell it: pass counts, or observations=N."
            )
        if self.model.penalty is not None or self.model.nonnegative:
            raise ValueError(
                "standard errors of penalised or sign-constrained coefficients would ignore their bias. Fit again without the "
                "penalty, on the support that was found if there is one (fixed={...: 0})."
            )
        basis = self._identified
        bread = (
            basis @ np.linalg.inv(basis.T @ self.information @ basis) @ basis.T if basis.shape[1] else 0 * self.hessian
        )
        factor = 1.0
        if kind == "clustered":
            scores = self._clustered()
            if len(scores) < 2:
                raise ValueError("kind = 'clustered' with one cluster: nothing tells how clusters vary. Give finer labels.")
            bread = bread @ scores.T @ scores @ bread
            factor *= len(scores) / (len(scores) - 1)
        elif kind == "robust":
            bread = bread @ self._squares(lambda k: self._error(k) ** 2) @ bread
        elif not self._is_likelihood:
            bread = bread @ self._squares(self._variance) @ bread
        if small_sample:
            cells = sum(
                p.plan.size if p.market.table.allowed is None else int(p.market.table.allowed.sum())
                for p in self.points
            )
            used = len(self.coefficients) + sum(sum(p.plan.shape) - 1 for p in self.points)
            if cells <= used:
                raise ValueError(
                    f"small_sample=True with {cells} cells and {used} coefficients and effects: nothing is left to estimate a "
                    "variance from. Leave it out."
                )
            factor *= cells / (cells - used)
        return factor * bread

    @cached_property
    def _identified(self) -> np.ndarray:
        """Directions that constraints leave and the data see."""
        free = self.constraints.free()
        blind = free.T @ self._open
        if not blind.size:
            return free
        kept = np.linalg.svd(blind, full_matrices=True)
        rank = int((kept[1] > 1e-8).sum())
        return free @ kept[0][:, rank:]

    def _error(self, k: int) -> np.ndarray:
        """Observed minus fitted, of all observations, in units of epsilon."""
        table = self.points[k].market.table
        return table.scale * (table.plan - self.points[k].plan) / self.model.epsilon

    def _variance(self, k: int) -> np.ndarray:
        """The same error's, squared, of independent observations."""
        point = self.points[k]
        return point.market.table.scale * point.plan / self.model.epsilon**2

    @cached_property
    def _felt(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What a match does to the gradient beside its features, in every coupling."""
        return [point.felt(*own) for point, own in zip(self.points, self.effects, strict=True)]

    @property
    def _is_likelihood(self) -> bool:
        """Whether the loss is one, so that its curvature is the information: sides are FREE, or fixed at what was observed."""
        both = zip(self._felt, self.effects, strict=True)
        return all(x is y for own, effects in both for x, y in zip(own, effects, strict=True))

    def _squares(self, weights: Callable[[int], np.ndarray]) -> np.ndarray:
        """``sum w psi psi'`` over cells, ``psi`` what a match does to the gradient."""
        return sum(
            _residual_gram(point.market.features, weights(k), *self._felt[k]) for k, point in enumerate(self.points)
        )

    def _clustered(self) -> np.ndarray:
        """Sums of ``e psi`` over the clusters that have a cell which was possible, ``(G, K)``."""
        tables = [point.market.table for point in self.points]
        if any(table.cluster is None for table in tables):
            raise ValueError("kind = 'clustered': the coupling has no cluster. Give Coupling(..., cluster=labels).")
        codes = _joined(tables)
        scores = np.zeros((int(max(c.max() for c in codes)) + 1, len(self.coefficients)))
        for k, (point, (over_rows, over_columns)) in enumerate(zip(self.points, self._felt, strict=True)):
            error = self._error(k)
            for rows, block in point.market.features.blocks():
                left = error[rows, :, None] * (block + over_rows[rows, None] + over_columns[None])
                own = codes[k][rows].ravel()
                np.add.at(scores, own[own >= 0], left.reshape(len(own), -1)[own >= 0])
        return scores

    @property
    def standard_errors(self) -> np.ndarray:
        """By the model's covariance, shape ``(K,)``; infinite where the data say nothing, or where a coefficient has no end."""
        return self.errors("model")

    def errors(self, kind: str = "model", *, small_sample: bool = False) -> np.ndarray:
        """Standard errors by a covariance of this kind."""
        found = np.diag(self.covariance(kind, small_sample=small_sample))
        found = np.sqrt(np.where(found >= 0, found, np.inf))  # of information that is rounding
        open_ = abs(self._open).max(1, initial=0.0) > 1e-8
        return np.where(open_, np.inf, found)

    def confidence_intervals(
        self, level: float = 0.95, kind: str = "model", *, small_sample: bool = False
    ) -> np.ndarray:
        """Shape ``(K, 2)``: lower and upper ends."""
        half = _half(level) * self.errors(kind, small_sample=small_sample)
        return np.stack([self.coefficients - half, self.coefficients + half], -1)

    def wald(self, matrix: Any, right: Any = 0.0, kind: str = "model") -> Test:
        """Whether ``R theta = r`` (Wald).

        Args:
            matrix: ``R``, one row per equation, shape ``(q, K)``.
            right: ``r``, shape ``(q,)``, or one number for all.
            kind: of covariance.

        Raises:
            ValueError: where an equation is about coefficients of which the data say nothing, or that have no end.
        """
        matrix = np.atleast_2d(np.asarray(matrix, dtype=np.float64))
        if matrix.shape[1] != len(self.coefficients):
            raise ValueError(
                f"R of shape {matrix.shape}: must have one column for each of {len(self.coefficients)} coefficients."
            )
        open_ = abs(matrix @ self._open).max(1, initial=0.0) > 1e-8 * np.maximum(abs(matrix).max(1), 1e-300)
        if open_.any():
            k = int(open_.argmax())
            raise ValueError(
                f"equation {k} of R is about {_combination(self._named(matrix[k][:, None])[0])}, of which the data say nothing, "
                "or that has no end: there is no test of it. See fit.null_vectors and fit.endless."
            )
        apart = matrix @ self.coefficients - np.broadcast_to(np.asarray(right, dtype=np.float64), len(matrix))
        spread = matrix @ self.covariance(kind) @ matrix.T
        degrees = int(np.linalg.matrix_rank(spread))
        statistic = float(apart @ np.linalg.pinv(spread) @ apart)
        return Test(statistic, degrees, _beyond(degrees, statistic))

    # -- what bilinear coefficients say ------------------------------------------------------------------------------

    def _whitened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        features = self.features[0]
        if not isinstance(features, Bilinear):
            raise ValueError(f"{type(features).__name__} has no traits of rows and columns: this is for Bilinear.")
        table = self.points[0].market.table
        root_x, root_y = _root(features.x, table.a), _root(features.y, table.b)
        return root_x @ self.matrix @ root_y, root_x, root_y

    def saliency(self, level: float = 0.95, kind: str = "model") -> Saliency:
        """Along which combinations of traits people sort, and how much each matters (Dupuy and Galichon, JPE 2014).

        Intervals of the shares by the delta method, without a penalty, with a number of observations, and where the data tell
        all coefficients.
        """
        affinity, root_x, root_y = self._whitened()
        u, s, v = np.linalg.svd(affinity, full_matrices=False)
        shares = s / s.sum()
        intervals = None
        biased = self.model.penalty is not None or self.model.nonnegative
        if self.observations is not None and not biased and not self._open.shape[1]:
            slopes = np.stack(
                [(root_x @ np.outer(u[:, k], v[k]) @ root_y).ravel() for k in range(len(s))]
            )  # of s in theta
            slopes = (slopes - shares[:, None] * slopes.sum(0)) / s.sum()
            half = _half(level) * np.sqrt(np.einsum("kp,pq,kq->k", slopes, self.covariance(kind), slopes))
            intervals = np.clip(np.stack([shares - half, shares + half], -1), 0.0, 1.0)
        return Saliency(s, shares, intervals, np.linalg.pinv(root_x) @ u, np.linalg.pinv(root_y) @ v.T)

    def rank_test(self, rank: int, kind: str = "model") -> Test:
        """Whether the affinity has this rank (Kleibergen and Paap, J. Econometrics 2006)."""
        affinity, root_x, root_y = self._whitened()
        p, q = affinity.shape
        if not 0 <= rank < min(p, q):
            raise ValueError(
                f"rank = {rank}: must be from 0 to {min(p, q) - 1}, less than the affinity {p} x {q} can have."
            )
        if self._open.shape[1]:
            raise ValueError(
                "the data do not tell all entries of the affinity, and so not its rank: see fit.null_vectors and fit.endless. "
                "Leave traits out that others determine."
            )
        u, _, v = np.linalg.svd(affinity)
        left, right = u[:, rank:], v[rank:].T
        lever = np.einsum("pa,qb->abpq", root_x @ left, root_y @ right).reshape(-1, p * q)
        rest = (left.T @ affinity @ right).ravel()
        statistic = float(rest @ np.linalg.pinv(lever @ self.covariance(kind) @ lever.T) @ rest)
        degrees = (p - rank) * (q - rank)
        return Test(statistic, degrees, _beyond(degrees, statistic))

    # -- other data --------------------------------------------------------------------------------------------------

    def predict(self, a: Any, b: Any, features: FeatureMap | None = None, mask: Any = None) -> np.ndarray:
        """The optimal plan between other weights, in the unit of the data; of a panel, that of its first coupling.

        Args:
            a: weights of the rows, shape ``(n,)``.
            b: weights of the columns, shape ``(m,)``.
            features: of other types, or of the same after a change: the same names, other numbers.
            mask: cells that are possible, boolean, shape ``(n, m)``; by default those of the data, or all between other types.

        Raises:
            ValueError: on features of another meaning, another shape, or weights that no plan can have.
        """
        if features is None:
            features, mask = self.features[0], self.points[0].market.table.allowed if mask is None else mask
        if features.names != self.names:
            raise ValueError(
                "the new features must have the names, and so the meaning, of those the coefficients are for."
            )
        unit = self.points[0].market.table.unit
        return predicted(self.model, -features.apply(self.coefficients), a, b, unit=unit, mask=mask)

    def score(self, held_out: Coupling | Any, features: FeatureMap | None = None) -> float:
        """Mean log-likelihood of an observation of another coupling, between its own marginals."""
        features = self.features[0] if features is None else features
        held_out = held_out if isinstance(held_out, Coupling) else Coupling(held_out)
        table = held_out.table(features.shape, self.model.rows, self.model.columns)
        market = Market(features, table, self.model.epsilon, self.model.rows, self.model.columns)
        return log_likelihood(table.plan, market.at(self.coefficients, 1e-10).plan) / float(table.plan.sum())

    # -- what was noticed --------------------------------------------------------------------------------------------

    @property
    def null_vectors(self) -> list[dict[str, float]]:
        """Combinations of coefficients of which the data say nothing, by name."""
        return self._named(self.unseen)

    def _named(self, space: np.ndarray) -> list[dict[str, float]]:
        found = []
        for vector in _sparse_basis(space).T:
            found.append({self.names[k]: float(vector[k]) for k in np.flatnonzero(abs(vector) > 1e-8)})
        return found

    @property
    def warnings(self) -> list[str]:
        """What a user should know before believing the numbers."""
        said = []
        if self.unseen.shape[1]:
            free = self.constraints.free()
            if np.linalg.matrix_rank(free.T @ self.unseen, tol=1e-8) and self.model.penalty is None:
                listed = "; ".join(_combination(v) for v in self.null_vectors[:5])
                said.append(
                    f"{self.unseen.shape[1]} of {len(self.names)} directions of coefficients are not identified: {listed}. "
                    "Between fixed sides the effects of a row or a column alone cannot be told. The smallest coefficients that "
                    "explain the data were returned; leave features out, fix some (fixed=), or add a Ridge."
                )
        if self.separated:
            listed = "; ".join(_combination(v) for v in self._named(self.diverging)[:5])
            said.append(
                "the data are separated: some combination of features is never observed against another, and its coefficient "
                f"goes to infinity ({self.diverging.shape[1]} of {len(self.names)} directions: {listed}). What is returned "
                "explains the data as well as any; its size says nothing, and its standard error is infinite. The other "
                "coefficients are those without the cells that it empties. Add a Ridge for finite coefficients, or leave out the "
                "feature."
            )
        if not self.converged and (beyond := self._out_of_bounds()):
            said.append(
                f"what was observed is no plan of this model: {beyond}. The loss falls without end if some combination of "
                "features can tell. Give weights that allow what was observed, wider bounds, or a side with a price: KL(rho)."
            )
        if not self.converged:
            said.append(
                f"not converged after {self.steps} steps: residual {self.kkt_residual:.1e}. Raise max_steps or epsilon; large "
                "features against a small epsilon make the problem stiff."
            )
        return said

    def _out_of_bounds(self) -> str | None:
        """Which bin of a hard side carries what no plan can."""
        for point in self.points:
            table = point.market.table
            for name, side, observed, weights in (
                ("row", self.model.rows, table.plan.sum(1), table.a),
                ("column", self.model.columns, table.plan.sum(0), table.b),
            ):
                low, high = (number(end) * weights for end in side.bounds)
                outside = (observed < low * (1 - 1e-9)) | (observed > high * (1 + 1e-9))
                if side.is_hard and outside.any():
                    k = int(outside.argmax())
                    least, most = (float(end[k]) * table.unit for end in (low, high))
                    return f"{name} {k} has {observed[k] * table.unit:.6g}, and its side asks for {least:.6g} to {most:.6g}"
        return None

    def report(self, kind: str = "model") -> str:
        """Everything in one table, for reading."""
        lines, known = [], self.observations is not None and self.model.penalty is None and not self.model.nonnegative
        n, m = self.points[0].plan.shape
        panel = f"{len(self.points)} couplings, the first " if len(self.points) > 1 else ""
        observed = "an unknown number of" if self.observations is None else f"{self.observations:,.0f}"
        lines.append(
            f"Inverse optimal transport: {panel}{n} x {m}, {observed} observations, epsilon = {self.model.epsilon:g}"
        )
        lines.append(f"sides {self.model.rows}, {self.model.columns}; penalty {self.model.penalty}")
        width = max(len(x) for x in (*self.names, "coefficient"))
        header = f"{'':{width}}  {'estimate':>12}"
        lines += ["", header + (f"  {'std. error':>12}  {'95 % interval':>27}" if known else "")]
        errors = self.errors(kind) if known else None
        intervals = self.confidence_intervals(0.95, kind) if known else None
        for k, name in enumerate(self.names):
            line = f"{name:{width}}  {self.coefficients[k]:12.6g}"
            if known:
                line += f"  {errors[k]:12.4g}  [{intervals[k, 0]:12.6g}, {intervals[k, 1]:12.6g}]"
            lines.append(line)
        table, plan = self.points[0].market.table, self.points[0].plan
        possible = np.ones(plan.shape, bool) if table.allowed is None else table.allowed
        told = self._identified.T @ self.hessian @ self._identified
        size = np.sqrt(np.maximum(np.diag(told), 1e-300))
        seen = np.linalg.eigvalsh(told / np.outer(size, size))
        condition = 1.0 if not len(seen) else float(seen[-1] / seen[0]) if seen[0] > 0 else np.inf
        marginal = max(
            float(abs(p.solution.certificate.row_violation + p.solution.certificate.column_violation))
            for p in self.points
        )
        lines += [
            "",
            f"log-likelihood {self.log_likelihood:.10g}" + (" per observation" if self.observations is None else ""),
            f"rank {len(self.names) - self._open.shape[1]} of {len(self.names)}"
            + "".join(f"; not identified: {_combination(v)}" for v in self.null_vectors),
            f"condition number of the scaled information {condition:.2g}",
            f"gradient or KKT residual {self.kkt_residual:.1e}, violation of the marginals {marginal:.1e}, {self.steps} steps, "
            + ("converged" if self.converged else "not converged"),
            f"cells without observations {int((possible & (table.plan == 0)).sum())} of {int(possible.sum())}; separated: "
            + ("yes" if self.separated else "no"),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()


def predicted(
    model: InverseOT | Module, cost: np.ndarray, a: Any, b: Any, *, unit: float, mask: Any = None
) -> np.ndarray:
    """The optimal plan between weights on the cells of a mask, of the problem that is posed per ``unit`` of them."""
    if mask is not None:
        cost = np.where(possible(mask, cost.shape), cost, np.inf)
    Problem(cost, a, b, epsilon=model.epsilon, rows=model.rows, columns=model.columns)  # errors in the caller's unit
    a, b = (np.asarray(x, dtype=np.float64) / unit for x in (a, b))
    problem = Problem(cost, a, b, epsilon=model.epsilon, rows=model.rows, columns=model.columns)
    return unit * np.array(solve(problem, gradient=Implicit(), tolerance=1e-12).plan)


def _half(level: float) -> float:
    """Half the width of a normal interval, in standard errors."""
    from scipy.special import ndtri  # scipy is imported where it is needed

    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: must be between 0 and 1, such as 0.95.")
    return float(ndtri(0.5 + level / 2))


def _beyond(degrees: int, statistic: float) -> float:
    """Probability of a larger chi-squared number."""
    from scipy.special import chdtrc

    return float(chdtrc(degrees, statistic))


def log_likelihood(observed: np.ndarray, fitted: np.ndarray) -> float:
    """``sum observed log(share of fitted)``."""
    seen = observed > 0
    with np.errstate(divide="ignore"):
        return float(observed[seen] @ np.log(fitted[seen] / fitted.sum()))


def _residual_gram(
    features: FeatureMap, weights: np.ndarray, over_rows: np.ndarray, over_columns: np.ndarray
) -> np.ndarray:
    """``sum W (phi + F + G) (phi + F + G)'``."""
    r, c = features.sums(weights)
    cross = r.T @ over_rows + c.T @ over_columns + over_rows.T @ (weights @ over_columns)
    own = over_rows.T @ (weights.sum(1)[:, None] * over_rows) + over_columns.T @ (
        weights.sum(0)[:, None] * over_columns
    )
    return features.gram(weights) + cross + cross.T + own


def _joined(tables: list[Table]) -> list[np.ndarray]:
    """Numbers of the clusters of all tables together, from 0 on without a gap; -1 for a cell that was not possible."""
    named = [table.cluster.names for table in tables if table.cluster.names is not None]
    names = np.unique(np.concatenate(named)) if named else np.empty(0)
    start, found = len(names), []
    for table in tables:
        own = [] if table.cluster.names is None else table.cluster.names
        known = np.searchsorted(names, own) if len(own) else np.empty(0, int)
        codes = table.cluster.codes
        whole = np.concatenate([known, start + np.arange(max(0, int(codes.max()) + 1 - len(own)))]).astype(int)
        found.append(whole[codes])
        start += len(whole) - len(own)
    seen = [code if t.allowed is None else code[t.allowed] for code, t in zip(found, tables, strict=True)]
    kept = np.unique(np.concatenate([code.ravel() for code in seen]))
    place = np.full(start, -1)
    place[kept] = np.arange(len(kept))
    return [
        place[code] if t.allowed is None else np.where(t.allowed, place[code], -1)
        for code, t in zip(found, tables, strict=True)
    ]


def _root(traits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Symmetric root of the traits' covariance."""
    share = weights / weights.sum()
    centred = traits - share @ traits
    values, vectors = np.linalg.eigh(centred.T @ (share[:, None] * centred))
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _sparse_basis(basis: np.ndarray) -> np.ndarray:
    """The same space by vectors with few entries, each with a largest entry of 1: reduced row echelon form by full pivoting."""
    rows = basis.T.copy()
    for k in range(len(rows)):
        i, j = np.unravel_index(abs(rows[k:]).argmax(), rows[k:].shape)
        rows[[k, k + i]] = rows[[k + i, k]]
        rows[k] /= rows[k, j]
        for other in range(len(rows)):
            if other != k:
                rows[other] -= rows[other, j] * rows[k]
    rows[abs(rows) < 1e-9] = 0.0
    return rows.T


def _combination(vector: dict[str, float]) -> str:
    def term(name: str, x: float) -> str:
        size = "" if abs(abs(x) - 1) < 1e-9 else f"{abs(x):.3g} "
        return f"{'+' if x > 0 else '-'} {size}{name}"

    return " ".join(term(name, x) for name, x in vector.items()).removeprefix("+ ")
