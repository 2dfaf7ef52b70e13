"""How every task here runs: where its configuration says, retried on I/O errors only, not cached.

Finished work is found on disk by its fingerprint (stores, cells) and in MLflow by its tags. A
second cache, keyed on paths, could only disagree with them.
"""

import os
from argparse import ArgumentParser
from functools import partial
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from ehr_sn.config import Config
from ehr_sn.errors import ConfigError, EhrSnError
from ehr_sn.studies import StudyConfig


def _is_io_error(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), OSError)


step = partial(
    task,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_io_error,
)


def say_what_to_do(flow: Any, run: Any, state: Any) -> None:
    """A hook of flows that nobody watches: leave a page in Prefect about why one failed."""
    error = state.result(raise_on_failure=False)
    # The project's own messages hold no patient's value; of others nobody knows.
    why = str(error) if isinstance(error, EhrSnError) else f"{type(error).__name__}: see the log."
    create_markdown_artifact(
        f"""# {flow.name} failed

{why}

Nothing half-done is visible: what was finished is kept, and the next run goes on from there. When
the cause is mended, wait for the schedule, or run it now:

    prefect flow-run retry {run.id}
""",
        key=f"failed-{flow.name.replace(' ', '-')}",
        description=f"Why {flow.name} failed, and what to do",
    )


scheduled: Any = partial(
    flow,
    on_failure=[say_what_to_do],
    on_crashed=[say_what_to_do],
    timeout_seconds=12 * 3600,  # far beyond what it takes: what hangs must not hold up the next
)


def task_runner(config: Config | StudyConfig) -> TaskRunner:
    """Where shards are built, cells and studies computed, as `runner` in the configuration says.

    Raises
    ------
    ConfigError
        It says Dask, and prefect-dask is not installed.
    """
    runner = config.runner
    workers = runner.workers or os.cpu_count()
    if runner.kind == "threads":
        return ThreadPoolTaskRunner(max_workers=workers)
    if runner.kind == "processes":
        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        where = config.where("runner.kind")
        raise ConfigError(
            f"{where}: dask needs the package prefect-dask: pip install 'ehr-sn[dask]'"
        ) from None
    if runner.address is not None:
        return DaskTaskRunner(address=runner.address)
    return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1})


def config_argument(description: str | None) -> str:
    """The configuration named on the command line of `python flows/….py`."""
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="configs/nafld.yaml",
        help="the data set's YAML (default: %(default)s)",
    )
    return str(parser.parse_args().config)
