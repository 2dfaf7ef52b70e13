"""What is exported as MEDS is valid MEDS, and says what the tables said."""

import json
import subprocess
import sys

import meds
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.errors import DataError
from ehr_sn.ingest.meds import export_meds
from ehr_sn.ingest.store import Store, ingest

KEYS = ["subject_id", "prediction_time"]
SHARD_ROWS = 700  # of the busy hospital's 3,000: several shards


@pytest.fixture
def ward(busy):
    """The busy hospital, in which everybody is predicted for twice, with sex and birth."""
    patients = pd.read_csv(busy.folder / "patients.csv")
    patients["sex"] = np.where(patients["id"] % 2, "F", "M")
    patients["born"] = -9000 - patients["id"]
    later = patients.assign(index=patients["index"] + 20)
    busy.write(patients=pd.concat([patients, later]))
    statics = {
        "sex": {"column": "sex", "categories": ["F", "M"]},
        "age": {"since": "born", "unit": "years"},
        "waiting": {"column": "index"},
    }

    def config(**changes):
        return busy.config(features__static=statics, **changes)

    return config


def read(folder, *parts):
    files = sorted(folder.joinpath(*parts).rglob("*.parquet"))
    return pd.concat(pd.read_parquet(file) for file in files).reset_index(drop=True)


def test_it_is_valid_meds(ward, tmp_path):
    told = []
    folder = export_meds(ward(), tmp_path / "meds", lambda *shards: told.append(shards), SHARD_ROWS)
    shards = len(list((folder / "labels" / "diabetes").iterdir()))
    assert shards > 2
    assert told == [(done + 1, shards) for done in range(shards)]
    splits = pq.read_table(folder / meds.subject_splits_filepath)
    meds.SubjectSplitSchema.validate(splits)
    split_of = splits.to_pandas().set_index("subject_id")["split"]
    assert split_of.index.is_unique
    codes = pq.read_table(folder / meds.code_metadata_filepath)
    meds.CodeMetadataSchema.validate(codes)
    seen: set[int] = set()
    used: set[str] = set()
    for file in (folder / meds.data_subdirectory).rglob("*.parquet"):
        table = pq.read_table(file)
        meds.DataSchema.validate(table)
        frame = table.to_pandas()
        order = frame.sort_values(["subject_id", "time"], na_position="first", kind="stable")
        assert order.index.equals(frame.index)
        subjects = set(frame["subject_id"])
        assert {split_of[subject] for subject in subjects} <= {file.parent.name}
        assert not subjects & seen
        seen |= subjects
        used |= set(frame["code"])
    assert seen == set(split_of.index) == set(range(1, 301))
    described = codes.to_pandas().set_index("code")["description"]
    assert set(described.index) == used
    assert described["sbp"] == "sbp, mmHg"
    for file in (folder / "labels").rglob("*.parquet"):
        meds.LabelSchema.validate(pq.read_table(file))
    meds.DatasetMetadataSchema.validate(
        json.loads((folder / meds.dataset_metadata_filepath).read_text())
    )
    assert list(tmp_path.glob(".partial*")) == []


def test_it_does_not_depend_on_the_number_of_shards(ward, tmp_path):
    one, several = (
        export_meds(ward(), tmp_path / name, shard_rows=rows)
        for name, rows in (("one", None), ("several", SHARD_ROWS))
    )
    for parts, keys in (
        (("data",), ["subject_id", "time", "code", "numeric_value"]),
        (("labels", "diabetes"), KEYS),
        (("metadata",), ["subject_id", "code"]),
    ):
        frames = [read(folder, *parts) for folder in (one, several)]
        if parts == ("metadata",):
            frames = [frame.drop(columns="parent_codes") for frame in frames]
        same, other = (f.sort_values(keys).reset_index(drop=True) for f in frames)
        pd.testing.assert_frame_equal(same, other)


def test_static_features_have_no_time_unless_they_change(ward, tmp_path):
    folder = export_meds(ward(), tmp_path / "meds", shard_rows=SHARD_ROWS)
    data = read(folder, "data")
    sex = data[data["code"] == "STATIC//sex=F"]
    assert sex["time"].isna().all()
    assert (sex["numeric_value"] == sex["subject_id"] % 2).all()
    assert len(sex) == 300
    birth = data[data["code"] == meds.birth_code]
    born = pd.Timestamp("2020-01-01") - pd.to_timedelta(9000 + birth["subject_id"], "D")
    assert (birth["time"] == born).all()
    waiting = data[data["code"] == "STATIC//waiting"]
    days = (waiting["time"] - pd.Timestamp("2020-01-01")) / pd.Timedelta("1D")
    assert (days == waiting["numeric_value"]).all()
    assert len(waiting) == 600
    assert not data["code"].str.contains("age").any()


