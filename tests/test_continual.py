"""Continual learning and statistics: every measure against a case worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlm.evaluation.continual import ForgettingMatrix, row_names
from growlm.evaluation.statistics import Bootstrap, calibration

# Domain a forgets 1 nat when b is learned and gets 0.5 back with c; b loses 0.25. Learning a helps b by 2, learning b
# hurts c by 1.
MATRIX = ForgettingMatrix(
    ["a", "b", "c"],
    before=[5.0, 6.0, 7.0],
    after=[
        [2.0, 4.0, 7.5],
        [3.0, 1.0, 8.0],
        [2.5, 1.25, 1.5],
    ],
)


def test_measures_of_a_matrix_worked_out_by_hand():
    assert MATRIX.forgetting() == pytest.approx(((2.5 - 2.0) + (1.25 - 1.0)) / 2)
    assert MATRIX.backward_transfer() == pytest.approx(((2.0 - 2.5) + (1.0 - 1.25)) / 2)
    assert MATRIX.forward_transfer() == pytest.approx(((6.0 - 4.0) + (7.0 - 8.0)) / 2)


def test_forgetting_is_from_the_best_a_domain_ever_was_since_it_was_learned():
    better_later = ForgettingMatrix(["a", "b", "c"], [5, 5, 5], [[3, 5, 5], [1, 5, 5], [2, 5, 5]])
    assert better_later.forgetting() == pytest.approx(((2 - 1) + 0) / 2)
    before_it_was_learned = ForgettingMatrix(["a", "b", "c"], [5, 5, 5], [[3, 0.5, 5], [3, 1, 5], [3, 1.2, 5]])
    assert before_it_was_learned.forgetting() == pytest.approx((0 + 0.2) / 2)
    assert better_later.backward_transfer() == pytest.approx(((3 - 2) + 0) / 2)


def test_what_never_changes_forgets_exactly_nothing():
    frozen = ForgettingMatrix(["a", "b"], [5.1, 6.1], [[2.3, 6.1], [2.3, 1.7]])
    assert frozen.forgetting() == 0.0
    assert frozen.backward_transfer() == 0.0
    assert frozen.forward_transfer() == 0.0


def test_one_domain_has_no_measures_and_wrong_shapes_are_refused():
    one = ForgettingMatrix(["a"], [5.0], [[2.0]])
    assert (one.forgetting(), one.backward_transfer(), one.forward_transfer()) == (None, None, None)
    for before, after in (([1.0], [[1.0, 2.0], [1.0, 2.0]]), ([1.0, 2.0], [[1.0, 2.0]]), ([1.0, 2.0], [[1.0], [2.0]])):
        with pytest.raises(ValueError, match="2 domains"):
            ForgettingMatrix(["a", "b"], before, after)


def test_a_row_more_is_what_was_learned_beside_the_domains_at_the_end():
    matrix = ForgettingMatrix(["a", "b"], [5.0, 6.0], [[2.0, 4.0], [2.5, 1.0], [3.0, 1.25]])
    assert matrix.forgetting() == pytest.approx(((3.0 - 2.0) + (1.25 - 1.0)) / 2)
    assert matrix.backward_transfer() == pytest.approx(((2.0 - 3.0) + (1.0 - 1.25)) / 2)
    assert matrix.forward_transfer() == pytest.approx(6.0 - 4.0)
    assert row_names(matrix.to_json()) == ["after a", "after b", "now"]
    assert row_names(MATRIX.to_json()) == ["after a", "after b", "after c"]
    with pytest.raises(ValueError, match="2 domains has 4 rows"):
        ForgettingMatrix(["a", "b"], [5.0, 6.0], [[2.0, 4.0]] * 4)


def test_json_holds_perplexities_and_nats():
    found = MATRIX.to_json()
    assert found["before"][0] == pytest.approx(math.exp(5.0))
    assert found["after"][2][1] == pytest.approx(math.exp(1.25))
    assert found["average_forgetting"] == MATRIX.forgetting()


# Bootstrap


def test_an_interval_of_equal_documents_is_a_point_and_of_none_is_not_there():
    draws = Bootstrap([5])
    assert draws.interval(draws.sums(0, torch.full((5,), 2.0))) == [10.0, 10.0]
    assert draws.interval(torch.tensor([1.0, math.nan])) is None


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=generator, dtype=torch.float64) * 3 + 10
    draws = Bootstrap([400], resamples=4000)
    low, high = draws.interval(draws.sums(0, values) / 400)
    error = float(values.std()) / math.sqrt(400)
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.15 * error)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 3))
def test_measures_of_one_group_see_the_same_draws_and_groups_their_own(groups, seed):
    draws = Bootstrap(groups, resamples=50, seed=seed)
    for group, count in enumerate(groups):
        values = torch.arange(count, dtype=torch.float64)
        assert torch.equal(draws.sums(group, 2 * values), 2 * draws.sums(group, values))
        assert torch.equal(draws.sums(group, torch.ones(count)), torch.full((50,), float(count), dtype=torch.float64))


def test_many_documents_are_drawn_in_parts(monkeypatch):
    from growlm.evaluation import statistics

    values = torch.arange(100.0)
    whole = Bootstrap([100], resamples=30).sums(0, values)
    monkeypatch.setattr(statistics, "_DRAWS", 700)
    assert torch.equal(Bootstrap([100], resamples=30).sums(0, values), whole)


# Calibration


def test_calibration_worked_out_by_hand():
    # Bin 0.9 to 1: said 0.95 on average, was right 1 in 2. Bin 0.5 to 0.6: said 0.55, was right always.
    found = calibration(torch.tensor([0.91, 0.99, 0.55, 0.55]), torch.tensor([True, False, True, True]))
    assert found["expected_error"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert [b["documents"] for b in found["bins"]] == [2, 2]
    assert found["bins"][1]["confidence"] == pytest.approx(0.95)
    assert found["bins"][1]["accuracy"] == 0.5


def test_a_sure_and_right_router_is_calibrated():
    found = calibration(torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert found == {"expected_error": 0.0, "bins": [{"documents": 3, "confidence": 1.0, "accuracy": 1.0}]}
