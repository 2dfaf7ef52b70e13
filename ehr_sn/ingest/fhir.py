"""NDJSON of FHIR R4 resources, as bulk export writes it → SQL of flat rows and columns.

A reference (`Patient/7`, `urn:uuid:7`, `https://…/Patient/7/_history/2`) becomes the bare id. The
codings of a CodeableConcept are translations of one another, in no order: each that has a code
becomes a row of the resource, with its `code`, `system` and `display`. A date that names only a
year, or a month, becomes the last day of it, so that no feature knows of it too early; of a birth
date it becomes the middle.

`known` is when a fact was known: when it was reported or, where that is later, when it happened.
`fact` is 0 where the resource says that it is none: by its status, by another modifier element, or
by a modifier extension, which nobody may ignore. docs/data-sources.md has both rules in full.
"""

from dataclasses import dataclass, field

from ehr_sn.ingest.sql import identifier, literal, literals

OTHER_TYPE = "another type of resource"

_REFERENCE = "STRUCT(reference VARCHAR, display VARCHAR)"
_CODING = "STRUCT(system VARCHAR, code VARCHAR, display VARCHAR)"
_CONCEPT = f'STRUCT(coding {_CODING}[], "text" VARCHAR)'
_PERIOD = 'STRUCT("start" VARCHAR, "end" VARCHAR)'
_TIMING = "STRUCT(event VARCHAR[])"
_EXTENSIONS = "STRUCT(url VARCHAR)[]"
_VALUE = {
    "valueQuantity": "STRUCT(value VARCHAR, comparator VARCHAR, unit VARCHAR, code VARCHAR)",
    "valueInteger": "VARCHAR",
    "valueBoolean": "VARCHAR",
    "valueCodeableConcept": _CONCEPT,
    "valueString": "VARCHAR",
    "valueDateTime": "VARCHAR",
    "valueTime": "VARCHAR",
}
_CONFIRMED = "http://terminology.hl7.org/CodeSystem/condition-ver-status"
_CLINICAL = "http://terminology.hl7.org/CodeSystem/condition-clinical"


@dataclass(frozen=True)
class Resource:
    """What is read of a type of resource: `fields` with DuckDB's types; and SQL of its `columns`.

    `columns` may name fields and `first`, which is SQL of what several of them need. With `parts`,
    SQL of a list, each resource becomes a row for each of its elements, `part`. With `concept`, SQL
    of a CodeableConcept, each of these becomes a row for each of its codings, `coding`.
    """

    fields: dict[str, str]
    columns: dict[str, str]
    first: dict[str, str] = field(default_factory=dict)
    parts: str | None = None
    concept: str | None = None


def _struct(fields: dict[str, str]) -> str:
    return f"STRUCT({', '.join(f'{identifier(name)} {dtype}' for name, dtype in fields.items())})"


def _id(reference: str) -> str:
    whole = f"{reference}.reference"
    unversioned = f"regexp_replace({whole}, '/_history/[^/]*$', '')"
    bare = f"regexp_extract({unversioned}, '(^|[/:])([^/:?#]+)$', 2)"
    return f"coalesce(nullif({bare}, ''), {whole})"


def _codings(concept: str) -> str:
    """The codings that have a code, in their order."""
    return f"list_filter({concept}.coding, lambda c: trim(c.code) <> '')"


def _code(concept: str, system: str | None = None) -> str:
    """The code of the first coding that has one; of a code system, where one is of it."""
    first = f"{_codings(concept)}[1].code"
    if system is None:
        return first
    of_system = f"list_filter({_codings(concept)}, lambda c: c.system = {literal(system)})[1].code"
    return f"coalesce({of_system}, {first})"


