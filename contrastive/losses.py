"""The members of the family that have names: each is a point of :class:`contrastive.IOTLoss`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrastive.arguments import with_labels
from contrastive.family import Batch, Found, IOTLoss, Side, cross_entropy
from contrastive.queue import FeatureQueue
from contrastive.targets import Choice
from iotsolve.kernels.uncompiled import uncompiled
from iotsolve.marginals import AT_MOST, FIXED, FREE, KL, Between

__all__ = [
    "KNOWN",
    "NAMES",
    "ClipLoss",
    "DoubleBoundedLoss",
    "GCAINCELoss",
    "GCAUOTLoss",
    "GlobalNCELoss",
    "InfoNCELoss",
    "NTXentLoss",
    "PartialNCELoss",
    "SinkhornNCELoss",
    "SupConLoss",
    "UnbalancedNCELoss",
    "make",
]


class InfoNCELoss(IOTLoss):
    """U(a): rows FIXED, columns FREE; the plan is a row softmax and the loss InfoNCE, exactly (van den Oord et al., 2018).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> InfoNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(FIXED, FREE, temperature=temperature, **options)


class NTXentLoss(IOTLoss):
    """InfoNCE on all views stacked, oneself left out: SimCLR's loss, exactly (Chen et al., ICML 2020).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.
        memory_bank_size: number of earlier representations to take as the only negatives, or ``(number, dimension)``: the loss
            of MoCo (He et al., CVPR 2020), of ``z0`` against its positive in ``z1`` and the bank, into which ``z1`` then goes
            when in training. 0 is none. The bank is a :class:`FeatureQueue`, saved with the module.

    Example:
        >>> NTXentLoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.5944)
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, *, memory_bank_size: int | tuple[int, int] = 0, **options: Any
    ) -> None:
        size, dim = memory_bank_size if isinstance(memory_bank_size, tuple | list) else (memory_bank_size, None)
        negatives = options.pop("negatives", "cross" if size else "all")
        super().__init__(FIXED, FREE, temperature=temperature, negatives=negatives, **options)
        self.memory_bank = FeatureQueue(size, dim) if size else None
        self._may_be_empty = True  # asked once, so that no step waits for a device

    @uncompiled
    def forward(self, *views: Tensor, labels: Any = None, **given: Any) -> Tensor:
        """As of :class:`IOTLoss`; one stacked batch with its labels will do as well."""
        views, labels = with_labels(views, labels)
        if self.memory_bank is None:
            return super().forward(*views, labels=labels, **given)
        if len(views) != 2 or labels is not None or given:
            raise ValueError(
                f"a memory bank with {len(views)} views and {', '.join(given) or 'no'} options, labels = {labels}: it takes "
                "two views, whose pairs are the positives. For anything else pass queue= to a loss without a bank."
            )
        if self._may_be_empty:
            self._may_be_empty = int(self.memory_bank.fill) == 0
            if self._may_be_empty:
                warnings.warn(
                    "the memory bank is empty, so that this batch has no negatives and the loss is 0: the first one fills it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        loss = super().forward(*views, queue=self.memory_bank)
        if self.training and torch.is_grad_enabled():
            self.memory_bank.update(
                views[1], gather_distributed=self.gather_distributed, process_group=self.process_group
            )
        return loss

    def _batch(self, x: Tensor, y: Tensor | None, choice: Choice, queue: Any, ranks: Any, repeat: int) -> Batch:
        """With a bank: of the other view an anchor sees its own positive only, which comes to itself by a mask."""
        batch = super()._batch(x, y, choice, queue, ranks, repeat)
        if self.memory_bank is None:
            return batch
        n, m = batch.points.shape
        barred = torch.zeros(n, m, dtype=torch.bool, device=x.device)
        barred[:, : m - self.memory_bank.size] = True
        barred[tuple(batch.matches.target.index)] = False
        return batch.of(replace(batch.points, barred=barred))


class SupConLoss(IOTLoss):
    """All of a class are positives: the supervised contrastive loss, its form "out" (Khosla et al., NeurIPS 2020).

    The cross-entropy of the positives, which is the divergence from the plan plus the constant ``mean log |P(i)|``. Anchors
    without a positive add nothing, and count in the mean, as in the paper's code.

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> SupConLoss(temperature=0.5)(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(FIXED, FREE, temperature=temperature, negatives=options.pop("negatives", "all"), **options)

    @uncompiled
    def forward(self, *views: Tensor, labels: Any = None, **given: Any) -> Tensor:
        """As of :class:`IOTLoss`; one stacked batch with its labels will do as well: ``loss(z, labels)``."""
        views, labels = with_labels(views, labels)
        return super().forward(*views, labels=labels, **given)

    def _terms(self, side: Side, found: Found, epsilon: Any) -> Tensor:
        return cross_entropy(side, found.s, epsilon)


class ClipLoss(IOTLoss):
    """Mean of InfoNCE from ``z0`` to ``z1`` and from ``z1`` to ``z0``: CLIP's loss, exactly (Radford et al., ICML 2021).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> ClipLoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
        >>> ClipLoss()(torch.eye(4), torch.eye(4), torch.tensor(2.0))
        tensor(0.3408)
    """

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any) -> None:
        super().__init__(FIXED, FREE, temperature=temperature, symmetric=True, **options)

    @uncompiled
    def forward(self, *views: Any, logit_scale: float | Tensor | None = None, **given: Any) -> Tensor:
        """As of :class:`IOTLoss`; the scale ``1 / temperature`` may be the third argument."""
        if len(views) == 3 and (not isinstance(views[2], Tensor) or views[2].numel() == 1):
            *views, logit_scale = views
        return super().forward(*views, logit_scale=logit_scale, **given)


