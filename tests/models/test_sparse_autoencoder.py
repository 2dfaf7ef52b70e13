"""The sparse autoencoder: its cost and gradient, what sparsity does, and missing entries."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.sparse_autoencoder import (
    Objective,
    Optimiser,
    SparseAutoencoder,
    StackedSparseAutoencoder,
    Weights,
    cost_and_gradient,
    encode,
    pretrain,
    sparsity_penalty,
)

CLASSICAL = Objective(rho=0.01, weight_decay=1e-4, beta=3.0, output="sigmoid")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return load_digits().data.astype(np.float32) / 16


def drawn(n_in, n_hidden, n_out, n_rows=20, replicates=1, seed=0):
    """Weights of the usual start with biases, rows and a target, in float64."""
    rng = np.random.default_rng(seed)
    bound = (6 / (n_in + n_hidden + 1)) ** 0.5
    shapes = (n_in, n_hidden), (1, n_hidden), (n_hidden, n_out), (1, n_out)
    weights = [rng.uniform(-bound, bound, (replicates, *shape)) for shape in shapes]
    x, target = rng.random((replicates, n_rows, n_in)), rng.random((replicates, n_rows, n_out))
    return Weights(*map(torch.from_numpy, weights)), *map(torch.from_numpy, (x, target))


def flat(weights):
    return torch.cat([tensor.flatten() for tensor in weights])


def autograd_cost(weights, x, target, observed, objective):
    """The cost once more, row by row as the lecture notes have it; its gradient is autograd's."""
    functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
    functions["linear"] = lambda z: z
    w1, b1, w2, b2 = (tensor[0] for tensor in weights)
    code = functions[objective.activation](x[0] @ w1 + b1)
    error = functions[objective.output](code @ w2 + b2) - target[0]
    if observed is None:
        reconstruction = error.square().sum(1).div(2).mean()
    else:
        kept = error[observed[0] > 0].square() / 2
        reconstruction = kept.sum() * error.shape[1] / len(kept)
    decay = objective.weight_decay / 2 * (w1.square().sum() + w2.square().sum())
    rate = ((code + 1) / 2 if objective.activation == "tanh" else code).mean(0)
    rho = objective.rho
    kl = rho * torch.log(rho / rate) + (1 - rho) * torch.log((1 - rho) / (1 - rate))
    return reconstruction + decay + objective.beta * kl.sum()


@pytest.mark.parametrize(
    ("rho", "rho_hat", "value", "slope"),
    [
        (0.05, 0.05, 0.0, 0.0),
        (0.05, 0.2, 0.0939430260, 0.9375),
        (0.05, 0.5, 0.4946319372, 1.8),
        (0.01, 0.5, 0.6371456462, 1.96),
        (0.1, 0.5, 0.3680642072, 1.6),
        (0.2, 0.1, 0.0444030076, -10 / 9),
    ],
)
def test_the_penalty_has_its_reference_values(rho, rho_hat, value, slope):
    found = sparsity_penalty(rho, torch.tensor(rho_hat, dtype=torch.float64))
    assert [float(f) for f in found] == pytest.approx([value, slope], abs=5e-11)


def test_the_penalty_is_finite_smooth_and_convex_wherever_a_mean_activation_may_go():
    rho_hat = torch.linspace(-0.5, 2.0, 250_001, dtype=torch.float64)
    value, slope = sparsity_penalty(0.05, rho_hat)
    assert value.isfinite().all()
    assert (slope.diff() >= 0).all()
    numerical = value.diff() / rho_hat.diff()
    between = (slope[:-1] - 1e-6 <= numerical) & (numerical <= slope[1:] + 1e-6)
    assert between.all()
    assert slope[0] < 0 < slope[-1]


