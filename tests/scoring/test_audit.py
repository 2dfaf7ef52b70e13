"""The audit log: what was changed after it was written is found."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ehr_sn.errors import EhrSnError
from ehr_sn.scoring.audit import append, verify


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "audit.jsonl"
    for version in range(4):
        append(path, "promote", model="ehr_sn.clinic.diabetes", version=version)
    return path


def test_lines_say_when_who_and_what_and_only_the_owner_reads_them(log: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(line["when"] and line["who"] and line["what"] == "promote" for line in lines)
    assert verify(log) == (4, lines[-1]["sha256"])
    assert log.stat().st_mode & 0o777 == 0o600
    assert verify(log.with_name("none.jsonl"))[0] == 0


def test_many_at_once_make_one_chain(log: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append(log, "score", rows=i), range(40)))
    assert verify(log)[0] == 44


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace('"version": 1', '"version": 7'), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:3], lines[3][:-20]], 4),
        (lambda lines: [*lines, "{}\n"], 5),
    ],
    ids=["altered", "taken out", "beheaded", "moved", "repeated", "torn", "foreign"],
)
def test_a_tampered_log_is_found_and_its_line_named(log: Path, change, line: int) -> None:
    log.write_text("".join(change(log.read_text().splitlines(keepends=True))))
    with pytest.raises(EhrSnError, match=rf"audit\.jsonl:{line}: "):
        verify(log)


def test_nothing_is_added_after_a_line_that_was_altered(log: Path) -> None:
    text = log.read_text()
    log.write_text(text.replace('"version": 3', '"version": 4'))
    before = log.read_bytes()
    with pytest.raises(EhrSnError, match="is not as it was written"):
        append(log, "rollback")
    assert log.read_bytes() == before
