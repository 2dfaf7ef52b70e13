"""Text is a time where ISO 8601 or a format says so, in the site's zone, and nowhere else."""

import os
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_sn.errors import ConfigError
from ehr_sn.ingest.store import Store

NEW_YORK, KOLKATA, BERLIN = "America/New_York", "Asia/Kolkata", "Europe/Berlin"
TIMES = {  # text: what it is in UTC
    "2020-01-05": "2020-01-05 00:00",
    "2020-02-29": "2020-02-29 00:00",
    "2020-01-05 10:00": "2020-01-05 10:00",
    "2020-01-05T10:00": "2020-01-05 10:00",
    "2020-01-05 10:00:30": "2020-01-05 10:00:30",
    "2020-01-05T10:00:30.5": "2020-01-05 10:00:30.5",
    "2020-01-05T10:00:30,5": "2020-01-05 10:00:30.5",
    "2020-01-05 10:00:30.123456": "2020-01-05 10:00:30.123456",
    "2020-01-05 10:00:30.123456789": "2020-01-05 10:00:30.123456",
    "2020-01-05 10:00:30,123456789": "2020-01-05 10:00:30.123456",
    "2020-01-05 24:00": "2020-01-06 00:00",
    "2020-02-28T24:00:00": "2020-02-29 00:00",
    "2020-12-31 24:00:00.000": "2021-01-01 00:00",
    "0001-01-01": "0001-01-01 00:00",
    "9999-12-31 23:59:59": "9999-12-31 23:59:59",
}
MOMENTS = {  # the same, whatever the site's zone
    "2020-01-05T10:00Z": "2020-01-05 10:00",
    "2020-01-05T10:00:00z": "2020-01-05 10:00",
    "2020-01-05 10:00:00 Z": "2020-01-05 10:00",
    "2020-01-05 10:00+02": "2020-01-05 08:00",
    "2020-01-05 10:00:00+0200": "2020-01-05 08:00",
    "2020-01-05T10:00:00+02:00": "2020-01-05 08:00",
    "2020-01-05 10:00:00 +02:00": "2020-01-05 08:00",
    "2020-01-05 10:00:00.000 -0500": "2020-01-05 15:00",
    "2020-01-05T10:00:00,25-08:00": "2020-01-05 18:00:00.25",
    "2020-01-05T10:00:30.123456789Z": "2020-01-05 10:00:30.123456",
    "2020-01-05 10:00+05:45": "2020-01-05 04:15",
    "2020-01-05 10:00+14:00": "2020-01-04 20:00",
    "2020-01-05 10:00+14:30": "2020-01-04 19:30",
    "2020-01-05 10:00-00:00": "2020-01-05 10:00",
    "2020-01-05T24:00:00Z": "2020-01-06 00:00",
    "2020-01-05 24:00+02:00": "2020-01-05 22:00",
}
NO_TIMES = [
    *("20-01-05", "20-20-02", "03/05/20", "05.01.20", "20/01/05"),  # two digits for the year
    *("2020/01/05", "01/05/2020", "05.01.2020", "05-01-2020", "5 January 2020", "Jan 5, 2020"),
    *("2020-1-5", "2020-01-5", "2020-01-05 9:00", "2020-01-05 10:0", "2020-01-05 10"),
    *("20200105", "20200105T100000", "20200105100000", "2020-W01-7", "2020-005"),
    *("2020", "2020-01", "1577836800", "1.5e9", "43835", "43835.5"),
    *("2020-02-30", "2019-02-29", "2020-13-01", "2020-00-10", "2020-01-00"),
    *("2020-01-05 24:01", "2020-01-05 24:00:01", "2020-01-05 25:00", "2020-01-05 10:60"),
    *("2020-01-05 10:00:60", "2020-01-05 10:00:30.", "2020-01-05  10:00", "2020-01-05, 10:00"),
    *("2020-01-05 10:00 BST", "2020-07-01 10:00 EST", "2020-01-05 10:00 IST", "2020-01-05 UTC"),
    *("2020-01-05 10:00 UTC", "2020-01-05 10:00 GMT", "2020-01-05 10:00 Europe/Berlin"),
    *("2020-01-05 10:00 PM", "2020-01-05 08:00:00 PM", "2020-01-05 10:00 AM"),
    *("2020-01-05 10:00+2", "2020-01-05 10:00+25:00", "2020-01-05 10:00-15:00"),
    *("2020-01-05 10:00+02:60", "2020-01-05 10:00+02:00:00", "2020-01-05+02:00", "2020-01-05Z"),
    *("epoch", "infinity", "-infinity", "now", "today", "yesterday", "unknown", "NaT"),
    *("0000-01-01", "-2020-01-05", "2020-01-05 (BC)", "10000-01-01", "9999-12-31 24:00"),
]


