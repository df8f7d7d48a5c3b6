"""Intervals that contain the truth as often as they say, in a small study; the large one is a benchmark."""

import numpy as np
import pytest
from scipy.stats import binom

from tests.benchmarks.coverage import DESIGNS, THETA, Design, covered, one

SAMPLES = 120


@pytest.mark.parametrize("design", [DESIGNS[0], Design("couples", 60, 200, True)], ids=lambda design: design.name)
def test_intervals_cover(design):
    """Right intervals miss by chance: fewer than one study in a million falls outside these bounds, of any coefficient."""
    found = covered(design.name, np.stack([one(design, 5000 + seed) for seed in range(SAMPLES)]))
    least, most = binom.ppf([5e-7, 1 - 5e-7], SAMPLES, 0.95) / SAMPLES
    assert 0.8 < least < 0.95
    for c in found:
        assert least <= c.inside <= most, c
        assert abs(c.bias) < 5 * c.spread / np.sqrt(SAMPLES) + 0.1 * abs(c.truth) * design.couples, c
        assert 0.7 < c.error / c.spread < 1.4, c


def test_wrong_intervals_are_found_out():
    """Errors half as large as they should be fall below the bounds."""
    made = np.stack([one(DESIGNS[0], 5000 + seed) for seed in range(SAMPLES)])
    made[:, 1:] /= 2
    least = binom.ppf(5e-7, SAMPLES, 0.95) / SAMPLES
    assert all(c.inside < least for c in covered("counts", made))
    assert THETA.shape == (2, 2)
