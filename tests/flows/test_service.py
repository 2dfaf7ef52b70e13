"""A day in the life of a service: trained, promoted, scored on schedule, watched, trained anew."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flows.monitor import monitor
from flows.pipeline import pipeline
from flows.register import register
from flows.retrain import retrain
from flows.score import score

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from simulated_clinic import simulate
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import load_config
from ehr_sn.scoring import audit
from ehr_sn.scoring.registry import load_champions

SCHEDULES = """\
deployments:
  - name: often
    entrypoint: FLOWS/score.py:score
    parameters: {config_path: clinic.yaml, source: extract, output: scores}
    schedules: [{interval: 5}]
"""
WITHIN = 240  # seconds


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def ehr_sn(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == code, done.output
    return done.output


def scored() -> set[str]:
    return {path.parent.name for path in Path("scores").glob("[!.]*/summary.json")}


def test_a_day_in_the_life(small_clinic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small clinic's tuning rows cannot show much: the rules are what a small clinic would set.
    rules = "promotion: {margin: 0.2, calibration_slope: [0.2, 5], calibration_intercept: [-2, 2]}"
    small_clinic.write_text(f"{small_clinic.read_text()}{rules}\n")
    config = load_config(small_clinic)
    assert retrain(str(small_clinic)) == {"diabetes": True, "hypertension": True}
    first = {d: model.version for d, model in load_champions(config).items()}

    extract = small_clinic.with_name("extract")
    extract.mkdir()
    simulate(extract, subjects=300, seed=1)
    root = Path(__file__).parents[2]
    Path("prefect.yaml").write_text(SCHEDULES.replace("FLOWS", str(root / "flows")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"PREFECT_HOME": str(small_clinic.with_name("home"))}
    for name in ("PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV"):
        environment |= {name: value} if (value := os.environ.get(name)) else {}
    command = [sys.executable, "-c", "from ehr_sn.cli import main; main()", "serve", "--port", port]
    with Path("serve.log").open("w") as log:
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: len(scored()) == 1)  # the schedule has fired: nobody else scores
        usual = scored()
        arriving = small_clinic.with_name("arriving")
        arriving.mkdir()
        simulate(arriving, subjects=300, seed=2)
        labs = pd.read_csv(arriving / "labs.csv")
        labs[(labs["test"] != "glucose") | (labs["person"] % 4 == 0)].to_csv(
            arriving / "labs.csv", index=False
        )
        extract.rename("yesterday")
        arriving.rename(extract)
        until(lambda: len(scored()) == 2)
        (drifted,) = scored() - usual
    finally:
        serving.terminate()
        serving.wait(60)

    assert "0 alarms" in ehr_sn("monitor", "clinic.yaml", "--scores", f"scores/{usual.pop()}")
    told = ehr_sn("monitor", "clinic.yaml", "--scores", f"scores/{drifted}", code=3)
    assert "alarm: missing rate of glucose.last" in told

    assert retrain(str(small_clinic)) == {"diabetes": False, "hypertension": False}  # no news
    simulate(small_clinic.parent, seed=3)
    assert set(retrain(str(small_clinic)).values()) <= {True, False}
    assert "1 of" not in ehr_sn("audit", "verify", "clinic.yaml")
    promoted = [d for d, m in load_champions(config).items() if m.version != first[d]]
    for disease in promoted:
        ehr_sn("rollback", "clinic.yaml", "--disease", disease)
    assert {d: m.version for d, m in load_champions(config).items()} == first
    lines = audit.audit_path(config).read_text().splitlines()
    kinds = [json.loads(line)["what"] for line in lines]
    assert kinds.count("rollback") == len(promoted)
    assert "score" in kinds


def test_the_flows_log_who_has_no_champion_and_which_labels_are_of_no_use(
    small_clinic: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline(str(small_clinic))
    register(str(small_clinic))
    client = MlflowClient(tracking.tracking_uri(), tracking.tracking_uri())
    client.set_registered_model_alias("ehr_sn.clinic.diabetes", "champion", "1")
    folder, is_new = score(str(small_clinic))
    assert is_new
    assert "1 of 2 diseases has no champion and is not scored: hypertension" in caplog.text

    scores = pd.read_parquet(Path(folder) / "scores.parquet")
    label = np.random.default_rng(0).random(len(scores)) < scores["probability"]
    table = scores[["subject_id", "prediction_time", "disease"]].assign(label=label * 1)
    table.loc[:2, "prediction_time"] = None
    table.to_parquet("labels.parquet")
    monitor(str(small_clinic), folder, "labels.parquet")
    assert f"labels: all but < 11 of {len(table):,} rows met a score" in caplog.text
    assert "labels: < 11 rows not used: no prediction_time" in caplog.text