def at(written):
    """A time as DuckDB gives it: to the microsecond, which pandas does not hold of every year."""
    return written and datetime.fromisoformat(written)


def all_at(written):
    return [at(one) for one in written]


def in_zone(zone):
    """The clock of a site."""
    return {"unit": "timestamp"} | ({"time_zone": zone} if zone else {})


EVENTS = {"table": "labs", "subject_id": "id", "time": "t", "code": "test", "numeric_value": "x"}


@pytest.fixture
def made(hospital):
    """A function: cells of a column of times, and the site's clock → a configuration that reads it.

    The cells are text, for a CSV, or an array of Arrow's, for Parquet. With `sql`, the times are
    what that makes of the column `t`.
    """
    (hospital.folder / "patients.csv").write_text("id,index,end,age\n1,2020-01-01,2021-01-01,50\n")

    def make(cells, sql=None, time_zone=None, **clock):
        columns = {"id": [1] * len(cells), "t": cells, "test": ["hdl"] * len(cells)}
        columns["x"] = list(range(len(cells)))
        path = "labs.csv"
        if isinstance(cells, list):
            hospital.write(labs=pd.DataFrame(columns))
        else:
            path = "labs.parquet"
            pq.write_table(pa.table(columns), hospital.folder / path)
        tables = {"patients": {"path": "patients.csv"}, "labs": {"path": path}}
        if sql is not None:
            tables |= {"raw": tables["labs"]}
            tables["labs"] = {"sql": f"SELECT id, test, x, {sql} AS t FROM raw"}
        site = {"unit": "timestamp"} | ({"time_zone": time_zone} if time_zone else {})
        events = [EVENTS | {"clock": site | clock}]
        return hospital.config(tables=tables, clock=site, events=events)

    return make


@pytest.fixture
def times(made, stage):
    """A function: the same → the time in UTC that each cell is, and None where it is none."""

    def read(cells, *sql, **clock):
        staged = stage(made(cells, *sql, **clock))
        found = dict(staged.rows("SELECT numeric_value::INT, time FROM events"))
        return [found.get(place) for place in range(len(cells))]

    return read


# -- text ----------------------------------------------------------------------------------------


def test_text_is_a_time_where_it_is_iso_8601_written_out(times):
    written = TIMES | MOMENTS
    assert dict(zip(written, times([*written]), strict=True)) == {
        text: at(time) for text, time in written.items()
    }


def test_other_text_is_no_time(times):
    found = times([*NO_TIMES, "2020-01-05"])
    assert found.pop() is not None
    assert dict(zip(NO_TIMES, found, strict=True)) == dict.fromkeys(NO_TIMES)


def test_what_is_no_time_is_set_aside_and_an_empty_cell_is_told_apart(made, stage):
    staged = stage(made(["2020-01-05", "20-01-05", None, " "]))
    assert staged.quarantine() == [
        ("labs", 2, "time does not parse as a time between the years 1 and 9999"),
        ("labs", 3, "no time"),
        ("labs", 4, "no time"),
    ]


