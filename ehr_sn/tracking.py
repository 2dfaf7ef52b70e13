"""Results → MLflow, and back: everything said to MLflow, and nowhere else.

One experiment a data set; one parent run a pipeline run; below it one run a disease, architecture,
scaler and method, and, where it was tuned, one with all trials below it. Runs carry flat parameters
and metrics, so that they can be filtered, compared and plotted in the UI by clicking. Aggregates
only: no row of any patient goes to MLflow.

A study is an experiment of its own, `study-NAME`: a parent run a result, below it a run a variant.
"""

import json
import math
import os
import re
import subprocess
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from mlflow.tracking import MlflowClient

from ehr_sn import __version__, strict_json
from ehr_sn.config import Config, RepresentationConfig, digest
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.diagnostics import Diagnosis, asked_of, diagnose, leak_audit
from ehr_sn.evaluate.figures import sparsity_bias_figure
from ehr_sn.evaluate.intervals import FIGURES
from ehr_sn.evaluate.plots import roc_and_calibration, seed_strip
from ehr_sn.evaluate.report import Recorded
from ehr_sn.evaluate.representation import activity_figure, error_table, units_table
from ehr_sn.evaluate.results import Result, curves, evaluate, rank_methods, records
from ehr_sn.evaluate.small_cells import is_small, shown_manifest
from ehr_sn.evaluate.table import as_text
from ehr_sn.ingest.store import Store
from ehr_sn.models.learning_curve import SHARES, FewerRows, compared
from ehr_sn.models.train import (
    NOTHING,
    Cell,
    Comparison,
    HeldOut,
    Representation,
    TrainedCell,
    best_trial,
    cell_path,
    read_cell,
    read_trials,
    reference_of,
    tuned,
    with_settings,
)
from ehr_sn.studies import StudyConfig, StudyResult

DEFAULT_FOLDER = Path("mlruns")
UNKNOWN_SIGN = re.compile(r"[^\w\-. :/]")  # signs that MLflow takes in no metric's name
BATCH = 1000  # metrics that MLflow takes in one call
LONGEST_PARAM = 500
DELTAS = (
    "delta_auroc",
    "delta_ci_low",
    "delta_ci_high",
    "delta_p",
    "delta_p_holm",
    "delta_bootstrap_ci_low",
    "delta_bootstrap_ci_high",
)
ENDS = tuple(f"{name}_ci_{end}" for name in FIGURES for end in ("low", "high"))
COLUMNS = (
    "params.`method`",
    "params.`architecture`",
    "params.`scaler`",
    "metrics.`test_auroc`",
    "metrics.`test_auroc_std`",
    "metrics.`test_auroc_ci_low`",
    "metrics.`test_auroc_ci_high`",
    "metrics.`test_auprc`",
    "metrics.`test_brier`",
    "metrics.`delta_auroc`",
    "metrics.`delta_p_holm`",
)
"""What the prepared views of the UI show of a run."""


