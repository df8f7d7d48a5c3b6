"""contrastive: representation learning as inverse optimal transport, on top of iotsolve.

::

    from contrastive import SinkhornNCELoss
    loss = SinkhornNCELoss(temperature=0.1)(z0, z1)
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ClipLoss": "losses",
    "DCLLoss": "relatives",
    "DoubleBoundedLoss": "losses",
    "FeatureQueue": "queue",
    "GCAINCELoss": "losses",
    "GCAUOTLoss": "losses",
    "GlobalNCELoss": "losses",
    "HardNegativeLoss": "relatives",
    "IOTLoss": "family",
    "InfoNCELoss": "losses",
    "MatchingGapLoss": "relatives",
    "NTXentLoss": "losses",
    "PartialNCELoss": "losses",
    "RINCELoss": "relatives",
    "SinkhornNCELoss": "losses",
    "SupConLoss": "losses",
    "SwAVLoss": "relatives",
    "UnbalancedNCELoss": "losses",
    "Diagnostics": "diagnostics",
    "balanced_assignment": "relatives",
    "diagnose": "diagnostics",
    "rankme": "diagnostics",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a loss when it is asked for, so that the command's --help does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'contrastive' has no attribute {name!r}")
    return getattr(import_module(f"contrastive.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