# -- the site's zone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "offset"),
    [("UTC", "00:00"), (NEW_YORK, "05:00"), (KOLKATA, "-05:30"), (BERLIN, "-01:00")],
)
def test_a_time_without_an_offset_is_the_site_s(times, zone, offset):
    sign, hours, minutes = -1 if offset[0] == "-" else 1, *offset.strip("-").split(":")
    later = sign * timedelta(hours=int(hours), minutes=int(minutes))
    local = {text: time for text, time in TIMES.items() if text[:4] == "2020"}
    found = times([*local, *MOMENTS], time_zone=zone)
    assert dict(zip([*local, *MOMENTS], found, strict=True)) == {
        text: at(time) + later for text, time in local.items()
    } | {text: at(time) for text, time in MOMENTS.items()}


def test_a_time_must_be_between_the_years_1_and_9999_in_utc(times):
    edges = ["0001-01-01 12:00", "9999-12-31 12:00", "0001-01-01T00:00+01:00"]
    edges += ["9999-12-31T23:00-01:00"]
    assert [time is not None for time in times(edges)] == [True, True, False, False]
    assert [time is not None for time in times(edges, time_zone=KOLKATA)] == [
        *[True] * 2,
        False,
        False,
    ]
    assert times(["0001-01-01"], time_zone=KOLKATA) == [None]
    assert times(["9999-12-31 20:00"], time_zone=NEW_YORK) == [None]


LATER = {  # zone: local times that are skipped or repeated, and the later moments they may mean
    NEW_YORK: {
        "2020-03-08 01:59": "2020-03-08 06:59",
        "2020-03-08 02:30": "2020-03-08 07:30",
        "2020-03-08 03:00": "2020-03-08 07:00",
        "2020-11-01 00:59": "2020-11-01 04:59",
        "2020-11-01 01:30": "2020-11-01 06:30",
        "2020-11-01 02:00": "2020-11-01 07:00",
    },
    BERLIN: {"2020-03-29 02:30": "2020-03-29 01:30", "2020-10-25 02:30": "2020-10-25 01:30"},
    "Australia/Lord_Howe": {  # whose clocks change by half an hour
        "2020-10-04 02:15": "2020-10-03 15:45",
        "2020-04-05 01:45": "2020-04-04 15:15",
    },
    "America/Sao_Paulo": {"2018-11-04 00:00": "2018-11-04 03:00"},  # a day that begins at 1:00
    "Pacific/Apia": {"2011-12-30 12:00": "2011-12-30 22:00"},  # a day that Samoa left out
}


@pytest.mark.parametrize("zone", LATER)
def test_a_local_time_that_is_skipped_or_repeated_is_the_later_moment(times, zone):
    local, later = [*LATER[zone]], all_at(LATER[zone].values())
    assert times(local, time_zone=zone) == later
    assert times(local, "t::TIMESTAMP", time_zone=zone) == later
    assert times(local, "t::TIMESTAMPTZ", time_zone=zone) == later
    assert times(local, time_zone=zone, format="%Y-%m-%d %H:%M") == later
    assert times(pa.array(all_at(local)), time_zone=zone) == later


def test_a_day_begins_and_ends_when_the_site_s_clocks_say(times):
    days = ["2018-11-03", "2018-11-04"]
    zone = "America/Sao_Paulo"
    begins = all_at(["2018-11-03 03:00", "2018-11-04 03:00"])
    ends = all_at(["2018-11-04 03:00", "2018-11-05 02:00"])
    assert times(days, time_zone=zone) == times(days, "t::DATE", time_zone=zone) == begins
    assert times(days, "known(t)", time_zone=zone) == ends
    assert times(days, "day_end(t::DATE)", time_zone=zone) == ends


def test_an_offset_says_which_of_two_repeated_moments_is_meant(times):
    both = ["2020-11-01 01:30-04:00", "2020-11-01 01:30-05:00"]
    assert times(both, time_zone=NEW_YORK) == all_at(["2020-11-01 05:30", "2020-11-01 06:30"])