def _coded(*texts: str) -> dict[str, str]:
    """Columns of a coding; where it has no display, the first of the texts that is there."""
    unversioned = r"regexp_replace(coding.system, '/*(\|.*)?$', '')"
    return {
        "code": "coding.code",
        "system": rf"regexp_replace({unversioned}, '^(https?://snomed\.info/sct)/.*', '\1')",
        "display": f"coalesce(coding.display, {', '.join(texts)})",
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


def _first_day(*written: str) -> str:
    """The day on which a year or a month begins; NULL of a whole date."""
    first = f"coalesce({', '.join(written)})"
    return rf"""CASE WHEN regexp_full_match({first}, '\d{{4}}') THEN {first} || '-01-01'
        WHEN regexp_full_match({first}, '\d{{4}}-\d{{2}}') THEN {first} || '-01' END"""


def _end(time: str) -> str:
    """The time as a moment; infinite where it is given and no time.

    A day without a time counts from its end: at the site or, where that is not known, everywhere.
    """
    return f"coalesce(CASE WHEN length({time}) = 10 THEN day_end({time}, TRUE) END, known({time}))"


def _known(happened: str, first_day: str, reported: str) -> str:
    """The later of what happened and was reported.

    What happened in a year or month in which it was reported too, happened before.
    """
    return f"""greatest({_end(reported)},
        CASE WHEN {_end(reported)} >= moment({first_day}) THEN NULL ELSE {_end(happened)} END)"""


def _flag(boolean: str) -> str:
    return f"CASE {boolean} WHEN 'true' THEN 1 WHEN 'false' THEN 0 END"


def _shared(
    fact: str = "TRUE",
    extensions: str = "modifierExtension",
    rules: str = "implicitRules",
) -> dict[str, str]:
    """The columns that every resource has, `fact` among them: by a condition that NULL fulfils."""
    return {
        "fact": f"""(coalesce({fact}, TRUE) AND {rules} IS NULL
            AND coalesce(len({extensions}), 0) = 0)::INTEGER""",
        "implicit_rules": rules,
        "modifier_extension": f"""nullif(array_to_string(
            list_transform({extensions}, lambda e: e.url), ' '), '')""",
        "last_updated": "meta.lastUpdated",
        "version_id": "meta.versionId",
        "line": "line",
    }


def _status_is_not(*statuses: str) -> str:
    return f"status NOT IN ({literals(statuses)})"


_COMMON = {
    "id": "VARCHAR",
    "meta": "STRUCT(lastUpdated VARCHAR, versionId VARCHAR)",
    "implicitRules": "VARCHAR",
    "modifierExtension": _EXTENSIONS,
}
_ABOUT_FIELDS = {**_COMMON, "subject": _REFERENCE, "encounter": _REFERENCE}
_ABOUT = {"id": "id", "subject_id": _id("subject"), "encounter_id": _id("encounter")}
_FACT_ID = "coalesce(id, 'line ' || line)"
_FACT = {"fact_id": _FACT_ID, "coding": "place_of_coding"}

_OBSERVED = {"code": _CONCEPT, **_VALUE}
_OWN = ", ".join(f"{name} := {name}" for name in _OBSERVED)
_NUMBER = """coalesce(part.valueQuantity.value, part.valueInteger,
    CASE part.valueBoolean WHEN 'true' THEN '1' WHEN 'false' THEN '0' END)"""
_MOMENTS = """list_sort(list_transform(effectiveTiming.event,
    lambda e: {'moment': moment(e), 'written': e}))"""  # in their order, whatever their offsets
_STARTS = (
    "effectiveDateTime",
    "effectivePeriod.start",
    "effectiveInstant",
    f"({_MOMENTS})[1].written",
)
_ENDS = (
    "effectiveDateTime",
    'effectivePeriod."end"',
    "effectiveInstant",
    f"({_MOMENTS})[-1].written",
)
_HAPPENED = (*_ENDS, "effectivePeriod.start")
# Who records it knows that it has begun; else it begins somewhere in the period.
_BEGUN = (
    "onsetDateTime",
    'CASE WHEN recordedDate IS NULL THEN onsetPeriod."end" END',
    "onsetPeriod.start",
)

_MEDICINE = "medicationReference.reference"
_CONTAINED = """{"implicitRules": "VARCHAR", "modifierExtension": [{"url": "VARCHAR"}],
    "status": "VARCHAR", "code": {"text": "VARCHAR", "coding":
        [{"system": "VARCHAR", "code": "VARCHAR", "display": "VARCHAR"}]}}"""

RESOURCES = {
    "Patient": Resource(
        {
            **_COMMON,
            "birthDate": "VARCHAR",
            "gender": "VARCHAR",
            "active": "VARCHAR",
            "deceasedBoolean": "VARCHAR",
            "deceasedDateTime": "VARCHAR",
            "link": f'STRUCT(other {_REFERENCE}, "type" VARCHAR)[]',
        },
        {
            "id": "id",
            "birth_date": _date("birthDate", "'-07-02'", "{first} + 15"),
            "gender": "gender",
            "active": _flag("active"),
            "deceased": f"""CASE WHEN deceasedDateTime IS NOT NULL THEN 1
                ELSE {_flag("deceasedBoolean")} END""",
            "deceased_time": _time("deceasedDateTime"),
            "replaced_by": _id("list_filter(link, lambda l: l.type = 'replaced-by')[1].other"),
            **_shared(),
        },
    ),
    "Encounter": Resource(
        {
            **_COMMON,
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
            "type_code": f"""nullif(array_to_string(flatten(list_transform("type",
                lambda t: list_transform({_codings("t")}, lambda c: c.code))), ' '), '')""",
            "start": _time("period.start"),
            "end": _time('period."end"'),
            "status": "status",
            **_shared(_status_is_not("planned", "cancelled", "entered-in-error")),
        },
    ),
    "Observation": Resource(
        {
            **_ABOUT_FIELDS,
            **_OBSERVED,
            "effectiveDateTime": "VARCHAR",
            "effectivePeriod": _PERIOD,
            "effectiveInstant": "VARCHAR",
            "effectiveTiming": _TIMING,
            "issued": "VARCHAR",
            "status": "VARCHAR",
            "component": f"{_struct(_OBSERVED | {'modifierExtension': _EXTENSIONS})}[]",
        },
        {
            **_ABOUT,
            "component": "place",
            "fact_id": f"CASE place WHEN 0 THEN {_FACT_ID} ELSE {_FACT_ID} || '/' || place END",
            "coding": "place_of_coding",
            "known": _known("_happened", "_first_day", "_issued"),
            "time": "coalesce(_start, _issued)",
            "effective_start": "_start",
            "effective_end": "_end",
            "issued": "_issued",
            **_coded("part.code.text"),
            "value": _NUMBER,
            "comparator": "part.valueQuantity.comparator",
            "unit": "coalesce(part.valueQuantity.code, part.valueQuantity.unit)",
            "value_code": _code("part.valueCodeableConcept"),
            "value_text": "coalesce(part.valueString, part.valueDateTime, part.valueTime)",
            "status": "status",
            **_shared(
                _status_is_not("registered", "cancelled", "entered-in-error"),
                "list_concat(modifierExtension, part.modifierExtension)",
            ),
        },
        first={
            "_start": _time(*_STARTS),
            "_end": _time(*_ENDS),
            "_happened": _time(*_HAPPENED),
            "_first_day": _first_day(*_HAPPENED),
            "_issued": _time("issued"),
        },
        parts=f"""CASE WHEN coalesce(len(component), 0) = 0 OR coalesce(valueQuantity::VARCHAR,
                valueInteger, valueBoolean, valueCodeableConcept::VARCHAR, valueString,
                valueDateTime, valueTime) IS NOT NULL
            THEN [{{'place': 0, 'part': struct_pack({_OWN},
                modifierExtension := NULL::{_EXTENSIONS})}}] ELSE [] END
            || list_transform(coalesce(component, []),
                lambda one, i: {{'place': i::INTEGER, 'part': one}})""",
        concept="part.code",
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
            **_FACT,
            "known": _known("_happened", "_first_day", "_recorded"),
            **_coded("code.text"),
            "onset": "_onset",
            "onset_end": "_onset_end",
            "recorded": "_recorded",
            "abatement": _time("abatementDateTime", 'abatementPeriod."end"'),
            "clinical_status": _code("clinicalStatus", _CLINICAL),
            "verification_status": "_verification",
            **_shared(
                """CASE WHEN _verification IS NOT NULL THEN _verification = 'confirmed'
                ELSE verificationStatus.text IS NULL END"""
            ),
        },
        first={
            "_onset": _time("onsetDateTime", "onsetPeriod.start"),
            "_onset_end": _time('onsetPeriod."end"'),
            "_happened": _time(*_BEGUN),
            "_first_day": _first_day(*_BEGUN),
            "_recorded": _time("recordedDate"),
            "_verification": _code("verificationStatus", _CONFIRMED),
        },
        concept="code",
    ),
    "MedicationRequest": Resource(
        {
            **_ABOUT_FIELDS,
            "authoredOn": "VARCHAR",
            "medicationCodeableConcept": _CONCEPT,
            "medicationReference": _REFERENCE,
            "contained": "JSON[]",
            "status": "VARCHAR",
            "intent": "VARCHAR",
            "doNotPerform": "VARCHAR",
        },
        {
            **_ABOUT,
            **_FACT,
            "known": _end("_authored"),
            "time": "_authored",
            **_coded(
                "medicationCodeableConcept.text",
                "_contained.code.text",
                "medicationReference.display",
            ),
            "medication_id": _id("medicationReference"),
            "status": "status",
            "intent": "intent",
            "do_not_perform": _flag("doNotPerform"),
            **_shared(
                f"""coalesce(doNotPerform <> 'true', TRUE)
                AND coalesce({_status_is_not("entered-in-error", "cancelled", "draft")}, TRUE)
                AND coalesce(intent NOT IN ('proposal', 'plan', 'option'), TRUE)
                AND coalesce(_contained.{_status_is_not("entered-in-error")}, TRUE)""",
                "list_concat(modifierExtension, _contained.modifierExtension)",
                "coalesce(implicitRules, _contained.implicitRules)",
            ),
        },
        first={
            "_authored": _time("authoredOn"),
            "_contained": f"""json_transform(CASE WHEN starts_with({_MEDICINE}, '#')
                THEN list_filter(contained, lambda c: (c ->> '$.resourceType') = 'Medication'
                    AND ltrim(c ->> '$.id', '#') = ltrim({_MEDICINE}, '#'))[1] END,
                {literal(_CONTAINED)})""",
        },
        concept="coalesce(medicationCodeableConcept, _contained.code)",
    ),
    "Medication": Resource(
        {**_COMMON, "code": _CONCEPT, "form": _CONCEPT, "status": "VARCHAR"},
        {
            "id": "id",
            "coding": "place_of_coding",
            **_coded("code.text"),
            "form": _code("form"),
            "status": "status",
            **_shared(_status_is_not("entered-in-error")),
        },
        concept="code",
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
            **_FACT,
            "known": _end("_happened"),
            "time": "_start",
            "performed_end": "_end",
            **_coded("code.text"),
            "status": "status",
            **_shared(_status_is_not("preparation", "not-done", "entered-in-error", "on-hold")),
        },
        first={
            "_start": _time("performedDateTime", "performedPeriod.start"),
            "_end": _time("performedDateTime", 'performedPeriod."end"'),
            "_happened": _time(
                "performedDateTime", 'performedPeriod."end"', "performedPeriod.start"
            ),
        },
        concept="code",
    ),
}


