#!/usr/bin/env bash
# pyreadstat 1.3.7: one SAS date after the year 9999 stops the reading of a whole file.
#
# SAS counts its days from 1960 to the year 19900, and 31 December 9999 is a common way to say "open
# end", from which arithmetic leads beyond. One would have guessed a missing value, or the number, in
# that cell. Instead an OverflowError without the column's or the row's name ends the read; with
# disable_datetime_conversion=True the numbers come, and nobody converts them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pyreadstat==1.3.7 pandas==3.1.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import pandas as pd
import pyreadstat

print("pyreadstat", pyreadstat.__version__)
frame = pd.DataFrame({"ID": [1.0, 2.0], "UNTIL": [22000.0, 6_000_000.0]})
pyreadstat.write_xport(frame, "dates.xpt", variable_format={"UNTIL": "DATE9."}, file_format_version=5)
numbers, meta = pyreadstat.read_xport("dates.xpt", disable_datetime_conversion=True)
print("format", meta.original_variable_types["UNTIL"], "numbers", numbers["UNTIL"].tolist())
try:
    read, _ = pyreadstat.read_xport("dates.xpt")
    print("read", read["UNTIL"].tolist())
    raise SystemExit("this has changed")
except OverflowError as error:
    print("OverflowError:", error)
PYTHON