@dataclass(frozen=True)
class Tracker:
    """Where one pipeline run, of one store and one training configuration, is recorded."""

    client: MlflowClient
    experiment_id: str
    parent_id: str
    run_hash: str

    @classmethod
    def of(cls, config: Config, store: Store, parent_id: str) -> "Tracker":
        """The tracker of a parent run that `tracked` has opened."""
        client = _client()
        run_hash = run_hash_of(config, store)
        return cls(client, client.get_run(parent_id).info.experiment_id, parent_id, run_hash)

    def is_finished(self) -> bool:
        return str(self.client.get_run(self.parent_id).info.status) == "FINISHED"

    def finished_comparisons(self, store: Store) -> set[Comparison]:
        """(method, scaler, architecture) of what has been recorded for every disease."""
        whole = ["FINISHED"] * len(store.diseases)
        recorded = self._recorded().items()
        return {key for key, runs in recorded if [run.info.status for run in runs] == whole}

    def _recorded(self) -> dict[Comparison, list[Run]]:
        recorded: dict[Comparison, list[Run]] = defaultdict(list)
        for run in _results_below(self.client, self.experiment_id, self.parent_id):
            _, architecture, scaler, method = _key(run)
            recorded[method, scaler, architecture].append(run)
        return recorded

    def _delete(self, name: str) -> None:
        """Delete what an interrupted attempt has left of a run below the parent."""
        named = f"attributes.run_name = '{name}'"
        for run in _children(self.client, self.experiment_id, self.parent_id, named):
            for one in [*_children(self.client, self.experiment_id, run.info.run_id), run]:
                self.client.delete_run(one.info.run_id)

    def fail(self) -> None:
        """Mark the run as failed, unless it has finished already."""
        if not self.is_finished():
            self.client.set_terminated(self.parent_id, status="FAILED")

    def log_comparison(
        self, config: Config, store: Store, method: str, scaler: str, architecture: str
    ) -> None:
        """Evaluate one method's trained cells and record a run a disease below the parent."""
        cells = _read_cells(config, store, method, scaler, architecture)
        against = reference_of(config, (method, scaler, architecture))
        reference = _held_out(_read_cells(config, store, *against)) if against else None
        held_out = _held_out(cells)
        params = _params(config, store, (method, scaler, architecture))
        chosen = [cell.chosen for cell in cells]
        if method == NOTHING:
            baselines = [Cell(method, scaler, architecture, split) for split in range(len(cells))]
            chosen = [tuned(config, store, cell) for cell in baselines]
        params["chosen"] = _listed(chosen)
        seconds = {
            "impute_seconds": float(np.mean([cell.impute_seconds for cell in cells])),
            "fit_seconds": float(np.mean([cell.fit_seconds for cell in cells])),
        }
        learned = [cell.representation for cell in cells if cell.representation is not None]
        diagnosed = diagnose(config, store, (method, scaler, architecture), held_out)
        for i, result in enumerate(evaluate(held_out, reference)):
            title = f"{result.disease} · {architecture} · {method} · {scaler}"
            self._log_result(
                config,
                store,
                {"disease": result.disease, "censoring": store.censoring[result.disease]} | params,
                result,
                seconds,
                _learning_curves(cells, i),
                roc_and_calibration(curves(held_out[result.disease]), title=title),
                diagnosed[result.disease],
                learned,
            )

    def _log_result(
        self,
        config: Config,
        store: Store,
        params: dict[str, Any],
        result: Result,
        seconds: dict[str, float],
        learning: dict[str, list[float]],
        figure: Figure,
        diagnosis: Diagnosis,
        learned: Sequence[Representation],
    ) -> None:
        names = [params[key] for key in ("method", "architecture", "scaler", "disease")]
        name = " · ".join(names).replace("sparsity_normalization", "SN")
        self._delete(name)
        run = self.client.create_run(
            self.experiment_id,
            run_name=name,
            tags=_tags(store, self.run_hash) | {"mlflow.parentRunId": self.parent_id},
        )
        run_id = run.info.run_id
        self.client.log_inputs(run_id, [_dataset_input(config, store)])
        by_step = learning | {
            "test_auroc_seed": result.auroc_per_seed,
            "test_auroc_split": result.auroc_per_split,
        }
        metrics = result.as_metrics() | diagnosis.bias.as_metrics() | seconds
        positive, smallest = metrics["n_positive"], config.privacy.smallest_cell
        if is_small(positive, smallest) or is_small(metrics["n_held_out"] - positive, smallest):
            del metrics["n_positive"]
        _log(self.client, run_id, params, metrics, by_step)
        self.client.log_figure(run_id, figure, "roc_and_calibration.png")
        bias = sparsity_bias_figure({result.disease: diagnosis.bias})
        self.client.log_figure(run_id, bias, "sparsity_bias.png")
        shifts = {k: v for shift in diagnosis.shifts for k, v in shift.as_curves().items()}
        _log_curves(self.client, run_id, shifts)
        if learned:
            self._log_representation(run_id, learned, params["representation_rho"])
        self.client.set_terminated(run_id)

    def log_tuning(self, config: Config, store: Store, comparison: Comparison) -> None:
        """Record the trials of a comparison below one run."""
        client, experiment_id = self.client, self.experiment_id
        method, scaler, architecture = comparison
        params = {"method": method, "scaler": scaler, "architecture": architecture}
        name = " · ".join(["tuning", method, architecture, scaler])
        self._delete(name)

        def start(name: str, kind: str, parent_id: str) -> str:
            tags = {"ehr_sn.kind": kind, "mlflow.parentRunId": parent_id}
            tags |= _tags(store, self.run_hash)
            run = client.create_run(experiment_id, run_name=name, tags=tags)
            return str(run.info.run_id)

        run_id = start(name, "tuning", self.parent_id)
        of_splits = [
            read_trials(config, store, Cell(*comparison, split))
            for split in range(config.splits.repeats)
        ]
        for split, trials in enumerate(of_splits):
            for number, trial in enumerate(trials):
                trial_id = start(f"split {split + 1} · trial {number}", "trial", run_id)
                told = {"split": split + 1, "trial": number, "pruned": trial.pruned}
                by_step = {"tuning_auroc": trial.aurocs}
                _log(client, trial_id, params | told | trial.settings, by_step=by_step)
                client.set_terminated(trial_id)
        best = [best_trial(trials).aurocs[-1] for trials in of_splits]
        metrics = {
            "tuning_auroc": float(np.mean(best)),
            "tuning_auroc_untuned": float(np.mean([trials[0].aurocs[-1] for trials in of_splits])),
            "trials_pruned": sum(trial.pruned for trials in of_splits for trial in trials),
        }
        budget = {"trials": config.tune.trials, "seeds": config.tune.seeds}
        _log(client, run_id, params | budget, metrics)
        client.set_terminated(run_id)

    def _log_representation(
        self, run_id: str, learned: Sequence[Representation], rho: float | str
    ) -> None:
        """Activity of the units, what drives them (first split and seed), and what is lost."""
        figure = activity_figure(learned, rho if isinstance(rho, float) else None)
        self.client.log_figure(run_id, figure, "representation/activity.png")
        for name, table in (("units", units_table(learned[0])), ("error", error_table(learned))):
            text = table.to_csv(index=False)
            self.client.log_text(run_id, text, f"representation/{name}.csv")

    def log_learning_curve(self, config: Config, store: Store) -> None:
        """AUROC by percent of the training rows, added to the runs of `learning_curve.compared`."""
        recorded = self._recorded()
        for comparison in compared(config, store):
            runs = {run.data.params["disease"]: run.info.run_id for run in recorded[comparison]}
            curves: dict[str, dict[int, float]] = defaultdict(dict)
            for share in SHARES:
                cells = _read_cells(config, FewerRows(store.path, share), *comparison)
                for result in evaluate(_held_out(cells)):
                    curves[result.disease][round(100 * share)] = result.ensemble.value
            for disease, curve in curves.items():
                _log_curves(self.client, runs[disease], {"learning_curve_auroc": curve})

    def finish(self, config: Config, store: Store, seconds: Mapping[str, float]) -> None:
        """Close the parent run with the overview of all results and where the time went."""
        results = FinishedRun(self.client, self.client.get_run(self.parent_id)).results()
        title = f"{config.title or config.dataset}: AUROC on held-out subjects"
        self.client.log_figure(self.parent_id, seed_strip(results, title=title), "comparison.png")
        self.client.log_text(self.parent_id, strict_json.dumps(results), "comparison.json")
        spent = {f"seconds_{name}": value for name, value in seconds.items()}
        audits = leak_audit(store, asked=asked_of(config, store))
        table = pd.DataFrame([row for audit in audits for row in audit.rows()])
        self.client.log_text(self.parent_id, table.to_csv(index=False), "leak_audit.csv")
        metrics = spent | {k: v for audit in audits for k, v in audit.as_metrics().items()}
        for name, record in records(results).items():
            metrics |= record.as_metrics(f"versus_zero/{name}")
        ranking = rank_methods(results)
        metrics |= ranking.as_metrics() if ranking else {}
        _log(self.client, self.parent_id, metrics=metrics)
        for disease in config.labels:
            self._prepare_view(disease)
        self.client.set_terminated(self.parent_id)

    def _prepare_view(self, disease: str) -> None:
        """Share a view of the runs of one disease: the newest comparison, best AUROC first.

        Sorted by a metric, the UI lists runs without folding them below their parent.
        """
        view = {
            "searchFilter": f'params.disease = "{disease}" and '
            f'tags.`mlflow.parentRunId` = "{self.parent_id}"',
            "orderByKey": "metrics.`test_auroc`",
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": COLUMNS,
        }
        self.client.set_experiment_tag(
            self.experiment_id, f"mlflow.sharedViewState.{disease}", json.dumps(view)
        )


