"""Intervals that contain the truth as often as they say, in a small study; the large one is a benchmark."""

from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.coverage import DESIGNS, KINDS, band, covered, one, shortfall

SAMPLES = 120
SMALL = {
    "counts": DESIGNS[0],
    "noisy counts": replace(DESIGNS[1], types=25, size=6000),
    "couples": replace(DESIGNS[2], size=200),
}
LEAST, MOST = band(SAMPLES, 1 - 1e-6)  # what right intervals leave once in a million studies


@pytest.fixture(scope="module")
def estimates():
    return {name: np.stack([one(d, 5000 + seed) for seed in range(SAMPLES)]) for name, d in SMALL.items()}


def shares(name, found, kind):
    return [c.inside for c in covered(name, found) if c.kind == kind]


def test_the_bounds_are_no_formality():
    assert 0.8 < LEAST < 0.95 < MOST


@pytest.mark.parametrize("name", SMALL)
def test_intervals_cover(name, estimates):
    """Right intervals miss by chance, of any coefficient, and are as wide as the estimates are spread."""
    for c in covered(name, estimates[name]):
        if name == "noisy counts" and c.kind == "model":
            continue  # it is not that model
        assert c.failures == 0
        assert LEAST <= c.inside <= MOST, c
        assert abs(c.bias) < 5 * c.spread / np.sqrt(SAMPLES) + 0.1 * abs(c.truth) * (name == "couples"), c
        assert 0.7 < c.error / c.spread < 1.4, c


def test_errors_of_the_model_do_not_cover_what_varies_more(estimates):
    assert all(share < LEAST for share in shares("noisy counts", estimates["noisy counts"], "model"))


def test_wrong_intervals_are_found_out(estimates):
    """Errors half as large as they should be fall below the bounds."""
    made = estimates["counts"].copy()
    made[:, 1:] /= 2
    assert all(c.inside < LEAST for c in covered("counts", made))


def test_what_robust_errors_lack_is_the_leverage_of_the_effects(estimates):
    """Mean robust variances over those of the model, against the projection on a column for every effect."""
    of = dict(zip(KINDS, np.moveaxis(estimates["counts"][:, 1:], 1, 0), strict=True))
    ratio = (of["robust"] / of["model"]) ** 2
    chance = ratio.std(0, ddof=1) / np.sqrt(SAMPLES)
    expected = shortfall(SMALL["counts"].types) ** 2
    assert (abs(ratio.mean(0) - expected) < 5 * chance).all()
    assert (ratio.mean(0) + 5 * chance < 1).all()  # and it is not nothing


def test_a_fit_that_failed_is_a_miss(estimates):
    made = estimates["counts"].copy()
    before = covered("counts", made)
    hit = np.flatnonzero((abs(made[:, 0] - [c.truth for c in before[: made.shape[2]]]) < made[:, 1]).all(1))[0]
    made[hit] = np.nan
    for c, was in zip(covered("counts", made), before, strict=True):
        assert c.failures == 1 and np.isclose(c.inside, was.inside - 1 / SAMPLES) and np.isfinite(c.width)
