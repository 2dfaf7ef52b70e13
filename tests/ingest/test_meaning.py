"""Codes, ids, numbers and units mean the same however a program wrote them, or are refused."""

from datetime import timedelta
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_sn.errors import ConfigError, DataError

NOT_A_NUMBER = "x: not a number"
A_BOUND = "x: a bound, which is no value"
A_COMMA = 'x: a decimal comma: declare `decimal: ","`'
A_POINT = "x: a decimal point, where `decimal` is a comma"
THOUSANDS = "x: signs between thousands: declare `thousands`"
NBSP = "\u00a0"


@pytest.fixture
def staged(hospital, stage):
    """A function: laboratory values as text, or as parts of Arrow's columns → what they come to.

    Where nothing else is given, the subject is 1, each day another one, the test hdl, the value 5.
    """
    hospital.draw(patients="id index end age\n1 100 1000 50", diagnoses="id day icd\n1 150 E11")

    def write(*parts, file="labs{}.parquet", delimiter=",", **changes):
        for place, columns in enumerate(parts):
            rows = len(next(iter(columns.values())))
            default = {"id": [1] * rows, "day": [*range(rows)], "test": ["hdl"] * rows}
            default["x"] = [5] * rows
            columns, path = default | columns, hospital.folder / file.format(place)
            if path.suffix == ".parquet":
                pq.write_table(pa.table(columns), path)
            else:
                pd.DataFrame(columns).to_csv(path, index=False, sep=delimiter)
        tables = hospital.content["tables"] | {"labs": {"path": file.format("*")}}
        return stage(hospital.config(**{"tables": tables} | changes))

    return write


def as_csv(delimiter=",", **table):
    """How a text file of these values is written, and read."""
    written = {"file": "labs{}.csv", "delimiter": delimiter}
    declared = {f"tables__labs__{key}": value for key, value in table.items()}
    if delimiter != ",":
        declared["tables__labs__delimiter"] = delimiter
    return written | declared


def values(staged):
    """The value of each laboratory row: a number, or why it is missing."""
    reasons = {row: reason for table, row, reason in staged.quarantine() if table == "labs"}
    read = staged.rows("SELECT _row, number FROM judged_0 ORDER BY _row")
    return [reasons.get(row, number) for row, number in read]


def codes(staged):
    """The code of each laboratory row."""
    return [
        code
        for (code,) in staged.rows(
            "SELECT code FROM judged_0 LEFT JOIN event_codes USING (code_id) ORDER BY _row"
        )
    ]


# -- codes ---------------------------------------------------------------------------------------


def test_a_whole_number_is_one_code_in_every_part(staged):
    parts = [
        {"test": pa.array([201826, 7], pa.int64())},
        {"test": pa.array([201826.0, None, 7.0], pa.float64())},
        {"test": pa.array([Decimal("201826"), Decimal("7")], pa.decimal128(10, 0))},
        {"test": pa.array([Decimal("201826.00")], pa.decimal128(12, 2))},
        {"test": pa.array([201826], pa.uint32())},
    ]
    assert codes(staged(*parts)) == [
        *("201826", "7"),
        *("201826", None, "7"),
        *("201826", "7"),
        "201826",
        "201826",
    ]


def test_history_and_labels_find_the_codes_of_a_part_with_gaps(hospital, stage):
    """As pandas writes a column of whole numbers once one of them is missing."""
    hospital.draw(
        patients="id index end age\n1 100 1000 50\n2 100 1000 50\n3 100 1000 50",
        labs="id day test x\n1 50 sbp 120",
    )
    first = pd.DataFrame({"id": [1, 1], "day": [50, 150], "icd": [320128, 201826]})
    second = pd.DataFrame({"id": [2, 2, 3], "day": [50, 150, 50], "icd": [320128, 201826, None]})
    hospital.write(".parquet", dx0=first, dx1=second)
    staged = stage(
        hospital.config(
            tables__diagnoses={"path": "dx*.parquet"},
            features__history={"htn": [320128]},
            labels__diabetes__codes=[201826],
        )
    )
    assert staged.features()["history.htn"].tolist() == [1, 1, 0]
    assert staged.labels() == {1: 1, 2: 1, 3: 0}
    assert staged.quarantine() == [("diagnoses", 5, "no code")]


CODES = {  # as a cell has it: the code
    "201826": "201826",
    "201826.0": "201826",
    "1234.00": "1234",
    "428.0": "428.0",
    "001.0": "001.0",
    "0250.0": "0250.0",
    "250.10": "250.10",
    "1234.50": "1234.50",
    "2951.05": "2951.05",
    "E11.0": "E11.0",
    "2.16.840.1.113883.0": "2.16.840.1.113883.0",
    f"{NBSP}E11{NBSP}": "E11",
    "\tE11\t": "E11",
    f" {NBSP}\u20092345-7\u200b ": "2345-7",
    "\ufeffE12": "E12",
    "heart rate": "heart rate",
    f"heart{NBSP}rate": f"heart{NBSP}rate",
    "NA": "NA",
    NBSP: None,
    "\t": None,
}


