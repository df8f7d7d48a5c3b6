"""Points on the unit sphere, and the cross-entropies of pairs among them: what InfoNCE is where nothing has to be solved."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from iotsolve.kernels import backends, bilinear
from iotsolve.kernels.once import final

__all__ = ["cross_entropies", "normalised"]


def normalised(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """``z`` on the unit sphere, in float32 at least; a zero vector stays zero, with derivative 0."""
    return _Direction.apply(_wide(z))


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


class _Direction(torch.autograd.Function):
    """The derivative in closed form, which asks a device a third as often as autograd would."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        x, length = _direction(z)
        ctx.save_for_backward(z, x, length)
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        z, x, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated itself
            x, length = _direction(z)
        return torch.addcmul(g, x, (x * g).sum(1, keepdim=True), value=-1.0) / length


def _direction(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` over its length, and that: infinite for a zero vector."""
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    length = length.masked_fill(length == 0, math.inf)
    return z / length, length


def cross_entropies(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], epsilon: float | Tensor, *, both: bool, backend: str = "auto"
) -> Float[Tensor, "sides n"]:
    """``log sum_j exp(cos(x_i, y_j) / epsilon) - cos(x_i, y_i) / epsilon`` for every row and, if ``both``, with the roles
    exchanged for every column: of each pair the cross-entropy of its match, in nats (InfoNCE, van den Oord et al., 2018).

    Args:
        x: shape ``(n, d)``, of any length.
        y: the same shape.
        epsilon: positive; a tensor of one entry may require grad.
        both: also of the columns.
        backend: see :func:`iotsolve.kernels.backends.chosen`. Of half-precision inputs Triton's kernels multiply 11 bits.

    Returns:
        Shape ``(1, n)`` or ``(2, n)``, in float32 at least. Differentiable once; no matrix is kept for it.
    """
    common = torch.promote_types(x.dtype, y.dtype)
    common = common if common.is_floating_point else torch.float32
    x, y = x.to(common), y.to(common)
    kernels = backends.chosen(backend, x, agrees)
    if kernels is not None:
        return _CrossEntropies.apply(x, y, epsilon, both, kernels)
    x, y = normalised(x), normalised(y)
    epsilon = epsilon.to(x).reshape(()) if isinstance(epsilon, Tensor) else epsilon
    even = x.new_zeros(len(x))
    sums = bilinear.log_sums(x / epsilon, y, even if both else None, even, backend="eager")
    return torch.stack([s for s in sums if s is not None]) - (x * y).sum(1) / epsilon


class _CrossEntropies(torch.autograd.Function):
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
