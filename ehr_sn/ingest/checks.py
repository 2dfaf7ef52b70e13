"""Staged tables → counts → findings: what in the data a person should know about.

Counts of shards are added up, and come to what one shard of all subjects would have. Pairs that may
repeat each other are suspected from a sample of subjects in the first shard, and counted in all.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import duckdb
import numpy as np

from ehr_sn.config import SMALLEST_GROUP, SPLITS, Config
from ehr_sn.errors import did_you_mean
from ehr_sn.ingest.cells import SET_ASIDE, quarantine_counts
from ehr_sn.ingest.codes import CodeFile, Entry, patterns, written
from ehr_sn.ingest.cohort import classes_by_split
from ehr_sn.ingest.features import Feature
from ehr_sn.ingest.findings import SEVERITIES, Finding, Severity, by_share
from ehr_sn.ingest.follow_up import Ended, Risk, count_ended, follow_up_findings
from ehr_sn.ingest.losses import DECLARED_FROM, Usable, lost
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.sentinels import (
    Held,
    Sentinel,
    count_sentinels,
    sentinel_findings,
    suspected_sentinels,
)
from ehr_sn.ingest.spellings import Spellings, of_another_length, spelt_otherwise
from ehr_sn.ingest.sql import identifier, literals
from ehr_sn.ingest.wide import EMPTY, feature_columns

SAMPLED_SUBJECTS = 2_000
MIN_SHARED_MOMENTS = 20
MOST_CODES = 1000  # of a table, the commonest, that are kept to be compared with later ones
COUNTED_FIRST = 100_000  # events, to find common codes among
COUNTED_EXACTLY = 500_000  # events up to which each code's subjects are: of more it takes longer
REPEATS_FROM = 0.99  # share of equal values from which a code is said to repeat another
LONGEST_LAG = 800  # days before a label's first event in which other events may pile up
NEAR = 7  # days before it on which they do, wherever it is recorded when it is found
PILE_FROM = 10  # times a usual day's events, from which they are said to
APART_FROM = 0.05  # two shares known, and that many of its standard errors
SURELY = 5
FEW = 50  # rows of a class in a split, below which nothing is known for sure
SAME_LINE_FROM = 0.9999  # correlation from which a column is said to be another in other units


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
        self.add_counted(
            FeatureStatistics(
                mask.sum(axis=0),
                np.fmin.reduce(block, axis=0, initial=np.inf),
                np.fmax.reduce(block, axis=0, initial=-np.inf),
                len(block),
                int((~mask.any(axis=1)).sum()),
            )
        )

    def add_counted(self, other: "FeatureStatistics") -> None:
        self.observed += other.observed
        self.low = np.fmin(self.low, other.low)
        self.high = np.fmax(self.high, other.high)
        self.rows += other.rows
        self.empty_rows += other.empty_rows


@dataclass(frozen=True)
class Together:
    """Two columns where both are known: how many rows, in how many equal, and their moments."""

    shared: int
    equal: int
    mean_a: float
    mean_b: float
    square_a: float  # sums of squares and products about the means
    square_b: float
    product: float

    def __add__(self, other: "Together") -> "Together":
        shared = self.shared + other.shared
        if not shared:
            return self
        a, b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        share = other.shared / shared
        weight = self.shared * share
        return Together(
            shared,
            self.equal + other.equal,
            self.mean_a + a * share,
            self.mean_b + b * share,
            self.square_a + other.square_a + a * a * weight,
            self.square_b + other.square_b + b * b * weight,
            self.product + other.product + a * b * weight,
        )

    @property
    def correlation(self) -> float:
        squares = self.square_a * self.square_b
        return self.product / math.sqrt(squares) if squares else 0.0


@dataclass(frozen=True)
class Suspects:
    """Pairs of codes, and of columns, of which one may repeat the other; and sentinels."""

    codes: tuple[tuple[str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    sentinels: tuple[Sentinel, ...] = ()


@dataclass
class Counts:
    """What the checks tell of one shard, or of several together."""

    features: FeatureStatistics
    quarantined: Counter[tuple[str, str, str]]  # of table, reason, action
    noticed: dict[tuple[str, str, str], tuple[int, int]]  # of check, place, message: rows of rows
    codes: dict[tuple[str, str], tuple[int, int]]  # of a pair: at how many moments equal, of all
    columns: dict[tuple[str, str], Together]
    lags: Counter[tuple[str, int]]  # of a label, days before its first event: subjects seen then
    undated: dict[tuple[str, bool], tuple[int, int]]  # see `_undated`
    sentinels: dict[Sentinel, Held]
    classes: dict[tuple[str, str, str], tuple[int, int]]  # of a deal, split, label: 1s and 0s
    ended: Ended

    def __add__(self, other: "Counts") -> "Counts":
        self.features.add_counted(other.features)
        self.quarantined.update(other.quarantined)
        _add(self.noticed, other.noticed)
        _add(self.codes, other.codes)
        self.lags.update(other.lags)
        _add(self.undated, other.undated)
        for pair, together in other.columns.items():
            self.columns[pair] = self.columns[pair] + together if pair in self.columns else together
        for value, held in other.sentinels.items():
            self.sentinels[value] += held
        _add(self.classes, other.classes)
        self.ended.update(other.ended)
        return self

    def labelled(self, config: Config) -> dict[str, tuple[int, int]]:
        """Return each label's numbers of 1s and 0s in all splits."""
        told: dict[str, tuple[int, int]] = {}
        for (deal, _, label), n in self.classes.items():
            if deal == config.splits.columns[0]:
                _add(told, {label: n})
        return told

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON can hold them."""
        features = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self.features).items()
        }
        return {
            "features": features,
            "quarantined": [[*key, n] for key, n in self.quarantined.items()],
            "noticed": [[*key, *n] for key, n in self.noticed.items()],
            "codes": [[*pair, *n] for pair, n in self.codes.items()],
            "columns": [[*pair, *astuple(n)] for pair, n in self.columns.items()],
            "lags": [[*key, n] for key, n in self.lags.items()],
            "undated": [[*key, *n] for key, n in self.undated.items()],
            "sentinels": [[*key, *astuple(n)] for key, n in self.sentinels.items()],
            "classes": [[*key, *n] for key, n in self.classes.items()],
            "ended": [[*key, n] for key, n in self.ended.items()],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Counts":
        features = content["features"]
        columns = {name: np.array(features[name]) for name in ("observed", "low", "high")}
        return cls(
            FeatureStatistics(**features | columns),
            Counter({(t, why, action): n for t, why, action, n in content["quarantined"]}),
            {(check, place, said): (n, of) for check, place, said, n, of in content["noticed"]},
            {(a, b): (equal, shared) for a, b, equal, shared in content["codes"]},
            {(a, b): Together(*n) for a, b, *n in content["columns"]},
            Counter({(label, lag): n for label, lag, n in content["lags"]}),
            {(name, later): (known, of) for name, later, known, of in content["undated"]},
            {(key, value): Held(*n) for key, value, *n in content["sentinels"]},
            {(deal, split, label): (p, n) for deal, split, label, p, n in content["classes"]},
            Counter({(label, step, how): n for label, step, how, n in content["ended"]}),
        )


def _add(sums: dict[Any, tuple[int, int]], more: dict[Any, tuple[int, int]]) -> None:
    for key, (n, of) in more.items():
        before, of_before = sums.get(key, (0, 0))
        sums[key] = (before + n, of_before + of)


def count_all(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    features: FeatureStatistics,
    suspects: Suspects,
) -> Counts:
    """Count what the checks need of the staged tables; makes two tables.

    - `coding_counts`: source, code_id, code, events, numbers; events of several codes once, as
      "a = b"
    - `code_counts`: source, code, events, subjects (no more than SMALLEST_GROUP), and `about`, how
      many subjects there are: exactly, or of many events to about 3 %; such events once under each
      of their codes
    """
    count_codes(db)
    noticed: dict[tuple[str, str, str], tuple[int, int]] = {}
    for check, place, n, of, said in db.execute("FROM notices").fetchall():
        _add(noticed, {(check, place, said): (n, of)})
    return Counts(
        features,
        Counter({(t, why, action): n for t, why, action, n in quarantine_counts(db)}),
        noticed,
        {(a, b): _shared_moments(db, a, b) for a, b in suspects.codes},
        {(a, b): _together(db, a, b) for a, b in suspects.columns},
        _lags(db),
        _undated(db, config),
        count_sentinels(db, config, suspects.sentinels),
        {
            (column, *place): n
            for column in config.splits.columns
            for place, n in classes_by_split(db, config, column).items()
        },
        count_ended(db, config),
    )


def count_codes(db: duckdb.DuckDBPyConnection) -> None:
    """Make `coding_counts` and `code_counts`. Most codes show in some events that they are common.

    Subjects are counted by each code of an event that has several: a rare code must stay hidden.
    """
    distinct = "SELECT source, code_id, count(DISTINCT subject_id) AS subjects FROM"
    by_code = "coalesce(member, code_id) AS code_id"
    db.execute(
        f"""CREATE TEMP VIEW each_code AS SELECT source, subject_id, {by_code}
        FROM event_rows LEFT JOIN joint_codes USING (code_id)"""
    )
    db.execute(
        """CREATE TABLE coding_counts AS SELECT source, code_id, code, events, numbers
        FROM (SELECT source, code_id, count(*) AS events, count(numeric_value) AS numbers
            FROM event_rows GROUP BY ALL) JOIN event_codes USING (code_id)"""
    )
    events = count(db, "SELECT count(*) FROM event_rows")
    about = "approx_count_distinct({})" if events > COUNTED_EXACTLY else "count(DISTINCT {})"
    db.execute(
        f"""CREATE TABLE code_counts AS
        WITH common AS ({distinct} (FROM each_code LIMIT {COUNTED_FIRST}) GROUP BY ALL
            HAVING subjects >= {SMALLEST_GROUP}),
        rare AS ({distinct} (FROM each_code ANTI JOIN common USING (source, code_id))
            GROUP BY ALL),
        every AS (SELECT source, {by_code}, sum(events)::BIGINT AS events
            FROM coding_counts LEFT JOIN joint_codes USING (code_id) GROUP BY ALL),
        estimated AS (SELECT source, code_id, {about.format("subject_id")}::BIGINT AS about
            FROM each_code GROUP BY ALL)
        SELECT source, code, events, least(subjects, {SMALLEST_GROUP}) AS subjects, about
        FROM every JOIN estimated USING (source, code_id)
        JOIN (FROM common UNION ALL FROM rare) USING (source, code_id)
        JOIN event_codes USING (code_id)"""
    )


def common_codes(
    rows: Iterable[tuple[str, str, int, int]], events: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return, by source, how many events it has, and how many of each of its commonest codes.

    Parameters
    ----------
    rows : of `code_counts`; several of a code are added up. Codes of few subjects are left out.
    events : by source, of all codes
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for source, code, n, subjects in rows:
        _add(counts, {(source, code): (n, subjects)})
    told: dict[str, dict[str, Any]] = {
        source: {"events": n, "codes": {}} for source, n in events.items()
    }
    for (source, code), (n, subjects) in sorted(
        counts.items(), key=lambda item: (-item[1][0], item[0])
    ):
        if subjects >= SMALLEST_GROUP and len(told[source]["codes"]) < MOST_CODES:
            told[source]["codes"][code] = n
    return told


def code_subjects(
    rows: Iterable[tuple[str, str, int]], codes: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """Return about how many subjects have each of the `common_codes`, by source and code.

    Parameters
    ----------
    rows : source, code and `about` of `code_counts`; several of a code are added up
    codes : what `common_codes` told
    """
    counts: dict[str, dict[str, int]] = {source: {} for source in codes}
    for source, code, about in sorted(rows):
        if code in codes[source]["codes"]:
            counts[source][code] = counts[source].get(code, 0) + about
    return counts


def find_all(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    features: list[Feature],
    counts: Counts,
    table_rows: dict[str, int],
    attrition: Sequence[Mapping[str, Any]],
    risks: Mapping[str, Risk],
) -> list[Finding]:
    """Every check, the most severe first. Needs `coding_counts`, `code_counts`, `code_sets`."""
    observed = {f.name: int(n) for f, n in zip(features, counts.features.observed, strict=True)}
    usable = Usable.of(db, observed)
    empty = _empty_columns(db, config, counts, usable)
    findings = [
        *_repeated_codes(db, counts.codes),
        *_repeated_columns(counts.columns),
        *_dated_late(counts.lags),
        *_known_later(counts.undated),
        *sentinel_findings(config, counts.sentinels),
        *lost(config, counts.quarantined, table_rows, attrition, usable),
        *_absent_codes(db, config),
        *of_another_length(db, config),
        *_unused_codes(db, config),
        *_few_of_a_class(config, counts.classes),
        *follow_up_findings(config, risks, counts.ended, counts.labelled(config)),
        *empty,
        *_useless_features(features, counts.features, {finding.where for finding in empty}),
        *_noticed(counts.noticed),
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def find_suspects(
    db: duckdb.DuckDBPyConnection, config: Config, features: list[Feature]
) -> Suspects:
    """What is suspected from a sample: of subjects for codes, of rows for columns."""
    codes = _suspected_codes(db)
    return Suspects(codes, _suspected_columns(db, features), suspected_sentinels(db, config))


def _suspected_codes(db: duckdb.DuckDBPyConnection) -> tuple[tuple[str, str], ...]:
    """Pairs of codes that hold the same value wherever a sampled subject has both at one time.

    They have often been equal there, so that the self-join stays small whatever the data.
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
        return ()
    suspected = db.execute(
        f"""WITH value AS (
            SELECT * FROM sampled WHERE code IN ({literals(tuple(c for (c,) in equal_often))}))
        SELECT a.code, b.code FROM value a JOIN value b
            ON a.subject_id = b.subject_id AND a.time = b.time AND a.code < b.code
        GROUP BY 1, 2
        HAVING count(*) >= {MIN_SHARED_MOMENTS} AND count(DISTINCT a.numeric_value) > 2
            AND count(*) FILTER (a.numeric_value = b.numeric_value) >= {REPEATS_FROM} * count(*)
        ORDER BY 1, 2"""
    ).fetchall()
    return tuple((a, b) for a, b in suspected)


