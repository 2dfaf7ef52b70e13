"""Networks that compute side by side are the networks they would be alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from ehr_sn.models.mlp import StackedMLP


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the pipeline trains; more threads wait for one another wherever other work runs too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table(n_rows: int, n_features: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n_rows, n_features)).astype(np.float32))


def plain_copy(model: StackedMLP, replicate: int) -> nn.Sequential:
    """The replicate as an ordinary PyTorch network."""
    modules: list[nn.Module] = []
    for i, layer in enumerate([*model.layers, model.output]):
        _, n_in, n_out = layer.weight.shape
        linear = nn.Linear(n_in, n_out)
        linear.weight.data = layer.weight.data[replicate].T.clone()
        linear.bias.data.zero_()
        if layer.bias is not None:
            linear.bias.data = layer.bias.data[replicate, 0].clone()
        modules.append(linear)
        if i < len(model.layers):
            modules += [nn.BatchNorm1d(n_out)] if model.norms else []
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("hidden", [(), (16,), (16, 8), (3, 1)])
def test_logits_and_gradients_are_those_of_plain_networks(hidden, batch_norm):
    model = StackedMLP(5, hidden, seeds=[3, 1, 4], batch_norm=batch_norm)
    x = torch.stack([table(20, 5, seed) for seed in range(3)])
    logits = model(x)
    logits.square().sum().backward()
    for r in range(3):
        plain = plain_copy(model, r)
        expected = plain(x[r]).squeeze(1)
        expected.square().sum().backward()
        torch.testing.assert_close(logits[r], expected)
        linears = [module for module in plain if isinstance(module, nn.Linear)]
        for layer, linear in zip([*model.layers, model.output], linears, strict=True):
            torch.testing.assert_close(
                layer.weight.grad[r], linear.weight.grad.T, atol=2e-5, rtol=1e-4
            )
            if layer.bias is not None:
                torch.testing.assert_close(
                    layer.bias.grad[r, 0], linear.bias.grad, atol=2e-5, rtol=1e-4
                )


def test_rows_given_once_are_shared_by_all_replicates():
    model = StackedMLP(5, (8,), seeds=[0, 1])
    x = table(7, 5)
    torch.testing.assert_close(model(x), model(torch.stack([x, x])))


def test_initial_weights_come_from_their_own_seed_alone():
    together = StackedMLP(5, (16, 8), seeds=[7, 2, 9])
    alone = StackedMLP(5, (16, 8), seeds=[9])
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor[0], together.tensors()[name][2])
    assert not torch.equal(together.layers[0].weight[0], together.layers[0].weight[1])


def test_initial_weights_fill_the_interval_of_one_over_root_fan_in():
    model = StackedMLP(400, (300,), seeds=[0])
    for layer, n_in in ((model.layers[0], 400), (model.output, 300)):
        weight = layer.weight.detach()
        assert float(weight.abs().max()) <= n_in**-0.5
        assert float(weight.var()) == pytest.approx(1 / (3 * n_in), rel=0.2)
        assert not layer.bias.any()


def constant_network(dropout: float, n_units: int = 1000, n_replicates: int = 2) -> StackedMLP:
    """A network whose logit is the mean of its hidden units, each of which is 1 when kept."""
    model = StackedMLP(1, (n_units,), seeds=range(n_replicates), dropout=dropout)
    model.layers[0].weight.data.zero_()
    model.layers[0].bias.data.fill_(1.0)
    model.output.weight.data.fill_(1 / n_units)
    return model


@pytest.mark.parametrize("dropout", [0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_the_configured_share_and_scales_the_rest(dropout):
    model = constant_network(dropout)
    assert model.dropout == pytest.approx(dropout, abs=1 / 512)
    logits = model(torch.zeros(100, 1)).detach()
    deviation = (model.dropout / (1 - model.dropout) / logits.numel() / 1000) ** 0.5
    assert float(logits.mean()) == pytest.approx(1, abs=4 * deviation)
    kept_share = logits[0, 0] * (1 - model.dropout)
    assert float(kept_share * 1000) == pytest.approx(round(float(kept_share * 1000)), abs=1e-2)
    assert len(logits.unique()) > 10


def test_dropout_is_off_in_evaluation():
    torch.testing.assert_close(constant_network(0.5).eval()(torch.zeros(9, 1)), torch.ones(2, 9))


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed():
    model = constant_network(0.5)
    first, second = model(torch.zeros(9, 1)), model(torch.zeros(9, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_a_seed_drops_the_same_units_whatever_trains_beside_it():
    x = table(33, 5)
    together = StackedMLP(5, (16, 7), seeds=[7, 2, 7, 9], dropout=0.5)
    alone = StackedMLP(5, (16, 7), seeds=[7], dropout=0.5)
    for step in range(3):
        logits, expected = together(x), alone(x)
        torch.testing.assert_close(logits[0], expected[0])
        torch.testing.assert_close(logits[-2 if step < 2 else 1], expected[0])
        if step == 1:
            together.keep([0, 2])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_gradient_flows_through_a_dropped_unit(batch_norm):
    settings = {"seeds": [5], "dropout": 0.3, "batch_norm": batch_norm}
    model, twin = StackedMLP(4, (10,), **settings), StackedMLP(4, (10,), **settings)
    x = table(40, 4).expand(1, -1, -1)
    model(x).square().sum().backward()
    h = twin.layers[0](x)
    if batch_norm:
        h = twin.norms[0](h)
    h = torch.relu(h) * twin._kept(h) / (1 - twin.dropout)
    twin.output(h).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-5, rtol=1e-4)


def test_batch_norm_in_evaluation_uses_the_running_moments():
    model = StackedMLP(4, (6,), seeds=[0, 1], batch_norm=True)
    plain = [plain_copy(model, r) for r in range(2)]
    for step in range(5):
        x = torch.stack([table(30, 4, seed=10 * step + r) * (r + 1) + r for r in range(2)])
        model(x)
        for r in range(2):
            plain[r](x[r])
    x = table(3, 4)
    for r, logits in enumerate(model.eval()(x)):
        torch.testing.assert_close(logits, plain[r].eval()(x).squeeze(1))
    torch.testing.assert_close(model(x[:1]), model(x)[:, :1])


@pytest.mark.parametrize("n_replicates", [1, 2, 5, 25])
@pytest.mark.parametrize(
    ("n_features", "hidden"), [(1, (3,)), (7, (16,)), (45, (64,)), (90, (33, 8)), (152, ())]
)
def test_one_row_scores_bit_for_bit_as_within_any_batch_at_any_place(
    n_features, hidden, n_replicates
):
    model = StackedMLP(n_features, hidden, seeds=range(n_replicates), batch_norm=bool(hidden))
    row = table(1, n_features, seed=1)
    alone = model.predict_proba(row)
    everywhere = model.predict_proba(row.repeat(1500, 1))
    assert (everywhere == alone).all()
    crowd = table(1500, n_features, seed=2)
    places = [0, 1, 15, 16, 511, 1000, 1023, 1024, 1499]
    crowd[places] = row
    assert (model.predict_proba(crowd)[:, places] == alone).all()


@pytest.mark.parametrize("n_rows", [0, 1, 64, 65, 200])
def test_probabilities_have_a_place_for_every_row_and_replicate(n_rows):
    model = StackedMLP(3, (4,), seeds=[0, 1])
    x = table(n_rows, 3)
    probability = model.predict_proba(x, block=64)
    assert probability.shape == (2, n_rows)
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, model.eval()(x).detach().sigmoid())
    assert torch.equal(model.predict_proba(x.numpy(), block=64), probability)


def test_chosen_rows_of_a_table_score_as_a_table_of_their_own():
    model = StackedMLP(3, (4,), seeds=[0, 1])
    x, rows = table(50, 3), torch.tensor([4, 44, 4, 0])
    assert torch.equal(model.predict_proba(x, rows), model.predict_proba(x[rows]))


def test_scoring_leaves_a_training_model_in_training():
    model = StackedMLP(3, (4,), seeds=[0], dropout=0.5, batch_norm=True)
    before = model.state()
    model.predict_proba(table(5, 3))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state().items())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("hidden", [(), (6,), (6, 4)])
def test_a_model_survives_the_disk(hidden, batch_norm):
    model = StackedMLP(3, hidden, seeds=[5, 8], dropout=0.25, batch_norm=batch_norm)
    model(table(10, 3))
    read = StackedMLP.from_state(load(save(model.state())))
    assert torch.equal(read.predict_proba(table(9, 3)), model.predict_proba(table(9, 3)))
    assert (read.seeds, read.dropout, len(read)) == ((5, 8), 0.25, 2)


def test_a_state_is_not_moved_by_later_training():
    model = StackedMLP(3, (6,), seeds=[0])
    state = model.state()
    model.layers[0].weight.data.fill_(9)
    assert not (state["layers.0.weight"] == 9).any()


def test_selected_replicates_come_in_the_order_asked_for():
    model = StackedMLP(3, (6,), seeds=[5, 8, 2], batch_norm=True)
    model(table(10, 3))
    x = table(4, 3)
    chosen = model.select([2, 0])
    assert chosen.seeds == (2, 5)
    torch.testing.assert_close(chosen.predict_proba(x), model.predict_proba(x)[[2, 0]])


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 0.999])
def test_a_dropout_that_leaves_nothing_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout"):
        StackedMLP(3, seeds=[0], dropout=dropout)