@pytest.mark.parametrize("file", ["labs{}.csv", "labs{}.parquet"])
def test_a_code_of_text_is_read_without_blanks_and_without_the_fraction_of_a_gap(staged, file):
    assert dict(zip(CODES, codes(staged({"test": [*CODES]}, file=file)), strict=True)) == CODES


@pytest.mark.parametrize(
    "column",
    [
        pa.array([428.0, 250.1], pa.float64()),
        pa.array([428.0, 250.5], pa.float32()),
        pa.array([Decimal("428.0"), Decimal("250.1")], pa.decimal128(5, 1)),
    ],
    ids=lambda column: str(column.type),
)
def test_codes_that_are_numbers_with_fractions_are_refused(staged, column):
    with pytest.raises(DataError) as error:
        staged({"test": column})
    said = "column 'test' of table labs holds its codes as numbers, 1 of them with a fraction"
    assert f"events.0.code: {said}" in str(error.value)
    assert "write the codes as text" in str(error.value)
    assert "250.1 " in str(error.value)  # an example, which is always the same
    assert "250.5" not in str(error.value)


# -- units ---------------------------------------------------------------------------------------

GLUCOSE = {"codes": ["hdl"], "unit": "8840", "units": {"8753": 18.0}}


@pytest.mark.parametrize(
    "units",
    [
        pa.array([8840, 8753, None], pa.int64()),
        pa.array([8840.0, 8753.0, None], pa.float64()),
        pa.array([8840.0, 8753.0, None], pa.float32()),
        pa.array([Decimal("8840.0"), Decimal("8753.0"), None], pa.decimal128(10, 1)),
        pa.array(["8840.0", "8753.00", None]),
        pa.array([f"{NBSP}8840", "8753\t", NBSP]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_unit_that_is_a_whole_number_is_one_unit_however_it_is_written(staged, units):
    columns = {"x": [90.0, 5.0, 6.0], "u": units}
    changes = {"events__0__unit": "u", "features__measurements": {"glucose": GLUCOSE}}
    assert values(staged(columns, **changes)) == [90, 90, "glucose: no unit is given"]


# -- ids -----------------------------------------------------------------------------------------

NOBODY = ["NA", "N/A", "NULL", "null", "\\N", "nan", "NaN", "None", "<NA>", "NaT", "#N/A", "."]


def test_text_that_stands_for_a_missing_id_is_nobody(hospital, stage):
    hospital.write(
        patients=pd.DataFrame({"id": ["1", "7.0", *NOBODY], "index": 100, "end": 1000, "age": 50}),
        labs=pd.DataFrame({"id": ["7", "1.0", *NOBODY], "day": 50, "test": "hdl", "x": 5}),
        diagnoses=pd.DataFrame({"id": ["1", *NOBODY], "day": 150, "icd": "E11"}),
    )
    staged = stage(hospital.config())
    assert staged.labels() == {1: 1, 7: 0}
    assert staged.features()["hdl.count"].tolist() == [1, 1]
    assert [aside for aside in staged.quarantine() if aside[2] != "no subject_id"] == []
    assert len(staged.quarantine()) == 3 * len(NOBODY)


def test_7_and_7_0_are_one_subject_among_ids_of_text_too(hospital, stage):
    ids = ["7.0", "A1", "007", "1.5", "8", "NA"]
    hospital.write(
        patients=pd.DataFrame({"id": ids, "index": 100, "end": 1000, "age": 50}),
        labs=pd.DataFrame(
            {"id": ["7", "A1", "007", "1.50", "8.00", "na"], "day": 50, "test": "hdl", "x": 5}
        ),
        diagnoses=pd.DataFrame({"id": ["7"], "day": 150, "icd": "E11"}),
    )
    staged = stage(hospital.config())
    assert staged.labels() == {"007": 0, "1.5": 0, "7": 1, "8": 0, "A1": 0}
    assert staged.features()["hdl.count"].notna().to_dict() == {
        **dict.fromkeys(("007", "7", "8", "A1"), True),
        "1.5": False,
    }
    assert staged.quarantine() == [
        ("labs", 4, "subject is not in the cohort"),
        ("labs", 6, "no subject_id"),
        ("patients", 6, "no subject_id"),
    ]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1, 2], pa.int64()),
        pa.array([1.0, 2.0, None], pa.float64()),
        pa.array([Decimal("1.0"), Decimal("2.0")], pa.decimal128(5, 1)),
        pa.array(["1.0", "2", "NA"]),
    ],
    ids=lambda column: str(column.type),
)
def test_ids_of_any_type_are_the_same_subjects(hospital, staged, ids):
    rows = len(ids)
    patients = {"id": ids, "index": [100] * rows, "end": [1000] * rows, "age": [50] * rows}
    pq.write_table(pa.table(patients), hospital.folder / "patients.parquet")
    tables = {name: {"path": f"{name}.csv"} for name in ("labs", "diagnoses")}
    tables |= {"patients": {"path": "patients.parquet"}, "labs": {"path": "labs*.parquet"}}
    parts = ({"id": [1]}, {"id": [2.0]}, {"id": ["1.0", "2"], "day": [7, 8]})
    found = staged(*parts, tables=tables)
    assert found.labels() == {1: 1, 2: 0}
    assert codes(found) == ["hdl"] * 4
    assert [reason for _, _, reason in found.quarantine()] == ["no subject_id"] * (rows - 2)


