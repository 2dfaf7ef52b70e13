#!/usr/bin/env bash
# DuckDB 2.0.0: TRY_CAST between two types that have no cast binds, and gives NULL in every row.
#
# One would have guessed an error when the query is bound, as of a function that does not exist:
# TRY_CAST is there for values that cannot be converted, not for types. The plain CAST fails, but only
# when the first row is read; on an empty table it passes, too. Two pairs are easily met: the time of
# day of a TIMESTAMPTZ, and the TIMESTAMPTZ_NS as which DuckDB reads a Parquet column of nanoseconds
# with a time zone (as pandas 2 writes it), cast to TIMESTAMP.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.0 pyarrow==25.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

print("duckdb", duckdb.__version__)
db = duckdb.connect()
db.execute("SET TimeZone = 'UTC'")
nanoseconds = pa.array([1577872800000000000], pa.timestamp("ns", tz="UTC"))
pq.write_table(pa.table({"t": nanoseconds}), "ns.parquet")
db.execute("CREATE TABLE us AS SELECT TIMESTAMPTZ '2020-01-01 10:00:00+00' AS t")
db.execute("CREATE TABLE ns AS SELECT t FROM 'ns.parquet'")
changed = False
for table, target in (("us", "TIME"), ("ns", "TIMESTAMP")):
    ((kind, value),) = db.execute(f"SELECT typeof(t), TRY_CAST(t AS {target}) FROM {table}").fetchall()
    empty = db.execute(f"SELECT CAST(t AS {target}) FROM {table} WHERE FALSE").fetchall()
    try:
        db.execute(f"SELECT CAST(t AS {target}) FROM {table}").fetchall()
        said = "passes"
    except duckdb.Error as error:
        said = str(error).splitlines()[0]
    print(f"{kind} to {target}: TRY_CAST gives {value}; CAST of no row {empty}, of one: {said}")
    changed |= value is not None or "Unimplemented" not in said
raise SystemExit("this has changed" if changed else 0)
PYTHON
