#!/usr/bin/env bash
# DuckDB 2.0.0: to plan a SELECT takes time that grows with the square of its columns, or faster.
#
# One would have guessed that planning takes twice as long for twice as many columns, each computed
# from one column of its own. Instead four times as many take more than eight times as long, on an
# empty table: nothing is read. Most of it is the optimiser that looks for common subexpressions,
# though no two columns share one; SET disabled_optimizers = 'common_subexpressions' spares it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import time

import duckdb

print("duckdb", duckdb.__version__)
NUMBER = "TRY_CAST(c{0} AS DOUBLE)"


def seconds(columns, disabled):
    with duckdb.connect() as db:
        db.execute(f"SET disabled_optimizers = '{disabled}'")
        db.execute("CREATE TABLE t (" + ", ".join(f"c{i} VARCHAR" for i in range(columns)) + ")")
        cells = (
            f"CASE WHEN {NUMBER} NOT IN (1, 2) THEN {NUMBER} END AS d{{0}}".format(i)
            for i in range(columns)
        )
        started = time.process_time()
        db.execute("EXPLAIN SELECT " + ", ".join(cells) + " FROM t").fetchall()
        return time.process_time() - started


few, many = seconds(250, ""), seconds(1000, "")
without = seconds(1000, "common_subexpressions")
print(f"250 columns {few:.2f} s, 1,000 columns {many:.2f} s ({many / few:.0f} times as long)")
print(f"1,000 columns without common_subexpressions {without:.2f} s")
raise SystemExit("this has changed" if many < 8 * few or many < 2 * without else 0)
PYTHON
