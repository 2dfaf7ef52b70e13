"""FHIR resources become flat rows; what is no FHIR is refused with its line, never its content."""

import gzip
import json

import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.fhir import RESOURCES
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.ingest.tables import connect, load_tables

LOINC = "http://loinc.org"
PRESSURE = {
    "resourceType": "Observation",
    "id": "bp",
    "status": "final",
    "subject": {"reference": "Patient/1", "display": "SECRET"},
    "encounter": {"reference": "urn:uuid:e-1"},
    "effectiveDateTime": "2020-02-03T10:00:00+02:00",
    "code": {"coding": [{"system": LOINC, "code": "85354-9"}], "text": "Blood pressure"},
    "component": [
        {
            "code": {"coding": [{"system": LOINC, "code": "8480-6", "display": "Systolic"}]},
            "valueQuantity": {"value": 120.5, "unit": "mmHg", "code": "mm[Hg]"},
        },
        {
            "code": {"coding": [{"system": LOINC, "code": "8462-4"}]},
            "valueQuantity": {"value": 80, "unit": "mmHg"},
        },
    ],
}


def observation(**fields):
    about = {"id": "o", "subject": {"reference": "Patient/1"}}
    return {"resourceType": "Observation", **about, **fields}


def midnight(day):
    """Of a day of the busy hospital's clock, told two hours east of Greenwich."""
    return f"{pd.Timestamp('2020-01-01 02:00') + pd.Timedelta(days=day):%Y-%m-%dT%H:%M:%S}+02:00"


def of_patient(number):
    return {"subject": {"reference": f"https://example.org/Patient/{number}"}}


def ndjson(resources):
    return "".join(json.dumps(resource) + "\n" for resource in resources).encode()


@pytest.fixture
def load(hospital):
    """A function: a file's resources, or its bytes → the rows of its table as dictionaries."""
    (hospital.folder / "patients.csv").write_text("id,index,end,age\n1,100,1000,50\n")
    (hospital.folder / "diagnoses.csv").write_text("id,day,icd\n1,150,E11\n")

    def load_labs(content, fhir="Observation", file="labs.ndjson", path=None):
        if not isinstance(content, bytes):
            content = ndjson(content)
        (hospital.folder / file).write_bytes(content)
        columns = list(RESOURCES[fhir].columns)
        config = hospital.config(
            tables__fhir={"path": path or file, "fhir": fhir},
            tables__labs={"sql": "SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x FROM fhir"},
            tables__all={"sql": "SELECT * FROM fhir"},
            events__0={
                "table": "all",
                "subject_id": "id",
                "time": columns[1],
                "code": columns[2],
            },
        )
        with connect() as db:
            load_tables(db, config)
            query = "SELECT * EXCLUDE (_row) FROM source.fhir ORDER BY _row"
            read = db.execute(query)
            names = [name for name, *_ in read.description]
            return [dict(zip(names, row, strict=True)) for row in read.fetchall()]

    return load_labs


def test_a_panel_is_a_row_for_each_component(load):
    assert load([PRESSURE]) == [
        {
            "id": "bp",
            "subject_id": "1",
            "encounter_id": "e-1",
            "component": place,
            "time": "2020-02-03T10:00:00+02:00",
            "code": code,
            "system": LOINC,
            "display": display,
            "value": value,
            "comparator": None,
            "unit": unit,
            "value_code": None,
            "value_text": None,
            "status": "final",
        }
        for place, code, display, value, unit in (
            (1, "8480-6", "Systolic", "120.5", "mm[Hg]"),
            (2, "8462-4", None, "80", "mmHg"),
        )
    ]


