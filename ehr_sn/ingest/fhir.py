"""NDJSON of FHIR R4 resources, as bulk export writes it → SQL of flat rows and columns.

A reference (`Patient/7`, `urn:uuid:7`, `https://…/Patient/7/_history/2`) becomes the bare id. A
CodeableConcept gives `code`, `system` and `display` of the first of its codings that has a code;
its text is the display where there is no other. A date that names only a year, or a month, becomes
the last day of it, so that no feature knows of it too early; of a birth date it becomes the middle.
"""

from dataclasses import dataclass

from ehr_sn.ingest.sql import identifier, literal

OTHER_TYPE = "another type of resource"

_REFERENCE = "STRUCT(reference VARCHAR)"
_CODING = "STRUCT(system VARCHAR, code VARCHAR, display VARCHAR)"
_CONCEPT = f'STRUCT(coding {_CODING}[], "text" VARCHAR)'
_PERIOD = 'STRUCT("start" VARCHAR, "end" VARCHAR)'
_VALUE = {
    "valueQuantity": "STRUCT(value VARCHAR, comparator VARCHAR, unit VARCHAR, code VARCHAR)",
    "valueInteger": "VARCHAR",
    "valueBoolean": "VARCHAR",
    "valueCodeableConcept": _CONCEPT,
    "valueString": "VARCHAR",
    "valueDateTime": "VARCHAR",
    "valueTime": "VARCHAR",
}


@dataclass(frozen=True)
class Resource:
    """What is read of a type of resource: `fields` with DuckDB's types; and SQL of its `columns`.

    With `parts`, SQL of a list, each resource becomes a row for each of its elements, `part`.
    """

    fields: dict[str, str]
    columns: dict[str, str]
    parts: str | None = None


def _struct(fields: dict[str, str]) -> str:
    return f"STRUCT({', '.join(f'{identifier(name)} {dtype}' for name, dtype in fields.items())})"


def _id(reference: str) -> str:
    whole = f"{reference}.reference"
    unversioned = f"regexp_replace({whole}, '/_history/[^/]*$', '')"
    bare = f"regexp_extract({unversioned}, '(^|[/:])([^/:?#]+)$', 2)"
    return f"coalesce(nullif({bare}, ''), {whole})"


def _coding(concept: str) -> str:
    return f"list_filter({concept}.coding, lambda c: c.code IS NOT NULL)[1]"


def _coded(concept: str) -> dict[str, str]:
    coding = _coding(concept)
    return {
        "code": f"{coding}.code",
        "system": f"{coding}.system",
        "display": f"coalesce({coding}.display, {concept}.text)",
    }


def _date(written: str, year: str, month: str) -> str:
    """A date of which part is missing, completed; what is no date is left as it is written."""
    return rf"""CASE
        WHEN regexp_full_match({written}, '\d{{4}}') THEN {written} || {year}
        WHEN regexp_full_match({written}, '\d{{4}}-\d{{2}}')
            THEN coalesce(({month.format(first=f"TRY_CAST({written} || '-01' AS DATE)")})::VARCHAR,
                {written})
        ELSE {written} END"""


def _time(*written: str) -> str:
    first = f"coalesce({', '.join(written)})" if len(written) > 1 else written[0]
    return _date(first, "'-12-31'", "last_day({first})")


_OBSERVED = {"code": _CONCEPT, **_VALUE}
_OWN = ", ".join(f"{name} := {name}" for name in _OBSERVED)
_NUMBER = """coalesce(part.valueQuantity.value, part.valueInteger,
    CASE part.valueBoolean WHEN 'true' THEN '1' WHEN 'false' THEN '0' END)"""
_ABOUT = {"id": "id", "subject_id": _id("subject"), "encounter_id": _id("encounter")}
_ABOUT_FIELDS = {"id": "VARCHAR", "subject": _REFERENCE, "encounter": _REFERENCE}

