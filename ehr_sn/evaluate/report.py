"""Store + trained cells + recorded results → one self-contained HTML page and a model card.

Nothing is trained here but the leak audit's logistic regressions. Aggregates only, and none of
few subjects: the page shows no patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ehr_sn import __version__
from ehr_sn.config import BASELINES, SMALLEST_GROUP, SPLITS, Config
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate import verdict
from ehr_sn.evaluate.clinical import (
    DecisionCurve,
    GroupResult,
    OperatingPoint,
    by_group,
    decision_curve,
    operating_points,
    subject_groups,
)
from ehr_sn.evaluate.diagnostics import (
    LEAK_FROM,
    SHIFTS,
    LeakAudit,
    MissingCount,
    Shift,
    SparsityBias,
    asked_of,
    leak_audit,
    missing_table,
    sparsity_bias,
)
from ehr_sn.evaluate.figures import (
    Line,
    as_svg,
    decision_figure,
    learning_curve_figure,
    lines,
    shift_figure,
    sparsity_bias_figure,
)
from ehr_sn.evaluate.importance import (
    Importance,
    can_explain,
    integrated_gradients,
    permutation_importance,
)
from ehr_sn.evaluate.metrics import Sample
from ehr_sn.evaluate.plots import binned_calibration
from ehr_sn.evaluate.results import name_of, rank_methods, records
from ehr_sn.evaluate.small_cells import HIDDEN, shown, shown_label
from ehr_sn.evaluate.table import SN
from ehr_sn.evaluate.verdict import words
from ehr_sn.ingest.store import Store
from ehr_sn.models.predict import (
    NetworkPredictor,
    best_comparison,
    load_predictor,
    read_tuning,
)
from ehr_sn.models.train import (
    NOTHING,
    REFERENCE,
    Cell,
    Comparison,
    HeldOut,
    cell_path,
    comparisons,
    read_cell,
    reference_of,
)

SHOWN = 6
"""Methods in one figure at most: more lines cannot be told apart."""

Curves = Callable[[str, str], dict[str, dict[int, float]]]
"""(run id, how a metric's name begins) → metric → step → value."""


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a finished run: see `tracking.FinishedRun`."""

    run_id: str
    finished: str
    results: list[dict[str, Any]]
    curves: Curves


@dataclass(frozen=True)
class Report:
    """Everything on the page, each part computed when it is asked for."""

    config: Config
    store: Store
    recorded: Recorded

    @cached_property
    def best(self) -> Comparison:
        return best_comparison(self.config, self.store)

    @cached_property
    def shown(self) -> list[Comparison]:
        """What is in figures: the best, others of its scaler and architecture, the baselines.

        Where a baseline is the best, the networks are those that it is compared with.
        """
        networks = self.best
        if self.best[0] == NOTHING:
            networks = reference_of(self.config, self.best) or self.best
        every = comparisons(self.config)
        alike = [c for c in every if c[0] == NOTHING or c[1:] == networks[1:]]
        first = (REFERENCE, SN, *BASELINES[:2], f"{REFERENCE}+mask", f"{SN}+mask")
        order = {name: i for i, name in enumerate(first)}

        def place(c: Comparison) -> tuple[bool, int]:
            return c != self.best, order.get(c[2] if c[0] == NOTHING else c[0], len(first))

        return sorted(alike, key=place)[:SHOWN]

    @cached_property
    def held_out(self) -> dict[Comparison, dict[str, list[HeldOut]]]:
        """Comparison → disease → predictions, one entry a split."""
        found: dict[Comparison, dict[str, list[HeldOut]]] = {}
        for comparison in self.shown:
            cells = [
                read_cell(cell_path(self.config, self.store, Cell(*comparison, i)), self.store)
                for i in range(self.config.splits.repeats)
            ]
            found[comparison] = {d: [c.held_out[d] for c in cells] for d in self.store.diseases}
        return found

    @cached_property
    def _rows(self) -> dict[str, list[np.ndarray]]:
        """Disease → for each split the row numbers of its eligible held-out subjects."""
        labels, dealt = self.store.labels(), self.store.splits()
        return {
            disease: [
                np.flatnonzero((column == "held_out") & ~np.isnan(labels[:, i]))
                for column in dealt.T
            ]
            for i, disease in enumerate(self.store.diseases)
        }

    def _best_splits(self, disease: str) -> list[Sample]:
        return [part.sample for part in self.held_out[self.best][disease]]

    @cached_property
    def answer(self) -> list[str]:
        results = self.recorded.results
        return verdict.recommendation(results, self.best)

    @cached_property
    def evidence(self) -> list[str]:
        results = self.recorded.results
        lost: dict[Comparison, list[float]] = {}
        for r in results:
            curve = self.recorded.curves(r["run_id"], "shift_mcar_auroc").get("shift_mcar_auroc")
            if curve:
                key = (r["method"], r["scaler"], r["architecture"])
                lost.setdefault(key, []).append(curve[0] - curve[verdict.HALF])
        return [
            *verdict.on_leaks(self.audits),
            *verdict.on_sparsity_normalization(results),
            *verdict.on_robustness({k: float(np.mean(v)) for k, v in lost.items()}, self.best),
            *verdict.on_ranks(results),
        ]

    @cached_property
    def methods(self) -> list[dict[str, Any]]:
        """A row a method and scaler: mean AUROC and rank, and its record against zero."""
        results, ranking = self.recorded.results, rank_methods(self.recorded.results)
        won, rows = records(results), []
        ranks = dict(zip(ranking.methods, ranking.mean_ranks, strict=True)) if ranking else {}
        cells_of: dict[str, list[dict[str, Any]]] = {}
        for r in results:
            name = name_of(r["method"], r["scaler"], r["architecture"])
            cells_of.setdefault(name, []).append(r)
        for name, cells in cells_of.items():
            deltas = [r["delta_auroc"] for r in cells if r["delta_auroc"] is not None]
            better, worse = verdict.established(cells)
            rows.append(
                {
                    "name": name,
                    "auroc": float(np.mean([r["auroc_mean"] for r in cells])),
                    "rank": ranks.get(name),
                    "delta": float(np.mean(deltas)) if deltas else None,
                    "record": won.get(name),
                    "better": len(better),
                    "worse": len(worse),
                }
            )
        return sorted(rows, key=lambda row: -row["auroc"])

    @cached_property
    def biases(self) -> dict[str, dict[str, SparsityBias]]:
        """Disease → method → sparsity bias."""
        observed = (~np.isnan(self.store.values())).sum(axis=1)
        return {
            disease: {
                name_of(*comparison): sparsity_bias(
                    [
                        (part.y, part.ensemble, observed[rows], part.subject, part.weight)
                        for part, rows in zip(splits[disease], self._rows[disease], strict=True)
                    ]
                )
                for comparison, splits in self.held_out.items()
            }
            for disease in self.store.diseases
        }

    @cached_property
    def shifts(self) -> dict[str, list[dict[str, Shift]]]:
        """Disease → for each mechanism, method → shift."""
        run_of = {
            (r["disease"], r["method"], r["scaler"], r["architecture"]): r["run_id"]
            for r in self.recorded.results
        }
        found: dict[str, list[dict[str, Shift]]] = {}
        for disease in self.store.diseases:
            curves = {
                name_of(*c): self.recorded.curves(run_of[(disease, *c)], "shift_")
                for c in self.shown
            }
            found[disease] = [
                {name: Shift.from_curves(m, curve) for name, curve in curves.items()}
                for m in SHIFTS
            ]
        return found

    @cached_property
    def decisions(self) -> dict[str, DecisionCurve]:
        return {d: decision_curve(self._best_splits(d)) for d in self.store.diseases}

    @cached_property
    def operating(self) -> dict[str, list[OperatingPoint]]:
        tuning = [
            read_tuning(self.config, self.store, Cell(*self.best, i))
            for i in range(self.config.splits.repeats)
        ]
        return {
            d: operating_points([t[d].sample for t in tuning], self._best_splits(d))
            for d in self.store.diseases
        }

    @cached_property
    def groups(self) -> dict[str, list[GroupResult]]:
        groups = subject_groups(self.config, self.store)
        return {
            d: by_group(
                [
                    (s.y, s.p, rows, s.subject, s.weight)
                    for s, rows in zip(self._best_splits(d), self._rows[d], strict=True)
                ],
                groups,
                self.config.privacy.smallest_cell,
            )
            for d in self.store.diseases
        }

    @cached_property
    def importance(self) -> dict[str, list[Importance]]:
        predict = load_predictor(self.config, self.store, Cell(*self.best, 0))
        return permutation_importance(predict, self.store)

    @cached_property
    def gradients(self) -> dict[str, dict[str, float]]:
        """Empty without captum, or where the best method is no network."""
        predict = load_predictor(self.config, self.store, Cell(*self.best, 0))
        if not (can_explain() and isinstance(predict, NetworkPredictor)):
            return {}
        return integrated_gradients(predict, self.store)

    @cached_property
    def learning(self) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """Disease → method → (shares, AUROCs); empty where no learning curve was asked for."""
        found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for comparison in self.shown:
            for r in verdict.of(self.recorded.results, comparison):
                curve = self.recorded.curves(r["run_id"], "learning_curve_auroc")
                for steps in curve.values():
                    line = ([s / 100 for s in sorted(steps)], [steps[s] for s in sorted(steps)])
                    found.setdefault(r["disease"], {})[
                        name_of(r["method"], r["scaler"], r["architecture"])
                    ] = line
        return found

    @cached_property
    def missing(self) -> list[MissingCount]:
        return missing_table(self.store)

    @cached_property
    def audits(self) -> list[LeakAudit]:
        return leak_audit(self.store, asked=asked_of(self.config, self.store))

    @cached_property
    def observed_rate(self) -> float:
        return float(np.mean([f["observed_rate"] for f in self.store.manifest["features"]]))

    def figure(self, kind: str, disease: str, *more: Any) -> str:
        """An inline SVG; `kind` is bias, shift, calibration, decision or learning."""
        drawn: Figure = getattr(self, f"_draw_{kind}")(disease, *more)
        return as_svg(drawn, " ".join([words(disease), kind, *map(str, more)]))

    def _draw_bias(self, disease: str) -> Figure:
        return sparsity_bias_figure(self.biases[disease], words(disease))

    def _draw_shift(self, disease: str, mechanism: int, metric: str) -> Figure:
        shifts = self.shifts[disease][mechanism]
        first = self._best_splits(disease)[0]
        rate = first.mean(first.y) if metric == "mean_prediction" else None
        return shift_figure(shifts, metric, rate=rate)

    def _draw_calibration(self, disease: str) -> Figure:
        series = []
        for i, sample in enumerate(self._best_splits(disease)[: SHOWN + 1]):
            at_least = max(SMALLEST_GROUP, self.config.privacy.smallest_cell)
            predicted, seen = binned_calibration(*sample, at_least=at_least)
            series.append(Line(f"split {i + 1}", predicted.tolist(), seen.tolist(), "o"))
        return lines(
            series, x="predicted", y="observed", title=words(disease), percent=True, diagonal=True
        )

    def _draw_decision(self, disease: str) -> Figure:
        return decision_figure(self.decisions[disease], words(disease))

    def _draw_learning(self, disease: str) -> Figure:
        return learning_curve_figure(self.learning[disease], words(disease))


def write_report(config: Config, store: Store, recorded: Recorded, folder: Path) -> list[Path]:
    """Write `report.html` and `model_card.md` into the folder; returns both paths.

    Raises
    ------
    EhrSnError
        Trained cells of the run are not there, or were made by another version.
    """
    cells = [
        cell_path(config, store, Cell(*comparison, split))
        for comparison in comparisons(config)
        for split in range(config.splits.repeats)
    ]
    if absent := sum(not path.exists() for path in cells):
        raise EhrSnError(
            f"{absent} of the {len(cells)} trained cells of this run are not in {cells[0].parent}: "
            "`ehr-sn run CONFIG --force` trains what is absent and records it anew"
        )
    report = Report(config, store, recorded)
    smallest = config.privacy.smallest_cell
    environment = templates()
    environment.filters["few"] = lambda count: _few(count, smallest)
    context: Mapping[str, Any] = {
        "report": report,
        "config": config,
        "store": store,
        "manifest": store.manifest,
        "results": recorded.results,
        "recorded": recorded,
        "version": __version__,
        "SPLITS": SPLITS,
        "LEAK_FROM": LEAK_FROM,
        "SMALLEST": smallest,
        "labels": {name: shown_label(n, smallest) for name, n in store.manifest["labels"].items()},
        "risks": store.manifest.get("risks", {}),
        "censoring": _censoring(store.manifest["censoring"]),
        "REFERENCE": REFERENCE,
        "SN": SN,
        "NOTHING": NOTHING,
        "name_of": name_of,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for template, name in (
        ("report.html.j2", "report.html"),
        ("model_card.md.j2", "model_card.md"),
    ):
        path = folder / name
        path.write_text(environment.get_template(template).render(context), encoding="utf-8")
        written.append(path)
    return written


def _censoring(told: Mapping[str, str] | str) -> list[str]:
    """What became of those who left, each rule once; older stores have one for all."""
    return [told] if isinstance(told, str) else list(dict.fromkeys(told.values()))


def templates() -> jinja2.Environment:
    """The templates of pages, with filters for what is in them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": words, "number": _number, "signed": _signed}
    environment.filters |= {"percent": _percent, "p": _p}
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 3) -> str:
    if value is None or np.isnan(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")


def _percent(value: float) -> str:
    """
    >>> _percent(0.347), _percent(0.00124), _percent(0.0)
    ('35%', '0.12%', '0%')
    """
    if np.isnan(value):
        return "–"
    return f"{value:.0%}" if value >= 0.01 else f"{100 * value:.2g}%"


def _few(count: int | str | None, smallest: int) -> str:
    """A count, unless it is so small that it might point at somebody.

    >>> _few(0, 11), _few(7, 11), _few(1234, 11)
    ('0', '< 11', '1,234')
    """
    if count is None:
        return HIDDEN
    told = count if isinstance(count, str) else shown(count, smallest)
    return told if isinstance(told, str) else f"{told:,}"


def _p(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
