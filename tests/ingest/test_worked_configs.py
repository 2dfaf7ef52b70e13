"""The configurations of standard formats work on such data, and give what pandas counts."""

import json
import zipfile
from pathlib import Path

import meds
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from ehr_sn.config import DATA_ROOT, load_config
from ehr_sn.ingest.simulate import STANDARD, Simulation, simulate
from ehr_sn.ingest.store import Store, check, ingest

CONFIGS = Path(__file__).parents[2] / "configs"
DAY = pd.Timedelta("1D")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function: a configuration, and its data's folder → the store, if check agrees with it."""

    def made(config, data):
        monkeypatch.setenv(DATA_ROOT, str(data))
        monkeypatch.chdir(tmp_path)
        loaded = load_config(config)
        report = json.loads(json.dumps(check(loaded)))
        store = Store(ingest(loaded))
        assert {key: store.manifest[key] for key in report} == report | {
            "created_at": store.manifest["created_at"]
        }
        assert_reconciled(store.manifest)
        return store

    return made


def assert_reconciled(manifest):
    """Of each table of events, what was read is what was kept, merged, set aside and left out."""
    set_aside = {
        q["table"]: q["count"] for q in manifest["quarantined"] if q["action"] == "row set aside"
    }
    assert manifest["event_rows"]
    for table, rows in manifest["event_rows"].items():
        assert rows["read"] == manifest["tables"][table]["rows"]
        outcomes = ("kept", "merged", "set_aside", "left_out")
        assert rows["read"] == sum(rows[outcome] for outcome in outcomes)
        assert rows["kept"] == manifest["events"][table]
        assert rows["set_aside"] == set_aside.get(table, 0)


def values(store):
    return pd.read_parquet(store.path / "values.parquet").set_index(
        ["subject_id", "prediction_time"]
    )


def labels(store):
    return pd.read_parquet(store.path / "labels.parquet").set_index(
        ["subject_id", "prediction_time"]
    )


def in_window(rows, events, begins, ends):
    """Keys of those `rows` (subject, t, …) that have an event after `begins` and up to `ends`."""
    pairs = rows.merge(events, on="subject")
    pairs = pairs[(pairs["known"] > pairs[begins]) & (pairs["known"] <= pairs[ends])]
    return pd.MultiIndex.from_frame(pairs[["subject", "t"]]).unique()


def counts(rows, events, lookback=None):
    """How many of the `events` were known at t, within `lookback` days."""
    pairs = rows.merge(events, on="subject")
    pairs = pairs[pairs["known"] <= pairs["t"]]
    if lookback is not None:
        pairs = pairs[pairs["known"] >= pairs["t"] - lookback * DAY]
    return pairs.groupby(["subject", "t"]).size()


def assert_same(column, expected):
    """A column of the store, and what was counted for some of its rows."""
    np.testing.assert_array_equal(column, expected.reindex(column.index).to_numpy())


# -- MIMIC ---------------------------------------------------------------------------------------


def test_mimic3(make, shared_data):
    folder = shared_data("mimic3_demo/csv")
    store = make(CONFIGS / "mimic3.yaml", folder)

    def table(name, *times):
        return pd.read_csv(folder / f"{name}.csv.gz", parse_dates=[*times], low_memory=False)

    admissions = table("admissions", "dischtime")[["hadm_id", "dischtime"]]
    stays = table("icustays", "intime", "outtime").merge(admissions, on="hadm_id")
    minutes = (stays["outtime"].dt.floor("min") - stays["intime"].dt.floor("min")) / DAY * 1440
    stays = stays[minutes > 48 * 60].sort_values("intime").groupby("subject_id").first()
    rows = stays.reset_index().assign(t=stays["intime"].to_numpy() + 2 * DAY)
    rows = rows.rename(columns={"subject_id": "subject"})[["subject", "t", "dischtime"]]
    assert store.manifest["rows"] == len(rows) == 56

    coded = table("diagnoses_icd").merge(admissions, on="hadm_id")
    coded = coded.rename(columns={"subject_id": "subject", "dischtime": "known"})
    for disease, prefixes in {
        "heart_failure": ["428"],
        "diabetes": ["250"],
        "hypertension": [str(code) for code in range(401, 406)],
    }.items():
        of = coded["icd9_code"].astype(str).str[:3].isin(prefixes)
        ill = in_window(rows, coded[of][["subject", "known"]], "t", "dischtime")
        known = labels(store)[disease].dropna()
        assert len(known) == (rows["dischtime"] > rows["t"]).sum()
        assert set(known[known == 1].index) == set(ill)

    labs = table("labevents", "charttime").rename(columns={"subject_id": "subject"})
    labs = labs.rename(columns={"charttime": "known"})
    potassium = labs[(labs["itemid"] == 50971) & labs["valuenum"].between(1, 12)]
    assert potassium["row_id"].is_unique  # each row is a measurement of its own
    assert_same(values(store)["potassium.count"], counts(rows, potassium, 2))
    used = ["row_id", "subject_id", "charttime", "itemid", "valuenum", "error"]
    chart = pd.read_csv(folder / "chartevents.csv.gz", usecols=used)
    pulse = chart[chart["itemid"].isin([211, 220045]) & chart["valuenum"].between(10, 300)]
    pulse = pulse[pulse["error"] != 1].rename(
        columns={"subject_id": "subject", "charttime": "known"}
    )
    assert pulse["row_id"].is_unique
    pulse["known"] = pd.to_datetime(pulse["known"])
    assert_same(values(store)["heart_rate.count"], counts(rows, pulse, 2))
    assert store.manifest["event_rows"]["chartevents"]["left_out"] == (chart["error"] == 1).sum()


