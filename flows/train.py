"""Flow: Parquet store → trained cells and MLflow runs. `python flows/train.py CONFIG`

What an earlier run finished is not done again, whether it was interrupted or not.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from time import perf_counter

from flows.ingest import ingest
from flows.tasks import config_argument, step, task_runner

from prefect import flow
from prefect.futures import PrefectFuture
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ehr_sn import tracking
from ehr_sn.config import load_config, settings
from ehr_sn.evaluate.diagnostics import asked_of
from ehr_sn.ingest.store import Store
from ehr_sn.models import learning_curve
from ehr_sn.models import train as training
from ehr_sn.models import tune as tuning


@step(name="tune", task_run_name="tune {method} {scaler} {architecture} split {split}")
def tune(
    config_path: str,
    given: dict[str, str],
    store_path: str,
    method: str,
    scaler: str,
    architecture: str,
    split: int,
) -> str:
    cell = training.Cell(method, scaler, architecture, split)
    return str(tuning.tune(load_config(config_path, given), Store(Path(store_path)), cell))


@step(name="train cell", task_run_name="train {method} {scaler} {architecture} split {split}")
def train_cell(
    config_path: str,
    given: dict[str, str],
    store_path: str,
    method: str,
    scaler: str,
    architecture: str,
    split: int,
) -> str:
    cell = training.Cell(method, scaler, architecture, split)
    config = load_config(config_path, given)
    return str(training.train_cell(config, Store(Path(store_path)), cell))


@step(name="train with fewer rows")
def train_with_fewer_rows(
    config_path: str,
    given: dict[str, str],
    store_path: str,
    share: float,
    method: str,
    scaler: str,
    architecture: str,
    split: int,
) -> str:
    store = learning_curve.FewerRows(Path(store_path), share)
    cell = training.Cell(method, scaler, architecture, split)
    return str(training.train_cell(load_config(config_path, given), store, cell))


@step(name="log comparison", task_run_name="log {method} {scaler} {architecture}")
def log_comparison(
    config_path: str, store_path: str, parent_id: str, method: str, scaler: str, architecture: str
) -> None:
    config, store = load_config(config_path), Store(Path(store_path))
    tracker = tracking.Tracker.of(config, store, parent_id)
    if config.tune.trials and architecture not in config.train.blends:
        tracker.log_tuning(config, store, (method, scaler, architecture))
    tracker.log_comparison(config, store, method, scaler, architecture)


@flow(name="train cells")
def train_cells(config_path: str, store_path: str, parent_id: str) -> dict[str, float]:
    """Train and record what is not recorded; returns the seconds each kind of step took."""
    config, store = load_config(config_path), Store(Path(store_path))
    splits = range(config.splits.repeats)
    tracker = tracking.Tracker.of(config, store, parent_id)
    recorded = tracker.finished_comparisons(store)
    todo = [c for c in training.comparisons(config) if c not in recorded]
    keys = [training.Cell(*comparison, split) for comparison in todo for split in splits]
    tuned = [c for c in keys if config.tune.trials and not training.members_of(config, c)]
    steps = len(tuned) + len(keys) + len(todo)
    with StepProgress(steps + config.evaluate.learning_curve) as progress:
        for disease, features in training.never_observed(store).items() if todo else ():
            progress.console.print(_unseen(disease, features), style="yellow", soft_wrap=True)
        tunings = [tune.submit(config_path, settings(), store_path, *astuple(c)) for c in tuned]
        for cell, tuning in zip(tuned, tunings, strict=True):
            with progress.step("tuning", *astuple(cell)[:3], f"split {cell.split + 1}"):
                tuning.result()
        cells: dict[training.Cell, PrefectFuture[str]] = {}
        for cell in keys:
            members = [cells[m] for m in training.members_of(config, cell) if m in cells]
            cells[cell] = train_cell.submit(
                config_path, settings(), store_path, *astuple(cell), wait_for=members
            )
        for comparison in todo:
            for split in splits:
                with progress.step("training", *comparison, f"split {split + 1}"):
                    cells[training.Cell(*comparison, split)].result()
            with progress.step("recording", *comparison):
                log_comparison(config_path, store_path, parent_id, *comparison)
        if config.evaluate.learning_curve:
            with progress.step("training", "learning curve"):
                further = [
                    train_with_fewer_rows.submit(
                        config_path, settings(), store_path, share, *comparison, split
                    )
                    for share, comparison, split in learning_curve.further_cells(config, store)
                ]
                for cell in further:
                    cell.result()
                tracker.log_learning_curve(config, store)
    return progress.seconds


@flow(name="train")
def train(config_path: str, store_path: str | None = None, force: bool = False) -> str:
    """Train and record every comparison of a configuration; returns the MLflow parent run's id.

    Without `store_path` the store is made or found first. `force` records a new parent run even
    if one of the same store and configuration has finished. Cells train side by side, one a core,
    or wherever `runner` says.
    """
    store_path = str(Path(store_path or ingest(config_path)).absolute())
    config_path = str(Path(config_path).absolute())  # workers may run in another folder
    config, store = load_config(config_path), Store(Path(store_path))
    asked_of(config, store)  # refuses a wrong name before anything is trained
    with tracking.tracked(config, store, force) as tracker:
        if tracker.is_finished():
            return tracker.parent_id
        side_by_side = train_cells.with_options(task_runner=task_runner(config))
        seconds = side_by_side(config_path, store_path, tracker.parent_id)
        tracker.finish(config, store, seconds)
        return tracker.parent_id


def _unseen(disease: str, features: list[str]) -> str:
    """
    >>> _unseen("ill", ["bnp"])
    'Warning: no eligible training row of ill has bnp in some split; boosting leaves it out there'
    """
    named = ", ".join(features[:5])
    more = f" and {len(features) - 5} more" if len(features) > 5 else ""
    return (
        f"Warning: no eligible training row of {disease} has {named}{more} in some split; boosting "
        f"leaves {'it' if len(features) == 1 else 'them'} out there"
    )


class StepProgress(Progress):
    """A progress bar that also keeps how long each kind of step took.

    Where stderr is no terminal (a log of cron or a service), a line at each tenth of the way.
    """

    def __init__(self, steps: int):
        super().__init__(
            TextColumn("{task.description:<60}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.seconds: Counter[str] = Counter()
        self._bar = self.add_task("", total=steps)

    @contextmanager
    def step(self, kind: str, *names: str) -> Iterator[None]:
        self.update(self._bar, description=f"{kind} {' · '.join(names)}")
        started = perf_counter()
        yield
        self.seconds[kind] += perf_counter() - started
        self.advance(self._bar)
        bar = self.tasks[self._bar]
        done, steps = int(bar.completed), int(bar.total or 0)
        if not self.console.is_terminal and 10 * done % steps < 10:
            self.console.print(f"{done} of {steps} steps done, {bar.elapsed or 0:.0f} s")


if __name__ == "__main__":
    print(train(config_argument(train.description)))
