"""Points on the unit sphere, and the cross-entropies of pairs among them: what InfoNCE is where nothing has to be solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iotsolve.kernels import backends, bilinear
from iotsolve.kernels.once import Backward, final, single

__all__ = ["cross_entropies", "normalised", "remembered"]


def normalised(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """``z`` on the unit sphere, in float32 at least; a zero vector stays zero, with derivative 0."""
    return _Direction.apply(_wide(z))


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


class _Direction(Backward):
    """The derivative in closed form, which asks a device a third as often as autograd would."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        x, length = _direction(z)
        ctx.save_for_backward(z, x, length)
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        single(g)
        z, x, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated itself
            x, length = _direction(z)
        return torch.addcmul(g, x, (x * g).sum(1, keepdim=True), value=-1.0) / length


def _direction(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` over its length, and that: infinite for a zero vector."""
    length = torch.threshold(torch.linalg.vector_norm(z, dim=1, keepdim=True), 0.0, math.inf)
    return z / length, length


def cross_entropies(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    epsilon: float | Tensor,
    *,
    both: bool,
    stacked: bool = False,
    decoupled: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "sides k"]:
    """``log sum_j exp(cos(x_i, y_j) / epsilon) - cos(x_i, y_i) / epsilon`` for every row and, if ``both``, with the roles
    exchanged for every column: of each pair the cross-entropy of its match, in nats (InfoNCE, van den Oord et al., 2018).

    Args:
        x: shape ``(n, d)``, of any length.
        y: the same shape.
        epsilon: positive; a tensor of one entry may require grad.
        both: also of the columns.
        stacked: of all points of ``x`` and ``y`` in a row, each against all others (NT-Xent, Chen et al., 2020).
        decoupled: the match is not in the sum (Yeh et al., 2022); ``-inf`` where nothing else is.
        backend: see :func:`iotsolve.kernels.backends.chosen`. Of half-precision inputs Triton's kernels multiply 11 bits.

    Returns:
        Shape ``(1, k)`` or ``(2, k)``, ``k`` being ``n``, or ``2 n`` if ``stacked``; in float32 at least. Differentiable once; no
        matrix is kept for it.
    """
    common = torch.promote_types(x.dtype, y.dtype)
    common = common if common.is_floating_point else torch.float32
    if not stacked:
        x, y = x.to(common), y.to(common)
    if not (stacked or decoupled):
        kernels = backends.chosen(backend, x, agrees)
        if kernels is not None:
            return _CrossEntropies.apply(x, y, epsilon, both, kernels)
        backend = "eager"
    how = {"backend": backend, "precise": common == torch.float32, "even": True}
    if stacked:
        found = _Among.apply(_wide(torch.cat([x, y])), epsilon, decoupled, how)[None]
        return found.expand(2, -1) if both else found  # the roles are the same
    x, y = normalised(x), normalised(y)
    epsilon = epsilon.to(x).reshape(()) if isinstance(epsilon, Tensor) else epsilon
    even = x.new_zeros(len(x))
    left_out = _left_out(len(x), False, True, like=x) if decoupled else None
    rows, columns = bilinear.log_sums(x / epsilon, y, even if both else None, even, left_out, **how)
    return (torch.stack([rows, columns]) if both else rows[None]) - (x * y).sum(1) / epsilon


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function of sizes, and of the dtype and device of ``like``, whose tensors nobody changes: those of the last few are kept.

    A CUDA graph has its own, as has each stream, which nobody waits for another one in.
    """

    @lru_cache(maxsize=16)
    def known(stream: int, *sizes: Any, dtype: torch.dtype, device: torch.device) -> Any:
        with torch.inference_mode(False):
            return make(*sizes, dtype=dtype, device=device)

    @wraps(make)
    def found(*sizes: Any, like: Tensor) -> Any:
        place, stream = {"dtype": like.dtype, "device": like.device}, 0
        if type(like) is not Tensor or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
            return make(*sizes, **place)
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device).cuda_stream
        return known(stream, *sizes, **place)

    return found


@remembered
def _left_out(n: int, stacked: bool, decoupled: bool, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The columns each row does not see: of all points its own, and decoupled its match's."""
    own = torch.arange(n, device=device)[:, None]
    if not stacked:
        return own
    return torch.cat([own, own.roll(n // 2, 0)], 1) if decoupled else own


class _Among(Backward):
    """Cross-entropies of all points in a row, the second half of which are the matches of the first.

    What point i gives to the sum of j is what j gives to that of i, so that one pass makes the derivative in both roles.
    """

    @staticmethod
    def forward(ctx, z: Tensor, epsilon: float | Tensor, decoupled: bool, how: dict[str, Any]) -> Tensor:
        live = isinstance(epsilon, Tensor)
        ctx.rate = rate = epsilon.detach().to(z).reshape(()) if live else epsilon
        x, length = _direction(z)
        scaled, even = x / rate, x.new_zeros(len(x))
        ctx.barred, ctx.how = _left_out(len(x), True, decoupled, like=x), how
        sums = bilinear.log_sums(scaled, x, None, even, ctx.barred, **how)[0]
        ctx.save_for_backward(z, epsilon if live else None, x, length, scaled, even, sums)
        one, other = x.chunk(2)
        return (sums.view(2, -1) - (one * other).sum(1) / rate).flatten()

    @staticmethod
    def backward(ctx, up: Tensor):
        single(up)
        z, epsilon, x, length, scaled, even, sums = ctx.saved_tensors
        rate, half = ctx.rate, len(x) // 2
        with torch.no_grad():
            up = up.contiguous()
            given = scaled, x, even, even, ctx.barred, (sums, sums), (up, up)
            g = bilinear.pull(*given, (True, False, False, False), **ctx.how)[0]
            g = torch.addcmul(g, x.roll(half, 0), (up + up.roll(half))[:, None], value=-1.0)
            along = (x * g).sum(1, keepdim=True)
            gz = torch.addcmul(g, x, along, value=-1.0) / (length * rate)
            of_epsilon = None
            if ctx.needs_input_grad[1]:  # every product has been seen from both of its points
                of_epsilon = (along.sum() / (-2.0 * rate * rate)).reshape(epsilon.shape).to(epsilon)
        return *final(bilinear.ONCE, (gz, of_epsilon), z, epsilon, up), None, None


class _CrossEntropies(Backward):
    """From points to numbers and back, by as few launches as there are passes."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, epsilon: float | Tensor, both: bool, kernels: ModuleType) -> Tensor:
        live = isinstance(epsilon, Tensor)
        rate = epsilon.detach().reshape(1).to(x.device, torch.float32) if live else float(epsilon)
        given = x.detach().contiguous(), y.detach().contiguous(), rate
        precise = x.dtype == torch.float32
        found, known = kernels.cross_entropies(*given, both=both, precise=precise)
        ctx.save_for_backward(x, y, epsilon if live else None)
        ctx.given, ctx.known, ctx.kernels = given, known, kernels
        return found

    @staticmethod
    def backward(ctx, up: Tensor):
        single(up)
        x, y, epsilon = ctx.saved_tensors  # which notices what was changed in place
        with torch.no_grad():
            gx, gy, rate = ctx.kernels.pull_cross_entropies(*ctx.given, ctx.known, up, ctx.needs_input_grad[:3])
        found = gx if ctx.needs_input_grad[0] else None, gy, None if rate is None else rate.reshape(epsilon.shape).to(epsilon)
        return *final(bilinear.ONCE, found, x, y, epsilon, up), None, None


def agrees(kernels: ModuleType, device: torch.device) -> bool:
    """Whether kernels give what the code above gives, on a small case without a friendly size."""
    draw = torch.Generator().manual_seed(0)
    x, y, up = (torch.randn(shape, generator=draw, device="cpu").to(device) for shape in ((70, 33), (70, 33), (2, 70)))
    results = []
    for how in (kernels, None):
        live = [z.clone().requires_grad_() for z in (x, y, torch.full((), 0.5, device=device))]
        with torch.enable_grad():
            found = (
                cross_entropies(*live, both=True, backend="eager")
                if how is None
                else _CrossEntropies.apply(*live, True, how)
            )
        results.append((found.detach(), *torch.autograd.grad(found, live, up)))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