class GlobalNCELoss(IOTLoss):
    """U(1): both sides FREE, total mass 1; one softmax over all pairs (Shi et al., ICML 2023).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> GlobalNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(FREE, FREE, 1.0, temperature=temperature, **options)


class SinkhornNCELoss(IOTLoss):
    """U(a, b): both sides FIXED; the plan is a balanced coupling (Shi et al., ICML 2023).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.

    Example:
        >>> SinkhornNCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__(FIXED, FIXED, temperature=temperature, **options)


class GCAINCELoss(SinkhornNCELoss):
    """The name :class:`SinkhornNCELoss` has in generalized contrastive alignment: GCA-INCE (Chen et al., NeurIPS 2024).

    Example:
        >>> GCAINCELoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """


class UnbalancedNCELoss(IOTLoss):
    """Both sides pay ``rho KL`` for departing from uniform: between U(1) (``rho -> 0``) and U(a, b) (``rho -> inf``).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.
        rho: price of a departing marginal, in cosines, positive.
        mass: total mass of the plan; None leaves it to the sides.

    Example:
        >>> UnbalancedNCELoss(temperature=0.5, rho=0.3)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, *, rho: float = 1.0, mass: float | None = 1.0, **options: Any
    ) -> None:
        super().__init__(KL(rho), KL(rho), mass, temperature=temperature, **options)


class GCAUOTLoss(UnbalancedNCELoss):
    """The name :class:`UnbalancedNCELoss` without a mass has in contrastive alignment: GCA-UOT (Chen et al., NeurIPS 2024).

    Example:
        >>> GCAUOTLoss(temperature=0.5, rho=0.3).mass is None
        True
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, rho: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, rho=rho, mass=options.pop("mass", None), **options)


class DoubleBoundedLoss(IOTLoss):
    """Rows FIXED, columns between two multiples of their even share: double-bounded matching, OT-CLIP's (Shi et al., ICML 2024).

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.
        lo: least share of a candidate, at most 1.
        hi: largest share, at least 1.

    Example:
        >>> DoubleBoundedLoss(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, lo: float = 0.5, hi: float = 2.0, **options: Any) -> None:
        super().__init__(FIXED, Between(lo, hi), temperature=temperature, **options)


class PartialNCELoss(IOTLoss):
    """Both sides AT_MOST and a mass below 1: the plan may leave out a share of the batch, as a batch with false pairs should.

    Args:
        temperature: see :class:`IOTLoss`, as are all other options.
        mass: share of the batch that is matched, in (0, 1].

    Example:
        >>> PartialNCELoss(temperature=0.5, mass=0.9)(torch.eye(4), torch.eye(4))
        tensor(0.3067)
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, mass: float = 0.9, **options: Any) -> None:
        super().__init__(AT_MOST, AT_MOST, mass, temperature=temperature, **options)


_LOSSES = {
    "infonce": InfoNCELoss,
    "ntxent": NTXentLoss,
    "clip": ClipLoss,
    "global": GlobalNCELoss,
    "sinkhorn": SinkhornNCELoss,
    "unbalanced": UnbalancedNCELoss,
}
NAMES = tuple(_LOSSES)
_OTHERS = {
    "supcon": "SupConLoss",
    "partial": "PartialNCELoss",
    "double-bounded": "DoubleBoundedLoss",
    "rince": "RINCELoss",
    "dcl": "DCLLoss",
    "hard-negative": "HardNegativeLoss",
}
KNOWN = (*NAMES, *_OTHERS)


def make(name: str, *, temperature: float | Tensor = 0.2, uniformity: float = 0.0, **options: Any) -> IOTLoss:
    """A loss by the name the command line uses.

    Args:
        name: one of ``KNOWN``.
        temperature: see :class:`IOTLoss`.
        uniformity: see :class:`IOTLoss`.
        options: more of the loss, such as ``rho``.

    Raises:
        ValueError: if there is no such loss, or it has no such option; the message lists those there are.

    Example:
        >>> type(make("sinkhorn")).__name__, make("unbalanced", rho=0.5).rows
        ('SinkhornNCELoss', KL(rho=0.5))
    """
    if name not in KNOWN:
        raise ValueError(f"loss = {name!r}: there is no such loss. Known: {', '.join(KNOWN)}.")
    if name in _LOSSES:
        kind = _LOSSES[name]
    else:
        import contrastive  # which knows where the others live

        kind = getattr(contrastive, _OTHERS[name])
    try:
        return kind(temperature=temperature, uniformity=uniformity, **options)
    except TypeError as error:
        raise ValueError(f"loss = {name!r} with {', '.join(options)}: it has no such option ({error}).") from error
