"""What cannot be used is set aside with a reason; what can is kept, whatever its neighbours."""

from datetime import date

import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest import events
from ehr_sn.ingest.store import check

PATIENTS = """
id  index  end   age
1   100    1000  50
2   100    1000  60
"""
LABS = """
id  day  test  x
1   50   sbp   120
"""
DIAGNOSES = """
id  day  icd
1   150  E11
"""
PREVALENT = {"diabetes": {"codes": ["E10"], "prevalent": True}}
NO_TIME = "does not parse as a time between the years 1 and 9999"


@pytest.fixture
def staged(hospital, stage):
    """Stage the tables above, of which some are replaced, under a changed configuration."""

    def stage_drawn(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES, **changes):
        hospital.draw(patients=patients, labs=labs, diagnoses=diagnoses)
        return stage(hospital.config(**changes))

    return stage_drawn


def kept(staged, columns="subject_id, numeric_value"):
    return staged.rows(f"SELECT {columns} FROM events WHERE source = 'labs' ORDER BY ALL")


def test_clean_tables_leave_the_quarantine_empty(staged):
    assert staged().quarantine() == []


# -- subjects ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "expected"),
    [
        (["1", "2"], [1, 2]),
        (["1.0", "2.0"], [1, 2]),  # as a table with gaps writes whole numbers
        (["-1", "0"], [-1, 0]),
        (["007", "2"], ["007", "2"]),
        (["A1", "2"], ["2", "A1"]),
        (["1.5", "2"], ["1.5", "2"]),
        (["1e3", "2"], ["1e3", "2"]),
        (["9223372036854775807", "2"], [2, 9223372036854775807]),
        (["9223372036854775808", "2"], ["2", "9223372036854775808"]),
    ],
)
def test_subjects_are_whole_numbers_if_all_are_else_text_as_written(staged, cohort, expected):
    patients = "id index end age \n" + "\n".join(f"{i} 100 1000 50" for i in cohort)
    labs = f"id day test x \n {cohort[0]} 50 sbp 120"
    found = staged(patients, labs, labs.replace("test x", "icd x").replace("sbp", "E11"))
    subjects = [subject for (subject,) in found.rows("SELECT subject_id FROM cohort ORDER BY row")]
    assert subjects == expected
    (event,) = kept(found, "subject_id::VARCHAR")
    assert event[0] == cohort[0].removesuffix(".0")


@pytest.mark.parametrize("other", ["01", "1.4", "0.6", "1e0", "+1", "1_0"])
def test_a_subject_that_only_rounds_or_converts_to_another_is_not_that_one(staged, other):
    found = staged(labs=LABS + f"{other} 50 sbp 130")
    assert kept(found) == [(1, 120)]
    assert found.quarantine() == [("labs", 2, "subject is not in the cohort")]


def test_blanks_around_a_subject_or_code_do_not_count(hospital, stage):
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    (hospital.folder / "labs.csv").write_text('id,day,test,x\n" 1",50,"sbp  ", 120 \n1,60,"  ",9\n')
    found = stage(hospital.config())
    assert kept(found, "subject_id, code, numeric_value") == [(1, "sbp", 120)]
    assert found.quarantine() == [("labs", 2, "no code")]


def test_subjects_with_leading_zeros_stay_apart(staged):
    found = staged(
        "id index end age \n 007 100 1000 50 \n 7 100 1000 60",
        "id day test x \n 007 50 sbp 120 \n 7 50 sbp 130 \n 07 50 sbp 140",
        "id day icd \n 7 150 E11",
    )
    assert kept(found) == [("007", 120), ("7", 130)]
    assert found.labels() == {"007": 0, "7": 1}


# -- rows set aside ------------------------------------------------------------------------------


def test_an_event_without_its_keys_is_set_aside_with_the_reason(staged):
    found = staged(
        labs="""
        id  day     test  x
        .   50      sbp   120
        9   50      sbp   121
        1   .       sbp   122
        1   Monday  sbp   123
        1   1e30    sbp   124
        1   -9e6    sbp   125
        1   nan     sbp   126
        1   50      .     127
        1   50      sbp   128
        1   50      sbp   128.0
        1   50      sbp   129
        """
    )
    assert found.quarantine() == [
        ("labs", 1, "no subject_id"),
        ("labs", 2, "subject is not in the cohort"),
        ("labs", 3, "no time"),
        ("labs", 4, f"time {NO_TIME}"),
        ("labs", 5, f"time {NO_TIME}"),
        ("labs", 6, f"time {NO_TIME}"),
        ("labs", 7, f"time {NO_TIME}"),
        ("labs", 8, "no code"),
        ("labs", 10, "repeats an earlier row"),
    ]
    assert kept(found) == [(1, 128), (1, 129)]


