"""contrastive: representation learning as inverse optimal transport, on top of iotsolve.

    from contrastive import SinkhornNCELoss
    loss = SinkhornNCELoss(temperature=0.1)(z0, z1)
"""

from contrastive.diagnostics import diagnostics
from contrastive.losses import (
    ClipLoss,
    GlobalNCELoss,
    InfoNCELoss,
    IOTLoss,
    NTXentLoss,
    SinkhornNCELoss,
    UnbalancedNCELoss,
)

__all__ = [
    "ClipLoss",
    "GlobalNCELoss",
    "IOTLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "SinkhornNCELoss",
    "UnbalancedNCELoss",
    "diagnostics",
]