def test_an_observation_s_own_row_is_there_if_it_has_a_value_or_no_components(load):
    rows = load(
        [
            PRESSURE,
            PRESSURE | {"valueInteger": 7},
            observation(),
            observation(component=[], valueString="x"),
        ]
    )
    assert [(row["id"], row["component"]) for row in rows] == [
        *(("bp", place) for place in (1, 2, 0, 1, 2)),
        ("o", 0),
        ("o", 0),
    ]


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("valueQuantity", {"value": 0.1, "comparator": "<", "unit": "g"}, ("0.1", None, None)),
        ("valueInteger", -3, ("-3", None, None)),
        ("valueBoolean", True, ("1", None, None)),
        ("valueBoolean", False, ("0", None, None)),
        ("valueString", " none\nseen ", (None, None, "none\nseen")),
        (
            "valueCodeableConcept",
            {"coding": [{"system": "s"}, {"code": "c"}]},
            (None, "c", None),
        ),
        ("valueDateTime", "2020", (None, None, "2020")),
        ("valueRange", {"low": {"value": 1}}, (None, None, None)),
    ],
)
def test_a_value_is_a_number_a_code_or_text(load, field, value, read):
    (row,) = load([observation(**{field: value})])
    assert (row["value"], row["value_code"], row["value_text"]) == read
    if field == "valueQuantity":
        assert (row["comparator"], row["unit"]) == ("<", "g")


@pytest.mark.parametrize(
    ("reference", "read"),
    [
        ("Patient/123", "123"),
        ("urn:uuid:0c1-2", "0c1-2"),
        ("https://example.org/fhir/Patient/a.B-1", "a.B-1"),
        ("Patient/7/_history/2", "7"),
        ("https://example.org/fhir/Patient/7/_history/2", "7"),
        ("123", "123"),
        (None, None),
    ],
)
def test_a_reference_is_the_bare_id(load, reference, read):
    (row,) = load([observation(subject={"reference": reference})])
    assert row["subject_id"] == read


@pytest.mark.parametrize(
    ("fields", "time"),
    [
        ({"effectiveDateTime": "2014"}, "2014-12-31"),
        ({"effectiveDateTime": "2014-02"}, "2014-02-28"),
        ({"effectiveDateTime": "2016-02"}, "2016-02-29"),
        ({"effectiveDateTime": "2014-05-03"}, "2014-05-03"),
        ({"effectiveDateTime": "2014-13"}, "2014-13"),
        ({"effectiveDateTime": "14"}, "14"),
        ({"effectivePeriod": {"start": "2014-05", "end": "2015"}}, "2014-05-31"),
        ({"effectiveInstant": "2014-05-03T10:00:00Z"}, "2014-05-03T10:00:00Z"),
        ({"issued": "2014-05-03T10:00:00.5Z", "effectiveDateTime": "2013"}, "2013-12-31"),
        ({"issued": "2014-05-03T10:00:00.5Z"}, "2014-05-03T10:00:00.5Z"),
        ({}, None),
    ],
)
def test_a_partial_date_is_the_last_day_it_may_mean(load, fields, time):
    (row,) = load([observation(**fields)])
    assert row["time"] == time


def test_a_partial_birth_date_is_in_the_middle(load):
    dates = ["1950", "1950-02", "1950-02-03"]
    rows = load([{"resourceType": "Patient", "birthDate": date} for date in dates], "Patient")
    assert [row["birth_date"] for row in rows] == ["1950-07-02", "1950-02-16", "1950-02-03"]


