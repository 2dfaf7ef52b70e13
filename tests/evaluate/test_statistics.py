import warnings
from dataclasses import FrozenInstanceError
from itertools import permutations, product
from math import factorial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import binomtest, f, friedmanchisquare, kstest, norm, rankdata
from sklearn.metrics import roc_auc_score

from ehr_sn.evaluate.metrics import auroc
from ehr_sn.evaluate.statistics import (
    AUROC,
    PairedAUROC,
    bootstrap_over_splits,
    delong,
    delong_covariance,
    friedman,
    holm,
    mean_sd,
    over_splits,
    paired_bootstrap,
    paired_delong,
    win_tie_loss,
)


def two_scores(rng, n, *, gain_a=1.0, gain_b=1.0, prevalence=0.3, correlation=0.6):
    """Labels and two correlated normal scores, each shifted by its gain for a positive."""
    y = rng.random(n) < prevalence
    shared, own = rng.normal(size=n), rng.normal(size=(2, n))
    noise = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return y, *(noise + np.array([[gain_a], [gain_b]]) * y)


def by_definition(y, scores):
    """AUROCs and their covariance from all m × n comparisons, as DeLong et al. wrote them."""
    y = np.asarray(y, dtype=bool)
    cases, controls = scores[:, y, None], scores[:, None, ~y]
    psi = (cases > controls) + 0.5 * (cases == controls)
    v10, v01 = psi.mean(axis=2), psi.mean(axis=1)
    return psi.mean(axis=(1, 2)), np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


@pytest.mark.parametrize("decimals", [0, 1, 8], ids=["most tied", "some tied", "none tied"])
def test_areas_and_covariance_are_those_of_all_pairwise_comparisons(decimals):
    y, a, b = two_scores(np.random.default_rng(decimals), 150)
    scores = np.stack([a, b, a + b, -a]).round(decimals)
    areas, covariance = delong_covariance(y, scores)
    expected_areas, expected_covariance = by_definition(y, scores)
    assert_allclose(areas, expected_areas, rtol=1e-12)
    assert_allclose(covariance, expected_covariance, rtol=1e-9, atol=1e-15)


def test_the_rating_data_of_hanley_and_mcneil_give_the_published_interval():
    """109 CT images rated 1 to 5 (Radiology 143:29, 1982), with Stata's `roctab` as the reference:
    area 0.8932, DeLong standard error 0.0307, interval 0.83295 to 0.95339.
    """
    ratings = np.arange(1, 6)
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    score = np.concatenate([np.repeat(ratings, normal), np.repeat(ratings, abnormal)])
    result = delong(np.repeat([0, 1], [58, 51]), score)
    assert (result.n, result.n_positive) == (109, 51)
    assert result.value == pytest.approx(0.8932, abs=5e-5)
    assert result.se == pytest.approx(0.0307, abs=5e-5)
    assert result.ci_low == pytest.approx(0.83295, abs=5e-6)
    assert result.ci_high == pytest.approx(0.95339, abs=5e-6)


def test_single_and_paired_results_agree_with_the_covariance_matrix():
    y, a, b = two_scores(np.random.default_rng(0), 300, gain_a=1.5)
    areas, covariance = delong_covariance(y, np.stack([a, b]))
    one, paired = delong(y, a), paired_delong(y, a, b)
    assert one.value == areas[0] == pytest.approx(roc_auc_score(y, a), abs=1e-14)
    assert one.se == pytest.approx(np.sqrt(covariance[0, 0]))
    assert paired.difference == pytest.approx(areas[0] - areas[1], abs=1e-14)
    assert paired.se == pytest.approx(np.sqrt([1, -1] @ covariance @ [1, -1]))
    assert paired.p == pytest.approx(2 * norm.sf(abs(paired.difference) / paired.se))
    assert (one.n, one.n_positive) == (paired.n, paired.n_positive) == (300, y.sum())


def test_standard_errors_are_close_to_the_bootstraps():
    rng = np.random.default_rng(1)
    y, a, b = two_scores(rng, 400)
    cases, controls = np.flatnonzero(y), np.flatnonzero(~y)
    areas = np.array(
        [
            auroc(y[rows], np.stack([a, b])[:, rows])
            for rows in (
                np.concatenate([rng.choice(cases, cases.size), rng.choice(controls, controls.size)])
                for _ in range(600)
            )
        ]
    )
    assert delong(y, a).se == pytest.approx(areas[:, 0].std(), rel=0.1)
    assert paired_delong(y, a, b).se == pytest.approx((areas[:, 0] - areas[:, 1]).std(), rel=0.1)


