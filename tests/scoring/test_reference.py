"""Bins of the training: everything that has values is watched, and no small group shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sn.scoring.reference import bins, reference

N = 10_000


def shares(values: np.ndarray) -> dict[str, float]:
    """Of the bins of values that have any: the upper edge → the share."""
    told = bins(values)
    edges = [*told["edges"], np.inf]
    return {edge: share for edge, share in zip(edges, told["shares"], strict=True) if share}


def test_a_flag_has_a_bin_for_each_value_and_for_what_was_never_seen() -> None:
    told = bins(np.r_[np.ones(300), np.zeros(700)])
    assert told["shares"] == [0, 0.7, 0, 0.3, 0]
    for unseen, place in ((-1, 0), (0.5, 2), (7, 4)):
        assert np.searchsorted(told["edges"], unseen) == place


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_a_constant_is_watched_on_both_sides(value: float) -> None:
    told = bins(np.full(N, value))
    assert told["shares"] == [0, 1, 0]
    assert np.searchsorted(told["edges"], [value - 1, value, value + 1]).tolist() == [0, 1, 2]


def test_up_to_ten_others_are_not_told_apart_from_none() -> None:
    constant = bins(np.zeros(N))
    for few in (1, 10):
        assert bins(np.r_[np.ones(few), np.zeros(N - few)]) == constant
    assert bins(np.r_[np.ones(11), np.zeros(N - 11)])["shares"][3] == pytest.approx(0.0011)
    rare_between = bins(np.r_[np.zeros(500), np.ones(5), np.full(495, 2.0)])
    assert rare_between == bins(np.r_[np.zeros(505), np.full(495, 2.0)])


def test_the_rest_of_a_count_with_many_zeros_has_deciles_of_its_own() -> None:
    rest = np.exp(np.random.default_rng(0).normal(3, 1, 700))
    told = shares(np.r_[rest, np.zeros(9300)])
    assert told.pop(0.0) == pytest.approx(0.93)
    assert len(told) == 10
    assert all(share == pytest.approx(0.007) for share in told.values())


def test_values_that_spread_have_their_deciles() -> None:
    assert list(shares(np.random.default_rng(0).normal(size=N)).values()) == pytest.approx(
        [0.1] * 10
    )


def test_values_of_which_few_are_the_same_and_few_there_are_have_bins_nevertheless() -> None:
    told = bins(np.repeat(np.arange(15.0), 5))
    assert len(told["shares"]) > 3
    assert min(told["shares"]) * 75 >= 11


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 40)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_bin_tells_of_fewer_than_eleven_and_every_edge_has_eleven_behind_it(drawn) -> None:
    values = np.concatenate([np.full(n, float(value)) / 3 for value, n in drawn])
    told = bins(values)
    if len(values) < 11:
        assert told["edges"] == told["shares"] == []
        return
    counts = np.array(told["shares"]) * len(values)
    assert all(count == 0 or count > 10.99 for count in counts)
    assert sum(told["shares"]) == pytest.approx(1)
    assert (np.diff(told["edges"]) > 0).all()
    assert (values >= max(told["edges"], default=-np.inf)).sum() >= 11
    if len(told["edges"]) > 1:
        assert (values <= told["edges"][1]).sum() >= 11


def test_a_reference_tells_how_many_rows_of_different_subjects_its_rows_are_worth() -> None:
    values = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    values[1::4, 1] = np.nan
    told = reference(values, ["a", "b"], np.repeat([f"s{i}" for i in range(100)], 4))
    assert told["effective"] == told["values"]["a"]["effective"] == 100
    assert told["values"]["b"]["effective"] == 100
    assert reference(values, ["a", "b"])["values"]["b"]["effective"] == 300
