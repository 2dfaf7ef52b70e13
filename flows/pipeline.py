"""Flow: ingest, then train. `python flows/pipeline.py CONFIG`"""

from flows.ingest import ingest
from flows.tasks import config_argument
from flows.train import train

from prefect import flow


@flow(name="pipeline")
def pipeline(config_path: str, force: bool = False) -> str:
    """Go from tables to results in MLflow; return the MLflow parent run's id."""
    return train(config_path, ingest(config_path), force)


if __name__ == "__main__":
    print(pipeline(config_argument(pipeline.description)))