_open: list[Tracker] = []  # parent runs that this process has begun and not ended


@contextmanager
def tracked(config: Config, store: Store, force: bool = False) -> Iterator[Tracker]:
    """Open the parent run of this store and configuration: a new one, or the one to resume.

    A run that finished is opened as it is, unless `force` asks for a new one. If the body fails
    the run is marked as failed, and resumed the next time.
    """
    client = _client()
    experiment_id = _experiment(client, config.dataset)
    run_hash = run_hash_of(config, store)
    existing = None if force else _parent(client, experiment_id, run_hash)
    if existing is None:
        run = client.create_run(
            experiment_id,
            run_name=f"{config.dataset} {run_hash[:6]}",
            tags=_tags(store, run_hash)
            | {"ehr_sn.kind": "pipeline", "ehr_sn.training_hash": config.training_hash},
        )
        told = _shown(config, store)
        client.log_inputs(run.info.run_id, [_dataset_input(config, store)])
        _log(client, run.info.run_id, params=_parent_params(config, store))
        client.log_text(
            run.info.run_id,
            json.dumps(told, indent=2, ensure_ascii=False),
            "manifest.json",
        )
        _log_attrition(client, run.info.run_id, told)
        existing = run
    tracker = Tracker(client, experiment_id, existing.info.run_id, run_hash)
    if not tracker.is_finished():
        client.update_run(tracker.parent_id, status="RUNNING")
    _open.append(tracker)
    try:
        yield tracker
    except BaseException as error:
        # A query that Ctrl-C has cut off keeps SQLite locked for as long as its frames live.
        traceback.clear_frames(error.__traceback__)
        tracker.fail()
        raise
    finally:
        _open.remove(tracker)


