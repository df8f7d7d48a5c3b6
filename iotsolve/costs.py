"""Costs: the seam for size. A solver asks a cost for soft-minima and marginals, and never learns how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iotsolve.kernels import backends, bilinear, products
from iotsolve.kernels.precision import product
from iotsolve.kernels.threads import allowed, each_piece, torch_on
from iotsolve.marginals import Scalar, times

__all__ = ["METRICS", "Cost", "Dense", "Points", "busy", "calm", "quiet"]


@dataclass(frozen=True)
class Dense:
    """A cost held as a matrix. ``+inf`` entries are forbidden arcs: they carry no mass and no gradient.

    Args:
        matrix: shape ``(..., n, m)``, finite or ``+inf``, in cost units.

    Example:
        >>> Dense(torch.tensor([[0.0, 1.0]])).softmin(torch.zeros(2), 1.0, axis=-1)
        tensor([-0.3133])
    """

    matrix: Float[Tensor, "*batch n m"]
    ends: tuple[float, float] | None = field(default=None, repr=False, compare=False)
    """Least and largest entry of all problems, if somebody has looked; NaN if one is NaN."""

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    @property
    def is_compiled(self) -> bool:
        """Whether compiled passes read this cost: on a CPU, in rows."""
        matrix = self.matrix
        return matrix.device.type == "cpu" and matrix.dtype in (torch.float64, torch.float32) and matrix.stride(-1) == 1

    def surveyed(self) -> Dense:
        """The same cost with its ends known."""
        if self.ends is not None:
            return self
        return Dense(self.matrix, _ends(self.matrix.detach()))

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def tensors(self) -> dict[str, Tensor]:
        """What a gradient can flow to, by name."""
        return {"cost": self.matrix}

    def with_tensors(self, named: dict[str, Tensor]) -> Dense:
        """The same cost with other data; names it does not know are none of its business."""
        return Dense(named["cost"]) if "cost" in named else self

    def viewed(self, matrix: Tensor) -> Dense:
        """A cost of the same numbers: another shape or precision, detached or a part."""
        return Dense(matrix, self.ends)

    def expand(self, batch: tuple[int, ...]) -> Dense:
        return self.viewed(self.matrix.expand(*batch, *self.matrix.shape[-2:]))

    def all_finite(self) -> bool:
        """True without forbidden arcs."""
        return math.isfinite(self.ends[1]) if self.ends is not None else bool(self.matrix.isfinite().all())

    def dense(self) -> Float[Tensor, "*batch n m"]:
        """The cost as a matrix, shape ``(..., n, m)``."""
        return self.matrix

    def blocks(self) -> Iterator[tuple[slice, Dense]]:
        """The cost in blocks of rows: all of it where it is small, and else so that what is computed of it stays so."""
        n = self.matrix.shape[-2]
        whole, block = (_WHOLE, _BLOCK) if self.matrix.device.type == "cpu" else (_WHOLE_ON_DEVICE, _WHOLE_ON_DEVICE)
        size = n if self.matrix.numel() <= whole else max(1, block * n // self.matrix.numel())
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, self if size >= n else self.viewed(self.matrix[..., rows, :])

    def entries(self, index: tuple[Tensor, ...]) -> Tensor:
        """``C`` at the given batch, row and column indices, shape ``(k,)``."""
        return self.matrix[index]

    @property
    def ceiling(self) -> float:
        """The largest entry of all problems."""
        return self.surveyed().ends[1]

    def ceiling_between(self, rows: Bool[Tensor, "*batch n"], columns: Bool[Tensor, "*batch m"]) -> float:
        """The largest entry between these bins."""
        return float(self.matrix.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), -math.inf).amax())

    def range(self) -> Float[Tensor, "*batch"]:
        """Largest minus smallest allowed entry."""
        if self.matrix[..., 0, 0].numel() == 1 and self.ends is not None and self.all_finite():
            return self.matrix.new_full(self.matrix.shape[:-2], self.ends[1] - self.ends[0])
        allowed = self.matrix.isfinite()
        top = torch.where(allowed, self.matrix, -math.inf).amax((-2, -1))
        return (top - self.matrix.amin((-2, -1))).clamp(min=0.0).nan_to_num(0.0, posinf=0.0)

    def between(self, rows: Bool[Tensor, "*batch n"], columns: Bool[Tensor, "*batch m"]) -> Dense:
        """The cost in which the arcs of all other bins are forbidden."""
        return Dense(torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), self.matrix, math.inf))

    def softmin(self, log_weights: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """``-epsilon log sum exp(log_weights - C / epsilon)`` over the given axis, ``+inf`` where nothing is allowed.

        Args:
            log_weights: for ``axis=-1`` shape ``(..., m)``, for ``axis=-2`` shape ``(..., n)``: ``log b + g / epsilon``.
            epsilon: positive, in cost units.
            axis: ``-1`` sums over columns and gives ``(..., n)``; ``-2`` sums over rows and gives ``(..., m)``.
        """
        if self.is_compiled and not self._is_traced(log_weights, epsilon):
            from iotsolve.kernels import passes

            return self._passed(log_weights, lambda *given: passes.softmin(*given, float(epsilon), axis=axis))
        exponent = self._less_cost(log_weights.unsqueeze(-2 if axis == -1 else -1), epsilon)
        return -epsilon * torch.logsumexp(exponent, axis)

    def _is_traced(self, *given: Scalar) -> bool:
        """Whether autograd follows."""
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (self.matrix, *given))

    def _passed(self, given: Tensor, work: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
        """A compiled pass over every problem of a batch, that takes a vector along an axis and leaves one across it."""
        *batch, n, m = self.matrix.shape
        size, cost = math.prod(batch), self.matrix.detach()
        vectors = given.detach().expand(*batch, given.shape[-1]).reshape(size, -1).double().numpy()
        cost = cost[:1] if len(batch) == 1 and size > 1 and cost.stride(0) == 0 else cost.reshape(size, n, m)
        return torch.from_numpy(work(cost.numpy(), vectors)).to(given.dtype).reshape(*batch, -1)

    def _less_cost(self, x: Tensor, epsilon: Scalar) -> Tensor:
        """``x - C / epsilon``; in one pass over C where epsilon is a number."""
        if isinstance(epsilon, Tensor):
            return x - self.matrix / epsilon
        return torch.sub(x, self.matrix, alpha=1.0 / epsilon)

    def gibbs(self, log_rows: Tensor, log_columns: Tensor, epsilon: Scalar) -> Float[Tensor, "*batch n m"]:
        """``exp(log_rows + log_columns - C / epsilon)``, shape ``(..., n, m)``."""
        if self.is_compiled and not self._is_traced(log_rows, log_columns, epsilon):
            dtype = torch.promote_types(self.dtype, log_rows.dtype)
            top = float(log_rows.amax()) + float(log_columns.amax()) - self.surveyed().ends[0] / float(epsilon)
            if top < math.log(torch.finfo(dtype).max):  # else, and if something is NaN, torch has the word
                return self._written(log_rows, log_columns, float(epsilon), dtype)
        exponent = log_rows.unsqueeze(-1) + log_columns.unsqueeze(-2)
        inside = exponent.shape == self.matrix.shape and torch.promote_types(self.dtype, exponent.dtype) == exponent.dtype
        if inside and not isinstance(epsilon, Tensor):
            return exponent.sub_(self.matrix, alpha=1.0 / epsilon).exp_()
        return self._less_cost(exponent, epsilon).exp_()

    def _written(self, log_rows: Tensor, log_columns: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        """:meth:`gibbs` by a compiled pass, computed in float64."""
        from iotsolve.kernels import passes

        batch, (n, m) = self.matrix.shape[:-2], self.matrix.shape[-2:]
        logs = (
            passes.LOG2E * x.detach().double().expand(*batch, size).reshape(-1, size).numpy()
            for x, size in ((log_rows, n), (log_columns, m))
        )
        cost = self.matrix.detach() if len(batch) == 1 else self.matrix.detach().reshape(-1, n, m)
        plan = np.empty(cost.shape, np.float32 if dtype == torch.float32 else np.float64)  # in huge pages, unlike torch's
        passes.marginals(cost.numpy(), *logs, passes.LOG2E / epsilon, plan)
        return torch.from_numpy(plan).reshape(self.matrix.shape)

    def spent(self, plan: Tensor) -> Float[Tensor, "*batch"]:
        """``<C, P>``, in which a forbidden arc without mass costs nothing."""
        return torch.where(plan > 0, plan * self.matrix, 0.0).sum((-2, -1))

    def reduced_min(self, potential: Tensor, weights: Tensor, *, axis: int) -> Tensor:
        """``min (C - potential)`` over the bins of positive weight along the axis: the c-transform."""
        shift = torch.where((weights > 0) & potential.isfinite(), potential, -math.inf)
        if self.is_compiled and not self._is_traced(potential):
            from iotsolve.kernels import passes  # numba is imported where it runs

            return self._passed(shift, lambda *given: -passes.highest(*given, 1.0, axis=axis))
        found = []
        for rows, block in self.blocks():
            own = shift.unsqueeze(-2) if axis == -1 else shift[..., rows].unsqueeze(-1)
            reduced = (block.matrix - own).nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf)
            found.append(reduced.amin(axis))
        return torch.cat(found, -1) if axis == -1 else torch.stack(found).amin(0)

    def slack(self, f: Tensor, g: Tensor) -> tuple[Float[Tensor, "*batch n m"], Bool[Tensor, "*batch n m"]]:
        """``f + g - C`` with 0 at arcs that can carry nothing, and the mask of the arcs that can."""
        allowed = self.matrix.isfinite() & f.isfinite().unsqueeze(-1) & g.isfinite().unsqueeze(-2)
        total = f.unsqueeze(-1) + g.unsqueeze(-2) - torch.where(allowed, self.matrix, 0.0)
        return torch.where(allowed, total, 0.0), allowed


def _ends(x: Tensor) -> tuple[float, float]:
    """Least and largest entry, NaN if one is; on a CPU by threads that do not spin afterwards."""
    x = x[tuple(0 if stride == 0 else slice(None) for stride in x.stride()[:-2])]  # what a batch shares is looked at once
    if x.device.type != "cpu" or not (x.dim() == 2 or x.is_contiguous()):
        return tuple(map(float, x.aminmax()))
    if x.numel() < _WORTH_THREADS and x.dtype in (torch.float64, torch.float32):
        return float(x.numpy().min()), float(x.numpy().max())  # half as long as torch, where the second look is in the cache
    rows, found = x.reshape(-1, x.shape[-1]), []
    with torch_on(1):
        each_piece(len(rows), x.numel(), lambda k, first, last: found.extend(rows[first:last].aminmax()))
    ends = torch.stack(found)
    return float(ends.min()), float(ends.max())


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(-1)


def _root(squared: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0: the subgradient of smallest norm, where autograd would give NaN."""
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqeuclidean": _squared,
    "euclidean": lambda x, y: _root(_squared(x, y)),
    "cosine": _cosine,
    "sphere": lambda x, y: 1 - (x * y).sum(-1),
    "dot": lambda x, y: -(x * y).sum(-1),
}
_PRODUCTS = {"sphere": 1.0, "dot": 0.0}  # costs that are a number minus the scalar product, and the number
_BILINEAR = ("sphere", "dot", "cosine", "sqeuclidean")
_OF_DIFFERENCES = {"sqeuclidean": torch.square, "euclidean": torch.abs}  # the same on a line