RESOURCES = {
    "Patient": Resource(
        {
            "id": "VARCHAR",
            "birthDate": "VARCHAR",
            "gender": "VARCHAR",
            "deceasedBoolean": "VARCHAR",
            "deceasedDateTime": "VARCHAR",
        },
        {
            "id": "id",
            "birth_date": _date("birthDate", "'-07-02'", "{first} + 15"),
            "gender": "gender",
            "deceased": """CASE WHEN deceasedDateTime IS NOT NULL OR deceasedBoolean = 'true' THEN 1
                WHEN deceasedBoolean = 'false' THEN 0 END""",
            "deceased_time": _time("deceasedDateTime"),
        },
    ),
    "Encounter": Resource(
        {
            "id": "VARCHAR",
            "subject": _REFERENCE,
            "class": _CODING,
            "type": f"{_CONCEPT}[]",
            "period": _PERIOD,
            "status": "VARCHAR",
        },
        {
            "id": "id",
            "subject_id": _id("subject"),
            "class": '"class".code',
            "type_code": _coding('"type"[1]') + ".code",
            "start": _time("period.start"),
            "end": _time('period."end"'),
            "status": "status",
        },
    ),
    "Observation": Resource(
        {
            **_ABOUT_FIELDS,
            **_OBSERVED,
            "effectiveDateTime": "VARCHAR",
            "effectivePeriod": _PERIOD,
            "effectiveInstant": "VARCHAR",
            "issued": "VARCHAR",
            "status": "VARCHAR",
            "component": f"{_struct(_OBSERVED)}[]",
        },
        {
            **_ABOUT,
            "component": "place",
            "time": _time(
                "effectiveDateTime", "effectivePeriod.start", "effectiveInstant", "issued"
            ),
            **_coded("part.code"),
            "value": _NUMBER,
            "comparator": "part.valueQuantity.comparator",
            "unit": "coalesce(part.valueQuantity.code, part.valueQuantity.unit)",
            "value_code": f"{_coding('part.valueCodeableConcept')}.code",
            "value_text": "coalesce(part.valueString, part.valueDateTime, part.valueTime)",
            "status": "status",
        },
        f"""CASE WHEN coalesce(len(component), 0) = 0 OR coalesce(valueQuantity::VARCHAR,
                valueInteger, valueBoolean, valueCodeableConcept::VARCHAR, valueString,
                valueDateTime, valueTime) IS NOT NULL
            THEN [{{'place': 0, 'part': struct_pack({_OWN})}}] ELSE [] END
            || list_transform(coalesce(component, []),
                lambda one, i: {{'place': i::INTEGER, 'part': one}})""",
    ),
    "Condition": Resource(
        {
            **_ABOUT_FIELDS,
            "code": _CONCEPT,
            "onsetDateTime": "VARCHAR",
            "onsetPeriod": _PERIOD,
            "recordedDate": "VARCHAR",
            "abatementDateTime": "VARCHAR",
            "abatementPeriod": _PERIOD,
            "clinicalStatus": _CONCEPT,
            "verificationStatus": _CONCEPT,
        },
        {
            **_ABOUT,
            **_coded("code"),
            "onset": _time("onsetDateTime", "onsetPeriod.start"),
            "recorded": _time("recordedDate"),
            "abatement": _time("abatementDateTime", 'abatementPeriod."end"'),
            "clinical_status": f"{_coding('clinicalStatus')}.code",
            "verification_status": f"{_coding('verificationStatus')}.code",
        },
    ),
    "MedicationRequest": Resource(
        {
            **_ABOUT_FIELDS,
            "authoredOn": "VARCHAR",
            "medicationCodeableConcept": _CONCEPT,
            "medicationReference": _REFERENCE,
            "status": "VARCHAR",
            "intent": "VARCHAR",
        },
        {
            **_ABOUT,
            "time": _time("authoredOn"),
            **_coded("medicationCodeableConcept"),
            "medication_id": _id("medicationReference"),
            "status": "status",
            "intent": "intent",
        },
    ),
    "Procedure": Resource(
        {
            **_ABOUT_FIELDS,
            "performedDateTime": "VARCHAR",
            "performedPeriod": _PERIOD,
            "code": _CONCEPT,
            "status": "VARCHAR",
        },
        {
            **_ABOUT,
            "time": _time("performedDateTime", "performedPeriod.start"),
            **_coded("code"),
            "status": "status",
        },
    ),
}


def flat(file: str, resource: str) -> str:
    """What to select from for the rows of a file, given as an SQL string, of one type of resource.

    Its columns are those of `RESOURCES[resource]`. An Observation gives a row for each of its
    components (`component` 1, 2, …), and one for itself (`component` 0) where it has a value of its
    own or no components. DuckDB stops with `OTHER_TYPE` at a line that holds another resource.
    """
    read = RESOURCES[resource]
    fields = {"resourceType": "VARCHAR", **read.fields}
    columns = ", ".join(f"{identifier(name)}: {literal(dtype)}" for name, dtype in fields.items())
    lines = f"""SELECT * FROM (
        SELECT row_number() OVER () AS line, *
        FROM read_json({file}, format = 'newline_delimited', columns = {{{columns}}}))
        WHERE CASE WHEN resourceType = {literal(resource)} THEN TRUE
            ELSE error('{OTHER_TYPE} on Line: ' || line) END"""
    if read.parts is not None:
        lines = f"""SELECT * EXCLUDE (component, piece), piece.place, piece.part
            FROM (SELECT *, unnest({read.parts}) AS piece FROM ({lines}))"""
    selected = ", ".join(f"{sql} AS {identifier(name)}" for name, sql in read.columns.items())
    return f"(SELECT {selected} FROM ({lines}))"
