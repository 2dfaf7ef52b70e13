"""Collaborative filtering: formats, what is scored, what sparse rows are, and the whole study."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ehr_sn import studies
from ehr_sn.errors import DataError
from ehr_sn.missing import sparsity_normalize
from ehr_sn.studies.autoencoder import (
    FACTORS,
    Autoencoder,
    Budget,
    Fitted,
    Network,
    Rows,
    epochs,
    fit_autoencoder,
    rmse,
)
from ehr_sn.studies.ratings import Ratings, Split, read_ratings, simulate_ratings, split
from ehr_sn.studies.recommender import MEANS, METRIC, SN, ZERO, Config, cells, run_cell

RATINGS = simulate_ratings(80, 50, 1600, factors=2)
PARTS = split(len(RATINGS), held_out=0.1, tuning=0.1, seed=0)
AUTOREC = Network("item", (8,))
BUDGET = Budget(1e-2, 1e-4, batch_size=16, max_epochs=2)


def write(ratings: Ratings, path: Path, separator: str, header: str = "") -> Path:
    lines = [
        separator.join(map(str, (3 * u + 1, 7 * i + 2, int(v), 9)))
        for u, i, v in zip(ratings.user, ratings.item, ratings.value, strict=True)
    ]
    path.write_text("\n".join([header, *lines] if header else lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "separator", "header"),
    [
        ("u.data", "\t", ""),
        ("ratings.dat", "::", ""),
        ("ratings.csv", ",", "userId,movieId,rating,timestamp"),
    ],
)
def test_every_format_of_movielens_gives_the_same_ratings(tmp_path, name, separator, header):
    write(RATINGS, tmp_path / name, separator, header)
    read = read_ratings(tmp_path)
    assert read.n_users == len(np.unique(RATINGS.user))
    assert read.n_items == len(np.unique(RATINGS.item))
    np.testing.assert_array_equal(read.value, RATINGS.value)
    np.testing.assert_array_equal(np.unique(RATINGS.user)[read.user], RATINGS.user)
    np.testing.assert_array_equal(np.unique(RATINGS.item)[read.item], RATINGS.item)


def test_half_stars_are_read_and_the_latest_of_two_ratings_counts(tmp_path):
    header = "userId,movieId,rating,timestamp"
    rows = [f"{u},1,3.5,10" for u in range(200)] + ["7,1,0.5,99", "7,1,2.0,20"]
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    read = read_ratings(tmp_path / "mine.csv")
    assert len(read) == 200
    assert read.value[read.user == 7].tolist() == [0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 3\n", "mine.csv:1: expected user, item, rating and time"),
        ("userId,film,rating\n1,2,secret\n", "no column movieId"),
        ("1\t2\t3\t4\n1\tsecret\t3\t4\n", "not every line has numbers"),
        ("1\t2\t\t4\n", "is empty"),
        ("1\t2\t3\t4\n", "expected 100 finite ratings"),
    ],
)
def test_what_cannot_be_read_is_named_but_not_quoted(tmp_path, content, message):
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        read_ratings(tmp_path / "mine.csv")
    assert "secret" not in str(raised.value)


def test_a_folder_without_ratings_says_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"no file of ratings.*grouplens\.org"):
        read_ratings(tmp_path)


def test_each_rating_is_in_one_part():
    parts = (PARTS.train, PARTS.tuning, PARTS.held_out)
    assert [len(part) for part in parts] == [1296, 144, 160]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1600))
    pairs = RATINGS.user * RATINGS.n_items + RATINGS.item
    assert len(np.unique(pairs)) == len(pairs)


class Copy(nn.Module):
    """A network that has learned to repeat what it is given, and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("axis", ["item", "user"])
def test_ratings_that_were_given_are_never_targets(axis):
    rows = Rows(RATINGS, PARTS.train, axis)
    copied = Fitted(Copy(), rows, FACTORS[ZERO])
    given = rows.pairs(RATINGS, PARTS.train)
    np.testing.assert_array_equal(copied.predict(given), RATINGS.value[PARTS.train])
    for part in (PARTS.tuning, PARTS.held_out):
        at = rows.pairs(RATINGS, part)
        known = (rows.count[at.row] > 0) & (rows.column_count[at.column] > 0)
        assert known.mean() > 0.9
        assert (copied.predict(at)[known] == rows.limits[0]).all()


def test_held_out_ratings_change_the_score_and_nothing_else():
    def predictions(ratings: Ratings, parts: Split) -> tuple[np.ndarray, float]:
        rows = Rows(ratings, parts.train, "item")
        tuning = rows.pairs(ratings, parts.tuning), ratings.value[parts.tuning]
        fitted = fit_autoencoder(rows, tuning, AUTOREC, BUDGET, FACTORS[SN], seed=0)
        predicted = fitted.predict(rows.pairs(ratings, parts.held_out))
        return predicted, rmse(predicted, ratings.value[parts.held_out])

    value = RATINGS.value.copy()
    value[PARTS.held_out] = 6 - value[PARTS.held_out]
    before, score = predictions(RATINGS, PARTS)
    after, other_score = predictions(replace(RATINGS, value=value), PARTS)
    np.testing.assert_array_equal(before, after)
    assert score != other_score


