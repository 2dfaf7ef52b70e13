"""Parts of a table add up whatever their types, and none that is sound is refused."""

import gzip
from datetime import UTC, date, datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.ingest.tables import connect, load_tables

LABS = "id,day,test,x\n1,50,sbp,120\n"
TYPED = {
    "id": pa.array([2], pa.int64()),
    "day": pa.array([60], pa.int64()),
    "test": pa.array(["hdl"]),
    "x": pa.array([40.0]),
}


@pytest.fixture
def load(hospital):
    """A function: files of laboratory values by name → the rows of all, without their numbers.

    A file is given as text, bytes, or Arrow's columns for Parquet; more keys are of the table.
    """
    hospital.draw(patients="id index end age\n1 100 1000 50", diagnoses="id day icd\n1 150 E11")

    def load_labs(files, path="labs*", clock=None, **table):
        for name, content in files.items():
            if isinstance(content, dict):
                pq.write_table(pa.table(content), hospital.folder / name)
            else:
                content = content.encode() if isinstance(content, str) else content
                (hospital.folder / name).write_bytes(content)
        changes = {"events__0__clock": clock} if clock else {}
        config = hospital.config(tables__labs={"path": path, **table}, **changes)
        with connect() as db:
            load_tables(db, config)
            read = db.execute("SELECT id, day, test, x FROM source.labs ORDER BY _row")
            return read.fetchall()

    return load_labs


def without_rows(columns):
    return {name: column[:0] for name, column in columns.items()}


# -- parts without rows --------------------------------------------------------------------------

