"""A study through its flow: with a real Prefect and a real MLflow."""

from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking

CONFIG = {
    "study": "uci",
    "title": "Irises",
    "folds": 3,
    "repeats": 1,
    "removed": [0.3, 0.6],
    "training": {"hidden": [4], "max_epochs": 2},
    "variants": {
        name: {"method": name} for name in ("zero", "sparsity_normalization", "constant_scale")
    },
    "tables": {"iris": {"sklearn": "iris", "complete": True}},
}


def test_a_study_ends_with_its_tables_and_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tmp_path / "irises.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    command = ["study", "uci", "--config", str(config)]
    said = CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout
    assert "w/o SN" in said
    assert "iris, 30% removed" in said
    assert "constant_scale" in said

    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("study-uci").experiment_id
    parent, children = [], []
    for run in client.search_runs([experiment]):
        (children if "mlflow.parentRunId" in run.data.tags else parent).append(run)
    assert {run.info.status for run in (*parent, *children)} == {"FINISHED"}
    (parent,) = parent
    assert {run.info.run_name for run in children} == set(CONFIG["variants"])
    (sn,) = (run for run in children if run.info.run_name == "sparsity_normalization")
    assert 0 <= sn.data.metrics["AUROC/iris_ 60_ removed_ min-max"] <= 1
    folds = client.get_metric_history(sn.info.run_id, "AUROC_repeat/iris_ 60_ removed_ min-max")
    assert sorted(m.step for m in folds) == [0, 1, 2]
    assert sn.data.metrics["delta_p_holm/iris_ 30_ removed_ min-max"] <= 1
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"config.json", "scores.csv", "chosen.json", "tables.txt", "sparsity_bias"}
    assert len(client.list_artifacts(parent.info.run_id, "sparsity_bias")) == 2

    again = CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout
    assert again == said
    assert len(client.search_runs([experiment])) == 4
