"""What a problem must satisfy before anybody tries to solve it: value, rule, likely cause and fix in every message."""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from iotsolve.costs import METRICS, Cost, Dense, Points, calm
from iotsolve.distributed import Ranks, Sharded
from iotsolve.kernels.backends import check as check_backend
from iotsolve.marginals import Marginal, Scalar, number
from iotsolve.support import fits, largest_mass

if TYPE_CHECKING:
    from iotsolve.problem import Problem

__all__ = [
    "as_cost",
    "as_scalar",
    "as_weights",
    "check_alike",
    "check_multiplier",
    "check_problem",
    "check_steps",
    "check_tolerance",
    "check_window",
    "common_batch",
    "default_tolerance",
    "one_number",
    "rounding",
    "why_impossible",
]


def rounding(dtype: torch.dtype) -> float:
    """Relative error of a sum of masses that is still rounding in this precision."""
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative marginal error and gap that count as converged: 1e-8 in float64, 1e-5 in float32 (and half precision)."""
    return 1e-8 if dtype == torch.float64 else 1e-5


def check_tolerance(tolerance: Any) -> None:
    """A relative error, or None for the default.

    Raises:
        ValueError: if it is no number in [0, 1).
    """
    if tolerance is not None and not (_is(tolerance, Real) and 0 <= tolerance < 1):
        raise ValueError(
            f"tolerance = {tolerance!r}: is relative, so must be a number in [0, 1); 1e-8 is the default in float64."
        )


def check_steps(max_steps: Any, *, default: int) -> None:
    """A number of steps.

    Raises:
        ValueError: if it is no whole number, or below 1.
    """
    if not (_is(max_steps, Integral) and max_steps >= 1):
        raise ValueError(f"max_steps = {max_steps!r}: must be a whole number, at least 1; the default is {default:,}.")


def check_window(mixing: Any) -> None:
    """A number of sweeps to be mixed.

    Raises:
        ValueError: if it is no whole number, or below 0.
    """
    if not (_is(mixing, Integral) and mixing >= 0):
        raise ValueError(f"mixing = {mixing!r}: must be a whole number of sweeps, 0 for none; the default is 15.")


def _is(x: Any, kind: type) -> bool:
    return isinstance(x, kind) and not isinstance(x, bool)


def as_cost(cost: Any) -> tuple[Cost, bool]:
    """The cost in floating tensors, without a copy where possible, and whether it came from NumPy."""
    if isinstance(cost, Points):
        return _as_points(cost)
    if isinstance(cost, Sharded):
        return Sharded.joined(_as_points(cost.local)[0], cost.ranks, cost.repeat), False
    if isinstance(cost, Dense):
        cost = cost.dense()
    as_numpy = not isinstance(cost, Tensor)
    matrix = _floating("cost", cost, as_numpy)
    if matrix.dim() < 2 or 0 in matrix.shape:
        raise ValueError(
            f"cost has shape {tuple(matrix.shape)}: it must be (..., n, m) with n, m >= 1. "
            "For the points behind a cost pass Points(x, y, metric)."
        )
    with calm(matrix):
        dense = Dense(matrix).surveyed()
        if not all(math.isfinite(end) for end in dense.ends):
            _check_cost(matrix.detach())
        _check_range(dense)
    return dense, as_numpy


def _floating(name: str, x: Any, as_numpy: bool) -> Tensor:
    tensor = _tensor(name, x)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64 if as_numpy else torch.get_default_dtype())


def _as_points(cost: Points) -> tuple[Points, bool]:
    if not callable(cost.metric) and not (isinstance(cost.metric, str) and cost.metric in METRICS):
        raise ValueError(
            f"metric = {cost.metric!r}: must be one of {', '.join(METRICS)}, or for points on a line a function of x - y. "
            "Any other cost can be passed as a matrix."
        )
    as_numpy = not (isinstance(cost.x, Tensor) or isinstance(cost.y, Tensor))
    x, y = (_floating(name, z, as_numpy) for name, z in (("x", cost.x), ("y", cost.y)))
    if min(x.dim(), y.dim()) < 2 or 0 in (*x.shape, *y.shape) or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"points x {tuple(x.shape)} and y {tuple(y.shape)}: must be (..., n, d) and (..., m, d) with the same d >= 1. "
            "Points on a line are columns: x[:, None]."
        )
    if callable(cost.metric) or cost.metric == "cosine" or cost.unit:  # of others a range tells, which is asked for anyway
        _check_finite(x, y)
    for name, z in (("x", x), ("y", y)):
        if cost.metric == "cosine" and (z.detach().norm(dim=-1) == 0).any():
            raise ValueError(
                f"{name}{_at(z.detach().norm(dim=-1) == 0)} is the zero vector: it has no direction, so no cosine. Drop it."
            )
    try:
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # torch's takes half a second when first called
    except ValueError as error:
        raise ValueError(
            f"points x {tuple(x.shape)} and y {tuple(y.shape)} have leading dimensions that do not broadcast: each must be the "
            "batch's, or absent."
        ) from error
    dtype = torch.promote_types(x.dtype, y.dtype)
    barred = None if cost.barred is None else _barred(cost.barred, (*batch, x.shape[-2], y.shape[-2])).to(x.device)
    if cost.unit:
        lengths = torch.cat([z.detach().norm(dim=-1).flatten() for z in (x, y)])
        if not bool(((lengths - 1).abs() <= 0.1).all()):
            raise ValueError(
                f"unit = True and a point of length {float(lengths[(lengths - 1).abs().argmax()]):g}: it says that all are of "
                "length 1. Normalise the points, or leave unit out."
            )
    backend = check_backend(cost.backend)
    points = Points(
        x.to(dtype), y.to(dtype=dtype, device=x.device), cost.metric, barred, backend, cost.precise, cost.unit
    ).expand(batch)
    if callable(points.metric):
        _check_function(points)
    elif not (_is_small(x, y, dtype) or float(points.range().detach().max()) < math.inf):
        _check_finite(x, y)
        raise ValueError(f"points so far apart that their {cost.metric} cost overflows {dtype}: rescale them.")
    return points, as_numpy


def _is_small(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether points are finite, and so near 0 that no cost between them overflows: what is true of most, and told at once."""
    reach = sum(torch.stack([torch.linalg.vector_norm(z.detach(), math.inf).to(x) for z in (x, y)]).tolist())
    return 4 * x.shape[-1] * reach * reach <= torch.finfo(dtype).max


