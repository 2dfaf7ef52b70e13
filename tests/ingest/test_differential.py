"""Odd but valid tables give one store by every route, and what plain Python makes of them."""

import csv
import gzip
import json
import os
import re
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from plain_reference import TIME, WHOLE, code, expected, moment, number, subject

from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store, ingest

MORE = os.environ.get("EHR_SN_DIFFERENTIAL_EXAMPLES")  # drawn at random
EXAMPLES = int(MORE or 36)
JSON_NUMBER = r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?"
CONTENT = ("values", "mask", "labels", "splits", "follow_up")
HEADERS = {
    "patients": ("pid", "predicted_at", "last_seen"),
    "labs": ("pid", "taken_at", "test", "result", "unit", "specimen"),
    "diagnoses": ("pid", "coded_at", "icd"),
}
TIMES = ("predicted_at", "last_seen", "taken_at", "coded_at")
AGGREGATES = ["last", "mean", "min", "max", "count", "slope", "days_since_last"]
SUBJECTS_OF_EACH_CLASS = 24


@dataclass(frozen=True)
class Case:
    """A small data set, its cells as text, and what the configuration says of it."""

    patients: tuple
    labs: tuple
    diagnoses: tuple
    zone: str | None
    lookback_days: float | None
    include: bool
    hours_after: float
    within_days: float
    gap_days: float
    washout_days: float | None
    prior: str
    censoring: str
    with_units: bool
    plausible: bool
    names_specimens: bool
    day_ends: float = 0

    @property
    def measurements(self):
        glucose = {"name": "glucose", "codes": ["GLU", "glu 2", "3004501"]}
        if self.with_units:
            glucose |= {"factors": {"mg/dl": 1, "mmol/l": 18.0}}
        if self.plausible:
            glucose |= {"plausible": (0.5, 400)}
        return [glucose, {"name": "sodium", "codes": ["NA+", "201826", "428.0"]}]

    def rows(self, table):
        return getattr(self, table)


# -- what is drawn -------------------------------------------------------------------------------

DAYS = (
    *("2019-06-02", "2020-03-08", "2020-03-29", "2020-05-02", "2020-05-31", "2020-06-01"),
    *("2020-06-02", "2020-06-08", "2020-07-01", "2020-10-25", "2020-11-01", "2021-03-14"),
    *("2021-06-01", "2024-02-29"),
)
CLOCKS = ("00:00", "00:00:00", "01:30", "02:30", "02:30:00.5", "12:00", "23:59:59.999999", "05:30")
OFFSETS = ("Z", "+00:00", "-0500", "+05:30", "-04", "+14:00", "-00:30")
NO_TIMES = (
    "20-02-20",
    "2020-06-01 12:00 BST",
    "2020-13-01",
    "2020-02-30",
    "01.06.2020",
    "2020-06-01 25:00",
    "2020-06-01T12",
    "2020-06-01 1:00 PM",
    "20200601",
    "2020-6-1",
    "0000-00-00",
    "",
    "never",
    "NaT",
)
EXTREMES = {
    "naive": ("0001-01-01T00:00", "9999-12-31T23:59:59.999999", "1900-01-01 05:00"),
    "aware": ("0001-01-01T00:00Z", "9999-12-31T23:59:59.999999Z", "1900-01-01 05:00+00"),
    "day": ("0001-01-01", "9999-12-31", "1900-01-01"),
    "any": ("0001-01-02", "9999-12-31T23:59:59.999999", "0000-12-31", "2100-01-01"),
}
NUMBERS = ("5", "5.0", "7.25", "-3", "0", "1e2", "1.5E-3", "120.123456", ".5", "+4", "399", "007")
ODD_NUMBERS = (
    "",
    "<5",
    "> 3",
    "1_234",
    "NaN",
    "nan",
    "inf",
    "-Infinity",
    "1e400",
    "1e18",
    "2e18",
    "high",
    "1,5",
    "1,5e3",
    "1.2.3",
    "--",
    "0x10",
    "5 mg",
    "true",
    "9007199254740993",
    "5.",
    "1 234",
    "NA",
)