def _shared_moments(db: duckdb.DuckDBPyConnection, a: str, b: str) -> tuple[int, int]:
    """Count the moments at which two codes hold the same value, and those that have both."""
    equal, shared = db.execute(
        """SELECT count(*) FILTER (a.numeric_value = b.numeric_value), count(*)
        FROM events a JOIN events b ON a.subject_id = b.subject_id AND a.time = b.time
        WHERE a.code = $1 AND b.code = $2
            AND a.numeric_value IS NOT NULL AND b.numeric_value IS NOT NULL""",
        [a, b],
    ).fetchall()[0]
    return equal, shared


def _repeated_codes(
    db: duckdb.DuckDBPyConnection, counted: dict[tuple[str, str], tuple[int, int]]
) -> list[Finding]:
    """Those of which the configuration names a code come first."""
    used = {code for (code,) in db.execute("SELECT DISTINCT code FROM code_sets").fetchall()}
    return [
        Finding(
            "repeated code",
            f"{a}, {b}",
            equal,
            shared,
            f"{a!r} and {b!r} hold the same value at {equal:,} of the {shared:,} moments that "
            "have both: one of them may be a copying error; use only the one you trust (pairs are "
            f"looked for among {SAMPLED_SUBJECTS:,} subjects)",
            "harmless" if used.isdisjoint((a, b)) else "look",
        )
        for (a, b), (equal, shared) in sorted(
            counted.items(), key=lambda pair: used.isdisjoint(pair[0])
        )
        if equal >= REPEATS_FROM * shared
    ]


