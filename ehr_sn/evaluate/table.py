"""Results → tables that a person reads in a terminal, 80 columns wide."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from ehr_sn.models.train import NOTHING, REFERENCE

SN = "sparsity_normalization"
ESTABLISHED = 0.05
SHORT = {
    SN: "SN",
    "multiple_imputation": "multiple",
    "hist_gradient_boosting": "hist_grad_boosting",
    "masked_copies": "masked",
    "sparse_autoencoder": "sparse_ae",
}

Results = Sequence[dict[str, Any]]


def headline(results: Results) -> list[Table]:
    """Without SN against with SN, a disease a row; one table an architecture and scaler."""
    tables = []
    for architecture, scaler in _distinct(results, "architecture", "scaler"):
        of_both = [r for r in results if (r["architecture"], r["scaler"]) == (architecture, scaler)]
        found = {(r["disease"], r["method"]): r for r in of_both}
        table = plain_table(f"Sparsity Normalization · {architecture} · {scaler} scaler")
        table.add_column("Disease", no_wrap=True)
        for column in ("w/o SN", "w/ SN", "Difference [95 % CI]", "p (Holm)"):
            table.add_column(column, justify="right", no_wrap=True)
        for (disease,) in _distinct(of_both, "disease"):
            without, with_sn = found.get((disease, REFERENCE)), found.get((disease, SN))
            if without and with_sn:
                table.add_row(
                    _words(disease),
                    _mean_sd(without),
                    _mean_sd(with_sn),
                    _difference(with_sn),
                    p_value(with_sn["delta_p_holm"]),
                )
        if table.rows:
            tables.append(table)
    return tables


def all_methods(results: Results) -> list[Table]:
    """Every method's AUROC, a disease a column; one table an architecture and scaler.

    Baselines and blends share a table of their own, the last. ▲ and ▼ mark a method that differs
    from zero imputation beyond chance (Holm-corrected p below 0.05), upwards or downwards. The last
    column is the time that a split took, in seconds.
    """
    tables = []
    networks = [r for r in results if r["method"] != NOTHING]
    for architecture, scaler in _distinct(networks, "architecture", "scaler"):
        of_both = [
            r for r in networks if (r["architecture"], r["scaler"]) == (architecture, scaler)
        ]
        title = f"All methods · {architecture} · {scaler} scaler"
        tables.append(_by_disease(title, "method", of_both))
    baselines = [r for r in results if r["method"] == NOTHING]
    if baselines:
        title = "Baselines and blends" if _blends(results) else "Baselines"
        tables.append(_by_disease(title, "architecture", baselines))
    return tables


def _by_disease(title: str, key: str, results: Results) -> Table:
    found = {(r[key], r["disease"]): r for r in results}
    diseases = _distinct(results, "disease")
    table = plain_table(title)
    table.padding = 0  # six numbers and a long name are to fit 80 columns
    table.add_column(key.capitalize() if key == "method" else "", no_wrap=True)
    for (disease,) in diseases:
        table.add_column(_abbreviated(_words(disease)), justify="right", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for (name,) in _distinct(results, key):
        cells = [found.get((name, disease)) for (disease,) in diseases]
        shown = [f"{_short(r)}{_mark(r)}" if r else "" for r in cells]
        seconds = next(r["impute_seconds"] + r["fit_seconds"] for r in cells if r)
        for long, short in SHORT.items():
            name = name.replace(long, short)
        table.add_row(name, *shown, f"{seconds:.0f}")
    return table


def explain(results: Results) -> str:
    """What the numbers in those of the tables that there are mean."""
    seeds, splits = len(results[0]["auroc_per_seed"]), results[0]["n_splits"]
    over_splits = f", each seed's value being its mean over {splits} splits" if splits > 1 else ""
    not_narrowed = " Repeating splits does not narrow it." if splits > 1 else ""
    trials = results[0]["trials"]
    tuned = f" Tuned: {trials} trials each, on tuning rows." if trials else ""
    means = [f" {name}: the mean of {members}." for name, members in _blends(results).items()]
    sn = f"SN: {SN}. " if any(SN in r["method"] for r in results) else ""
    difference = (
        "Difference: seed-averaged predictions with SN minus without; paired DeLong's interval "
        f"and p, Holm-corrected over the diseases.{not_narrowed} "
    )
    marks = (
        f"▲ ▼: differs from zero imputation, p < {ESTABLISHED} (paired DeLong, Holm over the "
        "diseases; baselines: from that of the first architecture). "
    )
    return (
        f"{sn}AUROC on held-out subjects: mean ± sd over {seeds} seeds{over_splits}. "
        f"{difference if headline(results) else ''}"
        f"{marks if any(r['delta_p_holm'] is not None for r in results) else ''}"
        f"s: seconds a split, filling and training.{tuned}{''.join(means)}"
    )


def _blends(results: Results) -> dict[str, str]:
    """Name → what it is the mean of."""
    return {r["architecture"]: r["blend_of"] for r in results if r["blend_of"]}


def plain_table(title: str) -> Table:
    """An empty table in the house's style."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def as_text(*shown: RenderableType, width: int = 100) -> str:
    """What a terminal would show of tables and sentences, without colours."""
    written = StringIO()
    console = Console(file=written, width=width)
    for one in shown:
        console.print(one, "", highlight=False)
    return written.getvalue()


def _distinct(results: Results, *keys: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in results))


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _abbreviated(words: str, width: int = 10) -> str:
    """Each word on a line of its own, cut to `width` characters."""
    cut = (w if len(w) <= width else w[: width - 1] + "." for w in words.split())
    return "\n".join(cut)


def _mean_sd(result: dict[str, Any]) -> str:
    sd = result["auroc_std"]
    return f"{result['auroc_mean']:.3f}" + (f" ± {sd:.3f}" if sd is not None else "")


def _short(result: dict[str, Any]) -> str:
    """Mean and sd without spaces and leading zeros: .781±.004"""
    return _mean_sd(result).replace(" ", "").replace("0.", ".")


def _difference(result: dict[str, Any]) -> str:
    keys = ("delta_auroc", "delta_ci_low", "delta_ci_high")
    difference, low, high = (f"{result[key]:+.3f}".replace("0.", ".") for key in keys)
    return f"{difference} [{low}, {high}]"


def p_value(p: float | None) -> str:
    """A p-value as tables show it; a dash where there is none."""
    return "–" if p is None or p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _mark(result: dict[str, Any]) -> str:
    p = result["delta_p_holm"]
    if p is None or p >= ESTABLISHED:
        return " "
    return "▲" if result["delta_auroc"] > 0 else "▼"
