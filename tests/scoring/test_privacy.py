"""Pseudonyms in service: the same person in training, scores and outcomes, under one key only."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.errors import ConfigError, EhrSnError
from ehr_sn.ingest.pseudonyms import pseudonymise
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.scoring import audit
from ehr_sn.scoring.monitor import monitor
from ehr_sn.scoring.package import read_package, write_package
from ehr_sn.scoring.registry import Registered, promote, rollback
from ehr_sn.scoring.score import score, score_with_champions

KEY = "EHR_SN_TEST_KEY"
SECTIONS = {
    "privacy": {"pseudonym_key_env": KEY},
    "train": {
        "seeds": 1,
        "methods": {"standard": ["zero"]},
        "max_epochs": 2,
        "architectures": {"mlp": {"hidden": [4]}},
    },
}


@pytest.fixture(scope="module")
def keyed(make_clinic, tmp_path_factory):
    """A clinic with pseudonyms, and its models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "k" * 32)
        clinic = make_clinic(600, 0, **SECTIONS)
        folder = tmp_path_factory.mktemp("packages")
        models = []
        for disease in clinic.store.diseases:
            comparison = clinic.comparison("zero")
            written = write_package(
                clinic.config, clinic.store, comparison, disease, folder / disease
            )
            models.append(Registered(disease, 1, read_package(written)))
        yield clinic, models


@pytest.fixture(scope="module")
def scored(keyed, tmp_path_factory) -> Path:
    clinic, models = keyed
    return score(clinic.config, models, tmp_path_factory.mktemp("scores"))[0]


def test_scores_are_of_the_store_s_subjects_and_name_nobody(keyed, scored) -> None:
    clinic, _ = keyed
    subjects = set(pq.read_table(scored / "scores.parquet")["subject_id"].to_pylist())
    assert subjects == set(clinic.store.read("splits")["subject_id"].to_pylist())
    ids = set(map(str, pd.read_csv(clinic.folder / "people.csv")["person"]))
    assert not subjects & ids


def test_outcomes_are_given_by_the_source_s_ids(keyed, scored, tmp_path: Path) -> None:
    clinic, _ = keyed
    people = pd.read_csv(clinic.folder / "people.csv")
    ill = pd.read_csv(clinic.folder / "diagnoses.csv").query("icd == 'E11'")["person"]
    table = pd.DataFrame(
        {
            "subject_id": people["person"].astype(float),  # as a table with gaps has it
            "prediction_time": pd.Timestamp("2020-01-01"),
            "disease": "diabetes",
            "label": people["person"].isin(ill).astype(int),
        }
    )
    table.to_parquet(tmp_path / "outcomes.parquet")
    found = monitor(clinic.config, scored, tmp_path / "outcomes.parquet").outcomes["diabetes"]
    assert found["n"] == len(people)
    same = monitor(clinic.config, scored, clinic.store.path).outcomes["diabetes"]
    assert same["auroc"] == pytest.approx(found["auroc"], abs=0.02)


def test_another_key_does_not_score(keyed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clinic, models = keyed
    monkeypatch.setenv(KEY, "o" * 32)
    with pytest.raises(ConfigError, match=r"clinic\.yaml:\d+: privacy\.pseudonym_key_env: .*train"):
        score(clinic.config, models, tmp_path / "out")
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match=f"{KEY} is not set"):
        score(clinic.config, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chunk_of_a_large_table_gets_the_same_pseudonyms_in_its_order(keyed) -> None:
    clinic, _ = keyed
    people = pd.read_csv(clinic.folder / "people.csv")
    people = people.sample(len(people), random_state=0).assign(_row=np.arange(len(people)))
    config = clinic.config.model_copy(update={"events": ()})
    config = config.model_copy(update={"tables": {"people": config.tables["people"]}})
    found = []
    for in_order in (True, False):
        with duckdb.connect() as db:
            db.register("chunk", people)
            db.execute("CREATE SCHEMA source; CREATE VIEW source.people AS FROM chunk")
            pseudonymise(db, config, in_order)
            rows = db.execute('SELECT _row, person FROM source."people"').fetchall()
            assert db.execute("SELECT getvariable('subject_type')").fetchone() == ("VARCHAR",)
        if in_order:
            assert [row for row, _ in rows] == list(range(len(people)))
        found.append(dict(rows))
    assert found[0] == found[1]
    known = clinic.store.read("splits")["subject_id"].to_pylist()
    assert set(found[0].values()) == set(known)


def test_what_fails_is_in_the_audit_log_without_what_the_error_says(
    keyed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clinic, _ = keyed
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = clinic.config.model_copy(update={"data_dir": tmp_path / "data"})
    for attempt in (
        lambda: score_with_champions(config, tmp_path / "out"),
        lambda: promote(config, ["diabetes"]),
        lambda: rollback(config, "diabetes"),
    ):
        with pytest.raises(EhrSnError) as told:
            attempt()
        assert str(told.value) not in audit.audit_path(config).read_text()
    path = audit.audit_path(config)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["score", "promote", "rollback"]
    assert {(line["outcome"], line["error"]) for line in lines} == {("failed", "EhrSnError")}
    assert all(line["when"] and line["who"] for line in lines)
    assert audit.verify(path)[0] == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_the_option_nothing_is_as_of_another_store(clinic, tmp_path: Path) -> None:
    content = yaml.safe_load((clinic.folder / "clinic.yaml").read_text())
    path = clinic.folder / "other.yaml"
    path.write_text(yaml.safe_dump(content | {"privacy": {"smallest_cell": 20}}, sort_keys=False))
    assert Store(ingest(load_config(path))).path == clinic.store.path
