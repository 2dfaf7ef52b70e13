"""Many shards come to what one comes to; what is finished is kept; what is not leaves nothing."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest import folders, shards, store
from ehr_sn.ingest.store import Store, check, ingest

ROWS = 700  # a shard: about five of them
KEYS = ["subject_id", "prediction_time"]


def small(config, work):
    shards.prepare(config, work, ROWS)


@pytest.fixture
def messy(busy):
    """A hospital with something for every check to find, and 900 more laboratory values."""
    rng = np.random.default_rng(3)
    values = rng.normal(100, 9, 300).round(1)
    ids = np.arange(1, 301)
    extra = [
        pd.DataFrame({"id": ids, "day": 50, "test": "a", "x": values}),
        pd.DataFrame({"id": ids, "day": 50, "test": "b", "x": values}),
        pd.DataFrame({"id": [9, 8, 7], "day": 5, "test": "rare", "x": 1}),
        pd.DataFrame({"id": [None, "odd", "999999"], "day": 5, "test": "sbp", "x": 100}),
        pd.DataFrame({"id": [5, 6, 6], "day": [None, "odd", 3], "test": "sbp", "x": ["1", "y", 9]}),
    ]
    labs = pd.read_csv(busy.folder / "labs.csv", dtype=str)
    labs = pd.concat([labs, labs.sample(40, random_state=1), *extra], ignore_index=True)
    patients = pd.read_csv(busy.folder / "patients.csv")
    patients = pd.concat([patients, patients.head(9), patients.tail(7).assign(age=1)])
    patients["months"] = patients["age"] * 12
    busy.write(labs=labs, patients=patients)
    busy.content = deepcopy(busy.content)
    busy.content["features"]["static"]["months"] = {"column": "months"}
    busy.content["features"]["history"]["cured"] = ["F71"]
    return busy


@pytest.fixture
def ruled(messy):
    """The hospital with every kind of source and of rule, and given splits."""
    folder = messy.folder
    labs = pd.read_csv(folder / "labs.csv", dtype=str)
    labs.loc[len(labs)] = ["10", "-36000", "sbp", "100"]
    labs["unit"] = np.where(labs.index % 3 == 0, "kPa", "mmHg")
    with closing(sqlite3.connect(folder / "labs.sqlite")) as db:
        labs.to_sql("results", db, index=False)
    patients = pd.read_csv(folder / "patients.csv")
    patients["born"] = -365.25 * patients["age"]
    patients["seen"] = patients["id"] % 80 - 60
    messy.write(patients=patients)
    diagnoses = pd.read_csv(folder / "diagnoses.csv")
    for part, rows in enumerate((diagnoses[::2], diagnoses[1::2])):
        conditions = [
            {
                "resourceType": "Condition",
                "subject": {"reference": f"Patient/{row.id}"},
                "code": {"coding": [{"code": row.icd}]},
                "onsetDateTime": str(
                    (pd.Timestamp("2020-01-01") + pd.Timedelta(row.day, "D")).date()
                ),
            }
            for row in rows.itertuples()
        ]
        lines = "".join(json.dumps(condition) + "\n" for condition in conditions)
        (folder / f"Condition{part}.ndjson").write_text(lines)
    ids = np.arange(1, 301)
    named = np.array(["train", "train", "train", "tuning", "held_out"])
    messy.write(dealt=pd.DataFrame({"id": ids, "split": named[ids % 5]}))
    content = messy.content
    content["databases"] = {"lab": {"path": "labs.sqlite"}}
    content["tables"] = {
        "patients": {"path": "patients.csv"},
        "labs": {"database": "lab", "table": "results"},
        "conditions": {"path": "Condition*.ndjson", "fhir": "Condition"},
        "coded": {
            "sql": "SELECT c.subject_id AS id, c.onset, c.code FROM conditions c "
            "LEFT JOIN patients p ON p.id = c.subject_id WHERE p.age IS NULL OR p.age <> '33'"
        },
        "dealt": {"path": "dealt.csv"},
    }
    content["events"] = [
        content["events"][0] | {"unit": "unit", "where": "test != 'rare'"},
        {
            "table": "coded",
            "subject_id": "id",
            "time": "onset",
            "code": "code",
            "clock": {"unit": "timestamp"},
        },
    ]
    content["cohort"] |= {
        "hours_after": 24,
        "observation_start": "seen",
        "eligibility": {
            "age": {"born": "born", "at_least": 22, "below": 79},
            "observed_days": 3,
            "follow_up_days": 30,
            "without": {"smoking": ["F*"]},
        },
    }
    content["features"]["measurements"]["sbp"] |= {"units": {"kPa": 7.5}}
    content["labels"]["diabetes"] = {
        "codes": [{"range": ["E08", "E13"]}],
        "gap_days": 60,
        "within_days": 365,
    }
    content["splits"] = {"table": "dealt"}
    return messy


def config_of(hospital, folder, **changes):
    repeats = {} if "splits" in hospital.content else {"splits__repeats": 2}
    return hospital.config(data_dir=str(hospital.folder / folder), **repeats, **changes)


def by_row(store, table):
    keys = None if table in ("splits", "quarantine") else KEYS
    frame = store.read(table).to_pandas()
    return frame.sort_values(keys or list(frame), ignore_index=True)


def test_many_shards_hold_what_one_holds_bit_for_bit(messy):
    one = Store(ingest(config_of(messy, "one")))
    many = Store(ingest(config_of(messy, "many"), prepare=small))
    assert one.fingerprint == many.fingerprint
    for table in (*shards.TABLES, shards.FOLLOW_UP):
        parts = sorted(path.name for path in (many.path / table).iterdir())
        assert parts == [f"part-{shard:05}.parquet" for shard in range(len(parts))]
        assert len(parts) > 3
        pd.testing.assert_frame_equal(by_row(one, table), by_row(many, table), check_exact=True)
    said = [dict(store.manifest) for store in (one, many)]
    files = [manifest.pop("files") for manifest in said]
    assert len(files[1]) == len(parts) * len(files[0])
    checks = {finding["check"] for finding in said[0]["findings"]}
    assert checks >= {"repeated code", "repeated column", "quarantine", "absent code"}
    assert checks >= {"unused code", "constant feature"}
    for manifest in said:
        manifest.pop("created_at")
    assert said[0] == said[1]


def test_every_kind_of_source_and_of_rule_comes_to_the_same_in_many_shards(ruled):
    one = Store(ingest(config_of(ruled, "one")))
    many = Store(ingest(config_of(ruled, "many"), prepare=small))
    assert len(list((many.path / "values").iterdir())) > 3
    for table in (*shards.TABLES, shards.FOLLOW_UP):
        pd.testing.assert_frame_equal(by_row(one, table), by_row(many, table), check_exact=True)
    said = [dict(store.manifest) for store in (one, many)]
    for manifest in said:
        manifest.pop("files")
        manifest.pop("created_at")
    assert said[0] == said[1]
    for rule in said[0]["cohort"][1:]:
        assert rule["excluded"] > 0 or rule["rule"].endswith("follow_up_days")
    assert said[0]["labels"]["diabetes"]["recorded_in_gap"] > 0
    assert said[0]["event_rows"]["labs"]["left_out"] == 3
    checks = {finding["check"] for finding in said[0]["findings"]}
    assert checks >= {"absent code", "event before birth", "left out", "unused code"}
    assert list((ruled.folder / "many" / "hospital").iterdir()) == [many.path]


def test_risks_are_estimated_from_all_shards_together(busy):
    patients = pd.read_csv(busy.folder / "patients.csv")
    patients["end"] = 120 + (patients["id"] * 7) % 500
    patients["dead"] = patients["id"] % 4 == 0
    busy.write(patients=patients.astype({"dead": int}))
    one, many = (
        Store(ingest(config_of(busy, folder, cohort__died="dead == 1"), **how))
        for folder, how in (("one", {}), ("many", {"prepare": small}))
    )
    assert len(list((many.path / "follow_up").iterdir())) > 3
    assert one.manifest["risks"] == many.manifest["risks"]
    risk = one.manifest["risks"]["diabetes"]
    assert risk["estimated"] < risk["deaths_as_leaving"] < risk["labelled"]
    assert one.manifest["findings"] == many.manifest["findings"]
    of_one, of_many = (
        dict(zip(s.read("values")["subject_id"].to_pylist(), s.follow_up()[:, 0], strict=True))
        for s in (one, many)
    )
    assert of_one == pytest.approx(of_many, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort__eligibility__age": {"born": "born", "at_least": 99}}, "true for none of the 29"),
        ({"events__0__where": "test == 'rarer'"}, "left out, for `where` is not true"),
        (
            {
                "labels__diabetes": {"codes": ["E*"], "prevalent": True},
                "features__history": {"d": [{"file": "d.txt"}], "e": [{"descendants_of": "E11"}]},
            },
            "features.history.e: holds a code of labels.diabetes",
        ),
        (
            {
                "features__measurements__hdl": {
                    "codes": ["hdl", "sb*"],
                    "unit": "m",
                    "units": {"": 1},
                }
            },
            "has other units",
        ),
        ({"tables__coded__sql": "SELECT *, 1 AS id FROM conditions WHERE code = ''"}, "is empty"),
        (
            {
                "tables__coded__sql": "SELECT code, subject_id AS id, onset FROM conditions "
                "JOIN (SELECT 5 AS y) ON code = y"
            },
            "cast what is compared",
        ),
        ({"splits__column": "id"}, "211 have a split there that is none of"),
        ({"tables__dealt__path": "few.csv"}, "none of"),
    ],
)
def test_errors_of_rules_and_sources_are_those_of_one_shard(ruled, changes, message):
    ruled.content["tables"]["concept_ancestor"] = {"path": "concept_ancestor.csv"}
    ruled.write(
        concept_ancestor=pd.DataFrame({"ancestor_concept_id": [1], "descendant_concept_id": [2]}),
        few=pd.DataFrame({"id": [1, 2, 3, 3], "split": ["train", "test", "train", "tuning"]}),
    )
    (ruled.folder / "d.txt").write_text("D*\n")
    told = []
    for prepare in (shards.prepare, small):
        with pytest.raises(DataError, match=message) as error:
            ingest(config_of(ruled, "data", **changes), prepare=prepare)
        told.append(str(error.value))
        assert list((ruled.folder / "data" / "hospital").iterdir()) == []
    assert told[0] == told[1]


def test_rows_of_a_part_are_one_shard_s_subjects_in_order(messy):
    many = Store(ingest(config_of(messy, "many"), prepare=small))
    seen = set()
    for part in sorted((many.path / "values").iterdir()):
        subjects = pd.read_parquet(part)["subject_id"]
        assert subjects.is_monotonic_increasing
        assert not seen & set(subjects)
        seen |= set(subjects)
    assert many.values().shape[0] == len(seen) == many.labels().shape[0] == len(many.splits())
    frame = many.read("values", KEYS).to_pandas()
    dealt = many.read("splits").to_pandas().set_index("subject_id")
    np.testing.assert_array_equal(many.splits(), dealt.loc[frame["subject_id"]].to_numpy())


def test_check_of_many_shards_writes_nothing_and_says_the_same(messy):
    config = config_of(messy, "many")
    checked = check(config, ROWS)
    assert not (messy.folder / "many").exists()
    stored = dict(Store(ingest(config, prepare=small)).manifest)
    for manifest in (checked, stored):
        manifest.pop("created_at")
    stored.pop("files")
    assert json.loads(json.dumps(checked)) == stored


def test_text_subjects_and_shared_tables_are_dealt_too(messy):
    labs = pd.read_csv(messy.folder / "labs.csv", dtype=str)
    patients = pd.read_csv(messy.folder / "patients.csv", dtype=str)
    diagnoses = pd.read_csv(messy.folder / "diagnoses.csv", dtype=str)
    named = {
        name: frame.assign(id="P" + frame["id"])
        for name, frame in {"labs": labs, "patients": patients, "diagnoses": diagnoses}.items()
    }
    messy.write(**named, concepts=pd.DataFrame({"code": ["E11"], "name": ["Diabetes"]}))
    messy.content["tables"]["concepts"] = {"path": "concepts.csv"}
    one = Store(ingest(config_of(messy, "one")))
    many = Store(ingest(config_of(messy, "many"), prepare=small))
    pd.testing.assert_frame_equal(by_row(one, "values"), by_row(many, "values"), check_exact=True)
    assert many.manifest["tables"]["concepts"]["rows"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels__flu": {"codes": ["J10"], "within_days": 365}},
            "labels.flu: no event has any of its codes",
        ),
        (
            {"labels__flu": {"codes": ["F17"], "within_days": 365}},
            r"deals \d positive and \d+ negative rows to",
        ),
        ({"events__0__numeric_value": "test"}, "holds text in all of its 3,040 filled rows"),
        ({"cohort__where": "age > 1000"}, "true for none of the 293 rows"),
        ({"features__static__age": {"column": "age", "categories": [500]}}, "none of the categ"),
        ({"events__1__time": "icd"}, "no row of table diagnoses is usable"),
    ],
)
def test_what_no_shard_can_judge_alone_is_an_error_as_of_one(messy, changes, message):
    told = []
    for prepare in (shards.prepare, small):
        with pytest.raises(DataError, match=message) as error:
            ingest(config_of(messy, "data", **changes), prepare=prepare)
        told.append(str(error.value))
        assert list((messy.folder / "data" / "hospital").iterdir()) == []
    assert told[0] == told[1]


# -- interrupted ---------------------------------------------------------------------------------

INGEST = """
import os, signal, sys
from ehr_sn.config import load_config
from ehr_sn.ingest import shards, store