def test_mimic4(make, shared_data):
    folder = shared_data("mimic4_demo")
    store = make(CONFIGS / "mimic4.yaml", folder)
    stays = pd.read_csv(folder / "hosp/admissions.csv.gz", parse_dates=["admittime", "dischtime"])
    stays = stays[stays["dischtime"] - stays["admittime"] > 2 * DAY]
    rows = stays.assign(t=stays["admittime"] + 2 * DAY, subject=stays["subject_id"])
    rows = rows[["subject", "t", "dischtime"]]
    assert store.manifest["rows"] == len(rows) == 220
    assert not [f for f in store.manifest["findings"] if f["check"] == "unseen category"]

    coded = pd.read_csv(folder / "hosp/diagnoses_icd.csv.gz", dtype={"icd_code": str})
    discharged = pd.read_csv(folder / "hosp/admissions.csv.gz", parse_dates=["dischtime"])
    coded = coded.merge(discharged[["hadm_id", "dischtime"]], on="hadm_id")
    coded = coded.rename(columns={"subject_id": "subject", "dischtime": "known"})
    failing = coded["icd_code"].str.match("428") & (coded["icd_version"] == 9)
    failing |= coded["icd_code"].str.match("I50") & (coded["icd_version"] == 10)
    ill = in_window(rows, coded[failing][["subject", "known"]], "t", "dischtime")
    assert set(labels(store).query("heart_failure == 1").index) == set(ill)

    labs = pd.read_csv(folder / "hosp/labevents.csv.gz", parse_dates=["storetime"])
    unknown = labs["storetime"].isna() & labs["subject_id"].isin(rows["subject"])
    told = {
        f["message"]: f["count"] for f in store.manifest["findings"] if f["where"] == "labevents"
    }
    assert told["no time: row set aside"] == unknown.sum() < 0.01 * len(labs)
    sodium = labs[(labs["itemid"] == 50983) & labs["valuenum"].between(90, 190)]
    sodium = sodium.rename(columns={"subject_id": "subject", "storetime": "known"})
    assert sodium["labevent_id"].is_unique  # each row is a measurement of its own
    assert_same(values(store)["sodium.count"], counts(rows, sodium, 730))


# -- OMOP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def omop(tmp_path_factory):
    """Folders of the same simulated OMOP tables, as Parquet and as CSV."""
    folder, simulation = tmp_path_factory.mktemp("omop"), Simulation(subjects=800, seed=5)
    return simulate(simulation, folder / "pq"), simulate(simulation, folder / "csv", "csv")


