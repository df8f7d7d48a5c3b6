"""The scripts of the gallery run, draw, and show what the page says of them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


def run(name, folder, **options):
    """The names a script defines, and what its main returns."""
    names = runpy.run_path(str(GALLERY / f"{name}.py"))
    folder = folder / "made by the script"
    found = names["main"](folder, **options)
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return names, found


def test_every_script_has_a_picture_and_a_place_on_the_page():
    page = (GALLERY.parent / "gallery.md").read_text()
    for script in GALLERY.glob("*.py"):
        assert (GALLERY.parent / "_static" / "gallery" / f"{script.stem}.png").exists()
        assert f"gallery/{script.name}" in page and f"_static/gallery/{script.stem}.png" in page


def test_migration(tmp_path):
    _, (fit, named) = run("migration", tmp_path)
    np.testing.assert_allclose(fit.coefficients, [-1.4929633099, 3.402997240e-4], rtol=1e-8)
    assert {"NE → IA", "NY → FL"} <= {*named["more"]} and {"CA → AZ", "CA → FL", "GA → FL"} <= {*named["fewer"]}


def test_marriage(tmp_path):
    names, fit = run("marriage", tmp_path)
    errors = fit.errors("robust").reshape(4, 4)
    assert (np.abs(fit.matrix - names["PLANTED"]) < 4 * errors).all()
    assert max(fit.rank_test(k).p_value for k in (1, 2, 3)) < 1e-3 and np.argmin(fit.saliency().shares) == 3
    truth = np.linalg.svd(names["PLANTED"], compute_uv=False)
    shares = truth / truth.sum()
    assert np.abs(fit.saliency().shares - shares).max() < 0.15


@pytest.mark.slow
def test_digits(tmp_path):
    _, found = run("digits_metric", tmp_path)
    assert found["learned"] > found["before"] + 0.03 and found["learned"] > found["raw pixels"]


def test_inverse_linear_program(tmp_path):
    names, (fit, cuts) = run("inverse_lp", tmp_path)
    low, high = fit.bounds.T
    assert (low <= names["TRUTH"] + 1e-9).all() and (names["TRUTH"] <= high + 1e-9).all()
    assert np.isfinite(fit.bounds).all() and fit.margin > 0
    np.testing.assert_allclose(fit.plan, names["observed"]()[1], atol=1e-12)
    limits = dict(A_ub=cuts, b_ub=np.zeros(len(cuts)), bounds=[(1, 1), (None, None), (None, None)])
    forward = [  # the ends of the set that forward problems alone have cut out
        sign * linprog(sign * np.eye(3)[k], **limits).fun for k in (1, 2) for sign in (1, -1)
    ]
    np.testing.assert_allclose(forward, fit.bounds[1:].ravel(), rtol=1e-6)


def test_regimes(tmp_path):
    _, moved = run("regimes", tmp_path)
    balanced, unbalanced, partial, relaxed = moved.values()
    assert balanced == pytest.approx(1.0) and relaxed == pytest.approx(1.0) and partial == pytest.approx(0.7)
    assert 0.5 < unbalanced < 0.9


def test_certificates(tmp_path):
    _, found = run("certificates", tmp_path, count=100)
    low, high, value = found["low"], found["high"], found["value"]
    assert (low <= value + 1e-9).all() and (value <= high + 1e-9).all() and (np.diff(low) > -1e-9).all()
    assert high[-1] - low[-1] < 1e-3 * (high[0] - low[0])
    assert found["moved"][-1] < 1e-3 * found["gaps"][-1] and found["gaps"][-1] > found["soft"]


def test_couplings(tmp_path):
    names, found = run("couplings", tmp_path)
    first, second = names["views"]()
    wrong = slice(-names["WRONG"], None)
    softmax, sinkhorn, unbalanced = found.values()
    cosine = torch.nn.functional.normalize(first) @ torch.nn.functional.normalize(second).T
    np.testing.assert_allclose(softmax, (cosine / 0.1).softmax(1), atol=1e-12)
    assert softmax[:, wrong].sum(0).max() < 0.1
    off = np.abs(np.stack([sinkhorn.sum(0), sinkhorn.sum(1)]) - 1.0)
    assert off.mean(1).max() < 1e-4  # the tolerance of the loss
    assert 0.1 < unbalanced[:, wrong].sum(0).max() < 0.5 and unbalanced[wrong].sum(1).mean() < 0.75
