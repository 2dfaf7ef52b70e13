"""Rows of one subject are alike: what is said of them is as sure as the subjects are many."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit, logit
from scipy.stats import norm

from ehr_sn.evaluate.clinical import Proportion, by_group, decision_curve, operating_points
from ehr_sn.evaluate.diagnostics import sparsity_bias
from ehr_sn.evaluate.metrics import Sample
from ehr_sn.evaluate.plots import binned_calibration
from ehr_sn.evaluate.results import evaluate
from ehr_sn.evaluate.statistics import delong, delong_covariance, paired_bootstrap, paired_delong
from ehr_sn.models.train import HeldOut

TRUTH = norm.cdf(1 / np.sqrt(2 * 1.09))
"""AUROC of N(1, 1.09) against N(0, 1.09), as `drawn` draws them."""


def drawn(rng, subjects, rows):
    """Labels, two scores as good as one another, and whose each row is.

    The disease is chronic, the same in all of a subject's `rows`, and these score alike.
    """
    times = rng.integers(1, 2 * rows, subjects) if rows == "varying" else np.full(subjects, rows)
    owner = np.repeat(np.arange(subjects), times)
    y = (rng.random(subjects) < 0.3)[owner]
    a, b = (y + rng.normal(size=subjects)[owner] + 0.3 * rng.normal(size=len(y)) for _ in range(2))
    return y, a, b, owner


def by_obuchowski(y, a, owner):
    """Biometrics 53:567 (1997), subject by subject, as it is written there."""
    psi = (a[y][:, None] > a[~y]) + 0.5 * (a[y][:, None] == a[~y])
    area, m, n = psi.mean(), y.sum(), (~y).sum()
    subjects = np.unique(owner)
    x = np.array([(psi.mean(axis=1) - area)[owner[y] == s].sum() for s in subjects])
    z = np.array([(psi.mean(axis=0) - area)[owner[~y] == s].sum() for s in subjects])
    i10, i01, i = len(set(owner[y])), len(set(owner[~y])), len(subjects)
    s10 = i10 / ((i10 - 1) * m) * (x**2).sum()
    s01 = i01 / ((i01 - 1) * n) * (z**2).sum()
    s11 = i / (i - 1) * (x * z).sum()
    return area, np.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n))


def test_standard_errors_by_subject_are_obuchowskis():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    y = rng.random(len(owner)) < 0.4  # some subjects are ill in some of their rows
    a = (y + rng.normal(size=60)[owner]).round(1)
    found = delong(y, a, owner)
    assert_allclose((found.value, found.se), by_obuchowski(y, a, owner), rtol=1e-12)
    assert found.subjects == 60
    assert str(found).endswith(f"{y.sum()} of {len(y)} positive, of 60 subjects)")


def test_with_one_row_a_subject_every_figure_is_what_it_was():
    """To the bit, whatever the subjects are called."""
    rng = np.random.default_rng(1)
    y, a, b, _ = drawn(rng, 200, 1)
    names = rng.permutation([f"subject {i}" for i in range(200)])
    p, q = expit(a - 1), expit(b - 1)
    assert delong(y, a, names) == delong(y, a)
    assert paired_delong(y, a, b, names) == paired_delong(y, a, b)
    assert paired_bootstrap(y, a, b, names) == paired_bootstrap(y, a, b)
    assert decision_curve([(y, p, names)]) == decision_curve([(y, p)])
    assert operating_points([(y, q)], [(y, p, names)]) == operating_points([(y, q)], [(y, p)])
    observed = rng.integers(1, 9, 200)
    assert sparsity_bias([(y, p, observed, names)]) == sparsity_bias([(y, p, observed)])
    rows = np.arange(200)
    groups = {"sex": {"1": rows % 2 == 1, "0": rows % 2 == 0}}
    assert by_group([(y, p, rows, names)], groups) == by_group([(y, p, rows)], groups)
    for mine, plain in zip(binned_calibration(y, p, names), binned_calibration(y, p), strict=True):
        np.testing.assert_array_equal(mine, plain)
    label, one, other = y.astype("f4"), p[None].astype("f4"), q[None].astype("f4")
    numbers = np.arange(200)
    told, plain = (
        evaluate({"d": [HeldOut(label, one, who)]}, {"d": [HeldOut(label, other, who)]})
        for who in (numbers, None)
    )
    assert told == plain


@pytest.mark.parametrize("rows", [1, 2, 8, "varying"])
def test_intervals_cover_and_tests_keep_their_size(rows):
    """By rows, eight of them a subject, 55 % of intervals cover and 45 % of tests reject."""
    rng, times = np.random.default_rng(2), 300
    covered = rejected = 0
    for _ in range(times):
        y, a, b, owner = drawn(rng, 150, 4 if rows == "varying" else rows)
        found = delong(y, a, owner)
        covered += found.ci_low <= TRUTH <= found.ci_high
        rejected += paired_delong(y, a, b, owner).p < 0.05
    assert covered / times > 0.91
    assert rejected / times < 0.09


def test_results_of_a_run_go_by_subject():
    y, a, b, owner = drawn(np.random.default_rng(3), 150, 8)
    label = y.astype("f4")
    mine, other = (HeldOut(label, expit(s)[None].astype("f4"), owner) for s in (a, b))
    (result,) = evaluate({"d": [mine]}, {"d": [other]})
    by_rows = delong(y, a)
    assert result.ensemble.se > 2 * by_rows.se
    assert result.versus_reference.se == pytest.approx(paired_delong(y, a, b, owner).se, rel=1e-4)
    wide = result.bootstrap.ci_high - result.bootstrap.ci_low
    assert wide == pytest.approx(
        result.versus_reference.ci_high - result.versus_reference.ci_low, rel=0.15
    )


def test_resampled_subjects_spread_as_obuchowskis_error_says():
    y, a, b, owner = drawn(np.random.default_rng(4), 300, 5)
    found = paired_bootstrap(y, a, b, owner, draws=2000)
    se = paired_delong(y, a, b, owner).se
    assert (found.ci_high - found.ci_low) / (2 * 1.96 * se) == pytest.approx(1, abs=0.08)


def test_subjects_ill_in_one_row_and_well_in_another_are_drawn_whole():
    y, owner = np.tile([True, False], 30), np.repeat(np.arange(30), 2)
    a = np.where(y, 1.0, 0.0) + np.repeat(np.linspace(0, 3, 30), 2)
    b = -a
    found = paired_bootstrap(y, a, b, owner)
    assert np.isfinite([found.ci_low, found.ci_high]).all()
    assert found.ci_low < found.difference < found.ci_high


def test_copied_rows_add_nothing():
    """Each subject's row, written four times, tells as much as written once."""
    rng = np.random.default_rng(5)
    y, a, b, _ = drawn(rng, 400, 1)
    p = expit(logit(0.3) + (a - 0.5) / 1.09)  # as is true of how it was drawn
    observed = rng.integers(1, 9, 400)
    copied = np.repeat(np.arange(400), 4)

    def width(proportion):
        return proportion.ci_high - proportion.ci_low

    assert delong(y[copied], a[copied], copied).se == pytest.approx(delong(y, a).se, rel=0.01)
    covariance = delong_covariance(y[copied], np.stack([a, b])[:, copied], copied)[1]
    assert_allclose(covariance, delong_covariance(y, np.stack([a, b]))[1], rtol=0.01, atol=1e-7)
    once, four = decision_curve([(y, p)]), decision_curve([(y[copied], p[copied], copied)])
    assert_allclose(four.low, once.low, atol=5e-4)
    (point,) = operating_points([(y, p)], [(y, p)], [0.8])
    (again,) = operating_points([(y, p)], [(y[copied], p[copied], copied)], [0.8])
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        first, second = getattr(point, name), getattr(again, name)
        assert second.value == pytest.approx(first.value)
        assert width(second) == pytest.approx(width(first), rel=0.02)
    once = sparsity_bias([(y, p, observed)])
    four = sparsity_bias([(y[copied], p[copied], observed[copied], copied)])
    spans = [b.unexplained_high - b.unexplained_low for b in (once, four)]
    assert spans[1] == pytest.approx(spans[0], rel=0.1)
    everybody = {"all": {"of them": np.full(1600, True)}}
    (one,) = by_group([(y, p, np.arange(400))], everybody)
    (many,) = by_group([(y[copied], p[copied], np.arange(1600), copied)], everybody)
    spans = [g.in_the_large[2] - g.in_the_large[1] for g in (one, many)]
    assert spans[1] == pytest.approx(spans[0], rel=0.15)


