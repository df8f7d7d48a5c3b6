"""The scripts of the gallery run, draw, and show what the page says of them."""

import runpy
from pathlib import Path

import numpy as np
import pytest

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


def run(name, folder, **options):
    """The names a script defines, and what its main returns."""
    names = runpy.run_path(str(GALLERY / f"{name}.py"))
    found = names["main"](folder, **options)
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return names, found


def test_every_script_has_a_picture_and_a_place_on_the_page():
    page = (GALLERY.parent / "gallery.md").read_text()
    for script in GALLERY.glob("*.py"):
        assert (GALLERY.parent / "_static" / "gallery" / f"{script.stem}.png").exists()
        assert f"gallery/{script.name}" in page and f"_static/gallery/{script.stem}.png" in page


def test_migration(tmp_path):
    _, fit = run("migration", tmp_path)
    np.testing.assert_allclose(fit.coefficients, [-1.4929633099, 3.402997240e-4], rtol=1e-8)


def test_marriage(tmp_path):
    names, fit = run("marriage", tmp_path, count=400)
    errors = fit.errors("robust").reshape(4, 4)
    assert (np.abs(fit.matrix - names["PLANTED"]) < 4 * errors).all()
    assert fit.rank_test(1).p_value < 1e-3
    truth = np.linalg.svd(names["PLANTED"], compute_uv=False)
    shares = truth / truth.sum()
    assert np.abs(fit.saliency().shares - shares).max() < 0.15


@pytest.mark.slow
def test_digits(tmp_path):
    _, found = run("digits_metric", tmp_path)
    assert found["learned"] > found["before"] + 0.03


def test_inverse_linear_program(tmp_path):
    names, fit = run("inverse_lp", tmp_path)
    low, high = fit.bounds.T
    assert (low <= names["TRUTH"] + 1e-9).all() and (names["TRUTH"] <= high + 1e-9).all()
    assert np.isfinite(fit.bounds).all() and fit.margin > 0
    np.testing.assert_allclose(fit.plan, names["observed"]()[1], atol=1e-12)


def test_regimes(tmp_path):
    _, moved = run("regimes", tmp_path)
    balanced, unbalanced, partial, relaxed = moved.values()
    assert balanced == pytest.approx(1.0) and relaxed == pytest.approx(1.0) and partial == pytest.approx(0.7)
    assert 0.5 < unbalanced < 0.9
