"""Passes over the exponentials of a bilinear form ``x_i . y_j``, block by block: their logarithmic sums over rows and over
columns, with derivatives, and the sums and products of plans.

The matrix ``x y'`` is never held: a pass computes it in blocks of rows that stay in the cache, the backward pass computes it
again. Costs that are a scalar product up to terms of ``i`` and of ``j`` alone come here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iotsolve.kernels import backends
from iotsolve.kernels.once import Backward, final, single
from iotsolve.kernels.precision import in_full
from iotsolve.kernels.threads import PIECES, each_piece, torch_on

__all__ = [
    *("log_sums", "plan_product", "plan_spread", "plan_sums", "pull"),
    *("ONCE", "accumulators", "agrees", "each_block", "exponential", "in_slabs", "is_worth_compiling", "shifted"),
]


def log_sums(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    u: Float[Tensor, " n"] | None,
    v: Float[Tensor, " m"] | None,
    barred: Tensor | None = None,
    *,
    backend: str = "auto",
    precise: bool = True,
    even: bool = False,
) -> tuple[Float[Tensor, " n"] | None, Float[Tensor, " m"] | None]:
    """``log sum_j exp(v_j + x_i . y_j)`` for every row, and ``log sum_i exp(u_i + x_i . y_j)`` for every column.

    Args:
        x: shape ``(n, d)``.
        y: shape ``(m, d)``.
        u: shape ``(n,)``, ``-inf`` for rows that do not count; None if the columns' sums are not wanted.
        v: shape ``(m,)``; None if the rows' sums are not wanted.
        barred: entries left out: boolean of shape ``(n, m)``, or the columns each row leaves out, integer of shape ``(n, k)``.
        backend: see :func:`iotsolve.kernels.backends.chosen`.
        precise: False lets Triton's kernels take 11 bits of the points' numbers, all there are in half precision.
        even: the points are about as large as each other, which spares the kernels a factor for each.

    Returns:
        The rows' sums, shape ``(n,)``, and the columns', shape ``(m,)``; ``-inf`` where everything is left out. Differentiable
        once in ``x, y, u, v``; what autograd keeps for it is these and the sums.
    """
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, y, u, v)):
        return _LogSums.apply(x, y, u, v, barred, {"backend": backend, "precise": precise, "even": even})
    kernels = backends.chosen(backend, x, agrees)
    return _log_sums(x, y, u, v, barred) if kernels is None else kernels.log_sums(x, y, u, v, barred, precise=precise, even=even)


class _LogSums(Backward):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        y: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        barred: Tensor | None,
        how: dict[str, Any],
    ):
        sums, ctx.how = log_sums(x, y, u, v, barred, **how), how
        ctx.save_for_backward(x, y, u, v, barred, *sums)
        return sums

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        single(*upstream)
        x, y, u, v, barred, *sums = ctx.saved_tensors
        with torch.no_grad():
            found = pull(x, y, u, v, barred, sums, upstream, ctx.needs_input_grad[:4], **ctx.how)
        return *final(ONCE, found, x, y, u, v, *upstream), None, None


def pull(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    backend: str = "auto",
    **how: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives of :func:`log_sums` in ``x, y, u, v``, those that are ``needed``, at its results and upstream derivatives."""
    kernels = backends.chosen(backend, x, agrees)
    given = x, y, u, v, barred, sums, upstream, needed
    return _pull(*given) if kernels is None else kernels.pull(*given, **how)


ONCE = (
    "a soft-minimum of points on the sphere was differentiated twice: its derivative is made block by block, and kept nowhere. "
    "For second derivatives use a cost as a matrix, or the differences of first ones. Was create_graph=True passed needlessly?"
)


