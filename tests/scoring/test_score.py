"""Scoring an extract: who is scored, from what, into which files, and what is refused."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import Config, load_config
from ehr_sn.errors import DataError, EhrSnError
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import Cell, comparisons, train_cell
from ehr_sn.scoring import audit
from ehr_sn.scoring.package import read_package, score_many, write_package
from ehr_sn.scoring.registry import Registered, register
from ehr_sn.scoring.score import read_moment, score, score_with_champions, summary

Score = Callable[..., Path]


@pytest.fixture
def run(clinic, models, tmp_path) -> Score:
    def run(source=None, config=clinic.config, **options) -> Path:
        folder, _ = score(config, models, tmp_path / "out", source, **options)
        return folder

    return run


@pytest.fixture
def extract(tmp_path, write_tables) -> Path:
    """Tables of 50 other people, without diagnoses and without follow-up."""
    folder = tmp_path / "extract"
    folder.mkdir()
    write_tables(folder, 50, seed=7)
    (folder / "diagnoses.csv").unlink()
    change(folder / "people.csv", lambda people: people.drop(columns="last_day"))
    return folder


def change(path: Path, how: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    how(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def scores_of(folder: Path) -> pd.DataFrame:
    path = folder / "scores"
    return pd.read_parquet(path if path.exists() else folder / "scores.parquet")


def by_row(folder: Path) -> pd.DataFrame:
    """All that does not tell when it was scored, sorted."""
    frame = scores_of(folder).drop(columns="scored_at").astype({"disease": str})
    return frame.sort_values(["disease", "subject_id"], ignore_index=True)


# -- what is scored --------------------------------------------------------------------------------


def test_the_training_tables_get_the_scores_of_the_training_features(clinic, models, run):
    folder = run()
    scores = scores_of(folder)
    assert list(scores) == [
        "subject_id",
        "prediction_time",
        "disease",
        "probability",
        "spread",
        "observed",
        "model_version",
        "scored_at",
    ]
    expected = score_many([model.package for model in models], clinic.store.values())
    for model, told in zip(models, expected, strict=True):
        ours = scores[scores["disease"] == model.package.disease]
        np.testing.assert_array_equal(ours["probability"], told.probability)
        np.testing.assert_array_equal(ours["spread"], told.spread)
        np.testing.assert_array_equal(ours["observed"], told.observed)
        assert set(ours["model_version"]) == {3}
    assert summary(folder)["rows"] == clinic.store.manifest["rows"]
    assert summary(folder)["warnings"] == []


def test_an_extract_needs_neither_labels_nor_follow_up(run, extract):
    told = summary(run(extract))
    assert (told["rows"], told["absent_features"]) == (50, {})
    assert told["lacking_tables"] == ["diagnoses"]


def test_one_subject_alone_scores_as_among_many(run, extract):
    many = by_row(run(extract))
    only = many["subject_id"][7]
    change(extract / "people.csv", lambda people: people[people["person"] == str(only)])
    change(extract / "labs.csv", lambda labs: labs[labs["person"] == str(only)])
    alone = by_row(run(extract))
    expected = many[many["subject_id"] == only].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, expected, check_exact=True)


def test_shards_give_what_one_gives(run, extract, tmp_path):
    one = by_row(run(extract))
    (tmp_path / "out").rename(tmp_path / "before")
    folder = run(extract, shard_rows=40)
    assert len(list((folder / "scores").iterdir())) > 2
    pd.testing.assert_frame_equal(by_row(folder), one, check_exact=True)


def as_files(folder: Path, tables: dict[str, pd.DataFrame]) -> str:
    (folder / "copy").mkdir()
    for name, table in tables.items():
        table.to_parquet(folder / "copy" / f"{name}.parquet")
    return str(folder / "copy")


def as_duckdb(folder: Path, tables: dict[str, pd.DataFrame]) -> str:
    with duckdb.connect(folder / "copy.duckdb") as db:
        for name, table in tables.items():
            db.register("frame", table)
            db.execute(f"CREATE TABLE {name} AS FROM frame")
    return str(folder / "copy.duckdb")


def as_sqlite(folder: Path, tables: dict[str, pd.DataFrame]) -> str:
    with sqlite3.connect(folder / "copy.db") as db:
        for name, table in tables.items():
            table.to_sql(name, db, index=False)
    return str(folder / "copy.db")


@pytest.mark.parametrize("write", [as_files, as_duckdb, as_sqlite])
def test_the_same_tables_elsewhere_score_alike(run, extract, tmp_path, write):
    tables = {name: pd.read_csv(extract / f"{name}.csv") for name in ("people", "labs")}
    expected = by_row(run(extract))
    found = by_row(run(write(tmp_path, tables)))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_a_postgresql_server_is_named_by_a_variable(run, extract, postgres, monkeypatch):
    from adbc_driver_postgresql import dbapi

    expected = by_row(run(extract))
    with dbapi.connect(postgres, autocommit=True) as connection, connection.cursor() as cursor:
        for name in ("people", "labs"):
            cursor.adbc_ingest(name, pd.read_csv(extract / f"{name}.csv"), mode="replace")
    monkeypatch.setenv("EXTRACT_URL", postgres)
    found = by_row(run("env:EXTRACT_URL"))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


# -- what is set aside, or missing -----------------------------------------------------------------


def test_who_is_not_due_yet_is_set_aside(run, extract):
    told = summary(run(extract, as_of=datetime(2019, 12, 31, 23)))
    assert told["rows"] == 0
    reasons = {entry["reason"]: entry["count"] for entry in told["quarantined"]}
    assert reasons["the prediction time was not reached when the tables were copied"] == 50
    assert summary(run(extract, as_of=datetime(2020, 1, 1)))["rows"] == 50


def test_a_moment_is_read_in_utc():
    assert read_moment("2026-11-22T03:00+01:00") == datetime(2026, 11, 22, 2)
    assert read_moment("2026-11-22") == datetime(2026, 11, 22)
    with pytest.raises(EhrSnError, match="--as-of yesterday: give `now`"):
        read_moment("yesterday")


def test_an_absent_column_is_missing_with_a_warning(run, extract):
    change(extract / "people.csv", lambda people: people.rename(columns={"age": "ages"}))
    folder = run(extract)
    assert summary(folder)["absent_features"] == {
        "age": "the extract has no column 'age' (did you mean 'ages'?)"
    }
    assert scores_of(folder)["observed"].max() == 6


def test_beyond_the_configured_share_nothing_is_scored(clinic, run, extract, tmp_path):
    change(extract / "labs.csv", lambda labs: labs[labs["test"] != "glucose"])
    with pytest.raises(DataError, match="3 of the 7 features are missing in every row") as error:
        run(extract)
    assert "glucose.last: no row has a value, and 66% in training had one" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    patient = clinic.config.scoring.model_copy(update={"max_absent_share": 0.5})
    folder = run(extract, clinic.config.model_copy(update={"scoring": patient}))
    assert list(summary(folder)["absent_features"]) == [
        "glucose.last",
        "glucose.mean",
        "glucose.count",
    ]


def test_values_in_another_unit_are_found_by_the_plausible_range(run, extract):
    def in_mmol(labs: pd.DataFrame) -> pd.DataFrame:
        glucose = labs["test"] == "glucose"
        return labs.assign(result=labs["result"].astype(float).where(~glucose, lambda x: x / 18))

    change(extract / "labs.csv", in_mmol)
    with pytest.raises(DataError, match=r"glucose\.mean: no row has a value"):
        run(extract)


def test_few_subjects_without_a_measurement_are_no_cause_for_refusal(run, extract):
    change(extract / "people.csv", lambda people: people.head(2))
    change(extract / "labs.csv", lambda labs: labs.head(0))
    told = summary(run(extract))
    assert (told["rows"], told["absent_features"]) == (2, {})


def test_a_wrong_type_makes_values_missing_and_is_told(run, extract):
    change(extract / "people.csv", lambda people: people.assign(age="old"))
    told = summary(run(extract))
    assert list(told["absent_features"]) == ["age"]
    assert any("holds text in all of its 50 filled rows" in said for said in told["warnings"])
    assert "'old'" not in str(told)


def test_the_training_s_configuration_wins_and_that_is_said(clinic, run, extract):
    features = clinic.config.features.model_copy(update={"lookback_days": 30})
    told = summary(run(extract, clinic.config.model_copy(update={"features": features})))
    assert ["features: changed" in said for said in told["warnings"]] == [True]
    assert told["observed_rate"] == summary(run(extract))["observed_rate"]


# -- what is refused -------------------------------------------------------------------------------


def without(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.drop(columns=column)


@pytest.mark.parametrize(
    ("table", "how", "message"),
    [
        ("people", without("person"), "cohort.subject_id: table people has no column 'person'"),
        ("labs", without("result"), "numeric_value: table labs has no column 'result'"),
        ("people", lambda people: people.head(0), "people.csv: the table is empty"),
        ("people", lambda people: people.assign(person=None), "no row of table people is usable"),
    ],
)
def test_unusable_tables_are_refused_and_leave_nothing(run, extract, tmp_path, table, how, message):
    change(extract / f"{table}.csv", how)
    with pytest.raises(DataError, match=message):
        run(extract)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_place_without_the_tables_is_refused(run, extract, tmp_path):
    with pytest.raises(DataError, match=r"--input: there is no file or folder .*did you mean"):
        run(tmp_path / "extrakt")
    with pytest.raises(DataError, match="is one file, and there are 3 tables"):
        run(extract / "people.csv")
    (extract / "people.csv").unlink()
    with pytest.raises(DataError, match="has no table people, which says who is to be scored"):
        run(extract)
    with pytest.raises(DataError, match="environment variable NOT_SET is empty or not set"):
        run("env:NOT_SET")


def test_subjects_that_repeat_are_scored_once_or_not_at_all(run, extract):
    def repeat(people: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([people, people[:1], people[1:2].assign(age="77")])

    change(extract / "people.csv", repeat)
    told = summary(run(extract))
    assert told["rows"] == 49
    reasons = {entry["reason"]: entry["count"] for entry in told["quarantined"]}
    assert reasons["repeats an earlier row"] == 1
    assert reasons["subject appears again at this prediction time, with other values"] == 2


def test_models_of_different_features_do_not_score_together(clinic, models, make_clinic, tmp_path):
    small = {"methods": {"standard": ["zero"]}, "max_epochs": 1, "seeds": 1}
    other = make_clinic(700, features={"static": {"age": {"column": "age"}}}, train=small)
    written = write_package(
        other.config, other.store, other.comparison("zero"), "diabetes", tmp_path / "other"
    )
    both = [models[1], Registered("other", 1, read_package(written))]
    with pytest.raises(EhrSnError, match="were trained on different features"):
        score(clinic.config, both, tmp_path / "out")


# -- one large table -------------------------------------------------------------------------------


WIDE = """\
dataset: checkup
tables: {people: {path: people.parquet}}
cohort: {table: people, subject_id: id, prediction_time: day, where: adult == 1}
features:
  static:
    sex: {column: sex, categories: [F, M]}
    weight: {column: weight, unit: kg, plausible: [20, 300], missing_codes: [999]}
  columns: {people: [a, b]}
