"""The demonstration end to end, with one seed: what it claims is what its summary holds."""

import json

import numpy as np
import pytest

from contrastive import demo
from contrastive.losses import NAMES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out, seeds=1, epochs=12)


def test_summary_is_written_and_finite(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    numbers = [x for row in summary["transport"] for x in row.values() if isinstance(x, float)]
    numbers += [x for row in summary["training"].values() for values in row.values() for x in values]
    assert np.isfinite(numbers).all()


def test_every_regime_is_certified(finished):
    rows = finished[1]["transport"]
    assert {row["regime"] for row in rows} == set(demo.REGIMES)
    assert all(row["certified"] for row in rows)
    by_regime = {row["regime"]: row for row in rows if row["problem"] == "one 3 to one 8"}
    assert by_regime["partial, 70 %"]["mass"] == pytest.approx(0.7, abs=1e-12)
    assert by_regime["exact"]["value"] == pytest.approx(by_regime["exact"]["transport_cost"], abs=1e-12)
    # relaxing a side can only lower the optimum, and dropping 30 % of the mass can only lower the exact cost
    assert by_regime["semi-relaxed"]["value"] < by_regime["entropic"]["value"]
    assert by_regime["unbalanced"]["value"] < by_regime["entropic"]["value"]
    assert by_regime["partial, 70 %"]["value"] < by_regime["exact"]["value"]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_beats_the_untrained_encoder_on_the_primary_metric(finished, name):
    training = finished[1]["training"]
    assert training[name][demo.PRIMARY][0] > training["untrained encoder"][demo.PRIMARY][0] + 0.03


def test_pictures_are_pictures(finished):
    from matplotlib.image import imread

    for name in ("plans", "losses", "coupling", "embedding"):
        picture = imread(finished[0] / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05, f"{name}.png is nearly blank"


def test_a_second_demonstration_replaces_the_first(finished):
    out, before = finished
    again = demo.run(out, seeds=1, epochs=1, losses=("infonce",))
    assert set(again["training"]) == {"raw pixels", "untrained encoder", "infonce"}
    assert before["training"]["raw pixels"] == again["training"]["raw pixels"]
