#!/usr/bin/env bash
# DuckDB 2.0.0: strptime takes the words epoch and infinity in any format, and two digits for %Y.
#
# One would have guessed NULL from try_strptime for text that is not as the format says. Instead
# 'epoch', 'infinity' and '-infinity' become 1900-01-01, a day like any other; and '%d.%m.%Y' reads
# 03.05.20 as a day of the year 20, where Python's strptime wants four digits of %Y.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.0
"$folder/venv/bin/python" - <<'PYTHON'
from datetime import datetime

import duckdb

print("duckdb", duckdb.__version__)
db = duckdb.connect()
expected = {
    "epoch": datetime(1900, 1, 1),
    "infinity": datetime(1900, 1, 1),
    "-infinity": datetime(1900, 1, 1),
    "03.05.20": datetime(20, 5, 3),
    "tomorrow": None,
}
found = {}
for text in expected:
    ((found[text],),) = db.execute("SELECT try_strptime(?, '%d.%m.%Y')", [text]).fetchall()
    print(f"try_strptime({text!r}, '%d.%m.%Y') gives {found[text]}")
raise SystemExit("this has changed" if found != expected else 0)
PYTHON