def test_the_interval_covers_the_true_area_about_95_percent_of_the_time():
    rng = np.random.default_rng(2)
    truth = norm.cdf(1 / np.sqrt(2))
    results = [delong(*two_scores(rng, 250)[:2]) for _ in range(800)]
    assert 0.93 < np.mean([r.ci_low <= truth <= r.ci_high for r in results]) < 0.97


def test_p_values_are_uniform_when_there_is_no_difference():
    rng = np.random.default_rng(3)
    p = [paired_delong(*two_scores(rng, 250)).p for _ in range(800)]
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.07


def test_a_real_difference_is_found_and_its_interval_leaves_out_zero():
    result = paired_delong(*two_scores(np.random.default_rng(4), 2000, gain_a=1.4))
    assert result.p < 1e-6
    assert 0 < result.ci_low < result.difference < result.ci_high


def test_pairing_narrows_the_interval_of_correlated_predictions():
    y, a, b = two_scores(np.random.default_rng(5), 500, correlation=0.9)
    assert paired_delong(y, a, b).se < 0.6 * np.hypot(delong(y, a).se, delong(y, b).se)


def test_exchanging_the_predictions_changes_only_the_sign():
    y, a, b = two_scores(np.random.default_rng(6), 200, gain_b=1.3)
    ab, ba = paired_delong(y, a, b), paired_delong(y, b, a)
    assert (ba.difference, ba.se, ba.p) == (-ab.difference, ab.se, ab.p)
    assert (ba.ci_low, ba.ci_high) == (-ab.ci_high, -ab.ci_low)


@pytest.mark.parametrize("relation", [lambda a: a, lambda a: 3 * a - 1, np.exp])
def test_predictions_that_rank_alike_differ_by_exactly_zero_without_a_warning(relation):
    y, a, _ = two_scores(np.random.default_rng(7), 333)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_delong(y, a, relation(a))
    assert (result.difference, result.se, result.p) == (0, 0, 1)
    assert (result.ci_low, result.ci_high) == (0, 0)


def test_a_difference_without_any_spread_is_no_proof():
    y = np.array([0] * 7 + [1] * 3)
    assert np.isnan(paired_delong(y, y, np.zeros(10)).p)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 50), (50, 3), (200, 400)])
def test_a_perfect_prediction_has_the_exact_interval_of_its_disjoint_pairs(m, n):
    y, score = np.repeat([0, 1], [n, m]), np.arange(n + m)
    exact = binomtest(min(m, n), min(m, n)).proportion_ci(method="exact")
    best, worst = delong(y, score), delong(y, -score)
    assert (best.value, best.ci_high) == (1, 1)
    assert best.ci_low == pytest.approx(exact.low)
    assert (worst.value, worst.ci_low, worst.ci_high) == (0, 0, pytest.approx(1 - exact.low))
    combined = over_splits([best] * 3)
    assert (combined.ci_low, combined.ci_high) == (pytest.approx(exact.low), 1)


def test_a_perfect_split_widens_the_interval_over_splits_as_a_split_of_few_subjects():
    y, score, _ = two_scores(np.random.default_rng(3), 60)
    usual, perfect = delong(y, score), delong([0] * 40 + [1] * 4, range(44))
    combined = over_splits([usual, perfect])
    assert combined.value == pytest.approx((usual.value + 1) / 2)
    assert combined.se > usual.se


@pytest.mark.parametrize(("m", "n", "gain"), [(3, 20, 2.0), (5, 50, 3.0)])
def test_the_interval_of_perfect_predictions_misses_the_truth_rarely(m, n, gain):
    """Over all samples, perfect ones that miss the truth are at most 2.5%."""
    rng, y = np.random.default_rng(5), np.repeat([0, 1], [n, m])
    samples = [delong(y, rng.normal(size=n + m) + gain * y) for _ in range(2000)]
    truth = norm.cdf(gain / np.sqrt(2))
    perfect = [sample for sample in samples if sample.value == 1]
    assert len(perfect) > 200
    assert sum(truth < sample.ci_low for sample in perfect) <= 0.025 * len(samples)


