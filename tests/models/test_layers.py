"""Layers for missing entries compute what their formulas say."""

from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from ehr_sn.missing import sparsity_normalize
from ehr_sn.models.layers import ExpectedReLU, NeuMiss, SparsityNorm
from ehr_sn.models.mixture import Mixture, fit_mixture
from ehr_sn.models.mlp import StackedMLP

N = 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed).standard_normal(shape).astype(np.float32))


def masks_of_size(k: int) -> torch.Tensor:
    chosen = torch.zeros(len(list(combinations(range(N), k))), N, dtype=torch.bool)
    for row, subset in zip(chosen, combinations(range(N), k), strict=True):
        row[list(subset)] = True
    return chosen


# Sparsity normalization as a layer


def test_with_a_mask_the_layer_is_sparsity_normalization():
    x, observed = normal(50, N), rng(1).random((50, N)) < 0.5
    out = SparsityNorm(k=3.5, exponent=0.5)(x, torch.from_numpy(observed))
    expected = sparsity_normalize(x.numpy(), observed, k=3.5, exponent=0.5)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


def test_without_one_what_is_not_zero_counts_as_observed():
    x = normal(50, N) + 10
    observed = torch.from_numpy(rng(1).random((50, N)) < 0.5)
    torch.testing.assert_close(SparsityNorm(k=3)(x * observed), SparsityNorm(k=3)(x, observed))


@pytest.mark.parametrize("k", range(1, N + 1))
def test_an_affine_layer_s_expected_output_is_the_same_however_many_are_observed(k):
    x, weight = normal(N).double() + 2, normal(N, 3, seed=1).double()
    masks = masks_of_size(k)
    out = SparsityNorm(k=4)(x.expand(len(masks), N), masks) @ weight
    torch.testing.assert_close(out.mean(0), 4 / N * x @ weight)


def test_its_variance_falls_as_more_is_observed():
    x, weight = normal(N).double(), normal(N, seed=1).double()
    spread = (x * weight).var(unbiased=True)
    for k in range(1, N + 1):
        masks = masks_of_size(k)
        out = SparsityNorm(k=4)(x.expand(len(masks), N), masks) @ weight
        expected = 4**2 * (1 - k / N) * spread / k
        torch.testing.assert_close(out.var(unbiased=False), expected, atol=1e-12, rtol=1e-9)


def test_a_full_row_with_k_its_length_is_unchanged_bit_for_bit_and_an_empty_one_is_zero():
    x = normal(4, N)
    x[2] = 0
    assert torch.equal(SparsityNorm(k=N)(x[:2]), x[:2])
    assert torch.equal(SparsityNorm(k=N)(x[2:3]), torch.zeros(1, N))


def test_no_gradient_flows_through_the_count():
    x = normal(5, N).relu().requires_grad_()
    SparsityNorm(k=2)(x).sum().backward()
    count = (x != 0).sum(1, keepdim=True)
    torch.testing.assert_close(x.grad, (2 / count).expand(5, N))


def test_a_network_normalises_every_hidden_layer():
    model = StackedMLP(5, (16, 8), seeds=[0, 1], dropout=0.5, sparsity_norm=True).eval()
    x = h = normal(20, 5).expand(2, -1, -1)
    for layer in model.layers:
        h = SparsityNorm(k=layer.weight.shape[2])(layer(h).relu())
    torch.testing.assert_close(model(x), model.output(h).squeeze(2))


def test_sparsity_norm_makes_up_for_dropped_units():
    model = StackedMLP(1, (1000,), seeds=[0], dropout=0.5, sparsity_norm=True)
    model.layers[0].weight.data.zero_()
    model.layers[0].bias.data.fill_(1.0)
    model.output.weight.data.fill_(1.0)
    x = torch.zeros(50, 1)
    torch.testing.assert_close(model(x), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("k", "exponent"), [(0, 1), (-1, 1), (2, 1.5)])
def test_a_constant_that_makes_no_sense_is_refused(k, exponent):
    with pytest.raises(ValueError, match="positive"):
        SparsityNorm(k, exponent)


# NeuMiss


def gaussian(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    factors = rng(3).standard_normal((n, 3))
    sigma = factors @ factors.T + np.diag(rng(4).uniform(0.5, 1.5, n))
    return torch.from_numpy(rng(5).standard_normal(n)), torch.from_numpy(sigma)


def true_block(depth: int) -> NeuMiss:
    mean, sigma = gaussian()
    alpha = 2 / (torch.linalg.eigvalsh(sigma)[-1] + torch.linalg.eigvalsh(sigma)[0])
    block = NeuMiss((torch.eye(6) - alpha * sigma)[None], (alpha * sigma)[None], depth=depth)
    block.mean.data[:] = mean
    return block


def deviation(depth: int) -> float:
    """From the conditional expectation, the largest over rows with all sorts of masks."""
    mean, sigma = gaussian()
    x = torch.from_numpy(rng(6).standard_normal((40, 6)))
    observed = torch.from_numpy(rng(7).random((40, 6)) < 0.5)
    observed[0], observed[1] = True, False
    expected = x.clone()
    for row, o in zip(expected, observed, strict=True):
        inverse = torch.linalg.inv(sigma[o][:, o])
        row[~o] = mean[~o] + sigma[~o][:, o] @ inverse @ (row[o] - mean[o])
    rows = torch.cat([x * observed, observed.double()], dim=1)[None]
    return float((true_block(depth)(rows)[0] - expected).abs().max().detach())


def test_with_the_true_weights_neumiss_converges_to_the_conditional_expectation():
    deviations = [deviation(depth) for depth in (1, 4, 16, 64, 600)]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] > 0.1
    assert deviations[-1] < 1e-6