def flat(file: str, resource: str) -> str:
    """What to select from for the rows of a file, given as an SQL string, of one type of resource.

    Its columns are those of `RESOURCES[resource]`. An Observation gives rows for each of its
    components (`component` 1, 2, …), and for itself (`component` 0) where it has a value of its own
    or no components: of each one a coding that has a code, or one where none has. DuckDB stops with
    `OTHER_TYPE` at a line that holds another resource. The connection needs `create_functions`.
    """
    read = RESOURCES[resource]
    first = "".join(f", {sql} AS {identifier(name)}" for name, sql in read.first.items())
    lines = f"SELECT *{first} FROM ({_lines(file, resource, read.fields)})"
    if read.parts is not None:
        lines = f"""SELECT * EXCLUDE (component, piece), piece.place, piece.part
            FROM (SELECT *, unnest({read.parts}) AS piece FROM ({lines}))"""
    if read.concept is not None:
        coded = f"coalesce(nullif({_codings(read.concept)}, []), [NULL::{_CODING}])"
        lines = f"""SELECT * EXCLUDE (coded), coded.place AS place_of_coding, coded.coding FROM (
            SELECT *, unnest(list_transform({coded},
                lambda one, i: {{'place': i::INTEGER, 'coding': one}})) AS coded FROM ({lines}))"""
    selected = ", ".join(f"{sql} AS {identifier(name)}" for name, sql in read.columns.items())
    return f"(SELECT {selected} FROM ({lines}))"


