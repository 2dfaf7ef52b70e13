"""Layers for missing entries compute what their formulas say."""

from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from ehr_sn.missing import sparsity_normalize
from ehr_sn.models.layers import (
    Embedding,
    Encoder,
    ExpectedReLU,
    NeuMiss,
    SparsityNorm,
    SparsityNormConv2d,
)
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


def test_k_may_follow_the_mean_count_of_training_batches_and_then_stays():
    layer = SparsityNorm(k="mean")
    half, full = torch.ones(4, N), torch.ones(4, N)
    half[:, ::2] = 0
    assert torch.equal(layer(half), half)  # the first batch sets K = 4
    k = 0.9 * 4 + 0.1 * N
    torch.testing.assert_close(layer(full), full * k / N)
    layer.eval()
    torch.testing.assert_close(layer(half), half * k / 4)
    torch.testing.assert_close(layer(full), full * k / N)
    assert layer.state_dict()["mean_count"].item() == pytest.approx(k)


# Convolutions


def convolution(size: int, k: float, **how: int | bool) -> SparsityNormConv2d:
    conv = SparsityNormConv2d(3, 5, size, SparsityNorm(k=k), **how)
    with torch.no_grad():
        conv.weight.copy_(normal(*conv.weight.shape, seed=2))
        if conv.bias is not None:
            conv.bias.copy_(normal(5, seed=3))
    return conv


def partial_convolution(x, mask, weight, bias, stride, padding):
    """Liu et al. 2018, window by window: w·(x ⊙ m) · sum(1) / sum(m) + b, and 0 without any m."""
    x, mask, weight, bias = (t.detach().numpy().astype(float) for t in (x, mask, weight, bias))
    around = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    x, mask = np.pad(x * mask, around), np.pad(mask, around)
    size = weight.shape[2]
    n_rows, n_columns = ((side - size) // stride + 1 for side in x.shape[2:])
    out = np.zeros((len(x), len(weight), n_rows, n_columns))
    for b, i, j in np.ndindex(len(x), n_rows, n_columns):
        at = (b, slice(None), slice(i * stride, i * stride + size))
        at = (*at, slice(j * stride, j * stride + size))
        if mask[at].sum():
            scale = mask[at].size / mask[at].sum()
            out[b, :, i, j] = (weight * x[at]).sum(axis=(1, 2, 3)) * scale + bias
    return out


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (2, 2, 1), (5, 3, 4)]
)
@pytest.mark.parametrize("by_pixel", [True, False])
def test_with_k_a_window_s_size_it_is_a_partial_convolution(size, stride, padding, by_pixel):
    x, conv = normal(4, 3, 7, 9), convolution(size, 3 * size**2, stride=stride, padding=padding)
    observed = torch.from_numpy(rng(1).random((4, 1 if by_pixel else 3, 7, 9)) < 0.3)
    mask = observed.expand_as(x)
    out = conv(x, observed).detach().numpy()
    expected = partial_convolution(x, mask, conv.weight, conv.bias, stride, padding)
    some = (expected != 0).any(axis=1, keepdims=True).repeat(5, axis=1)
    np.testing.assert_allclose(out[some], expected[some], rtol=1e-4, atol=1e-4)
    alone = conv.bias.detach().view(1, 5, 1, 1).expand(out.shape).numpy()
    np.testing.assert_array_equal(out[~some], alone[~some])  # nothing observed: the bias
    torch.testing.assert_close(conv(x * mask), conv(x, observed))


def test_t7_a_window_that_spans_the_input_is_the_dense_layer():
    x, n = normal(6, 3, 4, 4), 3 * 4 * 4
    conv, observed = convolution(4, k=n), torch.from_numpy(rng(1).random((6, 3, 4, 4)) < 0.5)
    rows, seen = x.flatten(1), observed.flatten(1)
    dense = SparsityNorm(k=n)(rows, seen) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(conv(x, observed).flatten(1), dense)
    h = x.relu()
    dense = SparsityNorm(k=n)(h.flatten(1)) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(conv(h).flatten(1), dense)


def test_windows_at_the_border_count_only_what_they_hold():
    conv = SparsityNormConv2d(2, 1, 3, SparsityNorm(k=18), padding=1, bias=False)
    torch.nn.init.ones_(conv.weight)
    even = torch.full((1, 2, 5, 5), 0.5)
    torch.testing.assert_close(conv(even), torch.full((1, 1, 5, 5), 9.0))
    assert torch.nn.functional.conv2d(even, conv.weight, padding=1)[0, 0, 0, 0] == 4