@pytest.mark.parametrize("at_once", [1, 3, 10**6])
def test_repeats_are_found_however_few_hashes_fit_in_memory(staged, monkeypatch, at_once):
    monkeypatch.setattr(events, "HASHES_AT_ONCE", at_once)
    labs = LABS + "\n".join(
        f"1 {day} sbp {x}" for day in (60, 70) for x in (101, 102, 102, 101, ".")
    )
    found = staged(labs=labs + "\n1 60 sbp .\n").quarantine()
    assert found == [("labs", row, "repeats an earlier row") for row in (4, 5, 9, 10, 12)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_typed_columns_say_what_text_says(hospital, stage, suffix):
    midnight = pd.Timestamp("2020-01-01")
    tables = {
        "patients": pd.DataFrame({"id": [1, 2], "index": midnight, "age": 50}),
        "labs": pd.DataFrame(
            {
                "id": [1, 2, 3, 1],
                "day": [midnight, None, midnight, midnight - pd.Timedelta("1h")],
                "test": "sbp",
                "x": [101.5, 102, 103, None],
            }
        ),
        "diagnoses": pd.DataFrame({"id": [1], "day": [midnight], "icd": ["E10"]}),
    }
    hospital.write(suffix, **tables)
    paths = {name: {"path": name + suffix} for name in tables}
    found = stage(
        hospital.config(tables=paths, clock={}, cohort__follow_up_end=None, labels=PREVALENT)
    )
    assert found.quarantine() == [
        ("labs", 2, "no time"),
        ("labs", 3, "subject is not in the cohort"),
    ]
    assert kept(found, "subject_id, time, numeric_value") == [
        (1, midnight - pd.Timedelta("1h"), None),
        (1, midnight, 101.5),
    ]


def test_repeats_are_found_within_one_table_only(staged):
    diagnoses = "id day icd \n 1 50 sbp \n 1 50 sbp \n 1 51 sbp"
    found = staged(
        labs="id day test x \n 1 50 sbp . \n 1 50 sbp .  \n 1 50 sbp 1e2", diagnoses=diagnoses
    )
    assert found.quarantine() == [
        ("diagnoses", 2, "repeats an earlier row"),
        ("labs", 2, "repeats an earlier row"),
    ]


def test_a_patient_without_its_keys_is_set_aside_with_the_reason(staged):
    found = staged(
        """
        id  index   end   age
        1   100     1000  50
        .   100     1000  51
        2   .       1000  52
        3   Monday  1000  53
        4   1e30    1000  54
        5   100     soon  55
        6   100     .     56
        """
    )
    assert found.quarantine() == [
        ("patients", 2, "no subject_id"),
        ("patients", 3, "no prediction time"),
        ("patients", 4, f"prediction time {NO_TIME}"),
        ("patients", 5, f"prediction time {NO_TIME}"),
        ("patients", 6, f"end of follow-up {NO_TIME}"),
    ]
    assert [s for (s,) in found.rows("SELECT subject_id FROM cohort")] == [1, 5, 6]
    assert found.labels() == {1: 1, 5: None, 6: None}


def test_of_alike_patients_the_first_is_kept_and_of_unlike_ones_none(staged):
    found = staged(
        """
        id  index  end   age
        1   100    1000  50
        1   100    1000  50.0
        2   100    1000  60
        2   100    1000  61
        2   100    1000  60
        3   100    1000  70
        3   100    999   70
        4   100    1000  .
        4   100    1000  80
        5   100    1000  90
        5   101    1000  90
        """
    )
    conflict = "subject appears again at this prediction time, with other values"
    assert found.quarantine() == [
        ("patients", 2, "repeats an earlier row"),
        *(("patients", row, conflict) for row in range(3, 10)),
    ]
    assert found.rows("SELECT subject_id FROM cohort ORDER BY row") == [(1,), (5,), (5,)]


def test_columns_that_are_not_configured_make_no_conflict(staged):
    patients = "id index end age clerk \n 1 100 1000 50 Ann \n 1 100 1000 50 Bob"
    assert staged(patients).quarantine() == [("patients", 2, "repeats an earlier row")]


def test_a_table_of_which_nothing_is_usable_is_refused_with_the_reasons(staged, hospital):
    with pytest.raises(DataError) as error:
        staged("id index end age \n . 100 1000 50 \n 1 x 1000 50 \n 2 x 1000 50")
    assert str(error.value) == (
        f"{hospital.folder / 'hospital.yaml'}:{line_of(hospital, 'cohort:')}: cohort: no row of "
        f"table patients is usable (2 rows: prediction time {NO_TIME}; 1 rows: no subject_id)"
    )
    staged(labs="id day test x \n 9 50 sbp 120 \n 8 50 sbp 120")
    with pytest.raises(DataError) as error:
        check(hospital.config())
    assert "events.0: no row of table labs is usable (2 rows: subject is not" in str(error.value)


# -- values made missing -------------------------------------------------------------------------


def test_a_value_that_is_no_number_is_missing_and_its_event_stays(staged):
    found = staged(
        labs="""
        id  day  test  x
        1   50   sbp   120
        1   51   sbp   high
        1   52   sbp   inf
        1   53   sbp   -Infinity
        1   54   sbp   1e19
        1   55   sbp   NaN
        1   56   sbp   .
        1   57   sbp   301
        1   58   sbp   49.9
        1   59   sbp   50
        1   60   sbp   300
        1   61   hdl   301
        """
    )
    endless = "x: not finite, or beyond 1e+18"
    implausible = "sbp: outside the plausible range 50 to 300"
    assert found.quarantine() == [
        ("labs", 2, "x: not a number"),
        ("labs", 3, endless),
        ("labs", 4, endless),
        ("labs", 5, endless),
        ("labs", 8, implausible),
        ("labs", 9, implausible),
    ]
    assert found.rows(
        "SELECT count(*), count(numeric_value) FROM events WHERE source = 'labs'"
    ) == [(12, 4)]
    assert found.features().loc[1, "sbp.count"] == 3


def test_a_static_value_that_is_no_number_is_missing_and_its_patient_stays(staged):
    patients = "id index end age \n 1 100 1000 old \n 2 100 1000 121 \n 3 100 1000 NaN \n 4 1 9 50"
    found = staged(patients)
    assert found.quarantine() == [
        ("patients", 1, "age: not a number"),
        ("patients", 2, "age: outside the plausible range 0 to 120"),
    ]
    assert found.features()["age"].isna().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("table", "text", "key"),
    [
        ("labs", LABS.replace("120", "high"), "events.0.numeric_value: column 'x'"),
        ("patients", PATIENTS.replace("60", "old").replace("50", "old"), "age: column 'age'"),
    ],
)
def test_a_column_without_any_number_is_refused(staged, table, text, key):
    with pytest.raises(DataError) as error:
        staged(**{table: text})
    assert key in str(error.value)
    assert f"of table {table} holds text in all of its" in str(error.value)


