"""A store is whole or absent, the same for the same input, and says where it came from."""

import hashlib
import json
import shutil
import threading

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ehr_sn.config import load_config
from ehr_sn.errors import DataError
from ehr_sn.ingest import shards
from ehr_sn.ingest.store import Store, check, ingest

FILES = {
    "values.parquet",
    "mask.parquet",
    "labels.parquet",
    "follow_up.parquet",
    "splits.parquet",
    "quarantine.parquet",
    "manifest.json",
}


@pytest.fixture
def store(busy):
    return Store(ingest(busy.config(splits__repeats=2)))


def stores(folder):
    """Everything below a data directory, hidden or not."""
    return sorted(path.name for path in (folder / "hospital").iterdir())


def same(a, b):
    return (
        np.array_equal(a.values(), b.values(), equal_nan=True)
        and np.array_equal(a.labels(), b.labels(), equal_nan=True)
        and np.array_equal(a.splits(), b.splits())
    )


# -- what it holds -------------------------------------------------------------------------------


def test_the_files_are_row_aligned_and_the_mask_says_what_is_observed(store):
    assert {path.name for path in store.path.iterdir()} == FILES
    values, mask, labels = (
        pd.read_parquet(store.path / f"{name}.parquet") for name in ("values", "mask", "labels")
    )
    keys = ["subject_id", "prediction_time"]
    assert list(values) == list(mask) == [*keys, *store.feature_names]
    assert list(labels) == [*keys, "diabetes"]
    assert values[keys].equals(mask[keys])
    assert values[keys].equals(labels[keys])
    assert values[keys].equals(values[keys].sort_values(keys, ignore_index=True))
    assert values[store.feature_names].notna().equals(mask[store.feature_names])
    assert set(values[store.feature_names].dtypes.astype(str)) == {"float32"}
    assert set(mask[store.feature_names].dtypes.astype(str)) == {"bool"}
    assert pq.read_schema(store.path / "labels.parquet").field("diabetes").type == "int8"


def test_it_reads_back_as_arrays_over_its_rows(store):
    values, labels, splits = store.values(), store.labels(), store.splits()
    assert values.shape == (300, len(store.feature_names))
    assert values.dtype == np.float32
    assert labels.shape == (300, len(store.diseases)) == (300, 1)
    assert splits.shape == (300, 2)
    assert set(np.unique(splits)) == {"train", "tuning", "held_out"}
    subject = pd.read_parquet(store.path / "values.parquet")["subject_id"]
    patients = pd.read_csv(store.path.parents[2] / "patients.csv").set_index("id")
    age = values[:, store.feature_names.index("age")]
    np.testing.assert_array_equal(age, patients.loc[subject, "age"])
    dealt = pd.read_parquet(store.path / "splits.parquet").set_index("subject_id")
    np.testing.assert_array_equal(splits, dealt.loc[subject].to_numpy())


def test_one_subject_is_in_one_split_however_often_it_is_predicted_for(busy):
    patients = pd.read_csv(busy.folder / "patients.csv")
    busy.write(patients=pd.concat([patients, patients.assign(index=patients["index"] + 7)]))
    store = Store(ingest(busy.config(splits__repeats=2)))
    subjects = pd.read_parquet(store.path / "values.parquet")["subject_id"]
    assert len(subjects) == 600
    for column in store.splits().T:
        assert pd.Series(column).groupby(subjects).nunique().eq(1).all()


def test_the_manifest_reconciles_every_table_s_rows(busy):
    rng = np.random.default_rng(0)
    for name, keys in (("labs", ["id", "day", "test", "x"]), ("diagnoses", ["id", "day", "icd"])):
        frame = pd.read_csv(busy.folder / f"{name}.csv", dtype=str)
        frame = pd.concat([frame, frame.sample(50, random_state=1)], ignore_index=True)
        for key in keys:
            spoilt = rng.random(len(frame)) < 0.05
            frame.loc[spoilt, key] = rng.choice(["", "odd", "-1e40"], spoilt.sum())
        busy.write(**{name: frame})
    store = Store(ingest(busy.config()))
    manifest = store.manifest
    aside = {
        entry["table"]: entry["count"]
        for entry in manifest["quarantined"]
        if entry["action"] == "row set aside"
    }
    assert set(aside) == {"labs", "diagnoses"}
    for table, kept in manifest["events"].items():
        assert manifest["tables"][table]["rows"] == kept + aside[table]
        lines = (busy.folder / f"{table}.csv").read_text().splitlines()
        assert manifest["tables"][table]["rows"] == len(lines) - 1
    quarantine = pd.read_parquet(store.path / "quarantine.parquet")
    assert len(quarantine) == sum(entry["count"] for entry in manifest["quarantined"])
    assert sum(f["count"] for f in manifest["findings"] if f["check"] == "quarantine") == len(
        quarantine
    )
    assert not quarantine.duplicated(["table_name", "row_number"]).any()
    assert quarantine["row_number"].between(1, 3000).all()


