"""What a cell means as a time → SQL that gives that time in UTC, for every source and every query.

Text is a time where it is ISO 8601, written out: YYYY-MM-DD, then maybe T or a blank and hh:mm,
hh:mm:ss or hh:mm:ss.ffffff (a comma serves as well; digits beyond the sixth are cut off; 24:00 is
the day's end), then maybe, with or without a blank, Z, ±hh, ±hhmm or ±hh:mm, up to 14:59; or where
it is as the clock's `format` says. Nothing else is a time: no year of two digits, no abbreviated
zone, no AM or PM without a format.

A time without an offset is the site's (`clock.time_zone`), else UTC. A local time that the site's
clocks skip or repeat is the later of the moments that it may mean, so that no feature knows of it
too early. A day without a time begins at midnight; `known` and `day_end` take its end.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from ehr_sn.config import Clock
from ehr_sn.ingest.sql import identifier, literal, trimmed

NO_TIME = "does not parse as a time between the years 1 and 9999"

_DAY = r"\d{4}-\d\d-\d\d"
_HOURS = r"(([01]\d|2[0-3]):[0-5]\d(:[0-5]\d([.,]\d+)?)?|24:00(:00([.,]0+)?)?)"
_OFFSET = r" ?([Zz]|[+-](0\d|1[0-4])(:?[0-5]\d)?)"
_LOCAL = rf"{_DAY}([T ]{_HOURS})?"
_PLAIN = rf"{_DAY}([T ]([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?Z?)?"  # as DuckDB reads it at once
_WITH_OFFSET = rf"{_DAY}[T ]{_HOURS}{_OFFSET}"
_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
_YEAR_OF_FOUR_DIGITS = 1000  # from which a year that a format reads cannot have lost two digits
_ANYWHERE = 36  # hours after which a day that began at midnight in UTC has ended everywhere


def as_time(
    column: str | float | datetime | None,
    clock: Clock,
    types: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """SQL for a column, a number on the clock or a date, as a timestamp in UTC; NULL if no time."""
    if column is None:
        return "NULL::TIMESTAMP"
    if isinstance(column, datetime):
        if column.tzinfo:
            return _stamp(column.astimezone(UTC).replace(tzinfo=None))
        return _from_local(_stamp(column), clock.time_zone)
    written = identifier(column) if isinstance(column, str) else repr(column)
    if clock.unit != "timestamp":
        since = f"TRY_CAST({written} AS DOUBLE) * {_SECONDS[clock.unit]}e6"
        origin = clock.origin
        counted = f"to_microseconds(CAST({since} AS BIGINT))"
        if origin.tzinfo:
            time = f"TRY({as_time(origin, clock)} + {counted})"
        else:
            time = _from_local(f"TRY({_stamp(origin)} + {counted})", clock.time_zone)
    else:
        time = moment_of(types.get(str(column), "VARCHAR"), written, clock)
    return f"""CASE WHEN {time} >= TIMESTAMP '0001-01-01' AND {time} < TIMESTAMP '10000-01-01'
        THEN {time} END"""


def why_no_time(name: str, given: str) -> str:
    """SQL for why what is given is no usable time: a number, on a clock that does not count?"""
    counted = f"{name} is a number: say what it counts, and from when, in `clock`"
    return f"""CASE WHEN regexp_full_match({given}::VARCHAR, '-?[0-9]{{1,7}}([.][0-9]+)?')
        THEN {literal(counted)} ELSE {literal(f"{name} {NO_TIME}")} END"""


def moment_of_text(text: str, time_zone: str | None = None) -> str:
    """SQL for a text as a timestamp in UTC, NULL where it is no time."""
    local = _from_local(f"TRY_CAST({text} AS TIMESTAMP)", time_zone)
    if time_zone is not None:
        in_utc = f"TRY_CAST({text} AS TIMESTAMP)"
        local = f"CASE WHEN ends_with({text}, 'Z') THEN {in_utc} ELSE {local} END"
    point = f"replace({text}, ',', '.')"
    uncommon_local = _from_local(f"TRY_CAST({point} AS TIMESTAMP)", time_zone)
    tight = f"replace(replace(upper({point}), ' +', '+'), ' -', '-')"
    aware = _in_utc(f"TRY_CAST(replace({tight}, ' Z', 'Z') AS TIMESTAMPTZ)")
    return rf"""CASE WHEN regexp_full_match({text}, '{_PLAIN}') THEN {local}
        WHEN regexp_full_match({text}, '{_WITH_OFFSET}') THEN {aware}
        WHEN regexp_full_match({text}, '{_LOCAL}') THEN {uncommon_local} END"""


def offset_of_text(text: str) -> str:
    """SQL that is true of a text which is a time and says its offset from UTC."""
    return f"coalesce(regexp_full_match({text}, '{_WITH_OFFSET}'), FALSE)"


def moment_by_format(text: str, form: str, time_zone: str | None) -> str:
    """SQL for a text that is written by a format, as a timestamp in UTC; NULL where it is not."""
    time = parsed(text, literal(form))
    return _in_utc(time) if "%z" in form else _from_local(time, time_zone)


def parsed(text: str, form: str) -> str:
    """SQL for what strptime makes of a text by a format, or a list of formats, given as SQL.

    DuckDB reads %Y from two digits, too (03.05.20 would be in the year 20), and words such as
    infinity in any format.
    """
    time = f"try_strptime({text}, {form})"
    sound = f"year({time}) >= {_YEAR_OF_FOUR_DIGITS} AND regexp_matches({text}, '[0-9]')"
    return f"CASE WHEN {sound} THEN {time} END"


def day_end(day: str, time_zone: str | None, anywhere: bool = False) -> str:
    """SQL for the end of a day, given as SQL for a DATE, as a timestamp in UTC.

    Without a time zone a day ends at midnight in UTC or, with `anywhere`, when it has ended
    everywhere.
    """
    if time_zone is None and anywhere:
        return f"({day} + INTERVAL {_ANYWHERE} HOUR)"
    return _from_local(f"({day} + INTERVAL 1 DAY)", time_zone)


def years_later(time: str, years: int, time_zone: str | None) -> str:
    """SQL for a timestamp in UTC so many years later by the site's calendar."""
    return _from_local(f"({_to_local(time, time_zone)} + to_years({years}))", time_zone)