def _check_finite(x: Tensor, y: Tensor) -> None:
    for name, z in (("x", x), ("y", y)):
        bad = ~z.detach().isfinite()
        if bad.any():
            raise ValueError(
                f"{name}{_at(bad)} = {float(z.detach()[bad][0])}: points must be finite. Drop the points with missing values."
            )


def _barred(barred: Any, shape: tuple[int, ...]) -> Tensor:
    """Forbidden arcs of points, as a mask or as the columns each row leaves out."""
    if isinstance(barred, np.ndarray | list) and (array := np.asarray(barred)).dtype.kind in "biu":
        barred = torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.int64))  # neither is a number
    tensor = _tensor("barred", barred)
    whole, fits = not tensor.is_floating_point(), tensor.dim() == 2 and len(tensor) == shape[-2] and len(shape) == 2
    if tensor.dtype == torch.bool:
        fits = fits and tuple(tensor.shape) == shape
    elif fits and whole and tensor.numel():
        least, most = int(tensor.min()), int(tensor.max())
        if tuple(tensor.shape) == shape and shape[-1] > 1 and least >= 0 and most <= 1:
            raise ValueError(
                f"barred holds whole numbers from {least} to {most} in the shape of the cost, {shape}: a mask must be boolean, "
                "since whole numbers are the columns that each row leaves out. Pass barred.astype(bool), of torch barred.bool()."
            )
        if not 0 <= least <= most < shape[-1]:
            raise ValueError(
                f"barred names column {least if least < 0 else most}, but there are {shape[-1]}, from 0: whole numbers are the "
                "columns that each row leaves out. Does it count from 1?"
            )
    if not (whole and fits):
        raise ValueError(
            f"barred has shape {tuple(tensor.shape)} and dtype {tensor.dtype} for a cost of shape {shape}: must be boolean of "
            "the cost's shape, or whole numbers of shape (n, k), the columns each row must not use; without batch dimensions."
        )
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _check_function(points: Points) -> None:
    """A metric that is a function: on a line, elementwise, finite at every difference."""
    says = f"metric = {points.metric!r}, a function of the difference x - y,"
    if points.x.shape[-1] != 1:
        raise ValueError(
            f"{says} and points with d = {points.x.shape[-1]}: it must be for points on a line, d = 1. In more dimensions "
            f"take one of {', '.join(METRICS)}, or pass the cost as a matrix."
        )
    apart = (points.x[..., :1, :] - points.y.mT).detach().requires_grad_()
    try:
        with torch.enable_grad():
            cost = points.metric(apart)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{says} fails on a tensor of shape {tuple(apart.shape)} ({type(error).__name__}: {error}). It must be written for "
            "torch, as in lambda apart: apart.abs() ** 1.5."
        ) from error
    if not isinstance(cost, Tensor) or cost.shape != apart.shape or cost.dtype != apart.dtype:
        given = f"shape {tuple(cost.shape)}, {cost.dtype}" if isinstance(cost, Tensor) else repr(cost)
        raise ValueError(
            f"{says} makes of a tensor of shape {tuple(apart.shape)}, {apart.dtype}: {given}. It must give one cost for each "
            "difference, in the same dtype. Does it sum, or count?"
        )
    if not float(replace(points, barred=None).range().max()) < math.inf:
        raise ValueError(
            f"{says} is infinite or NaN at some difference: it must be finite at all. Is it a root or a logarithm of what may "
            f"be negative, or does it overflow {points.dtype}? Forbidden arcs are what barred= is for."
        )


