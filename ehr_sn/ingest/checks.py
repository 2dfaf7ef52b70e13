"""Staged tables and feature statistics → findings: what in the data a person should know about."""

from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np

from ehr_sn.config import Config
from ehr_sn.errors import did_you_mean
from ehr_sn.ingest.codes import CodeFile, Entry, written
from ehr_sn.ingest.features import Feature
from ehr_sn.ingest.tables import identifier, literals

SAMPLED_SUBJECTS = 2_000
MIN_SHARED_MOMENTS = 20
SHOWN_FROM_SUBJECTS = 5  # a rarer code may be free text about one patient: it is never shown
REPEATS_FROM = 0.99  # share of equal values from which a code is said to repeat another
SAME_LINE_FROM = 0.9999  # correlation from which a column is said to be another in other units


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: which check, about what, and how many of how many."""

    check: str
    where: str
    count: int
    of: int
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class FeatureStatistics:
    """Counts over the feature matrix, gathered block by block."""

    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: int = 0
    empty_rows: int = 0

    @classmethod
    def of(cls, features: int) -> "FeatureStatistics":
        return cls(
            np.zeros(features, dtype=np.int64),
            np.full(features, np.inf),
            np.full(features, -np.inf),
        )

    def add(self, block: np.ndarray) -> None:
        """Count one block of shape (rows, features), NaN = missing."""
        mask = ~np.isnan(block)
        self.rows += len(block)
        self.observed += mask.sum(axis=0)
        self.empty_rows += int((~mask.any(axis=1)).sum())
        self.low = np.fmin(self.low, np.fmin.reduce(block, axis=0))
        self.high = np.fmax(self.high, np.fmax.reduce(block, axis=0))


def find_all(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    features: list[Feature],
    statistics: FeatureStatistics,
    table_rows: dict[str, int],
) -> list[Finding]:
    """Every check, the most alarming first."""
    return [
        *_repeated_codes(db),
        *_repeated_columns(db, features),
        *_quarantined(db, table_rows),
        *_absent_codes(db, config),
        *_unused_codes(db),
        *_useless_features(features, statistics),
        *_noticed(db),
    ]


def _repeated_codes(db: duckdb.DuckDBPyConnection) -> list[Finding]:
    """Pairs of codes that hold the same value wherever a subject has both at one time.

    Those of which the configuration names a code come first. Candidates come from a sample of
    subjects, and have often been equal there, so that the self-join stays small whatever the size
    of the data; their counts are over everything.
    """
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE sampled AS
        SELECT subject_id, time, code, numeric_value FROM events
        WHERE numeric_value IS NOT NULL AND subject_id IN
            (SELECT subject_id FROM cohort ORDER BY hash(subject_id) LIMIT {SAMPLED_SUBJECTS})"""
    )
    equal_often = db.execute(
        f"""SELECT DISTINCT unnest([a.code, b.code]) FROM sampled a JOIN sampled b
            ON a.subject_id = b.subject_id AND a.time = b.time AND a.code < b.code
            AND a.numeric_value = b.numeric_value
        GROUP BY a.code, b.code HAVING count(*) >= {REPEATS_FROM * MIN_SHARED_MOMENTS}"""
    ).fetchall()
    if not equal_often:
        return []
    codes = literals(tuple(code for (code,) in equal_often))
    suspects = _shared_moments(db, f"code IN ({codes})", "sampled")
    used = {code for (code,) in db.execute("SELECT DISTINCT code FROM code_sets").fetchall()}
    findings = []
    for first, second in suspects:
        pair = _shared_moments(db, f"code IN ({literals((first, second))})")
        findings += [
            (
                bool({a, b} & used),
                Finding(
                    "repeated code",
                    f"{a}, {b}",
                    equal,
                    shared,
                    f"{a} and {b} hold the same value at {equal:,} of the {shared:,} moments that "
                    "have both: one of them may be a copying error; use only the one you trust",
                ),
            )
            for (a, b), (equal, shared) in pair.items()
        ]
    return [finding for _, finding in sorted(findings, key=lambda told: not told[0])]


