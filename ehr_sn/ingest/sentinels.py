"""Values of a column → those that stand for "missing", though nobody has declared them.

Such a value is one of a few that people agree on, it is held by many, and it lies outside the rest:
the only negative one, or far from where the others lie close together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import duckdb
import numpy as np

from ehr_sn.config import SMALLEST_GROUP, Config
from ehr_sn.errors import quoted
from ehr_sn.ingest.code_sets import MEASUREMENTS, held_by
from ehr_sn.ingest.findings import BLOCKING_FROM, LOOK_FROM, Finding, Severity
from ehr_sn.ingest.sql import identifier, literal
from ehr_sn.ingest.tables import count

SAMPLED_ROWS = 20_000
TOGETHER_FROM = 3  # columns that are told together
NEGATIVE = tuple(-float("9" * digits) for digits in range(1, 7))
SENTINELS = frozenset(
    [0.0, -1.0, -7.0, -8.0, -88.0, -77.0, *NEGATIVE, 99.9, 999.9]
    + [float(str(digit) * times) for digit in (7, 8, 9) for times in range(1, 7)]
    + [float(str(digit) * times) for digit in (5, 6) for times in range(3, 6)]
)
LEAST_ROWS = 3  # of the sample, from which a value may stand for missing
LEAST_REST = 20  # rows of other values, or nothing is known of where they lie
TAIL = 0.01  # share of the rest that may lie out of its bulk on a side
FAR = 0.75  # of the distance from the middle of the rest to the end of its bulk
FEW_NEAR = 0.1  # rows that are nearer to a sentinel than to the bulk, for each of its own
ZERO_FAR = 1.0  # as FAR, of a zero, which may as well be nothing of what is measured
ZERO_STEPS = 4  # at least so many of the smallest steps between values lie above it
ZERO_REST = 10  # at least so many other values are there: fewer are settings of a machine
SCALE_UP_TO = 6  # the greatest answer of a scale to which 7, 8 and 9 do not belong


def outside(values: np.ndarray, counts: np.ndarray) -> list[float]:
    """Values that lie outside the rest and may stand for missing.

    Parameters
    ----------
    values : distinct, rising
    counts : the rows that hold each

    >>> ages = np.arange(18, 90)
    >>> outside(np.append(-9, ages), np.append(30, np.full(72, 9)))
    [-9.0]
    >>> outside(np.array([1, 2, 3, 4, 5, 7, 9]), np.array([50, 40, 30, 20, 10, 4, 12]))
    [7.0, 9.0]
    >>> outside(np.arange(-9, 10), np.full(19, 9))
    []
    """
    found: list[float] = []
    for side in (-1, 1):
        places = _candidates(values, counts, side)
        while places and not _lies_outside(values, counts, places, side):
            places.pop()  # the innermost is one of the rest
        found += (float(values[place]) for place in places)
    return sorted(found)


def _candidates(values: np.ndarray, counts: np.ndarray, side: int) -> list[int]:
    """Places of agreed values at one end, the outermost first.

    A few errors of typing may lie still further out.
    """
    places = []
    for place in range(len(values))[::-side]:
        if counts[place] < LEAST_ROWS:
            continue
        if float(values[place]) not in SENTINELS:
            break
        places.append(place)
    return places


def _lies_outside(values: np.ndarray, counts: np.ndarray, places: list[int], side: int) -> bool:
    """Whether the innermost of the places lies far from what is in none of them."""
    value, own = float(values[places[-1]]), counts[places[-1]]
    rest, times = np.delete(values, places), np.delete(counts, places)
    if len(rest) < 2 or times.sum() < LEAST_REST:
        return False
    if value < 0 <= rest[0]:
        return True
    cumulated = np.cumsum(times) / times.sum()
    middle, end = rest[np.searchsorted(cumulated, (0.5, TAIL if side < 0 else 1 - TAIL))]
    gap, spread = side * (value - end), abs(end - middle)
    near = times[np.abs(rest - value) < gap / 2].sum()
    if gap <= 0 or near > FEW_NEAR * own:
        return False
    if value == 0:
        far = spread > 0 and gap >= ZERO_FAR * spread and gap >= ZERO_STEPS * np.diff(rest).min()
        return bool(far and side < 0 and len(rest) >= ZERO_REST and own < times.sum())
    if 0 < value < 10:
        scale = np.arange(rest[0], rest[-1] + 1)
        return bool(rest[0] >= 0 and rest[-1] <= min(SCALE_UP_TO, value - 2)) and (
            np.array_equal(rest, scale)
        )
    if side > 0:
        spread = max(spread, middle - rest[np.searchsorted(cumulated, TAIL)])
    return bool(gap >= FAR * spread)


@dataclass(frozen=True)
class Held:
    """Rows of a column that hold a suspected value, of those with any; subjects of the former."""

    rows: int
    of: int
    subjects: int

    def __add__(self, other: "Held") -> "Held":
        return Held(self.rows + other.rows, self.of + other.of, self.subjects + other.subjects)


Sentinel = tuple[str, float]  # key of the configuration, suspected value


def suspected_sentinels(db: duckdb.DuckDBPyConnection, config: Config) -> tuple[Sentinel, ...]:
    """Suspected values of columns and of measurements, from a sample.

    Needs `cohort`, `code_sets`, and `sampled`: events of some subjects.
    """
    features = config.features
    columns = {name: features.key(name) for name in _columns_of_numbers(config)}
    found = []
    if columns:
        rows = count(db, "SELECT count(*) FROM cohort")
        sample = db.execute(
            f"""SELECT {", ".join(map(identifier, columns))} FROM cohort
            WHERE row % {1 + rows // SAMPLED_ROWS} = 0"""
        ).fetchnumpy()
        for name, key in columns.items():
            held: np.ndarray = np.ma.filled(sample[name].astype(float), np.nan)
            held = held[~np.isnan(held)]
            found += [(key, value) for value in outside(*np.unique(held, return_counts=True))]
    if features.measurements:
        sample = db.execute(
            f"""SELECT key, numeric_value AS value, count(*) AS rows FROM sampled
            JOIN (SELECT DISTINCT key, code FROM code_sets
                WHERE starts_with(key, {literal(MEASUREMENTS)})) USING (code)
            GROUP BY ALL ORDER BY ALL"""
        ).fetchnumpy()
        for key in dict.fromkeys(sample["key"]):
            its = sample["key"] == key
            found += [(key, value) for value in outside(sample["value"][its], sample["rows"][its])]
    return tuple(found)


