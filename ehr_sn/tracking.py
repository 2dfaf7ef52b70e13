"""Results → MLflow, and back: everything said to MLflow, and nowhere else.

One experiment a data set; one parent run a pipeline run; below it one run a disease, architecture,
scaler and method. Runs carry flat parameters and metrics, so that they can be filtered, compared
and plotted in the UI by clicking. Aggregates only: no row of any patient goes to MLflow.
"""

import json
import math
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from ehr_sn import __version__
from ehr_sn.config import Config, RepresentationConfig, digest
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.diagnostics import Diagnosis, diagnose, leak_audit
from ehr_sn.evaluate.figures import sparsity_bias_figure
from ehr_sn.evaluate.plots import roc_and_calibration, seed_strip
from ehr_sn.evaluate.report import Recorded
from ehr_sn.evaluate.representation import activity_figure, error_table, units_table
from ehr_sn.evaluate.results import Result, curves, evaluate, rank_methods, records
from ehr_sn.ingest.store import Store
from ehr_sn.models.learning_curve import SHARES, FewerRows, compared
from ehr_sn.models.train import (
    Cell,
    Comparison,
    HeldOut,
    Representation,
    TrainedCell,
    cell_path,
    read_cell,
    reference_of,
)

DEFAULT_FOLDER = Path("mlruns")
UNKNOWN_SIGN = re.compile(r"[^\w\-. :/]")  # signs that MLflow takes in no metric's name
BATCH = 1000  # metrics that MLflow takes in one call
DELTAS = (
    "delta_auroc",
    "delta_ci_low",
    "delta_ci_high",
    "delta_p",
    "delta_p_holm",
    "delta_bootstrap_ci_low",
    "delta_bootstrap_ci_high",
)
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
        for run in _children(self.client, self.experiment_id, self.parent_id):
            _, architecture, scaler, method = _key(run)
            recorded[method, scaler, architecture].append(run)
        return recorded

    def fail(self) -> None:
        self.client.set_terminated(self.parent_id, status="FAILED")

    def log_comparison(
        self, config: Config, store: Store, method: str, scaler: str, architecture: str
    ) -> None:
        """Evaluate one method's trained cells and record a run a disease below the parent.

        What an interrupted attempt at the same left half-said is deleted.
        """
        recorded = self._recorded()
        for run in recorded[method, scaler, architecture] + recorded["", "", ""]:
            self.client.delete_run(run.info.run_id)
        cells = _read_cells(config, store, method, scaler, architecture)
        against = reference_of(config, (method, scaler, architecture))
        reference = _held_out(_read_cells(config, store, *against)) if against else None
        held_out = _held_out(cells)
        params = _params(config, method, scaler, architecture) | _chosen(cells)
        seconds = {
            "impute_seconds": float(np.mean([cell.impute_seconds for cell in cells])),
            "fit_seconds": float(np.mean([cell.fit_seconds for cell in cells])),
        }
        learned = [cell.representation for cell in cells if cell.representation is not None]
        diagnosed = diagnose(config, store, (method, scaler, architecture), held_out)
        for i, result in enumerate(evaluate(held_out, reference)):
            title = f"{result.disease} · {architecture} · {method} · {scaler}"
            self._log_result(
                store,
                {"disease": result.disease} | params,
                result,
                seconds,
                _learning_curves(cells, i),
                roc_and_calibration(curves(held_out[result.disease]), title=title),
                diagnosed[result.disease],
                learned,
            )

    def _log_result(
        self,
        store: Store,
        params: dict[str, Any],
        result: Result,
        seconds: dict[str, float],
        learning: dict[str, list[float]],
        figure: Figure,
        diagnosis: Diagnosis,
        learned: Sequence[Representation],
    ) -> None:
        run = self.client.create_run(
            self.experiment_id,
            run_name=" · ".join(
                params[key] for key in ("method", "architecture", "scaler", "disease")
            ).replace("sparsity_normalization", "SN"),
            tags=_tags(store, self.run_hash) | {"mlflow.parentRunId": self.parent_id},
        )
        run_id = run.info.run_id
        self.client.log_inputs(run_id, [_dataset_input(store)])
        by_step = learning | {
            "test_auroc_seed": result.auroc_per_seed,
            "test_auroc_split": result.auroc_per_split,
        }
        metrics = result.as_metrics() | diagnosis.bias.as_metrics() | seconds
        _log(self.client, run_id, params, metrics, by_step)
        self.client.log_figure(run_id, figure, "roc_and_calibration.png")
        bias = sparsity_bias_figure({result.disease: diagnosis.bias})
        self.client.log_figure(run_id, bias, "sparsity_bias.png")
        for shift in diagnosis.shifts:
            _log_curves(self.client, run_id, shift.as_curves())
        if learned:
            self._log_representation(run_id, learned, params["representation_rho"])
        self.client.set_terminated(run_id)

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
        self.client.log_text(self.parent_id, json.dumps(results, indent=2), "comparison.json")
        spent = {f"seconds_{name}": value for name, value in seconds.items()}
        audits = leak_audit(store)
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