EMPTY = {
    "labs0.csv": "id,day,test,x\n",
    "labs0.csv.gz": gzip.compress(b"id,day,test,x\n"),
    "labs0.parquet": without_rows(TYPED),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_part_without_rows_adds_none(load, name, at):
    full, empty = ("labs1", "labs0") if at == "first" else ("labs1", "labs2")
    name, content = name.replace("labs0", empty), EMPTY[name]
    read = load({name: content, f"{full}.csv": LABS})
    assert [tuple(map(str, row)) for row in read] == [("1", "50", "sbp", "120")]


def test_a_part_without_rows_may_lack_what_the_others_have_in_type(load):
    """Dask writes a part without rows as if its columns were of any type."""
    empty = {name: pa.array([], pa.null()) for name in TYPED}
    assert load({"labs0.parquet": empty, "labs1.parquet": TYPED}) == [("2", "60", "hdl", "40")]


def test_a_table_without_rows_in_any_part_is_refused(load):
    with pytest.raises(DataError, match=r"tables\.labs: the table is empty: there is nothing"):
        load({"labs0.csv": "id,day,test,x\n", "labs1.parquet": without_rows(TYPED)})


def ndjson(*ids):
    return "".join(
        f'{{"resourceType": "Patient", "id": "{one}", "birthDate": "1960-01-02"}}\n' for one in ids
    )


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_fhir_file_of_no_bytes_adds_no_resource(hospital, content):
    hospital.draw(labs="id day test x\n1 50 sbp 120", diagnoses="id day icd\n1 150 E11")
    (hospital.folder / "Patient.0.ndjson").write_text(content)
    (hospital.folder / "Patient.1.ndjson").write_text(ndjson("1", "2"))
    config = hospital.config(
        tables__people={"path": "Patient.*.ndjson", "fhir": "Patient"},
        tables__patients={"sql": 'SELECT id, 100 AS "index", 1000 AS "end", 50 AS age FROM people'},
    )
    with connect() as db:
        assert load_tables(db, config)["people"] == 2


# -- parts of other types ------------------------------------------------------------------------

DAY, NOON = date(2020, 1, 5), datetime(2020, 1, 5, 12)
TIMES = {"unit": "timestamp"}


def with_day(column):
    return TYPED | {"day": column}


def days(read):
    return [day for _, day, *_ in read]


def test_dates_local_times_and_moments_are_stacked_as_moments(load):
    files = {
        "labs0.parquet": with_day(pa.array([DAY])),
        "labs1.parquet": with_day(pa.array([NOON])),
        "labs2.parquet": with_day(pa.array([NOON.replace(tzinfo=UTC)])),
        "labs3.parquet": with_day(pa.array([NOON], pa.timestamp("ms"))),
    }
    midnight = datetime(2020, 1, 5, tzinfo=UTC)
    noon = NOON.replace(tzinfo=UTC)
    assert days(load(files, clock=TIMES)) == [midnight, noon, noon, noon]


@pytest.mark.parametrize(
    ("column", "moment"),
    [
        (pa.array([DAY]), "2020-01-05 00:00"),
        (pa.array([NOON]), "2020-01-05 12:00"),
        (pa.array([NOON.replace(tzinfo=UTC)]), "2020-01-05 12:00"),
    ],
    ids=lambda one: str(getattr(one, "type", "")),
)
@pytest.mark.parametrize("zone", [None, "America/New_York"])
def test_a_typed_time_means_the_same_beside_text(hospital, stage, column, moment, zone):
    hospital.write(
        patients=pd.DataFrame(
            {"id": [2], "index": ["2020-02-01"], "end": ["2021-02-01"], "age": 50}
        )
    )
    pq.write_table(pa.table(with_day(column)), hospital.folder / "labs1.parquet")
    (hospital.folder / "labs2.csv").write_text("id,day,test,x\n2,2020-01-05T10:00Z,sbp,120\n")
    clock = TIMES | ({"time_zone": zone} if zone else {})
    changes = {
        "tables": {"patients": {"path": "patients.csv"}, "labs": {"path": "labs*"}},
        "events": hospital.content["events"][:1],
        "clock": clock,
    }
    beside = stage(hospital.config(**changes)).rows(
        "SELECT time FROM events ORDER BY numeric_value"
    )
    (hospital.folder / "labs2.csv").unlink()
    alone = stage(hospital.config(**changes)).rows("SELECT time FROM events")
    assert beside == [*alone, (datetime(2020, 1, 5, 10),)]
    if zone is None:
        assert alone == [(datetime.fromisoformat(moment),)]


def test_times_and_numbers_are_not_stacked(load):
    files = {"labs0.parquet": with_day(pa.array([NOON])), "labs1.parquet": TYPED}
    said = "column 'day' holds times in some of the files and numbers in others"
    with pytest.raises(DataError, match=said):
        load(files, clock=TIMES)


def test_typed_times_and_text_with_a_format_are_not_stacked(load):
    files = {
        "labs0.parquet": with_day(pa.array([NOON])),
        "labs1.csv": "id,day,test,x\n1,05.01.2020,sbp,120\n",
    }
    said = r"events\.0\.time: column 'day' of table labs holds text in some of the files and typed"
    with pytest.raises(DataError, match=said):
        load(files, clock=TIMES | {"format": "%d.%m.%Y"})


def test_columns_are_found_in_any_case_in_each_part(load):
    files = {
        "labs0.csv": LABS,
        "labs1.csv": LABS.replace("id,day,test,x", "ID,Day,TEST,X"),
        "labs2.parquet": {name.upper(): column for name, column in TYPED.items()},
    }
    assert [row[0] for row in load(files)] == ["1", "1", "2"]


@pytest.mark.parametrize(
    "other", [pa.array([NOON]), pa.array([NOON - NOON.replace(hour=1)])], ids=lambda c: str(c.type)
)
def test_what_nothing_reads_may_be_of_any_type(load, other):
    files = {
        "labs0.parquet": TYPED | {"more": pa.array([1.5])},
        "labs1.parquet": TYPED | {"more": other},
    }
    assert len(load(files)) == 2


# -- columns in any case -------------------------------------------------------------------------


def test_a_configuration_in_lower_case_reads_tables_in_upper_case(busy):
    plain = ingest(busy.config(data_dir=str(busy.folder / "plain")))
    for name in ("patients", "labs", "diagnoses"):
        frame = pd.read_csv(busy.folder / f"{name}.csv", dtype=str)
        busy.write(**{name: frame.rename(columns=str.upper)})
    sql = "SELECT id, Day, tesT, x FROM raw WHERE X IS NOT NULL"
    tables = {"patients": "patients.csv", "raw": "labs.csv", "diagnoses": "diagnoses.csv"}
    tables = {name: {"path": path} for name, path in tables.items()} | {"labs": {"sql": sql}}
    upper = ingest(busy.config(tables=tables, data_dir=str(busy.folder / "upper")))
    for name in ("values", "mask", "labels", "splits"):
        file = f"{name}.parquet"
        assert (upper / file).read_bytes() == (plain / file).read_bytes(), file


# -- text files as programs write them -----------------------------------------------------------


def test_a_line_of_megabytes_in_a_column_that_nothing_uses_is_read(load):
    scan = "A" * 3_000_000
    lines = f"id,day,test,x,scan\n1,50,sbp,120,\n2,60,hdl,40,{scan}\n1,70,hdl,41,x\n"
    assert [x for *_, x in load({"labs.csv": lines})] == ["120", "40", "41"]
    quoted = lines.replace(scan, '"' + "A\n" * 1_500_000 + '"')
    assert [x for *_, x in load({"labs.csv": quoted})] == ["120", "40", "41"]


def test_a_line_that_is_too_long_is_refused_with_its_number(load):
    lines = f"id,day,test,x,scan\n1,50,sbp,120,\n2,60,hdl,40,{'SECRET' * 6_000_000}\n"
    with pytest.raises(DataError) as error:
        load({"labs.csv": lines})
    assert "labs.csv: line 3: longer than 33,554,432 bytes: leave its column" in str(error.value)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sign", "table"),
    [
        ("labs.psv", "|", {}),
        ("labs.PSV", "|", {}),
        ("labs.psv", ";", {"delimiter": ";"}),
        ("labs.tsv", "\t", {}),
        ("labs.txt", "\t", {"delimiter": "\t"}),
        ("labs.txt", "|", {"delimiter": "|"}),
        ("labs.dat", "^", {"delimiter": "^"}),
        ("labs", ",", {"delimiter": ","}),
        ("labs.export", ";", {"delimiter": ";"}),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_cells_are_separated_as_the_ending_or_the_configuration_says(
    load, name, sign, table, zipped
):
    content = LABS.replace(",", sign).encode()
    name, content = (f"{name}.gz", gzip.compress(content)) if zipped else (name, content)
    assert load({name: content}, path=name, **table) == [("1", "50", "sbp", "120")]


@pytest.mark.parametrize("name", ["labs.txt", "labs.dat", "labs.txt.gz"])
def test_a_file_whose_ending_does_not_say_needs_a_delimiter(load, name):
    with pytest.raises(DataError, match="say what separates its cells: `delimiter`"):
        load({name: LABS}, path=name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labs.csv", LABS.replace(",", ";")),
        ("labs.csv", LABS.replace(",", "\t")),
        ("labs.psv", LABS),
    ],
)
def test_a_header_of_one_cell_is_asked_for_another_delimiter(load, name, content):
    with pytest.raises(DataError, match=r"line 1 is one cell, with '.+' in it: is that the `del"):
        load({name: content}, path=name)


def test_lines_above_the_header_can_be_left_out(load):
    above = 'Report of 2020-01-05,,,\n\n"one, or ""two"" lines"\n'
    read = [("1", "50", "sbp", "120")]
    assert load({"labs.csv": above + LABS}, skip_rows=3) == read
    assert load({"labs.csv": (above + LABS).replace("\n", "\r\n")}, skip_rows=3) == read
    packed = {"labs.csv.gz": gzip.compress((above + LABS).encode())}
    assert load(packed, path="labs.csv.gz", skip_rows=3) == read
    with pytest.raises(DataError, match="line 2, which is to name the columns, is"):
        load({"labs.csv": above + LABS}, path="labs.csv", skip_rows=1)
    with pytest.raises(DataError, match="line 6: the row has more or fewer cells"):
        load({"labs.csv": above + LABS + "1,50\n"}, path="labs.csv", skip_rows=3)


@pytest.mark.parametrize("above", ['a\n"odd\nx"\n', '5" tape\n"b\nc\n', '"\n\n\n'])
def test_quotes_above_the_header_cost_no_row(load, above):
    read = [("1", "50", "sbp", "120"), ("2", "60", "hdl", "40")]
    assert load({"labs.csv": f"{above}{LABS}2,60,hdl,40\n"}, skip_rows=3) == read


# -- what may be missing -------------------------------------------------------------------------


def test_markers_of_a_missing_entry_are_missing_in_every_column(load):
    files = {
        "labs0.csv": "id,day,test,x\n1,-9,sbp,-9.0\n2,60,n/a,99\n-9,70,hdl,n/a\n1,-90,hdl, -9 \n"
    }
    expected = [("1", None, "sbp", None), ("2", "60", None, "99"), (None, "70", "hdl", None)]
    assert load(files, missing=[-9, "n/a"]) == [*expected, ("1", "-90", "hdl", None)]


def test_markers_of_a_missing_entry_are_missing_in_typed_columns(load):
    columns = {
        "id": pa.array([1, -9]),
        "day": pa.array([-9.0, 60.5]),
        "test": pa.array(["-9", "n/a"]),
        "x": pa.array([-9, 7], pa.int8()),
    }
    assert load({"labs0.parquet": columns}, missing=[-9, "n/a"]) == [
        (1, None, None, None),
        (None, 60.5, None, 7),
    ]


def test_columns_that_are_optional_may_be_lacking(hospital, stage):
    hospital.draw(
        patients="id index end age\n1 100 1000 50",
        labs="id day test x\n1 50 hdl 120",
        diagnoses="id day icd\n1 150 E11",
    )
    events = {"events__0__unit": "u", "features__measurements": {"hdl": {}}}
    with pytest.raises(DataError, match="has no column 'u'"):
        stage(hospital.config(**events))
    staged = stage(hospital.config(**events, tables__labs__optional_columns=["u", "more"]))
    assert staged.features()["hdl.last"].item() == 120
    hospital.draw(labs="id day test x U\n1 50 hdl 120 mmol")
    staged = stage(hospital.config(**events, tables__labs__optional_columns=["u"]))
    assert staged.rows("SELECT u FROM source.labs") == [("mmol",)]


@pytest.mark.parametrize("there", ["absent", "no rows", "no bytes"])
def test_a_table_that_is_optional_may_be_absent_or_empty(busy, there):
    for name in ("more.csv", "Condition.ndjson"):
        if there != "absent":
            (busy.folder / name).write_text(
                "" if there == "no bytes" or "nd" in name else "id,day,icd\n"
            )
    if there == "no bytes":
        (busy.folder / "more.csv").unlink()
    plain = ingest(busy.config(data_dir=str(busy.folder / "plain")))
    tables = busy.content["tables"] | {
        "more": {"path": "more.csv", "optional": True, "optional_columns": ["id", "day", "icd"]},
        "conditions": {"path": "Condition*.ndjson", "fhir": "Condition", "optional": True},
    }
    more = [
        {"table": "more", "subject_id": "id", "time": "day", "code": "icd"},
        {"table": "conditions", "subject_id": "subject_id", "time": "known", "code": "code"},
    ]
    more[1]["clock"] = {"unit": "timestamp"}
    events = [*busy.content["events"], *more]
    with_more = ingest(busy.config(tables=tables, events=events))
    for name in ("values", "mask", "labels"):
        file = f"{name}.parquet"
        assert (with_more / file).read_bytes() == (plain / file).read_bytes(), file
    assert Store(with_more).manifest["tables"]["more"]["rows"] == 0


def test_a_table_that_is_not_optional_may_not_be_absent(load):
    with pytest.raises(DataError, match="no file"):
        load({}, path="labs.csv")
    assert (
        load({}, path="labs.csv", optional=True, optional_columns=["id", "day", "test", "x"]) == []
    )
    assert load({"labs.csv": "id,day,test,x\n"}, path="labs.csv", optional=True) == []


# -- SAS XPORT -----------------------------------------------------------------------------------


@pytest.fixture
def xpt(hospital):
    """A function: a frame, and what SAS is told of it → how it is read of a table of people."""
    pyreadstat = pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")

    def read(frame, replaced=None, encoding=None, **told):
        path = hospital.folder / "people.xpt"
        pyreadstat.write_xport(frame, str(path), file_format_version=5, **told)
        if replaced:
            ours, theirs = replaced
            content = path.read_bytes()
            assert content.count(ours) == 1
            path.write_bytes(content.replace(ours, theirs))
        table = {"path": "people.xpt"} | ({"encoding": encoding} if encoding else {})
        config = hospital.config(
            tables={"people": table},
            events=None,
            cohort={"table": "people", "subject_id": "SEQN", "prediction_time": "T"},
            features={"columns": {"people": ["X"]}},
            labels={"ill": {"positive": "D == 'yes'", "negative": "D == 'no'"}},
            clock={"unit": "timestamp"},
        )
        with connect() as db:
            load_tables(db, config)
            query = "SELECT SEQN, T, X, D FROM source.people ORDER BY _row"
            return db.execute(query).fetchall()

    return read


def people(**columns):
    default = {
        "SEQN": [1.0, 2.0, 3.0],
        "T": [0.0, 21185.0, -700000.0],
        "X": [0.0, 7.0, float("nan")],
    }
    return pd.DataFrame(default | {"D": ["yes", "no", ""]} | columns)


def test_a_sas_date_after_the_year_9999_harms_no_other(xpt):
    last = float((date(9999, 12, 31) - date(1960, 1, 1)).days)
    read = xpt(people(T=[21185.0, last + 1, last]), variable_format={"T": "DATE9."})
    assert [read[0][1], read[2][1]] == [date(2018, 1, 1), date(9999, 12, 31)]
    assert [row[0] for row in read] == [1, 2, 3]


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("DATETIME20.", datetime(1960, 1, 1)),
        ("DATE9.", date(1960, 1, 1)),
        ("MMDDYY10.", date(1960, 1, 1)),
    ],
)
def test_a_sas_time_that_no_calendar_has_is_set_aside(hospital, xpt, stage, form, first):
    xpt(people(T=[0.0, 1e15, 1e300]), variable_format={"T": form})
    config = hospital.config(
        tables={"people": {"path": "people.xpt"}},
        events=None,
        cohort={"table": "people", "subject_id": "SEQN", "prediction_time": "T"},
        features={"columns": {"people": ["X"]}},
        labels={"ill": {"positive": "D == 'yes'", "negative": "D == 'no'"}},
        clock={"unit": "timestamp"},
    )
    staged = stage(config)
    when = datetime(first.year, first.month, first.day)
    assert staged.rows("SELECT subject_id, prediction_time FROM cohort") == [(1, when)]
    assert [(row, reason[:15]) for _, row, reason in staged.quarantine()] == [
        (2, "prediction time"),
        (3, "prediction time"),
    ]


def test_a_sas_label_in_another_encoding_does_no_harm(xpt):
    labels = {"column_labels": {"X": "Ferritin(#g/L)"}}
    read = xpt(people(), (b"Ferritin(#g/L)", b"Ferritin(\xb5g/L)"), **labels)
    assert [x for *_, x, _ in read] == [0, 7, None]


@pytest.mark.parametrize("place", [0, 1])
def test_sas_text_in_another_encoding_is_refused_where_it_is_used(xpt, place):
    texts = ["n#n", "no", ""] if place == 0 else ["no", "n#n", ""]
    content = {"frame": people(D=texts), "replaced": (b"n#n", b"n\xf3n")}
    with pytest.raises(DataError, match=r"not UTF-8 text: save it so, or name its `encoding`"):
        xpt(**content)
    assert [one for *_, one in xpt(**content, encoding="cp1252")] == [
        t.replace("#", "ó") or None for t in texts
    ]


def test_sas_text_in_another_encoding_harms_nothing_where_it_is_not_used(xpt):
    frame = people().assign(CITY=["b#", "a", "c"])
    assert len(xpt(frame, (b"b#", b"b\xf3"))) == 3
