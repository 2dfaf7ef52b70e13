"""Classical small tables × ways of handling missing entries → AUROC by repeated cross-validation.

Tables that lack entries by nature are taken as they are; from complete ones entries are removed at
random, at each of several rates. Every method of the registry may be a variant: rows are made and
networks trained as in the main job, all folds and classes in one batched computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from sklearn.model_selection import StratifiedGroupKFold

from ehr_sn.config import Distinct, Method, Name, Scaler, Some, StrictModel
from ehr_sn.errors import DataError, did_you_mean
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.missing import make_method
from ehr_sn.missing.amputate import Amputation
from ehr_sn.models.fit import Architecture, Budget, Task, fit
from ehr_sn.models.methods import find_method
from ehr_sn.models.mixture import fit_mixture
from ehr_sn.studies.framework import TUNED, StudyConfig
from ehr_sn.studies.result import Part, Score, StudyResult, count_curve, count_edges
from ehr_sn.studies.tables import Table, TableConfig, read_table

FORMAT = 1
REFERENCE, SN = "zero", "sparsity_normalization"
SCALER_NAMES = {"minmax": "min-max", "standard": "z-scores"}
Rows = NDArray[np.float32]


class Variant(StrictModel):
    """A method of the registry, and the K of Sparsity Normalization.

    A variant whose name ends in " · tuned" chooses its budget on tuning rows.
    """

    method: Method
    k: float | None = Field(None, gt=0)


class Training(StrictModel):
    """How networks train; tuned ones choose from `learning_rates` and `weight_decays`.

    In large tables batches are larger than `batch_size`, so that an epoch has `most_batches`.
    """

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (32,)
    learning_rate: float = Field(1e-2, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    batch_size: int = Field(32, ge=1)
    most_batches: int = Field(20, ge=1)
    max_epochs: int = Field(60, ge=1)
    patience: int = Field(10, ge=1)
    seeds: int = Field(1, ge=1)
    winsorise: float = Field(0.005, ge=0, lt=0.5)
    learning_rates: Annotated[tuple[float, ...], Some, Distinct] = (3e-3, 1e-2, 3e-2)
    weight_decays: Annotated[tuple[float, ...], Some, Distinct] = (1e-2, 1.0)

    def budgets(self, tuned: bool, rows: int) -> list[Budget]:
        """What a network is trained with on so many rows, or may choose from."""
        rates = self.learning_rates if tuned else (self.learning_rate,)
        decays = self.weight_decays if tuned else (self.weight_decay,)
        batch_size = max(self.batch_size, math.ceil(rows / self.most_batches))
        return [
            Budget(rate, decay, batch_size, self.max_epochs, self.patience)
            for rate, decay in product(rates, decays)
        ]


class Config(StudyConfig):
    """Tables and variants; cross-validation in `folds`, `repeats` times.

    Of the folds that are not held out, the next one is for tuning and the rest for training. With
    `--data`, tables that are files are read as well; without, those that packages bring.
    """

    folds: int = Field(5, ge=3)
    repeats: int = Field(2, ge=1)
    scalers: Annotated[tuple[Scaler, ...], Some, Distinct] = ("minmax",)
    removed: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Some, Distinct]
    training: Training = Training()
    variants: dict[str, Variant]
    tables: Annotated[dict[Name, TableConfig], Some]

    @model_validator(mode="after")
    def _variants_known(self) -> Self:
        for name in (REFERENCE, SN):
            if name not in self.variants:
                raise ValueError(f"variants: {name} is missing: it is what the study compares")
        for table, how in self.tables.items():
            for name in how.without:
                if name not in self.variants:
                    hint = did_you_mean(name, self.variants)
                    raise ValueError(f"tables.{table}.without: no variant {name!r}; {hint}")
        return self

    def for_cell(self, cell: str) -> Self:
        """Return the study of the cell's table alone, with no rates, scalers or repeats."""
        name = cell.partition(",")[0]
        table = self.tables[name].model_copy(update={"ranked": True})
        alone = {"tables": {name: table}, "removed": (), "scalers": (), "repeats": 1}
        return self.model_copy(update=alone)


@dataclass(frozen=True)
class Job:
    """A table at a rate of removal (0: as it is), with a scaler, in a repeat (from 0)."""

    table: str
    rate: float
    scaler: Scaler
    repeat: int

    @property
    def scaled(self) -> str:
        return SCALER_NAMES.get(self.scaler, self.scaler)

    @property
    def setting(self) -> str:
        return ", ".join([self.table, *[f"{self.rate:.0%} removed"] * (self.rate > 0), self.scaled])