@pytest.mark.parametrize("shape", [(64, 25, 64), (9, 12, 9), (14, 5, 7)])
def test_the_gradient_is_that_of_central_differences(shape):
    weights, x, target = drawn(*shape, n_rows=10)
    cost, gradient, _ = cost_and_gradient(weights, x, target, None, CLASSICAL)
    numerical = []
    for tensor in weights:
        for entry in tensor.view(-1):
            before, ends = entry.clone(), []
            for step in (1e-4, -1e-4):
                entry.copy_(before + step)
                ends.append(cost_and_gradient(weights, x, target, None, CLASSICAL)[0])
            entry.copy_(before)
            numerical.append((ends[0] - ends[1]) / 2e-4)
    num, ana = torch.cat(numerical), flat(gradient)
    assert (num - ana).norm() / (num + ana).norm() < 1e-9
    assert cost.item() == pytest.approx(autograd_cost(weights, x, target, None, CLASSICAL).item())


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("output", ["sigmoid", "linear"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_cost_and_gradient_are_those_of_autograd(activation, output, missing):
    objective = Objective(0.1, 3.0, 1e-3, activation, output)
    weights, x, target = drawn(12, 6, 12)
    if activation == "relu":
        weights = Weights(*(tensor.abs() / 9 for tensor in weights))  # means within (0, 1)
    observed = (x < 0.6).double() if missing else None
    cost, gradient, _ = cost_and_gradient(weights, x, target, observed, objective)
    leaves = Weights(*(tensor.clone().requires_grad_() for tensor in weights))
    expected = autograd_cost(leaves, x, target, observed, objective)
    expected.backward()
    torch.testing.assert_close(cost[0], expected, rtol=1e-12, atol=0)
    expected_gradient = torch.cat([tensor.grad.flatten() for tensor in leaves])
    torch.testing.assert_close(flat(gradient), expected_gradient, rtol=1e-10, atol=1e-13)


def test_what_stands_where_an_entry_is_missing_changes_nothing():
    weights, x, target = drawn(8, 4, 8)
    observed = (x < 0.5).double()
    found = [
        cost_and_gradient(weights, x, target + lie * (1 - observed), observed, CLASSICAL)
        for lie in (0.0, 1e6)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(flat(found[0][1]), flat(found[1][1]))


def test_an_error_weighs_the_same_however_much_is_missing():
    weights, x, _ = drawn(8, 4, 8, n_rows=4000)
    plain = Objective(beta=0, weight_decay=0)
    target = torch.full_like(x, 3.0)
    half = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    whole, part = (cost_and_gradient(weights, x, target, m, plain)[0] for m in (None, half))
    assert part.item() == pytest.approx(whole.item(), rel=0.01)


def test_without_beta_it_is_the_plain_autoencoder():
    weights, x, target = drawn(8, 4, 8)
    plain = Objective(beta=0, weight_decay=0, output="sigmoid")
    cost, _, _ = cost_and_gradient(weights, x, target, None, plain)
    w1, b1, w2, b2 = weights
    h = torch.sigmoid(torch.sigmoid(x @ w1 + b1) @ w2 + b2)
    assert cost.item() == pytest.approx(0.5 * (h - target).square().sum().item() / 20)


def test_a_running_mean_moves_the_target_of_the_penalty():
    weights, x, target = drawn(8, 4, 8)
    objective = Objective(rho=0.05, running_mean=0.9)
    _, _, batch = cost_and_gradient(weights, x, target, None, objective)
    before = torch.full_like(batch, 0.05)
    _, _, running = cost_and_gradient(weights, x, target, None, objective, before)
    torch.testing.assert_close(running, 0.9 * before + 0.1 * batch)
    fitted = SparseAutoencoder(units=5, rho=0.1, running_mean=0.9, epochs=300).fit(x[0])
    assert fitted.transform(x[0]).mean() == pytest.approx(0.1, rel=0.3)


def test_a_linear_autoencoder_spans_the_principal_subspace():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 10)) @ np.diag([5, 4, 3, 1, 1, 1, 0.5, 0.5, 0.2, 0.1])
    X = X @ np.linalg.qr(rng.normal(size=(10, 10)))[0] + 2
    linear = SparseAutoencoder(
        units=3, activation="linear", beta=0, weight_decay=0, solver="lbfgs", epochs=500
    ).fit(X)
    ours = np.linalg.qr(linear.layers_[0].decode[0].numpy().T)[0]
    principal = PCA(3).fit(X)
    cosines = np.linalg.svd(principal.components_ @ ours)[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    best = np.square(X - principal.inverse_transform(principal.transform(X))).mean()
    assert -linear.score(X) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_nine_units_in_ten_are_about_as_active_as_asked_for(digits, solver):
    rho = 0.1
    params = {"solver": "lbfgs", "epochs": 60} if solver == "lbfgs" else {"epochs": 20}
    fitted = SparseAutoencoder(units=36, rho=rho, output="sigmoid", **params).fit(digits)
    rate = fitted.transform(digits).mean(axis=0)
    assert ((rate > rho / 2) & (rate < 2 * rho)).mean() >= 0.9


def test_a_sparser_target_gives_sparser_codes(digits):
    rates = []
    for rho in (0.02, 0.05, 0.1, 0.2, 0.4):
        fitted = SparseAutoencoder(units=25, rho=rho, output="sigmoid", epochs=15).fit(digits)
        rates.append(fitted.transform(digits).mean())
    assert rates == sorted(rates)
    assert rates[-1] > 5 * rates[0]


def test_missing_entries_are_reconstructed_from_the_observed_ones():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 2)) @ rng.normal(size=(2, 8))
    gappy = np.where(rng.random(X.shape) < 0.3, np.nan, X)
    for fill in ("zero+mask", "sparsity_normalization", "softimpute"):
        fitted = SparseAutoencoder(
            units=16, rho=0.2, beta=0.1, fill=fill, denoise=True, epochs=40, learning_rate=0.01
        ).fit(gappy[:1000])
        made = fitted.inverse_transform(fitted.transform(gappy[1000:]))
        there = np.isnan(gappy[1000:])
        error = np.square(made - X[1000:])[there].mean() / X[1000:][there].var()
        assert error < 0.5


