"""Gravity equations beside pyfixest and statsmodels: coefficients to 1e-8, standard errors to 1e-4 after their factors.

With N cells, K coefficients, n origins, m destinations and G clusters, ours are, before ``small_sample=True``,

    model      inverse information                           pyfixest iid     times sqrt((N - 1) / (N - k))
    robust     sandwich of cells                             pyfixest hetero  times sqrt(N / (N - k))
    clustered  sandwich of clusters, times G / (G - 1)       pyfixest CRV1    times sqrt((N - 1) / (N - k))

where ``k = K + n + m - 1`` with ``k_fixef="full"``, and without its corrections (``k_adj=False``) the factors are 1. In a panel
of T tables ours takes ``k = K + sum (n_t + m_t - 1)``, the rank of the regression; theirs counts one lost effect in all, not one
a table, so that its k is larger by T - 1. statsmodels' clustered errors have CRV1's factors. pyfixest's tolerances are set far
below what is compared (``TIGHT``), since it stops at 1e-8 by default; ours are as they come.
"""

from pathlib import Path

import numpy as np
import pytest

from iotsolve import inverse

pd = pytest.importorskip("pandas")
pf = pytest.importorskip("pyfixest")

TIGHT = dict(iwls_tol=1e-13, fixef_tol=1e-12, fixef_maxiter=100_000, iwls_maxiter=200)
RAW = pf.ssc(k_adj=False, G_adj=False)
ONLY_G = pf.ssc(k_adj=False, G_adj=True)
FULL = pf.ssc(k_adj=True, k_fixef="full", G_adj=True)
KINDS = {"model": "iid", "robust": "hetero", "clustered": {"CRV1": "group"}}  # ours: theirs
PLACES = ("origin", "destination")


def migration():
    table = pd.read_csv(Path(__file__).parents[1] / "data" / "us_state_migration_2012.csv")
    table = table.rename(columns={"movers": "flow", "dest": "destination"})
    return table.assign(first=np.log(table.km), second=table.km, group=table.origin)


def simulated(seed, n=30, m=25, *, missing=0.0):
    """Counts with effects of both sides, three features, clusters of regions, and some pairs that are not listed."""
    rng = np.random.default_rng(seed)
    i, j = np.divmod(np.arange(n * m), m)
    features = rng.normal(size=(n * m, 2))
    mean = np.exp(rng.normal(size=n)[i] + rng.normal(size=m)[j] + features @ [0.5, -0.3])
    noise = rng.gamma(2.0, 0.5, n * m)  # more spread than Poisson's
    table = pd.DataFrame(
        dict(
            origin=i,
            destination=j,
            flow=rng.poisson(mean * noise).astype(float),
            first=features[:, 0],
            second=features[:, 1],
        )
    )
    table["group"] = table.origin // 3
    return table[rng.random(n * m) >= missing]


def seen(table):
    """Without places that no flow comes from or goes to: pyfixest drops their lines, and counts fewer cells."""
    for place in PLACES:
        table = table[table.groupby(place).flow.transform("sum") > 0]
    return table


CASES = {
    "migration": migration,
    "seed 0": lambda: simulated(0),
    "seed 1": lambda: simulated(1),
    "unequal sides": lambda: simulated(2, 12, 60),
    "pairs not listed": lambda: simulated(3, missing=0.3),
    "many zeros": lambda: simulated(4).assign(flow=lambda d: np.where(d.flow < 2, 0.0, d.flow)),
}


def ours(table):
    named = dict(flow="flow", origin="origin", destination="destination", features=["first", "second"])
    return inverse.gravity(table, **named, cluster="group")


def theirs(table, kind, ssc):
    return pf.fepois("flow ~ first + second | origin + destination", table, vcov=kind, ssc=ssc, **TIGHT)


