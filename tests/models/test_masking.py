"""Random masking shows networks exactly what the method makes of rows with fewer entries."""

import numpy as np
import pytest
import torch
from sklearn.pipeline import Pipeline

from ehr_sn.missing import METHODS, MissingMethod, make_method
from ehr_sn.missing.amputate import find_panels, hide
from ehr_sn.missing.scalers import Winsoriser, make_scaler
from ehr_sn.models.fit import Architecture, Budget, Task, fit
from ehr_sn.models.masking import COPIES, CopiedRows, ErasedRows, masking_of
from ehr_sn.models.mlp import MASKING, stream

N, D = 300, 6
ERASABLE = [name for name in METHODS if METHODS[name]().fit(np.eye(3)).erasure() is not None]


class RowMean(MissingMethod):
    """Fills by the mean of the row, so that one entry's loss moves others."""

    def _fit(self, X):
        self.n_ = X.shape[1]

    def _fill(self, X, observed):
        mean = np.where(observed, X, 0).sum(axis=1) / np.maximum(observed.sum(axis=1), 1)
        return np.where(observed, X, mean[:, None])


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.lognormal(size=(N, D)).astype(np.float32)
    x[rng.random((N, D)) < 0.3] = np.nan
    x[5] = np.nan
    x[:, 4] = np.nan
    return x


def row_mean(values: np.ndarray) -> Pipeline:
    steps = [
        ("winsoriser", Winsoriser()),
        ("scaler", make_scaler("standard")),
        ("method", RowMean()),
    ]
    return Pipeline(steps).fit(values)


def test_all_methods_with_constant_fills_are_masked_anew_at_every_step():
    assert {"zero", "mean", "median", "sparsity_normalization", "piecewise_linear"} <= set(ERASABLE)
    assert {f"{name}+mask" for name in ERASABLE} >= {n for n in ERASABLE if n.endswith("+mask")}


@pytest.mark.parametrize("scaler", ["standard", "minmax"])
@pytest.mark.parametrize("name", ERASABLE)
def test_masked_rows_are_what_the_method_makes_of_rows_without_those_entries(name, scaler, values):
    method = make_method(name, scaler).fit(values)
    panels = find_panels(~np.isnan(values))
    masking = masking_of(method, values, panels)
    masked = masking([3, 8], torch.from_numpy(method.transform(values)))
    assert isinstance(masked, ErasedRows)
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, N, (3, 64)))
    rngs = {seed: np.random.Generator(stream(seed, MASKING)) for seed in (3, 8)}
    for _ in range(2):
        x = masked.take(rows, [8, 3, 8]).numpy()
        hidden = {seed: hide(rng, 64, panels) for seed, rng in rngs.items()}
        assert hidden[3].any()
        for r, seed in enumerate([8, 3, 8]):
            expected = method.transform(np.where(hidden[seed], np.nan, values[rows[r]]))
            np.testing.assert_allclose(x[r], expected, rtol=1e-5, atol=1e-6)


def test_other_methods_see_copies_made_of_the_masked_rows(values):
    method = row_mean(values)
    masked = masking_of(method, values, np.arange(D))([0], torch.zeros(N, D))
    assert isinstance(masked, CopiedRows)
    copies = masked.table.view(COPIES, N, D).numpy()
    whole = (copies == method.transform(values).astype(np.float32)).all(axis=2).mean()
    assert 0.5 < whole < 0.75  # half of them on purpose, and those that happened to lose nothing
    rng = np.random.Generator(stream(0, MASKING))
    first = method.transform(np.where(hide(rng, N, np.arange(D)), np.nan, values))
    np.testing.assert_array_equal(copies[0], first.astype(np.float32))
    drawn = masked.take(torch.arange(N)[None], [0])[0].numpy()
    among = (copies == drawn).all(axis=2)
    assert among.any(axis=0).all()
    assert not among.all(axis=1).any()


@pytest.mark.parametrize("copied", [False, True])
def test_a_replicate_masked_beside_others_is_what_it_would_be_alone(values, copied):
    torch.set_num_threads(1)
    method = row_mean(values) if copied else make_method("zero+mask").fit(values)
    x = method.transform(values)
    y = np.nan_to_num(values[:, 0] > 1).astype(float)
    uneven = np.where(np.arange(N) % 3 == 0, np.nan, y)
    tasks = [Task("a", y, np.arange(200), np.arange(200, N)),
             Task("b", uneven, np.arange(150), np.arange(200, N))]  # fmt: skip
    masking = masking_of(method, values, np.arange(D))
    budget = Budget(0.01, batch_size=32, max_epochs=5, patience=2)
    together = fit(x, tasks, [4, 1, 7], Architecture((16,), 0.25), budget, masking=masking)
    for r, replicate in enumerate(together.replicates):
        task, seeds = tasks[replicate.task], [replicate.seed]
        alone = fit(x, [task], seeds, Architecture((16,), 0.25), budget, masking=masking)
        for name, tensor in alone.model.tensors().items():
            mine = together.model.tensors()[name][r : r + 1]
            torch.testing.assert_close(mine, tensor, atol=1e-4, rtol=1e-3)
    plain = fit(x, tasks, [4, 1, 7], Architecture((16,), 0.25), budget)
    assert plain.history != together.history


def test_a_network_trained_on_masked_rows_moves_less_when_entries_go_missing():
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((1500, 1))
    values = (shared + rng.standard_normal((1500, 8))).astype(np.float32) + 1
    y = (shared[:, 0] + 0.3 * rng.standard_normal(1500) > 0).astype(float)
    task = Task("t", y, np.arange(1000), np.arange(1000, 1500))
    method = make_method("zero+mask", "none").fit(values)
    x, panels = method.transform(values), np.arange(8)
    gappy = method.transform(np.where(rng.random(values.shape) < 0.5, np.nan, values))[1000:]
    moved = []
    for masking in (None, masking_of(method, values, panels)):
        budget = Budget(0.01, batch_size=64, max_epochs=15)
        model = fit(x, [task], [0, 1], Architecture((16,)), budget, masking=masking).model
        change = model.predict_proba(gappy) - model.predict_proba(x[1000:])
        moved.append(float(change.mean(1).abs().mean()))
    assert moved[1] < 0.5 * moved[0]