def test_where_all_is_observed_it_is_the_plain_convolution():
    x, conv = normal(2, 3, 6, 6), convolution(3, 27, stride=2)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, 2)
    torch.testing.assert_close(conv(x, torch.ones(2, 1, 6, 6, dtype=torch.bool)), plain)


def test_no_gradient_flows_through_a_window_s_count():
    x, conv = normal(2, 3, 5, 5).relu().requires_grad_(), convolution(3, 27, padding=1)
    conv(x).square().sum().backward()
    nudged = x.detach() * 1.0001  # the same counts
    change = conv(nudged).square().sum() - conv(x.detach()).square().sum()
    assert change.item() == pytest.approx((x.grad * x.detach()).sum().item() * 1e-4, rel=1e-2)


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


# Embedding

EMBEDDING = Embedding(np.array([0, 1, 2, 3, 2, 2, 0, -1]), units=3)


@pytest.mark.parametrize("hidden", [(5,), (5, 4), ()])
def test_a_layer_combines_relus_of_affine_maps_of_one_features_columns(hidden):
    """With nothing but `torch.relu` and `@`: the units beside the input, then a linear layer."""
    model = StackedMLP(8, hidden, seeds=[4, 9], embedding=EMBEDDING)
    embedding, x = model.embedding, normal(2, 20, 8)
    embedding.bias.data = normal(*embedding.bias.shape, seed=1)
    after = [*model.layers, model.output]
    for r in range(2):
        units = []
        for feature, columns in enumerate([[0, 6], [1], [2, 4, 5], [3]]):
            own = embedding.own[r, feature, :, : len(columns)]
            units.append((x[r][:, columns] @ own.T + embedding.bias[r, feature, :, 0]).relu())
        h = torch.cat([*units, x[r]], dim=1)
        weights = [layer.weight[r] for layer in after]
        weights[0] = torch.cat([embedding.weight[r].T, weights[0]])
        for weight, layer in zip(weights, after, strict=True):
            h = h @ weight + layer.bias[r]
            h = h if layer is model.output else h.relu()
        torch.testing.assert_close(model(x)[r], h.squeeze(1))


def test_what_pads_a_features_columns_learns_nothing_and_tells_nothing():
    model = StackedMLP(8, (5,), seeds=[4], embedding=EMBEDDING)
    x = normal(30, 8)
    before = model(x).detach()
    pads = torch.from_numpy(EMBEDDING.columns < 0)[None, :, None].expand_as(model.embedding.own)
    assert pads.any()
    model(x).sum().backward()
    assert (model.embedding.own.grad[pads] == 0).all()
    assert (model.embedding.own.grad[~pads] != 0).any()
    model.embedding.own.data[pads] = 1e6
    assert torch.equal(model(x), before)


def test_initial_weights_of_an_embedding_go_by_its_features_columns():
    embedding = Embedding(np.repeat(np.arange(2), [1, 9]), units=200)
    model = StackedMLP(10, seeds=[0], embedding=embedding)
    own = model.embedding.own[0].detach()
    assert float(own[0, :, 0].abs().max()) == pytest.approx(1, abs=0.02)
    assert float(own[1].abs().max()) == pytest.approx(1 / 3, abs=0.02)
    for weight in (model.embedding.weight, model.layers[0].weight):
        assert float(weight.detach().abs().max()) == pytest.approx(410**-0.5, rel=0.02)


def test_an_embedding_takes_the_features_columns_alone(mixture):
    code = Encoder((0,), ((normal(1, 8, 3), normal(1, 1, 3)),), "relu", True)
    for other in ({"neumiss": True}, {"mixture": mixture}, {"encoder": code}):
        with pytest.raises(ValueError, match="an embedding takes columns of features"):
            StackedMLP(8, seeds=[0], embedding=EMBEDDING, **other)


# Within the stacked network

KINDS = {
    "neumiss": {"neumiss": True},
    "gmm": {"mixture": fit_mixture(rng(8).normal(size=(50, 4)), rng(9).random((50, 4)) < 0.6)},
    "sparsity norm": {"sparsity_norm": True},
    "embedding": {"embedding": EMBEDDING},
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