def some(draw, cells, most=5):
    """A few of the cells, so that rows often agree."""
    return draw(st.lists(st.sampled_from(cells), min_size=2, max_size=most, unique=True))


def times(draw, style):
    days = st.sampled_from(some(draw, DAYS))
    clocks = st.sampled_from(some(draw, CLOCKS))
    plain = st.builds("{}{}{}".format, days, st.sampled_from("T "), clocks)
    aware = st.builds("{}{}".format, plain, st.sampled_from(some(draw, OFFSETS)))
    written = {"naive": plain, "aware": aware, "day": days, "any": st.one_of(plain, aware, days)}
    odd = st.sampled_from(NO_TIMES + EXTREMES[style])
    return st.one_of(*[written[style]] * 5, odd)


def around(cells):
    """The same, some with blanks around."""
    return st.builds(
        "{}{}{}".format, st.sampled_from(("", "", " ")), cells, st.sampled_from(("", "", "  "))
    )


IDS = {
    "whole": ("7", "8", "0", "-9"),
    "gaps": ("7", "7.0", "8.0", "NA", ""),
    "long": ("9007199254740992", "9007199254740993", "9223372036854775807", "7"),
    "beyond": ("9223372036854775807", "9223372036854775808", "7", "7.00"),
    "text": ("7", "7.0", "007", "7.6", "P 1", "p 1", "NA", "n/a", "O'Hara", 'é,"x"', ""),
}
STRANGERS = ("4711", "007", "07.0", "", "NULL", "x")
IDS_IN = {
    "files": sorted(IDS),
    "FHIR": ("whole", "gaps", "long", "beyond"),
    "MEDS": ("whole", "gaps", "long"),
}
ZONES = (None, "UTC", "America/New_York", "Asia/Kolkata")
CLOCK = {"day": "", "any": "", "naive": "T00:00", "aware": "T00:00Z"}
CODES = {
    "whole": ("3004501", "201826", "4000", "20"),
    "gaps": ("3004501", "3004501.0", "201826.0", ""),
    "text": ("GLU", "glu 2", "NA+", "428.0", "428", "E11", "F17", "glu", ""),
    "mixed": ("GLU", " GLU", "3004501.0", "201826.00", "3004501", "E11", "\u00a0NA+ ", "F17", " "),
}


@st.composite
def cases(draw, told_in="files"):
    """Data sets that can be said in files or, as `told_in` has it, in FHIR or MEDS."""
    kind = draw(st.sampled_from(IDS_IN[told_in]))
    own = st.sampled_from(some(draw, IDS[kind]))
    strangers = STRANGERS if kind in ("text", "beyond") and told_in == "files" else IDS[kind]
    ids = st.one_of(own, own, own, st.sampled_from(strangers))
    style = draw(st.sampled_from(("any", "any", "naive", "aware", "day")))
    coded = draw(st.sampled_from(("gaps", "text", "whole") if told_in == "FHIR" else sorted(CODES)))
    codes = st.sampled_from(some(draw, CODES[coded]))
    odd = style == "any" and told_in == "files" and draw(st.booleans())
    blanks = around if odd else lambda cells: cells
    with_units = told_in != "MEDS" and draw(st.booleans())
    units = ("mg/dL", "mmol/L", "MMOL/L", "mg/dl", "", "kg") if with_units else ("mg/dL",)
    specimens = {"files": draw(st.sampled_from(("none", "shared", "own"))), "FHIR": "own"}
    specimens = specimens.get(told_in, "none")
    at = times(draw, style)
    predicted = at.filter(lambda cell: cell not in EXTREMES[style])
    clock = CLOCK[style]
    patients = st.tuples(blanks(own), predicted, st.one_of(at, st.just(f"2030-01-01{clock}")))
    labs = st.tuples(
        blanks(ids),
        blanks(at),
        codes,
        blanks(st.sampled_from(some(draw, NUMBERS + ODD_NUMBERS, 8))),
        st.sampled_from(units),
        st.sampled_from(("1", "2", "3", "") if specimens == "shared" else ("",)),
    )
    diagnoses = st.tuples(
        ids, at, st.sampled_from(("E11", "E11", "F17", "E11.9", "e11", "GLU", ""))
    )
    case = Case(
        patients=tuple(draw(st.lists(patients, min_size=2, max_size=6))),
        labs=tuple(draw(st.lists(labs, min_size=8, max_size=30))),
        diagnoses=tuple(draw(st.lists(diagnoses, max_size=6))),
        zone=draw(st.sampled_from((None, "UTC") if told_in == "MEDS" else ZONES)),
        lookback_days=draw(st.sampled_from((None, 30, 365, 0.5))),
        include=draw(st.booleans()),
        hours_after=draw(st.sampled_from((0, 1.5, 24))),
        within_days=draw(st.sampled_from((30, 365))),
        gap_days=draw(st.sampled_from((0, 1, 0.5))),
        washout_days=None,
        prior=draw(st.sampled_from(("excluded", "ignored"))),
        censoring=draw(st.sampled_from(("ipcw", "ipcw", "complete", "drop"))),
        with_units=with_units,
        plausible=draw(st.booleans()),
        names_specimens=specimens != "none",
    )
    if specimens == "own":
        case = replace(case, labs=with_own_specimens(draw, case.labs, codes))
    if case.prior == "excluded" and draw(st.booleans()):
        case = replace(case, washout_days=30)
    return with_company(case, style, coded)


