"""Scoring an extract: who is scored, from what, into which files, and what is refused."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_sn.config import load_config
from ehr_sn.errors import DataError, EhrSnError
from ehr_sn.scoring.package import read_package, score_many, write_package
from ehr_sn.scoring.registry import Registered
from ehr_sn.scoring.score import score, summary


@pytest.fixture(scope="session")
def packages(clinic, tmp_path_factory) -> list[Package]:
    folder = tmp_path_factory.mktemp("packages")
    return [
        read_package(write_package(clinic.config, clinic.store, clinic.comparison(), d, folder / d))
        for d in clinic.store.diseases
    ]


def scores_of(folder: Path) -> pd.DataFrame:
    path = folder / "scores"
    return pd.read_parquet(path if path.exists() else folder / "scores.parquet")


@pytest.fixture
def scored(clinic, models, tmp_path) -> Callable:
    def run(source=None, **options):
        folder, _ = score(clinic.config, models, tmp_path / "scores", source, **options)
        return folder

    return run


@pytest.fixture
def extract(tmp_path, write_tables) -> Path:
    """Tables of 50 other people, without diagnoses and without follow-up."""
    folder = tmp_path / "extract"
    folder.mkdir()
    write_tables(folder, 50, seed=7)
    (folder / "diagnoses.csv").unlink()
    people = pd.read_csv(folder / "people.csv")
    people.drop(columns="last_day").to_csv(folder / "people.csv", index=False)
    return folder


def test_the_training_tables_get_the_scores_of_the_training_features(clinic, models, scored):
    folder = scored()
    scores = scores_of(folder)
    expected = score_many([model.package for model in models], clinic.store.values())
    for model, told in zip(models, expected, strict=True):
        ours = scores[scores["disease"] == model.package.disease]
        np.testing.assert_array_equal(ours["probability"], told.probability)
        np.testing.assert_array_equal(ours["spread"], told.spread)
        np.testing.assert_array_equal(ours["observed"], told.observed)
    assert summary(folder)["rows"] == clinic.store.manifest["rows"]


def test_an_extract_needs_no_labels(scored, extract):
    folder = scored(extract)
    told = summary(folder)
    assert told["rows"] == 50
    assert told["absent_features"] == {}
    assert told["lacking_tables"] == ["diagnoses"]
