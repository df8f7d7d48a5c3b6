"""Products of plans with matrices, block by block, and their derivatives of any order.

The derivative of such a product is a product of a plan whose entries have one more factor, a scalar product of a row's numbers
with a column's: one function is closed under differentiation, and no order of it needs the plan as a matrix.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from iotsolve.kernels import backends, bilinear
from iotsolve.kernels.once import Backward, single

__all__ = ["plan_times"]

Pairs = tuple[tuple[Tensor, Tensor], ...]


def plan_times(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    u: Float[Tensor, " n"],
    v: Float[Tensor, " m"],
    values: Tensor,
    barred: Tensor | None = None,
    *,
    turned: bool = False,
    factors: Pairs = (),
    backend: str = "auto",
) -> Tensor:
    """``P values``, or ``P' values`` if ``turned``, of ``P_ij = exp(u_i + v_j + x_i . y_j) prod_k (l^k_i . r^k_j)``.

    Args:
        x: shape ``(n, d)``.
        y: shape ``(m, d)``.
        u: shape ``(n,)``, ``-inf`` for rows that carry nothing.
        v: shape ``(m,)``, the same for columns.
        values: shape ``(m, k)``, or ``(n, k)`` if ``turned``.
        barred: entries left out, as in :func:`iotsolve.kernels.bilinear.log_sums`.
        factors: pairs ``l^k, r^k`` of shapes ``(n, c)`` and ``(m, c)``.
        backend: see :func:`iotsolve.kernels.backends.chosen`; what has factors is torch's.

    Returns:
        Shape ``(n, k)``, or ``(m, k)``; differentiable any number of times in everything but ``barred``.
    """
    return _Times.apply(barred, turned, backend, x, y, u, v, values, *(z for pair in factors for z in pair))


class _Times(Backward):
    @staticmethod
    def forward(
        ctx,
        barred: Tensor | None,
        turned: bool,
        backend: str,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        v: Tensor,
        values: Tensor,
        *flat: Tensor,
    ) -> Tensor:
        kernels = None if flat else backends.chosen(backend, x, bilinear.agrees)
        if kernels is None:
            product = _times(x, y, u, v, values, barred, turned, _paired(flat))
        else:
            product = _as_derivative(kernels, x, y, u, v, values, barred, turned)
        ctx.barred, ctx.turned, ctx.backend = barred, turned, backend
        ctx.save_for_backward(product, x, y, u, v, values, *flat)
        return product

    @staticmethod
    def backward(ctx, upstream: Tensor):
        single(upstream)
        product, x, y, u, v, values, *flat = ctx.saved_tensors
        turned, factors = ctx.turned, _paired(flat)
        _, _, _, of_x, of_y, of_u, of_v, of_values, *of_flat = ctx.needs_input_grad
        more = ((values, upstream) if turned else (upstream, values),)

        def times(z: Tensor, to_columns: bool, factors: Pairs) -> Tensor:
            return plan_times(x, y, u, v, z, ctx.barred, turned=to_columns, factors=factors, backend=ctx.backend)

        back = None
        if of_values or (of_u if turned else of_v):
            back = times(upstream, not turned, factors)
        row, column = ((values, back), (upstream, product)) if turned else ((upstream, product), (values, back))
        found = [
            times(y, False, factors + more) if of_x else None,
            times(x, True, factors + more) if of_y else None,
            (row[0] * row[1]).sum(-1) if of_u else None,
            (column[0] * column[1]).sum(-1) if of_v else None,
            back if of_values else None,
        ]
        for k, (left, right) in enumerate(factors):
            others = (*factors[:k], *factors[k + 1 :], *more)
            found.append(times(right, False, others) if of_flat[2 * k] else None)
            found.append(times(left, True, others) if of_flat[2 * k + 1] else None)
        return None, None, None, *found


def _paired(flat: tuple[Tensor, ...] | list[Tensor]) -> Pairs:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _as_derivative(
    kernels: ModuleType,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    values: Tensor,
    barred: Tensor | None,
    turned: bool,
) -> Tensor:
    """The product as a derivative of logarithmic sums: in features that the one side has and that are 0 on the other.

    The values are brought to the size of the points first, whose digits they would take otherwise.
    """
    own, other = (y, x) if turned else (x, y)
    largest, size = values.abs().amax(), other.abs().amax().clamp(min=2.0**-60)
    wide = torch.cat([other, values / torch.where(largest > 0, largest, 1.0) * size], -1)
    narrow = torch.cat([own, own.new_zeros(len(own), values.shape[1])], -1)
    if turned:
        sums = kernels.log_sums(x, y, u, None, barred)[1]
        needed, given = (False, True, False, False), (wide, narrow, u, None, barred, (None, sums), (None, (v + sums).exp()))
    else:
        sums = kernels.log_sums(x, y, None, v, barred)[0]
        needed, given = (True, False, False, False), (narrow, wide, None, v, barred, (sums, None), ((u + sums).exp(), None))
    return kernels.pull(*given, needed)[int(turned)][:, own.shape[1] :] / size * largest


def _times(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, values: Tensor, barred: Tensor | None, turned: bool, factors: Pairs
) -> Tensor:
    if (slabs := bilinear.in_slabs(y)) is not None:
        found = [
            _times(
                *(x, y[part], u, v[part], values if turned else values[part], bilinear.shifted(barred, part), turned),
                tuple((left, right[part]) for left, right in factors),
            )
            for part in slabs
        ]
        return torch.cat(found) if turned else torch.stack(found).sum(0)
    width = values.shape[1]
    worth = bilinear.is_worth_compiling(x, y, width if turned else 1)
    # as sums over very many rows everywhere: each block's in its own precision, added in float64
    totals = bilinear.accumulators(worth, y, width) if turned else None
    rows = None if turned else x.new_empty(len(x), width)

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        plan = bilinear.exponential(worth, block)
        for left, right in factors:
            plan.mul_(torch.mm(left[part], right.mT, out=spare))
        if turned:
            totals[k].add_(plan.mT @ values[part])
        else:
            torch.mm(plan, values, out=rows[part])

    bilinear.each_block(worth, x, y, barred, visit, spare=bool(factors), added=(u, v))
    return totals.sum(0).to(x.dtype) if turned else rows