def day_of(time: str, time_zone: str | None) -> str:
    """SQL for the site's day of a timestamp in UTC."""
    return f"{_to_local(time, time_zone)}::DATE"


def moment_of(dtype: str, written: str, clock: Clock) -> str:
    """SQL for what is of one of DuckDB's types, on a clock of timestamps, as a timestamp in UTC."""
    match dtype:
        case "TIMESTAMP WITH TIME ZONE":
            return _in_utc(written)
        case "TIMESTAMP":
            return _from_local(written, clock.time_zone)
        case "DATE":
            return _from_local(f"TRY_CAST({written} AS TIMESTAMP)", clock.time_zone)
        case "VARCHAR" if clock.format is None:
            bare = f"CASE WHEN {written} IS NOT NULL THEN {trimmed(written)} END"
            as_it_is, without_blanks = (
                moment_of_text(text, clock.time_zone) for text in (written, bare)
            )
            return f"coalesce({as_it_is}, {without_blanks})"
    if clock.format is None:
        return "NULL::TIMESTAMP"  # a number, on a clock that does not count
    return moment_by_format(trimmed(f"{written}::VARCHAR"), clock.format, clock.time_zone)


def _stamp(time: datetime) -> str:
    return f"TIMESTAMP {literal(time.isoformat(sep=' '))}"


def _from_local(time: str, time_zone: str | None) -> str:
    """SQL for a local timestamp in UTC."""
    if time_zone is None or time_zone == "UTC":
        return time
    return _in_utc(f"({time} AT TIME ZONE {literal(time_zone)})")


def _to_local(time: str, time_zone: str | None) -> str:
    if time_zone is None or time_zone == "UTC":
        return time
    return f"(({time} AT TIME ZONE 'UTC') AT TIME ZONE {literal(time_zone)})"


def _in_utc(moment: str) -> str:
    """SQL for a TIMESTAMPTZ as a timestamp in UTC: as AT TIME ZONE 'UTC' gives it, but quicker."""
    return f"CASE WHEN isfinite({moment}) THEN make_timestamp(epoch_us({moment})) END"
