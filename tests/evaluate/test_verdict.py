"""The sentences say what the tests say, losses as plainly as wins."""

import pytest

from ehr_sn.evaluate.diagnostics import LeakAudit, MaskLeak
from ehr_sn.evaluate.statistics import AUROC
from ehr_sn.evaluate.verdict import (
    on_leaks,
    on_ranks,
    on_robustness,
    on_sparsity_normalization,
    recommendation,
)

DISEASES = ("diabetes", "heart_failure")
BEST = ("zero+mask", "standard", "mlp")


def result(method, disease, delta=None, p=None, auroc=0.8):
    """A flat result; its interval leaves out zero where p (uncorrected, say) is below 0.05."""
    half = None if delta is None else abs(delta) * (0.5 if p < 0.05 else 2)
    return {
        "disease": disease,
        "architecture": "mlp",
        "scaler": "standard",
        "method": method,
        "auroc_mean": auroc,
        "auroc_ensemble": auroc,
        "delta_auroc": delta,
        "delta_ci_low": None if delta is None else delta - half,
        "delta_ci_high": None if delta is None else delta + half,
        "delta_p_holm": p,
    }


def results(method, *of_diseases):
    return [result("zero", d) for d in DISEASES] + [
        result(method, d, delta, p, 0.8 + delta)
        for d, (delta, p) in zip(DISEASES, of_diseases, strict=True)
    ]


def said(sentences):
    return " ".join(sentences)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([(0.03, 0.01), (0.02, 0.01)], "sure; it is established for every disease"),
        ([(0.03, 0.01), (0.01, 0.4)], "it is established for Diabetes (corrected"),
        ([(0.03, 0.20), (0.01, 0.4)], "How sure: not established."),
    ],
)
def test_how_sure_follows_from_the_corrected_tests(differences, expected):
    text = said(recommendation(results("zero+mask", *differences), BEST))
    assert "ahead in 2 of 2 diseases" in text
    assert expected in text
    assert "worse" not in text


def test_a_baseline_or_blend_goes_by_its_own_name():
    best = ("none", "none", "recipe+boosting")
    cells = [
        r | dict(zip(("method", "scaler", "architecture"), best, strict=True))
        for r in results("zero+mask", (0.03, 0.01), (0.02, 0.01))[2:]
    ]
    assert recommendation(cells, best)[0].startswith("Use recipe+boosting: it had")


def test_a_best_method_that_is_worse_somewhere_is_said_to_be():
    text = said(recommendation(results("zero+mask", (0.03, 0.01), (-0.03, 0.01)), BEST))
    assert "ahead in 1 of 2 diseases, by +0.000" in text
    assert "surely worse for Heart failure" in text


def test_zero_imputation_may_win():
    text = said(recommendation(results("zero+mask", (0.0, 1), (0.0, 1)), ("zero", *BEST[1:])))
    assert "No way of handling missing entries did better" in text


def test_sparsity_normalizations_losses_are_counted_like_its_wins():
    cells = results("sparsity_normalization", (-0.03, 0.01), (-0.02, 0.3))
    (text,) = on_sparsity_normalization(cells)
    assert "0 won, 1 tied, 1 lost" in text
    assert "−0.025" in text or "-0.025" in text
    assert "surely worse for Diabetes · mlp" in text
    assert "better" not in text
    assert on_sparsity_normalization(results("mean", (0, 1), (0, 1))) == []


def test_ranks_that_cannot_be_told_apart_are_said_to_be_so():
    (text,) = on_ranks(results("zero+mask", (0.03, 0.01), (0.01, 0.4)))
    assert "none of the others can be told from it" in text
    assert on_ranks([result("zero", "diabetes")]) == []


def test_telling_features_are_a_warning_beside_the_verdict():
    area = AUROC.from_se(0.7, 0.01, n=900, n_positive=90)
    leak = MaskLeak("LBXGLT", "absent", area)
    audits = [
        LeakAudit("diabetes", area, area, (leak,), (leak,)),
        LeakAudit("stroke", area, area, (leak,), ()),
    ]
    (text,) = on_leaks(audits)
    assert "tells Diabetes (LBXGLT absent). What" in text
    assert on_leaks(audits[1:]) == []


def test_the_most_robust_method_is_named_even_if_it_is_not_the_best():
    zero, masked = ("zero", "standard", "mlp"), ("zero", "standard", "mlp_masked")
    (text,) = on_robustness({BEST: 0.08, zero: 0.06, masked: 0.05}, BEST)
    assert "zero+mask (mlp) loses 0.080 AUROC and zero (mlp) 0.060" in text
    assert text.endswith("zero (mlp_masked) loses least, 0.050.")
    assert on_robustness({}, BEST) == []