def test_the_manifest_names_sources_files_counts_and_versions(store):
    manifest = store.manifest
    folder = store.path.parents[2]
    for name, source in manifest["tables"].items():
        content = (folder / f"{name}.csv").read_bytes()
        assert source["sha256"] == hashlib.sha256(content).hexdigest()
        assert source["size"] == len(content)
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    for name, sha256 in manifest["files"].items():
        assert sha256 == hashlib.sha256((store.path / name).read_bytes()).hexdigest()
    observed = ~np.isnan(store.values())
    rates = [feature["observed_rate"] for feature in manifest["features"]]
    np.testing.assert_allclose(rates, observed.mean(axis=0), atol=1e-6)
    label = manifest["labels"]["diabetes"]
    eligible = store.labels()[~np.isnan(store.labels())]
    assert (label["eligible"], label["positive"]) == (len(eligible), eligible.sum())
    assert label["rows"] == sum(
        label[rule] for rule in ("recorded_before", "no_follow_up", "left_early", "eligible")
    )
    assert manifest["fingerprint"] == store.fingerprint == store.path.name
    assert manifest["rows"] == 300
    assert set(manifest["versions"]) == {"ehr-sn", "duckdb", "pyarrow"}


def test_check_says_what_the_store_would_and_writes_nothing(busy):
    config = busy.config()
    checked = check(config)
    assert not (busy.folder / "data").exists()
    stored = Store(ingest(config)).manifest
    for manifest in (checked, stored):
        manifest.pop("created_at")
    assert stored.pop("files")
    assert json.loads(json.dumps(checked)) == stored


LABELS = {
    "stayed": {"positive": "end > 500", "negative": "end <= 500"},
    "diabetes": {"codes": ["E11"], "within_days": 365, "censoring_by": ["sbp.last", "age"]},
    "dropped": {"codes": ["E11"], "within_days": 300, "censoring": "drop"},
    "soon": {"codes": ["E11"], "within_days": 180.5},
}


def test_the_store_tells_how_long_rows_were_followed(busy):
    patients = pd.read_csv(busy.folder / "patients.csv")
    patients["end"] = np.where(patients["id"] % 3, 1000, 250)
    busy.write(patients=patients)
    store = Store(ingest(busy.config(labels=LABELS)))
    assert store.diseases == list(LABELS)
    assert store.horizons == [None, 365, None, 180.5]
    assert store.censoring_by == [(), ("sbp.last", "age"), (), ()]
    days = store.follow_up()
    assert days.shape == store.labels().shape
    assert np.isnan(days[:, [0, 2]]).all()
    onset = patients["id"].map(
        pd.read_csv(busy.folder / "diagnoses.csv").query("icd == 'E11'").set_index("id").day
    )
    for place, horizon in ((1, 365), (3, 180.5)):
        to_the_end = np.floor(patients["index"] + horizon) <= patients["end"]  # by the day
        left = np.where(to_the_end, np.inf, patients["end"])
        first = np.minimum(onset.fillna(np.inf), left) - patients["index"]
        np.testing.assert_array_equal(days[:, place], np.minimum(first, horizon))
    unknown = (patients["end"] < patients["index"] + 365) & ~(onset <= patients["end"])
    np.testing.assert_array_equal(np.isnan(store.labels()[:, 1]), unknown)
    said = store.manifest["censoring"]
    assert list(said) == ["diabetes", "dropped", "soon"]
    assert said["diabetes"] == said["soon"] != said["dropped"]