def test_the_other_resources(load):
    concept = {"coding": [{"code": "c", "system": "s", "display": "d"}]}
    about = {
        "id": "i",
        "subject": {"reference": "Patient/1"},
        "encounter": {"reference": "Encounter/2"},
        "code": concept,
    }
    told = {
        "id": "i",
        "subject_id": "1",
        "encounter_id": "2",
        "code": "c",
        "system": "s",
        "display": "d",
    }
    (patient,) = load(
        [{"resourceType": "Patient", "id": "1", "gender": "female", "deceasedDateTime": "2020"}],
        "Patient",
    )
    assert patient == {
        "id": "1",
        "birth_date": None,
        "gender": "female",
        "deceased": 1,
        "deceased_time": "2020-12-31",
    }
    (encounter,) = load(
        [
            {
                "resourceType": "Encounter",
                "id": "2",
                "subject": about["subject"],
                "class": {"code": "IMP"},
                "type": [{"coding": [{"code": "t"}]}],
                "period": {"start": "2020-01-02", "end": "2020-01"},
                "status": "finished",
            }
        ],
        "Encounter",
    )
    assert encounter == {
        "id": "2",
        "subject_id": "1",
        "class": "IMP",
        "type_code": "t",
        "start": "2020-01-02",
        "end": "2020-01-31",
        "status": "finished",
    }
    (condition,) = load(
        [
            {
                "resourceType": "Condition",
                **about,
                "onsetPeriod": {"start": "2020"},
                "recordedDate": "2020-03-04",
                "abatementDateTime": "2021-01-01",
                "clinicalStatus": {"coding": [{"code": "resolved"}]},
                "verificationStatus": {"coding": [{"code": "confirmed"}]},
            }
        ],
        "Condition",
    )
    assert condition == told | {
        "onset": "2020-12-31",
        "recorded": "2020-03-04",
        "abatement": "2021-01-01",
        "clinical_status": "resolved",
        "verification_status": "confirmed",
    }
    (request,) = load(
        [
            {
                "resourceType": "MedicationRequest",
                **about,
                "medicationCodeableConcept": concept,
                "authoredOn": "2020-05-06",
                "status": "active",
                "intent": "order",
            }
        ],
        "MedicationRequest",
    )
    assert request == told | {
        "time": "2020-05-06",
        "medication_id": None,
        "status": "active",
        "intent": "order",
    }
    (procedure,) = load(
        [
            {
                "resourceType": "Procedure",
                **about,
                "performedPeriod": {"start": "2020-07-08T01:02:03Z"},
                "status": "completed",
            }
        ],
        "Procedure",
    )
    assert procedure == told | {"time": "2020-07-08T01:02:03Z", "status": "completed"}


@pytest.mark.parametrize("deceased", [{"deceasedBoolean": False}, {"deceasedBoolean": True}, {}])
def test_deceased_is_unknown_where_nothing_is_said(load, deceased):
    (patient,) = load([{"resourceType": "Patient", "id": "1", **deceased}], "Patient")
    assert patient["deceased"] == deceased.get("deceasedBoolean")


def test_files_may_be_compressed_and_many(load):
    content = ndjson([PRESSURE])
    assert len(load(gzip.compress(content), file="Observation.ndjson.gz")) == 2
    assert len(load(content, file="Observation.jsonl", path="Observation.*")) == 4
    assert len(load(content.replace(b"\n", b"\r\n") + b"\n\n", file="b.ndjson")) == 2