def _suspected_columns(
    db: duckdb.DuckDBPyConnection, features: list[Feature]
) -> tuple[tuple[str, str], ...]:
    """Pairs of columns that hold the same value, or the same in another unit, in sampled rows."""
    names = [f.name for f in features if f.kind == "static" and "=" not in f.name]
    if len(names) < 2:
        return ()
    sample = db.execute(
        f"""SELECT {", ".join(map(identifier, names))} FROM cohort
        ORDER BY hash(row) LIMIT {SAMPLED_SUBJECTS}"""
    ).fetchnumpy()
    columns = [np.ma.filled(sample[name].astype(float), np.nan) for name in names]
    if not len(columns[0]):
        return ()
    return tuple((names[i], names[j]) for i, j in _alike(np.stack(columns, axis=1)))


def _together(db: duckdb.DuckDBPyConnection, first: str, second: str) -> Together:
    a, b = identifier(first), identifier(second)
    counted = db.execute(
        f"""SELECT count(*), count(*) FILTER ({a} = {b}), coalesce(regr_avgx({b}, {a}), 0),
            coalesce(regr_avgy({b}, {a}), 0), coalesce(regr_sxx({b}, {a}), 0),
            coalesce(regr_syy({b}, {a}), 0), coalesce(regr_sxy({b}, {a}), 0)
        FROM cohort WHERE {a} IS NOT NULL AND {b} IS NOT NULL"""
    ).fetchall()[0]
    return Together(*counted)


