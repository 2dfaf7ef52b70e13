"""Cohort rows and events → the matrix of what was known at each prediction time.

DuckDB aggregates; the long result is scattered, in order of rows, into dense blocks: no pivot.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np

from ehr_sn.config import AGGREGATES, Config
from ehr_sn.ingest.tables import count, identifier, literal

BLOCK_ROWS = 65_536
DAY = 86_400e6  # microseconds


@dataclass(frozen=True)
class Feature:
    """One column of the store: where it comes from, by which aggregate, in which unit."""

    name: str
    kind: str
    codes: tuple[str, ...] = ()
    aggregate: str | None = None
    unit: str = ""
    plausible: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_features(config: Config) -> list[Feature]:
    """The store's columns in their order: static, then measurements by aggregate, then history."""
    features = config.features
    listed = [
        Feature(name, "static", unit=static.unit, plausible=static.plausible)
        for name, static in features.static.items()
    ]
    for name, measurement in features.measurements.items():
        units = {"count": "", "slope": f"{measurement.unit or '1'}/year", "days_since_last": "days"}
        listed += [
            Feature(
                f"{name}.{aggregate}",
                "measurement",
                measurement.codes or (name,),
                aggregate,
                units.get(aggregate, measurement.unit),
                measurement.plausible,
            )
            for aggregate in measurement.aggregates or features.aggregates
        ]
    return listed + [
        Feature(f"history.{name}", "history", codes) for name, codes in features.history.items()
    ]


def feature_blocks(
    db: duckdb.DuckDBPyConnection, config: Config, block_rows: int = BLOCK_ROWS
) -> Iterator[np.ndarray]:
    """Yield the features of consecutive cohort rows, (rows, features) float32, NaN = missing.

    Aggregates of a measurement are missing where it has no value in the window, `count` among
    them: that nothing was measured is said by the mask alone, so that methods differ only in what
    they make of it. `last` takes the largest of several values at the last time; `slope` is the
    least-squares slope per year over at least two distinct times. A history flag is always
    observed: 1 where one of its codes was recorded in the window, else 0.
    """
    features = list_features(config)
    names = {feature.name: column for column, feature in enumerate(features)}
    rows = count(db, "SELECT count(*) FROM cohort")
    statics = [f.name for f in features if f.kind == "static"]
    measured = _MeasurementScatter(db, config, names)
    flagged = _HistoryScatter(db, config, names)
    for start in range(0, rows, block_rows):
        stop = min(start + block_rows, rows)
        block = np.full((stop - start, len(features)), np.nan, dtype=np.float32)
        if statics:
            selected = ", ".join(identifier(name) for name in statics)
            table = db.execute(
                f"SELECT {selected} FROM cohort WHERE row >= {start} AND row < {stop} ORDER BY row"
            ).fetchnumpy()
            for name in statics:
                block[:, names[name]] = np.ma.filled(table[name].astype(float), np.nan)
        measured.fill(block, start)
        flagged.fill(block, start)
        yield block


class _Scatter:
    """Streams a query's rows, ordered by cohort row, into successive blocks."""

    def __init__(self, db: duckdb.DuckDBPyConnection, query: str | None):
        # A cursor of its own: the stream stays open while other queries run.
        batches = db.cursor().sql(query).to_arrow_reader() if query else iter(())
        self._batches = iter(batches)
        self._pending: dict[str, np.ndarray] | None = None

    def _until(self, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Columns of the rows below `stop` that have not been given yet."""
        while True:
            if self._pending is None:
                batch = next(self._batches, None)
                if batch is None:
                    return
                self._pending = {
                    name: batch.column(name).to_numpy(zero_copy_only=False)
                    for name in batch.schema.names
                }
            cut = int(np.searchsorted(self._pending["row"], stop))
            whole = cut == len(self._pending["row"])
            yield {name: values[:cut] for name, values in self._pending.items()}
            if not whole:
                self._pending = {name: values[cut:] for name, values in self._pending.items()}
                return
            self._pending = None


class _MeasurementScatter(_Scatter):
    def __init__(self, db: duckdb.DuckDBPyConnection, config: Config, names: dict[str, int]):
        measurements = config.features.measurements
        codes = [
            (code, index)
            for index, (name, m) in enumerate(measurements.items())
            for code in m.codes or (name,)
        ]
        # Column of each (aggregate, measurement); -1 where the store has none.
        self._columns = {
            aggregate: np.array([names.get(f"{name}.{aggregate}", -1) for name in measurements])
            for aggregate in AGGREGATES
        }
        super().__init__(db, _aggregate_query(config, codes) if codes else None)

    def fill(self, block: np.ndarray, start: int) -> None:
        for part in self._until(start + len(block)):
            for aggregate, columns in self._columns.items():
                column = columns[part["measurement"]]
                stored = column >= 0
                block[part["row"][stored] - start, column[stored]] = part[aggregate][stored]


class _HistoryScatter(_Scatter):
    def __init__(self, db: duckdb.DuckDBPyConnection, config: Config, names: dict[str, int]):
        history = config.features.history
        codes = [(code, names[f"history.{name}"]) for name in history for code in history[name]]
        self._columns = sorted({column for _, column in codes})
        query = f"""SELECT DISTINCT c.row, k.index AS "column" {_known(config, codes)}
            ORDER BY c.row"""
        super().__init__(db, query if codes else None)

    def fill(self, block: np.ndarray, start: int) -> None:
        block[:, self._columns] = 0
        for part in self._until(start + len(block)):
            block[part["row"] - start, part["column"]] = 1


def _aggregate_query(config: Config, codes: list[tuple[str, int]]) -> str:
    days = f"(epoch_us(e.time) - epoch_us(c.prediction_time)) / {DAY!r}"
    return f"""SELECT c.row, k.index AS measurement,
            arg_max(e.numeric_value, (e.time, e.numeric_value)) AS last,
            favg(e.numeric_value) AS mean,
            min(e.numeric_value) AS min,
            max(e.numeric_value) AS max,
            count(e.numeric_value) AS count,
            CASE WHEN max(e.time) > min(e.time)
                THEN regr_slope(e.numeric_value, {days} / 365.25) END AS slope,
            -max({days}) AS days_since_last
        {_known(config, codes)} AND e.numeric_value IS NOT NULL
        GROUP BY c.row, k.index ORDER BY c.row, k.index"""


def _known(config: Config, codes: list[tuple[str, int]]) -> str:
    """SQL that joins cohort rows `c` to the events `e` in their window whose code `k` is wanted."""
    before = "<=" if config.cohort.include_prediction_time else "<"
    window = f"e.time {before} c.prediction_time"
    if config.features.lookback_days is not None:
        lookback = f"to_microseconds({int(config.features.lookback_days * DAY)})"
        window += f" AND e.time >= c.prediction_time - {lookback}"
    wanted = ", ".join(f"({literal(code)}, {index})" for code, index in codes)
    return f"""FROM cohort c
        JOIN events e ON c.subject_id = e.subject_id
        JOIN (VALUES {wanted}) k(code, index) ON e.code = k.code
        WHERE {window}"""
