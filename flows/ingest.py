"""Flow: tables → Parquet store. `python flows/ingest.py CONFIG`"""

from flows.tasks import config_argument, step

from prefect import flow

from ehr_sn.config import load_config
from ehr_sn.ingest import store


@step(name="make or find the store")
def make_store(config_path: str) -> str:
    return str(store.ingest(load_config(config_path)))


@flow(name="ingest")
def ingest(config_path: str) -> str:
    """Make the store of a configuration, or find it; returns its folder."""
    return make_store(config_path)


if __name__ == "__main__":
    print(ingest(config_argument(ingest.description)))