@pytest.mark.parametrize("included", [True, False])
def test_read_back_it_gives_the_same_features(ward, tmp_path, included):
    config = ward(cohort__include_prediction_time=included)
    store = Store(ingest(config))
    folder = export_meds(config, tmp_path / "meds", shard_rows=SHARD_ROWS)
    content = {
        "dataset": "back",
        "data_dir": str(tmp_path / "data"),
        "data_root": str(folder),
        "tables": {
            "events": {"path": "data/**/*.parquet"},
            "asked": {"path": "labels/diabetes/*.parquet"},
            "subject_splits": {"path": "metadata/subject_splits.parquet"},
        },
        "events": [
            {
                "table": "events",
                "subject_id": "subject_id",
                "time": "time",
                "code": "code",
                "numeric_value": "numeric_value",
                "where": "time IS NOT NULL",
            }
        ],
        "cohort": {"table": "asked", **{key: key for key in KEYS}},
        "features": yaml.safe_load(json.dumps(config.ingest_sections["features"]))
        | {"static": {}, "columns": {}},
        "labels": {
            "diabetes": {"positive": "boolean_value == 1", "negative": "boolean_value == 0"}
        },
        "splits": {"table": "subject_splits"},
    }
    (tmp_path / "back.yaml").write_text(yaml.safe_dump(content))
    back = Store(ingest(load_config(tmp_path / "back.yaml")))
    known = store.labels()[:, 0]
    kept = ~np.isnan(known)
    np.testing.assert_array_equal(back.labels()[:, 0], known[kept])
    np.testing.assert_array_equal(back.splits(), store.splits()[kept])
    columns = [store.feature_names.index(name) for name in back.feature_names]
    assert len(columns) == 2 * 7 + 1
    for i, name in enumerate(back.feature_names):
        slope = name.endswith(".slope")  # of values rounded to 32 bits over a few days
        rounding = {"rtol": 1e-5, "atol": 1e-3} if slope else {"rtol": 2e-7}
        np.testing.assert_allclose(
            back.values()[:, i], store.values()[kept][:, columns[i]], **rounding, err_msg=name
        )
    assert back.values()[:, -1].sum() > 0


def test_subjects_of_text_get_numbers(busy, tmp_path):
    for name in ("patients", "labs", "diagnoses"):
        frame = pd.read_csv(busy.folder / f"{name}.csv")
        busy.write(**{name: frame.assign(id="P-" + frame["id"].astype(str))})
    folder = export_meds(busy.config(), tmp_path / "meds", shard_rows=SHARD_ROWS)
    numbers = pd.read_parquet(folder / "metadata" / "subject_ids.parquet")
    assert sorted(numbers["subject_id"]) == list(range(1, 301))
    assert set(numbers["source_id"]) == {f"P-{i}" for i in range(1, 301)}
    labs = pd.read_csv(busy.folder / "labs.csv")
    name = numbers.set_index("subject_id")["source_id"]
    data = read(folder, "data")
    written = data[data["code"] == "sbp"].groupby("subject_id").size()
    expected = labs[labs["test"] == "sbp"].groupby("id").size()
    assert written.rename(name).to_dict() == expected.to_dict()


def test_it_is_complete_or_absent(busy, tmp_path):
    folder = tmp_path / "meds"
    with pytest.raises(DataError, match="no column"):
        export_meds(busy.config(features__static={"x": {"column": "nowhere"}}), folder)
    assert not folder.exists()
    assert list(tmp_path.glob(".partial*")) == []
    folder.mkdir()
    (folder / "other").write_text("")
    with pytest.raises(DataError, match="is not empty"):
        export_meds(busy.config(), folder)
    assert [path.name for path in folder.iterdir()] == ["other"]


EXPORT = """
import resource, sys
from pathlib import Path
from ehr_sn.config import load_config
from ehr_sn.ingest.meds import export_meds

config = load_config(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
export_meds(config, Path(sys.argv[2]))
"""


def test_a_full_disk_leaves_nothing_and_says_so(busy, tmp_path):
    busy.config()
    folder = tmp_path / "out" / "meds"
    command = [sys.executable, "-c", EXPORT, str(busy.folder / "hospital.yaml"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"DiskError: {folder}: the disk is full" in done.stderr
    assert "name another folder" in done.stderr
    assert list(folder.parent.iterdir()) == []
