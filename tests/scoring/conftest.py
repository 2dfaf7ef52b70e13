"""A simulated clinic, ingested and trained once: what packages are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn.config import Config, baseline_is_installed, load_config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import NOTHING, Cell, Comparison, comparisons, train_cell

CONTENT: dict[str, Any] = {
    "dataset": "clinic",
    "tables": {
        "people": {"path": "people.csv"},
        "labs": {"path": "labs.csv"},
        "diagnoses": {"path": "diagnoses.csv"},
    },
    "clock": {"unit": "days", "origin": "2020-01-01"},
    "events": [
        {
            "table": "labs",
            "subject_id": "person",
            "time": "day",
            "code": "test",
            "numeric_value": "result",
        },
        {"table": "diagnoses", "subject_id": "person", "time": "day", "code": "icd"},
    ],
    "cohort": {
        "table": "people",
        "subject_id": "person",
        "prediction_time": 0,
        "follow_up_end": "last_day",
    },
    "features": {
        "static": {"age": {"column": "age", "unit": "years", "plausible": [18, 110]}},
        "measurements": {"glucose": {"unit": "mg/dL", "plausible": [20, 400]}, "pressure": {}},
        "aggregates": ["last", "mean", "count"],
    },
    "labels": {
        "diabetes": {"codes": ["E11"], "within_days": 1000},
        "hypertension": {"codes": ["I10"], "within_days": 1000},
    },
    "train": {
        "seeds": 2,
        "methods": {"standard": ["zero", "zero+mask", "multiple_imputation"]},
        "max_epochs": 8,
        "batch_size": 64,
        "learning_rate": 0.02,
        "architectures": {"mlp": {"hidden": [8]}},
    },
}


def simulate(folder: Path, subjects: int, seed: int = 0) -> None:
    """Three CSV tables: two tests, each of two thirds of the people, and the diseases they drive.

    Nothing else but the tests drives them, so a model of the first thousand holds for the next.
    """
    rng = np.random.default_rng(seed)
    person = np.arange(1000, 1000 + subjects)
    people = pd.DataFrame(
        {"person": person, "age": rng.integers(20, 90, subjects), "last_day": 2000}
    )
    labs, diagnoses = [], []
    for test, icd in (("glucose", "E11"), ("pressure", "I10")):
        level = rng.normal(100, 15, subjects)
        measured = rng.random(subjects) < 2 / 3
        for day in (-300, -20):
            result = level + rng.normal(0, 3, subjects)
            rows = {"person": person, "day": day, "test": test, "result": result.round(1)}
            labs.append(pd.DataFrame(rows)[measured])
        ill = rng.random(subjects) < 1 / (1 + np.exp(-(level - 110) / 5))
        rows = {"person": person, "day": rng.integers(1, 1000, subjects), "icd": icd}
        diagnoses.append(pd.DataFrame(rows)[ill])
    people.to_csv(folder / "people.csv", index=False)
    pd.concat(labs).to_csv(folder / "labs.csv", index=False)
    pd.concat(diagnoses).to_csv(folder / "diagnoses.csv", index=False)


@dataclass(frozen=True)
class Clinic:
    """A trained configuration and its store."""

    folder: Path
    config: Config
    store: Store

    def comparison(self, method: str = "zero+mask") -> Comparison:
        return next(c for c in comparisons(self.config) if c[0] == method)


MakeClinic = Callable[..., Clinic]


@pytest.fixture(scope="session")
def make_clinic(tmp_path_factory: pytest.TempPathFactory) -> MakeClinic:
    """A function: subjects, seed and changed sections to a clinic, trained."""

    def make(subjects: int = 1500, seed: int = 0, **sections: Any) -> Clinic:
        folder = tmp_path_factory.mktemp("clinic")
        simulate(folder, subjects, seed)
        path = folder / "clinic.yaml"
        content = CONTENT | {"data_dir": str(folder / "data")} | sections
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        config = load_config(path)
        store = Store(ingest(config))
        for comparison in comparisons(config):
            train_cell(config, store, Cell(*comparison, 0))
        return Clinic(folder, config, store)

    return make


@pytest.fixture(scope="session")
def clinic(make_clinic: MakeClinic) -> Clinic:
    return make_clinic()


@pytest.fixture(scope="session")
def with_baselines(clinic: Clinic) -> Clinic:
    """The clinic, whose configuration also compares baselines, few trees each; trained."""
    path = clinic.folder / "baselines.yaml"
    baselines = ["hist_gradient_boosting", "logistic_regression", "boosting+masked_copies"]
    baselines += ["lightgbm"] if baseline_is_installed("lightgbm") else []
    train = CONTENT["train"] | {"baselines": baselines}
    content = CONTENT | {"data_dir": str(clinic.folder / "data"), "train": train}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    config = load_config(path)
    for baseline in baselines:
        train_cell(config, clinic.store, Cell(NOTHING, NOTHING, baseline, 0))
    return Clinic(clinic.folder, config, clinic.store)


@pytest.fixture(scope="session")
def write_tables() -> Callable[..., None]:
    """A function: folder, subjects and seed to the clinic's tables there."""
    return simulate