def every_cell():
    """Each cell that can be drawn once, with a subject of its own."""
    plain = ("2020-05-01", "GLU", "5", "mg/dL", "")
    clocks = [f"{day}T{clock}" for day in DAYS for clock in CLOCKS]
    clocks += [f"{DAYS[3]} {clock}{offset}" for clock in CLOCKS for offset in OFFSETS]
    at = [*clocks, *DAYS, *NO_TIMES, *(cell for cells in EXTREMES.values() for cell in cells)]
    rows = [(cell, *plain[1:]) for cell in at]
    rows += [(plain[0], cell, *plain[2:]) for cells in CODES.values() for cell in cells]
    rows += [(*plain[:2], cell, *plain[3:]) for cell in NUMBERS + ODD_NUMBERS]
    people = [f"P{i}" for i in range(len(rows))]
    return Case(
        patients=tuple((who, "2025-01-01", "2030-01-01") for who in people),
        labs=tuple((who, *row) for who, row in zip(people, rows, strict=True)),
        diagnoses=(),
        zone="America/New_York",
        lookback_days=None,
        include=True,
        hours_after=0,
        within_days=30,
        gap_days=0,
        washout_days=None,
        prior="excluded",
        censoring="ipcw",
        with_units=False,
        plausible=False,
        names_specimens=False,
    )


def with_own_specimens(draw, labs, codes):
    """Each row with an id of its own, some of them under a second code, too, and some repeated."""
    numbered = [(*row[:5], str(i + 1)) for i, row in enumerate(labs)]
    again = draw(st.lists(st.tuples(st.sampled_from(numbered), codes), max_size=6))
    return tuple(numbered + [(*row[:2], other, *row[3:]) for row, other in again])


def with_company(case, style, coded):
    """The case with plain subjects, ill and well, so that every split has some of each."""
    clock = CLOCK[style]
    test = "3004501" if coded in ("whole", "gaps") else "GLU"
    people = [str(n) for n in range(1001, 1001 + 2 * SUBJECTS_OF_EACH_CLASS)]
    specimen = iter(range(1000, 2000)) if case.names_specimens else None
    unit = "mg/dL"
    return replace(
        case,
        patients=case.patients
        + tuple((one, f"2020-06-01{clock}", f"2029-01-01{clock}") for one in people),
        labs=case.labs
        + tuple(
            (
                one,
                f"2020-05-28{clock}",
                test,
                str(90 + i),
                unit,
                str(next(specimen)) if specimen else "",
            )
            for i, one in enumerate(people)
        ),
        diagnoses=case.diagnoses + tuple((one, f"2020-06-20{clock}", "E11") for one in people[::2]),
    )