def test_a_prediction_that_is_all_ties_is_no_better_than_chance_for_certain():
    result = delong([0, 0, 1, 1], [1, 1, 1, 1])
    assert (result.value, result.se) == (0.5, 0)


def test_an_interval_never_leaves_the_possible_range():
    result = delong([0, 0, 0, 1, 1, 1], [1, 2, 5, 4, 6, 7])
    assert result.value + 1.96 * result.se > 1
    assert result.ci_high == 1
    assert PairedAUROC.from_se(-0.9, 0.5, n=9, n_positive=3).ci_low == -1


def test_a_single_positive_has_an_area_but_no_interval_and_no_warning():
    y, a, b = [0, 0, 0, 1], [1, 2, 4, 3], [1, 2, 3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, paired = delong(y, a), paired_delong(y, a, b)
    assert one.value == pytest.approx(2 / 3)
    assert np.isnan([one.se, one.ci_low, one.ci_high, paired.se, paired.p]).all()


@pytest.mark.parametrize("test", [delong, lambda y, s: paired_delong(y, s, s)])
def test_one_class_is_an_error_that_says_what_to_do(test):
    with pytest.raises(ValueError, match="only one class among 3 labels"):
        test([1, 1, 1], [0.1, 0.2, 0.3])


def test_many_predictions_where_one_is_meant_are_refused():
    with pytest.raises(ValueError, match="y has shape"):
        delong([0, 1, 1], [[0.1, 0.2, 0.3]] * 2)


def test_holm_gives_the_adjusted_p_values_worked_out_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, and never falling: .06 at the end
    assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_never_lowers_a_p_value():
    p = np.random.default_rng(8).random(20)
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert adjusted.max() == 1
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_holm_passes_over_tests_that_could_not_be_made():
    assert_allclose(holm([np.nan, 0.02, np.nan, 0.01]), [np.nan, 0.02, np.nan, 0.02])
    assert holm([]).shape == (0,)
    assert np.isnan(holm([np.nan])).all()


def test_holm_refuses_what_is_not_a_p_value():
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.2, 1.2])


@pytest.mark.parametrize("repeats", [1, 2, 50])
def test_repeating_a_split_neither_moves_nor_narrows_its_result(repeats):
    y, a, b = two_scores(np.random.default_rng(9), 200)
    for result in (delong(y, a), paired_delong(y, a, b)):
        combined = over_splits([result] * repeats)
        assert type(combined) is type(result)
        assert_allclose(list(combined.as_metrics().values()), list(result.as_metrics().values()))


def test_over_splits_averages_values_and_variances_and_is_at_least_as_wide_as_the_mean_split():
    rng = np.random.default_rng(10)
    splits = [paired_delong(*two_scores(rng, n, gain_a=1.2)) for n in (100, 200, 401)]
    combined = over_splits(splits)
    se = np.array([split.se for split in splits])
    assert combined.difference == pytest.approx(np.mean([split.difference for split in splits]))
    assert combined.se == pytest.approx(np.sqrt(np.mean(se**2)))
    assert combined.se >= se.mean()
    assert combined.p == pytest.approx(2 * norm.sf(combined.difference / combined.se))
    assert combined.ci_high - combined.ci_low == pytest.approx(2 * norm.ppf(0.975) * combined.se)
    assert combined.n == 234


def test_over_splits_is_conservative_for_held_out_sets_that_share_subjects():
    """Splits drawn from a cohort that is itself drawn anew: the interval covers at least 95%."""
    rng = np.random.default_rng(11)
    truth = norm.cdf(1 / np.sqrt(2))

    def covered():
        y, score, _ = two_scores(rng, 400)
        held_out = [rng.permutation(400)[:200] for _ in range(5)]
        combined = over_splits([delong(y[rows], score[rows]) for rows in held_out])
        return combined.ci_low <= truth <= combined.ci_high

    assert np.mean([covered() for _ in range(200)]) >= 0.95


def test_over_splits_carries_on_what_is_unknown_in_any_split():
    known = AUROC.from_se(0.8, 0.02, n=100, n_positive=20)
    unknown = AUROC.from_se(0.7, np.nan, n=100, n_positive=1)
    combined = over_splits([known, unknown])
    assert combined.value == pytest.approx(0.75)
    assert np.isnan(combined.se)


