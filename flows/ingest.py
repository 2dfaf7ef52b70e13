"""Flow: tables → Parquet store. `python flows/ingest.py CONFIG`"""

from pathlib import Path

from flows.tasks import config_argument, step, task_runner

from prefect import flow

from ehr_sn.config import Config, load_config, settings
from ehr_sn.ingest import shards, store


@step(name="build shard", task_run_name="build shard {shard}")
def build_shard(config_path: str, given: dict[str, str], work: str, shard: int) -> None:
    shards.build_shard(load_config(config_path, given), shards.Work(Path(work)), shard)


@flow(name="build shards")
def build_shards(config_path: str, work: str) -> None:
    """Build the first shard, then the others side by side."""
    if shards.Work(Path(work)).unfinished[0] == 0:
        build_shard.submit(config_path, settings(), work, 0).result()
    others = shards.Work(Path(work)).unfinished
    for building in [build_shard.submit(config_path, settings(), work, shard) for shard in others]:
        building.result()


@flow(name="ingest")
def ingest(config_path: str) -> str:
    """Make the store of a configuration, or find it; returns its folder."""
    config = load_config(config_path)
    path = str(Path(config_path).absolute())  # workers may run in another folder

    def prepare(fetched: Config, work: shards.Work) -> None:
        # Here, and not told to Prefect: only this process knows where databases' copies lie.
        step(name="read tables")(lambda: shards.prepare(fetched, work))()

    def build(_: Config, work: shards.Work) -> None:
        if work.unfinished:
            build_shards.with_options(task_runner=task_runner(config))(path, str(work.folder))

    return str(store.ingest(config, prepare, build))


if __name__ == "__main__":
    print(ingest(config_argument(ingest.description)))