labels:
  high: {positive: outcome == 1, negative: outcome == 0}
train:
  seeds: 2
  methods: {standard: [zero]}
  max_epochs: 2
  architectures: {mlp: {hidden: [4]}}
"""


def checkups(rows: int, seed: int) -> pd.DataFrame:
    """Some of whom are no adults, of odd weight, or without an id."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(rows, 2)), columns=["a", "b"], dtype=np.float32)
    return frame.mask(rng.random((rows, 2)) < 0.3).assign(
        id=pd.Series(rng.permutation(rows) + 1).mask(rng.random(rows) < 0.02),
        day=pd.Timestamp("2026-01-01"),
        adult=(rng.random(rows) < 0.9).astype(int),
        sex=rng.choice(["F", "M", "?"], rows, p=[0.5, 0.4, 0.1]),
        weight=rng.choice([70, 999, 7000], rows, p=[0.8, 0.1, 0.1]) + rng.integers(0, 9, rows),
        outcome=(frame["a"] > 0).astype(int),
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Config, list[Registered], pd.DataFrame]:
    """Configuration and models of one wide table, and an extract in which two are there twice."""
    folder = tmp_path_factory.mktemp("wide")
    checkups(400, seed=0).to_parquet(folder / "people.parquet")
    (folder / "checkup.yaml").write_text(WIDE + f"data_dir: {folder / 'data'}\n")
    config = load_config(folder / "checkup.yaml")
    store = Store(ingest(config))
    (comparison,) = comparisons(config)
    train_cell(config, store, Cell(*comparison, 0))
    written = write_package(config, store, comparison, "high", folder / "high")
    table = checkups(480, seed=1).drop(columns="outcome")
    twice = pd.concat([table, table[5:6], table[9:10].assign(a=0)], ignore_index=True)
    return config, [Registered("high", 3, read_package(written))], twice


