"""Whole pipelines on simulated tables, with a real Prefect and a real MLflow."""

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

from flows.ingest import ingest
from flows.pipeline import pipeline

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import METHODS as METHODS_NAMED
from ehr_sn.config import Config, load_config
from ehr_sn.ingest.store import Store
from ehr_sn.ingest.store import ingest as ingest_store
from ehr_sn.models import train as training

METHODS = {"zero", "sparsity_normalization", "zero+mask"}
ROOT = Path(__file__).parents[2]


def children(parent_id: str, condition: str = "") -> list:
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("clinic").experiment_id
    mine = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    return list(client.search_runs([experiment], " and ".join(filter(None, [mine, condition]))))


def cells() -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in Path("data/clinic/cells").iterdir()}


@pytest.fixture(scope="module")
def recorded(lasting_clinic: Path) -> tuple[Path, str]:
    """A clinic's configuration and the MLflow run of its pipeline, to look at but not to change."""
    return lasting_clinic, pipeline(str(lasting_clinic))


def test_a_run_a_disease_architecture_and_method_stands_below_one_parent(
    recorded: tuple[Path, str],
) -> None:
    clinic, parent_id = recorded
    runs = children(parent_id)
    assert len(runs) == 2 * 2 * 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    found = children(parent_id, "params.disease = 'diabetes' and params.architecture = 'mlp'")
    assert {run.data.params["method"] for run in found} == METHODS
    store = Store(Path(ingest(str(clinic))))
    client = MlflowClient(tracking.tracking_uri())
    for run in runs:
        metrics = run.data.metrics
        assert 0.5 < metrics["test_auroc"] < 1
        assert metrics["test_auroc_ci_low"] < metrics["test_auroc_ensemble"]
        assert run.inputs.dataset_inputs[0].dataset.digest == store.fingerprint
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
        seeds = client.get_metric_history(run.info.run_id, "test_auroc_seed")
        assert sorted(m.step for m in seeds) == [0, 1, 2]
        assert len(client.get_metric_history(run.info.run_id, "epoch_tuning_auroc")) >= 1
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert files == ["roc_and_calibration.png", "sparsity_bias.png"]
        assert metrics["sparsity_slope"] != 0
        lost = client.get_metric_history(run.info.run_id, "shift_mcar_auroc")
        assert [m.step for m in lost] == [0, 10, 30, 50, 70, 90]
        assert lost[-1].value < lost[0].value
        compared = "delta_p_holm" in metrics
        assert compared == (run.data.params["method"] != "zero")
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["ehr_sn.store"] == store.fingerprint
    assert parent.data.metrics["seconds_training"] > 0
    files = {file.path for file in client.list_artifacts(parent_id)}
    tables = {"cohort.json", "labels.json", "leak_audit.csv"}
    assert files == {"manifest.json", "comparison.png", "comparison.json"} | tables
    metrics = parent.data.metrics
    assert 0.4 < metrics["leak_mask_auroc/diabetes"] < 0.7
    assert metrics["friedman_n"] == 4
    assert sum(metrics[f"versus_zero/zero_mask_{k}"] for k in ("wins", "ties", "losses")) == 4


def test_every_run_has_the_same_parameters_and_metrics(recorded: tuple[Path, str]) -> None:
    runs = children(recorded[1])
    assert len({frozenset(run.data.params) for run in runs}) == 1
    by_kind = Counter(frozenset(run.data.metrics) for run in runs)
    assert len(by_kind) == 2  # with and without the difference from the reference


def test_a_finished_pipeline_is_not_run_again_unless_forced(small_clinic: Path) -> None:
    first = pipeline(str(small_clinic))
    trained = cells()
    assert pipeline(str(small_clinic)) == first
    assert pipeline(str(small_clinic), force=True) != first
    assert cells() == trained  # the same data and settings need no other networks


