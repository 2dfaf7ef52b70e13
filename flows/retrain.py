"""Flow: tables → trained comparison → models, promoted by rule. `python flows/retrain.py CONFIG`

The same tables and configuration give the same models: then nothing is trained and nobody promoted.
"""

from pathlib import Path

from flows.pipeline import pipeline
from flows.register import register
from flows.tasks import config_argument, scheduled, step

from prefect.artifacts import create_table_artifact

from ehr_sn.config import load_config
from ehr_sn.scoring import registry


@step(name="promote models")
def promote_models(config_path: str) -> dict[str, bool]:
    decisions = registry.promote(load_config(config_path))
    return {disease: decision.promoted for disease, decision in decisions.items()}


@scheduled(name="retrain")
def retrain(config_path: str) -> dict[str, bool]:
    """Train anew on the tables as they are now; returns for each disease if it was promoted."""
    config_path = str(Path(config_path).absolute())
    pipeline(config_path)
    versions = register(config_path)
    promoted = promote_models(config_path)
    rows = [
        {"disease": disease, "challenger": versions[disease], "promoted": yes}
        for disease, yes in promoted.items()
    ]
    create_table_artifact(rows, key="promotion", description="Why: in the versions' tags in MLflow")
    return promoted


if __name__ == "__main__":
    print(retrain(config_argument(retrain.description)))