def fail_open() -> None:
    """Mark as failed what `tracked` has open: for a process that ends without unwinding."""
    for tracker in _open:
        tracker.fail()


def run_hash_of(config: Config, store: Store) -> str:
    """Hash of the store and of everything that the comparison depends on."""
    depends_on: dict[str, Any] = {"store": store.fingerprint, "training": config.training_hash}
    if config.evaluate.learning_curve:
        depends_on["learning_curve"] = True
    return digest(depends_on)


@dataclass(frozen=True)
class FinishedRun:
    """A finished pipeline run, read back from MLflow alone."""

    client: MlflowClient
    run: Run

    def is_of(self, config: Config) -> bool:
        """Whether it was made with the configuration's present training settings."""
        return self.run.data.tags.get("ehr_sn.training_hash") == config.training_hash

    def results(self) -> list[dict[str, Any]]:
        """One flat dict a disease, architecture, scaler and method."""
        runs = _results_below(self.client, self.run.info.experiment_id, self.run.info.run_id)
        return [_as_result(self.client, run) for run in runs]

    def curves(self, run_id: str, prefix: str) -> dict[str, dict[int, float]]:
        """The metrics of one run whose names begin so: name → step → value."""
        names = [k for k in self.client.get_run(run_id).data.metrics if k.startswith(prefix)]
        return {
            name: {m.step: m.value for m in self.client.get_metric_history(run_id, name)}
            for name in names
        }

    def recorded(self) -> Recorded:
        """What a report needs of it."""
        ended = datetime.fromtimestamp((self.run.info.end_time or 0) / 1000, tz=UTC)
        run_id = self.run.info.run_id
        return Recorded(run_id, f"{ended:%Y-%m-%d}", self.results(), self.curves)

    def log_files(self, files: Sequence[Path]) -> None:
        """Add files to the run's artifacts, below `report`."""
        for file in files:
            self.client.log_artifact(self.run.info.run_id, str(file), "report")

    def seconds(self) -> dict[str, float]:
        """Where the time went, the longest first."""
        prefix = "seconds_"
        metrics = self.run.data.metrics.items()
        spent = {k.removeprefix(prefix): v for k, v in metrics if k.startswith(prefix)}
        return dict(sorted(spent.items(), key=lambda item: -item[1]))