# -- numbers -------------------------------------------------------------------------------------

PLAIN = {  # cell: number, or why there is none
    "12.5": 12.5,
    "-0.5": -0.5,
    "+.5": 0.5,
    "1e3": 1000,
    "1.5E-1": 0.15,
    "nan": None,
    "12,5": A_COMMA,
    ",5": A_COMMA,
    "1,234.5": THOUSANDS,
    "1_234": NOT_A_NUMBER,
    "1_2.5": NOT_A_NUMBER,
    "1 234": NOT_A_NUMBER,
    "0x1F": NOT_A_NUMBER,
    "<5": A_BOUND,
    "< 5.5": A_BOUND,
    ">=5": A_BOUND,
    "≤5": A_BOUND,
    "~5": A_BOUND,
    "< LOD": NOT_A_NUMBER,
    "neg": NOT_A_NUMBER,
    "true": NOT_A_NUMBER,
    "1e19": "x: not finite, or beyond 1e+18",
    "inf": "x: not finite, or beyond 1e+18",
}
COMMA = {
    "12,5": 12.5,
    "1234": 1234,
    "-0,5": -0.5,
    "1,5e3": 1500,
    "1e3": 1000,
    "nan": None,
    ".5": A_POINT,
    "12.5": A_POINT,
    "1.234": THOUSANDS,
    "1.234,5": THOUSANDS,
    "1.234.567": THOUSANDS,
    "1,234,567": NOT_A_NUMBER,
    "1_234": NOT_A_NUMBER,
    "1_234,5": NOT_A_NUMBER,
    "<5,5": A_BOUND,
}
WITH_COMMAS = {
    "1,234": 1234,
    "1,234.5": 1234.5,
    "-1,234,567": -1234567,
    "1234.5": 1234.5,
    **dict.fromkeys(["1,23", "12,5", "1234,567", ",123"], A_COMMA),
}
WITH_POINTS = {
    "1.234": 1234,
    "1.234,5": 1234.5,
    "-1.234.567": -1234567,
    "1234,5": 1234.5,
    "12,5": 12.5,
    "12.5": A_POINT,
    "1.23": A_POINT,
    "1234.567": A_POINT,
}
WITH_BLANKS = {
    "1 234": 1234,
    "1 234,5": 1234.5,
    "12,5": 12.5,
    "1 23": NOT_A_NUMBER,
    "12.5": A_POINT,
}
WRITTEN = [
    (PLAIN, {}),
    (COMMA, {"decimal": ","}),
    (WITH_COMMAS, {"thousands": ","}),
    (WITH_POINTS, {"decimal": ",", "thousands": "."}),
    (WITH_BLANKS, {"decimal": ",", "thousands": " "}),
    ({"1'234.5": 1234.5, "12.5": 12.5, "1'23": NOT_A_NUMBER}, {"thousands": "'"}),
]


@pytest.mark.parametrize(("cells", "table"), WRITTEN, ids=str)
def test_a_number_is_written_with_the_table_s_signs_or_is_none(staged, cells, table):
    found = values(staged({"x": [*cells]}, **as_csv(";", **table)))
    assert dict(zip(cells, found, strict=True)) == cells


@pytest.mark.parametrize("table", [{}, {"thousands": "."}], ids=str)
def test_nothing_need_stand_before_a_decimal_comma(staged, table):
    cells = {",5": 0.5, "-,25": -0.25, "+,5": 0.5}
    found = values(staged({"x": [*cells]}, **as_csv(";", decimal=",", **table)))
    assert dict(zip(cells, found, strict=True)) == cells


