"""Where the best attainable AUROC is known, methods come near it and none gets past it."""

import numpy as np
import pytest
from scipy.special import expit
from simulated_truth import (
    ALPHA,
    FEATURES,
    Outcome,
    Rows,
    bayes_risk,
    bayes_risk_mnar,
    correlation,
    effects,
    expected_auroc,
    lose,
    measure,
)

from ehr_sn.config import baseline_is_installed
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models.baselines import BASELINES
from ehr_sn.models.methods import method_names

LEFT_OUT = {
    "gain": "slow",
    "missforest": "slow",
    "multiple_imputation": "slow",
    "sparsity_normalization_tuned": "slow",
    "constant_scale": "an ablation: all that it does is to make the input smaller",
    "most_frequent": "for flags: of a continuous feature it fills in the minimum",
}
METHODS = [name for name in method_names() if name.removesuffix("+mask") not in LEFT_OUT]
FARTHEST, NOISE = 0.045, 0.004


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows.draw(12_000, seed=3)


def monte_carlo(z: np.ndarray, observed: np.ndarray, draws: int = 100_000) -> float:
    """The risk of one row, by drawing what is missing from its conditional distribution."""
    R, beta, missing = correlation(), effects(), ~observed
    weights = R[np.ix_(missing, observed)] @ np.linalg.inv(R[np.ix_(observed, observed)])
    spread = R[np.ix_(missing, missing)] - weights @ R[np.ix_(observed, missing)]
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(weights @ z[observed], spread, draws)
    return float(expit(ALPHA + z[observed] @ beta[observed] + drawn @ beta[missing]).mean())


def test_the_best_risk_is_the_mean_over_what_may_be_missing(rows: Rows) -> None:
    z = rows.z[:5]
    observed = np.arange(FEATURES) % np.array([[2], [3], [4], [7], [20]]) == 0
    expected = [monte_carlo(*row) for row in zip(z, observed, strict=True)]
    np.testing.assert_allclose(bayes_risk(z, observed), expected, atol=0.003)


def test_it_is_the_true_risk_of_full_rows_and_the_prevalence_of_empty_ones(rows: Rows) -> None:
    whole = np.ones(rows.z.shape, dtype=bool)
    np.testing.assert_allclose(bayes_risk(rows.z, whole), rows.risk, atol=1e-6)
    np.testing.assert_allclose(bayes_risk(rows.z, ~whole), rows.risk.mean(), atol=0.005)


def test_the_best_that_knows_the_mechanism_is_calibrated_under_mnar(
    rows: Rows,
) -> None:
    for rate in (0.4, 0.7):
        x = lose("mnar", rate, rows.x, np.ones(len(rows.x), dtype=bool), seed=0)[:1500]
        z, risk, observed = rows.z[:1500], rows.risk[:1500], ~np.isnan(x)
        told = bayes_risk_mnar(z, observed, rate, draws=400)
        ignoring = bayes_risk(z, observed)
        assert expected_auroc(risk, told) > expected_auroc(risk, ignoring) + 0.003
        for group in np.array_split(np.argsort(told), 2):
            assert (risk[group] - told[group]).mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("mechanism", "ignorable"),
    [("mcar", True), ("mar", True), ("visits", True), ("mnar", False)],
)
def test_it_is_calibrated_unless_entries_are_missing_for_what_they_are(
    rows: Rows, mechanism: str, ignorable: bool
) -> None:
    observed = ~np.isnan(lose(mechanism, 0.45, rows.x, np.ones(len(rows.x), dtype=bool), seed=0))
    assert 0.4 < (~observed).mean() < 0.5
    p = bayes_risk(rows.z, observed)
    for ordering in (p, observed.sum(1)):
        groups = np.array_split(np.argsort(ordering, kind="stable"), 5)
        error = [(rows.risk[g] - p[g]).mean() for g in groups]
        assert (np.abs(error).max() < 0.012) == ignorable


def test_the_expected_auroc_is_the_mean_over_outcomes(rows: Rows) -> None:
    score = rows.z[:, 5].round(1)
    rng = np.random.default_rng(0)
    drawn = [auroc(rng.random(len(score)) < rows.risk, score) for _ in range(20)]
    assert expected_auroc(rows.risk, score) == pytest.approx(np.mean(drawn), abs=0.002)


@pytest.fixture(scope="module")
def judged() -> Outcome:
    standard = [f"standard/{name}" for name in METHODS]
    baselines = [name for name in BASELINES if baseline_is_installed(name)]
    sizes, train = (1500, 500, 1500), {"seeds": 1, "max_epochs": 12}
    return measure([*standard, *baselines], "mcar", 0.3, sizes, **train)


def test_no_method_is_far_from_the_best(judged: Outcome) -> None:
    assert {m: lost for m, lost in judged.shortfall.items() if lost > FARTHEST} == {}


def test_no_method_is_better_than_the_best(judged: Outcome) -> None:
    assert {m: lost for m, lost in judged.shortfall.items() if lost < -NOISE} == {}


def test_that_distance_is_too_short_for_columns_out_of_step(rows: Rows) -> None:
    observed = ~np.isnan(lose("mcar", 0.3, rows.x, np.ones(len(rows.x), dtype=bool), seed=0))
    best = expected_auroc(rows.risk, bayes_risk(rows.z, observed))
    shifted = bayes_risk(np.roll(rows.z, 1, axis=1), np.roll(observed, 1, axis=1))
    assert best - expected_auroc(rows.risk, shifted) > FARTHEST