def finished_run(config: Config, run_id: str | None = None) -> FinishedRun:
    """The pipeline run of that id, or the newest finished one of the data set.

    Raises
    ------
    EhrSnError
        There is none.
    """
    client = _client()
    if run_id is not None:
        return FinishedRun(client, client.get_run(run_id))
    experiment = client.get_experiment_by_name(config.dataset)
    parent = experiment and _parent(client, experiment.experiment_id, finished=True)
    if not parent:
        raise EhrSnError(
            f"MLflow at {tracking_uri()} has no finished run of {config.dataset!r}: "
            "run `ehr-sn run CONFIG` first"
        )
    return FinishedRun(client, parent)


def log_study(config: StudyConfig, result: StudyResult) -> str:
    """Record a study's result, unless the same is recorded; returns its parent run's id.

    The parent has the tables, all scores and the figures; below it every variant has a run, whose
    metrics are named `<metric>/<setting>`, and `<metric>_repeat/<setting>` with a step a repeat.
    """
    client = _client()
    experiment_id = _experiment(client, f"study-{config.study}")
    scores = [asdict(score) for score in result.scores]
    run_hash = digest([config.results_depend_on, scores])
    found = _parent(client, experiment_id, run_hash, finished=True, kind="study")
    if found is not None:
        return str(found.info.run_id)
    tags = {"ehr_sn.version": __version__, "ehr_sn.run_hash": run_hash} | _commit_tag()
    parent = client.create_run(
        experiment_id,
        run_name=f"{config.study} {run_hash[:6]}",
        tags=tags | {"ehr_sn.kind": "study"},
    )
    parent_id = parent.info.run_id
    try:
        for variant in result.variants:
            child = client.create_run(
                experiment_id, run_name=variant, tags=tags | {"mlflow.parentRunId": parent_id}
            )
            metrics, per_repeat = result.as_metrics(variant), result.per_repeat(variant)
            params = {"variant": variant, "metric": result.metric}
            _log(client, child.info.run_id, params, metrics, per_repeat)
            client.set_terminated(child.info.run_id)
        settings = {key: json.dumps(value) for key, value in config.results_depend_on.items()}
        # A setting may be longer than MLflow takes in a parameter: the whole is in config.json.
        short = {key: value for key, value in settings.items() if len(value) <= LONGEST_PARAM}
        _log(client, parent_id, short, {"seconds_cells": result.seconds})
        client.log_text(parent_id, json.dumps(config.results_depend_on, indent=2), "config.json")
        client.log_text(parent_id, pd.DataFrame(scores).to_csv(index=False), "scores.csv")
        client.log_text(parent_id, json.dumps(result.chosen(), indent=2), "chosen.json")
        client.log_text(parent_id, as_text(*result.tables(), result.explain()), "tables.txt")
        for name, figure in result.figures().items():
            client.log_figure(parent_id, figure, UNKNOWN_SIGN.sub("_", name))
    except BaseException:
        client.set_terminated(parent_id, status="FAILED")
        raise
    client.set_terminated(parent_id)
    return str(parent_id)


def experiment_of(config: Config) -> str:
    """The id of the data set's experiment, made if it is not there."""
    return _experiment(_client(), config.dataset)


def run_of(config: Config, store: str, disease: str, comparison: Mapping[str, str]) -> str | None:
    """The id of the newest run in which a comparison of that store was recorded; None if there is
    none.
    """
    client = _client()
    conditions = [f"params.{name} = '{value}'" for name, value in comparison.items()]
    conditions += [f"params.disease = '{disease}'", f"tags.`ehr_sn.store` = '{store}'"]
    found = client.search_runs(
        [_experiment(client, config.dataset)],
        " and ".join(conditions),
        max_results=1,
        order_by=["start_time DESC"],
    )
    return found[0].info.run_id if found else None


