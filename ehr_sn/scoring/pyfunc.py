"""MLflow runs this file to load a package: columns by name in, probabilities out."""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from ehr_sn.scoring.package import read_package


class PackagedModel(PythonModel):
    """A package as a model of MLflow; a column that is absent counts as missing."""

    def load_context(self, context: Any) -> None:
        self.package = read_package(context.artifacts["package"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Rows to the fields of `Scores`."""
        rows = model_input.reindex(columns=self.package.features)
        return pd.DataFrame(vars(self.package.score(rows.to_numpy(np.float32, na_value=np.nan))))


set_model(PackagedModel())
