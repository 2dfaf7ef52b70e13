"""Names, texts, durations and columns of tables, as DuckDB's SQL writes them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import duckdb

BLANKS = " \t\n\r\v\f\u00a0\u1680\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
BLANKS += "".join(map(chr, range(0x2000, 0x200C)))  # from the en quad to the zero width space
NOBODY = ("NA", "N/A", "#N/A", "<NA>", "NULL", "(NULL)", "\\N", "NONE", "NAN", "NAT", ".", "?")
DAY = 86_400e6  # microseconds
YEAR = 365.25 * DAY


def identifier(name: str) -> str:
    """`name` as an SQL identifier.

    >>> print(identifier("heart rate"))
    "heart rate"
    """
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string.

    >>> literal("Crohn's")
    "'Crohn''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def literals(texts: tuple[str, ...]) -> str:
    """Several SQL strings, separated by commas."""
    return ", ".join(literal(text) for text in texts)


def days(length: float) -> str:
    """An interval of so many days, to the microsecond.

    >>> days(1.5)
    'to_microseconds(129600000000)'
    """
    return f"to_microseconds({int(length * DAY)})"


def trimmed(text: str) -> str:
    """SQL for a text without blanks of any kind around it; a file's cells have no plain ones."""
    return f"trim({text}, {literal(BLANKS)})"


def stands_for_nobody(text: str) -> str:
    """SQL that is true of an id, as text, which stands for a missing one."""
    return f"upper({trimmed(text)}) IN ({literals(('', *NOBODY))})"


def id_text(text: str) -> str:
    """SQL for an id, given as text, as ids are compared: 7 also where it is 7.0; NULL for nobody.

    >>> duckdb.sql(f"SELECT {id_text('a')} FROM (VALUES (' 7.0'), ('n/a ')) t(a)").fetchall()
    [('7',), (None,)]
    """
    whole = rf"regexp_replace({trimmed(text)}, '^(0|-?[1-9]\d*)\.0+$', '\1')"
    return f"CASE WHEN NOT {stands_for_nobody(text)} THEN {whole} END"


def source(table: str) -> str:
    """A loaded table as SQL names it."""
    return f"source.{identifier(table)}"


def is_plain_number(text: str, decimal: str = ".") -> str:
    """SQL that is false of a text which DuckDB takes for a number and people do not.

    That is `1_234`; and, of a table with decimal commas, `1.234`: there a number with a comma got
    an exponent when it was read (`12,5` became 12.5e+00), so that it differs from one with a point.
    """
    if decimal == ".":
        return f"NOT contains({text}, '_')"
    marked = f"contains({text}, 'e+00') OR contains({text}, 'e-00')"
    return f"NOT contains({text}, '_') AND (NOT contains({text}, '.') OR {marked})"


def number(value: str, decimal: str = ".") -> str:
    """SQL for a value as a double; NaN is how some tables write a missing one."""
    function = "_number" if decimal == "." else "_comma_number"
    return f"nullif(TRY_CAST({function}({value}) AS DOUBLE), 'nan'::DOUBLE)"


TIME_TYPES = ("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE")  # each can hold the one before it


def as_text(value: str, dtype: str) -> str:
    """SQL for a typed value as a text file would write it: 7 also where gaps made it 7.0."""
    if dtype not in ("FLOAT", "DOUBLE") and not dtype.startswith("DECIMAL"):
        return f"({value})::VARCHAR"
    whole = f"TRY_CAST({value} AS BIGINT)"
    return f"CASE WHEN {whole} = {value} THEN {whole}::VARCHAR ELSE ({value})::VARCHAR END"


def typed_columns(db: duckdb.DuckDBPyConnection, relation: str) -> list[tuple[str, str, str]]:
    """Columns of a source that has types: name, SQL, and its type: number, date, time or text."""
    columns = []
    for name, dtype, *_ in db.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall():
        column = identifier(name)
        if dtype in ("FLOAT", "DOUBLE"):
            sql, kind = f"nullif({column}, 'nan')", dtype
        elif dtype == "BOOLEAN":
            sql, kind = f"{column}::TINYINT", "TINYINT"
        elif dtype in TIME_TYPES:
            sql, kind = column, dtype
        elif dtype == "TIMESTAMPTZ_NS":
            sql, kind = f"TRY_CAST({column} AS TIMESTAMPTZ)", "TIMESTAMP WITH TIME ZONE"
        elif dtype.startswith("TIMESTAMP"):  # of another precision
            sql, kind = f"TRY_CAST({column} AS TIMESTAMP)", "TIMESTAMP"
        elif is_number(dtype):
            sql, kind = column, dtype
        elif dtype == "BLOB":  # text of which its writer did not say so
            sql, kind = f"nullif(trim(TRY(decode({column}))), '')", "VARCHAR"
        else:
            sql, kind = f"nullif(trim({column}::VARCHAR), '')", "VARCHAR"
        columns.append((name, sql, kind))
    return columns


class AnyCase(Mapping[str, Any]):
    """What is known by a column's name, which SQL takes as the same in upper and lower case.

    >>> types = AnyCase({"SEQN": "BIGINT"})
    >>> types["seqn"], "Seqn" in types, list(types)
    ('BIGINT', True, ['SEQN'])
    """

    def __init__(self, known: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()):
        self._known = {name.lower(): (name, value) for name, value in dict(known).items()}

    def __getitem__(self, name: str) -> Any:
        return self._known[name.lower()][1]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._known.values())

    def __len__(self) -> int:
        return len(self._known)


def is_integer(dtype: str) -> bool:
    return re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?", dtype) is not None


def is_number(dtype: str) -> bool:
    exact = is_integer(dtype) or re.fullmatch(r"DECIMAL\(\d+,\d+\)", dtype) is not None
    return exact or dtype in ("FLOAT", "DOUBLE")
