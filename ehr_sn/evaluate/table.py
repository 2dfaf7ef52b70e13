"""Results → tables that a person reads in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ehr_sn.models.train import REFERENCE

SN = "sparsity_normalization"
ESTABLISHED = 0.05

Results = Sequence[dict[str, Any]]


def headline(results: Results) -> list[Table]:
    """Without SN against with SN, a disease and architecture a row; one table a scaler."""
    tables = []
    for scaler in _distinct(results, "scaler"):
        found = {
            (r["disease"], r["architecture"], r["method"]): r
            for r in results
            if r["scaler"] == scaler
        }
        rows = [
            (disease, architecture, without, with_sn)
            for disease in _distinct(results, "disease")
            for architecture in _distinct(results, "architecture")
            if (without := found.get((disease, architecture, REFERENCE)))
            and (with_sn := found.get((disease, architecture, SN)))
        ]
        if not rows:
            continue
        table = Table(title=f"Sparsity Normalization · scaler {scaler}", title_justify="left")
        for column in ("Disease", "Architecture"):
            table.add_column(column)
        for column in ("w/o SN", "w/ SN", "Difference [95 % CI]", "p (Holm)"):
            table.add_column(column, justify="right", no_wrap=True)
        previous = None
        for disease, architecture, without, with_sn in rows:
            if previous not in (None, disease):
                table.add_section()
            table.add_row(
                "" if disease == previous else _words(disease),
                architecture,
                _mean_sd(without),
                _mean_sd(with_sn),
                _difference(with_sn),
                _p(with_sn[f"minus_{REFERENCE}_p_holm"]),
            )
            previous = disease
        tables.append(table)
    return tables


def all_methods(results: Results) -> Table:
    """Every method's AUROC, a disease a column.

    ▲ and ▼ mark a method that differs from zero imputation beyond chance (Holm-corrected p below
    0.05), upwards or downwards.
    """
    diseases = _distinct(results, "disease")
    found = {(r["scaler"], r["architecture"], r["method"], r["disease"]): r for r in results}
    table = Table(title="All methods", title_justify="left")
    for column in ("Architecture", "Scaler", "Method"):
        table.add_column(column, no_wrap=True)
    for disease in diseases:
        table.add_column(_words(disease), justify="right")
    for architecture in _distinct(results, "architecture"):
        for scaler in _distinct(results, "scaler"):
            for method in _distinct(results, "method"):
                cells = [found.get((scaler, architecture, method, d)) for d in diseases]
                if any(cells):
                    shown = [_mean_sd(r) + _mark(r) if r else "" for r in cells]
                    table.add_row(architecture, scaler, method, *shown)
        table.add_section()
    return table


def explain(results: Results) -> str:
    """What the numbers in both tables are."""
    seeds = len(results[0]["auroc_per_seed"])
    splits = results[0]["n_splits"]
    return (
        f"AUROC on held-out subjects: mean ± sd over {seeds} seeds"
        + (f", each seed's value being its mean over {splits} splits. " if splits > 1 else ". ")
        + "Difference, interval and p: seed-averaged predictions with SN minus without, paired "
        "DeLong, Holm-corrected over the diseases"
        + ("; not narrowed by repeating splits." if splits > 1 else ".")
        + " ▲ ▼: differs from zero imputation, corrected p < 0.05."
    )


def _distinct(results: Results, key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in results))


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _mean_sd(result: dict[str, Any]) -> str:
    sd = result["auroc_std"]
    return f"{result['auroc_mean']:.3f}" + (f" ± {sd:.3f}" if sd is not None else "")


def _difference(result: dict[str, Any]) -> str:
    low, high = result[f"minus_{REFERENCE}_ci_low"], result[f"minus_{REFERENCE}_ci_high"]
    return f"{result[f'minus_{REFERENCE}']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _mark(result: dict[str, Any]) -> str:
    p = result[f"minus_{REFERENCE}_p_holm"]
    if p is None or p >= ESTABLISHED:
        return "  "
    return " ▲" if result[f"minus_{REFERENCE}"] > 0 else " ▼"