def test_over_splits_refuses_nothing_and_mixtures():
    one, paired = (
        AUROC.from_se(0.8, 0.1, n=9, n_positive=3),
        PairedAUROC.from_se(0, 0.1, n=9, n_positive=3),
    )
    with pytest.raises(ValueError, match="no results to combine"):
        over_splits([])
    with pytest.raises(TypeError, match="different kinds"):
        over_splits([one, paired])


def test_results_cannot_be_changed_and_log_as_floats_under_their_prefix():
    y, a, b = two_scores(np.random.default_rng(12), 100)
    one, paired = delong(y, a), paired_delong(y, a, b)
    with pytest.raises(FrozenInstanceError):
        one.value = 1.0
    names = ["", "_se", "_ci_low", "_ci_high", "_n", "_n_positive"]
    assert list(one.as_metrics("held_out/auroc")) == [f"held_out/auroc{name}" for name in names]
    assert list(paired.as_metrics()) == [
        f"auroc_difference{name}" for name in [*names[:4], "_p", *names[4:]]
    ]
    logged = one.as_metrics() | paired.as_metrics()
    assert {type(value) for value in logged.values()} == {float}
    assert logged["auroc"] == one.value
    assert logged["auroc_difference"] == paired.difference


def test_results_print_themselves():
    assert str(PairedAUROC.from_se(-0.05, 0.01, n=1000, n_positive=90)) == (
        "AUROC difference -0.050 (95% CI -0.070 to -0.030, p < 0.001, paired DeLong; "
        "90 of 1,000 positive)"
    )
    assert str(mean_sd([1.0, 2.0])) == "1.500 ± 0.707 (sd of 2)"


def test_mean_sd_divides_by_n_minus_one():
    values = [0.8, 0.83, 0.79, 0.81]
    result = mean_sd(values)
    assert (result.mean, result.n) == (pytest.approx(np.mean(values)), 4)
    assert result.sd == pytest.approx(np.std(values, ddof=1))


def test_a_single_value_has_no_spread_and_no_value_no_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(mean_sd([0.8]).sd)
    with pytest.raises(ValueError, match="at least one value"):
        mean_sd([])


@pytest.mark.parametrize("decimals", [1, 8], ids=["tied", "untied"])
def test_the_paired_bootstrap_agrees_with_paired_delong(decimals):
    y, a, b = two_scores(np.random.default_rng(13), 1500, gain_a=1.3)
    a, b = a.round(decimals), b.round(decimals)
    bootstrap, exact = paired_bootstrap(y, a, b), paired_delong(y, a, b)
    assert bootstrap.difference == pytest.approx(exact.difference, abs=1e-12)
    assert bootstrap.ci_low == pytest.approx(exact.ci_low, abs=0.15 * exact.se)
    assert bootstrap.ci_high == pytest.approx(exact.ci_high, abs=0.15 * exact.se)
    assert (bootstrap.n, bootstrap.n_positive) == (exact.n, exact.n_positive)


def test_a_bootstrap_sample_is_scored_as_if_its_rows_were_written_out(monkeypatch):
    """One draw at a time, so that the drawn rows can be drawn again here."""
    monkeypatch.setattr("ehr_sn.evaluate.statistics.BLOCK", 1)
    y, a, b = two_scores(np.random.default_rng(14), 60)
    a = a.round(1)
    rng, cases, controls = np.random.default_rng(5), np.flatnonzero(y), np.flatnonzero(~y)
    differences = []
    for _ in range(40):
        drawn = np.concatenate([c[rng.integers(c.size, size=c.size)] for c in (cases, controls)])
        differences.append(roc_auc_score(y[drawn], a[drawn]) - roc_auc_score(y[drawn], b[drawn]))
    result = paired_bootstrap(y, a, b, draws=40, seed=5)
    assert_allclose([result.ci_low, result.ci_high], np.quantile(differences, [0.025, 0.975]))


def test_the_same_seed_draws_the_same_bootstrap_and_another_seed_another():
    y, a, b = two_scores(np.random.default_rng(15), 200)
    one, same, other = (paired_bootstrap(y, a, b, draws=200, seed=s) for s in (1, 1, 2))
    assert one == same != other


DEMSAR = np.array(  # ranks of C4.5, C4.5+m, C4.5+cf, C4.5+m+cf on 14 data sets
    [
        *([4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 2, 3], [4, 1, 3, 2], [4, 2, 3, 1], [1, 2.5, 4, 2.5]),
        *([3, 2, 4, 1], [2.5, 2.5, 4, 1], [4, 3, 2, 1], [2.5] * 4, [4, 2.5, 1, 2.5], [3, 2, 4, 1]),
        *([4, 1, 2, 3], [3, 1, 4, 2]),
    ]
)


