"""What is shown of a learned representation, and that it reaches MLflow."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from ehr_sn import tracking
from ehr_sn.evaluate.representation import activity_figure, error_table, filters_picture
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import Cell, Representation, train_cell

SPARSE = {"kind": "sparse_autoencoder", "units": 5, "rho": 0.1, "epochs": 2}
PCA = {"kind": "pca", "units": 3}


def test_units_are_drawn_by_their_activity_beside_rho() -> None:
    rates = np.array([[0.3, 0.1], [0.0, 0.2]], np.float32)
    seen = Representation(rates, rates, rates[:, :, None], ["a", "b"], ["a", "b"])
    units, rho = activity_figure([seen], 0.05).axes[0].lines
    np.testing.assert_allclose(units.get_ydata(), [0.05, 0.25], rtol=1e-6)
    assert list(rho.get_ydata()) == [0.05, 0.05]
    assert error_table([seen, seen]).mean_squared_error.tolist() == pytest.approx([0.15, 0.15])


def test_a_filter_is_drawn_where_its_pixels_are() -> None:
    weight = np.zeros((6, 3))
    weight[4, 2] = -3.0
    (image,) = filters_picture(weight, (2, 3)).axes[0].images
    drawn = np.asarray(image.get_array())
    assert drawn.shape == (7, 9)
    assert np.argwhere(drawn).tolist() == [[5, 2]]  # third image, in the second row; pixel (1, 1)
    assert drawn.min() == -1


def test_a_run_tells_of_its_representation(busy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    networks = {"sae": {"representation": SPARSE}, "pca": {"representation": PCA}}
    config = busy.config(
        train={
            "seeds": 2,
            "max_epochs": 2,
            "methods": {"standard": ["zero"]},
            "architectures": networks,
        }
    )
    store = Store(ingest(config))
    with tracking.tracked(config, store) as tracker:
        for name in networks:
            train_cell(config, store, Cell("zero", "standard", name, 0))
            tracker.log_comparison(config, store, "zero", "standard", name)
    client = MlflowClient(tracking.tracking_uri())
    runs = {
        r.data.params["architecture"]: r
        for r in client.search_runs([tracker.experiment_id])
        if "architecture" in r.data.params
    }
    params = {name: run.data.params for name, run in runs.items()}
    assert len({frozenset(names) for names in params.values()}) == 1
    found = {name: p["representation"] for name, p in params.items()}
    assert found == {"sae": "sparse_autoencoder", "pca": "pca"}
    assert params["sae"]["representation_rho"] == "0.1"
    assert params["pca"]["representation_units"] == "3"
    assert params["pca"]["representation_rho"] == ""
    for name, n_units in (("sae", 5), ("pca", 3)):
        run_id = runs[name].info.run_id
        files = [f.path for f in client.list_artifacts(run_id, "representation")]
        assert files == [f"representation/{f}" for f in ("activity.png", "error.csv", "units.csv")]
        units, error = (
            pd.read_csv(client.download_artifacts(run_id, f"representation/{table}.csv"))
            for table in ("units", "error")
        )
        assert len(units) == n_units
        assert set(error.feature) == set(store.feature_names)
        assert units.strongest_inputs.str.contains("hdl").any()