def omop_config(tmp_path, **sections):
    """configs/omop.yaml with a wider window, so that 800 subjects fall ill often enough."""
    content = yaml.safe_load((CONFIGS / "omop.yaml").read_text()) | sections
    for label in content["labels"].values():
        label["within_days"] = 730
    path = tmp_path / "omop.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_omop(make, omop, tmp_path):
    store = make(omop_config(tmp_path), omop[0])
    tables = {file.stem: pd.read_parquet(file) for file in omop[0].iterdir()}
    period = tables["observation_period"].set_index("person_id")
    born = tables["person"].set_index("person_id")["birth_datetime"]
    visits = tables["visit_occurrence"].drop_duplicates(["person_id", "visit_start_datetime"])
    rows = pd.DataFrame({"subject": visits["person_id"], "t": visits["visit_start_datetime"]})
    rows["since"] = pd.to_datetime(rows["subject"].map(period["observation_period_start_date"]))
    rows["to"] = pd.to_datetime(rows["subject"].map(period["observation_period_end_date"])) + DAY
    rows = rows[rows["t"] >= rows["since"] + 365 * DAY]
    rows["died"] = rows["subject"].isin(tables["death"]["person_id"])  # on the period's last day
    assert store.manifest["rows"] == len(rows) > 3000
    age = (rows["t"] - rows["subject"].map(born)) / (365.25 * DAY)
    stored = values(store)
    np.testing.assert_allclose(
        stored["age"], pd.Series(age.array, [rows["subject"], rows["t"]]).reindex(stored.index),
        rtol=1e-6,
    )  # fmt: skip

    above = tables["concept_ancestor"]
    conditions = tables["condition_occurrence"].rename(columns={"person_id": "subject"})
    conditions["known"] = conditions["condition_start_datetime"]
    midnight = conditions["known"] == conditions["known"].dt.normalize()
    conditions.loc[midnight, "known"] += DAY
    rows["begins"], rows["ends"] = rows["t"] + DAY, rows["t"] + 731 * DAY
    for disease, ancestors in STANDARD.items():
        if disease not in store.diseases:
            continue
        below = above[above["ancestor_concept_id"].isin(ancestors)]["descendant_concept_id"]
        events = conditions[conditions["condition_concept_id"].isin(below)][["subject", "known"]]
        first = rows["subject"].map(events.groupby("subject")["known"].min())
        left = (rows["to"] < rows["ends"]) & ~rows["died"]
        expected = pd.Series(np.where(left, np.nan, 0.0), rows.index)
        expected[(first <= rows["ends"]) & (first <= rows["to"])] = 1
        expected[(first <= rows["begins"]) | (rows["to"] <= rows["begins"])] = np.nan
        expected.index = pd.MultiIndex.from_frame(rows[["subject", "t"]])
        assert_same(labels(store)[disease].astype(float), expected)
        assert expected.sum() > 10
        assert (expected == 0)[rows["died"].array].sum() > 10

    measured = tables["measurement"].rename(columns={"person_id": "subject"})
    measured["known"] = measured["measurement_datetime"]
    hdl = measured[measured["measurement_source_value"] == "hdl"][["subject", "known"]]
    hdl["known"] += pd.Timedelta("1us")  # what is stamped as the visit is not known when it begins
    assert_same(stored["hdl.count"], counts(rows, hdl, 1095))
    diabetes = counts(rows, conditions[conditions["condition_source_value"] == "diabetes"], 1095)
    assert stored["history.diabetes"].sum() == len(diabetes)