def test_a_column_without_any_value_is_a_finding_not_an_error(staged):
    found = staged(labs=LABS.replace("120", ".")).features()
    assert found.filter(like="sbp").isna().all(axis=None)


# -- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clock", "written"),
    [
        ({}, "2020-04-10"),
        ({}, "2020-04-10T00:00:00"),
        ({}, "2020-04-10T00:00:00.000Z"),
        ({}, "2020-04-10T02:00:00+02:00"),
        ({}, "2020-04-09T19:30:00-0430"),
        ({"format": "%d.%m.%Y"}, "10.04.2020"),
        ({"format": "%Y%m%d"}, "20200410"),
        ({"format": "%d/%m/%YT%H:%M%z"}, "10/04/2020T02:00+0200"),
        ({"unit": "days", "origin": "2020-01-01"}, "100"),
        ({"unit": "days", "origin": "2020-04-10T06:00:00"}, "-0.25"),
        ({"unit": "hours", "origin": "2020-01-01"}, "2400"),
        ({"unit": "minutes", "origin": "2020-01-01"}, "144e3"),
        ({"unit": "seconds", "origin": "1970-01-01"}, "1586476800"),
    ],
)
def test_one_moment_may_be_written_in_many_ways(staged, clock, written):
    found = staged(
        labs=f"id day test x \n 1 {written} sbp 120",
        cohort__prediction_time="index",
        events=[
            {
                "table": "labs",
                "subject_id": "id",
                "time": "day",
                "code": "test",
                "numeric_value": "x",
                "clock": clock,
            },
            {"table": "diagnoses", "subject_id": "id", "time": "day", "code": "icd"},
        ],
    )
    assert kept(found, "time::VARCHAR") == [("2020-04-10 00:00:00",)]
    assert found.features().loc[1, "sbp.days_since_last"] == 0