def _repeated_columns(counted: dict[tuple[str, str], Together]) -> list[Finding]:
    findings = []
    for (a, b), together in counted.items():
        equal, shared = together.equal, together.shared
        said = f"{a} and {b} hold the same value in {equal:,} of the {shared:,} rows"
        if equal < REPEATS_FROM * shared:
            if abs(together.correlation) < SAME_LINE_FROM:
                continue
            said = f"{a} and {b} lie on one line in the {shared:,} rows"
            equal = shared
        advice = "that have both: one may be a copy, maybe in another unit; use only one"
        findings.append(Finding("repeated column", f"{a}, {b}", equal, shared, f"{said} {advice}"))
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


def _lags(db: duckdb.DuckDBPyConnection) -> Counter[tuple[str, int]]:
    """How many subjects have another event so many days before the first of each label."""
    counted = db.execute(
        f"""WITH of_labels AS
            (SELECT key, code_id FROM code_sets WHERE starts_with(key, 'labels.')),
        firsts AS (SELECT key, subject_id, min(time) AS first
            FROM event_rows JOIN of_labels USING (code_id) GROUP BY ALL)
        SELECT key, date_diff('day', time, first) AS lag, count(DISTINCT subject_id)
        FROM event_rows JOIN firsts USING (subject_id) ANTI JOIN of_labels USING (key, code_id)
        WHERE lag BETWEEN 0 AND {LONGEST_LAG} GROUP BY ALL"""
    ).fetchall()
    return Counter({(key, lag): n for key, lag, n in counted})