@pytest.fixture
def cast(staged):
    """A function: values as text, how their table is written, and a type → them, cast in SQL."""

    def read(cells, kind, **table):
        tables = {name: {"path": f"{name}.csv"} for name in ("patients", "diagnoses")}
        tables["raw"] = {"path": "labs0.csv", "delimiter": ";"} | table
        tables["labs"] = {"sql": f"SELECT id, day, test, CAST(x AS {kind}) AS x FROM raw"}
        found = staged({"x": [*cells]}, file="labs{}.csv", delimiter=";", tables=tables)
        return [x for (x,) in found.rows("SELECT x FROM source.labs ORDER BY day::INT")]

    return read


@pytest.mark.parametrize(("cells", "table"), WRITTEN, ids=str)
def test_a_cast_in_sql_reads_a_number_by_the_same_signs(cast, cells, table):
    numbers = {
        cell: None if isinstance(number, str) else number
        for cell, number in cells.items()
        if cell not in ("1e19", "inf")  # numbers, which are no values
    }
    assert dict(zip(numbers, cast(numbers, "DOUBLE", **table), strict=True)) == numbers


@pytest.mark.parametrize("kind", ["FLOAT4", "FLOAT8", "INT2", "INT4", "INT8", "LONG", "DECIMAL(9)"])
def test_a_cast_to_a_type_under_another_name_reads_the_same(cast, kind):
    assert cast(["1_234", "7", "1_2"], kind) == [None, 7, None]


def test_a_column_in_which_all_is_text_says_how_its_numbers_may_be_written(staged):
    for cells, table, said in (
        (["12,5", "7,5"], {}, 'declare `decimal: ","`'),
        (["1.5", "2.5"], {"decimal": ","}, "hold a decimal point, where `decimal` is a comma"),
        (["1,234.5", "2,345.5"], {}, "declare `thousands`"),
        (["<5", ">7"], {}, "hold a bound, which is no value"),
    ):
        with pytest.raises(DataError) as error:
            staged({"x": cells}, **as_csv(";", **table))
        assert said in str(error.value)
        assert not any(cell in str(error.value) for cell in cells)


def test_signs_that_cannot_be_told_apart_are_refused(hospital):
    for table in ({"thousands": "."}, {"decimal": ",", "thousands": ","}):
        with pytest.raises(ConfigError, match="is the decimal sign already"):
            hospital.config(tables__labs={"path": "labs.csv", **table})


COMPARATORS = {  # a sign, or OMOP's operator concept: whether the value beside it is one
    **dict.fromkeys(["", "=", "==", "eq", " = ", "4172703", "4172703.0", "0"], True),
    **dict.fromkeys(["<", "<=", ">", ">=", "ad", "~"], False),
    **dict.fromkeys(["4171754", "4171755", "4171756", "4172704", "4171756.0"], False),
}


@pytest.mark.parametrize("file", ["labs{}.csv", "labs{}.parquet"])
def test_a_value_beside_a_comparator_is_a_bound(staged, file):
    columns = {"x": [*range(1, len(COMPARATORS) + 1)], "sign": [*COMPARATORS]}
    found = values(staged(columns, file=file, events__0__comparator="sign"))
    assert dict(zip(COMPARATORS, found, strict=True)) == {
        sign: x if exact else A_BOUND
        for (sign, exact), x in zip(COMPARATORS.items(), columns["x"], strict=True)
    }


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.decimal128(12, 1)], ids=str)
def test_a_comparator_may_be_a_number(staged, kind):
    signs = pa.array([4171756, 4172703, None], pa.int32()).cast(kind)
    found = staged({"x": [1, 2, 3], "sign": signs}, events__0__comparator="sign")
    assert values(found) == [A_BOUND, 2, 3]


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.decimal128(12, 1)], ids=str)
def test_omop_s_0_for_no_operator_makes_no_bound(staged, kind):
    signs = pa.array([0, 0, 4171756], pa.int32()).cast(kind)
    found = staged({"x": [1, 2, 3], "sign": signs}, events__0__comparator="sign")
    assert values(found) == [1, 2, A_BOUND]


def test_a_bound_is_no_feature(staged):
    columns = {"day": [50, 60], "x": [5.0, 2.0], "sign": ["=", "<"]}
    features = staged(columns, events__0__comparator="sign").features()
    assert (features["hdl.last"].item(), features["hdl.count"].item()) == (5, 1)


def test_a_comparator_without_values_is_refused(hospital):
    with pytest.raises(ConfigError, match="comparator: is of values"):
        hospital.config(events__0__numeric_value=None, events__0__comparator="sign")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_duration_is_refused_by_name(staged, unit):
    column = pa.array([timedelta(hours=1), None], pa.duration(unit))
    with pytest.raises(
        DataError, match="column 'x' holds durations, whose unit a number would not"
    ):
        staged({"x": column})


def test_a_duration_that_nothing_reads_does_no_harm(staged):
    column = pa.array([timedelta(hours=1)], pa.duration("us"))
    assert values(staged({"x": [5.0], "stay": column})) == [5]