def _columns_of_numbers(config: Config) -> list[str]:
    return [
        name
        for name, feature in config.features.wide.items()
        if feature.since is None and feature.categories is None
    ]


def count_sentinels(
    db: duckdb.DuckDBPyConnection, config: Config, suspects: Iterable[Sentinel]
) -> dict[Sentinel, Held]:
    """How many rows, and subjects, hold each of the suspected values."""
    names = {config.features.key(name): name for name in _columns_of_numbers(config)}
    counted = {}
    for key, value in suspects:
        column, rows = "numeric_value", f"event_rows WHERE code_id IN ({held_by(key)})"
        if key in names:
            column, rows = identifier(names[key]), "cohort"
        found = db.execute(
            f"""SELECT count(*) FILTER ({column} = {value!r}), count({column}),
                count(DISTINCT subject_id) FILTER ({column} = {value!r}) FROM {rows}"""
        ).fetchall()[0]
        counted[key, value] = Held(*found)
    return counted


def sentinel_findings(config: Config, counted: Mapping[Sentinel, Held]) -> list[Finding]:
    """One finding a column; one together of columns that share their suspected values.

    A value is shown if SMALLEST_GROUP subjects hold it in some column.
    """
    shown = {value for (_, value), held in counted.items() if held.subjects >= SMALLEST_GROUP}
    by_key: dict[str, dict[float, Held]] = {}
    for (key, value), held in sorted(counted.items()):
        if value in shown and held.rows:
            by_key.setdefault(key, {})[value] = held
    by_values: dict[tuple[float, ...], list[str]] = {}
    for key, held_values in by_key.items():
        by_values.setdefault(tuple(held_values), []).append(key)
    findings = []
    for values, keys in by_values.items():
        together = [keys] if len(keys) >= TOGETHER_FROM else [[key] for key in keys]
        findings += [_finding(config, values, some, by_key) for some in together]
    return sorted(findings, key=lambda finding: (-(finding.share or 0), finding.where))


def _finding(
    config: Config,
    values: tuple[float, ...],
    keys: list[str],
    by_key: Mapping[str, Mapping[float, Held]],
) -> Finding:
    held = [by_key[key][value] for key in keys for value in values]
    rows = sum(one.rows for one in held)
    of = sum(next(iter(by_key[key].values())).of for key in keys)
    listed = quoted(values)
    lies = "lies outside the other values" if len(values) == 1 else "lie outside the other values"
    said = f"{listed} {lies}, as what stands for missing does: if so, declare "
    said += f"`missing_codes: [{listed}]`, or what is `plausible`"
    if len(keys) > 1:
        said = f"in each of {len(keys)} columns {said}: {', '.join(keys)}"
    severe = BLOCKING_FROM if all(_is_bounded(config, key) for key in keys) else LOOK_FROM
    blocking = rows > severe * of and max(one.subjects for one in held) >= SMALLEST_GROUP
    where = keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
    severity: Severity = "blocking" if blocking else "look"
    return Finding("suspected sentinel", where, rows, of, said, severity)


def _is_bounded(config: Config, key: str) -> bool:
    """Whether what is plausible is declared, and holds the value: a person has thought of it."""
    features = config.features
    if key.startswith(MEASUREMENTS):
        return features.measurements[key.removeprefix(MEASUREMENTS)].plausible is not None
    return any(
        features.key(name) == key and features.wide[name].plausible is not None
        for name in features.wide
    )
