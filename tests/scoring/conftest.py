"""A simulated clinic, ingested and trained once: what packages are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from simulated_clinic import simulate

from ehr_sn.config import Config, baseline_is_installed, load_config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import NOTHING, Cell, Comparison, comparisons, train_cell
from ehr_sn.scoring.package import read_package, write_package
from ehr_sn.scoring.registry import Registered

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
    """The clinic, whose configuration also compares baselines and blends of them; trained."""
    path = clinic.folder / "baselines.yaml"
    baselines = ["hist_gradient_boosting", "logistic_regression", "boosting+masked_copies"]
    baselines += ["lightgbm"] if baseline_is_installed("lightgbm") else []
    blends = {
        "of_all_kinds": [["zero+mask", "standard", "mlp"], *baselines[:2]],
        "of_draws": [baselines[-1], ["multiple_imputation", "standard", "mlp"]],
    }
    train = CONTENT["train"] | {"baselines": baselines, "blends": blends}
    content = CONTENT | {"data_dir": str(clinic.folder / "data"), "train": train}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    config = load_config(path)
    for name in (*baselines, *blends):
        train_cell(config, clinic.store, Cell(NOTHING, NOTHING, name, 0))
    return Clinic(clinic.folder, config, clinic.store)


@pytest.fixture(scope="session")
def models(clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> list[Registered]:
    """The clinic's packages as the registry hands them out, version 3 of each."""
    folder, comparison = tmp_path_factory.mktemp("packages"), clinic.comparison()
    written = [
        write_package(clinic.config, clinic.store, comparison, disease, folder / disease)
        for disease in clinic.store.diseases
    ]
    return [Registered(path.name, 3, read_package(path)) for path in written]


@pytest.fixture(scope="session")
def write_tables() -> Callable[..., None]:
    """A function: folder, subjects and seed to the clinic's tables there."""
    return simulate