def test_a_stack_is_its_layers_trained_one_after_the_other(digits):
    settings = {"rho": 0.1, "epochs": 3, "output": "sigmoid"}
    stack = StackedSparseAutoencoder(units=(20, 10), **settings).fit(digits)
    first = SparseAutoencoder(units=20, **settings).fit(digits)
    codes = first.transform(digits)
    second = SparseAutoencoder(units=10, **settings).fit(codes)
    np.testing.assert_allclose(stack.transform(digits), second.transform(codes), atol=1e-5)
    back = first.inverse_transform(second.inverse_transform(second.transform(codes)))
    np.testing.assert_allclose(stack.inverse_transform(stack.transform(digits)), back, atol=1e-5)


def test_each_seed_trains_beside_others_as_it_would_alone(digits):
    table = torch.from_numpy(digits[:300].copy())
    target = table.where(table < 0.9, torch.nan)
    settings = {"optimiser": Optimiser(epochs=3, batch_size=64)}
    together = pretrain(table, target, (12, 6), seeds=[4, 9], **settings)
    for r, seed in enumerate((4, 9)):
        alone = pretrain(table, target, (12, 6), seeds=[seed], **settings)
        codes = encode(alone, table, "sigmoid")[0]
        torch.testing.assert_close(encode(together, table, "sigmoid")[r], codes, atol=1e-4, rtol=0)


def test_one_row_alone_gives_what_it_gives_in_a_batch_bit_for_bit(digits):
    stack = StackedSparseAutoencoder(units=(20, 10), epochs=1).fit(digits)
    batch = stack.transform(digits[:40])
    alone = np.vstack([stack.transform(row[None]) for row in digits[:40]])
    assert alone.tobytes() == batch.tobytes()
    assert stack.transform(digits)[:40].tobytes() == batch.tobytes()


def test_networks_take_its_encoder_as_initial_layers(digits):
    stack = StackedSparseAutoencoder(units=(20, 10), epochs=1).fit(digits)
    model = StackedMLP(64, (), seeds=[0], encoder=stack.encoder())
    codes = torch.from_numpy(stack.transform(digits))
    expected = codes @ model.output.weight[0] + model.output.bias[0]
    found = model(torch.from_numpy(digits))[0]
    torch.testing.assert_close(found, expected[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"activation": "sigmoyd"}, "unknown activation 'sigmoyd'; did you mean 'sigmoid'"),
        ({"solver": "lbgfs"}, "unknown solver 'lbgfs'; did you mean 'lbfgs'"),
        ({"rho": 0.0}, "rho must be above 0"),
        ({"units": 0}, "units must be 1 or more"),
        ({"solver": "lbfgs", "denoise": True}, "denoise with the solver adam"),
        ({"fill": "zeroo"}, "unknown method 'zeroo'"),
    ],
)
def test_what_cannot_be_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**params).fit([[0.0, 1.0], [1.0, 0.0]])


@parametrize_with_checks(
    [SparseAutoencoder(units=2, epochs=2), StackedSparseAutoencoder(units=(3, 2), epochs=2)]
)
def test_scikit_learn_s_own_checks_pass(estimator, check):
    check(estimator)