# -- columns that have a type --------------------------------------------------------------------

DAY, NOON = date(2020, 1, 5), datetime(2020, 1, 5, 12)
TYPED = [  # an array of Arrow's; zone; the time in UTC
    (pa.array([DAY, None], pa.date32()), None, "2020-01-05 00:00"),
    (pa.array([DAY, None], pa.date64()), None, "2020-01-05 00:00"),
    (pa.array([DAY, None], pa.date32()), NEW_YORK, "2020-01-05 05:00"),
    (pa.array([DAY, None], pa.date32()), KOLKATA, "2020-01-04 18:30"),
    *(
        (pa.array([NOON, None], pa.timestamp(unit)), zone, time)
        for unit in ("s", "ns")
        for zone, time in ((None, "2020-01-05 12:00"), (NEW_YORK, "2020-01-05 17:00"))
    ),
    *(
        (pa.array([NOON, None], pa.timestamp(unit, of)), zone, "2020-01-05 12:00")
        for unit in ("ms", "us")
        for of, zone in (("UTC", NEW_YORK), ("+02:00", None), ("Asia/Tokyo", None))
    ),
]


@pytest.mark.parametrize(
    ("column", "zone", "time"), TYPED, ids=lambda one: str(getattr(one, "type", one))
)
def test_a_typed_column_holds_moments_local_times_or_local_days(times, column, zone, time):
    assert times(column, time_zone=zone) == [at(time), None]


def test_a_format_is_for_what_has_no_type_of_time(times):
    assert times(pa.array([NOON]), format="%d.%m.%Y") == [NOON]
    new_york = {"time_zone": NEW_YORK}
    assert times(pa.array([DAY]), format="%d.%m.%Y", **new_york) == all_at(["2020-01-05 05:00"])
    numbers = pa.array([20200105, 20])
    assert times(numbers, format="%Y%m%d", **new_york) == all_at(["2020-01-05 05:00", None])
    assert times(numbers, **new_york) == [None, None]


@pytest.mark.parametrize("of", ["UTC", "+02:00", "Asia/Tokyo"])
def test_moments_to_the_nanosecond_are_read(times, of):
    """As pandas wrote them up to its version 2."""
    column = pa.array([NOON, None], pa.timestamp("ns", of))
    assert times(column) == times(column, time_zone=NEW_YORK) == [NOON, None]
    assert times(column, "t::TIMESTAMP", time_zone=NEW_YORK) == [NOON, None]


# -- formats -------------------------------------------------------------------------------------

FORMATS = {  # format: texts, with their time in UTC, and of a site in New York
    "%d.%m.%Y": {
        "03.05.2020": ("2020-05-03 00:00", "2020-05-03 04:00"),
        "3.5.2020": ("2020-05-03 00:00", "2020-05-03 04:00"),
        **dict.fromkeys(["03.05.20", "3.5.0020", "2020-05-03", "31.02.2020"], (None, None)),
        **dict.fromkeys(["03.05.2020 10:00", "now", "03.05.2020Z"], (None, None)),
    },
    "%m/%d/%y": {
        "05/03/20": ("2020-05-03 00:00", "2020-05-03 04:00"),
        "12/31/68": ("2068-12-31 00:00", "2068-12-31 05:00"),
        "05/03/2020": (None, None),
    },
    "%Y%m%d": {
        "20200105": ("2020-01-05 00:00", "2020-01-05 05:00"),
        **dict.fromkeys(["200105", "2020-01-05", "202001055"], (None, None)),
    },
    "%d/%m/%Y %I:%M %p": {
        "05/01/2020 01:30 PM": ("2020-01-05 13:30", "2020-01-05 18:30"),
        "05/01/2020 12:30 AM": ("2020-01-05 00:30", "2020-01-05 05:30"),
        **dict.fromkeys(["05/01/2020 13:30 PM", "05/01/20 01:30 PM"], (None, None)),
    },
    "%Y-%m-%d %H:%M %z": {
        "2020-01-05 10:00 +02:00": ("2020-01-05 08:00",) * 2,
        "2020-01-05 10:00 -0530": ("2020-01-05 15:30",) * 2,
        **dict.fromkeys(["2020-01-05 10:00", "20-01-05 10:00 +02:00"], (None, None)),
    },
}