def _check_cost(values: Tensor) -> None:
    if values.isnan().any():
        raise ValueError(
            f"cost{_at(values.isnan())} is NaN ({int(values.isnan().sum())} NaN in all): costs must be finite, or +inf "
            "for a forbidden arc. NaN usually comes from 0/0 in a normalisation or from a missing value in the data."
        )
    if (values == -math.inf).any():
        raise ValueError(
            f"cost{_at(values == -math.inf)} is -inf: an arc that pays infinitely has no optimal plan. "
            "A forbidden arc is +inf; a log-similarity must be negated to become a cost."
        )


def _check_range(cost: Dense) -> None:
    bottom, top = cost.ends
    if top == math.inf:
        top = float(torch.where(cost.matrix.isfinite(), cost.matrix.detach(), -math.inf).max())
    if top - bottom > max(torch.finfo(cost.dtype).max, torch.finfo(torch.float32).max):
        raise ValueError(
            f"costs from {bottom:.6g} to {top:.6g}: their range overflows {cost.dtype}. Rescale them; a forbidden arc is +inf "
            "and not a large number."
        )


def as_weights(name: str, weights: Any, size: int, cost: Cost) -> Tensor:
    """Weights of one side on the cost's device, uniform of total 1 if not given; in its dtype, float32 for half precision.

    Half-precision weights do not sum to one: 20 times bfloat16's 1/20 is 1.002, and no plan has two such totals.
    """
    dtype = torch.float32 if cost.dtype in (torch.float16, torch.bfloat16) else cost.dtype
    if weights is None:
        return torch.full((size,), 1.0 / size, dtype=dtype, device=cost.device)
    weights = _tensor(name, weights).to(dtype=dtype, device=cost.device)
    side = "rows" if name == "a" else "columns"
    if weights.dim() < 1 or weights.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)} but the cost has {size} {side}: {name} must be (..., {size}), one weight "
            f"per {'row' if name == 'a' else 'column'}. Are a and b swapped, or the cost transposed?"
        )
    values = weights.detach()
    if values.dim() == 1 and float(values.min()) >= 0 and 0 < float(values.sum()) < math.inf:  # the usual, in two looks
        return weights
    bad = ~(values.isfinite() & (values >= 0))
    if bad.any():
        raise ValueError(
            f"{name}{_at(bad)} = {float(values[bad][0])}: weights must be finite and non-negative. "
            "Signed data must be split into its positive and negative parts; NaN usually comes from dividing by a sum of 0."
        )
    if values.sum(-1).isinf().any():
        raise ValueError(
            f"{name} has a total that overflows {dtype}: rescale the weights, by the same factor on both sides."
        )
    if (values.sum(-1) <= 0).any():
        raise ValueError(f"{name} has total 0: a side without mass has no plan. Was an empty histogram passed?")
    return weights


def check_multiplier(problem: Problem, lam: Any) -> None:
    """A multiplier of ``mass`` where there is one; from another no bound follows.

    Raises:
        ValueError: on a multiplier other than 0 without ``mass``.
    """
    given = lam.detach() if isinstance(lam, Tensor) else np.asarray(lam)
    if problem.mass is None and bool((abs(given) > 0).any()):  # NaN is somebody else's failure
        raise ValueError(
            f"lam = {lam!r} of a problem without mass: there is nothing that it could be the multiplier of, and no bound follows "
            "from it. Add it to f or to g, or give the problem its mass."
        )