def _repeated_columns(db: duckdb.DuckDBPyConnection, features: list[Feature]) -> list[Finding]:
    """Pairs of columns that hold the same value, or the same in another unit, wherever both do.

    Candidates come from a sample of rows; their counts are over everything.
    """
    names = [f.name for f in features if f.kind == "static" and "=" not in f.name]
    if len(names) < 2:
        return []
    sample = db.execute(
        f"""SELECT {", ".join(map(identifier, names))} FROM cohort
        ORDER BY hash(row) LIMIT {SAMPLED_SUBJECTS}"""
    ).fetchnumpy()
    columns = [np.ma.filled(sample[name].astype(float), np.nan) for name in names]
    findings = []
    for i, j in _alike(np.stack(columns, axis=1)):
        a, b = identifier(names[i]), identifier(names[j])
        shared, equal, correlation = db.execute(
            f"""SELECT count(*), count(*) FILTER ({a} = {b}), abs(corr({a}, {b}))
            FROM cohort WHERE {a} IS NOT NULL AND {b} IS NOT NULL"""
        ).fetchall()[0]
        said = f"{names[i]} and {names[j]} hold the same value in {equal:,} of the {shared:,} rows"
        if equal < REPEATS_FROM * shared:
            if correlation < SAME_LINE_FROM:
                continue
            said = f"{names[i]} and {names[j]} lie on one line in the {shared:,} rows"
            equal = shared
        advice = "that have both: one may be a copy, maybe in another unit; use only one"
        findings.append(
            Finding("repeated column", f"{names[i]}, {names[j]}", equal, shared, f"{said} {advice}")
        )
    return findings