# -- how it is configured ------------------------------------------------------------------------


def content_of(case, tables):
    glucose, sodium = case.measurements
    measured = {"unit": "mg/dL"}
    if case.with_units:
        measured["units"] = {"mmol/L": 18.0}
    if case.plausible:
        measured["plausible"] = list(glucose["plausible"])
    labs = dict(
        zip(
            ("subject_id", "time", "code", "numeric_value", "unit", "row_id"),
            HEADERS["labs"],
            strict=True,
        )
    )
    if not case.with_units:
        del labs["unit"]
    if not case.names_specimens:
        del labs["row_id"]
    label = {"codes": ["E11"], "within_days": case.within_days, "gap_days": case.gap_days}
    label |= {"prior": case.prior, "censoring": case.censoring}
    if case.washout_days:
        label |= {"washout_days": case.washout_days}
    return {
        "dataset": "drawn",
        "tables": tables,
        "clock": {"unit": "timestamp"} | ({"time_zone": case.zone} if case.zone else {}),
        "events": [
            {"table": "labs", **labs},
            {"table": "diagnoses", "subject_id": "pid", "time": "coded_at", "code": "icd"},
        ],
        "cohort": {
            "table": "patients",
            "subject_id": "pid",
            "prediction_time": "predicted_at",
            "hours_after": case.hours_after,
            "follow_up_end": "last_seen",
            "include_prediction_time": case.include,
        },
        "features": {
            "measurements": {
                "glucose": {"codes": glucose["codes"], **measured},
                "sodium": {"codes": sodium["codes"]},
            },
            "aggregates": AGGREGATES,
            "history": {"smoker": ["F17"]},
        }
        | ({"lookback_days": case.lookback_days} if case.lookback_days else {}),
        "labels": {"diabetes": label},
    }


def store_of(content, folder):
    content = content | {"data_dir": str(folder / "stores")}
    (folder / "drawn.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return Store(ingest(load_config(folder / "drawn.yaml")))


def as_dictionaries(store):
    """As `expected` has it."""
    keys = store.read("values", ["subject_id", "prediction_time"]).to_pylist()
    values = store.read("values", store.feature_names).to_pylist()
    labels = store.read("labels", ["diabetes"]).column(0).to_pylist()
    days = [None] * len(labels)
    if (store.path / "follow_up.parquet").exists():
        days = store.read("follow_up", ["diabetes"]).column(0).to_pylist()
    rows = {}
    for key, row, *of_row in zip(keys, values, labels, days, strict=True):
        at = key["prediction_time"]
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        kept = {n: v for n, v in row.items() if v is not None and not n.endswith(".slope")}
        rows[str(key["subject_id"]), at] = (kept, tuple(of_row))
    assert len(rows) == len(keys)
    return rows


def assert_as_expected(found, wanted):
    assert found.keys() == wanted.keys()
    for row, (features, label) in wanted.items():
        of_row, its_label = found[row]
        assert of_row.keys() == features.keys(), row
        assert of_row == pytest.approx(features, rel=1e-6, abs=1e-9), row
        assert its_label == pytest.approx(label), row


# -- the routes ----------------------------------------------------------------------------------


def write_csv(path, header, rows, delimiter=",", opened=open, **how):
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, **how)
        writer.writerow(header)
        writer.writerows(rows)


def header_of(case, table):
    """Without specimens where nobody names them: what tells rows apart is then nothing."""
    header = HEADERS[table]
    return header[:-1] if table == "labs" and not case.names_specimens else header


def rows_of(case, table):
    return [row[: len(header_of(case, table))] for row in case.rows(table)]


def by_csv(case, folder):
    for table in HEADERS:
        write_csv(folder / f"{table}.csv", header_of(case, table), rows_of(case, table))
    return content_of(case, {name: {"path": f"{name}.csv"} for name in HEADERS})