def log_scoring(config: Config, summary: Mapping[str, Any], seconds: float) -> str:
    """Record a scoring by what its summary counts; returns the run's id."""
    client = _client()
    run = client.create_run(
        _experiment(client, config.dataset),
        run_name=f"score {summary['fingerprint'][:6]}",
        tags={"ehr_sn.version": __version__, "ehr_sn.kind": "score"},
    )
    params = {f"version_{name}": model["version"] for name, model in summary["models"].items()}
    metrics = {
        "observed_rate": summary["observed_rate"],
        "absent_features": len(summary["absent_features"]),
        "warnings": len(summary["warnings"]),
        "seconds": seconds,
    }
    rows, smallest = summary["rows"], config.privacy.smallest_cell
    if not is_small(rows, smallest):
        metrics |= {"rows": rows, "rows_per_second": rows / seconds}
    quarantined = sum(entry["count"] for entry in summary["quarantined"])
    if not is_small(quarantined, smallest):
        metrics["quarantined"] = quarantined
    _log(client, run.info.run_id, params | {"fingerprint": summary["fingerprint"]}, metrics)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def log_monitoring(config: Config, told: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Record what monitoring found, once; returns the run's id.

    All that is found while the same models score goes to one run, a step each time, so that the UI
    draws it over time. `told` is `Monitored.as_dict()` with its `metrics`; files are the newest's.
    """
    client = _client()
    experiment_id = _experiment(client, config.dataset)
    models = digest(told["models"])
    found = client.search_runs(
        [experiment_id], f"tags.`ehr_sn.models` = '{models}' and tags.`ehr_sn.kind` = 'monitor'"
    )
    run = (
        found[0]
        if found
        else client.create_run(
            experiment_id,
            run_name=f"monitor {models[:6]}",
            tags={
                "ehr_sn.version": __version__,
                "ehr_sn.kind": "monitor",
                "ehr_sn.models": models,
                **{f"ehr_sn.version_of.{d}": str(m["version"]) for d, m in told["models"].items()},
            },
        )
    )
    run_id = str(run.info.run_id)
    done = run.data.tags.get("ehr_sn.monitored", "").split()
    key = digest([told["fingerprint"], told["outcomes"]], length=8)
    if key not in done:
        when = int(datetime.fromisoformat(told["scored_at"]).timestamp() * 1000)
        metrics = [
            Metric(UNKNOWN_SIGN.sub("_", name), value, when, len(done))
            for name, value in told["metrics"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics[start : start + BATCH])
        for file in files:
            client.log_artifact(run_id, str(file), "monitoring")
        client.set_tag(run_id, "ehr_sn.monitored", " ".join([*done, key][-400:]))
    client.set_terminated(run_id)
    return run_id


def views(config: Config) -> dict[str, str]:
    """Disease → path, within the MLflow UI, of its prepared view."""
    experiment = _client().get_experiment_by_name(config.dataset)
    if experiment is None:
        return {}
    runs = f"/#/experiments/{experiment.experiment_id}/runs"
    return {disease: f"{runs}?viewStateShareKey={disease}" for disease in config.labels}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file below ./mlruns."""
    # The path is absolute: MLflow keeps a connection by this name, whatever the folder then is.
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{DEFAULT_FOLDER.resolve() / 'mlflow.db'}"


def is_served() -> bool:
    """Whether runs go to a server of MLflow, not to its database."""
    return tracking_uri().startswith("http")


def _client() -> MlflowClient:
    if tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri())


