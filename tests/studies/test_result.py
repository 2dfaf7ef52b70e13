"""A study's scores become tests, ranks, tables and figures."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from ehr_sn.evaluate.statistics import holm
from ehr_sn.evaluate.table import as_text
from ehr_sn.studies import CountCurve, Part, Score, StudyResult, count_curve, count_edges

SETTINGS = ("a", "b", "c")
OFFSET = {"zero": 0.0, "sparsity_normalization": 0.03, "worse": -0.05}


def scores(repeats: int = 6) -> list[Score]:
    rng = np.random.default_rng(0)
    found = []
    for setting in SETTINGS:
        shared = rng.normal(0.8, 0.05, repeats)  # a repeat is easier or harder for all variants
        for variant, offset in OFFSET.items():
            values = shared + offset + rng.normal(0, 0.01, repeats)
            found += [Score(setting, variant, i, "AUROC", float(v)) for i, v in enumerate(values)]
    return found


def result(parts: list[Part], **changes: object) -> StudyResult:
    about = {
        "study": "uci",
        "title": "Tables",
        "metric": "AUROC",
        "higher_is_better": True,
        "reference": "zero",
        "sn": "sparsity_normalization",
        "repeats_are": "6 seeds",
        "rankings": {"all": SETTINGS},
    }
    return StudyResult(parts=tuple(parts), **(about | changes))


@pytest.fixture
def compared() -> StudyResult:
    return result([Part(tuple(scores()))])


def test_variants_are_paired_by_repeat_whatever_order_they_come_in(compared: StudyResult) -> None:
    a = list(compared.values("a", "sparsity_normalization").values())
    b = list(compared.values("a", "zero").values())
    test, _ = compared.tests["a", "sparsity_normalization"]
    expected = ttest_rel(a, b)
    assert test.p == pytest.approx(expected.pvalue)
    assert (test.ci_low, test.ci_high) == pytest.approx(tuple(expected.confidence_interval()))
    of_sn = [compared.tests[setting, "sparsity_normalization"] for setting in SETTINGS]
    assert [p for _, p in of_sn] == pytest.approx(holm([test.p for test, _ in of_sn]))
    shuffled = list(np.random.default_rng(1).permutation(scores()))
    again = result([Part(tuple(shuffled[:20])), Part(tuple(shuffled[20:]))])
    assert again.tests["a", "sparsity_normalization"][0].p == pytest.approx(test.p)


def test_a_repeat_that_the_reference_lacks_is_not_compared() -> None:
    some = [s for s in scores() if (s.variant, s.repeat) != ("zero", 3)]
    tests = result([Part(tuple(some))]).tests
    assert {test.n for test, _ in tests.values()} == {5}


def test_repeats_that_share_rows_widen_the_interval(compared: StudyResult) -> None:
    plain, _ = compared.tests["b", "worse"]
    shared, _ = result([Part(tuple(scores()))], test_train_ratio=0.25).tests["b", "worse"]
    assert shared.mean == plain.mean
    assert shared.se / plain.se == pytest.approx(math.sqrt((1 / 6 + 1 / 4) / (1 / 6)))
    assert shared.p > plain.p


def test_better_is_lower_for_an_error(compared: StudyResult) -> None:
    assert compared.record("sparsity_normalization").wins == 3
    assert compared.record("worse").losses == 3
    assert compared.friedman["all"].mean_ranks[1] == 1
    error = result([Part(tuple(scores()))], higher_is_better=False)
    assert error.record("worse").wins == 3
    assert error.friedman["all"].mean_ranks[2] == 1


def test_the_tables_are_in_the_papers_form(compared: StudyResult) -> None:
    shown = as_text(*compared.tables(), compared.explain())
    assert "w/o SN" in shown
    assert "p (Holm)" in shown
    mean = compared.mean_sd("a", "zero")
    assert f"{mean.mean:.3f} ± {mean.sd:.3f}" in shown
    assert "paired" in shown
    assert "critical difference" in shown


def test_one_repeat_has_a_difference_and_no_interval() -> None:
    single = result([Part(tuple(scores(repeats=1)))])
    assert math.isnan(single.tests["a", "worse"][0].p)
    assert "nan" not in as_text(*single.tables())
    assert not any(math.isnan(v) for v in single.as_metrics("worse").values())


def test_what_goes_to_mlflow_names_metric_and_setting(compared: StudyResult) -> None:
    metrics = compared.as_metrics("sparsity_normalization")
    assert metrics["AUROC/a"] == compared.mean_sd("a", "sparsity_normalization").mean
    assert metrics["delta_ci_low/a"] < metrics["delta/a"] < metrics["delta_ci_high/a"]
    assert metrics["rank/all"] == 1
    assert len(compared.per_repeat("zero")["AUROC_repeat/b"]) == 6


def test_a_part_survives_the_disk() -> None:
    curve = CountCurve("a", "zero", (12.0,), (3.5,), (0.25,), (0.5,))
    part = Part(tuple(scores(1)), (curve,), {"a · zero": "lr 0.01"}, 2.5)
    assert Part.from_json(part.to_json()) == part


def test_curves_of_repeats_are_averaged_by_their_items_and_small_bins_left_out() -> None:
    edges = count_edges([1, 1, 5, 5, 9, 9], bins=3)
    first = count_curve("a", "zero", [1] * 30 + [9] * 5, [0.2] * 30 + [0.9] * 5, [0] * 35, edges)
    second = count_curve("a", "zero", [1] * 10 + [9] * 4, [0.6] * 10 + [0.9] * 4, [1] * 14, edges)
    merged = result([Part((), (first,)), Part((), (second,))]).curve("a", "zero")
    assert merged.n == (40,)
    assert merged.prediction == pytest.approx((0.3,))
    assert merged.outcome == pytest.approx((0.25,))


def test_every_setting_has_its_figure_of_the_bias_and_every_ranking_its_own() -> None:
    curves = [
        CountCurve("a", variant, (20.0, 20.0), (1.0, 2.0), (0.3, 0.4), (0.5, 0.5))
        for variant in ("zero", "sparsity_normalization")
    ]
    figures = result([Part(tuple(scores()), tuple(curves))]).figures()
    assert set(figures) == {"sparsity_bias/a.png", "critical_difference/all.png"}
    lines = figures["sparsity_bias/a.png"].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["zero", "SN", "observed outcome"]


def test_bars_join_what_the_ranks_cannot_tell_apart(compared: StudyResult) -> None:
    ranks = compared.friedman["all"]
    assert sorted(ranks.mean_ranks) == [1, 2, 3]
    assert 1 < ranks.critical_difference < 2
    _, *bars = compared.figures()["critical_difference/all.png"].axes[0].get_lines()
    assert [tuple(bar.get_ydata()) for bar in bars] == [(0, 1), (1, 2)]