def test_an_interrupted_run_resumes_with_what_was_finished(
    small_clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_cell = training.train_cell

    def loses_power(config: Config, store: Store, cell: training.Cell) -> Path:
        if cell.method == "zero+mask":
            raise RuntimeError("power cut")
        return train_cell(config, store, cell)

    monkeypatch.setattr(training, "train_cell", loses_power)
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline(str(small_clinic))
    monkeypatch.setattr(training, "train_cell", train_cell)
    finished = cells()
    assert len(finished) == 1

    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("clinic").experiment_id
    (interrupted,) = client.search_runs([experiment], "tags.`ehr_sn.kind` = 'pipeline'")
    assert interrupted.info.status == "FAILED"
    recorded = {run.info.run_id for run in children(interrupted.info.run_id)}
    assert pipeline(str(small_clinic)) == interrupted.info.run_id
    runs = children(interrupted.info.run_id)
    assert len(runs) == 2 * 2
    assert len(recorded) == 2
    assert recorded < {run.info.run_id for run in runs}
    assert finished.items() < cells().items()
    assert len(cells()) == 2


def test_a_query_that_ctrl_c_cuts_off_does_not_keep_the_run_from_being_marked_as_failed(
    small_clinic: Path,
) -> None:
    database = tracking.tracking_uri().removeprefix("sqlite:///")

    def cut_off() -> None:
        cursor = sqlite3.connect(database).execute("SELECT * FROM sqlite_master")
        assert cursor.fetchone()  # of many rows: it is still reading
        raise KeyboardInterrupt

    config = load_config(small_clinic)
    with pytest.raises(KeyboardInterrupt), tracking.tracked(config, Store(ingest_store(config))):
        cut_off()
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("clinic").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED"


def test_a_half_recorded_comparison_is_recorded_anew(small_clinic: Path) -> None:
    parent_id = pipeline(str(small_clinic))
    client = MlflowClient(tracking.tracking_uri())
    half = children(parent_id, "params.disease = 'diabetes' and params.method = 'zero'")[0]
    client.set_terminated(half.info.run_id, status="KILLED")
    client.set_terminated(parent_id, status="FAILED")
    assert pipeline(str(small_clinic)) == parent_id
    runs = children(parent_id)
    assert len(runs) == 2 * 2
    assert half.info.run_id not in {run.info.run_id for run in runs}


def test_a_process_that_ends_without_unwinding_says_that_its_run_failed(small_clinic: Path) -> None:
    config = load_config(small_clinic)
    client = MlflowClient(tracking.tracking_uri())
    with tracking.tracked(config, Store(ingest_store(config))) as tracker:
        tracking.fail_open()
        assert client.get_run(tracker.parent_id).info.status == "FAILED"
        client.set_terminated(tracker.parent_id, status="FINISHED")
        tracking.fail_open()
        assert client.get_run(tracker.parent_id).info.status == "FINISHED"


def test_the_same_seed_gives_the_same_bits(
    clinic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(clinic)
    cell = training.Cell("sparsity_normalization", "standard", "mlp_dropout", 1)
    contents = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        store = Store(Path(ingest(str(clinic))))
        trained = training.read_cell(training.train_cell(config, store, cell), store)
        contents.append(trained.held_out["diabetes"].probability.tobytes())
    assert contents[0] == contents[1]


def test_training_needs_no_prefect(clinic: Path) -> None:
    config = load_config(clinic)
    store = Store(ingest_store(config))
    path = training.train_cell(config, store, training.Cell("zero", "standard", "mlp", 0))
    assert training.read_cell(path, store).held_out["diabetes"].probability.shape[0] == 3


def test_compare_prints_and_writes_what_mlflow_holds(recorded: tuple[Path, str]) -> None:
    clinic, parent_id = recorded
    done = CliRunner().invoke(cli.app, ["compare", str(clinic), "--json", "results.json"])
    assert done.exit_code == 0, done.output
    assert "w/o SN" in done.output
    assert "Diabetes" in done.output
    results = json.loads(Path("results.json").read_text())
    assert len(results) == 12
    runs = {run.info.run_id: run for run in children(parent_id)}
    for result in results:
        assert len(result["auroc_per_seed"]) == 3
        mean = sum(result["auroc_per_seed"]) / 3
        assert result["auroc_mean"] == pytest.approx(mean)
        assert result["ci_low"] <= result["auroc_ensemble"] <= result["ci_high"]
        assert 0 < result["n_positive"] < result["n_held_out"]
        assert runs[result["run_id"]].data.params["disease"] == result["disease"]


def test_other_methods_and_baselines_are_named_on_the_command_line(
    small_clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METHODS_NAMED, "")  # for the command to change, and to be put back
    named = ["--methods", "mice,sparsity_normalization_tuned,logistic_regression"]
    done = CliRunner().invoke(cli.app, ["run", str(small_clinic), *named, "--json", "results.json"])
    assert done.exit_code == 0, done.output
    assert "Baselines" in done.output
    results = json.loads(Path("results.json").read_text())
    methods = {"zero", "mice", "sparsity_normalization_tuned", "none"}
    assert {r["method"] for r in results} == methods
    assert all(r["fit_seconds"] > 0 for r in results)
    baselines = [r for r in results if r["architecture"] == "logistic_regression"]
    assert [(r["scaler"], r["auroc_std"]) for r in baselines] == [("none", 0), ("none", 0)]
    assert all(r["delta_p_holm"] is not None for r in results if r["method"] != "zero")
    client = MlflowClient(tracking.tracking_uri())
    runs = {r["method"]: client.get_run(r["run_id"]) for r in results}
    assert len({frozenset(run.data.params) for run in runs.values()}) == 1
    assert runs["mice"].data.params["chosen"] == ""
    splits = runs["sparsity_normalization_tuned"].data.params["chosen"].split(", ")
    assert len(splits) == 1
    assert all(split.startswith("exponent=") for split in splits)

    said = CliRunner().invoke(cli.app, ["run", str(small_clinic), "--methods", "mize"])
    assert "unknown method 'mize'; did you mean 'mice'?" in str(said.exception)


def test_compare_says_so_when_the_configuration_has_changed(recorded: tuple[Path, str]) -> None:
    changed = Path("changed.yaml")
    changed.write_text(recorded[0].read_text().replace("max_epochs: 12", "max_epochs: 13"))
    done = CliRunner().invoke(cli.app, ["compare", str(changed)])
    assert "has changed since" in " ".join(done.output.split())


def test_flow_files_run_by_themselves(small_clinic: Path) -> None:
    script = ROOT / "flows" / "pipeline.py"
    done = subprocess.run(
        [sys.executable, str(script), str(small_clinic)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(children(done.stdout.split()[-1])) == 4
    steps = re.findall(r"(\d+) of (\d+) steps done", done.stderr)  # no terminal: lines, no bar
    assert steps
    assert steps[-1][0] == steps[-1][1]