def deleted(file: str) -> str:
    """What to select from for the `type` and `id` of resources that a server no longer has.

    The file, given as an SQL string, is NDJSON of what bulk export puts into `deleted`: Bundles of
    the type transaction, whose entries ask to DELETE `Patient/7`. `deleted_at` is the Bundle's
    timestamp, else its meta.lastUpdated, as text, and NULL where there is neither. `type` and `id`
    are NULL of an entry that names its resources by a search (`Patient?identifier=7`).
    """
    fields = {
        "timestamp": "VARCHAR",
        "meta": _COMMON["meta"],
        "entry": "STRUCT(request STRUCT(method VARCHAR, url VARCHAR))[]",
    }
    of_url = r"'(^|/)([A-Za-z]+)/([A-Za-z0-9.-]+)(/_history/[^/]+)?/?$'"
    return f"""(SELECT nullif(regexp_extract(url, {of_url}, 2), '') AS type,
            nullif(regexp_extract(url, {of_url}, 3), '') AS id,
            coalesce("timestamp", meta.lastUpdated) AS deleted_at
        FROM (SELECT "timestamp", meta, unnest(list_transform(
                list_filter(entry, lambda e: upper(e.request.method) = 'DELETE'),
                lambda e: e.request.url)) AS url
            FROM ({_lines(file, "Bundle", fields)})))"""


def _lines(file: str, resource: str, fields: dict[str, str]) -> str:
    """SQL for the numbered lines of a file, each of which is to hold that resource."""
    read = {"resourceType": "VARCHAR", **fields}
    columns = ", ".join(f"{identifier(name)}: {literal(dtype)}" for name, dtype in read.items())
    return f"""SELECT * FROM (
        SELECT row_number() OVER () AS line, *
        FROM read_json({file}, format = 'newline_delimited', columns = {{{columns}}}))
        WHERE CASE WHEN resourceType = {literal(resource)} THEN TRUE
            ELSE error('{OTHER_TYPE} on Line: ' || line) END"""
