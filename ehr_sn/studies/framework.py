"""A study's configuration and module → its cells, finished one by one on disk → its result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, Self

import torch
from pydantic import Field, PrivateAttr
from threadpoolctl import threadpool_limits

from ehr_sn.config import Name, Runner, StrictModel, digest, line_of, read_yaml
from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.studies.result import Part, StudyResult

STUDIES = ("recommender", "uci", "vision")
CONFIGS = Path(__file__).parents[2] / "configs" / "studies"
CONSTANT_SCALE = "constant_scale"
"""The variant that scales all rows alike: by 1 / mean |m|, with |m| a row's observed entries."""
TUNED = " · tuned"
"""How a variant's name ends whose learning rate and weight decay the tuning rows chose."""

Progress = Callable[[int, int, str], None]
"""Called with (cells done, cells in all, the cell that comes next)."""


class StudyConfig(StrictModel):
    """What every study's configuration has; each study's own `Config` adds its keys.

    `runner` says where cells run, as in a data set's configuration. With `workers: 1` a cell has
    all cores, else one.
    """

    study: Name
    title: str = ""
    seed: int = Field(0, ge=0)
    data_dir: Path = Path("data")
    runner: Runner = Runner()
    _path: Path = PrivateAttr(Path())
    _root: Any = PrivateAttr(None)

    def where(self, key: str) -> str:
        """File, line and key, to begin an error message with."""
        if self._root is None:
            return key
        return f"{self._path}:{line_of(self._root, key.split('.'))}: {key}"

    @property
    def results_depend_on(self) -> dict[str, Any]:
        """Everything in it but where cells run and where they are kept."""
        return self.model_dump(mode="json", exclude={"title", "data_dir", "runner"})

    def for_cell(self, cell: str) -> Self:
        """All that the cell depends on; a study may leave out what it does not."""
        return self


class Study(Protocol):
    """A study's module, as `ehr_sn.studies` describes it."""

    FORMAT: int
    Config: type[StudyConfig]

    def files(self, config: Any, data: Path | None) -> list[Path]: ...
    def cells(self, config: Any, data: Path | None) -> list[str]: ...
    def run_cell(self, config: Any, data: Path | None, cell: str) -> Part: ...
    def summarise(self, config: Any, data: Path | None, parts: Sequence[Part]) -> StudyResult: ...


def study_of(name: str) -> Study:
    """The module of that study.

    Raises
    ------
    ConfigError
        There is none; names the nearest.
    """
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}; {did_you_mean(name, STUDIES)}")
    module: Any = import_module(f"ehr_sn.studies.{name}")
    return module


def load_study(name: str, path: Path | None = None) -> StudyConfig:
    """Read a study's configuration: that of the repository, or another file.

    Raises
    ------
    ConfigError
        Naming file, line and key of every fault, and the nearest valid name.
    """
    kind = study_of(name).Config
    path = path or CONFIGS / f"{name}.yaml"
    config, root = read_yaml(path, kind)
    config._path, config._root = path, root
    if config.study != name:
        raise ConfigError(
            f"{config.where('study')}: is {config.study!r}, and the study asked for is {name!r}"
        )
    return config


def cell_path(config: StudyConfig, data: Path | None, cell: str) -> Path:
    """Where a finished cell's part is, or will be."""
    study, part = study_of(config.study), config.for_cell(cell)
    read = [(file.name, _sha256(file, file.stat().st_mtime_ns)) for file in study.files(part, data)]
    key = digest([study.FORMAT, part.results_depend_on, read, cell])
    return config.data_dir / "studies" / config.study / f"{key}.json"


def finish_cell(config: StudyConfig, data: Path | None, cell: str) -> Part:
    """Run a cell and keep its part on disk, or find it there."""
    path = cell_path(config, data, cell)
    if path.exists():
        return Part.from_json(path.read_text())
    if config.runner.workers != 1:  # a core each
        torch.set_num_threads(1)
        threadpool_limits(1)
    started = perf_counter()
    part = study_of(config.study).run_cell(config, data, cell)
    part = part.timed(perf_counter() - started)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}-partial")
    partial.write_text(part.to_json())
    partial.replace(path)
    return part


def run(
    config: StudyConfig, data: Path | None = None, progress: Progress | None = None
) -> StudyResult:
    """Run a study in this process, cell by cell; finished cells are found on disk."""
    names = study_of(config.study).cells(config, data)
    for done, cell in enumerate(names):
        if progress is not None:
            progress(done, len(names), cell)
        finish_cell(config, data, cell)
    return collect(config, data)


def collect(config: StudyConfig, data: Path | None = None) -> StudyResult:
    """The result of a study whose cells are all on disk."""
    study = study_of(config.study)
    paths = [cell_path(config, data, cell) for cell in study.cells(config, data)]
    return study.summarise(config, data, [Part.from_json(path.read_text()) for path in paths])


@lru_cache(maxsize=64)
def _sha256(file: Path, _changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
