"""A DuckDB connection → one in which queries read times and numbers as all of ingest does.

- `moment(x)`: a TIMESTAMPTZ by the grammar of `times`, NULL where x is no time
- `known(x)`: the same, but the end of the day where x is a day without a time; infinite where x is
  given and no time, so that the row is set aside with that reason
- `day_end(x)`: the end of the site's day in which x lies, infinite as `known(x)` is;
  `day_end(x, anywhere)` with TRUE, and without a time zone: when that day has ended everywhere
- `has_offset(x)`: whether x says its offset from UTC
- `written_time(x)`: the time of day as x is written, whatever its offset; of a typed TIMESTAMPTZ,
  the site's
- `id(x)`: an id as text, to join by: 7 also where gaps made it 7.0; NULL for NA, NULL and the like

Those that begin with an underscore take the place of casts and of strptime in queries.
"""

import duckdb

from ehr_sn.ingest.sql import id_text, is_plain_number, literal
from ehr_sn.ingest.times import day_end, moment_of_text, offset_of_text, parsed


def create_functions(db: duckdb.DuckDBPyConnection, time_zone: str | None) -> None:
    """Create the functions above, and give the connection the site's time zone, by default UTC.

    They ask for the type of what they are given, for DuckDB takes no aggregate or subquery as the
    argument of a macro that is defined for several types.
    """
    db.execute(f"SET TimeZone = {literal(time_zone or 'UTC')}")
    create_number_functions(db)
    text = f"(({moment_of_text('x::VARCHAR', time_zone)}) AT TIME ZONE 'UTC')"
    day, safe_day = (
        f"(({day_end('_to_date(x)', time_zone, anywhere)}) AT TIME ZONE 'UTC')"
        for anywhere in (False, True)
    )
    no_time = "CASE WHEN x IS NOT NULL THEN 'infinity'::TIMESTAMPTZ END"
    own = {
        "_to_timestamp": ("TIMESTAMP", "TIMESTAMP", "moment(x)::TIMESTAMP"),
        "_to_date": ("DATE", "DATE", "moment(x)::DATE"),
    }
    bodies = {
        "moment(x)": f"CASE WHEN {_is('VARCHAR')} THEN {text} ELSE TRY_CAST(x AS TIMESTAMPTZ) END",
        **{
            f"{name}(x)": f"CASE WHEN {_is(kind)} THEN TRY_CAST(x AS {to}) ELSE {other} END"
            for name, (kind, to, other) in own.items()
        },
        # DuckDB's own cast of a TIMESTAMPTZ gives none.
        "_to_time(x)": f"""CASE WHEN {_is("TIMESTAMP WITH TIME ZONE")}
            THEN TRY_CAST(TRY_CAST(x AS TIMESTAMP) AS TIME) ELSE TRY_CAST(x AS TIME) END""",
        "day_end(x, anywhere := FALSE)": f"""coalesce(
            CASE WHEN anywhere THEN {safe_day} ELSE {day} END, {no_time})""",
        "known(x)": f"""CASE WHEN {_is("DATE")} OR {_is("VARCHAR")} AND length(x::VARCHAR) = 10
            THEN day_end(x) ELSE coalesce(moment(x), {no_time}) END""",
        "has_offset(x)": f"""CASE WHEN {_is("VARCHAR")}
            THEN {offset_of_text("x::VARCHAR")}
            ELSE {_is("TIMESTAMP WITH TIME ZONE")} AND x IS NOT NULL END""",
        "written_time(x)": rf"""CASE WHEN {_is("VARCHAR")} THEN TRY_CAST(nullif(regexp_extract(
                x::VARCHAR, '[T ](\d\d:\d\d(:\d\d([.]\d+)?)?)', 1), '') AS TIME)
            ELSE _to_time(x) END""",
        "id(x)": id_text("x::VARCHAR"),
        "_strptime(x, f)": parsed("x::VARCHAR", "f"),
    }
    for signature, body in bodies.items():
        db.execute(f"CREATE OR REPLACE MACRO {signature} AS {body}")


def create_number_functions(db: duckdb.DuckDBPyConnection) -> None:
    """Create those that every step of ingest reads numbers by."""
    for name, decimal in (("_number", "."), ("_comma_number", ",")):
        plain = f"CASE WHEN {is_plain_number('x', decimal)} THEN x END"
        db.execute(f"CREATE OR REPLACE MACRO {name} (x VARCHAR) AS {plain}, (x) AS x")


def _is(dtype: str) -> str:
    return f"typeof(x) = {literal(dtype)}"
