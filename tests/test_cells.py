"""Cells: what the index finds is what comparing with every point finds, to the bit, equal distances included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm.router import cells
from growlm.router.cells import Cells, squared_distances


def by_brute_force(query: Tensor, points: Tensor, reaches: Tensor, top_k: int) -> tuple[list[int], list[float]]:
    distances = squared_distances(query[None], points)[0].tolist()
    found = sorted((d, i) for i, d in enumerate(distances) if d <= reaches[i])
    return [i for _, i in found[:top_k]], [d for d, _ in found[:top_k]]


def check(index: Cells, query: Tensor, points: Tensor, reaches: Tensor, top_k: int) -> None:
    found = index.nearest(query, points, top_k)
    assert (found.points.tolist(), found.distances.tolist()) == by_brute_force(query, points, reaches, top_k)
    assert 0 <= found.visited <= 1
    assert 0 <= found.compared <= 1


def sphere(n: int, d: int, g: torch.Generator) -> Tensor:
    """Points at nearly one distance from the origin: they differ by less than a copy of them in bytes can tell."""
    directions = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=-1)
    return directions * (1 + 1e-5 * torch.randn(n, 1, generator=g))


def corners(n: int, d: int, g: torch.Generator) -> Tensor:
    """Corners of a cube, each with as many pluses as minuses, and their opposites: the mean is 0, a byte a number holds
    them without an error, and from a query whose numbers are alike all that are alike in the others are equally far."""
    signs = torch.ones(n, d)
    for row in signs:
        row[torch.randperm(d, generator=g)[: d // 2]] = -1
    return 127 * torch.cat([signs[: n // 2], -signs[: n // 2]])[torch.randperm(n // 2 * 2, generator=g)]


@st.composite
def worlds(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Points with as many that are equal or clustered as can be, their reaches, and queries near and far."""
    n, d = draw(st.integers(1, 300)), draw(st.integers(2, 24))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["grid", "clusters", "isotropic", "one", "uneven", "sphere", "corners"]))
    points = torch.randn(n, d, generator=g)
    if kind == "grid":  # many equal points and many equal distances
        points = points.round().clamp(-1, 1)
    elif kind == "clusters":
        centres = 20 * torch.randn(draw(st.integers(1, 8)), d, generator=g)
        points = centres[torch.randint(len(centres), (n,), generator=g)] + 0.1 * points
    elif kind == "one":
        points = points[:1].repeat(n, 1)
    elif kind == "uneven":
        points *= 10.0 ** torch.randint(-4, 3, (d,), generator=g)
    elif kind == "sphere":
        points = sphere(n, d, g)
    elif kind == "corners" and n > 1:
        points = corners(n, d, g)
        n = len(points)
    middle = draw(st.sampled_from([0.0, 3.0, 1000.0]))
    points += middle
    spread = float((points - points.mean(0)).square().sum(-1).mean())
    reach = draw(st.sampled_from(["all", "some", "none", "own"]))
    reaches = {
        "all": torch.full((n,), torch.inf),
        "some": torch.full((n,), spread),
        "none": torch.full((n,), -1.0),
        "own": 2 * spread * torch.rand(n, generator=g),
    }[reach]
    near = points[torch.randint(n, (4,), generator=g)]
    far = 100 * torch.randn(1, d, generator=g)
    queries = torch.cat([near[:1], near[1:] + torch.randn(3, d, generator=g), far, torch.full((1, d), middle)])
    return points, reaches, queries


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds(), top_k=st.integers(1, 40), first=st.sampled_from([1, 8, 512]), gathered=st.sampled_from([0, 1.1]))
def test_what_is_found_is_what_brute_force_finds(world, top_k, first, gathered):
    points, reaches, queries = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_FIRST", first)
        patch.setattr(cells, "_GATHERED", gathered)
        index = Cells.build(points, reaches)
        for query in queries:
            check(index, query, points, reaches, top_k)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds(), seed=st.integers(0, 99), share=st.sampled_from([0.1, 0.5, 0.95]))
def test_without_some_points_it_finds_what_brute_force_finds_among_the_others(world, seed, share):
    points, reaches, queries = world
    gone = torch.rand(len(points), generator=torch.Generator().manual_seed(seed)) < share
    index = Cells.build(points, reaches)
    before = index.num_bytes()
    left = index.without(gone)
    if left is None:
        assert gone.all()
        return
    assert len(left) == int((~gone).sum())
    assert left.num_bytes() <= before
    for query in queries:
        check(left, query, points[~gone], reaches[~gone], 5)
        check(index, query, points, reaches, 5)  # and the one that it was made from is as it was


