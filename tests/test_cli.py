"""The command line, run as a user runs it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

PEOPLE = "id,age,seen\n" + "".join(f"{i},{20 + i % 60},2000\n" for i in range(400))
LABS = "id,day,test,value\n" + "".join(f"{i},-5,hb,{10 + i % 7}\n" for i in range(0, 400, 2))
ICD = "id,day,code\n" + "".join(f"{i},100,E11\n" for i in range(0, 400, 5))
CONFIG = """\
dataset: ward
tables:
  people: {path: people.csv}
  labs: {path: labs.csv}
  icd: {path: icd.csv}
clock: {unit: days}
events:
  - {table: labs, subject_id: id, time: day, code: test, numeric_value: value}
  - {table: icd, subject_id: id, time: day, code: code}
cohort: {table: people, subject_id: id, prediction_time: 0, follow_up_end: seen}
features:
  static: {age: {column: age}}
  measurements: {hb: {}}
labels:
  diabetes: {codes: [E11], within_days: 365}
"""


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    for name, text in (("people", PEOPLE), ("labs", LABS), ("icd", ICD)):
        (tmp_path / f"{name}.csv").write_text(text)
    config = tmp_path / "ward.yaml"
    config.write_text(CONFIG)
    return config


COMMAND = [sys.executable, "-c", "from ehr_sn.cli import main; main()"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}


def ehr_sn(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_every_command_and_where_to_start(tmp_path: Path) -> None:
    said = ehr_sn(tmp_path, "--help").stdout
    for command in ("run", "ingest", "train", "compare", "report", "check", "ui"):
        assert f"│ {command} " in said
    assert "ehr-sn run configs/nafld.yaml" in said
    assert "reports/DATASET" in ehr_sn(tmp_path, "report", "--help").stdout  # brackets are markup


def test_check_reports_and_writes_nothing(ward: Path) -> None:
    before = sorted(ward.parent.iterdir())
    done = ehr_sn(ward.parent, "check", "ward.yaml")
    assert done.returncode == 0, done.stderr
    assert "ward.yaml is valid: 400 rows, 8 features" in " ".join(done.stdout.split())
    assert sorted(ward.parent.iterdir()) == before


def test_check_lists_ten_findings_of_a_kind(ward: Path) -> None:
    history = ", ".join(f"h{i:02}: [X{i:02}]" for i in range(13))
    ward.write_text(CONFIG.replace("features:\n", f"features:\n  history: {{{history}}}\n"))
    said = ehr_sn(ward.parent, "check", "ward.yaml").stdout
    assert [f"history.h{i:02}" in said for i in range(13)] == [True] * 10 + [False] * 3
    assert "… and 3 more" in said


def test_check_says_loudly_at_the_end_what_is_blocking(ward: Path) -> None:
    labs = ward.parent / "labs.csv"
    labs.write_text(labs.read_text().replace("2,-5,", "2,5.1.2000,"))
    done = ehr_sn(ward.parent, "check", "ward.yaml")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "is valid" not in said
    assert said.index("Findings that are blocking") < said.index("Findings that a person should")
    _, _, last = said.partition("BLOCKING: 1 of the findings say")
    assert "- labs: quarantine, 20 % (40 of 200): time does not parse as a time" in last
    assert "`clock: {format: …}`" in last
    assert ehr_sn(ward.parent, "check", "ward.yaml", "--strict").returncode == 1
    strict = ehr_sn(ward.parent, "check", "ward.yaml", "--json", "--strict")
    assert strict.returncode == 1
    first = json.loads(strict.stdout)["findings"][0]
    assert (first["severity"], first["share"]) == ("blocking", 0.2)


def test_check_is_strict_only_about_what_is_blocking(ward: Path) -> None:
    assert ehr_sn(ward.parent, "check", "ward.yaml", "--strict").returncode == 0


def test_export_writes_meds_once(ward: Path) -> None:
    done = ehr_sn(ward.parent, "export", "ward.yaml", "--to", "meds", "--format", "meds")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "meds"
    assert (ward.parent / "meds" / "metadata" / "dataset.json").exists()
    again = ehr_sn(ward.parent, "export", "ward.yaml", "--to", "meds", "--format", "meds")
    assert again.returncode == 1
    assert "Error: meds: exists and is not empty" in again.stderr


def test_check_gives_machines_json(ward: Path) -> None:
    report = json.loads(ehr_sn(ward.parent, "check", "ward.yaml", "--json").stdout)
    assert report["labels"]["diabetes"]["positive"] == 80


@pytest.mark.parametrize("command", ["run", "train", "ingest", "check", "compare", "report"])
def test_a_typo_is_one_message_and_no_traceback(ward: Path, command: str) -> None:
    ward.write_text(CONFIG.replace("prediction_time", "predicton_time"))
    done = ehr_sn(ward.parent, command, "ward.yaml")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ward.yaml:10: cohort.predicton_time: unknown key" in done.stderr
    assert "did you mean 'prediction_time'?" in done.stderr


def test_brackets_in_a_message_are_shown(ward: Path) -> None:
    blends = "train: {blends: {both: [[zero, mlp], xgboost]}}\n"
    ward.write_text(CONFIG + blends)
    done = ehr_sn(ward.parent, "check", "ward.yaml")
    assert "name a baseline, or [method, scaler, architecture]" in done.stderr


def test_bad_tables_end_a_run_with_one_message_and_leave_nothing(ward: Path) -> None:
    (ward.parent / "icd.csv").write_text("id,day,code\n1,100,E11\n")
    done = ehr_sn(ward.parent, "run", "ward.yaml")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "at least 2 of each are needed" in done.stderr
    assert not list(ward.parent.glob("data/ward/*"))
    assert not list(ward.parent.glob("mlruns/*"))


def test_compare_without_a_run_says_what_to_do(ward: Path) -> None:
    done = ehr_sn(ward.parent, "compare", "ward.yaml")
    assert done.returncode == 1
    assert "has no finished run of 'ward'" in done.stderr
    assert "ehr-sn run" in done.stderr


@pytest.mark.parametrize("reached", ["data/ward", "data/ward/*/manifest.json", "mlruns/mlflow.db"])
def test_ctrl_c_stops_with_one_line_that_says_how_to_resume(ward: Path, reached: str) -> None:
    with running_until(ward, reached) as running:
        running.send_signal(signal.SIGINT)
        assert_stopped(running)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_ctrl_c_in_a_terminal_ends_the_server_and_all_workers_too(ward: Path, kind: str) -> None:
    ward.write_text(f"{ward.read_text()}runner: {{kind: {kind}, workers: 2}}\n")
    with running_until(ward, "data/ward/cells") as running:
        servers = [p for p in group_of(running) if "uvicorn" in p.cmdline()]
        os.killpg(running.pid, signal.SIGINT)
        assert_stopped(running)
    with closing(sqlite3.connect(ward.parent / "mlruns" / "mlflow.db")) as db:
        (status,) = db.execute("SELECT status FROM runs WHERE name LIKE 'ward %'").fetchone()
    assert status == "FAILED"
    assert len(servers) == 1  # for all workers
    # Python's tracker of resources learns of the command's end by it, so it ends a moment later.
    assert left_of(running, within=15) == []


def test_workers_end_when_the_run_is_killed(ward: Path) -> None:
    ward.write_text(f"{ward.read_text()}runner: {{kind: processes, workers: 2}}\n")
    with running_until(ward, "data/ward/cells") as running:
        running.kill()
        running.wait(timeout=30)
    left = left_of(running, within=60, but=1)  # Prefect's server, which a killed command cannot end
    assert len(left) <= 1
    assert all("uvicorn" in process.cmdline() for process in left)
    for process in left:
        process.terminate()


@contextmanager
def running_until(ward: Path, reached: str) -> Iterator[subprocess.Popen[str]]:
    """The run of the ward, in a process group of its own, once such a file is there."""
    with subprocess.Popen(
        [*COMMAND, "run", "ward.yaml"],
        cwd=ward.parent,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        while running.poll() is None and not list(ward.parent.glob(reached)):
            sleep(0.1)
        yield running


def assert_stopped(running: subprocess.Popen[str]) -> None:
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert said.rstrip().endswith("Stopped. Run the same command again to resume.")
    assert "Traceback" not in said
    assert "leaked" not in said  # what libraries say while their process ends


def left_of(leader: subprocess.Popen[str], within: float, but: int = 0) -> list[psutil.Process]:
    """The processes of its group that are alive after so many seconds, or once `but` few are."""
    until = monotonic() + within
    while len(left := group_of(leader)) > but and monotonic() < until:
        sleep(0.1)
    return left


def group_of(leader: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that are alive in its process group."""
    return [p for p in psutil.process_iter() if in_group(p, leader) and p.status() != "zombie"]


def in_group(process: psutil.Process, leader: subprocess.Popen[str]) -> bool:
    try:
        return os.getpgid(process.pid) == leader.pid
    except ProcessLookupError:
        return False