def _dated_late(lags: Counter[tuple[str, int]]) -> list[Finding]:
    """Labels before which subjects were seen on one certain day, and not on the day of the label.

    Whoever is found ill is seen that day. So what is recorded elsewhere was likely found there.
    """
    findings = []
    for label in dict.fromkeys(label for label, _ in lags):
        seen = np.array([lags[label, lag] for lag in range(LONGEST_LAG + 1)])
        lag = NEAR + 1 + int(seen[NEAR + 1 :].argmax())
        usual = max(float(np.median(seen[1:])), 1.0)
        if seen[lag] > max(seen[0], PILE_FROM * usual, SMALLEST_GROUP - 1):
            findings.append(
                Finding(
                    "dated late",
                    label,
                    int(seen[lag]),
                    0,
                    f"so many subjects were seen {lag:,} days before its first event, "
                    f"{seen[lag] / usual:.0f} times as many as on a usual day, and fewer on its "
                    "own day: it may have been found then and be dated late; unless the prediction "
                    "is made before that day, what came between gives it away",
                )
            )
    return findings


def _undated(
    db: duckdb.DuckDBPyConnection, config: Config
) -> dict[tuple[str, bool], tuple[int, int]]:
    """Count in how many rows of subjects not seen by the prediction time a column is known.

    By the feature that the column holds, and whether the subject was seen afterwards.
    """
    if not config.events or not config.features.wide:
        return {}
    columns = {name: feature_columns(name, f)[0] for name, f in config.features.wide.items()}
    known = ", ".join(f"count({identifier(column)})" for column in columns.values())
    counted = db.execute(
        f"""WITH seen AS
            (SELECT subject_id, min(time) AS first FROM event_rows GROUP BY subject_id)
        SELECT first IS NOT NULL AS later, count(*), {known}
        FROM cohort LEFT JOIN seen USING (subject_id)
        WHERE first IS NULL OR first > prediction_time GROUP BY later"""
    ).fetchall()
    return {
        (name, later): (n, rows)
        for later, rows, *each in counted
        for name, n in zip(columns, each, strict=True)
    }