def agrees(kernels: ModuleType, device: torch.device) -> bool:
    """Whether kernels give what the code below gives, on a small case without a friendly size."""
    draw = torch.Generator().manual_seed(0)
    x, y, u, v, *upstream = (
        torch.randn(shape, generator=draw, device="cpu").to(device) for shape in ((70, 33), (150, 33), 70, 150, 70, 150)
    )
    given = x / 4, y / 4, u, v, torch.arange(70, device=device)[:, None]
    sums = _log_sums(*given)
    expected = *sums, *_pull(*given, sums, tuple(upstream), (True,) * 4)
    found = *kernels.log_sums(*given), *kernels.pull(*given, sums, tuple(upstream), (True,) * 4)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def _log_sums(
    x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None, barred: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if (slabs := in_slabs(y)) is not None:
        found = [_log_sums(x, y[part], u, _cut(v, part), shifted(barred, part)) for part in slabs]
        rows, columns = zip(*found, strict=True)
        return None if v is None else torch.stack(rows).logsumexp(0), None if u is None else torch.cat(columns)
    rows = None if v is None else x.new_empty(len(x))
    # a sum over very many rows would lose digits in float32, always the same way: blocks are summed in it, and added in float64
    worth = is_worth_compiling(x, y)
    totals = None if u is None else accumulators(worth, y)
    if _is_tame(x, y, u, v):
        of_rows, of_columns = (None if w is None else w.exp() for w in (u, v))

        def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
            _weigh(worth, block, _cut(of_rows, part), of_columns, _cut(rows, part), _cut(totals, k))

        each_block(worth, x, y, barred, visit)
        return None if v is None else rows.log_(), None if u is None else totals.sum(0).log_().to(x.dtype)
    ones = x.new_ones(max(len(x), len(y)))
    tops = None if u is None else x.new_full(totals.shape, -math.inf)

    def visit_far(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        if u is not None:
            exponent = torch.add(block, u[part, None], out=spare) if spare is not None else block.add_(u[part, None])
            higher = torch.maximum(tops[k], exponent.amax(0))
            totals[k].mul_((tops[k] - _finite(higher)).exp_())
            _weigh(worth, exponent.sub_(_finite(higher)), ones[: len(block)], None, None, totals[k])
            tops[k] = higher
        if v is not None:
            exponent = block.add_(v)
            highest = _finite(exponent.amax(1))
            _weigh(worth, exponent.sub_(highest[:, None]), None, ones[: len(y)], rows[part], None)
            rows[part] = rows[part].log().add_(highest)

    each_block(worth, x, y, barred, visit_far, spare=u is not None and v is not None)
    if u is None:
        return rows, None
    top = _finite(tops.amax(0))
    return rows, totals.mul_((tops - top).exp_()).sum(0).log_().to(x.dtype) + top


def _pull(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives of :func:`log_sums` in ``x, y, u, v``, at its results and for upstream derivatives of any sign."""
    x_wanted, y_wanted, u_wanted, v_wanted = needed
    rows, columns = v is not None and upstream[0] is not None, u is not None and upstream[1] is not None
    gx = torch.zeros_like(x) if x_wanted else None
    gy = torch.zeros_like(y) if y_wanted else None
    gu = torch.zeros_like(u) if u_wanted and columns else None
    gv = torch.zeros_like(v) if v_wanted and rows else None
    if not (rows or columns):
        return gx, gy, gu, gv
    if (slabs := in_slabs(y)) is not None:
        for part in slabs:
            own = (sums[0], _cut(sums[1], part)), (upstream[0], _cut(upstream[1], part))
            found = _pull(x, y[part], u, _cut(v, part), shifted(barred, part), *own, needed)
            for whole, piece in zip((gx, _cut(gy, part), gu, _cut(gv, part)), found, strict=True):
                if whole is not None:
                    whole.add_(piece)
        return gx, gy, gu, gv
    worth = is_worth_compiling(x, y, 1 if gy is None else y.shape[1])
    of_y = None if gy is None else accumulators(worth, y, y.shape[1], dtype=x.dtype)
    of_v = None if gv is None else accumulators(worth, y, dtype=x.dtype)
    into = gx, of_y, gu, of_v
    gx, of_y, gu, of_v = (_tame_pull if _is_tame(x, y, u, v) else _far_pull)(worth, x, y, u, v, barred, sums, upstream, into)
    return gx, None if gy is None else of_y.sum(0), gu, None if gv is None else of_v.sum(0)


def _far_pull(
    worth: bool,
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    gx, gy, gu, gv = into
    rows, columns = v is not None and upstream[0] is not None, u is not None and upstream[1] is not None

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        weights = None
        if columns:
            source = torch.add(block, u[part, None], out=spare) if spare is not None else block.add_(u[part, None])
            weights = exponential(worth, source.sub_(_finite(sums[1]))).mul_(upstream[1])
            if gu is not None:
                gu[part] = weights.sum(1)
        if rows:
            own = block.add_(v).sub_(_finite(sums[0][part])[:, None])
            own = exponential(worth, own).mul_(upstream[0][part, None])
            if gv is not None:
                gv[k].add_(own.sum(0))
            weights = own if weights is None else weights.add_(own)
        if gx is not None:
            torch.mm(weights, y, out=gx[part])
        if gy is not None:
            gy[k].addmm_(weights.mT, x[part])

    each_block(worth, x, y, barred, visit, spare=rows and columns)
    return into


# -- where exponentials stay in range ------------------------------------------------------------------------------------
# One exponential then serves rows and columns, without a look for the largest exponent, and what remains are matrix products.


def _is_tame(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None) -> bool:
    """Whether ``exp(x_i . y_j)``, ``exp(u_i)`` and ``exp(v_j)`` and their products stay in range; asked on a CPU only."""
    if x.device.type != "cpu":
        return False
    reach = _TAME[x.dtype]
    sizes = [torch.where(w == -math.inf, 0.0, w).abs().amax() for w in (u, v) if w is not None]
    products = torch.linalg.vector_norm(x, dim=1).amax() * torch.linalg.vector_norm(y, dim=1).amax()
    return all(float(size) <= reach for size in (products, *sizes))


_TAME = {torch.float32: 38.0, torch.float64: 300.0}


def _tame_pull(
    worth: bool,
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    barred: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The weights are ``exp(x_i . y_j)`` times a matrix of rank one for each of the two sums."""
    gx, gy, gu, gv = into
    left, right = [], []
    if v is not None and upstream[0] is not None:
        left.append(upstream[0] * (-_finite(sums[0])).exp())
        right.append(v.exp())
    if u is not None and upstream[1] is not None:
        left.append(u.exp())
        right.append(upstream[1] * (-_finite(sums[1])).exp())
    a, b = torch.stack(left, 1), torch.stack(right, 1)
    single = a.shape[1] == 1
    ax, by = (a * x, b * y) if single else (None, None)

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        exponential(worth, block)
        if gu is not None:
            gu[part] = a[part, -1] * (block @ b[:, -1])
        if gv is not None:
            gv[k].addmv_(block.mT, a[part, 0])
        if single:
            if gx is not None:
                torch.mm(block, by, out=gx[part])
            if gy is not None:
                gy[k].addmm_(block.mT, ax[part])
            return
        block.mul_(torch.mm(a[part], b.mT, out=spare))
        if gx is not None:
            torch.mm(block, y, out=gx[part])
        if gy is not None:
            gy[k].addmm_(block.mT, x[part])

    each_block(worth, x, y, barred, visit, spare=not single)
    if single:
        gx = None if gx is None else gx.mul_(a)
        gy = None if gy is None else gy.mul_(b)
    return gx, gy, gu, None if gv is None else gv.mul_(b[:, 0])


# -- plans ---------------------------------------------------------------------------------------------------------------


def plan_sums(x: Tensor, y: Tensor, u: Tensor, v: Tensor, barred: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and column sums of ``P_ij = exp(u_i + v_j + x_i . y_j)``."""
    if (slabs := in_slabs(y)) is not None:
        found = [plan_sums(x, y[part], u, v[part], shifted(barred, part)) for part in slabs]
        rows, columns = zip(*found, strict=True)
        return torch.stack(rows).sum(0), torch.cat(columns)
    worth = is_worth_compiling(x, y)
    rows, totals, ones = x.new_empty(len(x)), accumulators(worth, y), x.new_ones(max(len(x), len(y)))

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        _weigh(worth, block, ones[: len(block)], ones[: len(y)], rows[part], totals[k])

    each_block(worth, x, y, barred, visit, added=(u, v))
    return rows, totals.sum(0).to(x.dtype)


def plan_product(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, barred: Tensor | None, w: Tensor, z: Tensor, *, as_given: bool
) -> tuple[Tensor, Tensor]:
    """``P z``, with ``P' (w P z)``, or with ``P' w`` if that is ``as_given``: in one pass where a block has whole rows."""
    if (slabs := in_slabs(y)) is not None:

        def each(w: Tensor) -> tuple[Tensor, Tensor]:
            found = [
                plan_product(x, y[part], u, v[part], shifted(barred, part), w, z[part], as_given=True)
                for part in slabs
            ]
            rows, columns = zip(*found, strict=True)
            return torch.stack(rows).sum(0), torch.cat(columns)

        rows, columns = each(w)
        return rows, columns if as_given else each(w * rows)[1]
    worth = is_worth_compiling(x, y)
    rows, totals = x.new_empty(len(x)), accumulators(worth, y, dtype=x.dtype)

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        plan = exponential(worth, block)
        torch.mv(plan, z, out=rows[part])
        totals[k].addmv_(plan.mT, w[part] if as_given else w[part] * rows[part])

    each_block(worth, x, y, barred, visit, added=(u, v))
    return rows, totals.sum(0)


def plan_spread(x: Tensor, y: Tensor, u: Tensor, v: Tensor, barred: Tensor | None, w: Tensor, rows: Tensor) -> Tensor:
    """``sum_i P_ij w_i (rows_i - P_ij)`` for every column."""
    if (slabs := in_slabs(y)) is not None:
        found = [plan_spread(x, y[part], u, v[part], shifted(barred, part), w, rows) for part in slabs]
        return torch.cat(found)
    worth = is_worth_compiling(x, y)
    totals = accumulators(worth, y, dtype=x.dtype)

    def visit(k: int, part: slice, block: Tensor, spare: Tensor | None) -> None:
        plan = exponential(worth, block)
        totals[k].addmv_((rows[part, None] - plan).mul_(plan).mT, w[part])

    each_block(worth, x, y, barred, visit, added=(u, v))
    return totals.sum(0)


# -- blocks --------------------------------------------------------------------------------------------------------------

Visit = Callable[[int, slice, Tensor, Tensor | None], None]


def is_worth_compiling(x: Tensor, y: Tensor, width: int = 1) -> bool:
    """Whether threads of our own make blocks, with compiled exponentials, and each adds up ``width`` numbers a column: torch's
    take twice as long, and ten times where they are denormal, as at a small epsilon most are.
    """
    ours = x.device.type == "cpu" and x.dtype in _TAME and len(x) * len(y) >= _WORTH_COMPILING
    return ours and PIECES * len(y) * width <= _SHARED


def exponential(worth: bool, block: Tensor) -> Tensor:
    """``exp(block)``, in place."""
    if not worth:
        return block.exp_()
    from iotsolve.kernels.blocks import exponentiate  # numba is imported where it runs

    exponentiate(block.numpy())
    return block


def _weigh(
    worth: bool,
    block: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    sums: Tensor | None,
    totals: Tensor | None,
) -> None:
    """``sums_i = sum_j exp(b_ij) columns_j`` and ``totals_j += sum_i exp(b_ij) rows_i``, of which one may not be wanted; uses the
    block up.
    """
    if not worth:
        block.exp_()
        if sums is not None:
            torch.mv(block, columns, out=sums)
        if totals is not None:
            totals.add_(torch.mv(block.mT, rows))
        return
    from iotsolve.kernels.blocks import weigh

    n, m = block.shape
    rows, sums = (block.new_zeros(n) if z is None else z for z in (rows, sums))
    columns = block.new_zeros(m) if columns is None else columns
    totals = block.new_zeros(m, dtype=torch.float64) if totals is None else totals
    weigh(*(z.numpy() for z in (block, rows, columns, sums, totals)))


def accumulators(worth: bool, y: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Zeros for what every thread adds up of the columns, to be summed over the first dimension."""
    return y.new_zeros(PIECES if worth else 1, len(y), *shape, dtype=dtype)


def each_block(
    worth: bool,
    x: Tensor,
    y: Tensor,
    barred: Tensor | None,
    visit: Visit,
    *,
    spare: bool = False,
    added: tuple[Tensor, Tensor] | None = None,
    least: int = 1,
) -> None:
    """``visit(piece, rows, block, spare)`` for all blocks of rows of ``x y'``, plus ``u_i + v_j`` if these are ``added``, with
    ``-inf`` where barred, and a second buffer of its size if asked for. If ``worth``, a block is made by who visits it, of at
    ``least`` so many rows.
    """
    if added is not None:  # by two more features, which cost less than two more looks at a block
        u, v = (z.unsqueeze(-1) for z in added)
        x, y = torch.cat([x, torch.ones_like(u), u], -1), torch.cat([y, v, torch.ones_like(v)], -1)
    if not worth:
        most = _BLOCK if x.device.type == "cpu" else _BLOCK_ON_DEVICE
        with in_full():
            for part, block, second in _blocks(x, y, barred, spare, most, least):
                visit(0, part, block, second)
        return

    inferring = torch.is_inference_mode_enabled()

    def work(k: int, first: int, last: int) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inferring), torch.no_grad():
            for part, block, second in _blocks(x[first:last], y, _cut(barred, slice(first, last)), spare, _BLOCK // 4, least):
                visit(k, slice(first + part.start, first + part.stop), block, second)

    with torch_on(1), in_full():
        each_piece(len(x), 4 * len(x) * len(y), work)  # four times the work of the passes it counts by


def _blocks(
    x: Tensor, y: Tensor, barred: Tensor | None, spare: bool, most: int, least: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    n, m = len(x), len(y)
    size = min(n, max(least, most // max(m, 1)))
    buffer, second = x.new_empty(size, m), x.new_empty(size, m) if spare else None
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        rows = part.stop - part.start
        block = torch.mm(x[part], y.mT, out=buffer[:rows])
        if barred is not None:
            if barred.dtype == torch.bool:
                block.masked_fill_(barred[part], -math.inf)
            elif barred.dtype == torch.int32:  # of a slab: some of the columns are not in it
                row, k = ((barred[part] >= 0) & (barred[part] < m)).nonzero(as_tuple=True)
                block[row, barred[part][row, k].long()] = -math.inf
            else:
                block.scatter_(1, barred[part], -math.inf)
        yield part, block, None if second is None else second[:rows]


def in_slabs(y: Tensor) -> list[slice] | None:
    """The columns in slabs, so that a block of a CPU's cache has rows enough for a matrix product; None if one will do."""
    m = len(y)
    if y.device.type != "cpu" or m <= _WIDTH:
        return None
    count = -(-m // _WIDTH)
    width = -(-m // count)
    return [slice(start, min(start + width, m)) for start in range(0, m, width)]


def _cut(x: Tensor | None, part: slice | int) -> Tensor | None:
    return None if x is None else x[part]


def shifted(barred: Tensor | None, part: slice) -> Tensor | None:
    """Of one slab; columns in other slabs stay, out of range."""
    if barred is None or barred.dtype == torch.bool:
        return None if barred is None else barred[:, part]
    return (barred - part.start).to(torch.int32)


_WIDTH = 2**13  # columns
_BLOCK = 2**21  # entries: with its spare it stays in a CPU's last cache
_BLOCK_ON_DEVICE = 2**26  # where a block is a launch
_WORTH_COMPILING = 2**18  # entries
_SHARED = 2**23  # numbers of all threads together


def _finite(x: Tensor) -> Tensor:
    """``x`` with 0 for ``-inf``: what to subtract from exponents that are ``-inf`` all."""
    return torch.where(x == -math.inf, 0.0, x)