def files(config: Config, data: Path | None) -> list[Path]:
    """The tables' files below `data`, all of which must be there."""
    if data is None:
        return []
    named = {name: data / table.file for name, table in config.tables.items() if table.file}
    for name, path in named.items():
        if not path.is_file():
            raise DataError(f"{config.where(f'tables.{name}.file')}: {path} is not there")
    return list(named.values())


def cells(config: Config, data: Path | None) -> list[str]:
    """A table, rate, scaler and repeat each."""
    return list(_jobs(config, data))


def _jobs(config: Config, data: Path | None) -> dict[str, Job]:
    jobs = (
        Job(name, rate, scaler, repeat)
        for name, table in config.tables.items()
        if data is not None or table.file is None
        for rate in (config.removed if table.complete else (0.0,))
        for scaler in config.scalers
        for repeat in range(config.repeats)
    )
    return {f"{job.setting}, repeat {job.repeat + 1}": job for job in jobs}


def run_cell(config: Config, data: Path | None, cell: str) -> Part:
    """Every variant on the same rows and folds."""
    job = _jobs(config, data)[cell]
    how = config.tables[job.table]
    table = read_table(how, data, config.where(f"tables.{job.table}"))
    seed = config.seed + job.repeat
    x, fold = _removed(table.x, job.rate, seed), _folds(table, config.folds, seed)
    observed = (~np.isnan(x)).sum(axis=1)
    edges = count_edges((~np.isnan(_removed(table.x, job.rate, config.seed))).sum(axis=1))
    common = int(table.labels.mean(axis=0).argmax())
    scores, curves, chosen = [], [], {}
    for name, variant in config.variants.items():
        if name in how.without:
            continue
        probability, choices = _out_of_fold(config, variant, name, job, x, table.labels, fold)
        for f in range(config.folds):
            held_out = fold == f
            areas = [
                auroc(y, p)
                for y, p in zip(table.labels[held_out].T, probability[:, :, held_out], strict=True)
            ]
            repeat = job.repeat * config.folds + f
            scores.append(Score(job.setting, name, repeat, "AUROC", float(np.mean(areas))))
        if name in (REFERENCE, SN):
            # One class: those of all classes together would hide the bias, which they share out.
            p, y = probability[common].mean(axis=0), table.labels[:, common]
            curves.append(count_curve(job.setting, name, observed, p, y, edges))
        if any(choices):
            chosen[f"{job.setting} · {name}"] = " | ".join(choices)
    return Part(tuple(scores), tuple(curves), chosen)


def summarise(config: Config, data: Path | None, parts: Sequence[Part]) -> StudyResult:
    """Ranks are over the tables of a rate, and over all tables, each once.

    Variants of the ablation, which differ in scale or budget, are not ranked.
    """
    once = min(config.removed, key=lambda rate: abs(rate - 0.5))
    rankings: dict[str, list[str]] = {}
    for job in _jobs(config, data).values():
        if config.tables[job.table].ranked and job.repeat == 0:
            rankings.setdefault(_titled(job, job.rate), []).append(job.setting)
            if job.rate in (0, once):
                rankings.setdefault(_titled(job, None), []).append(job.setting)
    named_as_method = [name for name, v in config.variants.items() if name == v.method]
    return StudyResult(
        study=config.study,
        title=config.title,
        parts=tuple(parts),
        metric="AUROC",
        higher_is_better=True,
        reference=REFERENCE,
        sn=SN,
        repeats_are=f"{config.repeats} × {config.folds}-fold cross-validation",
        test_train_ratio=1 / (config.folds - 1),
        rankings=rankings,
        ranked=[name for name in named_as_method if name != "constant_scale"],
        notes=(
            "More than two classes: the mean AUROC of each against the others. Ranks over all "
            f"tables: of complete ones with {once:.0%} removed.",
        ),
        axes=("observed entries", "mean probability"),
    )


def _titled(job: Job, rate: float | None) -> str:
    """The ranking over the tables of one rate, or over all."""
    tables = "all tables" if rate is None else f"{rate:.0%} removed" if rate else "as they are"
    return f"{tables}, {job.scaled}"


def _removed(x: Rows, rate: float, seed: int) -> Rows:
    return Amputation("mcar", rate, seed=seed).fit(x)(x).astype(np.float32) if rate else x