def _known_later(undated: dict[tuple[str, bool], tuple[int, int]]) -> list[Finding]:
    """Columns that are there, or not, because of what happened after the prediction.

    Only events say when they were recorded. Of subjects who were not seen before, those seen later
    differ by the future alone.
    """
    findings = []
    for name in dict.fromkeys(name for name, _ in undated):
        (known, seen), (others_known, others) = (
            undated.get((name, later), (0, 0)) for later in (True, False)
        )
        if min(seen, others) < SMALLEST_GROUP:
            continue
        share, of_others = known / seen, others_known / others
        both = (known + others_known) / (seen + others)
        error = math.sqrt(both * (1 - both) * (1 / seen + 1 / others))
        if abs(share - of_others) > max(APART_FROM, SURELY * error):
            findings.append(
                Finding(
                    "known later",
                    name,
                    known,
                    seen,
                    f"of subjects first seen after the prediction {share:.0%} have it, of those "
                    f"never seen {of_others:.0%}: it may be recorded when they come, and that it "
                    "is there then tells of the future; make it an event with its time, or leave "
                    "it out",
                )
            )
    return findings


def _few_of_a_class(
    config: Config, classes: dict[tuple[str, str, str], tuple[int, int]]
) -> list[Finding]:
    """Splits to which few ill, or few healthy, rows are dealt; of several deals the least."""
    findings = []
    for label, split, place in product(config.labels, SPLITS, (0, 1)):
        deals = {
            column: classes.get((column, split, label), (0, 0)) for column in config.splits.columns
        }
        column = min(deals, key=lambda column: deals[column][place])
        n, of = deals[column][place], sum(deals[column])
        if n < FEW:
            name = ("positive", "negative")[place]
            said = (
                f"so few {name} rows are dealt to {split} by {column}: an AUROC of fewer than "
                f"{FEW} is uncertain, and what is chosen by it is chosen by chance. Take more "
                "codes, a longer window or other fractions in `splits`, or leave the label out"
            )
            findings.append(Finding(f"few {name}s", f"labels.{label}", n, of, said))
    return findings


def _absent_codes(db: duckdb.DuckDBPyConnection, config: Config) -> list[Finding]:
    """Entries of sets of codes that no event has; each is told where it is named first."""
    used = set(
        db.execute(
            """SELECT DISTINCT key, entry, written FROM code_sets
            WHERE code IN (SELECT code FROM code_counts)"""
        ).fetchall()
    )
    often: list[str] | None = None
    spellings: Spellings | None = None
    findings: dict[Entry, Finding] = {}
    for key, entries in config.code_sets.items():
        for i, one in enumerate(entries):
            lines = one.entries if isinstance(one, CodeFile) else (written(one),)
            absent = {line for line in lines if (key, i, line) not in used}
            if not absent or one in findings:
                continue
            name = repr(one) if isinstance(one, str) else written(one)
            said = f"code {name}"
            if isinstance(one, CodeFile):
                said = f"{len(absent):,} of the {len(lines):,} entries of {name}"
            spellings = Spellings(db) if spellings is None else spellings
            alike = spellings.like(p for p in patterns(one) if p.written in absent)
            if alike:
                findings[one] = spelt_otherwise(key, f"{said} matches no event", alike)
                continue
            if isinstance(one, CodeFile):
                said += " occur in no event"
            elif not isinstance(one, str) or one.endswith("*"):
                said = f"no code in the events is of {name}"
            else:
                often = _shown_codes(db) if often is None else often
                said += f" occurs in no event; {did_you_mean(one, often)}"
            findings[one] = Finding("absent code", key, 0, 0, said)
    return list(findings.values())


def _shown_codes(db: duckdb.DuckDBPyConnection) -> list[str]:
    """Codes of subjects enough: a rarer one may be free text about one patient."""
    often = db.execute(
        f"""SELECT DISTINCT code FROM code_counts WHERE subjects >= {SMALLEST_GROUP}
        ORDER BY code"""
    ).fetchall()
    return [code for (code,) in often]


