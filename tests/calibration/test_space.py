"""The search space: every point meets the budget exactly, and every legal schedule is a point."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.calibration.space import SearchSpace, place_shares, stage_shares

PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)
unit = st.floats(0, 1)
layer_counts = st.lists(st.integers(1, 40), min_size=1, max_size=5)
budgets = st.floats(0.01, 1)


def mean(shares, layers):
    return math.fsum(n * c for n, c in zip(layers, shares, strict=True)) / sum(layers)


@PROPERTY
@given(layer_counts, budgets, st.data())
def test_every_point_of_the_cube_meets_the_budget(layers, keep_ratio, data):
    places = [data.draw(unit) for _ in layers[1:]]
    shares = stage_shares(places, layers, keep_ratio)
    assert len(shares) == len(layers)
    assert math.isclose(mean(shares, layers), keep_ratio, rel_tol=1e-12)
    assert list(shares) == sorted(shares, reverse=True)
    assert shares[0] <= 1
    assert shares[-1] >= 0.1 * keep_ratio * (1 - 1e-9)


@PROPERTY
@given(layer_counts, st.floats(0.05, 0.95), st.data())
def test_places_and_shares_are_inverse(layers, keep_ratio, data):
    places = [data.draw(unit) for _ in layers[1:]]
    shares = stage_shares(places, layers, keep_ratio)
    again = stage_shares(place_shares(shares, layers, keep_ratio), layers, keep_ratio)
    assert again == pytest.approx(shares, abs=1e-9)


@PROPERTY
@given(layer_counts, budgets, st.data())
def test_shares_outside_the_range_find_a_place_inside(layers, keep_ratio, data):
    shares = [data.draw(unit) for _ in layers]
    places = place_shares(shares, layers, keep_ratio)
    assert all(0 <= place <= 1 for place in places)
    assert math.isclose(
        mean(stage_shares(places, layers, keep_ratio), layers), keep_ratio, rel_tol=1e-12
    )


def test_the_corners_are_the_extreme_schedules():
    layers = (9, 9, 10)
    assert stage_shares((0, 0), layers, 0.25) == pytest.approx((0.25, 0.25, 0.25))
    # the first stage takes all but a tenth of the budget for the others
    first = (0.25 * 28 - 0.025 * 19) / 9
    assert stage_shares((1, 1), layers, 0.25) == pytest.approx((first, 0.025, 0.025))
    assert stage_shares((1, 0), layers, 0.9)[0] == 1


@pytest.mark.parametrize(
    ("keep_ratio", "ratios"),
    [
        (0.5, (0.7233201448753168, 0.748747637472693, 0.487)),
        (0.25, (0.2651026358526424, 0.9833433139039235, 0.8773258179532721)),
        (0.1, (0.11661529508161146, 1.0, 0.6011)),
    ],
)
def test_the_published_optima_are_points(keep_ratio, ratios):
    # their last ratio is printed rounded, hence the tolerance
    shares = (ratios[0], ratios[0] * ratios[1], ratios[0] * ratios[1] * ratios[2])
    layers = (9, 9, 10)
    found = stage_shares(place_shares(shares, layers, keep_ratio), layers, keep_ratio)
    assert found == pytest.approx(shares, rel=1e-2)


def space(start=((0.5, 0.3, 0.2), {"alpha": 0.25})):
    return SearchSpace(
        "uniform",
        0.3,
        (3, 2, 3),
        {"alpha": (-1.0, 1.0)},
        lambda shares: {"keep_ratios": list(shares)},
        start,
    )


def test_a_point_becomes_a_request():
    found = space().pruning({"stage_1": 0.0, "stage_2": 0.0, "alpha": 0.5})
    assert found["visual"].pop("keep_ratios") == pytest.approx([0.3] * 3)
    assert found == {"visual": {"method": "uniform", "alpha": 0.5}}


def test_the_start_is_a_point_of_the_space():
    start = space().start_point
    assert start.keys() == space().coordinates.keys()
    # the shares of the start hold more than the budget, and the last gives way
    assert space().shares(start)[:2] == pytest.approx((0.5, 0.3))
    assert mean(space().shares(start), (3, 2, 3)) == pytest.approx(0.3)
    assert start["alpha"] == 0.25


def test_a_start_outside_moves_to_the_edge():
    start = space(((1.0, 1.0, 1.0), {"alpha": 7.0})).start_point
    assert start["alpha"] == 1.0
    assert start["stage_1"] == 1.0