@pytest.mark.parametrize("form", FORMATS)
def test_text_may_be_a_time_by_a_format(times, form):
    texts = [*FORMATS[form]]
    in_utc, in_new_york = (
        dict(zip(texts, all_at(found), strict=True))
        for found in zip(*FORMATS[form].values(), strict=True)
    )
    parsed = f"try_strptime(t, '{form}')"
    for clock, expected in (({}, in_utc), ({"time_zone": NEW_YORK}, in_new_york)):
        assert dict(zip(texts, times(texts, format=form, **clock), strict=True)) == expected
        assert dict(zip(texts, times(texts, parsed, **clock), strict=True)) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_no_word_is_a_time_by_a_format(times, form):
    """DuckDB takes the first three for times in any format."""
    words = ["epoch", "infinity", "-infinity", "now", ""]
    assert times([*words], format=form) == [None] * 5
    assert times([*words], f"strptime(t, '{form}')") == [None] * 5


@pytest.mark.parametrize("form", ["%d.%m.%Y %Z", "%d.%m.%Y %H:%M %p", "%d.%m.%Y %I:%M"])
def test_a_format_that_would_misread_a_time_is_refused(made, form):
    with pytest.raises(ConfigError, match="format: "):
        made(["01.02.2020"], format=form)


# -- SQL -----------------------------------------------------------------------------------------

CASTS = [
    *("t::TIMESTAMP", "CAST(t AS TIMESTAMP)", "TRY_CAST(t AS TIMESTAMP)", "t::DATETIME"),
    *("t::TIMESTAMPTZ", "TRY_CAST(t AS TIMESTAMP WITH TIME ZONE)", "moment(t)", "t"),
]


def times_in_new_york():
    texts = {text: at(time) for text, time in MOMENTS.items()} | dict.fromkeys(NO_TIMES)
    return texts | {
        "2020-01-05": at("2020-01-05 05:00"),
        "2020-01-05 10:00": at("2020-01-05 15:00"),
        "2020-07-05 24:00": at("2020-07-06 04:00"),
    }


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_in_sql_reads_text_by_the_same_grammar(times, cast):
    expected = times_in_new_york()
    assert (
        dict(zip(expected, times([*expected], cast, time_zone=NEW_YORK), strict=True)) == expected
    )


@pytest.mark.parametrize("kind", ["TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_US", "TIMESTAMP_NS"])
def test_a_cast_to_another_precision_reads_text_by_the_same_grammar(times, kind):
    expected = times_in_new_york()
    texts = [text for text in expected if not {".", ","} & {*text}]  # whole seconds
    found = times(texts, f"t::{kind}", time_zone=NEW_YORK)
    assert dict(zip(texts, found, strict=True)) == {text: expected[text] for text in texts}


DAYS = [  # text, zone, the site's day in which it lies
    ("2020-01-05", None, "2020-01-05"),
    ("2020-01-05", NEW_YORK, "2020-01-05"),
    ("2020-01-05 23:30", NEW_YORK, "2020-01-05"),
    ("2020-01-05T23:30Z", None, "2020-01-05"),
    ("2020-01-05T23:30-08:00", None, "2020-01-06"),
    ("2020-01-05T23:30-08:00", "America/Los_Angeles", "2020-01-05"),
    ("2020-01-05T03:30Z", NEW_YORK, "2020-01-04"),
    ("2020-01-05T20:00Z", KOLKATA, "2020-01-06"),
    ("2020-01-05 24:00", NEW_YORK, "2020-01-06"),
    ("05/01/20", None, None),
    ("2020-01-05 10:00 BST", None, None),
    ("epoch", None, None),
]