def test_omop_is_the_same_from_csv_and_from_postgresql(make, omop, tmp_path, postgres, monkeypatch):
    from adbc_driver_postgresql import dbapi

    monkeypatch.setenv("OMOP_URL", postgres)
    names = [
        name
        for name, table in yaml.safe_load((CONFIGS / "omop.yaml").read_text())["tables"].items()
        if "path" in table
    ]
    with dbapi.connect(postgres, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA IF EXISTS formats CASCADE")
        cursor.execute("CREATE SCHEMA formats")
        for name in names:
            table = pq.read_table(omop[0] / f"{name}.parquet")
            cursor.adbc_ingest(name, table, mode="create", db_schema_name="formats")
    content = yaml.safe_load((CONFIGS / "omop.yaml").read_text())
    there = {name: {"database": "cdm", "table": f"formats.{name}"} for name in names}
    routes = {
        "parquet": (omop_config(tmp_path), omop[0]),
        "csv": (omop_config(tmp_path), omop[1]),
        "postgresql": (
            omop_config(
                tmp_path,
                databases={"cdm": {"url_env": "OMOP_URL"}},
                tables=content["tables"] | there,
            ),
            tmp_path,
        ),
    }
    stores = {}
    for route, (config, data) in routes.items():
        store = make(config, data)
        stores[route] = {
            name: (store.path / f"{name}.parquet").read_bytes()
            for name in ("values", "mask", "labels", "splits")
        }
    assert stores["csv"] == stores["parquet"]
    assert stores["postgresql"] == stores["parquet"]


def test_synthea(make, shared_data, tmp_path):
    with zipfile.ZipFile(shared_data("omop_synthea27nj/Synthea27Nj_5.4.zip")) as archive:
        for name in (
            "PERSON",
            "OBSERVATION_PERIOD",
            "VISIT_OCCURRENCE",
            "CONDITION_OCCURRENCE",
            "MEASUREMENT",
        ):
            archive.extract(f"{name}.csv", tmp_path)
    store = make(CONFIGS / "synthea.yaml", tmp_path)
    visits = pd.read_csv(tmp_path / "VISIT_OCCURRENCE.csv", parse_dates=["visit_start_date"])
    rows = visits.drop_duplicates(["person_id", "visit_start_date"])
    rows = rows[rows["visit_start_date"] >= "2000-01-01"]
    rows = pd.DataFrame({"subject": rows["person_id"], "t": rows["visit_start_date"]})
    assert store.manifest["rows"] == len(rows) == 1507
    rows["begins"], rows["ends"] = rows["t"] + DAY, rows["t"] + 366 * DAY
    conditions = pd.read_csv(
        tmp_path / "CONDITION_OCCURRENCE.csv", parse_dates=["condition_start_date"]
    )
    conditions["known"] = conditions["condition_start_date"] + DAY
    conditions["subject"] = conditions["person_id"]
    for disease, concept in (("viral_sinusitis", 40481087), ("stress", 4251306)):
        events = conditions[conditions["condition_concept_id"] == concept]
        ill = in_window(rows, events[["subject", "known"]], "begins", "ends")
        assert set(labels(store).query(f"{disease} == 1").index) == set(ill)


def test_64_bit_ids_stay_apart(make, shared_data, tmp_path):
    folder = shared_data("omop_mimic4_demo")
    config = {
        "dataset": "mimic_omop",
        "data_root": str(folder),
        "tables": {
            name: {"path": f"{name}.csv.gz"}
            for name in ("person", "visit_occurrence", "condition_occurrence", "drug_exposure")
        },
        "events": [
            {
                "table": "condition_occurrence",
                "subject_id": "person_id",
                "time": "condition_start_datetime",
                "code": "condition_concept_id",
            },
            {
                "table": "drug_exposure",
                "subject_id": "person_id",
                "time": "drug_exposure_start_datetime",
                "code": "drug_concept_id",
            },
        ],
        "cohort": {
            "table": "visit_occurrence",
            "subject_id": "person_id",
            "join": ["person"],
            "prediction_time": "visit_start_datetime",
            "hours_after": 24,
            "where": "visit_concept_id in [262, 8870, 8883, 9201]",
            "take": "first",
        },
        "features": {
            "static": {"born": {"column": "year_of_birth"}},
            "history": {"dextrose": ["46275280"]},
        },
        "labels": {"hypertension": {"codes": ["320128"], "prevalent": True}},
        "splits": {"train": 0.4, "tuning": 0.3, "held_out": 0.3},
    }
    path = tmp_path / "mimic_omop.yaml"
    path.write_text(yaml.safe_dump(config))
    store = make(path, folder)
    visits = pd.read_csv(folder / "visit_occurrence.csv.gz", dtype={"person_id": "int64"})
    stays = visits[visits["visit_concept_id"].isin([262, 8870, 8883, 9201])]
    stored = values(store)
    subjects = stored.index.get_level_values("subject_id")
    assert subjects.dtype == np.int64
    assert set(subjects) == set(stays["person_id"])
    person = pd.read_csv(folder / "person.csv.gz", dtype={"person_id": "int64"})
    born = person.set_index("person_id")["year_of_birth"]
    np.testing.assert_array_equal(stored["born"], born.reindex(subjects))
    first = pd.to_datetime(stays.groupby("person_id")["visit_start_datetime"].min())
    rows = pd.DataFrame({"subject": first.index, "t": first.to_numpy() + DAY})
    conditions = pd.read_csv(
        folder / "condition_occurrence.csv.gz",
        dtype={"person_id": "int64"},
        parse_dates=["condition_start_datetime"],
        low_memory=False,
    ).rename(columns={"person_id": "subject", "condition_start_datetime": "known"})
    ill = counts(rows, conditions[conditions["condition_concept_id"] == 320128])
    assert set(labels(store).query("hypertension == 1").index) == set(ill.index)


# -- FHIR ----------------------------------------------------------------------------------------


ENDED_EVERYWHERE = pd.Timedelta("36h")  # after a day began in UTC


def bulk_export(folder, patients=400, seed=0):
    """Write a made-up export; returns encounters, what was recorded of whom, and all resources."""
    rng = np.random.default_rng(seed)
    resources = {
        kind: []
        for kind in (
            "Patient", "Encounter", "Observation", "Condition", "MedicationRequest", "Procedure"
        )
    }  # fmt: skip
    start = pd.Timestamp("2015-01-01")
    told = []

    def about(kind, i, **fields):
        subject = {"subject": {"reference": f"Patient/p{i}"}}
        number = len(resources[kind])
        resources[kind].append(
            {"resourceType": kind, "id": f"{kind}-{number}", **subject, **fields}
        )

    def concept(system, code):
        return {"coding": [{"system": system, "code": code}]}

    for i in range(patients):
        resources["Patient"].append(
            {
                "resourceType": "Patient",
                "id": f"p{i}",
                "gender": ["female", "male"][i % 2],
                "birthDate": f"{1940 + i % 50}-05-{1 + i % 28:02}",
            }
        )
        for day in np.sort(rng.integers(0, 5 * 365, 6)).tolist():
            visit = start + day * DAY + pd.Timedelta("9h")
            stamp = f"{visit:%Y-%m-%dT%H:%M:%S}Z"
            about("Encounter", i, status="finished", period={"start": stamp})
            if rng.random() < 0.8:
                value = round(float(rng.normal(140, 15)), 1)
                part = {
                    "code": concept("http://loinc.org", "8480-6"),
                    "valueQuantity": {"value": value, "code": "mm[Hg]"},
                }
                panel = concept("http://loinc.org", "85354-9")
                about(
                    "Observation", i, status="final", effectiveDateTime=stamp, code=panel,
                    component=[part],
                )  # fmt: skip
                told.append(("systolic", f"p{i}", visit, value))
            if rng.random() < 0.5:
                status = ["final", "entered-in-error"][int(rng.random() < 0.1)]
                quantity = {"value": round(float(rng.normal(5.5, 1)), 2), "code": "mmol/L"}
                about(
                    "Observation", i, status=status, effectiveDateTime=stamp,
                    code=concept("http://loinc.org", "2345-7"), valueQuantity=quantity,
                )  # fmt: skip
        for code, system, share in (
            ("59621000", "http://snomed.info/sct", 0.4),
            ("E11.9", "http://hl7.org/fhir/sid/icd-10-cm", 0.3),
            ("84114007", "http://snomed.info/sct", 0.3),
        ):
            if rng.random() < share:
                day = start + int(rng.integers(200, 5 * 365)) * DAY
                about("Condition", i, recordedDate=f"{day:%Y-%m-%d}", code=concept(system, code))
                told.append((code, f"p{i}", day + ENDED_EVERYWHERE, None))
        if i % 3 == 0:
            about(
                "MedicationRequest", i, status="active", intent="order", authoredOn="2015-06-01",
                medicationCodeableConcept=concept(
                    "http://www.nlm.nih.gov/research/umls/rxnorm", "6809"
                ),
            )  # fmt: skip
        if i % 5 == 0:
            about(
                "Procedure", i, status="completed", performedDateTime="2015-07-01",
                code=concept("http://snomed.info/sct", "232717009"),
            )  # fmt: skip
    for kind, listed in resources.items():
        lines = "".join(json.dumps(resource) + "\n" for resource in listed)
        (folder / f"{kind}.ndjson").write_text(lines)
    encounters = [
        (e["subject"]["reference"].removeprefix("Patient/"), e["period"]["start"])
        for e in resources["Encounter"]
    ]
    return (
        pd.DataFrame(encounters, columns=["subject", "t"]).assign(
            t=lambda frame: pd.to_datetime(frame["t"]).dt.tz_localize(None)
        ),
        pd.DataFrame(told, columns=["code", "subject", "known", "value"]),
        resources,
    )


def test_fhir(make, tmp_path):
    encounters, told, resources = bulk_export(tmp_path)
    deceased = {}
    for patient in resources["Patient"][::6]:
        of_patient = encounters["subject"] == patient["id"]
        death = encounters["t"][of_patient].max().normalize() + (3 + len(deceased) % 9) * DAY
        patient["deceasedDateTime"] = f"{death:%Y-%m-%d}"
        if len(deceased) % 9 <= 5:  # else so late that nothing is known of the time before
            deceased[patient["id"]] = death + ENDED_EVERYWHERE
        else:
            deceased[patient["id"]] = pd.NaT
    lines = "".join(json.dumps(patient) + "\n" for patient in resources["Patient"])
    (tmp_path / "Patient.ndjson").write_text(lines)
    store = make(CONFIGS / "fhir.yaml", tmp_path)
    rows = encounters.drop_duplicates()
    last = rows.groupby("subject")["t"].max().dt.normalize() + ENDED_EVERYWHERE
    died = rows["subject"].map(deceased)
    assert store.manifest["rows"] == len(rows)
    systolic = told[told["code"] == "systolic"].assign(
        known=lambda f: f["known"] + pd.Timedelta("1us")
    )
    assert_same(values(store)["systolic_bp.count"], counts(rows, systolic.drop_duplicates(), 1095))
    rows = rows.assign(begins=rows["t"] + DAY, ends=rows["t"] + 366 * DAY)
    seen_to = died.fillna(rows["subject"].map(last))
    for disease, code in (("hypertension", "59621000"), ("diabetes", "E11.9")):
        first = rows["subject"].map(told[told["code"] == code].groupby("subject")["known"].min())
        left = (seen_to < rows["ends"]) & died.isna()
        expected = pd.Series(np.where(left, np.nan, 0.0), rows.index)
        expected[(first <= rows["ends"]) & (first.dt.normalize() <= seen_to)] = 1
        expected[(first <= rows["begins"]) | (seen_to <= rows["begins"])] = np.nan
        assert (expected == 0)[died.notna()].sum() > 10
        expected.index = pd.MultiIndex.from_frame(rows[["subject", "t"]])
        assert_same(labels(store)[disease].astype(float), expected)
    on_metformin = values(store)["history.metformin"].groupby("subject_id").max()
    assert {int(subject[1:]) % 3 for subject in on_metformin[on_metformin == 1].index} == {0}
    glucose = values(store)["glucose.mean"].dropna()
    assert glucose.between(30, 200).all()  # mg/dL
    wrong = [o for o in resources["Observation"] if o["status"] == "entered-in-error"]
    rows = store.manifest["event_rows"]["measured"]
    assert rows["read"] == len(resources["Observation"])
    assert rows["left_out"] == len(wrong) > 0


SEEN = "2019-01-05T10:00:00Z"  # when who are told about below are predicted for
GLUCOSE = {
    "resourceType": "Observation",
    "status": "final",
    "code": {"coding": [{"system": "http://loinc.org", "code": "2339-0"}]},
    "valueQuantity": {"value": 99, "unit": "mg/dL", "code": "mg/dL"},
    "effectiveDateTime": "2018-12-01T10:00:00Z",
}
DIABETES = {
    "resourceType": "Condition",
    "code": {"coding": [{"system": "http://snomed.info/sct", "code": "44054006"}]},
    "recordedDate": "2019-05-01T10:00:00Z",
}
KIDNEY = {
    "resourceType": "Condition",
    "code": {"coding": [{"system": "http://snomed.info/sct", "code": "431855005"}]},
}
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"
METFORMIN = {
    "resourceType": "MedicationRequest",
    "status": "active",
    "intent": "order",
    "authoredOn": "2018-05-02T10:00:00Z",
    "medicationCodeableConcept": {"coding": [{"system": RXNORM, "code": "6809"}]},
}
BYPASS = {
    "resourceType": "Procedure",
    "status": "completed",
    "code": {"coding": [{"system": "http://snomed.info/sct", "code": "232717009"}]},
}


def coded(resource, *codings):
    pairs = [{"system": system, "code": code} for system, code in codings]
    return resource | {"code": {"coding": pairs}}


def verified(status):
    return DIABETES | {"verificationStatus": {"coding": [{"code": status}]}}


def by_reference(**fields):
    return {k: v for k, v in METFORMIN.items() if k != "medicationCodeableConcept"} | {
        "medicationReference": {"reference": "#med"},
        "contained": [
            {"resourceType": "Practitioner", "id": "who"},
            {
                "resourceType": "Medication",
                "id": "med",
                "code": METFORMIN["medicationCodeableConcept"],
                **fields,
            },
        ],
    }


ICD, SCT = ("http://hl7.org/fhir/sid/icd-10-cm", "E11.9"), ("http://snomed.info/sct", "73211009")
LOCAL, LOINC = ("urn:oid:1.2.3", "GLUC"), ("http://loinc.org", "2339-0")
SOON = "2019-01-06T10:00:00Z"
TOLD = [  # of a patient one resource; a feature or label; what it is at SEEN
    (coded(DIABETES, ICD, SCT), "diabetes", 1),
    (coded(DIABETES, SCT, ICD), "diabetes", 1),
    (coded(DIABETES, SCT), "diabetes", 0),
    (coded(GLUCOSE, LOCAL, LOINC), "glucose.last", 99),
    (coded(GLUCOSE, LOCAL, LOINC), "glucose.count", 1),
    (coded(GLUCOSE, ("http://loinc.org/", "2339-0")), "glucose.last", 99),
    (coded(GLUCOSE, ("http://loinc.org|2.77", "2339-0")), "glucose.last", 99),
    (GLUCOSE | {"issued": SOON}, "glucose.last", None),
    (GLUCOSE | {"issued": "2018-11-01T10:00:00Z"}, "glucose.last", 99),
    (GLUCOSE | {"issued": "2019-01-05T11:30:00+02:00"}, "glucose.last", 99),
    (
        GLUCOSE | {"effectiveDateTime": None, "effectivePeriod": {"start": "2018", "end": SOON}},
        "glucose.last",
        None,
    ),
    (
        GLUCOSE | {"effectiveDateTime": None, "effectivePeriod": {"start": "2018-12-01"}},
        "glucose.last",
        99,
    ),
    (GLUCOSE | {"status": "preliminary"}, "glucose.last", 99),
    (GLUCOSE | {"status": "registered"}, "glucose.last", None),
    (GLUCOSE | {"modifierExtension": [{"url": "urn:not"}]}, "glucose.last", None),
    (METFORMIN, "history.metformin", 1),
    (METFORMIN | {"doNotPerform": False}, "history.metformin", 1),
    (METFORMIN | {"doNotPerform": True}, "history.metformin", 0),
    (METFORMIN | {"status": "draft", "intent": "proposal"}, "history.metformin", 0),
    (METFORMIN | {"intent": "plan"}, "history.metformin", 0),
    (METFORMIN | {"status": "unknown"}, "history.metformin", 1),
    (by_reference(), "history.metformin", 1),
    (by_reference(status="entered-in-error"), "history.metformin", 0),
    (verified("confirmed"), "diabetes", 1),
    (verified("differential"), "diabetes", 0),
    (verified("refuted"), "diabetes", 0),
    (DIABETES | {"recordedDate": "2019-13"}, "diabetes", 0),
    (DIABETES | {"onsetDateTime": "2009"}, "diabetes", 1),
    (DIABETES | {"onsetDateTime": "2021-01-01"}, "diabetes", 0),
    (KIDNEY | {"recordedDate": "2019-01-05"}, "history.kidney_disease", 0),
    (KIDNEY | {"recordedDate": "2019-01-03"}, "history.kidney_disease", 1),
    (KIDNEY | {"onsetDateTime": "2018", "recordedDate": SOON}, "history.kidney_disease", 0),
    (BYPASS | {"performedDateTime": "2018-07-01"}, "history.bypass_surgery", 1),
    (
        BYPASS | {"performedPeriod": {"start": "2018-07-01", "end": SOON}},
        "history.bypass_surgery",
        0,
    ),
    (
        BYPASS | {"performedDateTime": "2018-07-01", "status": "not-done"},
        "history.bypass_surgery",
        0,
    ),
]


def export_of(folder, told, seen=SEEN):
    """Add to a bulk export a patient, x0, x1, …, for each resource."""
    encounters = (
        (seen.replace("2019", "2016"), "finished"),
        (seen, "finished"),
        ("2018-06-05T10:00:00Z", "planned"),
        ("2021-06-05T12:00:00+02:00", "in-progress"),
    )
    for i, resource in enumerate(told):
        subject = {"subject": {"reference": f"Patient/x{i}"}}
        person = {"resourceType": "Patient", "id": f"x{i}", "birthDate": "1960", "gender": "male"}
        visits = [
            {"resourceType": "Encounter", "id": f"x{i}-{n}", "status": status, **subject}
            | {"period": {"start": start}}
            for n, (start, status) in enumerate(encounters)
        ]
        for one in (person, *visits, resource | {"id": f"x{i}"} | subject):
            with (folder / f"{one['resourceType']}.ndjson").open("a") as file:
                file.write(json.dumps(one) + "\n")


def at_seen(store, seen=SEEN):
    """Features and labels of x0, x1, … at that time."""
    rows = values(store).join(labels(store))
    rows = rows.xs(pd.Timestamp(seen).tz_convert(None), level="prediction_time")
    return rows[rows.index.str.startswith("x")]


def test_fhir_says_what_is_known_and_what_is_a_fact(make, tmp_path):
    bulk_export(tmp_path)
    export_of(tmp_path, [resource for resource, _, _ in TOLD])
    store = make(CONFIGS / "fhir.yaml", tmp_path)
    rows = at_seen(store)
    wrong = [
        (resource, column, got, right)
        for i, (resource, column, right) in enumerate(TOLD)
        if not np.array_equal(
            got := float(rows.loc[f"x{i}", column]),
            np.nan if right is None else right,
            equal_nan=True,
        )
    ]
    assert wrong == []
    assert len(values(store).loc["x0"]) == 3  # without the planned encounter
    findings = {(f["check"], f["where"]): f["count"] for f in store.manifest["findings"]}
    assert findings["left out", "recorded"] == 7
    for table in ("recorded", "measured"):  # of which two of those told of have two codings
        merged = store.manifest["event_rows"][table]["merged"]
        assert merged == findings["several codes", table] == 2
    (bad,) = [f for f in store.manifest["findings"] if f["check"] == "quarantine"]
    assert (bad["where"], bad["count"]) == ("recorded", 1)
    assert "does not parse" in bad["message"]


@pytest.mark.parametrize(
    ("time_zone", "seen", "known"),
    [
        (None, "2019-01-06T11:00:00Z", 0),
        (None, "2019-01-06T13:00:00Z", 1),
        ("America/Los_Angeles", "2019-01-05T18:00:00-08:00", 0),
        ("America/Los_Angeles", "2019-01-06T00:30:00-08:00", 1),
        ("Asia/Tokyo", "2019-01-05T23:00:00+09:00", 0),
        ("Asia/Tokyo", "2019-01-06T00:30:00+09:00", 1),
    ],
)
def test_a_day_of_fhir_ends_at_the_site(make, tmp_path, time_zone, seen, known):
    bulk_export(tmp_path)
    observed = GLUCOSE | {"effectiveDateTime": "2019-01-05"}
    export_of(tmp_path, [KIDNEY | {"recordedDate": "2019-01-05"}, observed], seen)
    content = yaml.safe_load((CONFIGS / "fhir.yaml").read_text())
    content["clock"] = {"unit": "timestamp", "time_zone": time_zone}
    (tmp_path / "fhir.yaml").write_text(yaml.safe_dump(content))
    rows = at_seen(make(tmp_path / "fhir.yaml", tmp_path), seen)
    assert rows.loc["x0", "history.kidney_disease"] == known
    assert rows["glucose.last"].notna()["x1"] == known


def test_fhir_finds_medicines_that_are_resources_of_their_own(make, tmp_path):
    bulk_export(tmp_path)
    reference = {"medicationReference": {"reference": "Medication/m"}}
    by_id = {k: v for k, v in METFORMIN.items() if k != "medicationCodeableConcept"} | reference
    lost = by_id | {"medicationReference": {"reference": "Medication/lost"}}
    wrong = by_id | {"medicationReference": {"reference": "Medication/wrong"}}
    export_of(tmp_path, [METFORMIN, by_id, by_reference(), lost, wrong])
    codings = {"coding": [{"system": "urn:x", "code": "1"}, {"system": RXNORM, "code": "6809"}]}
    medicine = {"resourceType": "Medication", "id": "m", "code": codings}
    lines = [medicine, medicine | {"id": "wrong", "status": "entered-in-error"}]
    file = tmp_path / "Medication.ndjson"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = at_seen(make(CONFIGS / "fhir.yaml", tmp_path))
    assert rows["history.metformin"].to_dict() == {"x0": 1, "x1": 1, "x2": 1, "x3": 0, "x4": 0}


# -- MEDS ----------------------------------------------------------------------------------------


def extraction(folder, subjects=300, seed=0):
    """A made-up extraction in MEDS, sharded by split; returns its events and labels."""
    rng = np.random.default_rng(seed)
    ids = np.arange(1000, 1000 + subjects)
    splits = pd.Series(np.array(["train", "train", "tuning", "held_out"])[ids % 4], index=ids)
    n = 12 * subjects
    when = pd.Timestamp("2015-01-01") + rng.integers(0, 2000, n) * DAY
    codes = ["LAB//systolic_bp//mmHg", "LAB//glucose//mg/dL", "LAB//creatinine//mg/dL"]
    chosen = rng.integers(0, 3, n)
    lab = pd.DataFrame(
        {
            "subject_id": rng.choice(ids, n),
            "time": when,
            "code": np.array(codes)[chosen],
            "numeric_value": (rng.normal([130, 100, 1.0], [15, 20, 0.2], (n, 3)))[
                np.arange(n), chosen
            ],
        }
    )
    still = pd.DataFrame({"subject_id": ids, "code": np.where(ids % 2, "GENDER//F", "GENDER//M")})
    birth = pd.DataFrame(
        {"subject_id": ids, "time": pd.Timestamp("1960-01-01") + ids * DAY, "code": "MEDS_BIRTH"}
    )
    smoker = pd.DataFrame(
        {
            "subject_id": ids[::3],
            "time": pd.Timestamp("2014-12-01"),
            "code": "DIAGNOSIS//ICD10CM//F172",
        }
    )
    events = pd.concat([still, birth, lab.drop_duplicates(), smoker], ignore_index=True)
    events = events.sort_values(["subject_id", "time"], na_position="first", kind="stable")
    asked = {}
    for disease in ("hypertension", "diabetes"):
        rows = pd.DataFrame({"subject_id": rng.permutation(ids)[: subjects * 3 // 4]})
        rows["prediction_time"] = pd.Timestamp("2018-01-01") + rows["subject_id"] % 5 * DAY
        asked[disease] = rows.assign(boolean_value=rng.random(len(rows)) < 0.4)
        write(meds.LabelSchema, asked[disease], folder / "labels" / disease / "0.parquet")
    for split, of in events.groupby(events["subject_id"].map(splits)):
        write(meds.DataSchema, of, folder / "data" / split / "0.parquet")
    table = splits.rename_axis("subject_id").rename("split").reset_index()
    write(meds.SubjectSplitSchema, table, folder / meds.subject_splits_filepath)
    return events, asked, splits


def write(schema, frame, path):
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(schema.align(table), path)


def test_meds(make, tmp_path):
    events, asked, splits = extraction(tmp_path / "extraction")
    store = make(CONFIGS / "meds.yaml", tmp_path / "extraction")
    given = pd.merge(
        asked["hypertension"], asked["diabetes"], on=["subject_id", "prediction_time"], how="outer"
    ).set_index(["subject_id", "prediction_time"])
    stored = labels(store)
    for name, column in (("hypertension", "boolean_value_x"), ("diabetes", "boolean_value_y")):
        assert_same(stored[name].astype(float), given[column].astype(float))
    subjects = stored.index.get_level_values(0)
    np.testing.assert_array_equal(store.splits()[:, 0], splits.reindex(subjects))
    np.testing.assert_array_equal(values(store)["sex"], subjects % 2 == 0)
    rows = stored.index.to_frame(index=False).set_axis(["subject", "t"], axis=1)
    lab = events.rename(columns={"subject_id": "subject", "time": "known"})
    lab = lab[lab["code"].str.contains("systolic") & lab["numeric_value"].between(50, 300)]
    assert_same(values(store)["systolic_bp.count"], counts(rows, lab, 1095))
    told = store.manifest["event_rows"]["data"]
    assert told["left_out"] == events["time"].isna().sum()