def test_groups_and_points_of_few_subjects_are_left_out_however_many_their_rows():
    rng = np.random.default_rng(6)
    owner = np.repeat(np.arange(10), 20)
    y, p = rng.random(200) < 0.4, rng.random(200)
    rows = np.arange(200)
    assert not by_group([(y, p, rows, owner)], {"few": {"ten": np.full(200, True)}})
    predicted, _ = binned_calibration(y, p, owner)
    assert not predicted.size


def test_a_perfect_area_is_as_sure_as_its_subjects_are_many():
    y, owner = np.repeat([True, False], 50), np.repeat(np.arange(20), 5)
    found, by_rows = delong(y, y, owner), delong(y, y)
    assert found.value == 1
    assert found.ci_low == pytest.approx(0.025 ** (1 / 10))
    assert found.ci_low < by_rows.ci_low


def test_shares_of_all_or_none_are_bounded_by_subjects():
    owner = np.repeat(np.arange(25), 4)
    sample = Sample(np.ones(100), np.full(100, 0.5), owner)
    every = np.full(100, True)
    assert Proportion.over_splits([(sample, every, every)]) == Proportion.of(25, 25)
    assert str(Proportion.over_splits([(sample, ~every, every)])) == "–"  # of nobody


def test_calibration_in_the_large_covers_with_rows_of_one_subject():
    rng, covered, times = np.random.default_rng(7), 0, 200
    for _ in range(times):
        owner = np.repeat(np.arange(200), 6)
        risk = expit(rng.normal(size=200) - 1)
        y = (rng.random(200) < risk)[owner]
        p = expit(logit(risk)[owner])
        groups = {"all": {"of them": np.full(1200, True)}}
        (group,) = by_group([(y, p, np.arange(1200), owner)], groups)
        covered += group.in_the_large[1] <= 0 <= group.in_the_large[2]
    assert covered / times > 0.9