@pytest.mark.parametrize(
    "written", ["infinity", "10.04.2020", "2020-02-30", "20200410", "0000-01-01"]
)
def test_what_is_no_time_is_set_aside(staged, written):
    patients = f"id index end age \n 1 2020-04-10 2024-01-01 50 \n 2 {written} 2024-01-01 50"
    events = "id day test icd x \n 1 2020-01-01 sbp E11 120"
    found = staged(patients, events, events, clock={"unit": "timestamp"})
    assert found.quarantine() == [("patients", 2, f"prediction time {NO_TIME}")]


TYPED_TIMES = (
    pd.to_datetime(["2020-04-10"]),
    pd.to_datetime(["2020-04-10T02:00+02:00"]),
    pd.to_datetime(["2020-04-10"]).as_unit("ns"),
    pd.to_datetime(["2020-04-10"]).as_unit("s"),
    pd.Series([date(2020, 4, 10)]),
)
ISO = (pd.Series(["2020-04-10"]), pd.Categorical(["2020-04-10"]))


@pytest.mark.parametrize(
    ("times", "clock"),
    [
        *((times, {}) for times in (*TYPED_TIMES, *ISO)),
        *((times, {"format": "%d.%m.%Y"}) for times in TYPED_TIMES),  # it is asked of text alone
    ],
)
def test_typed_times_need_no_format(hospital, stage, times, clock):
    hospital.write(
        ".parquet",
        patients=pd.DataFrame({"id": [1], "index": times, "end": times, "age": 50}),
        labs=pd.DataFrame({"id": [1], "day": times, "test": "sbp", "x": 120}),
        diagnoses=pd.DataFrame({"id": [1], "day": times, "icd": "E11"}),
    )
    tables = {name: {"path": f"{name}.parquet"} for name in ("patients", "labs", "diagnoses")}
    found = stage(hospital.config(tables=tables, clock={"unit": "timestamp", **clock}))
    assert kept(found, "time::VARCHAR") == [("2020-04-10 00:00:00",)]
    assert found.quarantine() == []


def test_a_column_of_numbers_is_no_time_on_a_clock_of_timestamps(staged):
    with pytest.raises(DataError, match="2 rows: prediction time is a number: say what it counts"):
        staged(clock={"unit": "timestamp"})


def test_the_prediction_time_may_be_one_number_for_all(staged):
    found = staged(cohort__prediction_time=50)
    assert found.features().loc[1, "sbp.last"] == 120
    assert found.features().loc[1, "sbp.days_since_last"] == 0


def test_the_subject_s_column_may_have_the_store_s_own_name(hospital, stage):
    hospital.draw(
        patients="""
            subject_id index end
            1          100   1000""",
        more="""
            subject_id age
            1          50""",
        labs="""
            subject_id time code value
            1          50   sbp  120""",
        diagnoses="""
            subject_id day icd
            1          150 E11""",
    )
    found = stage(
        hospital.config(
            tables__more={"path": "more.csv"},
            cohort__subject_id="subject_id",
            cohort__join=["more"],
            events__0={
                "table": "labs",
                "subject_id": "subject_id",
                "time": "time",
                "code": "code",
                "numeric_value": "value",
            },
            events__1__subject_id="subject_id",
        )
    )
    assert found.features().loc[1, ["age", "sbp.last"]].tolist() == [50, 120]
    assert found.labels() == {1: 1}


def line_of(hospital, text):
    lines = (hospital.folder / "hospital.yaml").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)