def test_a_large_table_scores_in_its_own_order_as_a_small_one_does(wide, tmp_path):
    config, models, table = wide
    table.to_parquet(tmp_path / "people.parquet")
    whole, _ = score(config, models, tmp_path / "whole", tmp_path / "people.parquet")
    chunks, _ = score(
        config, models, tmp_path / "chunks", tmp_path / "people.parquet", shard_rows=100
    )
    assert len(list((chunks / "scores").iterdir())) == 6  # with that of who is there twice
    pd.testing.assert_frame_equal(by_row(chunks), by_row(whole), check_exact=True)
    one, other = summary(whole), summary(chunks)
    for key in ("rows", "observed_rate", "cohort", "quarantined", "noticed", "warnings"):
        assert one[key] == other[key], key
    order = {"by": ["row_number", "reason"], "ignore_index": True}
    aside = pd.read_parquet(whole / "quarantine.parquet").sort_values(**order)
    pd.testing.assert_frame_equal(
        pd.read_parquet(chunks / "quarantine").sort_values(**order), aside
    )


# -- again, and interrupted ------------------------------------------------------------------------


def test_the_same_again_is_found_and_a_csv_may_be_added(clinic, models, extract, tmp_path):
    folder, is_new = score(clinic.config, models, tmp_path / "out", extract)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, is_new_again = score(clinic.config, models, tmp_path / "out", extract, with_csv=True)
    assert (is_new, is_new_again, again) == (True, False, folder)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]
    written = pd.read_csv(folder / "scores.csv")
    np.testing.assert_array_equal(written["probability"], scores_of(folder)["probability"])
    (extract / "labs.csv").write_text((extract / "labs.csv").read_text().replace("100.", "101."))
    other, _ = score(clinic.config, models, tmp_path / "out", extract)
    assert other != folder