def check_problem(problem: Problem) -> None:
    """Raise a ValueError for a problem that is malformed or has no answer."""
    if isinstance(problem.epsilon, Tensor) and number(problem.epsilon) == 0:
        raise ValueError(
            "epsilon is a tensor equal to 0: pass the number 0 for exact transport; it has no gradient there."
        )
    if problem.mass is not None and number(problem.mass) == 0:
        raise ValueError("mass = 0: the plan is zero and there is nothing to solve. Pass the mass to be moved.")
    for side in ("rows", "columns"):
        if not isinstance(getattr(problem, side), Marginal):
            raise ValueError(
                f"{side} = {getattr(problem, side)!r}: must be a marginal object, one of FIXED, FREE, AT_MOST, Between(lo, hi), "
                "KL(rho), TV(rho), ChiSquared(rho), L2(rho) from iotsolve."
            )
    if problem.is_exact and isinstance(problem.cost, Sharded):
        raise ValueError("epsilon = 0 with a sharded cost: exact transport runs on one process. Use epsilon > 0.")
    _check_totals(problem)
    with np.errstate(over="ignore"):
        product = 0.0 if problem.is_exact else problem.amounts.prod(0).max()
    if not product <= torch.finfo(problem.a.dtype).max:
        a, b = (float(w.detach().sum(-1).max()) for w in (problem.a, problem.b))
        raise ValueError(
            f"a and b have totals of {a:.6g} and {b:.6g}, whose product overflows {problem.a.dtype}: the entropy is relative to "
            "a x b. Rescale the weights, by the same factor on both sides, or use epsilon=0."
        )
    _check_reachable(problem)
    if problem.is_exact and problem.mass is None:
        _check_bounded(problem)


def check_alike(problem: Problem, ranks: Ranks) -> None:
    """With rows on many ranks: all are to have the same weights and numbers.

    Raises:
        ValueError: on every rank, if they have not.
    """
    told: dict[str, float] = {}
    for name, weights in (("a", problem.a), ("b", problem.b)):
        w = weights.detach().double()
        order = torch.arange(1, 1 + len(w), dtype=w.dtype, device=w.device)
        told[f"sum of {name}"] = float(w.sum())
        for k in (2, 3):  # irregular, so that no other weights have the same
            told[f"sum of frac(i sqrt {k}) {name}[i]"] = float(w @ (order * math.sqrt(k)).frac())
    told |= {"epsilon": number(problem.epsilon), "mass": 0.0 if problem.mass is None else number(problem.mass)}
    for name, side in zip(("rows", "columns"), problem.sides, strict=True):
        told[f"kind of {name}"] = zlib.crc32(type(side).__name__.encode())
        told |= {f"{field.name} of {name}": number(getattr(side, field.name)) for field in fields(side)}
    ranks.agree(
        "the ranks' problems differ in more than their rows. All must have the weights of all rows and of all columns, and the "
        "same epsilon, mass and sides: broadcast them from one rank.",
        told,
        within=rounding(problem.dtype),
    )


