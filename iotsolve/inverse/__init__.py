"""The inverse problem: the cost behind an observed plan.

>>> import numpy as np
>>> from iotsolve import inverse
>>> x, y = np.arange(4.0)[:, None], np.arange(3.0)[:, None]
>>> fit = inverse.InverseOT(inverse.Bilinear(x, y)).fit(inverse.Coupling([[9, 3, 1], [5, 4, 3], [3, 4, 5], [1, 3, 9]]))
>>> bool(fit.converged)
True
"""

from iotsolve.inverse.data import Coupling
from iotsolve.inverse.estimator import InverseOT
from iotsolve.inverse.features import (
    Bilinear,
    FeatureMap,
    Features,
    FreeCost,
    GraphPath,
    Mahalanobis,
    Symmetric,
    Toeplitz,
)
from iotsolve.inverse.fit import Fit, IdentifiabilityWarning, Saliency, Test
from iotsolve.inverse.front import affinity, cross_ratios, free_cost, gravity
from iotsolve.inverse.linear import ExactFit, ExactInverse, MaxMargin, Nearest, SmallestGap
from iotsolve.inverse.losses import inverse_loss
from iotsolve.inverse.module import Module, ModuleFit, TrainingWarning
from iotsolve.inverse.paths import Path, largest_strength, path
from iotsolve.inverse.penalties import L1, Group, Nuclear, Ridge

__all__ = [
    "L1",
    "Bilinear",
    "Coupling",
    "ExactFit",
    "ExactInverse",
    "FeatureMap",
    "Features",
    "Fit",
    "FreeCost",
    "GraphPath",
    "Group",
    "IdentifiabilityWarning",
    "InverseOT",
    "Mahalanobis",
    "MaxMargin",
    "Module",
    "ModuleFit",
    "Nearest",
    "Nuclear",
    "Path",
    "Ridge",
    "Saliency",
    "SmallestGap",
    "Symmetric",
    "Test",
    "Toeplitz",
    "TrainingWarning",
    "affinity",
    "cross_ratios",
    "free_cost",
    "gravity",
    "inverse_loss",
    "largest_strength",
    "path",
]