def by_two_parts(case, folder):
    """A table in two files, of which the first may have a header only; the columns turned."""
    for table in HEADERS:
        header, rows = header_of(case, table), rows_of(case, table)
        cut = 0 if table == "labs" else len(rows) // 2
        write_csv(folder / f"{table}_1.csv", header, rows[:cut])
        turned = [row[::-1] for row in rows[cut:]]
        write_csv(folder / f"{table}_2.csv", header[::-1], turned, lineterminator="\n")
    return content_of(case, {name: {"path": f"{name}_?.csv"} for name in HEADERS})


def by_one_table(case, folder):
    """Labs and diagnoses in one table."""
    content = by_csv(case, folder)
    header = header_of(case, "labs")
    coded = [(*row, "", "", "")[: len(header)] for row in case.diagnoses]
    write_csv(folder / "labs.csv", header, rows_of(case, "labs") + coded)
    del content["events"][1], content["tables"]["diagnoses"]
    return content


def by_decimal_commas(case, folder):
    """Semicolons, decimal commas, a byte order mark and quotes around every cell, compressed."""
    swapped = str.maketrans(".,", ",.")
    for table in HEADERS:
        header, rows = header_of(case, table), rows_of(case, table)
        if table == "labs":
            rows = [(*row[:3], row[3].translate(swapped), *row[4:]) for row in rows]
        with gzip.open(folder / f"{table}.csv.gz", "wt", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=";", quoting=csv.QUOTE_ALL)
            writer.writerows([header, *rows])
    how = {"delimiter": ";", "decimal": ","}
    return content_of(case, {name: {"path": f"{name}.csv.gz"} | how for name in HEADERS})


def by_text_in_parquet(case, folder):
    for table in HEADERS:
        pq.write_table(as_text(case, table), folder / f"{table}.parquet")
    return content_of(case, {name: {"path": f"{name}.parquet"} for name in HEADERS})


def by_types_in_parquet(case, folder):
    for table in HEADERS:
        pq.write_table(as_typed(case, table), folder / f"{table}.parquet")
    return content_of(case, {name: {"path": f"{name}.parquet"} for name in HEADERS})


