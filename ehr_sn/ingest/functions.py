"""A DuckDB connection → one in which queries read times and numbers as all of ingest does.

- `moment(x)`: a TIMESTAMPTZ by the grammar of `times`, NULL where x is no time
- `known(x)`: the same, but the end of the day where x is a day without a time; infinite where x is
  given and no time, so that the row is set aside with that reason
- `day_end(x)`: the end of the site's day in which x lies, infinite as `known(x)` is;
  `day_end(x, anywhere)` with TRUE, and without a time zone: when that day has ended everywhere
- `has_offset(x)`: whether x says its offset from UTC

Those that begin with an underscore take the place of casts and of strptime in queries.
"""

import duckdb

from ehr_sn.ingest.sql import identifier, is_plain_number, literal
from ehr_sn.ingest.times import WITH_OFFSET, YEAR_OF_FOUR_DIGITS, day_end, moment_of_text

_TYPES = ("x VARCHAR", "x DATE", "x TIMESTAMP", "x TIMESTAMPTZ")


def create_functions(db: duckdb.DuckDBPyConnection, time_zone: str | None) -> None:
    """Create the functions above, and give the connection the site's time zone, by default UTC."""
    db.execute(f"SET TimeZone = {literal(time_zone or 'UTC')}")
    moment = f"(({moment_of_text('x', time_zone)}) AT TIME ZONE 'UTC')"
    no_time = "CASE WHEN x IS NOT NULL THEN 'infinity'::TIMESTAMPTZ END"
    day, safe_day = (
        f"""coalesce(({day_end("_to_date(x)", time_zone, anywhere)}) AT TIME ZONE 'UTC',
            {no_time})"""
        for anywhere in (False, True)
    )
    _create(
        db,
        "moment",
        {"x VARCHAR": moment, "x DATE": "x::TIMESTAMPTZ", "x TIMESTAMP": "x::TIMESTAMPTZ"}
        | {"x TIMESTAMPTZ": "x"},
    )
    _create(
        db, "_to_timestamp", dict.fromkeys(_TYPES, "moment(x)::TIMESTAMP") | {"x TIMESTAMP": "x"}
    )
    # DuckDB's own cast of a TIMESTAMPTZ gives none.
    of_day = dict.fromkeys(("x VARCHAR", "x TIME", "x TIMESTAMP"), "TRY_CAST(x AS TIME)")
    _create(db, "_to_time", of_day | {"x TIMESTAMPTZ": "TRY_CAST(x::TIMESTAMP AS TIME)"})
    _create(db, "_to_date", dict.fromkeys(_TYPES, "moment(x)::DATE") | {"x DATE": "x"})
    _create(
        db,
        "day_end",
        dict.fromkeys(_TYPES, day)
        | {
            f"{x}, anywhere BOOLEAN": f"CASE WHEN anywhere THEN {safe_day} ELSE {day} END"
            for x in _TYPES
        },
    )
    _create(
        db,
        "known",
        {
            "x VARCHAR": f"""coalesce(
                CASE WHEN length(x) = 10 THEN {day} ELSE {moment} END, {no_time})""",
            "x DATE": day,
            "x TIMESTAMP": "x::TIMESTAMPTZ",
            "x TIMESTAMPTZ": "x",
        },
    )
    _create(
        db,
        "has_offset",
        dict.fromkeys(_TYPES, "x IS NULL AND FALSE")
        | {
            "x VARCHAR": f"coalesce(regexp_full_match(x, '{WITH_OFFSET}'), FALSE)",
            "x TIMESTAMPTZ": "x IS NOT NULL",
        },
    )
    for name, decimal in (("_number", "."), ("_comma_number", ",")):
        plain = f"CASE WHEN {is_plain_number('x', decimal)} THEN x END"
        # TRY_CAST would give NULL in every row.
        no_number = f"CASE WHEN x IS NOT NULL THEN error({literal('a time is no number')}) END"
        times = dict.fromkeys(_TYPES[1:], f"{no_number}::BIGINT")
        _create(db, name, {"x VARCHAR": plain, "x": "x"})
        _create(db, f"_cast{name}", {"x VARCHAR": plain, **times, "x": "x"})
    parsed = "try_strptime(x, f)"
    dated = f"CASE WHEN year({parsed}) >= {YEAR_OF_FOUR_DIGITS} THEN {parsed} END"
    _create(db, "_strptime", {"x, f": dated})


def _create(db: duckdb.DuckDBPyConnection, name: str, bodies: dict[str, str]) -> None:
    defined = ", ".join(f"({parameters}) AS {body}" for parameters, body in bodies.items())
    db.execute(f"CREATE OR REPLACE MACRO {identifier(name)} {defined}")