def test_friedman_and_nemenyi_are_as_published():
    """The worked example of J. Demšar, JMLR 7:1 (2006), section 3.2.2."""
    result = friedman(-DEMSAR, ["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"])
    assert_allclose(result.mean_ranks, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    tied = 1 - (3 * (2**3 - 2) + 4**3 - 4) / (14 * 4 * (4**2 - 1))
    assert result.chi2 * tied == pytest.approx(9.28, abs=0.005)  # it is not corrected for ties
    assert result.critical_difference == pytest.approx(1.25, abs=0.005)
    assert result.f == pytest.approx(13 * result.chi2 / (14 * 3 - result.chi2))
    assert (result.p, result.exact) == (pytest.approx(float(f.sf(result.f, 3, 39))), False)
    assert result.alike("C4.5+m") == ("C4.5", "C4.5+cf", "C4.5+m+cf")


@pytest.mark.parametrize("decimals", [9, 1, 0])
def test_friedmans_statistic_is_scipys_with_ties_and_without(decimals):
    scores = np.random.default_rng(16).random((12, 5)).round(decimals)
    result = friedman(scores, list("abcde"))
    expected = friedmanchisquare(*scores.T)
    assert (result.chi2, result.p_chi2) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (2, 3), (3, 3), (4, 3), (2, 4), (3, 4)])
@pytest.mark.parametrize("decimals", [9, 1, 0])
def test_friedmans_p_of_few_cells_is_the_share_of_all_arrangements(n, k, decimals):
    scores = np.random.default_rng(n).random((n, k)).round(decimals)
    result = friedman(scores, [str(i) for i in range(k)])

    def apart(table):
        return np.square(rankdata(-np.array(table), axis=1).sum(axis=0)).sum()

    every = [apart(rows) for rows in product(*(list(permutations(row)) for row in scores))]
    assert result.exact
    assert result.p == pytest.approx(np.mean(np.array(every) >= apart(scores) - 1e-9))


def test_two_cells_that_agree_on_two_methods_establish_nothing():
    result = friedman([[0.8, 0.7], [0.9, 0.6]], ["a", "b"])
    assert result.p == 0.5
    assert "Friedman p = 0.500 (exact)" in str(result)
    assert friedman([[0.5, 0.5], [0.7, 0.7]], ["a", "b"]).p == 1


@pytest.mark.parametrize(("n", "k"), [(17, 2), (7, 3), (4, 4), (3, 5), (2, 8)])
def test_friedmans_exact_p_where_all_cells_agree(n, k):
    result = friedman(np.tile(np.arange(k), (n, 1)), [str(i) for i in range(k)])
    assert result.p == pytest.approx(1 / factorial(k) ** (n - 1))


def test_methods_that_rank_alike_everywhere_are_told_apart_and_equal_ones_never():
    clear = friedman(np.tile([3.0, 2.0, 1.0], (20, 1)), ["a", "b", "c"])
    assert (clear.p, clear.alike("a")) == (0, ())
    same = friedman(np.ones((20, 3)), ["a", "b", "c"])
    assert (same.p, same.alike("a")) == (1, ("b", "c"))


def test_friedman_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="two or more of each"):
        friedman([[0.8, 0.7]], ["a", "b"])
    with pytest.raises(ValueError, match="cannot rank NaN"):
        friedman([[0.8, np.nan], [0.7, 0.6]], ["a", "b"])


def test_an_unknown_interval_is_neither_won_nor_lost():
    result = win_tie_loss([(np.nan, np.nan), (0.01, 0.02)])
    assert result.as_metrics() == {"cells_wins": 1, "cells_ties": 1, "cells_losses": 0}


def test_bootstraps_of_splits_average_to_an_interval_that_repeats_never_narrow():
    y, a, b = two_scores(np.random.default_rng(17), 300)
    one = paired_bootstrap(y, a, b, draws=200)
    combined = bootstrap_over_splits([one] * 5)
    assert (combined.ci_low, combined.ci_high) == pytest.approx((one.ci_low, one.ci_high))
    assert "200 bootstrap draws" in str(combined)