config, rows, kill_at = load_config(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
write_json = shards.write_json

def killed_instead(path, content):
    if path.name == f"{kill_at:05}.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, content)

shards.write_json = killed_instead
config = config.model_copy(update={"runner": config.runner.model_copy(update={"workers": 1})})
store.ingest(config, prepare=lambda *args: shards.prepare(*args, rows))
"""


def ingest_in_a_process(hospital, kill_at=-1, **options):
    command = [sys.executable, "-c", INGEST, str(hospital.folder / "hospital.yaml"), str(ROWS)]
    return subprocess.run(
        [*command, str(kill_at)], capture_output=True, text=True, check=False, **options
    )


def test_a_killed_ingest_redoes_only_what_was_not_finished(messy, monkeypatch):
    whole = Store(ingest(config_of(messy, "whole"), prepare=small)).manifest["files"]
    config = config_of(messy, "data")
    done = ingest_in_a_process(messy, kill_at=3)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (work,) = (messy.folder / "data" / "hospital").iterdir()
    assert work.name.startswith(".work-")
    built, landed = [], []
    build, land = shards._build, shards._land
    monkeypatch.setattr(shards, "_build", lambda *a: (built.append(a[3]), build(*a)))
    monkeypatch.setattr(shards, "_land", lambda *a: (landed.append(a), land(*a)))
    finished = Store(ingest(config, prepare=small))
    assert sorted(built) == [
        shard for shard in range(len(whole) // (len(shards.TABLES) + 1)) if shard >= 3
    ]
    assert landed == []
    assert finished.manifest["files"] == whole
    assert [path.name for path in finished.path.parent.iterdir()] == [finished.fingerprint]


def test_what_was_abandoned_long_ago_is_cleared_away(messy):
    config_of(messy, "data")
    ingest_in_a_process(messy, kill_at=1)
    (work,) = (messy.folder / "data" / "hospital").iterdir()
    other = config_of(messy, "data", splits__seed=7)
    ingest(other)
    assert work.exists()  # it may still be wanted
    long_ago = time.time() - 2 * store.ABANDONED
    for path in (work, *work.iterdir()):
        os.utime(path, (long_ago, long_ago))
    ingest(config_of(messy, "data", splits__seed=8))
    assert not work.exists()


def test_copies_of_databases_that_a_killed_ingest_left_are_cleared_away(ruled):
    config = config_of(ruled, "data")
    ingest_in_a_process(ruled, kill_at=1)
    folder = ruled.folder / "data" / "hospital"
    (copies,) = folder.glob(".partial-*")
    assert (copies / "labs.parquet").exists()
    just_unlocked = time.time() - 2 * folders.UNLOCKED
    for path in (copies, *copies.iterdir()):
        os.utime(path, (just_unlocked, just_unlocked))
    finished = ingest(config, prepare=small)
    assert list(folder.iterdir()) == [finished]


def test_a_hidden_folder_at_work_is_not_cleared_away(tmp_path):
    with folders.hidden_folder(tmp_path) as one:
        for path in (one / "lock", one):
            os.utime(path, (0, 0))
        with folders.hidden_folder(tmp_path):
            assert one.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(messy):
    config_of(messy, "data")
    limit = 5_000  # bytes a file

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = ingest_in_a_process(messy, preexec_fn=limited)
    assert done.returncode == 1
    assert "the disk is full, or a limit on the size of files is reached" in done.stderr
    assert list(Path(messy.folder / "data" / "hospital").iterdir()) == []
