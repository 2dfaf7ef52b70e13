"""Flow: one of the paper's other experiments → MLflow. `ehr-sn study NAME`

What an earlier run finished of the same configuration and data is not done again.
"""

from pathlib import Path

from flows.tasks import step, task_runner
from flows.train import StepProgress

from prefect import flow

from ehr_sn import studies, tracking
from ehr_sn.studies import StudyResult


@step(name="study cell", task_run_name="{cell}")
def study_cell(name: str, config_path: str | None, data: str | None, cell: str) -> None:
    config = studies.load_study(name, _path(config_path))
    studies.finish_cell(config, _path(data), cell)


@flow(name="study cells")
def study_cells(name: str, config_path: str | None, data: str | None) -> None:
    """Compute the cells side by side."""
    config = studies.load_study(name, _path(config_path))
    cells = studies.study_of(name).cells(config, _path(data))
    running = [study_cell.submit(name, config_path, data, cell) for cell in cells]
    with StepProgress(len(cells)) as progress:
        for cell, ended in zip(cells, running, strict=True):
            with progress.step("computing", cell):
                ended.result()


@flow(name="study")
def study(name: str, config_path: str | None = None, data: str | None = None) -> StudyResult:
    """Run a study and record its result in MLflow; returns the result."""
    config = studies.load_study(name, _path(config_path))
    side_by_side = study_cells.with_options(task_runner=task_runner(config))
    side_by_side(name, config_path, data)
    result = studies.collect(config, _path(data))
    tracking.log_study(config, result)
    return result


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)