def _folds(table: Table, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold (from 0) in which each row is held out, (N,)."""
    found = np.empty(len(table.x), dtype=np.int64)
    dealt = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, rows) in enumerate(dealt.split(table.x, table.strata, table.groups)):
        found[rows] = fold
    return found


def _out_of_fold(
    config: Config,
    variant: Variant,
    name: str,
    job: Job,
    x: Rows,
    labels: Rows,
    fold: NDArray[np.int64],
) -> tuple[NDArray[np.float32], list[str]]:
    """Probabilities (tasks, seeds, N) of rows by networks that did not see them, and choices.

    The choices are a fold's best budget, and parameters of a method that has several.
    """
    training = config.training
    first = config.seed + job.repeat * training.seeds
    seeds = range(first, first + training.seeds)
    rows = find_method(variant.method).rows
    given = {} if variant.k is None else {"k": variant.k}
    candidates = make_method(rows, job.scaler)["method"].candidates
    budgets = training.budgets(name.endswith(TUNED), len(x) * (config.folds - 2) // config.folds)
    best = np.full(config.folds, -np.inf)
    probability = np.empty((labels.shape[1], len(seeds), len(x)), dtype=np.float32)
    choices = [""] * config.folds
    for params in candidates:
        tables = []
        for f in range(config.folds):
            method = make_method(rows, job.scaler, training.winsorise, **given, **params)
            tables.append(method.fit(x[_training(fold, f, config.folds)]).transform(x))
        for budget in budgets:
            for f, tuning, held_out in _trained(
                tables, labels, fold, seeds, variant.method, training, budget
            ):
                if tuning > best[f]:
                    best[f] = tuning
                    probability[:, :, fold == f] = held_out
                    choices[f] = _told(params, budget if len(budgets) > 1 else None)
    return probability, choices


def _training(fold: NDArray[np.int64], held_out: int, folds: int) -> NDArray[np.bool_]:
    """Rows neither held out nor, being in the next fold, tuned on."""
    return (fold != held_out) & (fold != (held_out + 1) % folds)


def _trained(
    tables: list[Rows],
    labels: Rows,
    fold: NDArray[np.int64],
    seeds: Sequence[int],
    method: str,
    training: Training,
    budget: Budget,
) -> Iterator[tuple[int, float, Rows]]:
    """Return each fold's AUROC on tuning rows and held-out probabilities (tasks, seeds, rows).

    The folds' tables are stacked, so that all networks train in one call.
    """
    how = find_method(method)
    folds, n, n_tasks = len(tables), len(labels), labels.shape[1]
    together = [[f] for f in range(folds)] if how.layer == "gmm" else [list(range(folds))]
    for group in together:
        stacked = np.concatenate([tables[f] for f in group])
        mixture = None
        if how.layer == "gmm":
            values, mask = np.hsplit(tables[group[0]][_training(fold, group[0], folds)], 2)
            mixture = fit_mixture(values, mask > 0)
        tasks = []
        for place, f in enumerate(group):
            train, tuning = _training(fold, f, folds), fold == (f + 1) % folds
            for task in range(n_tasks):
                y = np.full(len(stacked), np.nan, dtype=np.float32)
                y[place * n : (place + 1) * n] = labels[:, task]
                at = [np.flatnonzero(part) + place * n for part in (train, tuning)]
                tasks.append(Task(f"class {task} of fold {f}", y, at[0], at[1]))
        architecture = Architecture(
            training.hidden,
            sparsity_norm=how.sparsity_norm,
            neumiss=how.layer == "neumiss",
            mixture=mixture,
        )
        fitted = fit(stacked, tasks, seeds, architecture, budget)
        of_fold = n_tasks * len(seeds)
        for place, f in enumerate(group):
            mine = range(place * of_fold, (place + 1) * of_fold)
            reached = [fitted.history[i].tuning_auroc[fitted.history[i].best_epoch] for i in mine]
            held_out = fitted.model.select(mine).predict_proba(
                torch.from_numpy(tables[f][fold == f])
            )
            yield f, float(np.mean(reached)), held_out.reshape(n_tasks, len(seeds), -1).numpy()


def _told(params: Any, budget: Budget | None) -> str:
    told = [f"{key} {value:g}" for key, value in params.items()]
    if budget is not None:
        told += [f"lr {budget.learning_rate:g}", f"decay {budget.weight_decay:g}"]
    return ", ".join(told)