def test_without_a_label_that_is_weighted_the_store_has_no_follow_up(busy):
    store = Store(ingest(busy.config(labels__diabetes__censoring="drop")))
    assert store.follow_up() is None
    assert store.horizons == [None]
    assert not (store.path / "follow_up.parquet").exists()
    assert "follow_up.parquet" not in store.manifest["files"]


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no finished store"):
        Store(tmp_path)


# -- the same input, another input ---------------------------------------------------------------


def test_the_same_input_is_ingested_once(busy):
    config = busy.config()
    path = ingest(config)
    written = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    for table in ("labs", "patients"):
        (busy.folder / f"{table}.csv").touch()
    assert ingest(busy.config(train__seeds=1, title="Another name")) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == written
    assert stores(busy.folder / "data") == [path.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"features__lookback_days": 100},
        {"features__measurements__sbp__plausible": [40, 300]},
        {"labels__diabetes__within_days": 364},
        {"labels__diabetes__censoring": "drop"},
        {"labels__diabetes__censoring_by": ["age"]},
        {"cohort__died": "end > 500"},
        {"splits__seed": 1},
        {"cohort__include_prediction_time": False},
        {"features__measurements": {"hdl": {}, "sbp": {}}},
    ],
)
def test_another_configuration_gets_another_store(busy, changes):
    assert ingest(busy.config()) != ingest(busy.config(**changes))


def test_the_order_of_features_is_that_of_the_configuration(busy):
    before = busy.config(
        features__aggregates=["last"], features__measurements={"sbp": {}, "hdl": {}}
    )
    before = Store(ingest(before))
    after = busy.config(
        features__aggregates=["last"], features__measurements={"hdl": {}, "sbp": {}}
    )
    after = Store(ingest(after))
    assert before.feature_names == ["age", "sbp.last", "hdl.last", "history.smoker"]
    assert after.feature_names == ["age", "hdl.last", "sbp.last", "history.smoker"]
    order = [before.feature_names.index(name) for name in after.feature_names]
    assert np.array_equal(before.values()[:, order], after.values(), equal_nan=True)


def test_a_changed_file_gets_another_store(busy):
    before = ingest(busy.config())
    with (busy.folder / "labs.csv").open("a") as file:
        file.write("1,5,sbp,100\n")
    assert ingest(busy.config()) != before
    assert len(stores(busy.folder / "data")) == 2


def test_csv_gzip_and_parquet_give_the_same_store(busy):
    routes = {}
    for suffix in (".csv", ".csv.gz", ".tsv", ".parquet"):
        for name in ("patients", "labs", "diagnoses"):
            frame = pd.read_csv(busy.folder / f"{name}.csv")
            if suffix == ".tsv":
                frame.to_csv(busy.folder / f"{name}.tsv", sep="\t", index=False)
            else:
                busy.write(suffix, **{name: frame})
        tables = {name: {"path": name + suffix} for name in ("patients", "labs", "diagnoses")}
        routes[suffix] = Store(ingest(busy.config(tables=tables)))
    first, *others = routes.values()
    assert all(same(first, other) for other in others)
    files = [s.manifest["files"] for s in routes.values()]
    assert all(f == files[0] for f in files)
    assert len({s.fingerprint for s in routes.values()}) == 4


def test_two_ingests_write_the_same_bytes_on_any_number_of_threads(hospital, monkeypatch):
    """As many patients as need several batches, blocks and row groups."""
    rng = np.random.default_rng(0)
    n = 130_000
    ids = np.arange(n)
    hospital.write(
        ".parquet",
        patients=pd.DataFrame({"id": rng.permutation(ids), "index": 100, "end": 1000, "age": 50}),
        labs=pd.DataFrame(
            {"id": rng.choice(ids, 4 * n), "day": rng.normal(50, 40, 4 * n), "test": "sbp"}
        ).assign(x=rng.normal(120, 60, 4 * n)),
        diagnoses=pd.DataFrame({"id": ids[::9], "day": rng.normal(150, 40, len(ids[::9]))}).assign(
            icd="E11"
        ),
    )
    connect = shards.connect
    written = []
    for threads in (1, 8):

        def connect_with_threads(*args, threads=threads, **options):
            db = connect(*args, **options)
            db.execute(f"SET threads = {threads}")
            return db

        monkeypatch.setattr(shards, "connect", connect_with_threads)
        tables = {name: {"path": f"{name}.parquet"} for name in ("patients", "labs", "diagnoses")}
        config = hospital.config(tables=tables, data_dir=str(hospital.folder / f"data{threads}"))
        written.append(Store(ingest(config)).manifest["files"])
    assert written[0] == written[1]


