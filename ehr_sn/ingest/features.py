"""Cohort rows and events → the matrix of what was known at each prediction time.

DuckDB joins; numpy sorts, aggregates and scatters the result, in order of rows, into dense blocks:
no pivot, and never more than HELD_EVENTS in memory. Of more, DuckDB sorts the stream first.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from ehr_sn.config import AGGREGATES, Config
from ehr_sn.ingest.code_sets import MEASUREMENTS
from ehr_sn.ingest.codes import as_configured
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.sql import DAY, YEAR, days, identifier, literal
from ehr_sn.ingest.wide import feature_columns

BLOCK_ROWS = 65_536
HELD_EVENTS = 2**22  # of 24 bytes each, and as much again several times over while they are sorted
AT_ONCE = 2**15  # of the events that are held

_Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Feature:
    """One column of the store: where it comes from, by which aggregate, in which unit.

    `codes` are the entries of its set as the configuration has them.
    """

    name: str
    kind: str
    codes: tuple[str | dict[str, Any], ...] = ()
    aggregate: str | None = None
    unit: str = ""
    plausible: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()

    @property
    def code_set(self) -> str | None:
        """The key of its set of codes."""
        if self.kind == "measurement":
            return MEASUREMENTS + self.name.removesuffix(f".{self.aggregate}")
        return f"features.{self.name}" if self.kind == "history" else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_features(config: Config) -> list[Feature]:
    """The store's columns in their order: static, then measurements by aggregate, then history."""
    features = config.features
    listed = [
        Feature(
            column,
            "static",
            unit=static.unit,
            plausible=static.plausible,
            columns=static.columns,
        )
        for name, static in features.wide.items()
        for column in feature_columns(name, static)
    ]
    codes = {name: tuple(map(as_configured, c)) for name, c in features.measured_codes.items()}
    for name, measurement in features.measurements.items():
        units = {"count": "", "slope": f"{measurement.unit or '1'}/year", "days_since_last": "days"}
        listed += [
            Feature(
                f"{name}.{aggregate}",
                "measurement",
                codes[name],
                aggregate,
                units.get(aggregate, measurement.unit),
                measurement.plausible,
            )
            for aggregate in measurement.aggregates or features.aggregates
        ]
    return listed + [
        Feature(f"history.{name}", "history", tuple(map(as_configured, codes)))
        for name, codes in features.history.items()
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
        block = np.full((stop - start, len(features)), np.nan, dtype=np.float32, order="F")
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
    """Streams columns of numbers, ordered by cohort row, into successive blocks."""

    def __init__(self, parts: Iterator[_Columns]):
        self._parts = parts
        self._pending: _Columns | None = None

    def _until(self, stop: int) -> Iterator[_Columns]:
        """What lies in the rows below `stop` and has not been given yet."""
        while True:
            part = self._pending or next(self._parts, None)
            if part is None:
                return
            cut = int(np.searchsorted(part["row"], stop))
            yield {name: column[:cut] for name, column in part.items()}
            if cut < len(part["row"]):
                self._pending = {name: column[cut:] for name, column in part.items()}
                return
            self._pending = None


class _MeasurementScatter(_Scatter):
    def __init__(self, db: duckdb.DuckDBPyConnection, config: Config, names: dict[str, int]):
        measured = config.features.measurements
        sets = [(f"{MEASUREMENTS}{name}", index) for index, name in enumerate(measured)]
        # Column of each (aggregate, measurement); -1 where the store has none.
        columns = {
            aggregate: np.array([names.get(f"{name}.{aggregate}", -1) for name in measured])
            for aggregate in AGGREGATES
        }
        self._columns = {a: column for a, column in columns.items() if (column >= 0).any()}
        query = f"""SELECT c.row * {len(sets)} + k.index AS cell,
                epoch_us(e.time) - epoch_us(c.prediction_time) AS time, e.numeric_value AS value
            {_known(config, sets)} AND e.numeric_value IS NOT NULL"""
        with_slope = "slope" in self._columns
        super().__init__(
            _of_cells(_aggregate(events, with_slope), len(sets))
            for part in (_whole_cells(db, query) if sets else ())
            for events in _in_order(part)
        )

    def fill(self, block: np.ndarray, start: int) -> None:
        for part in self._until(start + len(block)):
            for aggregate, columns in self._columns.items():
                column = columns[part["measurement"]]
                stored = column >= 0
                block[part["row"][stored] - start, column[stored]] = part[aggregate][stored]


class _HistoryScatter(_Scatter):
    def __init__(self, db: duckdb.DuckDBPyConnection, config: Config, names: dict[str, int]):
        history = config.features.history
        sets = [(f"features.history.{name}", names[f"history.{name}"]) for name in history]
        self._columns = [column for _, column in sets]
        query = f"""SELECT DISTINCT c.row, k.index AS "column" {_known(config, sets)}
            ORDER BY c.row"""
        super().__init__(map(_columns, _stream(db, query)) if sets else iter(()))

    def fill(self, block: np.ndarray, start: int) -> None:
        block[:, self._columns] = 0
        for part in self._until(start + len(block)):
            block[part["row"] - start, part["column"]] = 1


def _stream(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.RecordBatch]:
    # A cursor of its own: the stream stays open while other queries run.
    return iter(db.cursor().sql(query).to_arrow_reader())


def _columns(batch: pa.RecordBatch | pa.Table) -> _Columns:
    return {name: batch.column(name).to_numpy() for name in batch.schema.names}


def _whole_cells(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[_Columns]:
    """The rows of a query, those of one `cell` together, in ascending parts; all in one, if few."""
    held: list[pa.RecordBatch] = []
    for batch in _stream(db, query):
        held.append(batch)
        if sum(one.num_rows for one in held) > HELD_EVENTS:
            yield from _cut_anew(_stream(db, f"{query} ORDER BY cell"))
            return
    if held:
        yield _columns(pa.Table.from_batches(held))


def _cut_anew(batches: Iterator[pa.RecordBatch]) -> Iterator[_Columns]:
    """Batches in order of `cell`, cut so that none is in two."""
    rest = None
    for batch in batches:
        if not batch.num_rows:
            continue
        joined = pa.Table.from_batches([batch] if rest is None else [*rest.to_batches(), batch])
        cell = joined.column("cell").to_numpy()
        cut = int(np.searchsorted(cell, cell[-1]))
        if cut:
            yield _columns(joined.slice(0, cut))
        rest = joined.slice(cut)
    if rest is not None:
        yield _columns(rest)


def _in_order(events: _Columns) -> Iterator[_Columns]:
    """Sort by cell, time and value, as np.lexsort does, in parts of whole cells that fit the cache.

    It is quick where a cell's events lie in order of time already.
    """
    order = np.argsort(events["cell"], kind="stable")
    cells = events["cell"][order]
    cuts = np.unique(np.searchsorted(cells, cells[::AT_ONCE]))
    for start, stop in pairwise([*cuts, len(cells)]):
        cell, time, value = (events[key][order[start:stop]] for key in ("cell", "time", "value"))
        earlier = (time[1:] < time[:-1]) | ((time[1:] == time[:-1]) & (value[1:] < value[:-1]))
        if (earlier & (cell[1:] == cell[:-1])).any():
            by_time = np.lexsort((value, time, cell))
            time, value = time[by_time], value[by_time]
        yield {"cell": cell, "time": time, "value": value}


def _of_cells(aggregates: _Columns, measurements: int) -> _Columns:
    row, measurement = np.divmod(aggregates["cell"], measurements)
    return {"row": row, "measurement": measurement, **aggregates}


def _aggregate(events: _Columns, with_slope: bool) -> _Columns:
    """Every aggregate of each cell (row and measurement), from events as `_in_order` has them.

    Sums are taken in that order, so that they do not depend, in their last bit, on how many
    threads DuckDB runs or on events outside the window.
    """
    cell, time, value = (events[key] for key in ("cell", "time", "value"))
    begins = np.diff(cell, prepend=-1) != 0
    first = np.flatnonzero(begins)
    count = np.diff(first, append=len(cell))
    last = first + count - 1
    mean = np.add.reduceat(value, first) / count
    slopes = {}
    if with_slope:
        group = np.repeat(np.arange(len(first)), count)
        years = (time - time[last][group]) / YEAR
        from_mean = years - (np.add.reduceat(years, first) / count)[group]
        covariance = np.add.reduceat(from_mean * (value - mean[group]), first)
        variance = np.add.reduceat(from_mean**2, first)
        slopes["slope"] = np.full(len(first), np.nan)
        np.divide(covariance, variance, out=slopes["slope"], where=variance > 0)
    return {
        "cell": cell[first],
        "last": value[last],
        "mean": mean,
        "min": np.minimum.reduceat(value, first),
        "max": np.maximum.reduceat(value, first),
        "count": count,
        **slopes,
        "days_since_last": -time[last] / DAY,
    }


def _known(config: Config, sets: list[tuple[str, int]]) -> str:
    """SQL that joins cohort rows `c` to the events `e` in their window whose code `k` is wanted.

    `sets` are keys of sets of codes, each with the index that its events get.
    """
    before = "<=" if config.cohort.include_prediction_time else "<"
    window = f"e.time {before} c.prediction_time"
    if config.features.lookback_days is not None:
        lookback = days(config.features.lookback_days)
        window += f" AND e.time >= c.prediction_time - {lookback}"
    wanted = ", ".join(f"({literal(key)}, {index})" for key, index in sets)
    return f"""FROM cohort c
        JOIN event_rows e ON c.subject_id = e.subject_id
        JOIN (SELECT DISTINCT code_id, index FROM code_sets
            JOIN (VALUES {wanted}) wanted(key, index) USING (key)) k ON e.code_id = k.code_id
        WHERE {window}"""
