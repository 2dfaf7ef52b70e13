"""Monitoring: what is as in training raises no alarm; what has drifted does, by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.errors import DataError
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.scoring.monitor import monitor, newest_scores, psi
from ehr_sn.scoring.score import score

Extract = Callable[..., Path]


@pytest.fixture(scope="module")
def scored(clinic, models, write_tables, tmp_path_factory) -> Extract:
    """A function: what to change of a table → the folder of the scores of 600 other people."""

    def make(
        how: Callable[[pd.DataFrame], pd.DataFrame] | None = None, table: str = "labs"
    ) -> Path:
        folder = tmp_path_factory.mktemp("extract")
        write_tables(folder, 600, seed=5)
        if how is not None:
            path = folder / f"{table}.csv"
            how(pd.read_csv(path)).to_csv(path, index=False)
        return score(clinic.config, models, folder / "scores", folder)[0]

    return make


def alarms(clinic, folder: Path) -> set[tuple[str, str]]:
    return {(d.what, d.where) for d in monitor(clinic.config, folder).alarms}


def test_people_of_the_same_kind_raise_no_alarm(clinic, scored) -> None:
    found = monitor(clinic.config, scored())
    assert found.alarms == []
    watched = {drift.what for drift in found.drifts}
    assert watched == {"missing rate", "values", "observed entries", "scores"}


def test_what_is_no_longer_measured_is_named(clinic, scored) -> None:
    folder = scored(lambda labs: labs[(labs["test"] != "glucose") | (labs["person"] % 3 == 0)])
    found = alarms(clinic, folder)
    assert ("missing rate", "glucose.last") in found
    assert ("observed entries", "") in found
    assert ("missing rate", "pressure.last") not in found


def test_another_unit_is_seen_in_the_values_and_the_scores(clinic, scored) -> None:
    def in_mmol(labs: pd.DataFrame) -> pd.DataFrame:
        glucose = labs["test"] == "glucose"
        return labs.assign(result=labs["result"].where(~glucose, labs["result"] / 2))

    found = alarms(clinic, scored(in_mmol))
    assert {("values", "glucose.last"), ("values", "glucose.mean")} <= found
    assert ("scores", "diabetes") in found
    assert ("values", "pressure.last") not in found
    assert ("missing rate", "glucose.last") not in found


def test_a_new_and_a_vanished_code_are_named(clinic, scored) -> None:
    folder = scored(lambda known: known.replace({"icd": {"I10": "I10.9"}}), "diagnoses")
    codes = {("new code", "diagnoses: I10.9"), ("vanished code", "diagnoses: I10")}
    assert alarms(clinic, folder) == codes


def test_once_outcomes_are_known_discrimination_and_calibration_are_judged(
    clinic, scored, models, write_tables, tmp_path: Path
) -> None:
    folder = scored()
    (tmp_path / "later").mkdir()
    write_tables(tmp_path / "later", 600, seed=5)
    config = clinic.config.model_copy(
        update={"data_root": tmp_path / "later", "data_dir": tmp_path / "data"}
    )
    tables = {n: t.model_copy(update={"path": f"{n}.csv"}) for n, t in config.tables.items()}
    later = Store(ingest(config.model_copy(update={"tables": tables})))
    found = monitor(clinic.config, folder, later.path)
    assert found.alarms == []
    outcome = found.outcomes["diabetes"]
    assert outcome["auroc"] > 0.75
    y = later.labels()[:, later.diseases.index("diabetes")]
    assert outcome["n"] == (~np.isnan(y)).sum()
    assert outcome["n_positive"] == np.nansum(y)

    scores = pd.read_parquet(folder / "scores.parquet")
    rng = np.random.default_rng(0)
    table = scores[["subject_id", "prediction_time", "disease"]].assign(
        label=rng.random(len(scores)) < 0.5  # nothing to do with the scores
    )
    table.astype({"label": int, "disease": str}).to_csv(tmp_path / "labels.csv", index=False)
    wrong = monitor(clinic.config, folder, tmp_path / "labels.csv")
    named = {(d.what, d.where) for d in wrong.alarms}
    assert {("AUROC", "diabetes"), ("calibration slope", "diabetes")} <= named

    table.drop(columns="label").to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(DataError, match="lacks label"):
        monitor(clinic.config, folder, tmp_path / "labels.csv")


def test_labels_that_cannot_be_used_are_counted_and_said_with_no_small_count_on_the_page(
    clinic, scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = scored()
    scores = pd.read_parquet(folder / "scores.parquet").astype({"disease": str})
    table = scores[["subject_id", "prediction_time", "disease"]].astype({"prediction_time": str})
    table["label"] = (np.random.default_rng(0).random(len(table)) < scores["probability"]) * 1
    table.loc[:19, "prediction_time"] = "01/01/20"
    table.loc[20:22, "subject_id"] = [1, 2, 3]
    table.to_csv("labels.csv", index=False)
    command = ["monitor", str(clinic.folder / "clinic.yaml"), "--scores", str(folder)]
    done = CliRunner().invoke(cli.app, [*command, "--labels", "labels.csv"])
    assert done.exit_code == 0, done.output
    assert "labels: 20 rows not used: prediction_time is not ISO 8601" in done.stderr
    assert "labels: 3 rows not used: subject was not scored" in done.stderr
    assert f"labels: {len(table) - 23:,} of {len(table):,} rows met a score" in done.stderr
    page = Path("reports/clinic/monitoring.html").read_text()
    assert "labels: 20 rows not used" in page
    assert "labels: &lt; 11 rows not used: subject was not scored" in page
    told = json.loads(Path("reports/clinic/monitoring.json").read_text())
    assert len(told["warnings"]) == 3
    assert "3 rows" not in "".join(told["warnings"])

    table.assign(prediction_time="01/01/20").to_csv("labels.csv", index=False)
    with pytest.raises(DataError, match="no disease has 11 labels") as error:
        monitor(clinic.config, folder, Path("labels.csv"))
    assert f"\n  labels: 0 of {len(table):,} rows met a score" in str(error.value)
    assert f"\n  labels: {len(table):,} rows not used: prediction_time is not" in str(error.value)


def test_shards_add_up_to_the_whole(clinic, models, write_tables, tmp_path: Path) -> None:
    write_tables(tmp_path, 600, seed=5)
    whole, _ = score(clinic.config, models, tmp_path / "a", tmp_path)
    parts, _ = score(clinic.config, models, tmp_path / "b", tmp_path, shard_rows=500)
    assert (parts / "scores").is_dir()
    one, other = (json.loads((f / "profile.json").read_text()) for f in (whole, parts))
    for now in (one["now"], other["now"]):
        for sums in now["sums"]:
            now["sums"][sums] = round(now["sums"][sums], 6)
    assert one == other


def test_the_command_ends_with_3_on_an_alarm_and_mlflow_keeps_a_step_each_time(
    clinic, scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    usual, odd = scored(), scored(lambda labs: labs[labs["person"] % 5 == 0])
    config = str(clinic.folder / "clinic.yaml")
    for folder, code in ((usual, 0), (usual, 0), (odd, 3)):
        done = CliRunner().invoke(cli.app, ["monitor", config, "--scores", str(folder.parent)])
        assert done.exit_code == code, done.output
    assert "alarm: missing rate of glucose.last" in done.output
    page = Path("reports/clinic/monitoring.html").read_text()
    assert "have drifted too far" in page
    assert "glucose.last" in page
    client = MlflowClient(tracking.tracking_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'clinic'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ehr_sn.kind` = 'monitor'")
    steps = client.get_metric_history(run.info.run_id, "alarms")
    assert [(m.step, m.value > 0) for m in sorted(steps, key=lambda m: m.step)] == [
        (0, False),
        (1, True),
    ]


def test_few_rows_or_no_scores_are_refused(clinic, models, write_tables, tmp_path: Path) -> None:
    write_tables(tmp_path, 40, seed=5)
    folder, _ = score(clinic.config, models, tmp_path / "scores", tmp_path)
    with pytest.raises(DataError, match=r"40 rows, fewer than monitor\.min_rows \(50\)"):
        monitor(clinic.config, folder)
    with pytest.raises(DataError, match="holds no scores"):
        newest_scores(tmp_path / "data")


def test_psi_of_equal_shares_is_0_and_grows_with_the_difference() -> None:
    assert psi([0.3, 0.7], [0.3, 0.7]) == 0
    assert 0 < psi([0.35, 0.65], [0.3, 0.7]) < psi([0.5, 0.5], [0.3, 0.7])
    assert np.isfinite(psi([0, 1], [0.3, 0.7]))
