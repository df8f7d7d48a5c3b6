"""One-line front doors, and what needs no iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iotsolve.inverse.data import Coupling
from iotsolve.inverse.estimator import InverseOT
from iotsolve.inverse.features import Bilinear, Features
from iotsolve.inverse.fit import Fit
from iotsolve.inverse.penalties import Penalty

__all__ = ["affinity", "cross_ratios", "free_cost", "gravity"]


def affinity(x: Any, y: Any, counts: Any = None, *, epsilon: float = 1.0, penalty: Penalty | None = None) -> Fit:
    """The affinity matrix between the traits of two sides (Dupuy and Galichon, JPE 2014).

    Args:
        x: traits of the rows, shape ``(n, p)``.
        y: traits of the columns, shape ``(m, q)``.
        counts: how often types met, shape ``(n, m)``; by default row ``i`` is matched with column ``i``, as couples are.
        epsilon: unit of the affinity.
        penalty: as for :class:`InverseOT`; :class:`Nuclear` for few dimensions.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((200, 1))
        >>> fit = affinity(x, x + rng.standard_normal((200, 1)))
        >>> bool(fit.matrix[0, 0] > 0.5)
        True
    """
    coupling = Coupling(matched=True) if counts is None else Coupling(counts)
    return InverseOT(Bilinear(x, y), epsilon=epsilon, penalty=penalty).fit(coupling)


def gravity(
    table: Any,
    *,
    flow: str,
    origin: str,
    destination: str,
    features: Sequence[str],
    cluster: str | None = None,
    penalty: Penalty | None = None,
) -> Fit:
    """A gravity equation: flows between places with effects of origin and destination, by Poisson pseudo-maximum likelihood.

    Args:
        table: one line per pair, a data frame or a dictionary of columns. Pairs that are not listed were not possible; a flow
            of 0 has a line of its own.
        flow: name of the column of flows, not negative.
        origin: name of the column that says from where.
        destination: name of the column that says where to.
        features: names of the columns that explain the flow, numbers.
        cluster: name of a column of labels whose lines vary together; ``fit.errors("clustered")``.
        penalty: as for :class:`InverseOT`.

    Raises:
        ValueError: on a column that is not there, a missing entry, or a pair that is listed twice.

    Example:
        >>> rows = {"from": [0, 0, 1, 1], "to": [0, 1, 0, 1], "n": [8, 2, 4, 4], "far": [0.0, 1.0, 1.0, 0.0]}
        >>> fit = gravity(rows, flow="n", origin="from", destination="to", features=["far"])
        >>> round(float(fit.coefficients[0]), 4)
        -0.6931
    """
    wanted = [flow, origin, destination, *features, *([] if cluster is None else [cluster])]
    missing = [name for name in wanted if name not in table]
    if missing:
        raise ValueError(f"no column {', '.join(map(repr, missing))}: the table has {', '.join(map(str, table))}.")
    labels = [origin, destination, *([] if cluster is None else [cluster])]
    columns = {name: (_labels if name in labels else _numbers)(name, table[name]) for name in wanted}
    origins, i = np.unique(columns[origin], return_inverse=True)
    destinations, j = np.unique(columns[destination], return_inverse=True)
    n, m = len(origins), len(destinations)
    listed = np.zeros((n, m), np.int64)
    np.add.at(listed, (i, j), 1)
    if listed.max() > 1:
        k, l = np.argwhere(listed > 1)[0]
        raise ValueError(
            f"the pair {origins[k]!r}, {destinations[l]!r} is listed {listed[k, l]} times: sum its flows first, or fit a panel."
        )
    flows, matrices = np.zeros((n, m)), {}
    flows[i, j] = columns[flow]
    for name in features:
        matrices[name] = np.zeros((n, m))
        matrices[name][i, j] = columns[name]
    clusters = None
    if cluster is not None:
        codes = np.unique(columns[cluster], return_inverse=True)[1]
        clusters = np.arange(n * m).reshape(n, m) + len(codes)
        clusters[i, j] = codes
    coupling = Coupling(flows, mask=listed > 0, cluster=clusters)
    return InverseOT(Features(matrices), penalty=penalty).fit(coupling)


def _numbers(name: str, column: Any) -> np.ndarray:
    """A column of finite numbers."""
    try:
        found = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r}: must be numbers. Are there words, units or missing entries? ({error})"
        ) from error
    if not np.isfinite(found).all():
        line = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(
            f"column {name!r}, line {line}: {found[line]}, but must be finite. Drop or fill in what is missing."
        )
    return found


def _labels(name: str, column: Any) -> np.ndarray:
    """A column of labels that can be put in order, none of them missing."""
    # a list is taken as it is: NumPy would make a word of a missing entry
    found = np.asarray(column, dtype=None if hasattr(column, "dtype") else object)
    if found.dtype.kind in "OfM":
        line = next((k for k, label in enumerate(found) if not _is_known(label)), None)
        if line is not None:
            raise ValueError(
                f"column {name!r}, line {line}: the label is missing. Drop the line, or name what is unknown."
            )
    return found


def _is_known(label: Any) -> bool:
    try:
        return label is not None and bool(label == label)
    except TypeError:  # pandas' NA is not comparable
        return False


def cross_ratios(plan: Any, base: tuple[int, int] = (0, 0)) -> np.ndarray:
    """``log(P_ij P_kl / (P_il P_kj))`` for a base cell ``(k, l)``: all that a plan between fixed sides says about the cost.

    Example:
        >>> cross_ratios([[0.4, 0.1], [0.1, 0.4]])[1, 1].round(4).item()
        2.7726
    """
    logs = _logarithms(plan)
    k, l = base
    return logs - logs[:, l, None] - logs[k] + logs[k, l]


def free_cost(plan: Any, *, epsilon: float = 1.0, symmetric: bool = False) -> np.ndarray:
    """A cost of its own for every pair, in closed form: the one of which ``plan`` is optimal between its own marginals.

    Args:
        plan: positive, shape ``(n, m)``; in any unit.
        epsilon: strength of the entropy, cost units.
        symmetric: the symmetric cost with zero diagonal, ``C_ij = eps / 2 log(P_ii P_jj / (P_ij P_ji))``, nearest to a plan that
            is not quite symmetric; otherwise the cost that is doubly centred with the plan's marginals.

    Raises:
        ValueError: where a cell is 0: its cost would be infinite.

    Example:
        >>> free_cost([[0.4, 0.1], [0.1, 0.4]], symmetric=True)[0, 1].round(4).item()
        1.3863
    """
    logs = _logarithms(plan)
    if symmetric:
        if logs.shape[0] != logs.shape[1]:
            raise ValueError(f"a symmetric cost needs as many rows as columns, the plan has {logs.shape}.")
        own = np.diag(logs)
        return epsilon / 2 * (own[:, None] + own - logs - logs.T)
    share = np.asarray(plan, dtype=np.float64)
    a, b = share.sum(1) / share.sum(), share.sum(0) / share.sum()
    rows, columns = logs @ b, a @ logs
    return -epsilon * (logs - rows[:, None] - columns + a @ rows)


def _logarithms(plan: Any) -> np.ndarray:
    plan = np.asarray(plan, dtype=np.float64)
    if plan.ndim != 2 or not (np.isfinite(plan) & (plan > 0)).all():
        where = np.argwhere(~(plan > 0))[0] if plan.ndim == 2 else plan.shape
        raise ValueError(
            f"plan at {tuple(int(x) for x in where)}: must be a matrix of positive numbers, since the logarithm of each enters. "
            "Estimate a cost with fewer coefficients (InverseOT), which cells without observations do not upset."
        )
    return np.log(plan)