def test_neumiss_leaves_observed_entries_as_they_are():
    model = StackedMLP(12, (4,), seeds=[0, 1], neumiss=True)
    x, observed = normal(2, 9, 6), normal(2, 9, 6, seed=1) > 0
    filled = model.neumiss(torch.cat([x * observed, observed.float()], dim=2))
    assert torch.equal(filled[observed], x[observed])
    assert filled[~observed].abs().max() > 0


# The expected ReLU under a mixture


@pytest.fixture
def mixture() -> Mixture:
    weight = rng(1).dirichlet(np.ones(3))
    mean, variance = rng(2).normal(size=(3, 5)), rng(3).uniform(0.2, 2, (3, 5))
    return Mixture(np.log(weight), mean, variance)


def test_the_expected_relu_is_the_mean_over_draws_of_what_is_missing(mixture):
    layer = ExpectedReLU(mixture, 1)
    weight, bias = normal(1, 5, 4, seed=4), normal(1, 1, 4, seed=5)
    x, observed = rng(6).normal(size=5), np.array([True, False, True, False, False])
    row = np.where(observed, x, 0)
    rows = torch.from_numpy(np.concatenate([row, observed]).astype(np.float32))[None, None]
    out = layer(rows, weight, bias)[0, 0].numpy()
    joint = mixture.log_density(row[None], observed[None])[0]
    posterior = np.exp(joint - np.logaddexp.reduce(joint))
    draws, n = rng(7), 200_000
    c = draws.choice(3, n, p=posterior)
    drawn = draws.normal(mixture.mean[c], mixture.variance[c] ** 0.5)
    filled = np.where(observed, x, drawn)
    units = np.maximum(filled @ weight[0].numpy() + bias[0].numpy(), 0)
    error = units.std(axis=0) / n**0.5
    assert (np.abs(out - units.mean(axis=0)) < 5 * error + 1e-4).all()
    assert (np.abs(out - np.maximum(row @ weight[0].numpy() + bias[0, 0].numpy(), 0)) > 0.05).any()


def test_for_complete_rows_it_is_the_plain_relu_and_so_is_its_gradient(mixture):
    layer, x = ExpectedReLU(mixture, 2), normal(2, 30, 5)
    weight, bias = normal(2, 5, 7, seed=1).requires_grad_(), normal(2, 1, 7, seed=2)
    out = layer(torch.cat([x, torch.ones_like(x)], dim=2), weight, bias)
    plain = torch.baddbmm(bias, x, weight).relu()
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    (expected,) = torch.autograd.grad(plain.square().sum(), weight)
    torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


def test_an_empty_row_gives_a_finite_expectation_and_gradient(mixture):
    layer = ExpectedReLU(mixture, 1)
    weight, bias = normal(1, 5, 4).requires_grad_(), torch.zeros(1, 1, 4)
    out = layer(torch.zeros(1, 1, 10), weight, bias)
    out.sum().backward()
    assert (out > 0).all()
    assert weight.grad.isfinite().all()


# Within the stacked network

KINDS = {
    "neumiss": {"neumiss": True},
    "gmm": {"mixture": fit_mixture(rng(8).normal(size=(50, 4)), rng(9).random((50, 4)) < 0.6)},
    "sparsity norm": {"sparsity_norm": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def rows_with_mask(n: int, seed: int = 0) -> torch.Tensor:
    x, observed = normal(n, 4, seed=seed), normal(n, 4, seed=seed + 1) > 0
    return torch.cat([x * observed, observed.float()], dim=1)


@every_kind
def test_replicates_compute_side_by_side_what_they_would_alone(kind):
    together = StackedMLP(8, (6, 3), seeds=[4, 9], **kind).eval()
    x = rows_with_mask(20)
    for r, seed in enumerate([4, 9]):
        alone = StackedMLP(8, (6, 3), seeds=[seed], **kind).eval()
        torch.testing.assert_close(together(x)[r], alone(x)[0])


@every_kind
def test_such_a_model_survives_the_disk_and_the_choice_of_replicates(kind):
    model = StackedMLP(8, (6,), seeds=[4, 9, 2], dropout=0.25, **kind)
    x = rows_with_mask(20)
    read = StackedMLP.from_state(load(save(model.state())))
    assert torch.equal(read.predict_proba(x), model.predict_proba(x))
    torch.testing.assert_close(
        model.select([2, 0]).predict_proba(x), model.predict_proba(x)[[2, 0]]
    )


@every_kind
def test_such_a_model_scores_one_row_as_within_a_batch(kind):
    model, x = StackedMLP(8, (16,), seeds=[4, 9], **kind), rows_with_mask(1500)
    some = torch.tensor([3, 700, 1499])
    assert torch.equal(model.predict_proba(x[some]), model.predict_proba(x)[:, some])


def test_dropout_of_an_expected_relu_drops_units(mixture):
    model = StackedMLP(10, (400,), seeds=[0], dropout=0.5, mixture=mixture)
    model.output.weight.data.fill_(1 / 400)
    x = torch.zeros(300, 10)
    dropped = model(x).detach()
    assert dropped.std() > 0
    expected = float(model.eval()(x)[0, 0].detach())
    assert float(dropped.mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("wrong", [{"batch_norm": True}, {"neumiss": True}, {"hidden": ()}])
def test_an_expected_relu_goes_with_a_plain_first_layer_only(mixture, wrong):
    with pytest.raises(ValueError, match="expected ReLU needs a hidden layer"):
        StackedMLP(10, seeds=[0], mixture=mixture, **wrong)