@pytest.mark.parametrize(("variant", "k"), [(SN, None), (f"{SN}, K = 1", 1.0)])
def test_sparse_rows_get_what_sparsity_normalize_gives_dense_ones(variant, k):
    value = RATINGS.value.copy()
    value[::7] = 0  # a rating of 0 is observed
    ratings = replace(RATINGS, value=value)
    rows = Rows(ratings, PARTS.train, "item")
    dense = np.full(rows.shape, np.nan, np.float32)
    at = rows.pairs(ratings, PARTS.train)
    dense[at.row, at.column] = value[PARTS.train]
    factor = FACTORS[variant](rows.count, rows.mean_count)
    x, places, given = rows.take(np.arange(rows.shape[0]), factor, torch.device("cpu"))
    expected = sparsity_normalize(dense, ~np.isnan(dense), k or rows.mean_count)
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(dense.ravel()[places.numpy()], given.numpy())
    assert len(places) == len(PARTS.train)


def test_the_constant_scale_shrinks_rows_as_much_as_sn_does_on_average():
    rows = Rows(RATINGS, PARTS.train, "user")
    constant, one = (
        FACTORS[name](rows.count, rows.mean_count) for name in ("constant_scale", f"{SN}, K = 1")
    )
    assert (constant == 1 / rows.mean_count).all()
    np.testing.assert_allclose(one, 1 / np.maximum(rows.count, 1))


def test_training_is_what_a_dense_masked_loss_would_do():
    rows = Rows(RATINGS, PARTS.train, "item")
    budget = Budget(1e-2, 1e-3, batch_size=16, max_epochs=1)
    model, plain = (Autoencoder(rows.shape[1], AUTOREC, mean=rows.mean, seed=3) for _ in range(2))
    next(epochs(model, rows, budget, FACTORS[ZERO], seed=3))

    dense = torch.from_numpy(rows.matrix.toarray())
    mask = (dense != 0).float()
    groups = [{"params": plain.weights(), "weight_decay": 1e-3}, {"params": plain.biases()}]
    optimiser = torch.optim.Adam(groups, 1e-2)
    order = torch.from_numpy(shuffled(rows.trained, seed=3))
    for batch in order.split(len(rows.trained) // 20):
        error = (plain(dense[batch]) - dense[batch]) * mask[batch]
        loss = error.square().sum() / (len(batch) * rows.mean_count)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    from ehr_sn.models.mlp import SHUFFLING, stream

    return np.random.Generator(stream(seed, SHUFFLING)).permutation(rows)


@pytest.mark.parametrize("axis", ["item", "user"])
def test_users_and_items_never_seen_fall_back_on_the_others_bias(axis):
    train = PARTS.train[(RATINGS.user[PARTS.train] != 5) & (RATINGS.item[PARTS.train] != 9)]
    rows = Rows(RATINGS, train, axis)
    tuning = rows.pairs(RATINGS, PARTS.tuning), RATINGS.value[PARTS.tuning]
    fitted = fit_autoencoder(rows, tuning, AUTOREC, BUDGET, FACTORS[SN], seed=0)
    new = Ratings(np.array([5, 5, 0]), np.array([0, 9, 9]), np.ones(3, np.float32), 80, 50)
    predicted = fitted.predict(rows.pairs(new, np.arange(3)))
    value = RATINGS.value[train]
    mean = value.mean()
    of_item = value[RATINGS.item[train] == 0] - mean
    assert predicted[0] == pytest.approx(mean + of_item.sum() / (len(of_item) + 25), abs=1e-5)
    assert predicted[1] == pytest.approx(mean, abs=1e-5)
    assert rows.limits[0] <= predicted[2] <= rows.limits[1]
    assert predicted[2] != predicted[1]


def small(**changes: object) -> Config:
    return Config(
        **{
            "study": "recommender",
            "repeats": 2,
            "hidden": 4,
            "max_epochs": 2,
            "learning_rates": [1e-2],
            "weight_decays": [1e-4, 1e-3],
        }
        | changes
    )


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(RATINGS, tmp_path_factory.mktemp("ml") / "u.data", "\t").parent


def test_a_cell_scores_the_held_out_ratings_of_its_split(movielens):
    config = small()
    part = run_cell(config, movielens, cells(config, movielens)[1])
    ratings = read_ratings(movielens)
    parts = split(len(ratings), held_out=0.1, tuning=0.05, seed=1)
    rows = Rows(ratings, parts.train, "item")
    expected = rmse(rows.biases(rows.pairs(ratings, parts.held_out)), ratings.value[parts.held_out])
    found = {(s.variant, s.metric): s.value for s in part.scores if s.repeat == 1}
    assert found[MEANS, METRIC] == expected
    assert part == run_cell(config, movielens, cells(config, movielens)[1])


def test_the_study_ends_with_its_tables_and_figures(movielens, tmp_path):
    result = studies.run(small(data_dir=tmp_path), movielens)
    assert result.settings == ["I-AutoRec", "U-AutoRec", "deep I-autoencoder"]
    headline = result.tables()[0]
    assert [column.header for column in headline.columns[1:3]] == ["w/o SN", "w/ SN"]
    assert headline.row_count == 3
    assert len(result.figures()) == 3
    assert "constant_scale · tuned" in result.variants
    assert all(np.isfinite(score.value) for score in result.scores)
    assert "a quarter of each row's ratings" in result.explain()
    assert result.test_train_ratio == pytest.approx(0.1 / 0.855)