def by_text_beside_types(case, folder):
    """The first half of a table's rows as CSV, the others typed."""
    for table in HEADERS:
        rows = rows_of(case, table)
        write_csv(folder / f"{table}_1.csv", header_of(case, table), rows[: len(rows) // 2])
        pq.write_table(as_typed(case, table, len(rows) // 2), folder / f"{table}_2.parquet")
    tables = {name: {"path": f"{name}_{{1.csv,2.parquet}}"} for name in HEADERS}
    return content_of(case, tables)


def in_duckdb(case, folder, arrow_of):
    with duckdb.connect(folder / "drawn.db") as db:
        for table in HEADERS:
            db.register("arrow", arrow_of(case, table))
            db.execute(f"CREATE TABLE {table} AS FROM arrow ORDER BY hash(columns(*))")
    tables = {name: {"database": "file"} for name in HEADERS}
    return content_of(case, tables) | {"databases": {"file": {"path": "drawn.db"}}}


def by_text_in_duckdb(case, folder):
    return in_duckdb(case, folder, as_text)


def by_types_in_duckdb(case, folder):
    return in_duckdb(case, folder, as_typed)


def in_postgresql(case, folder, arrow_of):
    from adbc_driver_postgresql import dbapi

    with (
        dbapi.connect(os.environ["DRAWN_URL"], autocommit=True) as connection,
        connection.cursor() as cursor,
    ):
        for table in HEADERS:
            cursor.execute(f"DROP TABLE IF EXISTS {table}")
            cursor.adbc_ingest(table, arrow_of(case, table), mode="create")
    tables = {name: {"database": "pg"} for name in HEADERS}
    return content_of(case, tables) | {"databases": {"pg": {"url_env": "DRAWN_URL"}}}


def by_text_in_postgresql(case, folder):
    return in_postgresql(case, folder, as_text)


def by_types_in_postgresql(case, folder):
    return in_postgresql(case, folder, as_typed)


def by_sql(case, folder):
    """Casts of the CSV's text, times to what holds their offset."""
    for table in HEADERS:
        write_csv(folder / f"{table}_text.csv", header_of(case, table), rows_of(case, table))
    casts = {name: f"CAST({name} AS TIMESTAMPTZ) AS {name}" for name in TIMES}
    casts["result"] = "CAST(result AS DOUBLE) AS result"
    tables = {f"{name}_text": {"path": f"{name}_text.csv"} for name in HEADERS}
    for table in HEADERS:
        selected = ", ".join(casts.get(name, name) for name in header_of(case, table))
        tables[table] = {"sql": f"SELECT {selected} FROM {table}_text"}
    return content_of(case, tables)


def by_sql_of_decimal_commas(case, folder):
    content = by_sql(case, folder)
    how = by_decimal_commas(case, folder)["tables"]
    content["tables"] |= {f"{name}_text": how[name] for name in HEADERS}
    return content


def by_known_in_sql(case, folder):
    """A day of an event counts from its end."""
    content = by_sql(case, folder)
    for table, name in (("labs", "taken_at"), ("diagnoses", "coded_at")):
        sql = content["tables"][table]["sql"]
        cast = f"CAST({name} AS TIMESTAMPTZ)"
        assert cast in sql
        content["tables"][table] = {"sql": sql.replace(cast, f"known({name})")}
    return content


def by_fhir(case, folder):
    encounters = [
        resource("Encounter", i, who, period={"start": at, "end": until})
        for i, (who, at, until) in enumerate(case.patients)
    ]
    observed, of_specimen = [], defaultdict(list)
    for row in case.labs:
        of_specimen[row[5]].append(row)
    for name, rows in of_specimen.items():
        who, at, _, value, unit, _ = rows[0]
        codings = {"coding": [{"code": row[2]} for row in rows if row[2]]}
        observed.append(
            resource(
                "Observation",
                name,
                who,
                effectiveDateTime=at,
                code=codings,
                **quantity(value, unit),
            )
        )
    conditions = [
        resource(
            "Condition", i, who, recordedDate=at, code={"coding": [{"code": what}] if what else []}
        )
        for i, (who, at, what) in enumerate(case.diagnoses)
    ]
    tables = {}
    for name, kind, resources in (
        ("patients", "Encounter", encounters),
        ("labs", "Observation", observed),
        ("diagnoses", "Condition", conditions),
    ):
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in resources)
        (folder / f"{name}.ndjson").write_text(lines)
        tables[name] = {"path": f"{name}.ndjson", "fhir": kind}
    content = content_of(case, tables)
    named = {"subject_id": "subject_id", "time": "time", "code": "code", "numeric_value": "value"}
    content["events"] = [
        {"table": "labs", **named, "comparator": "comparator"}
        | ({"unit": "unit"} if case.with_units else {}),
        {"table": "diagnoses", "subject_id": "subject_id", "time": "recorded", "code": "code"},
    ]
    content["cohort"] |= {"subject_id": "subject_id", "prediction_time": "start"}
    content["cohort"] |= {"follow_up_end": "end"}
    return content


def by_known_in_fhir(case, folder):
    content = by_fhir(case, folder)
    for events in content["events"]:
        events["time"] = "known"
    return content


def resource(kind, name, who, **fields):
    reference = {"reference": f"Patient/{who}"} if who else {}
    if kind == "Encounter":
        fields = {"period": {key: at for key, at in fields["period"].items() if at}}
    told = {key: value for key, value in fields.items() if value != ""}
    return {"resourceType": kind, "id": str(name), "subject": reference, **told}


def quantity(value, unit):
    """A value as FHIR says it: a number, maybe as a bound, or text."""
    bound = re.fullmatch(r"([<>]) ?(\d+)", value)
    if bound:
        said = {"comparator": bound[1], "value": int(bound[2])}
    elif as_double(value) is not None and isfinite(float(value)):
        said = {"value": json.loads(value) if re.fullmatch(JSON_NUMBER, value) else float(value)}
    else:
        return {"valueString": value} if value else {}
    return {"valueQuantity": said | ({"unit": unit} if unit else {})}


def by_meds(case, folder):
    """One table of events, whose values have 32 bits and whose times are in UTC."""
    (folder / "data").mkdir()
    rows = [
        (subject(who), moment(at, case.zone), what, number(value))
        for who, at, what, value, *_ in case.labs
    ]
    rows += [(subject(who), moment(at, case.zone), what, None) for who, at, what in case.diagnoses]
    rows = [
        (int(who), at, what, value) for who, at, what, value in rows if who and at and code(what)
    ]
    rows.sort(key=lambda row: row[:2])
    types = {
        "subject_id": pa.int64(),
        "time": pa.timestamp("us"),
        "code": pa.string(),
        "numeric_value": pa.float32(),
    }
    columns = zip(*rows, strict=True)
    arrays = [
        pa.array([v.replace(tzinfo=None) if isinstance(v, datetime) else v for v in column], kind)
        for column, kind in zip(columns, types.values(), strict=True)
    ]
    pq.write_table(pa.table(arrays, names=list(types)), folder / "data" / "0.parquet")
    write_csv(folder / "patients.csv", HEADERS["patients"], case.patients)
    tables = {"patients": {"path": "patients.csv"}, "data": {"path": "data/**/*.parquet"}}
    content = content_of(case, tables)
    named = {"subject_id": "subject_id", "time": "time", "code": "code"}
    content["events"] = [{"table": "data", **named, "numeric_value": "numeric_value"}]
    return content


def as_text(case, table):
    header = header_of(case, table)
    columns = zip(*rows_of(case, table), strict=True)
    return pa.table([pa.array(column, pa.string()) for column in columns], names=list(header))


def as_typed(case, table, start=0):
    header = header_of(case, table)
    columns = zip(*rows_of(case, table)[start:], strict=True)
    arrays = [typed(name, column) for name, column in zip(header, columns, strict=True)]
    return pa.table(arrays, names=list(header))


def typed(name, cells):
    """A column as a database would have it, where all its cells are of one kind."""
    cells = [cell.strip(" ") for cell in cells]
    if name in TIMES:
        return typed_times(cells)
    if name == "result":
        return pa.array([as_double(cell) for cell in cells], pa.float64())
    if name in ("test", "icd") and not all(re.fullmatch(r"|[1-9]\d{3,}(\.0)?", c) for c in cells):
        return pa.array(cells, pa.string())
    given = [cell for cell in cells if cell not in ("", "NA")]
    whole = [WHOLE.fullmatch(cell) for cell in given]
    if name == "unit" or not all(whole):
        return pa.array(cells, pa.string())
    numbers = [int(found[1]) for found in whole]
    if max(map(abs, numbers), default=0) >= 2**63:
        return pa.array(cells, pa.string())
    held = [None if cell in ("", "NA") else int(WHOLE.fullmatch(cell)[1]) for cell in cells]
    if any(found[2] for found in whole) and max(map(abs, numbers)) < 2**53:
        return pa.array(held, pa.float64())
    return pa.array(held, pa.int64())


def as_double(cell):
    """A number, also one that no measurement may have; NaN where the text says so."""
    if cell.lower() in ("nan", "inf", "-infinity"):
        return float(cell)
    return float(cell) if re.fullmatch(JSON_NUMBER, cell) or number(cell) is not None else None


def typed_times(cells):
    """Dates, times without or with a zone, where all that are times are of that kind."""
    moments = [moment(cell, None) for cell in cells]
    written = [TIME.fullmatch(cell) for cell, time in zip(cells, moments, strict=True) if time]
    if not any(found[2] for found in written):
        return pa.array([time and time.date() for time in moments], pa.date32())
    if all(found[2] and not found[6] for found in written):
        naive = [time and time.replace(tzinfo=None) for time in moments]
        return pa.array(naive, pa.timestamp("us"))
    if all(found[6] for found in written):
        return pa.array(moments, pa.timestamp("us", tz="UTC"))
    return pa.array(cells, pa.string())


FILES = {
    "one table": by_one_table,
    "two parts": by_two_parts,
    "decimal commas": by_decimal_commas,
    "text in Parquet": by_text_in_parquet,
    "types in Parquet": by_types_in_parquet,
    "text beside types": by_text_beside_types,
    "text in DuckDB": by_text_in_duckdb,
    "types in DuckDB": by_types_in_duckdb,
    "SQL": by_sql,
    "SQL of decimal commas": by_sql_of_decimal_commas,
}
IN_POSTGRESQL = {
    "text in PostgreSQL": by_text_in_postgresql,
    "types in PostgreSQL": by_types_in_postgresql,
}

common = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=MORE is None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@contextmanager
def folder_of():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def told(case):
    """The tables as they are drawn, for a failure's report."""
    few = replace(
        case,
        **{
            table: tuple(row for row in case.rows(table) if not re.fullmatch(r"10\d\d", row[0]))
            for table in HEADERS
        },
    )
    return str(few)


def assert_route(case, name, route, wanted):
    """The route's store is that of the CSV, `wanted`, byte for byte."""
    with folder_of() as folder:
        store = store_of(route(case, folder), folder)
        for part, content in wanted.items():
            if (store.path / f"{part}.parquet").read_bytes() != content:
                assert_as_expected(as_dictionaries(store), expected(case))
                pytest.fail(f"{name}: {part} differs in bytes")


def rows_by(route, case):
    with folder_of() as folder:
        return as_dictionaries(store_of(route(case, folder), folder))


def contents_by_csv(case):
    with folder_of() as folder:
        store = store_of(by_csv(case, folder), folder)
        assert_as_expected(as_dictionaries(store), expected(case))
        parts = [name for name in CONTENT if (store.path / f"{name}.parquet").exists()]
        assert ("follow_up" in parts) == (case.censoring == "ipcw")
        return {name: (store.path / f"{name}.parquet").read_bytes() for name in parts}


@pytest.mark.parametrize("name", FILES)
def test_every_cell_means_the_same_in_every_file(name):
    case = with_company(every_cell(), "any", "mixed")
    assert_as_expected(rows_by(FILES[name], case), expected(case))


@common
@given(case=cases(), name=st.sampled_from(sorted(FILES)))
def test_every_file_gives_what_plain_python_makes_of_it(case, name):
    note(told(case))
    assert_route(case, name, FILES[name], contents_by_csv(case))


@settings(common, max_examples=max(EXAMPLES // 6, 1))
@given(case=cases())
def test_postgresql_gives_the_same(postgres, case):
    note(told(case))
    os.environ["DRAWN_URL"] = postgres
    wanted = contents_by_csv(case)
    for name, route in IN_POSTGRESQL.items():
        assert_route(case, name, route, wanted)


@settings(common, max_examples=max(EXAMPLES // 6, 1))
@given(case=cases(told_in="FHIR"))
def test_fhir_gives_the_same(case):
    note(told(case))
    assert_route(case, "FHIR", by_fhir, contents_by_csv(case))


@settings(common, max_examples=max(EXAMPLES // 6, 1))
@given(case=cases(told_in="MEDS"))
def test_meds_gives_the_same_numbers(case):
    note(told(case))
    assert_as_expected(rows_by(by_meds, case), expected(case))


@settings(common, max_examples=max(EXAMPLES // 6, 1))
@given(case=cases(told_in="FHIR"))
def test_days_that_count_from_their_end(case):
    note(told(case))
    of_site, anywhere = (replace(case, day_ends=hours) for hours in (24, 36))
    assert_as_expected(rows_by(by_known_in_sql, case), expected(of_site))
    in_fhir = expected(of_site if case.zone else anywhere)
    assert_as_expected(rows_by(by_known_in_fhir, case), in_fhir)