KILLED = """
import os, signal, sys, time
from pathlib import Path
from ehr_sn.config import load_config
from ehr_sn.scoring.package import read_package
from ehr_sn.scoring.registry import Registered
from ehr_sn.scoring.score import score

config, source, output, seconds, *folders = sys.argv[1:]
models = [Registered(Path(folder).name, 3, read_package(folder)) for folder in folders]
for moment in map(float, seconds.split()):
    child = os.fork()
    if not child:
        score(load_config(config), models, Path(output), source, shard_rows=100)
        os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in Path(output).glob("[!.]*"):
        assert (path / "summary.json").exists()
"""


def test_a_killed_scoring_goes_on_to_the_same_files(wide, tmp_path):
    config, models, table = wide
    table.to_parquet(tmp_path / "people.parquet")
    source, out = str(tmp_path / "people.parquet"), tmp_path / "out"
    whole, _ = score(config, models, tmp_path / "whole", source, shard_rows=100)
    folders = [str(model.package.folder) for model in models]
    moments = " ".join(map(str, np.random.default_rng(0).uniform(0, 0.6, 4)))
    command = [sys.executable, "-c", KILLED, str(config._path), source, str(out), moments]
    subprocess.run([*command, *folders], check=True)
    folder, _ = score(config, models, out, source, shard_rows=100)
    assert folder.name == whole.name
    assert [path.name for path in out.iterdir()] == [folder.name]
    pd.testing.assert_frame_equal(by_row(folder), by_row(whole), check_exact=True)
    for path in sorted((whole / "quarantine").iterdir()):
        assert path.read_bytes() == (folder / "quarantine" / path.name).read_bytes()