def _unused_codes(db: duckdb.DuckDBPyConnection, config: Config) -> list[Finding]:
    unused = db.execute(
        f"""SELECT source, count(*), sum(c.events)::BIGINT,
            min(code) FILTER (subjects >= {SMALLEST_GROUP})
        FROM coding_counts c LEFT JOIN code_counts USING (source, code)
        WHERE code NOT IN (SELECT code FROM code_sets) GROUP BY source"""
    ).fetchall()
    tables = list(config.tables)
    return [
        Finding(
            "unused code",
            source,
            events,
            0,
            f"{codes:,} codes in events that no feature or label uses"
            + (f", such as {example!r}" if example is not None else ""),
            "harmless",
        )
        for source, codes, events, example in sorted(unused, key=lambda row: tables.index(row[0]))
    ]


def _noticed(noticed: dict[tuple[str, str, str], tuple[int, int]]) -> list[Finding]:
    """What the steps before have counted by column."""
    return [
        Finding(check, place, n, of, said, _severity_of_noticed(check, n, of))
        for (check, place, said), (n, of) in sorted(noticed.items())
        if n and check != EMPTY
    ]


def _severity_of_noticed(check: str, n: int, of: int) -> Severity:
    match check:
        case "left out" | "missing code":  # as declared
            return "look" if n > DECLARED_FROM * of else "harmless"
        case (
            "absent column"
            | "category spelling"
            | "replaced patient"
            | "no subject id"
            | "absent table"
        ):
            return "look"
        case "older version" | "repeated version" | "deleted" | "several codes":
            return "harmless"
        case "contradicted key" | "time zone":
            return "blocking" if by_share(n, of) == "blocking" else "look"
        case "unit spelling":
            return "blocking"
        case "unseen category":
            return "blocking" if by_share(n, of) == "blocking" else "look"
    return by_share(n, of)


def _empty_columns(
    db: duckdb.DuckDBPyConnection, config: Config, counts: Counts, usable: Usable
) -> list[Finding]:
    """Columns of the cohort's tables, and of events' values, that have no cell at all."""
    findings = [
        Finding(
            EMPTY,
            name,
            n,
            n,
            f"{said} in all {n:,} rows",
            "blocking" if name in config.features.static else "look",
        )
        for (check, name, said), (n, _) in sorted(counts.noticed.items())
        if check == EMPTY and n == counts.features.rows
    ]
    events = dict(
        db.execute("SELECT source, sum(events)::BIGINT FROM coding_counts GROUP BY 1").fetchall()
    )
    faulty = {table for (table, _, action) in counts.quarantined if action != SET_ASIDE}
    for one in config.events:
        n = events.get(one.table, 0)
        if one.numeric_value and n and not usable.tables[one.table] and one.table not in faulty:
            said = f"column {one.numeric_value!r} of table {one.table} is empty in all {n:,} rows"
            findings.append(Finding(EMPTY, one.table, n, n, said, "blocking"))
    return findings


def _useless_features(
    features: list[Feature], statistics: FeatureStatistics, said: Collection[str]
) -> list[Finding]:
    """Blocking where all that is made of a measurement is missing; but for what is `said`."""
    rows = statistics.rows
    empty = [f for f, n in zip(features, statistics.observed, strict=True) if n == 0]
    whole = {_measurement(f) for f in features} - {
        _measurement(f) for f, n in zip(features, statistics.observed, strict=True) if n
    }
    findings = [
        Finding(
            "all-missing feature",
            f.name,
            rows,
            rows,
            "no row has a value",
            "blocking" if _measurement(f) in whole else "look",
        )
        for f in empty
        if _measurement(f) not in said
    ]
    findings += [
        Finding("constant feature", f.name, rows, rows, "every observed value is the same")
        for f, low, high in zip(features, statistics.low, statistics.high, strict=True)
        if low == high
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


def _measurement(feature: Feature) -> str:
    """The measurement, or the column, of which a feature is made."""
    return feature.name.removesuffix(f".{feature.aggregate}").partition("=")[0]
