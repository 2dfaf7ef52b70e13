"""Tables fit a terminal of 80 columns, whatever was compared."""

from io import StringIO

from rich.console import Console

from ehr_sn.config import BASELINES
from ehr_sn.evaluate.table import SN, all_methods, explain
from ehr_sn.models.methods import method_names

DISEASES = ("cardiovascular", "fatty_liver", "hypertension", "heart_failure", "diabetes")


def result(method: str, architecture: str, disease: str) -> dict:
    return {
        "method": method,
        "architecture": architecture,
        "scaler": "none" if method == "none" else "standard",
        "disease": disease,
        "blend_of": "zero · standard · mlp, xgboost" if architecture == "both" else "",
        "auroc_per_seed": [0.7, 0.72],
        "n_splits": 3,
        "trials": 0,
        "auroc_mean": 0.7123,
        "auroc_std": 0.0042,
        "delta_auroc": 0.01,
        "delta_ci_low": -0.01,
        "delta_ci_high": 0.03,
        "delta_p_holm": None if method == "zero" else 0.01,
        "impute_seconds": 60.4,
        "fit_seconds": 60.4,
    }


def printed(results: list[dict]) -> str:
    out = StringIO()
    console = Console(file=out, width=80)
    for table in all_methods(results):
        console.print(table)
    return out.getvalue()


def test_every_method_and_baseline_is_a_row_with_its_seconds_in_80_columns() -> None:
    pairs = [(name, "mlp") for name in method_names()] + [("none", name) for name in BASELINES]
    said = printed([result(*pair, disease) for pair in pairs for disease in DISEASES])
    rows = [line for line in said.splitlines() if ".712±.004" in line]
    assert len(rows) == len(pairs)
    assert all(
        row.count(".712±.004") == 5 and row.endswith(" 121") for row in map(str.rstrip, rows)
    )
    assert "All methods · mlp · standard scaler" in said
    assert "Baselines" in said
    assert "…" not in said


def test_a_blend_stands_below_the_baselines_and_is_explained() -> None:
    pairs = [("zero", "mlp"), ("none", "xgboost"), ("none", "both")]
    results = [result(*pair, disease) for pair in pairs for disease in DISEASES]
    assert "Baselines and blends" in printed(results)
    assert "both: the mean of zero · standard · mlp, xgboost." in explain(results)
    assert "Baselines and blends" not in printed(results[:-5])
    assert "the mean of zero" not in explain(results[:-5])


def test_what_no_table_shows_is_not_explained() -> None:
    zero, mask, sn = ([result(m, "mlp", "diabetes")] for m in ("zero", "zero+mask", SN))
    for results, told in [
        (zero, ()),
        (zero + mask, ("▲ ▼:",)),
        (zero + sn, (f"SN: {SN}.", "with SN minus without", "▲ ▼:")),
    ]:
        said = explain(results)
        assert "AUROC on held-out subjects" in said
        for part in (f"SN: {SN}.", "with SN minus without", "▲ ▼:"):
            assert (part in said) == (part in told)