# -- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["stage_cohort", "feature_blocks", "count_all", "_write_tables"])
def test_a_failure_at_any_step_leaves_nothing(busy, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(shards, step, fail)
        with pytest.raises(OSError, match="disk full"):
            ingest(busy.config())
    assert stores(busy.folder / "data") == []
    assert Store(ingest(busy.config())).manifest["rows"] == 300


def test_a_disease_without_positives_leaves_nothing(busy):
    for code, said in (
        ("F17", "split deals 0 positive and"),
        ("J10", "no event has any of its codes"),
    ):
        with pytest.raises(DataError, match=said):
            ingest(busy.config(labels__flu={"codes": [code], "within_days": 365}))
    assert stores(busy.folder / "data") == []


def test_what_a_killed_ingest_left_is_not_taken_for_a_store(busy):
    config = busy.config()
    path = ingest(config)
    half = path.parent / f".work-{path.name}" / "store"
    half.mkdir(parents=True)
    shutil.move(path / "values.parquet", half)
    shutil.rmtree(path)
    assert ingest(config) == path
    assert {file.name for file in path.iterdir()} == FILES


def test_a_file_that_changes_while_it_is_read_is_refused(busy, monkeypatch):
    stage_events = shards.stage_events

    def export_still_running(db, config):
        rows = stage_events(db, config)
        with (busy.folder / "labs.csv").open("a") as file:
            file.write("1,5,sbp,100\n")
        return rows

    monkeypatch.setattr(shards, "stage_events", export_still_running)
    with pytest.raises(DataError, match="a file changed while it was read"):
        ingest(busy.config())
    assert stores(busy.folder / "data") == []


def test_two_ingests_at_once_give_one_store(busy, monkeypatch):
    config = busy.config()
    both = threading.Barrier(2)
    built = []
    write_tables = shards._write_tables

    def counted(*args):
        built.append(args)
        write_tables(*args)

    monkeypatch.setattr(shards, "_write_tables", counted)
    paths = []

    def race():
        both.wait(timeout=30)
        paths.append(ingest(config))

    racers = [threading.Thread(target=race) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert paths == [paths[0]] * 2
    assert len(built) == 1  # the second waited
    assert stores(busy.folder / "data") == [paths[0].name]
    assert {file.name for file in paths[0].iterdir()} == FILES


# -- no patient's data ---------------------------------------------------------------------------


def test_nothing_said_or_stored_about_bad_rows_quotes_them(busy):
    secret = {"id": "SECRET1", "day": "SECRET2", "test": "SECRET3", "x": "SECRET4"}
    labs = pd.read_csv(busy.folder / "labs.csv", dtype=str)
    sound = {"id": "9", "day": "5", "test": "sbp", "x": "100"}
    spoilt = [sound | {key: value} for key, value in secret.items()]
    labs = pd.concat([labs, pd.DataFrame([*spoilt, secret])], ignore_index=True)
    patients = pd.read_csv(busy.folder / "patients.csv", dtype=str)
    bad = patients.head(4).reset_index(drop=True)
    for row, column in enumerate(["index", "end", "age"]):
        bad.loc[row, column] = f"SECRET{row}"
    bad.loc[3, "age"] = "77777"
    patients = pd.concat([bad, patients.iloc[4:]], ignore_index=True)
    busy.write(labs=labs, patients=patients)
    store = Store(ingest(busy.config()))
    quarantine = pd.read_parquet(store.path / "quarantine.parquet")
    assert set(quarantine["reason"].str.split(" does not parse").str[0]) == {
        "subject is not in the cohort",
        "time",
        "x: not a number",
        "prediction time",
        "end of follow-up",
        "age: not a number",
        "age: outside the plausible range 0 to 120",
    }
    told = (store.path / "manifest.json").read_text()
    told += quarantine.to_csv()
    assert "SECRET" not in told
    assert "77777" not in told


def test_an_error_of_duckdb_about_a_value_is_not_quoted(busy, monkeypatch):
    def fail(db, config):
        db.execute("SELECT 'SECRET'::INTEGER").fetchall()

    monkeypatch.setattr(shards, "stage_splits", fail)
    with pytest.raises(DataError, match="it may quote a patient's data") as error:
        ingest(busy.config())
    assert "SECRET" not in str(error.value)


def test_an_error_of_duckdb_about_our_sql_is_told_in_full(busy, monkeypatch):
    monkeypatch.setattr(shards, "stage_splits", lambda db, _: db.execute("SELECT nope"))
    with pytest.raises(duckdb.BinderException, match="nope"):
        ingest(busy.config())


# -- another hospital ----------------------------------------------------------------------------

CLINIC = """
dataset: clinic
tables:
  people: {path: people.csv.gz}
  chart: {path: chart.parquet}
  problems: {path: problems.csv, delimiter: ';'}
events:
  - {table: chart, subject_id: mrn, time: charted_at, code: loinc, numeric_value: result}
  - {table: problems, subject_id: patient, time: noted, code: icd, clock: {format: '%d.%m.%Y'}}
cohort: {table: people, subject_id: MRN, prediction_time: admitted, follow_up_end: last_contact}
features:
  static: {birth_weight: {column: weight in g, unit: g}}
  measurements: {creatinine: {codes: [2160-0, 38483-4]}, potassium: {codes: [2823-3]}}
  aggregates: [last, count]
  history: {diabetes: [E10, E11]}
labels:
  renal_failure: {codes: [N17, N18], within_days: 180}
  hypertension: {codes: [I10], prevalent: true}
splits: {train: 0.5, tuning: 0.25, held_out: 0.25, seed: 3}
data_dir: DATA
"""


def test_another_hospital_needs_another_yaml_only(tmp_path):
    rng = np.random.default_rng(1)
    n = 400
    mrn = np.array([f"{i:06d}" for i in range(n)])
    admitted = pd.Timestamp("2021-03-01T08:00") + pd.to_timedelta(rng.integers(0, 9000, n), "h")
    people = pd.DataFrame({"MRN": mrn, "weight in g": rng.integers(900, 4000, n)})
    people["admitted"] = admitted.strftime("%Y-%m-%dT%H:%M:%S+01:00")
    people["last_contact"] = (admitted + pd.Timedelta(days=400)).strftime("%Y-%m-%d %H:%M")
    who = rng.integers(0, n, 4000)
    chart = pd.DataFrame({"mrn": mrn[who], "loinc": rng.choice(["2160-0", "2823-3"], 4000)})
    chart["charted_at"] = admitted[who] + pd.to_timedelta(rng.integers(-500, 500, 4000), "h")
    chart["result"] = rng.normal(4, 1, 4000).astype("float32")
    ill = rng.integers(0, n, 500)
    problems = pd.DataFrame({"patient": mrn[ill], "icd": rng.choice(["N17", "I10", "E11"], 500)})
    problems["noted"] = (
        admitted[ill] + pd.to_timedelta(rng.integers(-90, 170, 500), "D")
    ).strftime("%d.%m.%Y")
    people.to_csv(tmp_path / "people.csv.gz", index=False)
    chart.to_parquet(tmp_path / "chart.parquet")
    problems.to_csv(tmp_path / "problems.csv", index=False, sep=";")
    (tmp_path / "clinic.yaml").write_text(CLINIC.replace("DATA", str(tmp_path / "data")))

    store = Store(ingest(load_config(tmp_path / "clinic.yaml")))

    assert store.values().shape == (n, 1 + 2 * 2 + 1)
    assert store.diseases == ["renal_failure", "hypertension"]
    stored = pd.read_parquet(store.path / "values.parquet")
    assert stored["subject_id"].tolist() == sorted(mrn)
    local = admitted[0] - pd.Timedelta(hours=1)  # it was written with an offset
    assert stored["prediction_time"][0] == local
    mine = chart[(chart["mrn"] == "000000") & (chart["charted_at"] <= local)]
    counts = mine["loinc"].value_counts()
    assert stored["creatinine.count"].fillna(0)[0] == counts.get("2160-0", 0)
    assert stored["potassium.count"].fillna(0)[0] == counts.get("2823-3", 0)
    assert 0 < np.nansum(store.labels()[:, 0]) < n
    assert not np.isnan(store.labels()[:, 1]).any()
