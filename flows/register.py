"""Flow: trained cells → registered models, challengers. `python flows/register.py CONFIG`"""

from pathlib import Path

from flows.ingest import ingest
from flows.tasks import config_argument, step

from prefect import flow

from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store
from ehr_sn.scoring import registry


@step(name="register models")
def register_models(config_path: str, store_path: str) -> dict[str, int]:
    return registry.register(load_config(config_path), Store(Path(store_path)))


@flow(name="register")
def register(config_path: str, store_path: str | None = None) -> dict[str, int]:
    """Register the best comparison's models as challengers; returns disease → version.

    The comparison must have been trained.
    """
    store_path = str(Path(store_path or ingest(config_path)).absolute())
    return register_models(config_path, store_path)


if __name__ == "__main__":
    print(register(config_argument(register.description)))
