"""A small simulated cohort, a temporary Prefect and a temporary MLflow for whole pipelines."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_clinic import simulate

CONFIG = """\
dataset: clinic
title: Simulated clinic
tables:
  people: {path: people.csv}
  labs: {path: labs.csv}
  diagnoses: {path: diagnoses.csv}
clock: {unit: days, origin: 2020-01-01}
events:
  - {table: labs, subject_id: person, time: day, code: test, numeric_value: result}
  - {table: diagnoses, subject_id: person, time: day, code: icd}
cohort: {table: people, subject_id: person, prediction_time: 0, follow_up_end: last_day}
features:
  static: {age: {column: age}}
  measurements: {glucose: {}, pressure: {}}
  aggregates: [last, mean, count]
labels:
  diabetes: {codes: [E11], within_days: 1000}
  hypertension: {codes: [I10], within_days: 1000}
splits: {repeats: 2}
train:
  seeds: 3
  methods: {standard: [sparsity_normalization, zero, zero+mask]}
  max_epochs: 12
  batch_size: 64
  learning_rate: 0.02
  architectures:
    mlp: {hidden: [8]}
    mlp_dropout: {hidden: [8], dropout: 0.5}
"""


@pytest.fixture(scope="session", autouse=True)
def prefect() -> Iterator[None]:
    from flows import tasks  # noqa: F401  (sets Prefect's environment before it is imported)

    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a simulated clinic; stores and MLflow live in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_clinic(tmp_path)


@pytest.fixture
def small_clinic(clinic: Path) -> Path:
    """As `clinic`, where two methods are compared behind one architecture on one split."""
    text = clinic.read_text().replace(
        "[sparsity_normalization, zero, zero+mask]", "[zero, zero+mask]"
    )
    text = text.replace("    mlp_dropout: {hidden: [8], dropout: 0.5}\n", "")
    clinic.write_text(text.replace("repeats: 2", "repeats: 1"))
    return clinic


@pytest.fixture(scope="module")
def lasting_clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As `clinic`, for all tests of a module: their current folder stays the same."""
    folder = tmp_path_factory.mktemp("clinic")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield make_clinic(folder)


def make_clinic(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    simulate(folder)
    config = folder / "clinic.yaml"
    config.write_text(CONFIG)
    return config