def test_rows_are_in_the_order_of_the_file(load):
    n = 30_000
    line = json.dumps(PRESSURE)
    rows = load("".join(line.replace('"bp"', f'"{i}"') + "\n" for i in range(n)).encode())
    assert [(row["id"], row["component"]) for row in rows] == [
        (str(i), place) for i in range(n) for place in (1, 2)
    ]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"resourceType": "Observation", SECRET}', "not one whole JSON object"),
        ('{"resourceType": "Observation", "id": "SECRET', "not one whole JSON object"),
        ("SECRET", "not one whole JSON object"),
        (json.dumps(PRESSURE) * 2, "not one whole JSON object"),
        ('["SECRET"]', "the JSON is not shaped as FHIR R4 says"),
        (json.dumps(observation(subject="SECRET")), "the JSON is not shaped as FHIR R4 says"),
        (json.dumps(observation(component={"a": "SECRET"})), "the JSON is not shaped as FHIR"),
        (json.dumps({"resourceType": "Patient", "id": "SECRET"}), "a resource of another type"),
        (json.dumps({"id": "SECRET"}), "a resource of another type"),
        (b'{"resourceType": "Observation", "id": "SECRET\xff"}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("before", [3, 5_000])
def test_a_bad_line_is_refused_with_its_number_but_never_its_content(load, bad, said, before):
    line = ndjson([PRESSURE])
    bad = bad if isinstance(bad, bytes) else bad.encode()
    with pytest.raises(DataError) as error:
        load(line * before + bad + b"\n" + line * before)
    if "shaped" not in said:  # of which DuckDB does not always know the line
        assert f"labs.ndjson: line {before + 1}: " in str(error.value)
    assert said in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_damaged_file_is_refused(load):
    content = gzip.compress(ndjson([PRESSURE | {"id": str(i)} for i in range(3000)]))
    for cut in (5, 60, 3000, len(content) - 9):
        with pytest.raises(DataError, match="damaged, cut off, or not what its name says"):
            load(content[:cut], file="labs.ndjson.gz")
    with pytest.raises(DataError, match="damaged, cut off, or not what its name says"):
        load(ndjson([PRESSURE]), file="labs.ndjson.gz")
    with pytest.raises(DataError, match="line 1: a byte order mark begins the file"):
        load(b"\xef\xbb\xbf" + ndjson([PRESSURE]))
    with pytest.raises(DataError, match=r"not UTF-8 text|not one whole JSON object"):
        load(ndjson([PRESSURE]).decode().encode("utf-16"))
    with pytest.raises(DataError, match="the table is empty"):
        load(b"")


def test_another_type_or_suffix_is_refused(load, hospital):
    with pytest.raises(DataError, match=r"FHIR is read from \.ndjson or \.jsonl"):
        load([PRESSURE], file="labs.json")
    with pytest.raises(ConfigError, match="'Observaton' is not valid; did you mean 'Observation'"):
        hospital.config(tables__labs={"path": "x.ndjson", "fhir": "Observaton"})
    with pytest.raises(ConfigError, match="give `path` too"):
        hospital.config(tables__labs={"rdatasets": "a/b", "fhir": "Patient"})


def test_fhir_gives_the_same_store_as_csv(busy):
    """The busy hospital, exported as FHIR: offsets, panels and partial references included."""
    patients, labs, diagnoses = (
        pd.read_csv(busy.folder / f"{name}.csv") for name in ("patients", "labs", "diagnoses")
    )
    plain = ingest(busy.config())
    exported = {
        "Observation": [
            {
                "resourceType": "Observation",
                **of_patient(row.id),
                "effectiveDateTime": midnight(row.day),
                "component": [
                    {
                        "code": {"coding": [{"code": row.test}]},
                        "valueQuantity": {"value": float(row.x)},
                    }
                ],
            }
            for row in labs.itertuples()
        ],
        "Condition": [
            {
                "resourceType": "Condition",
                **of_patient(row.id),
                "recordedDate": midnight(row.day),
                "code": {"coding": [{"code": row.icd}]},
            }
            for row in diagnoses.itertuples()
        ],
    }
    for name, resources in exported.items():
        half = len(resources) // 2
        for i, part in enumerate((resources[:half], resources[half:])):
            (busy.folder / f"{name}.{i}.ndjson").write_bytes(ndjson(part))
    clock = {"unit": "timestamp"}
    config = busy.config(
        tables__labs={"path": "Observation.*.ndjson", "fhir": "Observation"},
        tables__diagnoses={"path": "Condition.*.ndjson", "fhir": "Condition"},
        events=[
            {
                "table": "labs",
                "subject_id": "subject_id",
                "time": "time",
                "code": "code",
                "numeric_value": "value",
                "clock": clock,
            },
            {
                "table": "diagnoses",
                "subject_id": "subject_id",
                "time": "recorded",
                "code": "code",
                "clock": clock,
            },
        ],
    )
    store = ingest(config)
    assert patients.shape[0] == Store(store).manifest["rows"]
    for name in ("values", "mask", "labels", "splits"):
        file = f"{name}.parquet"
        assert (store / file).read_bytes() == (plain / file).read_bytes(), file
