"""How every task here runs: retried on I/O errors only, never cached by Prefect.

Finished work is found on disk by its fingerprint (stores, cells) and in MLflow by its tags. A
second cache, keyed on paths, could only disagree with them.
"""

from argparse import ArgumentParser
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE


def _is_io_error(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), OSError)


step = partial(
    task,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_io_error,
)


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
