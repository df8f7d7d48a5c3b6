"""The inverse problem: the cost behind an observed plan."""

from iotsolve.inverse.losses import inverse_loss

__all__ = ["inverse_loss"]