# What a bound must allow for: without any one of its terms one of these fails


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("d", [8, 16])
def test_points_are_ruled_out_by_no_more_than_the_error_of_their_copy(d, top_k):
    for seed in range(3):
        points = sphere(4000, d, torch.Generator().manual_seed(seed))
        reaches = torch.full((len(points),), torch.inf)
        check(Cells.build(points, reaches), torch.zeros(d), points, reaches, top_k)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 4, 16])
@pytest.mark.parametrize("d", [4, 8])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("query", ["whole", "between"])
def test_points_without_an_error_are_not_ruled_out_by_that_of_the_query_or_by_rounding(
    monkeypatch, query, scale, d, top_k
):
    """A query of whole steps leaves what float32 rounds; one half-way between two steps, now a little below and now a
    little above, has the greatest error of its own."""
    monkeypatch.setattr(cells, "_FIRST", 1)
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        points = corners(300, d, g)
        reaches = torch.full((len(points),), torch.inf)
        index = Cells.build(points, reaches)
        assert index.tensors["errors"].max() == 0
        greatest = scale * 127 * d**0.5
        rest = 10.5 + 0.001 * torch.randn(4, d, generator=g).sign() if query == "between" else torch.full((4, d), 10.0)
        queries = greatest / 63 / 126 * rest
        queries[:, 0] = greatest
        for q in queries:
            check(index, q, points, reaches, top_k)


@pytest.mark.parametrize("d", [8, 33, 512])
def test_products_of_bytes_are_exact_on_any_processor(d):
    """Without VNNI two of them are added in 16 bits, which larger bytes than a query is given overflow."""
    points = torch.randint(-127, 128, (200, d), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    points[0], points[1] = 127, -127
    for query in (torch.ones(d), -torch.ones(d), torch.randn(d, generator=torch.Generator().manual_seed(1))):
        _, code, _ = cells._in_two_bytes(query.double())
        assert code.abs().max() <= 64  # what any processor adds up right, asked of one that may add up more
        assert torch.equal(torch._int_mm(points, code).long(), points.long() @ code.long())


def clusters(n: int = 3000, d: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    centres = 30 * torch.randn(40, d, generator=g)
    points = centres[torch.randint(40, (n,), generator=g)] + torch.randn(n, d, generator=g)
    return points, torch.full((n,), torch.inf)


def test_the_same_points_give_the_same_index():
    points, reaches = clusters()
    first, again = Cells.build(points, reaches), Cells.build(points.clone(), reaches)
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)


def test_cells_far_away_are_not_visited_and_little_is_compared_whole():
    points, reaches = clusters()
    index = Cells.build(points, reaches)
    for query in points[:20] + 0.5:
        found = index.nearest(query, points, 8)
        assert found.visited < 0.2
        assert found.compared < 0.35


def test_points_that_do_not_reach_the_query_are_not_visited():
    points, _ = clusters()
    index = Cells.build(points, torch.full((len(points),), 1.0))
    found = index.nearest(1000 + points[0], points, 8)
    assert found.points.tolist() == []
    assert found.visited == 0


def test_noise_that_rules_no_cell_out_leaves_the_codes_to_do_it():
    """As with real text: the query's own noise is longer than points are apart."""
    g = torch.Generator().manual_seed(0)
    points = 0.3 * torch.randn(5000, 64, generator=g)
    index = Cells.build(points, torch.full((5000,), torch.inf))
    for _ in range(5):
        query = points[7] + torch.randn(64, generator=g)
        found = index.nearest(query, points, 8)
        assert found.visited > 0.9
        assert found.compared < 0.15
        check(index, query, points, torch.full((5000,), torch.inf), 8)


def test_what_keys_alone_propose_is_near() -> None:
    points, reaches = clusters()
    index = Cells.build(points, reaches)
    proposed = index.by_keys_alone(points[5], 200)
    assert 200 <= len(proposed) <= len(points)
    assert 5 in proposed.tolist()


def test_it_is_much_smaller_than_the_points():
    points, reaches = clusters(4000, 512)
    assert Cells.build(points, reaches).num_bytes() < 0.5 * points.numel() * 4