@dataclass(frozen=True)
class Points:
    """The cost between two clouds of points, never held as a matrix: read in blocks of rows, in memory O((n + m) d).

    Args:
        x: points of the rows, shape ``(..., n, d)``, NumPy or torch, finite.
        y: points of the columns, shape ``(..., m, d)``.
        metric: ``"sqeuclidean"`` (squared distance), ``"euclidean"``, ``"cosine"`` (1 - cosine, in [0, 2]), ``"sphere"`` (1 -
            scalar product: the same for points of length 1, which are then not divided by their length) or ``"dot"`` (minus
            the scalar product), in the units this gives. On a line (``d = 1``) also a function ``h`` with cost
            ``h(x - y)``: torch in, torch out, elementwise, finite. Convex or not is found out where it matters.
        barred: forbidden arcs of two clouds without a batch: boolean of shape ``(n, m)``, or where every row has as many the
            columns it must not use, integer of shape ``(n, k)``.
        backend: who makes soft-minima of a cost that is a scalar product at heart: ``"auto"`` is Triton for float32 on a GPU,
            if it is installed and agrees with torch on a small case tried once, ``"eager"`` torch, ``"triton"`` that or an error.
        precise: False lets Triton take 11 bits of the points' numbers, for a third of the work: all there are in numbers that
            came in half precision. Torch takes them as they are.
        unit: all points have length 1, which spares Triton a factor for each.

    Raises:
        ValueError: by :class:`Problem`, on points that are not finite or do not fit each other, on an unknown metric, on a
            zero vector under ``"cosine"``, on ``unit`` points of another length, on a function in more than one dimension
            or that is not elementwise.

    Gradients flow to the points. At coincident points that of ``"euclidean"`` is 0, the smallest subgradient.

    Example:
        >>> import numpy as np
        >>> from iotsolve import Problem, solve
        >>> x, y = np.zeros((1, 2)), np.array([[3.0, 4.0]])
        >>> float(solve(Problem(Points(x, y, "euclidean"), epsilon=0.1)).value)
        5.0
        >>> late = lambda apart: apart.clamp(min=0.0)
        >>> float(solve(Problem(Points(x[:, :1], y[:, :1], late))).value)
        0.0
    """

    x: Any
    y: Any
    metric: str | Callable[[Tensor], Tensor] = "sqeuclidean"
    barred: Any = None
    backend: str = "auto"
    precise: bool = True
    unit: bool = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-2], self.x.shape[-2], self.y.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def is_compiled(self) -> bool:
        """Whether compiled passes read these points: on a CPU, a scalar product at heart."""
        return self.is_bilinear and self.device.type == "cpu" and self.dtype in (torch.float64, torch.float32)

    @property
    def is_bilinear(self) -> bool:
        """Whether passes of :mod:`iotsolve.kernels.bilinear` read this cost: one pair of clouds, a scalar product at heart."""
        return self.metric in _BILINEAR and math.prod(self.x.shape[:-2]) == 1

    @property
    def flattened(self) -> tuple[Tensor, Tensor]:
        """The points of all problems in a row."""
        return self.x.flatten(0, -2), self.y.flatten(0, -2)

    def bilinear_form(self, epsilon: Scalar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x, y, p, q`` of shapes ``(n, d), (m, d), (n,), (m,)`` with ``-C_ij / epsilon = x_i . y_j + p_i + q_j``.

        The last one is remembered: a solver asks for it at every step.
        """
        traced = torch.is_grad_enabled() and (self.x.requires_grad or self.y.requires_grad)
        untold = self.x.is_inference() or self.y.is_inference()  # nobody tells whether they were changed
        if isinstance(epsilon, Tensor) or traced or untold:
            return self._bilinear_form(epsilon)
        key = epsilon, self.dtype, self.x._version, self.y._version
        if self._known.get("form", (None,))[0] != key:
            self._known["form"] = key, tuple(z.detach() for z in self._bilinear_form(epsilon))
        return self._known["form"][1]

    def _bilinear_form(self, epsilon: Scalar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = self.flattened
        if self.metric == "sqeuclidean":
            both = torch.cat([x, y]).sub_(self._centre.flatten(0, -2))
            levels = both.square().sum(-1) / -epsilon
            n, traced = len(x), both.requires_grad or isinstance(epsilon, Tensor)
            x, y = both[:n], both[n:]
            return x * (2 / epsilon) if traced else x.mul_(2 / epsilon), y, levels[:n], levels[n:]
        if self.metric == "cosine":
            x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        level = -_PRODUCTS.get(self.metric, 1.0) / epsilon
        y = y.view_as(y)  # what is remembered of it is not remembered of the caller's own tensor
        p = x.new_full((len(x),), level) if isinstance(level, float) else level.expand(len(x))
        return x / epsilon, y, p, y.new_zeros(len(y))

    @property
    def _known(self) -> dict[str, Any]:
        """What has been found out of the points' numbers, by whoever has the same."""
        return self.__dict__.setdefault("_of_numbers", {})

    def viewed(self, other: Points) -> Points:
        """``other``, of the same numbers or, of a batch, some of them, with what is known of these points."""
        if self.is_bilinear and other.is_bilinear and self.metric == other.metric:
            pairs = ((self.x, other.x), (self.y, other.y))
            if all(_is_same(x, z) for x, z in pairs):
                other.__dict__["_of_numbers"] = self._known
            elif "centre" in self._known:
                other._known["centre"] = self._known["centre"]
        return other

    @property
    def _centre(self) -> Float[Tensor, "*batch 1 d"]:
        """A common centre, about which far from the origin no digits are lost to the square; any will do, and one is remembered.

        The median of some points, which a few far away, of no weight perhaps, do not move.
        """
        if "centre" not in self._known:
            some = [z.detach()[..., :: 1 + z.shape[-2] // _ASKED, :] for z in (self.x, self.y)]
            self._known["centre"] = torch.cat(some, -2).median(-2, keepdim=True).values
        return self._known["centre"].to(self.dtype).reshape(*self.x.shape[:-2], 1, -1)

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    def with_tensors(self, named: dict[str, Tensor]) -> Cost:
        if "cost" in named:
            return Dense(named["cost"])
        x = named.get("x", self.x)
        beyond = self.backend == "triton" and x.dtype == torch.float64 != self.dtype  # what is judged in float64 is torch's
        return replace(self, x=x, y=named.get("y", self.y), backend="auto" if beyond else self.backend)

    def rough(self) -> tuple[Points, float] | None:
        """The same points in the next cheaper precision for sweeps, and its unit roundoff; None where there is none."""
        if not self.is_bilinear:
            return None
        if self.dtype == torch.float64:
            return self.viewed(self.with_tensors({"x": self.x.float(), "y": self.y.float()})), 2.0**-24
        on_kernels = self.backend == "triton" or (self.backend == "auto" and self.device.type == "cuda")
        return (self.viewed(replace(self, precise=False)), 2.0**-11) if on_kernels and self.precise else None

    @property
    def transposed(self) -> Points:
        """The cost of the columns to the rows."""
        metric = self.metric
        turned = (lambda apart: metric(-apart)) if callable(metric) else metric
        return Points(self.y, self.x, turned, None if self.barred is None else self._mask().mT)

    def expand(self, batch: tuple[int, ...]) -> Points:
        x, y = (z.expand(*batch, *z.shape[-2:]) for z in (self.x, self.y))
        return replace(self, x=x, y=y)

    def all_finite(self) -> bool:
        return self.barred is None

    def _mask(self) -> Bool[Tensor, "n m"]:
        """The forbidden arcs as a matrix."""
        if self.barred.dtype == torch.bool:
            return self.barred
        mask = torch.zeros(self.shape[-2:], dtype=torch.bool, device=self.device)
        return mask.scatter_(1, self.barred, True)

    def dense(self) -> Float[Tensor, "*batch n m"]:
        """The cost as a matrix, shape ``(..., n, m)``: all of it, differentiable in the points."""
        allowed = self._unmasked()
        return allowed if self.barred is None else allowed.masked_fill(self._mask(), math.inf)

    def _unmasked(self) -> Float[Tensor, "*batch n m"]:
        x, y = self.x, self.y
        if self.metric == "cosine":
            return 1 - product(x / x.norm(dim=-1, keepdim=True), (y / y.norm(dim=-1, keepdim=True)).mT)
        if self.metric in _PRODUCTS:
            return _PRODUCTS[self.metric] - product(x, y.mT)
        if x.shape[-1] == 1:
            return (self.metric if callable(self.metric) else _OF_DIFFERENCES[self.metric])(x - y.mT)
        if self.metric == "euclidean":
            return METRICS["euclidean"](x.unsqueeze(-2), y.unsqueeze(-3))
        x, y = x - self._centre, y - self._centre
        squared = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - product(2 * x, y.mT)
        return squared - squared.detach().clamp(max=0.0)  # not below 0, with the derivatives of what is not clamped

    def blocks(self) -> Iterator[tuple[slice, Dense]]:
        """The cost in blocks of rows."""
        n, m = self.shape[-2:]
        others = self.x[..., 0, 0].numel() * m * (self.x.shape[-1] if self.metric == "euclidean" else 1)
        size = max(1, (_BLOCK if self.device.type == "cpu" else _BLOCK_ON_DEVICE) // others)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            barred = None if self.barred is None else self.barred[rows]
            own = replace(self, x=self.x[..., rows, :], barred=barred)
            if self.is_bilinear and self.metric == "sqeuclidean":
                own._known["centre"] = self._centre
            yield rows, Dense(own.dense())

    def entries(self, index: tuple[Tensor, ...]) -> Tensor:
        *batch, i, j = index
        x, y = self.x[(*batch, i)], self.y[(*batch, j)]
        found = self.metric((x - y).squeeze(-1)) if callable(self.metric) else METRICS[self.metric](x, y)
        if self.barred is None:
            return found
        hit = self.barred[i, j] if self.barred.dtype == torch.bool else (self.barred[i] == j[:, None]).any(-1)
        return found.masked_fill(hit, math.inf)

    @property
    def ceiling(self) -> float:
        """A bound of the entries of all problems."""
        if self.barred is not None:
            return math.inf
        reach = self.range().detach().amax()
        return float(reach / 2 + _PRODUCTS[self.metric] if self.metric in _PRODUCTS else reach)

    def ceiling_between(self, rows: Bool[Tensor, "*batch n"], columns: Bool[Tensor, "*batch m"]) -> float:
        """A bound of the entries between these bins."""
        return math.inf if self.barred is not None else self.between(rows, columns).ceiling

    def range(self) -> Float[Tensor, "*batch"]:
        """An upper bound of largest minus smallest entry, without looking at pairs unless the metric is a function.

        It has no derivative, and is remembered: a solver asks for it at every turn.
        """
        with torch.no_grad():
            if self.x.is_inference() or self.y.is_inference():  # nobody tells whether they were changed
                return self._range()
            key = self.x._version, self.y._version
            if self._known.get("range", (None,))[0] != key:
                self._known["range"] = key, self._range()
            return self._known["range"][1].reshape(self.shape[:-2])

    def _range(self) -> Float[Tensor, "*batch"]:
        if callable(self.metric):
            ends = [(block.matrix.amax((-2, -1)), block.matrix.amin((-2, -1))) for _, block in self.blocks()]
            highest, lowest = (torch.stack(end) for end in zip(*ends, strict=True))
            return highest.amax(0) - lowest.amin(0)
        if self.metric == "cosine":
            return torch.full(self.shape[:-2], 2.0, dtype=self.dtype, device=self.device)
        if self.metric in _PRODUCTS:
            return 2 * self.x.norm(dim=-1).amax(-1) * self.y.norm(dim=-1).amax(-1)
        across = self.across
        if self.metric == "sqeuclidean":  # in many dimensions points are far from the corners of their box
            return torch.minimum(across, sum((z - self._centre).norm(dim=-1).amax(-1) for z in (self.x, self.y)).square())
        return across.sqrt()

    @property
    def across(self) -> Float[Tensor, "*batch"]:
        """The squared diagonal of the box that holds all points."""
        both = torch.cat([self.x, self.y], -2)
        return (both.amax(-2) - both.amin(-2)).square().sum(-1)

    def between(self, rows: Bool[Tensor, "*batch n"], columns: Bool[Tensor, "*batch m"]) -> Cost:
        """The same points, those of all other bins moved to one of them: nothing is forbidden among points."""

        def gathered(x: Tensor, kept: Tensor) -> Tensor:
            first = kept.to(torch.int8).argmax(-1)[..., None, None].expand(*x.shape[:-2], 1, x.shape[-1])
            return torch.where(kept.unsqueeze(-1), x, x.gather(-2, first))

        if self.barred is not None:
            return Dense(self.dense()).between(rows, columns)
        return replace(self, x=gathered(self.x, rows), y=gathered(self.y, columns))

    def softmin(self, log_weights: Tensor, epsilon: Scalar, *, axis: int) -> Tensor:
        """As of :class:`Dense`, block by block."""
        if self.is_bilinear:
            flat = log_weights.expand(*self.shape[:-2], -1).flatten().to(self.dtype)
            s, t = self.soft_minima(*((None, flat) if axis == -1 else (flat, None)), epsilon)
            return (s if axis == -1 else t).reshape(*self.shape[:-2], -1).to(log_weights.dtype)
        side = self if axis == -1 else self.transposed
        return torch.cat([block.softmin(log_weights, epsilon, axis=-1) for _, block in side.blocks()], -1)

    def soft_minima(
        self, log_rows: Tensor | None, log_columns: Tensor | None, epsilon: Scalar
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`softmin` over columns at ``log_columns`` and over rows at ``log_rows``, in one pass over a bilinear cost."""
        x, y, p, q = self.bilinear_form(epsilon)
        if self.metric != "sqeuclidean":  # then p is one number, and q is 0
            even = self.unit or self.metric == "cosine"
            how = {"backend": self.backend, "precise": self.precise, "even": even}
            found = bilinear.log_sums(x, y, log_rows, log_columns, self.barred, **how)
            level = _PRODUCTS.get(self.metric, 1.0)
            if isinstance(epsilon, Tensor):
                return tuple(None if s is None else level - times(s, epsilon) for s in found)
            return tuple(None if s is None else torch.rsub(s, level, alpha=epsilon) for s in found)
        u, v = (None if log is None else log + own for log, own in ((log_rows, p), (log_columns, q)))
        s, t = bilinear.log_sums(x, y, u, v, self.barred, backend=self.backend, precise=self.precise)
        return None if s is None else -times(s + p, epsilon), None if t is None else -times(t + q, epsilon)

    def pulled(
        self, log_columns: Tensor, softmin: Tensor, carried: Tensor, epsilon: float, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """``sum_j P_ij dC_ij / dx_i`` and ``sum_i P_ij dC_ij / dy_j``, without derivatives, of a bilinear cost.

        Args:
            log_columns: ``log b + g / epsilon``.
            softmin: over columns at these, ``s``.
            carried: by the rows: ``P_ij = carried_i exp(log_columns_j + (s_i - C_ij) / epsilon)``, of any sign.
            epsilon: positive, in cost units.
            needed: which are asked for.

        Returns:
            Both, or None for what is not asked for; not of cosines, whose points have lengths beside.
        """
        x, y, p, q = self.bilinear_form(epsilon)
        squared, how = self.metric == "sqeuclidean", {"precise": self.precise, "even": self.unit}
        columns, sums = log_columns + q, torch.add(p, softmin, alpha=1.0 / epsilon).neg_()
        needed = *needed, False, needed[1] and squared
        given = x, y, None, columns, self.barred, (sums, None), (carried, None), needed
        gx, gy, _, total = bilinear.pull(*given, backend=self.backend, **how)
        if not squared:
            return None if gx is None else -gx, None if gy is None else gy * -epsilon
        gx = None if gx is None else torch.addcmul(gx * -2.0, carried.unsqueeze(-1), x, value=epsilon)
        gy = None if gy is None else torch.addcmul(gy * -epsilon, total.unsqueeze(-1), y, value=2.0)
        return gx, gy

    def softmin_at(self, logs: Tensor, potential: Tensor, epsilon: float, *, axis: int) -> Tensor:
        """:meth:`softmin` at ``logs + potential / epsilon``, without derivatives; on kernels without anything beside a pass."""
        kernels = backends.chosen(self.backend, self.x, bilinear.agrees) if self.is_bilinear else None
        if kernels is None:
            return self.softmin(torch.add(logs, potential, alpha=1.0 / epsilon), epsilon, axis=axis)
        x, y, p, q = self.bilinear_form(epsilon)
        how = {"turned": axis == -2, "precise": self.precise, "even": self.unit or self.metric == "cosine"}
        found = kernels.soft_minimum(x, y, logs.flatten(), potential.flatten(), p, q, self.barred, epsilon, **how)
        return found.reshape(*self.shape[:-2], -1)

    def gibbs(self, log_rows: Tensor, log_columns: Tensor, epsilon: Scalar) -> Float[Tensor, "*batch n m"]:
        return Dense(self.dense()).gibbs(log_rows, log_columns, epsilon)

    def plan_times(
        self, log_rows: Tensor, log_columns: Tensor, values: Tensor, epsilon: Scalar, *, axis: int
    ) -> Float[Tensor, "k c"]:
        """:meth:`gibbs` times ``values (m, c)``, or with ``axis=-2`` its transpose times ``values (n, c)``: of a bilinear cost,
        block by block, and differentiable any number of times.
        """
        x, y, p, q = self.bilinear_form(epsilon)
        rows, columns = log_rows.flatten() + p, log_columns.flatten() + q
        return products.plan_times(x, y, rows, columns, values, self.barred, turned=axis == -2, backend=self.backend)

    def plan_mass(self, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Scalar) -> Tensor:
        """``sum_ij a_i b_j exp((f_i + g_j - C_ij) / epsilon)``, a number, of a bilinear cost: as :meth:`plan_times`.

        Of weights no logarithm is taken, whose second derivative at an empty bin has no digits.
        """
        density = self.plan_times(f / epsilon, g / epsilon, b.reshape(-1, 1), epsilon, axis=-1).squeeze(-1)
        return (a.flatten() * density).sum()

    def transport(self, log_rows: Tensor, log_columns: Tensor, epsilon: Scalar) -> Tensor:
        """``<C, P>`` of :meth:`gibbs`, a number, of a bilinear cost: as :meth:`plan_times`."""
        x, y, p, q = self.bilinear_form(epsilon)
        both = torch.cat([y, q.unsqueeze(-1), torch.ones_like(q).unsqueeze(-1)], -1)
        carried = self.plan_times(log_rows, log_columns, both, epsilon, axis=-1)
        return -epsilon * ((x * carried[:, :-2]).sum() + carried[:, -2].sum() + (p * carried[:, -1]).sum())

    def spent(self, plan: Tensor) -> Float[Tensor, "*batch"]:
        return sum(block.spent(plan[..., rows, :]) for rows, block in self.blocks())

    def reduced_min(self, potential: Tensor, weights: Tensor, *, axis: int) -> Tensor:
        side = self if axis == -1 else self.transposed
        return torch.cat([block.reduced_min(potential, weights, axis=-1) for _, block in side.blocks()], -1)

    def slack(self, f: Tensor, g: Tensor) -> tuple[Float[Tensor, "*batch n m"], Bool[Tensor, "*batch n m"]]:
        return Dense(self.dense()).slack(f, g)


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether these are the same numbers: changed in place, both are."""
    return x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.numel() == y.numel()


Cost = Dense | Points

_WHOLE = 2**22  # entries of a matrix that is not cut
_BLOCK = 2**18  # entries of a block: 2 MB in float64 stay in the cache; larger ones are three times slower
_WHOLE_ON_DEVICE, _BLOCK_ON_DEVICE = 2**24, 2**26  # where a block is a launch


def calm(cost: Cost | Tensor) -> AbstractContextManager[None]:
    """One thread of torch's for problems too small to gain from more, and where passes over blocks have threads of their own.

    torch's threads spin between operations: beside any other load, two of them make a 200 x 200 problem a hundred times
    slower than one, and on an idle machine they gain nothing at that size.
    """
    small = cost.device.type == "cpu" and math.prod(cost.shape) < _WORTH_THREADS
    points = getattr(cost, "local", cost)
    apart = isinstance(points, Points) and points.is_bilinear and bilinear.is_worth_compiling(*points.flattened)
    return torch_on(1) if (small or apart) and torch.get_num_threads() > 1 else nullcontext()


def quiet(cost: Cost) -> AbstractContextManager[None]:
    """:func:`calm`, and at any size where compiled passes read the cost: torch has vectors alone, and would spin beside them."""
    compiled = isinstance(cost, Dense) and cost.is_compiled and torch.get_num_threads() > 1
    return torch_on(1) if compiled else calm(cost)


def busy(cost: Cost) -> AbstractContextManager[None]:
    """All threads again, for torch's own work on a large cost."""
    large = cost.device.type == "cpu" and math.prod(cost.shape) >= _WORTH_THREADS
    return torch_on(allowed()) if large and torch.get_num_threads() < allowed() else nullcontext()


_ASKED = 256  # points of either cloud for their centre
_WORTH_THREADS = 2**20  # entries