@contextmanager
def tracked(config: Config, store: Store, force: bool = False) -> Iterator[Tracker]:
    """Open the parent run of this store and configuration: a new one, or the one to resume.

    A run that finished is opened as it is, unless `force` asks for a new one. If the body fails
    the run is marked as failed, and resumed the next time.
    """
    client = _client()
    experiment_id = _experiment(client, config)
    run_hash = run_hash_of(config, store)
    existing = None if force else _parent(client, experiment_id, run_hash)
    if existing is None:
        run = client.create_run(
            experiment_id,
            run_name=f"{config.dataset} {run_hash[:6]}",
            tags=_tags(store, run_hash)
            | {"ehr_sn.kind": "pipeline", "ehr_sn.training_hash": config.training_hash},
        )
        client.log_inputs(run.info.run_id, [_dataset_input(store)])
        _log(client, run.info.run_id, params=_parent_params(config, store))
        client.log_text(
            run.info.run_id,
            json.dumps(store.manifest, indent=2, ensure_ascii=False),
            "manifest.json",
        )
        _log_attrition(client, run.info.run_id, store)
        existing = run
    tracker = Tracker(client, experiment_id, existing.info.run_id, run_hash)
    if not tracker.is_finished():
        client.update_run(tracker.parent_id, status="RUNNING")
    try:
        yield tracker
    except BaseException:
        tracker.fail()
        raise


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
        runs = _children(self.client, self.run.info.experiment_id, self.run.info.run_id)
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


def _client() -> MlflowClient:
    if tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri())


def _experiment(client: MlflowClient, config: Config) -> str:
    experiment = client.get_experiment_by_name(config.dataset)
    if experiment is not None:
        return str(experiment.experiment_id)
    own = not os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = (DEFAULT_FOLDER / "artifacts" / config.dataset).resolve().as_uri() if own else None
    # The kind spares the user the question whether these are runs of a language model.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(config.dataset, artifacts, tags=kind))


def _parent(
    client: MlflowClient,
    experiment_id: str,
    run_hash: str | None = None,
    finished: bool = False,
) -> Run | None:
    conditions = ["tags.`ehr_sn.kind` = 'pipeline'"]
    if run_hash:
        conditions.append(f"tags.`ehr_sn.run_hash` = '{run_hash}'")
    if finished:
        conditions.append("attributes.status = 'FINISHED'")
    found = client.search_runs(
        [experiment_id], " and ".join(conditions), max_results=1, order_by=["start_time DESC"]
    )
    return found[0] if found else None


def _children(client: MlflowClient, experiment_id: str, parent_id: str) -> list[Run]:
    condition, token = f"tags.`mlflow.parentRunId` = '{parent_id}'", None
    runs: list[Run] = []
    while True:
        page = client.search_runs(
            [experiment_id], condition, order_by=["start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


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
    return {
        "disease": disease,
        "architecture": architecture,
        "method": method,
        "scaler": scaler,
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
        **{name: metrics.get(name) for name in DELTAS},
        "impute_seconds": metrics["impute_seconds"],
        "fit_seconds": metrics["fit_seconds"],
        "n_splits": int(run.data.params["splits"]),
        "n_held_out": int(run.data.metrics["n_held_out"]),
        "n_positive": int(run.data.metrics["n_positive"]),
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
        Metric(name, value, now, step)
        for name, curve in (by_step or {}).items()
        for step, value in enumerate(curve)
    ]
    client.log_batch(run_id, params=[Param(k, str(v)) for k, v in (params or {}).items()])
    for start in range(0, len(values), BATCH):
        client.log_batch(run_id, values[start : start + BATCH])


def _log_attrition(client: MlflowClient, run_id: str, store: Store) -> None:
    """Tables of whom each rule left, and of each disease's rows, to look at in the UI."""
    labels = [{"disease": name} | counts for name, counts in store.manifest["labels"].items()]
    for rows, name in ((store.manifest["cohort"], "cohort.json"), (labels, "labels.json")):
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


def _chosen(cells: list[TrainedCell]) -> dict[str, str]:
    """Parameters that the tuning rows chose, split by split: `exponent=0.5, exponent=1.0`."""
    chosen = [" ".join(f"{k}={v}" for k, v in cell.chosen.items()) for cell in cells]
    return {"chosen": ", ".join(chosen) if any(chosen) else ""}


def _params(config: Config, method: str, scaler: str, architecture: str) -> dict[str, Any]:
    """Flat parameters of a run, under the same names in every run."""
    train = config.train
    network = train.architectures.get(architecture)  # None for a baseline
    return {
        "method": method,
        "mask_appended": method.endswith("+mask"),
        "scaler": scaler,
        "winsorise": train.winsorise,
        "architecture": architecture,
        "hidden": "-".join(str(width) for width in network.hidden) if network else "",
        "dropout": network.dropout if network else "",
        "batch_norm": network.batch_norm if network else "",
        "augment_missing": network.augment_missing if network else "",
        **_representation_params(network.representation if network else None),
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "batch_size": train.batch_size,
        "max_epochs": train.max_epochs,
        "patience": train.patience,
        "balance_classes": train.balance_classes,
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
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str | None:
    """Commit of the code in use, where it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
        "seeds": train.seeds,
        "splits": config.splits.repeats,
    }


def _dataset_input(store: Store) -> DatasetInput:
    manifest = store.manifest
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