def _tensor(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        if x.is_complex():
            raise ValueError(f"{name} is complex ({x.dtype}): it must be real. Pass its real part or its modulus.")
        if x.layout != torch.strided:
            raise ValueError(
                f"{name} is sparse ({x.layout}): what it leaves out would be 0, and a cost of 0 is no forbidden arc. Pass "
                "to_dense(), with inf where there is no arc."
            )
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, whose mask would be lost. Forbid masked arcs with cost.filled(np.inf), or empty "
            "masked bins with weights.filled(0.0)."
        )
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{name} is no array: {error}. Its rows must have equal lengths; pad or drop what is missing."
        ) from error
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} has dtype {array.dtype}: it must hold real numbers. Strings or objects often come from a CSV header "
            "or from rows of unequal length."
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        # Inputs are never written to, so a read-only array is as good as any.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def as_scalar(name: str, x: Any, *, hint: str) -> Scalar:
    """A float, or a tensor without dimensions; finite and not negative.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(x, Tensor) and x.dim() > 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be a float or a tensor without dimensions ({hint}).")
    value = one_number(name, x, hint)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} = {x!r}: must be one finite number >= 0, in the problem's units ({hint}).")
    return x if isinstance(x, Tensor) else value


def one_number(name: str, x: Any, hint: str) -> float:
    """The number that something is, NaN of a text; a ValueError if it is none."""
    try:
        return math.nan if isinstance(x, str | bytes) else number(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} = {x!r}: must be one number ({hint}).") from error


def common_batch(cost: Cost, a: Tensor, b: Tensor) -> torch.Size:
    """The leading dimensions that cost and weights broadcast to."""
    batches = cost.shape[:-2], a.shape[:-1], b.shape[:-1]
    if batches[0] == batches[1] == batches[2]:
        return batches[0]
    try:
        return torch.Size(np.broadcast_shapes(*batches))
    except ValueError as error:
        raise ValueError(
            f"cost {tuple(cost.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} have leading dimensions that do not broadcast: "
            "each must be the batch's, or absent. Is a weight vector missing its batch, or the cost?"
        ) from error


def shared(weights: Tensor) -> Tensor:
    """The weights without the dimensions along which a batch shares them."""
    return weights.detach()[tuple(0 if stride == 0 else slice(None) for stride in weights.stride())]


def _check_totals(problem: Problem) -> None:
    """The intervals in which the total mass must lie, by rows, columns and ``mass``, have to meet."""
    if problem.mass is None and not (problem.rows.is_hard and problem.columns.is_hard):
        return  # one side alone can have any total
    fixed = problem.mass is None and problem.rows.is_fixed and problem.columns.is_fixed
    a, b = shared(problem.a), shared(problem.b)
    if fixed and problem.is_even and problem.rows.bounds == problem.columns.bounds:
        return
    if fixed and a.dim() == b.dim() == 1:  # the usual
        asked = [
            number(side.bounds[0]) * float(weights.double().sum())
            for weights, side in ((a, problem.rows), (b, problem.columns))
        ]
        if max(asked) <= min(asked) * (1 + rounding(problem.dtype)):
            return
    lows, highs = [], []
    for name, weights, side in (("rows", problem.a, problem.rows), ("columns", problem.b, problem.columns)):
        total = weights.detach().double().sum(-1)
        lo, hi = (number(x) for x in side.bounds)
        lows.append((lo * total, f"the {name} ask for at least"))
        highs.append((hi * total, f"the {name} allow at most"))
    if problem.mass is not None:
        mass = torch.as_tensor(number(problem.mass), dtype=torch.float64, device=problem.a.device).expand(problem.batch_shape)
        lows.append((mass, "mass ="))
        highs.append((mass, "mass ="))
    slack = rounding(problem.dtype)
    for low, says in lows:
        for high, allows in highs:
            high = high.to(low.device)
            crossed = low > high * (1 + slack)
            if crossed.any():
                where = f" in problem {_first(crossed)}" if crossed.dim() else ""
                at_least, at_most = (float(x[crossed].reshape(-1)[0]) for x in (low, high))
                raise ValueError(
                    f"{says} {at_least:.10g} but {allows} {at_most:.10g}{where}: "
                    "no plan can have both totals. Nothing is renormalised for you: scale a and b to the same total, or "
                    "relax a side with FREE, AT_MOST, KL(rho) or TV(rho)."
                )


def why_impossible(problem: Problem) -> str:
    """Why the forbidden arcs of an unchecked problem of a matrix admit no plan; empty if they do, or if costs are NaN."""
    if problem.cost.dense().isnan().any():
        return ""
    try:
        _check_reachable(problem)
    except ValueError as error:
        return str(error)
    return ""


def _check_reachable(problem: Problem) -> None:
    """A bin that must receive mass needs at least one allowed arc to a bin that has some."""
    if problem.cost.all_finite():
        return
    matrix = problem.cost.dense().detach()
    allowed = matrix.isfinite() & (problem.a.detach() > 0).unsqueeze(-1) & (problem.b.detach() > 0).unsqueeze(-2)
    for name, side, weights, axis in (("row", problem.rows, problem.a, -1), ("column", problem.columns, problem.b, -2)):
        stranded = (weights.detach() > 0) & ~allowed.any(axis)
        if number(side.bounds[0]) > 0 and stranded.any():
            raise ValueError(
                f"{name} {_first(stranded)} must carry mass but every arc to a bin with mass is forbidden (cost inf): "
                "no plan exists. Allow an arc, set that weight to 0, or relax the side with FREE, KL(rho) or TV(rho)."
            )
    if not allowed.flatten(-2).any(-1).all():
        raise ValueError(
            "every arc between bins with mass is forbidden (cost inf): the only plan is zero. Is the mask inverted?"
        )
    _check_feasible(problem, allowed)


def _check_feasible(problem: Problem, allowed: Tensor) -> None:
    """The forbidden arcs must leave room for what each side demands of the other (Mendelsohn and Dulmage: either is enough)."""
    n, m = problem.shape[-2:]
    arcs = allowed.reshape(-1, n, m).cpu().numpy()
    a, b = (w.detach().reshape(-1, w.shape[-1]).double().cpu().numpy() for w in (problem.a, problem.b))
    (lo_r, hi_r), (lo_c, hi_c) = ([number(x) for x in side.bounds] for side in (problem.rows, problem.columns))
    enough = np.maximum(np.maximum(lo_r * a.sum(1), lo_c * b.sum(1)), number(problem.mass or 0.0))[:, None]
    limit_r, limit_c = (enough + 0 * w if math.isinf(hi) else hi * w for hi, w in ((hi_r, a), (hi_c, b)))
    demands = [(lo_r * a, limit_c, lo_r * a.sum(1), "rows"), (limit_r, lo_c * b, lo_c * b.sum(1), "columns")]
    if problem.mass is not None:
        demands.append((limit_r, limit_c, np.full(len(a), number(problem.mass)), "mass"))
    for supply, demand, need, who in demands:
        if who == "columns":
            known = fits(arcs.swapaxes(1, 2), demand, supply, need * (1 - rounding(problem.dtype)))
        else:
            known = (need <= 0) if who == "mass" else fits(arcs, supply, demand, need * (1 - rounding(problem.dtype)))
        for k in np.flatnonzero((need > 0) & ~known):
            most, error = largest_mass(arcs[k], supply[k], demand[k])
            if most < need[k] * (1 - rounding(problem.dtype)) - error:
                here = torch.arange(len(a), device="cpu").reshape(problem.batch_shape) == k
                which = f" of problem {_first(here)}" if len(a) > 1 else ""
                raise ValueError(
                    f"the allowed arcs{which} carry at most {most:.9g} but the {who} demand {need[k]:.9g}: the forbidden arcs "
                    "(cost inf) admit no plan. Allow more arcs, or relax a side with FREE, AT_MOST, KL(rho) or TV(rho)."
                )


def _check_bounded(problem: Problem) -> None:
    """At epsilon = 0 without ``mass``: neither infinite gain nor the zero plan."""
    price, gains = problem.rows.recession + problem.columns.recession, False
    idle = all(_asks_nothing(side) for side in problem.sides)
    if math.isinf(price) and not idle:
        return
    for rows, block in problem.cost.blocks():
        matrix = block.dense().detach()
        a, b = problem.a.detach()[..., rows] > 0, problem.b.detach() > 0
        reached = a.unsqueeze(-1) & b.unsqueeze(-2) & matrix.isfinite()
        gaining = reached & (matrix + price < 0)
        if gaining.any():
            i, j = gaining.nonzero()[0][-2:].tolist()
            raise ValueError(
                f"unbounded: arc ({rows.start + i}, {j}) costs {float(matrix[gaining][0]):.6g} and both sides together charge "
                f"{price:.6g} per further unit, so more mass always pays. Pass mass=, bound a side with AT_MOST, or use "
                "epsilon > 0."
            )
        gains = gains or bool((reached & (matrix < 0)).any())
    if idle and not gains:
        raise ValueError(
            "no side asks for any mass and no cost is negative, so the optimal plan is zero: pass mass= to say how much is moved."
        )


def _asks_nothing(side: Marginal) -> bool:
    zero, one = torch.zeros(1, device="cpu"), torch.ones(1, device="cpu")
    return number(side.bounds[0]) == 0 and number(side.divergence(zero, one)) == 0


def _at(mask: Tensor) -> str:
    """Index of the first True, as it stands behind the name of an array."""
    return str(mask.nonzero()[0].tolist())


def _first(mask: Tensor) -> str:
    """Index of the first True, as it stands in a sentence: one number has no brackets."""
    index = mask.nonzero()[0].tolist()
    return str(index[0] if len(index) == 1 else index)