def _experiment(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    own = not os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = (DEFAULT_FOLDER / "artifacts" / name).resolve().as_uri() if own else None
    # The kind spares the user the question whether these are runs of a language model.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifacts, tags=kind))


def _parent(
    client: MlflowClient,
    experiment_id: str,
    run_hash: str | None = None,
    finished: bool = False,
    kind: str = "pipeline",
) -> Run | None:
    conditions = [f"tags.`ehr_sn.kind` = '{kind}'"]
    if run_hash:
        conditions.append(f"tags.`ehr_sn.run_hash` = '{run_hash}'")
    if finished:
        conditions.append("attributes.status = 'FINISHED'")
    found = client.search_runs(
        [experiment_id], " and ".join(conditions), max_results=1, order_by=["start_time DESC"]
    )
    return found[0] if found else None


def _children(
    client: MlflowClient, experiment_id: str, parent_id: str, *conditions: str
) -> list[Run]:
    condition = " and ".join([f"tags.`mlflow.parentRunId` = '{parent_id}'", *conditions])
    token = None
    runs: list[Run] = []
    while True:
        page = client.search_runs(
            [experiment_id], condition, order_by=["start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _results_below(client: MlflowClient, experiment_id: str, parent_id: str) -> list[Run]:
    """The runs of a parent that hold results: not those of its tuning."""
    runs = _children(client, experiment_id, parent_id)
    return [run for run in runs if "ehr_sn.kind" not in run.data.tags]


def _key(run: Run) -> tuple[str, str, str, str]:
    """Disease, architecture, scaler and method; empty where an interruption left none."""
    disease, architecture, scaler, method = (
        run.data.params.get(name, "") for name in ("disease", "architecture", "scaler", "method")
    )
    return disease, architecture, scaler, method


def _as_result(client: MlflowClient, run: Run) -> dict[str, Any]:
    metrics = {k: None if math.isnan(v) else v for k, v in run.data.metrics.items()}
    per_seed = client.get_metric_history(run.info.run_id, "test_auroc_seed")
    disease, architecture, scaler, method = _key(run)
    positive = metrics.get("n_positive")  # absent where there are few
    return {
        "disease": disease,
        "architecture": architecture,
        "method": method,
        "scaler": scaler,
        "blend_of": run.data.params.get("blend_of", ""),
        "auroc_per_seed": [m.value for m in sorted(per_seed, key=lambda m: m.step)],
        "auroc_mean": metrics["test_auroc"],
        "auroc_std": metrics["test_auroc_std"],
        "auroc_seed_std": metrics.get("test_auroc_seed_std"),
        "auroc_split_std": metrics["test_auroc_split_std"],
        "auroc_ensemble": metrics["test_auroc_ensemble"],
        "ci_low": metrics["test_auroc_ci_low"],
        "ci_high": metrics["test_auroc_ci_high"],
        "auprc": metrics["test_auprc"],
        "brier": metrics["test_brier"],
        "calibration_slope": metrics["test_calibration_slope"],
        "calibration_intercept": metrics["test_calibration_intercept"],
        **{end: metrics.get(f"test_{end}") for end in ENDS},
        **{name: metrics.get(name) for name in DELTAS},
        "impute_seconds": metrics["impute_seconds"],
        "fit_seconds": metrics["fit_seconds"],
        "n_splits": int(run.data.params["splits"]),
        "trials": int(run.data.params.get("trials", 0)),
        "n_held_out": int(run.data.metrics["n_held_out"]),
        "n_positive": None if positive is None else int(positive),
        "run_id": run.info.run_id,
    }


def _log(
    client: MlflowClient,
    run_id: str,
    params: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    by_step: Mapping[str, Sequence[float]] | None = None,
) -> None:
    now = int(time() * 1000)
    values = [
        Metric(UNKNOWN_SIGN.sub("_", name), value, now, 0)
        for name, value in (metrics or {}).items()
    ]
    values += [
        Metric(UNKNOWN_SIGN.sub("_", name), value, now, step)
        for name, curve in (by_step or {}).items()
        for step, value in enumerate(curve)
    ]
    client.log_batch(run_id, params=[Param(k, str(v)) for k, v in (params or {}).items()])
    for start in range(0, len(values), BATCH):
        client.log_batch(run_id, values[start : start + BATCH])


def _log_attrition(client: MlflowClient, run_id: str, manifest: dict[str, Any]) -> None:
    """Tables of whom each rule left, and of each disease's rows, to look at in the UI."""
    labels = [{"disease": name} | counts for name, counts in manifest["labels"].items()]
    for rows, name in ((manifest["cohort"], "cohort.json"), (labels, "labels.json")):
        client.log_table(run_id, pd.DataFrame(rows), name)


def _log_curves(
    client: MlflowClient, run_id: str, curves: Mapping[str, Mapping[int, float]]
) -> None:
    """Metrics at steps that mean something, such as percent."""
    now = int(time() * 1000)
    client.log_batch(
        run_id,
        [Metric(name, v, now, step) for name, curve in curves.items() for step, v in curve.items()],
    )


def _read_cells(
    config: Config, store: Store, method: str, scaler: str, architecture: str
) -> list[TrainedCell]:
    return [
        read_cell(cell_path(config, store, Cell(method, scaler, architecture, split)), store)
        for split in range(config.splits.repeats)
    ]


def _held_out(cells: list[TrainedCell]) -> dict[str, list[HeldOut]]:
    return {disease: [cell.held_out[disease] for cell in cells] for disease in cells[0].held_out}


def _learning_curves(cells: list[TrainedCell], disease: int) -> dict[str, list[float]]:
    """Mean curves over all seeds and splits, up to the epoch that every replicate reached."""
    learning = {}
    for name in cells[0].curves:
        replicates = [
            curve[~np.isnan(curve)] for cell in cells for curve in cell.curves[name][disease]
        ]
        shared = min(len(curve) for curve in replicates)
        learning[f"epoch_{name}"] = np.mean([c[:shared] for c in replicates], axis=0).tolist()
    return learning


def _listed(chosen: Sequence[Mapping[str, Any]]) -> str:
    """Parameters that the tuning rows chose, split by split.

    >>> _listed([{"exponent": 0.5}, {}])
    'exponent=0.5, as configured'
    """
    told = [" ".join(f"{k}={v}" for k, v in of_split.items()) for of_split in chosen]
    return ", ".join(one or "as configured" for one in told) if any(told) else ""


def _params(config: Config, store: Store, comparison: Comparison) -> dict[str, Any]:
    """Flat parameters of a run, under the same names in every run.

    Where tuning has set another value on each split, they are listed: `0.003, 0.01`.
    """
    every = []
    for split in range(config.splits.repeats):
        cell = Cell(*comparison, split)
        every.append(_params_of_cell(with_settings(config, cell, tuned(config, store, cell)), cell))
    return {
        name: value
        if all(other[name] == value for other in every)
        else ", ".join(str(other[name]) for other in every)
        for name, value in every[0].items()
    }


def _params_of_cell(config: Config, cell: Cell) -> dict[str, Any]:
    train, method = config.train, cell.method
    network = train.architectures.get(cell.architecture)  # None for a baseline or a blend
    return {
        "method": method,
        "mask_appended": method.endswith("+mask"),
        "scaler": cell.scaler,
        "winsorise": train.winsorise,
        "architecture": cell.architecture,
        "hidden": "-".join(str(width) for width in network.hidden) if network else "",
        "dropout": network.dropout if network else "",
        "batch_norm": network.batch_norm if network else "",
        "augment_missing": network.augment_missing if network else "",
        "blend_of": train.blends_told.get(cell.architecture, ""),
        **_representation_params(network.representation if network else None),
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "batch_size": train.batch_size,
        "max_epochs": train.max_epochs,
        "patience": train.patience,
        "balance_classes": train.balance_classes,
        "trials": config.tune.trials,
        "seeds": train.seeds,
        "splits": config.splits.repeats,
    }


def _representation_params(representation: RepresentationConfig | None) -> dict[str, Any]:
    given = representation.model_dump() if representation else {}
    if given.get("kind") == "pca":
        given = {name: given[name] for name in ("kind", "units", "fine_tune")}
    if given:
        given["units"] = "-".join(str(width) for width in given["units"])
    names = [name for name in RepresentationConfig.model_fields if name != "kind"]
    named = {f"representation_{name}": given.get(name, "") for name in names}
    return {"representation": given.get("kind", "none")} | named


def _tags(store: Store, run_hash: str) -> dict[str, str]:
    tags = {
        "ehr_sn.version": __version__,
        "ehr_sn.run_hash": run_hash,
        "ehr_sn.store": store.fingerprint,
    }
    return tags | _commit_tag()


def _commit_tag() -> dict[str, str]:
    """The commit of the code in use, where it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()}


def _parent_params(config: Config, store: Store) -> dict[str, Any]:
    train = config.train
    return {
        "dataset": config.dataset,
        "store": store.fingerprint,
        "rows": store.manifest["rows"],
        "features": len(store.feature_names),
        "diseases": ", ".join(store.diseases),
        **{f"methods_{scaler}": ", ".join(names) for scaler, names in train.methods.items()},
        "architectures": ", ".join(train.architectures),
        "baselines": ", ".join(train.baselines),
        "blends": ", ".join(train.blends),
        "trials": config.tune.trials,
        "seeds": train.seeds,
        "splits": config.splits.repeats,
    }


def _shown(config: Config, store: Store) -> dict[str, Any]:
    """The store's manifest without small counts, and without exact ones that nobody looks at."""
    kept = {name: told for name, told in store.manifest.items() if name != "code_subjects"}
    return shown_manifest(kept, config.privacy.smallest_cell)


def _dataset_input(config: Config, store: Store) -> DatasetInput:
    manifest = _shown(config, store)
    columns = [{"name": name, "type": "float"} for name in store.feature_names]
    dataset = Dataset(
        name=manifest["dataset"],
        digest=store.fingerprint,
        source_type="local",
        source=json.dumps({"uri": str(store.path)}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"rows": manifest["rows"], "labels": manifest["labels"]}),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])
