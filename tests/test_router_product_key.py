"""The product-key router: the gaussian router's answers exactly, from an index without a history."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm import cli
from growlm.router import NONE, Route, Router, load_router, product_key
from growlm.router.cells import Cells
from growlm.router.gaussian import GaussianRouter
from growlm.router.product_key import ProductKeyRouter
from growlm.store import Store
from growlm.store.versions import TensorVersions
from test_router import GENERAL, SEEDS, WIDTH, Domains, describe_general, same, states
from tiny import make_base, save_base

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def indexed(monkeypatch) -> None:
    """Stores of a few modules get an index too."""
    monkeypatch.setattr(product_key, "_FEW", 0)


@pytest.fixture(scope="module")
def new_store(tmp_path_factory) -> Callable[..., Domains]:
    base, base_folder = make_base(), save_base(tmp_path_factory.mktemp("base") / "base")

    def make(domains: dict[str, int] | None = None) -> Domains:
        made = Domains(tmp_path_factory.mktemp("store") / "store", base_folder, base)
        describe_general(made.store, GENERAL)
        for name, seed in (domains or {}).items():
            made.learn(name, seed)
        return made

    return make


@pytest.fixture
def builds(monkeypatch) -> Iterator[list[int]]:
    """How many points every index was made of, since the test began."""
    made: list[int] = []
    build = Cells.build

    def counted(points: Tensor, reaches: Tensor) -> Cells:
        made.append(len(points))
        return build(points, reaches)

    monkeypatch.setattr(Cells, "build", counted)
    return made


def load(store: Store, among: list[str] | None = None) -> ProductKeyRouter:
    found = load_router(store, among, kind="product-key")
    assert isinstance(found, ProductKeyRouter)
    return found


def index_of(found: ProductKeyRouter) -> dict[str, bytes]:
    assert found.cells is not None
    return {name: tensor.numpy().tobytes() for name, tensor in found.cells.tensors.items()}


def alike(left: ProductKeyRouter, right: ProductKeyRouter) -> bool:
    return same(left.gaussian, right.gaussian) and index_of(left) == index_of(right)


# Exact


def made_up(n: int, width: int, seed: int, spread: float, twins: bool, forms: int = 1) -> tuple[GaussianRouter, Tensor]:
    """A fitted router of n modules, and texts near some of them, near general text and far from all."""
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(n, width, generator=g)
    general = spread * torch.randn(forms, width, generator=g)
    if twins:  # the same text learned under several names
        means = means[torch.randint(max(n // 3, 1), (n,), generator=g)]
    whiten = torch.eye(width)
    limits = 1.25 * width * (0.5 + torch.rand(n, generator=g))
    names = [f"m{i:05}" for i in range(n)]
    both = torch.cat([means, general])
    texts = both[torch.randint(len(both), (6,), generator=g)] + torch.randn(6, width, generator=g)
    texts = torch.cat([texts, general[-1:], means[:1], 50 * torch.randn(1, width, generator=g)])
    return GaussianRouter(names, means, general, whiten, limits, dict.fromkeys(names, 2)), texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 400),
    width=st.integers(2, 40),
    seed=st.integers(0, 9999),
    spread=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    twins=st.booleans(),
    forms=st.integers(1, 4),
    top_k=st.sampled_from([1, 4, 32]),
    index=st.booleans(),
)
def test_it_gives_the_best_of_the_gaussian_routers_answer(n, width, seed, spread, twins, forms, top_k, index):
    gaussian, texts = made_up(n, width, seed, spread, twins, forms)
    cells = Cells.build(gaussian.means, gaussian.limits) if index else None
    found = ProductKeyRouter(gaussian, cells, top_k).route_pooled(texts)
    for mine, whole in zip(found, gaussian.route_pooled(texts), strict=True):
        if n <= top_k:
            assert (mine.module, list(mine.scores.items())) == (whole.module, list(whole.scores.items()))
            continue
        assert mine.module == whole.module
        assert NONE in mine.scores
        listed = [name for name in mine.scores if name != NONE]
        assert listed == [name for name in whole.scores if name != NONE][:top_k]
        assert sum(mine.scores.values()) == pytest.approx(1, abs=1e-5)
        total = sum(whole.scores[name] for name in mine.scores)
        for name, score in mine.scores.items():
            assert score == pytest.approx(whole.scores[name] / total, abs=1e-5)


@pytest.mark.parametrize("index", [True, False])
def test_without_is_the_router_less_some_names(index):
    gaussian, texts = made_up(200, 16, 3, 1.0, True)
    cells = Cells.build(gaussian.means, gaussian.limits) if index else None
    whole = ProductKeyRouter(gaussian, cells, 4)
    gone = {f"m{i:05}" for i in range(0, 200, 3)}
    left, wanted = whole.without(gone), gaussian.without(gone)
    assert left.names == wanted.names
    assert left.forks == wanted.forks
    assert left.num_bytes() < whole.num_bytes()
    for mine, other in zip(left.route_pooled(texts), wanted.route_pooled(texts), strict=True):
        assert mine.module == other.module
        assert [n for n in mine.scores if n != NONE] == [n for n in other.scores if n != NONE][:4]
    assert whole.without(set(whole.names)).route_pooled(texts[:1]) == [Route(None, {NONE: 1.0})]


def test_it_lists_top_k_modules_or_all_that_there_are():
    for n, listed in ((0, 0), (3, 3), (32, 32), (33, 32), (200, 32)):
        gaussian, texts = made_up(n, 8, 0, 1.0, False)
        found = ProductKeyRouter(gaussian, None)
        assert found.num_listed == listed
        assert gaussian.num_listed == n
        assert all(len(route.scores) == listed + 1 for route in found.route_pooled(texts))


# Guarantee 9


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(list(SEEDS)), removed=st.sets(st.sampled_from(list(SEEDS)), max_size=4))
def test_the_order_of_learning_and_what_was_removed_leave_no_trace(new_store, order, removed):
    made = new_store()
    for name in order:
        made.learn(name, SEEDS[name])
        load(made.store)
    for name in sorted(removed):
        made.store.remove(name)
    wanted = new_store({name: seed for name, seed in SEEDS.items() if name not in removed})
    assert alike(load(made.store), load(wanted.store))
    assert alike(load(made.store), load(Store.open(made.store.path)))


def test_adding_a_module_leaves_the_files_of_others_as_they_are(new_store):
    made = new_store({"chem": 11, "law": 13})
    load(made.store)
    folders = [made.store.module(name).folder for name in ("chem", "law")]
    before = {p: p.read_bytes() for folder in folders for p in folder.iterdir()}
    made.learn("med", 14)
    assert load(made.store).names == ["chem", "law", "med"]
    assert {p: p.read_bytes() for p in before} == before


# Files


def answers(found: Router) -> list[Route]:
    return found.route_pooled(torch.cat([states(s, 3, sample=5) for s in [*SEEDS.values(), GENERAL, 99]]))


def test_small_stores_answer_as_the_gaussian_router_does(new_store):
    for count in (0, 1, 2, 5):
        store = new_store(dict(list(SEEDS.items())[:count])).store
        assert answers(load(store)) == answers(load_router(store, kind="gaussian"))


def test_an_index_is_kept_and_made_anew_only_when_modules_have_changed(new_store, builds):
    made = new_store(SEEDS)
    first = load(made.store)
    assert alike(load(Store.open(made.store.path)), first)
    assert builds == [5]
    made.store.remove("law")
    assert not (made.store.router_path / "product-key").exists()
    load(made.store)
    made.learn("law", 21)
    load(made.store)
    assert builds == [5, 4, 5]
    assert made.store.verify() == []


def test_an_index_of_few_modules_is_not_made(new_store, builds, monkeypatch):
    monkeypatch.setattr(product_key, "_FEW", 5)
    store = new_store(SEEDS).store
    assert load(store).cells is None
    assert builds == []
    assert not (store.router_path / "product-key").exists()


def test_a_damaged_index_is_named_by_verify_and_made_anew(new_store, builds):
    store = new_store(SEEDS).store
    wanted = load(store)
    (file,) = store.router_path.glob("product-key/*/router.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert [p for p in store.verify() if "product-key/1/router.safetensors: sha256" in p]
    assert alike(load(store), wanted)
    assert builds == [5, 5]


def test_an_index_of_other_means_is_not_used(new_store, builds, tmp_path):
    """As a kill leaves it between what was fitted and the index, or a restored folder."""
    made = new_store(SEEDS)
    load(made.store)
    kept = (made.store.router_path / "product-key").rename(tmp_path / "kept")
    made.learn("law", 22)
    load_router(made.store, kind="gaussian")
    kept.rename(made.store.router_path / "product-key")
    assert answers(load(made.store)) == answers(load_router(made.store, kind="gaussian"))
    assert builds == [5, 5]


def test_a_store_that_cannot_be_written_still_routes(new_store, monkeypatch):
    store = new_store(SEEDS).store

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(TensorVersions, "write", refuse)
    assert answers(load(store)) == answers(load_router(store, kind="gaussian"))


def test_among_some_modules_it_is_what_it_would_be_without_the_others(new_store):
    whole, fewer = new_store(SEEDS), new_store({"chem": 11, "med": 14})
    load(whole.store)
    assert alike(load(whole.store, ["chem", "med"]), load(fewer.store))


def test_the_command_builds_the_index(new_store, builds, capsys):
    store = new_store(SEEDS).store
    with pytest.raises(SystemExit) as caught:
        cli.main(["router", str(store.path), "--kind", "product-key"])
    assert not caught.value.code
    assert "product-key: chooses among 5 of 5 modules" in capsys.readouterr().out
    assert builds == [5]
    assert Store.open(store.path).manifest.router == "product-key"
    assert load_router(Store.open(store.path)).kind == "product-key"
    assert builds == [5]


def test_bytes_are_those_of_the_means_and_the_index(new_store):
    store = new_store(SEEDS).store
    found = load(store)
    assert found.cells is not None
    assert found.num_bytes() == load_router(store, kind="gaussian").num_bytes() + found.cells.num_bytes()
    assert (found.gaussian.means.shape, found.gaussian.general.shape) == ((5, WIDTH), (2, WIDTH))


def test_the_layers_at_which_a_request_may_leave_the_base_follow_the_modules(new_store):
    made = new_store(SEEDS)
    found = load(made.store)
    assert found.fork_layers == {made.module.fork}
    assert found.without(set(SEEDS)).fork_layers == frozenset()
