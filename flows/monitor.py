"""Flow: scores → drift, alarms, and their page. `python flows/monitor.py CONFIG`"""

from pathlib import Path

from flows.ingest import ingest
from flows.tasks import config_argument, scheduled, step

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact

from ehr_sn.config import load_config
from ehr_sn.scoring.monitor import Monitored, monitor_and_record


@step(name="compare with training")
def compare(config_path: str, scores: str, labels: str | None, output: str) -> dict[str, object]:
    found, _ = monitor_and_record(
        load_config(config_path), Path(scores), Path(labels) if labels else None, Path(output)
    )
    for warning in found.warnings:
        get_run_logger().warning(warning)
    _show(found)
    return {
        "rows": found.summary["rows"],
        "alarms": [str(alarm) for alarm in found.alarms],
        "unwatched": [str(thing) for thing in found.unwatched],
    }


def _show(found: Monitored) -> None:
    rows = [
        {"what": d.what, "where": d.where, "by": round(d.by, 3), "limit": d.limit, "alarm": d.alarm}
        for d in sorted(found.drifts, key=lambda d: -d.by / d.limit)
    ]
    create_table_artifact(
        rows[:50],
        key="drift",
        description=f"{len(found.alarms)} alarms, {len(found.unwatched)} things not watched",
    )


@scheduled(name="monitor")
def monitor(
    config_path: str,
    scores: str = "scores",
    labels: str | None = None,
    output: str = "reports",
    after_ingest: bool = False,
) -> dict[str, object]:
    """Compare the newest scores with what their models were trained on; fails on an alarm.

    `scores` is a folder of scores, or one that holds several: the newest is taken. With
    `after_ingest` the configured tables are ingested first, and the labels are theirs.
    """
    labels = ingest(config_path) if after_ingest else labels
    told = compare(config_path, scores, labels, output)
    if told["alarms"]:
        raise DriftAlarm(told["alarms"])
    return told


class DriftAlarm(Exception):  # noqa: N818
    """Patients or model have drifted: the run fails, so that whoever watches the runs sees it."""


if __name__ == "__main__":
    print(monitor(config_argument(monitor.description)))