# -- with champions --------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path, monkeypatch) -> MlflowClient:
    """MLflow on SQLite in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowClient(tracking.tracking_uri(), tracking.tracking_uri())


def test_champions_score_and_it_is_on_record(clinic, service, extract, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(EhrSnError, match="has no champion: run `ehr-sn promote CONFIG` first"):
        score_with_champions(clinic.config, out, str(extract))
    assert not out.exists()
    register(clinic.config, clinic.store, clinic.comparison(), ["diabetes"])
    service.set_registered_model_alias("ehr_sn.clinic.diabetes", "champion", "1")
    lines = audit.verify(audit.audit_path(clinic.config))[0]
    for is_new in (True, False):
        told = score_with_champions(clinic.config, out, str(extract), ["diabetes"])
        assert told[1] == is_new
    experiment = tracking.experiment_of(clinic.config)
    (run,) = service.search_runs([experiment], "tags.`ehr_sn.kind` = 'score'")
    assert run.data.metrics["rows"] == 50
    assert run.data.params["version_diabetes"] == "1"
    assert audit.verify(audit.audit_path(clinic.config))[0] == lines + 2


def test_a_disease_without_a_champion_is_named_and_the_others_are_scored(
    clinic, service, extract, tmp_path
):
    register(clinic.config, clinic.store, clinic.comparison())
    service.set_registered_model_alias("ehr_sn.clinic.hypertension", "champion", "1")
    folder, is_new = score_with_champions(clinic.config, tmp_path / "out", str(extract))
    assert is_new
    assert set(scores_of(folder)["disease"]) == {"hypertension"}
    told = summary(folder)
    assert list(told["models"]) == ["hypertension"]
    assert told["without_champion"] == ["diabetes"]
    (warning,) = told["warnings"]
    assert "1 of 2 diseases has no champion and is not scored: diabetes. Run `ehr-sn" in warning
    log = audit.audit_path(clinic.config).read_text().splitlines()
    assert json.loads(log[-1])["without_champion"] == ["diabetes"]

    again = score_with_champions(clinic.config, tmp_path / "out", str(extract))
    assert again == (folder, False)
    only = ["hypertension"]
    asked, _ = score_with_champions(clinic.config, tmp_path / "out", str(extract), only)
    assert summary(asked)["warnings"] == []  # nobody asked for the other
    pd.testing.assert_frame_equal(by_row(asked), by_row(folder), check_exact=True)


def test_the_command_says_who_has_no_champion_and_prints_the_folder_alone(
    clinic, service, extract, tmp_path
):
    register(clinic.config, clinic.store, clinic.comparison())
    service.set_registered_model_alias("ehr_sn.clinic.hypertension", "champion", "1")
    command = ["score", str(clinic.folder / "clinic.yaml"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*command, "--input", str(extract)])
    assert done.exit_code == 0, done.output
    assert (Path(done.stdout.strip()) / "summary.json").exists()
    assert "1 of 2 diseases has no champion and is not scored: diabetes" in done.stderr
    assert "50 rows, 1 disease;" in done.stderr


def test_a_table_that_is_empty_is_told_without_empty_parentheses(run, extract):
    change(extract / "people.csv", lambda people: people.head(2))
    change(extract / "labs.csv", lambda labs: labs.head(0))
    warnings = summary(run(extract))["warnings"]
    assert any(said.endswith("no row of table labs is usable") for said in warnings)
    assert "()" not in str(warnings)