@pytest.mark.parametrize("case", CASES)
def test_against_pyfixest(case):
    table = seen(CASES[case]())
    fit = ours(table)
    for kind, vcov in KINDS.items():
        raw = theirs(table, vcov, ONLY_G if kind == "clustered" else RAW)
        np.testing.assert_allclose(fit.coefficients, raw.coef().to_numpy(), rtol=1e-8)
        np.testing.assert_allclose(fit.errors(kind), raw.se().to_numpy(), rtol=1e-4)
        cells = raw._N
        full = theirs(table, vcov, FULL).se().to_numpy()
        factor = 1.0 if kind == "robust" else np.sqrt((cells - 1) / cells)
        np.testing.assert_allclose(fit.errors(kind, small_sample=True) * factor, full, rtol=1e-4)


def test_against_statsmodels_with_a_column_for_every_place():
    sm = pytest.importorskip("statsmodels.api")
    table = simulated(0)
    places = pd.get_dummies(table[list(PLACES)].astype(str), dtype=float)
    design = np.column_stack([table[["first", "second"]], places.drop(columns="destination_0")])
    model = sm.GLM(table.flow.to_numpy(), design, family=sm.families.Poisson())
    known, robust = model.fit(tol=1e-14, maxiter=200), model.fit(tol=1e-14, maxiter=200, cov_type="HC0")
    fit = ours(table)
    np.testing.assert_allclose(fit.coefficients, known.params[:2], rtol=1e-8)
    np.testing.assert_allclose(fit.standard_errors, known.bse[:2], rtol=1e-4)
    np.testing.assert_allclose(fit.errors("robust"), robust.bse[:2], rtol=1e-4)
    grouped = model.fit(tol=1e-14, maxiter=200, cov_type="cluster", cov_kwds={"groups": table.group.to_numpy()})
    cells, used = design.shape
    np.testing.assert_allclose(
        fit.errors("clustered") * np.sqrt((cells - 1) / (cells - used)), grouped.bse[:2], rtol=1e-4
    )


def matrix(table, name):
    """A column as a matrix of origins and destinations, 0 where a pair is not listed."""
    return table.pivot(index="origin", columns="destination", values=name).fillna(0.0).to_numpy()


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_a_panel_against_pyfixest_with_effects_of_a_place_in_a_year(missing):
    """Three tables of different sizes share their coefficients, and their clusters."""
    sizes = {2010: (30, 25), 2011: (20, 20), 2012: (15, 40)}
    tables = [seen(simulated(year, n, m, missing=missing)).assign(year=year) for year, (n, m) in sizes.items()]
    features = [inverse.Features({name: matrix(t, name) for name in ("first", "second")}) for t in tables]
    couplings = [
        inverse.Coupling(matrix(t, "flow"), mask=matrix(t.assign(listed=1.0), "listed") > 0, cluster=matrix(t, "group"))
        for t in tables
    ]
    fit = inverse.InverseOT(features).fit(couplings)
    long = pd.concat(tables)
    long = long.assign(**{place: long[place].astype(str) + " " + long.year.astype(str) for place in PLACES})
    for kind, vcov in KINDS.items():
        raw = theirs(long, vcov, ONLY_G if kind == "clustered" else RAW)
        np.testing.assert_allclose(fit.coefficients, raw.coef().to_numpy(), rtol=1e-8)
        np.testing.assert_allclose(fit.errors(kind), raw.se().to_numpy(), rtol=1e-4)
        cells = raw._N
        used = 2 + sum(t[place].nunique() for t in tables for place in PLACES) - len(tables)
        factor = np.sqrt((cells - used) / (cells - used - (len(tables) - 1)))
        factor *= 1.0 if kind == "robust" else np.sqrt((cells - 1) / cells)
        full = theirs(long, vcov, FULL).se().to_numpy()
        np.testing.assert_allclose(fit.errors(kind, small_sample=True) * factor, full, rtol=1e-5)


def test_what_pyfixest_drops_is_said_here():
    """A place without any flow has no effect to be told: theirs drops its lines, ours fits without mass there, the same."""
    table = simulated(5)
    table.loc[table.origin == 4, "flow"] = 0.0
    fit = ours(table)
    for kind, vcov in KINDS.items():
        raw = theirs(table, vcov, ONLY_G if kind == "clustered" else RAW)
        np.testing.assert_allclose(fit.coefficients, raw.coef().to_numpy(), rtol=1e-8)
        np.testing.assert_allclose(fit.errors(kind), raw.se().to_numpy(), rtol=1e-4)
