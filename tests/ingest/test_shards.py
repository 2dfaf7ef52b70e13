"""Many shards come to what one comes to; what is finished is kept; what is not leaves nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest import shards, store
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


def config_of(hospital, folder, **changes):
    return hospital.config(data_dir=str(hospital.folder / folder), splits__repeats=2, **changes)


def by_row(store, table):
    keys = KEYS if table in ("values", "mask", "labels") else None
    frame = store.read(table).to_pandas()
    return frame.sort_values(keys or list(frame), ignore_index=True)


def test_many_shards_hold_what_one_holds_bit_for_bit(messy):
    one = Store(ingest(config_of(messy, "one")))
    many = Store(ingest(config_of(messy, "many"), prepare=small))
    assert one.fingerprint == many.fingerprint
    for table in shards.TABLES:
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
            "deals 0 positive and 172 negative rows to train",
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
write_json = shards._write_json

def killed_instead(path, content):
    if path.name == f"{kill_at:05}.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, content)

shards._write_json = killed_instead
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
    assert sorted(built) == [shard for shard in range(len(whole) // 5) if shard >= 3]
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


def test_a_full_disk_leaves_nothing_and_says_so(messy):
    config_of(messy, "data")
    limit = 5_000  # bytes a file

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = ingest_in_a_process(messy, preexec_fn=limited)
    assert done.returncode == 1
    assert "the disk is full, or a limit on the size of files is reached" in done.stderr
    assert list(Path(messy.folder / "data" / "hospital").iterdir()) == []