@pytest.mark.parametrize("cast", ["t::DATE", "TRY_CAST(t AS DATE)"])
def test_a_cast_to_a_date_gives_the_site_s_day(times, cast):
    for zone in (None, NEW_YORK, KOLKATA, "America/Los_Angeles"):
        texts = {text: day for text, of, day in DAYS if of == zone}
        assert times([*texts], f"({cast})::VARCHAR", time_zone=zone) == times(
            [day or "" for day in texts.values()], time_zone=zone
        )


FUNCTIONS = {  # SQL: texts, with their time in UTC, and of a site in New York
    "known(t)": {
        "2020-01-05": ("2020-01-06 00:00", "2020-01-06 05:00"),
        "2020-01-05 10:00": ("2020-01-05 10:00", "2020-01-05 15:00"),
        "2020-01-05T10:00+02:00": ("2020-01-05 08:00", "2020-01-05 08:00"),
    },
    "known(t::DATE)": {"2020-01-05 10:00": ("2020-01-06 00:00", "2020-01-06 05:00")},
    "known(t::TIMESTAMP)": {"2020-01-05": ("2020-01-05 00:00", "2020-01-05 05:00")},
    "day_end(t)": {
        "2020-01-05 10:00": ("2020-01-06 00:00", "2020-01-06 05:00"),
        "2020-01-05T03:00Z": ("2020-01-06 00:00", "2020-01-05 05:00"),
        "2020-03-08": ("2020-03-09 00:00", "2020-03-09 04:00"),  # a day of 23 hours
    },
    "day_end(t, TRUE)": {"2020-01-05": ("2020-01-06 12:00", "2020-01-06 05:00")},
    "day_end(t, FALSE)": {"2020-01-05": ("2020-01-06 00:00", "2020-01-06 05:00")},
    "moment(t)": {"2020-01-05": ("2020-01-05 00:00", "2020-01-05 05:00")},
    "CASE WHEN has_offset(t) THEN t END": {
        **dict.fromkeys(["2020-01-05", "2020-01-05 10:00", "", "2020-01-05Z"], (None, None)),
        **dict.fromkeys(
            ["2020-01-05T10:00Z", "2020-01-05 12:00 +02:00"], ("2020-01-05 10:00",) * 2
        ),
    },
    "CASE WHEN NOT has_offset(t) THEN t END": {
        "2020-01-05": ("2020-01-05 00:00", "2020-01-05 05:00"),
        "2020-01-05T10:00Z": (None, None),
    },
}


@pytest.mark.parametrize("sql", FUNCTIONS)
def test_functions_in_sql_know_the_site_s_day(times, sql):
    texts = [*FUNCTIONS[sql], "2020-02-05T10:00Z", "2020-02-05"]
    in_utc, in_new_york = (all_at(found) for found in zip(*FUNCTIONS[sql].values(), strict=True))
    assert times(texts, sql)[: len(in_utc)] == in_utc
    assert times(texts, sql, time_zone=NEW_YORK)[: len(in_new_york)] == in_new_york


@pytest.mark.parametrize("sql", ["known(t)", "day_end(t)", "day_end(t, TRUE)"])
@pytest.mark.parametrize("zone", [None, NEW_YORK])
def test_what_is_given_and_no_time_is_set_aside_as_such(made, stage, sql, zone):
    staged = stage(made(["2020-01-05", "2020-13-05", "epoch", ""], sql, time_zone=zone))
    reasons = [reason for _, _, reason in staged.quarantine()]
    assert sorted(reasons) == [
        "no time",
        *["time does not parse as a time between the years 1 and 9999"] * 2,
    ]


