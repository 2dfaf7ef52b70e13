"""CIFAR-10's files, or scikit-learn's digits → pixels and labels; which pixels are observed."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ehr_sn.errors import DataError

WHERE = "Fetch CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html."
SIDE, CHANNELS, CLASSES = 32, 3, 10
RECORD = 1 + CHANNELS * SIDE * SIDE
TRAINING, TEST = [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
FOLDERS = (".", "cifar-10-batches-py", "cifar-10-batches-bin")
COLUMNS = ("split", "label", "jpeg")


@dataclass(frozen=True)
class Images:
    """pixels (N, C, H, W) uint8, from 0 to `top`; labels (N,), from 0; `test`: its own test rows.

    `test` is None where no test rows are given.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    top: int
    test: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def image_files(data: Path) -> list[Path]:
    """Where the images are: a Parquet file of JPEGs, or the five batches and the test batch.

    Raises
    ------
    DataError
        Neither is there.
    """
    if data.is_file():
        return [data]
    for folder in FOLDERS:
        for ending in ("", ".bin"):
            batches = [data / folder / f"{name}{ending}" for name in (*TRAINING, TEST)]
            if all(batch.is_file() for batch in batches):
                return batches
    found = sorted(data.glob("*.parquet"))
    if len(found) == 1:
        return found
    raise DataError(
        f"{data}: there is neither {TRAINING[0]} to {TEST} (Python or .bin) nor one Parquet file "
        f"with the columns {', '.join(COLUMNS)}. {WHERE}"
    )


def read_images(data: Path | None) -> Images:
    """CIFAR-10 from `data`, or scikit-learn's digits.

    Raises
    ------
    DataError
        A file cannot be read, or does not hold what it should.
    """
    return _digits() if data is None else _cifar(tuple(image_files(data)))


def observed_pixels(
    shape: Sequence[int], rates: tuple[float, float], seed: int
) -> NDArray[np.bool_]:
    """(N, 1, H, W), true where a pixel is observed, for images of the shape (N, C, H, W).

    Each image has a rate of missing pixels of its own, uniform between `rates`, and lacks that
    share of its pixels, to the nearest one, at random places; one pixel always stays.
    """
    n, _, height, width = shape
    rng = np.random.default_rng(seed)
    missing = np.rint(rng.uniform(*rates, n) * height * width).astype(np.int64)
    place = rng.random((n, height * width), dtype=np.float32)
    least = np.minimum(missing, height * width - 1)[:, None]
    lowest = np.take_along_axis(np.sort(place, axis=1), least, axis=1)
    return (place >= lowest).reshape(n, 1, height, width)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Images(digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64), 16)


@lru_cache(maxsize=1)
def _cifar(files: tuple[Path, ...]) -> Images:
    if len(files) == 1:
        pixels, labels, test = _parquet(files[0])
    else:
        parts = [_batch(file) for file in files]
        pixels = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        test = np.arange(len(labels)) >= len(labels) - len(parts[-1][1])
    if test.all() or not test.any() or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise DataError(f"{files[0]}: expected training and test images of {CLASSES} classes")
    return Images(pixels, labels, 255, np.flatnonzero(test))


def _batch(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A batch of the binary or of the Python version."""
    if file.suffix == ".bin":
        content = np.fromfile(file, np.uint8)
        if not content.size or content.size % RECORD:
            raise DataError(f"{file}: is not a whole number of records of {RECORD} bytes")
        labels, rows = content.reshape(-1, RECORD)[:, 0], content.reshape(-1, RECORD)[:, 1:]
    else:
        try:
            with file.open("rb") as stream:
                batch = _Arrays(stream, encoding="bytes").load()
            labels, rows = np.array(batch[b"labels"]), batch[b"data"]
            rows = rows.astype(np.uint8, casting="safe").reshape(len(labels), RECORD - 1)
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: is not a batch of CIFAR-10's Python version") from error
    return rows.reshape(-1, CHANNELS, SIDE, SIDE), labels.astype(np.int64)


class _Arrays(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle could otherwise run whatever its writer liked."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images")


def _parquet(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    try:
        table = pq.read_table(file, columns=list(COLUMNS))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file}: is not Parquet with the columns {', '.join(COLUMNS)}. {WHERE}"
        ) from error
    pixels = np.empty((len(table), CHANNELS, SIDE, SIDE), np.uint8)
    for i, encoded in enumerate(table["jpeg"]):
        try:
            image = np.asarray(Image.open(io.BytesIO(encoded.as_py())).convert("RGB"))
            pixels[i] = image.transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, TypeError, ValueError) as error:
            raise DataError(f"{file}: row {i}: jpeg is not an image of 32 × 32") from error
    labels = np.unique(table["label"].to_numpy(), return_inverse=True)[1]
    return pixels, labels.astype(np.int64), table["split"].to_numpy() == "test"
