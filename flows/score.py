"""Flow: fresh extract → scores by the champions. `python flows/score.py CONFIG`"""

from collections.abc import Sequence
from pathlib import Path

from flows.tasks import config_argument, scheduled, step

from prefect import get_run_logger, runtime
from prefect.artifacts import create_table_artifact

from ehr_sn.config import load_config
from ehr_sn.evaluate.small_cells import shown
from ehr_sn.scoring.registry import not_scored
from ehr_sn.scoring.score import read_moment, score_with_champions, summary


@step(name="score extract")
def score_extract(
    config_path: str,
    output: str,
    source: str | None,
    diseases: Sequence[str],
    as_of: str | None,
    with_csv: bool,
) -> tuple[str, bool]:
    folder, is_new = score_with_champions(
        load_config(config_path),
        Path(output),
        source,
        diseases,
        read_moment(as_of) if as_of else None,
        with_csv,
    )
    return str(folder), is_new


@scheduled(name="score")
def score(
    config_path: str,
    output: str = "scores",
    source: str | None = None,
    diseases: Sequence[str] = (),
    as_of: str | None = None,
    with_csv: bool = False,
) -> tuple[str, bool]:
    """Score an extract with the champions; returns the folder of the scores, and if it is new.

    `as_of: scheduled` is the moment at which this run was due, the same however often it is tried.
    """
    if as_of == "scheduled":
        as_of = runtime.flow_run.scheduled_start_time.isoformat()
    folder, is_new = score_extract(config_path, output, source, diseases, as_of, with_csv)
    told = summary(Path(folder))
    scored = shown(told["rows"], load_config(config_path).privacy.smallest_cell)
    lacking = told.get("without_champion", ())
    if lacking:
        get_run_logger().warning(not_scored(lacking, told["models"]))
    rows = [
        {"disease": disease, "version": model["version"], "rows": scored, "new": is_new}
        for disease, model in told["models"].items()
    ]
    rows += [
        {"disease": disease, "version": "no champion", "rows": 0, "new": False}
        for disease in lacking
    ]
    create_table_artifact(rows, key="scores", description=f"Scores in {folder}")
    return folder, is_new


if __name__ == "__main__":
    print(score(config_argument(score.description))[0])