AGGREGATES = [
    *("min(t)::TIMESTAMP", "TRY_CAST(max(t) AS TIMESTAMPTZ)", "any_value(t)::TIMESTAMP"),
    *("coalesce(min(t), '')::TIMESTAMP", "max(CASE WHEN x = '0' THEN t END)::TIMESTAMP"),
    *("moment(min(t))", "known(min(t))", "CASE WHEN has_offset(min(t)) THEN min(t) END"),
]
OF_EACH_ROW = [
    *("lag(t, 0) OVER (ORDER BY x)::TIMESTAMP", "known(max(t) OVER ())"),
    "(SELECT min(t) FROM raw)::TIMESTAMP",
]


@pytest.mark.parametrize("sql", [*AGGREGATES, *OF_EACH_ROW])
def test_what_is_cast_or_asked_may_be_an_aggregate(made, stage, sql):
    grouped = "GROUP BY ALL" if sql in AGGREGATES else ""
    config = made(["2020-01-05T10:00+02:00"], f"{sql} AS t FROM raw {grouped} --")
    assert stage(config).rows("SELECT time FROM events") == [(at("2020-01-05 08:00"),)]


# -- the machine's zone --------------------------------------------------------------------------

TOLD = "from ehr_sn.config import load_config; from ehr_sn.ingest.store import ingest; print("
TOLD += "ingest(load_config({!r})))"


@pytest.mark.parametrize("zone", [None, BERLIN])
def test_the_store_is_the_same_whatever_the_machine_s_zone(busy, zone):
    labs = pd.read_csv(busy.folder / "labs.csv")
    day = pd.Timestamp("2020-01-01 12:00") + pd.to_timedelta(labs["day"], "D")
    labs["day"] = day.dt.strftime("%Y-%m-%d %H:%M")
    labs.loc[::2, "day"] = day[::2].dt.strftime("%Y-%m-%dT%H:%M-03:00")
    labs.loc[::3, "day"] = day[::3].dt.strftime("%Y-%m-%d")
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    day = pd.Timestamp("2020-01-01 12:00") + pd.to_timedelta(diagnoses["day"], "D")
    busy.write(raw=labs)
    busy.write(".parquet", diagnoses=diagnoses.assign(day=day.dt.tz_localize("UTC")))
    patients = pd.read_csv(busy.folder / "patients.csv")
    for column in ("index", "end"):
        patients[column] = (
            pd.Timestamp("2020-01-01") + pd.to_timedelta(patients[column], "D")
        ).dt.date
    busy.write(".parquet", patients=patients)
    stores = {}
    for machine in ("UTC", "Asia/Tokyo"):
        busy.config(
            data_dir=str(busy.folder / machine.replace("/", "_")),
            clock={"unit": "timestamp"} | ({"time_zone": zone} if zone else {}),
            tables={
                "patients": {"path": "patients.parquet"},
                "diagnoses": {"path": "diagnoses.parquet"},
                "raw": {"path": "raw.csv"},
                "labs": {
                    "sql": "SELECT id, test, x, CASE WHEN length(day) = 10 "
                    "THEN day::DATE + INTERVAL 1 DAY ELSE day::TIMESTAMP END AS day FROM raw "
                    "WHERE x::DOUBLE < 110 UNION ALL "
                    "SELECT id, test, x, day::TIMESTAMPTZ::DATE FROM raw WHERE x::DOUBLE >= 110"
                },
            },
        )
        command = [sys.executable, "-c", TOLD.format(str(busy.folder / "hospital.yaml"))]
        told = subprocess.run(
            command, env=os.environ | {"TZ": machine}, capture_output=True, text=True, check=True
        )
        store = Store(Path(told.stdout.strip()))
        stores[machine] = {
            name: (store.path / f"{name}.parquet").read_bytes()
            for name in ("values", "mask", "labels", "splits", "quarantine")
        }
    assert stores["UTC"] == stores["Asia/Tokyo"]
