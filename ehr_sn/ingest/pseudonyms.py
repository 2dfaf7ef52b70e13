"""Subjects' ids in the source tables → pseudonyms, before anything is staged from them.

A pseudonym is HMAC-SHA256 of the id, as text, under a secret key: whoever lacks the key can neither
undo it nor try ids out.
"""

import hmac

import duckdb
import pyarrow as pa
from duckdb.func import PythonUDFType

from ehr_sn.config import Config
from ehr_sn.ingest.cells import as_subject, subject_type_of
from ehr_sn.ingest.sql import identifier, literal, source

DIGITS = 32  # hexadecimal: 128 bits, so that no two of any hospital's patients get the same
_NOBODY = ""  # instead of the id of a subject who is not in the cohort


def pseudonymise(db: duckdb.DuckDBPyConnection, config: Config, in_order: bool = False) -> None:
    """Put pseudonyms in the place of ids in all tables of `source`; nothing if no key is named.

    Ids that are equal where they are compared (`as_subject`) get the same pseudonym, in every table
    and every data set. With `in_order`, no subject is twice in the cohort's table, the only one;
    its rows keep their order.
    """
    key = config.pseudonym_key
    if key is None:
        return
    subject_type = subject_type_of(db, config)
    create_function(db, key)
    cohort = config.cohort
    if not in_order:
        db.execute(
            f"""CREATE TABLE pseudonyms AS SELECT id, pseudonym(id::VARCHAR) AS pseudonym FROM
            (SELECT DISTINCT {as_subject(cohort.subject_id, subject_type)} AS id
            FROM {source(cohort.table)}) WHERE id IS NOT NULL"""
        )
    listed = "SELECT view_name FROM duckdb_views() WHERE schema_name = 'source'"
    views = {name for (name,) in db.execute(listed).fetchall()}
    for table in config.tables:
        columns = config.subject_columns(table)
        if not columns:
            continue
        with_ids = f"{table} with ids"  # no table's name has blanks
        kind = "VIEW" if table in views else "TABLE"
        db.execute(f"ALTER {kind} {source(table)} RENAME TO {identifier(with_ids)}")
        if in_order:
            made = f"pseudonym({as_subject(cohort.subject_id, subject_type)}::VARCHAR)"
            db.execute(
                f"""CREATE TABLE {source(table)} AS SELECT
                * REPLACE ({made} AS {identifier(cohort.subject_id)}) FROM {source(with_ids)}"""
            )
            continue
        places = {column: f"p{i}" for i, column in enumerate(columns)}
        ids = ", ".join(
            f"{as_subject(column, subject_type)} AS {identifier(f'{place} id')}"
            for column, place in places.items()
        )
        made = ", ".join(
            f"""CASE WHEN t.{identifier(column)} IS NOT NULL
                THEN coalesce({place}.pseudonym, {literal(_NOBODY)}) END AS {identifier(column)}"""
            for column, place in places.items()
        )
        joins = " ".join(
            f"LEFT JOIN pseudonyms {place} ON t.{identifier(f'{place} id')} = {place}.id"
            for place in places.values()
        )
        without = ", ".join(identifier(f"{place} id") for place in places.values())
        db.execute(
            f"""CREATE VIEW {source(table)} AS SELECT t.* EXCLUDE ({without}) REPLACE ({made})
            FROM (SELECT *, {ids} FROM {source(with_ids)}) t {joins}"""
        )
    db.execute("SET VARIABLE subject_type = 'VARCHAR'")


def create_function(db: duckdb.DuckDBPyConnection, key: bytes) -> None:
    """Let DuckDB compute `pseudonym(id)` of text."""

    def pseudonyms(ids: pa.Array) -> pa.Array:
        return pa.array(
            [hmac.digest(key, one.encode(), "sha256").hex()[:DIGITS] for one in ids.to_pylist()]
        )

    db.create_function("pseudonym", pseudonyms, ["varchar"], "varchar", type=PythonUDFType.ARROW)