def _alike(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of columns that are equal nearly everywhere, or on one line; NaN = missing.

    >>> a = np.arange(30.0)
    >>> _alike(np.stack([a, a % 7, a * 2.54 + 1, np.where(a > 28, 0, a)], axis=1))
    [(0, 2)]
    """
    known = ~np.isnan(matrix)
    several = [len(np.unique(column[~np.isnan(column)])) > 2 for column in matrix.T]
    centred = np.where(known, matrix - np.nanmean(np.where(known, matrix, 0), axis=0), 0.0)
    here = known.astype(float)
    shared = here.T @ here
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = centred.T @ here / shared  # of the row's column, where the other is known too
        square = (centred**2).T @ here / shared - mean**2
        correlation = (centred.T @ centred / shared - mean * mean.T) / np.sqrt(square * square.T)
        equal = np.stack([(matrix == column[:, None]).sum(axis=0) for column in matrix.T]) / shared
    alike = (equal >= REPEATS_FROM) | (np.abs(correlation) >= SAME_LINE_FROM)
    alike &= (shared >= MIN_SHARED_MOMENTS) & np.outer(several, several)
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(alike, 1)), strict=True)]


def _shared_moments(
    db: duckdb.DuckDBPyConnection, condition: str, events: str = "events"
) -> dict[tuple[str, str], tuple[int, int]]:
    found = db.execute(
        f"""WITH value AS (
            SELECT subject_id, time, code, numeric_value FROM {events}
            WHERE numeric_value IS NOT NULL AND {condition})
        SELECT a.code, b.code,
            count(*) FILTER (a.numeric_value = b.numeric_value) AS equal, count(*) AS shared
        FROM value a JOIN value b
            ON a.subject_id = b.subject_id AND a.time = b.time AND a.code < b.code
        GROUP BY 1, 2
        HAVING shared >= {MIN_SHARED_MOMENTS} AND equal >= {REPEATS_FROM} * shared
            AND count(DISTINCT a.numeric_value) > 2
        ORDER BY 1, 2"""
    ).fetchall()
    return {(a, b): (equal, shared) for a, b, equal, shared in found}


def _quarantined(db: duckdb.DuckDBPyConnection, table_rows: dict[str, int]) -> list[Finding]:
    counted = db.execute(
        """SELECT table_name, reason, action, count(*) FROM quarantine
        GROUP BY ALL ORDER BY table_name, count(*) DESC, reason"""
    ).fetchall()
    return [
        Finding("quarantine", table, n, table_rows[table], f"{reason}: {action}")
        for table, reason, action, n in counted
    ]


def _absent_codes(db: duckdb.DuckDBPyConnection, config: Config) -> list[Finding]:
    """Entries of sets of codes that no event has; each is told where it is named first."""
    used = set(
        db.execute(
            """SELECT DISTINCT key, entry, written FROM code_sets
            WHERE code IN (SELECT DISTINCT code FROM events)"""
        ).fetchall()
    )
    often: list[str] | None = None
    findings: dict[Entry, Finding] = {}
    for key, entries in config.code_sets.items():
        for i, one in enumerate(entries):
            lines = one.entries if isinstance(one, CodeFile) else (written(one),)
            absent = sum((key, i, line) not in used for line in lines)
            if not absent or one in findings:
                continue
            if isinstance(one, CodeFile):
                said = f"{absent:,} of the {len(lines):,} entries of {one.file} occur in no event"
            elif not isinstance(one, str) or one.endswith("*"):
                said = f"no code in the events is of {written(one)}"
            else:
                often = _shown_codes(db) if often is None else often
                said = f"code {one!r} occurs in no event; {did_you_mean(one, often)}"
            findings[one] = Finding("absent code", key, 0, 0, said)
    return list(findings.values())


def _shown_codes(db: duckdb.DuckDBPyConnection) -> list[str]:
    often = db.execute(
        f"""SELECT code FROM events GROUP BY code
        HAVING count(DISTINCT subject_id) >= {SHOWN_FROM_SUBJECTS}"""
    ).fetchall()
    return [code for (code,) in often]


def _unused_codes(db: duckdb.DuckDBPyConnection) -> list[Finding]:
    unused = db.execute(
        f"""SELECT source, count(*), sum(events)::BIGINT,
            min(code) FILTER (subjects >= {SHOWN_FROM_SUBJECTS})
        FROM (SELECT source, code, count(*) AS events, count(DISTINCT subject_id) AS subjects
            FROM events WHERE code NOT IN (SELECT DISTINCT code FROM code_sets)
            GROUP BY ALL)
        GROUP BY source ORDER BY source"""
    ).fetchall()
    return [
        Finding(
            "unused code",
            source,
            events,
            0,
            f"{codes:,} codes in events that no feature or label uses"
            + (f", such as {example}" if example is not None else ""),
        )
        for source, codes, events, example in unused
    ]


def _noticed(db: duckdb.DuckDBPyConnection) -> list[Finding]:
    """What the steps before have counted by column."""
    noticed = db.execute("FROM notices ORDER BY check_name, place, message").fetchall()
    return [Finding(check, place, n, of, said) for check, place, n, of, said in noticed]


def _useless_features(features: list[Feature], statistics: FeatureStatistics) -> list[Finding]:
    rows = statistics.rows
    missing = [f.name for f, n in zip(features, statistics.observed, strict=True) if n == 0]
    constant = [
        f.name
        for f, low, high in zip(features, statistics.low, statistics.high, strict=True)
        if low == high
    ]
    findings = [
        Finding("all-missing feature", name, rows, rows, "no row has a value") for name in missing
    ]
    findings += [
        Finding("constant feature", name, rows, rows, "every observed value is the same")
        for name in constant
    ]
    if statistics.empty_rows:
        findings.append(
            Finding(
                "empty row",
                "features",
                statistics.empty_rows,
                rows,
                "nothing at all is observed: the prediction is the same for each of these rows",
            )
        )
    return findings
