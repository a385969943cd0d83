"""Router: the order of learning leaves the same bits, old text is never needed, and none of these is an answer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm.base import Base
from growlm.disk.tensors import read_tensors
from growlm.errors import IntegrityError
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.router import (
    NONE,
    Route,
    Router,
    add_domain,
    evidence,
    files_of,
    fitting,
    gather_evidence,
    has_general,
    load_router,
    mean_pool,
    names_of,
    write_general,
)
from growlm.store import Store, StoredModule
from growlm.store.versions import TensorVersions
from interruptions import in_new_process, kill_everywhere
from tiny import make_base, random_ids, save_base

WIDTH = 32
GENERAL = 1000  # seed of general text


def centre(seed: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def states(seed: int, count: int, *, spread: float = 0.3, sample: int = 0) -> Tensor:
    """Pooled states (count, width) of a cluster of texts."""
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(7919 * seed + sample))
    rows = centre(seed) + spread * noise
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True))


def kept(seed: int) -> dict[str, Tensor]:
    """What is kept of a domain, as `gather_evidence` makes it."""
    parts = {"vectors": states(seed, 40 + seed % 7), "heldout": states(seed, 20, sample=1)}
    return {k: (v * 1024).round().short() for k, v in parts.items()}


def tensors_of(found: Router) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in vars(found).items() if isinstance(v, Tensor)}


def same(left: Router, right: Router) -> bool:
    assert tensors_of(left)
    return left.names == right.names and tensors_of(left) == tensors_of(right)


class Domains:
    """A store whose modules are untrained and whose evidence is made up."""

    def __init__(self, path: Path, base_folder: Path, base: Base) -> None:
        self.store = Store.create(path, base_folder)
        self.module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))

    def commit(self, name: str, entry: dict[str, Tensor]) -> tuple[StoredModule, StoredModule | None]:
        old = self.store.modules.get(name)
        return self.store.commit(name, self.module, {}, files_of(entry)), old

    def learn(self, name: str, seed: int) -> None:
        add_domain(self.store, *self.commit(name, kept(seed)))


def describe_general(store: Store, seed: int = GENERAL) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "gather_evidence", lambda base, train, heldout, **_: kept(*train))
        write_general(store, None, [([seed], []), ([seed + 500], [])])


@pytest.fixture(scope="module")
def base() -> Base:
    return make_base()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def new_store(tmp_path_factory, base_folder, base) -> Callable[..., Domains]:
    def make(domains: dict[str, int] | None = None, general: int | None = GENERAL) -> Domains:
        made = Domains(tmp_path_factory.mktemp("store") / "store", base_folder, base)
        if general is not None:
            describe_general(made.store, general)
        for name, seed in (domains or {}).items():
            made.learn(name, seed)
        return made

    return make


# Pooling


def pool_by_loop(hidden: Tensor, visible: Tensor) -> Tensor:
    rows = []
    for states_of_text, seen in zip(hidden.tolist(), visible.tolist(), strict=True):
        tokens = [torch.tensor(s, dtype=torch.float64) for s, v in zip(states_of_text, seen, strict=True) if v]
        if len(tokens) > 1:
            tokens = tokens[1:]  # attention parks on the first
        mean = sum(tokens) / len(tokens)
        rows.append(mean / mean.square().mean().sqrt())
    return torch.stack(rows)


masks = st.integers(1, 6).flatmap(
    lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t).filter(any), min_size=1, max_size=4)
)


@settings(max_examples=100, deadline=None)
@given(mask=masks, seed=st.integers(0, 99))
def test_pool_equals_a_loop(mask, seed):
    visible = torch.tensor(mask)
    hidden = torch.randn(*visible.shape, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mean_pool(hidden, visible).double(), pool_by_loop(hidden, visible), rtol=1e-4, atol=1e-5)
    whole = torch.ones_like(visible)
    torch.testing.assert_close(mean_pool(hidden).double(), pool_by_loop(hidden, whole), rtol=1e-4, atol=1e-5)


def test_pool_does_not_see_what_is_padded():
    hidden = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((1, 3, 8), 1e6), hidden], dim=1)
    visible = torch.tensor([[False] * 3 + [True] * 6])
    torch.testing.assert_close(mean_pool(padded, visible), mean_pool(hidden))


def test_pool_does_not_depend_on_the_scale_or_dtype_of_states():
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    pooled = mean_pool(hidden)
    torch.testing.assert_close(mean_pool(hidden * 300), pooled)
    torch.testing.assert_close(pooled.square().mean(-1), torch.ones(2))
    assert mean_pool(hidden.bfloat16()).dtype == torch.float32
    assert mean_pool(torch.zeros(1, 2, 4)).isfinite().all()


# What is kept of a text


def passages(count: int, tokens: int, seed: int) -> list[list[int]]:
    return random_ids(count, tokens, seed=seed).tolist()


@pytest.mark.parametrize("layer", [None, 1])
def test_evidence_is_vectors_only(base, layer):
    found = gather_evidence(base, passages(20, 30, 0), passages(5, 30, 1), layer=layer)
    assert set(found) == {"vectors", "heldout"}
    for name, count in (("vectors", 20), ("heldout", 5)):
        rows = found[name]
        assert rows.dtype == torch.int16
        assert rows.shape[1] == WIDTH
        assert len(rows) % count == 0  # every passage has as many
        size = rows.float().square().mean(-1).sqrt()
        torch.testing.assert_close(size, torch.full((len(rows),), 1024.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("layer", [None, 1])
def test_evidence_of_short_passages_is_that_of_the_whole_passage(base, layer):
    """Up to eight tokens nothing is cut, so that it must equal each text run by itself."""
    texts = [passages(1, n, n)[0] for n in (2, 3, 5, 8, 1, 4)]
    found = gather_evidence(base, texts, texts, layer=layer)
    with torch.no_grad():
        alone = [mean_pool(hidden_of(base, text, layer)) for text in texts]
    wanted = (torch.cat(alone) * 1024).round()
    for rows in found.values():
        apart = (rows.float()[:, None] - wanted[None]).abs().amax(-1)  # rows, texts
        assert apart.amin(1).max() <= 1
        assert apart.amin(0).max() <= 1


def hidden_of(base: Base, text: Sequence[int], layer: int | None) -> Tensor:
    hidden, shared = base.begin(torch.tensor([text]))
    hidden = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(0, layer), shared)
    return base.norm(hidden) if layer is None else hidden


def test_evidence_follows_its_seed_and_the_text_alone(base):
    train, heldout = passages(20, 40, 0), passages(9, 40, 1)
    first = gather_evidence(base, train, heldout, layer=1, seed=3)
    torch.rand(100)
    again = gather_evidence(base, train, heldout, layer=1, seed=3)
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = gather_evidence(base, train, heldout, layer=1, seed=4)
    assert not torch.equal(first["vectors"], other["vectors"])


def test_a_store_keeps_no_text_and_no_tokens(base_folder, base, tmp_path):
    """Of text, only int16 vectors lie in a module's folder and in the router's."""
    store = Store.create(tmp_path / "store", base_folder)
    texts = passages(12, 64, 0)
    write_general(store, base, [(texts, texts[:3])])
    module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))
    stored = store.commit(
        "law", module, {}, files_of(gather_evidence(base, texts, texts[:3], layer=store.manifest.routing_layer))
    )
    add_domain(store, stored, None)
    load_router(store)
    for file in sorted(store.path.rglob("router*.safetensors")):
        for name, tensor in read_tensors(file).items():
            if name in ("vectors", "heldout"):
                assert tensor.dtype == torch.int16
                assert tensor.shape[1] == WIDTH
                assert len(tensor) % 3 == 0
            else:
                derived = {"gram": (WIDTH, WIDTH), "whiten": (WIDTH, WIDTH), "means": (1, WIDTH), "general": (1, WIDTH)}
                derived["sum"] = (WIDTH,)
                counts = {"limits": (1,), "forks": (1,), "worded": (1,), "count": (1,), "members": (32,), "forms": (1,)}
                assert tuple(tensor.shape) == {**derived, **counts}[name]
    assert len(list(store.path.rglob("router*.safetensors"))) == 5


# Guarantee 9: the order of learning, and what was taken out again, leave no trace

SEEDS = {"chem": 11, "code": 12, "law": 13, "med": 14, "sport": 15}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(list(SEEDS)), count=st.integers(1, 5), read_between=st.booleans())
def test_the_order_of_learning_does_not_change_the_router(new_store, order, count, read_between):
    chosen = order[:count]
    wanted = load_router(new_store({name: SEEDS[name] for name in sorted(chosen)}).store)
    made = new_store()
    for name in chosen:
        made.learn(name, SEEDS[name])
        if read_between:
            load_router(made.store)
    found = load_router(made.store)
    assert found.names == sorted(chosen)
    assert same(found, wanted)
    assert same(load_router(Store.open(made.store.path)), wanted)


steps = st.lists(
    st.tuples(st.sampled_from(["learn", "remove", "read"]), st.sampled_from(list(SEEDS)), st.integers(0, 3)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_what_was_replaced_or_removed_leaves_no_trace(new_store, steps):
    """After any history the router is, bit for bit, that of a store which only ever learned what is left."""
    made, left = new_store(), {}
    for verb, name, seed in steps:
        if verb == "learn":
            made.learn(name, seed)
            left[name] = seed
        elif verb == "remove" and name in left:
            made.store.remove(name)
            del left[name]
        elif verb == "read":
            load_router(made.store)
    found, wanted = load_router(made.store), load_router(new_store(left).store)
    assert same(found, wanted)
    probes = torch.cat([states(seed, 4, sample=2) for seed in [*left.values(), GENERAL]])
    assert found.route_pooled(probes) == wanted.route_pooled(probes)


def test_a_new_domain_needs_no_old_evidence(new_store, monkeypatch):
    """Only the new domain's file is read when it is added, however many there are."""
    made = new_store({"chem": 11, "code": 12})
    load_router(made.store)
    stored, old = made.commit("law", kept(13))
    read = []

    def watched(path: Path, **options: object) -> dict[str, Tensor]:
        read.append(path)
        return read_tensors(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "read_tensors", watched)
        add_domain(made.store, stored, old)
    assert read == [stored.folder / evidence.VECTORS]
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "code": 12, "law": 13}).store))


def test_sums_that_a_kill_left_behind_are_made_anew(new_store):
    made = new_store({"chem": 11})
    load_router(made.store)
    made.commit("law", kept(13))  # and killed before add_domain
    wanted = load_router(new_store({"chem": 11, "law": 13}).store)
    assert same(load_router(made.store), wanted)
    made.learn("code", 12)
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "code": 12, "law": 13}).store))


def test_sums_that_a_kill_left_behind_by_an_update_are_made_anew(new_store):
    made = new_store({"chem": 11, "law": 13})
    load_router(made.store)
    made.commit("law", kept(14))  # and killed before add_domain
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "law": 14}).store))


def test_sums_stay_wrong_for_no_one_when_a_domain_is_added_to_stale_ones(new_store):
    made = new_store({"chem": 11})
    load_router(made.store)
    made.commit("law", kept(13))  # and killed before add_domain
    made.learn("code", 12)  # before anyone has read the router
    made.commit("code", kept(14))  # and killed again
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "code": 14, "law": 13}).store))


def test_adding_a_domain_later_equals_making_the_sums_anew(new_store):
    """The sums that were added to and the sums made from every file are the same integers."""
    made = new_store()
    for name, seed in SEEDS.items():
        made.learn(name, seed)
        load_router(made.store)
    added_to = load_router(made.store)
    files = {p.name: p for p in made.store.router_path.iterdir()}
    files.pop("general")
    for folder in files.values():
        shutil.rmtree(folder)
    assert same(load_router(made.store), added_to)


def test_other_general_text_takes_the_place_of_the_old(new_store):
    made = new_store({"chem": 11, "law": 13}, general=1001)
    load_router(made.store)
    describe_general(made.store, GENERAL)
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "law": 13}).store))


def replace_general(folder: Path) -> None:
    describe_general(Store.open(folder), GENERAL)


def test_a_kill_while_general_text_is_replaced_leaves_the_old_or_the_new(new_store, tmp_path):
    made = new_store({"chem": 11, "law": 13}, general=1001)
    old = load_router(made.store)  # and writes its sums
    new = load_router(new_store({"chem": 11, "law": 13}).store)
    in_new_process(kill_everywhere, replace_general, made.store.path, tmp_path)
    points = sorted(tmp_path.iterdir(), key=lambda p: int(p.name))
    assert len(points) > 10
    replaced = []
    for point in points:
        found = load_router(Store.open(point))
        assert same(found, old) or same(found, new), f"killed at point {point.name}"
        replaced.append(same(found, new))
    assert replaced == sorted(replaced)
    assert (replaced[0], replaced[-1]) == (False, True)


# Guarantee 8: honest routing


@pytest.fixture(scope="module")
def five(new_store) -> Router:
    return load_router(new_store(SEEDS).store)


def test_scores_are_probabilities_best_first(five):
    vectors = torch.cat([states(s, 5, sample=3, spread=1.0) for s in [*SEEDS.values(), GENERAL, 99]])
    routes = five.route_pooled(vectors)
    assert len(routes) == len(vectors)
    for route in routes:
        assert set(route.scores) == {*SEEDS, NONE}
        values = list(route.scores.values())
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert all(0 <= v <= 1 for v in values)
        assert values == sorted(values, reverse=True)
        best = next(iter(route.scores))
        assert route.module == (None if best == NONE else best)
    assert len({r.module for r in routes}) > 3


def test_separable_domains_are_told_apart_and_general_text_is_none(five):
    for name, seed in SEEDS.items():
        assert {r.module for r in five.route_pooled(states(seed, 25, sample=4))} == {name}
    assert {r.module for r in five.route_pooled(states(GENERAL, 25, sample=4))} == {None}
    assert set(names_of(five.route_pooled(states(GENERAL, 25, sample=4)))) == {NONE}


def test_text_far_from_every_domain_is_none(five):
    for seed in range(50, 60):
        for route in five.route_pooled(states(seed, 5)):
            assert route.module is None
            assert route.scores[NONE] == 1.0
    opposite = -torch.stack([centre(s) for s in SEEDS.values()])
    assert [r.module for r in five.route_pooled(opposite)] == [None] * 5
    assert [r.module for r in five.route_pooled(1e4 * opposite)] == [None] * 5


def test_a_domain_among_others_that_are_nearer_to_general_text_is_still_bounded(new_store):
    """With one domain only, a text that is nearer to it than to general text, yet far from both, is none of it."""
    found = load_router(new_store({"law": 13}).store)
    away = centre(13) - centre(GENERAL)
    beyond = (centre(13) + 3 * away)[None]
    assert found.route_pooled(states(13, 3, sample=5))[0].module == "law"
    assert found.route_pooled(beyond)[0].module is None


def test_a_route_does_not_depend_on_what_else_is_asked(five):
    vectors = torch.cat([states(s, 6, sample=6, spread=0.6) for s in [*SEEDS.values(), GENERAL]])
    together, alone = five.route_pooled(vectors), [five.route_pooled(v[None])[0] for v in vectors]
    assert [r.module for r in together] == [r.module for r in alone]
    for left, right in zip(together, alone, strict=True):
        assert left.scores == pytest.approx(right.scores, abs=1e-4)


def test_route_pools_hidden_states_and_minds_the_padding(five):
    hidden = torch.cat([states(s, 7, sample=7)[None] for s in SEEDS.values()])
    assert [r.module for r in five.route(hidden)] == list(SEEDS)
    padded = torch.cat([1e3 * centre(GENERAL).expand(5, 3, -1), hidden], dim=1)
    visible = torch.tensor([[False] * 3 + [True] * 7] * 5)
    assert [r.module for r in five.route(padded, visible)] == list(SEEDS)
    assert [r.module for r in five.route(hidden.bfloat16())] == list(SEEDS)


def test_routing_goes_through_the_base_alone(base_folder, base, tmp_path):
    """From text to route with real states: two made-up languages and a third."""
    store = Store.create(tmp_path / "store", base_folder)

    def language(start: int, seed: int, count: int = 30, tokens: int = 24) -> list[list[int]]:
        return (random_ids(count, tokens, seed=seed) % 40 + start).tolist()

    write_general(store, base, [(language(200, 0), language(200, 1))])
    module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))
    for name, start in (("low", 10), ("mid", 100)):
        entry = gather_evidence(base, language(start, 2), language(start, 3), layer=store.manifest.routing_layer)
        add_domain(store, store.commit(name, module, {}, files_of(entry)), None)
    found = load_router(store)
    for start, wanted in ((10, "low"), (100, "mid"), (200, NONE)):
        hidden, visible = found.states(base, language(start, 4, count=20, tokens=64))
        answers = names_of(found.route(hidden, visible))
        assert answers.count(wanted) >= 18
    mixed = [language(10, 5)[0][:9], language(100, 5)[0], language(200, 5)[0][:15]]
    assert names_of(found.route(*found.states(base, mixed))) == ["low", "mid", NONE]


@pytest.mark.parametrize("general", [None, GENERAL])
def test_an_empty_store_routes_to_none(new_store, general):
    store = new_store({}, general).store
    assert has_general(store) == (general is not None)
    found = load_router(store)
    assert found.names == []
    assert found.route_pooled(states(1, 3)) == [Route(None, {NONE: 1.0})] * 3
    assert found.route(torch.randn(2, 4, WIDTH)) == [Route(None, {NONE: 1.0})] * 2
    assert found.num_bytes() == 0


def test_the_last_domain_can_be_removed(new_store):
    made = new_store({"law": 13})
    made.store.remove("law")
    assert load_router(made.store).route_pooled(states(13, 1)) == [Route(None, {NONE: 1.0})]
    made.learn("law", 13)
    assert same(load_router(made.store), load_router(new_store({"law": 13}).store))


def test_num_bytes_counts_all_tensors(five):
    assert five.num_bytes() == sum(len(content) for content in tensors_of(five).values())


def test_domains_of_few_passages_still_fit(new_store):
    """Fewer samples than dimensions: the covariance is singular before it is shrunk."""
    made = new_store()
    made.commit("law", {k: v[: 3 if k == "vectors" else 1] for k, v in kept(13).items()})
    found = load_router(made.store)
    assert found.route_pooled(states(13, 3))[0].module == "law"
    assert found.route_pooled(states(GENERAL, 3))[0].module is None


def test_identical_texts_do_not_break_the_fit(new_store, monkeypatch):
    one = {k: v[:1].expand(5, -1).contiguous() for k, v in kept(13).items()}
    monkeypatch.setattr(sys.modules[__name__], "kept", lambda seed: one)
    found = load_router(new_store({"law": 13}).store)
    (route,) = found.route_pooled(one["vectors"][:1] / 1024)
    assert sum(route.scores.values()) == pytest.approx(1, abs=1e-5)


# Files


def test_changed_evidence_is_refused(new_store):
    made = new_store({"chem": 11, "law": 13})
    path = made.store.module("law").folder / evidence.EVIDENCE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"modules/law/1/router\.safetensors: sha256"):
        load_router(made.store)


def test_a_module_without_evidence_is_never_chosen_and_stands_in_no_ones_way(new_store):
    made, alone = new_store({"law": 13}), new_store({"law": 13})
    made.store.commit("bare", made.module, {})
    for _ in range(2):  # fitted, and read again
        assert same(load_router(made.store), load_router(alone.store))
        assert load_router(made.store).forks == {"law": made.module.fork}


@pytest.mark.parametrize("derived", ["gaussian", "gaussian-fitted"])
def test_changed_derived_files_are_made_anew(new_store, derived):
    made = new_store({"law": 13})
    wanted = load_router(made.store)
    (kept_file,) = made.store.router_path.glob(f"{derived}/*/router.safetensors")
    content = bytearray(kept_file.read_bytes())
    content[-100] ^= 1
    kept_file.write_bytes(content)
    assert same(load_router(made.store), wanted)


def test_a_fitted_router_is_read_and_not_fitted_again(new_store, monkeypatch):
    made = new_store({"law": 13, "chem": 11})
    wanted = load_router(made.store)
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "read_tensors", lambda *a, **k: pytest.fail("a module's evidence was read"))
        patch.setattr(type(made.store.module("law")), "manifest", property(lambda self: pytest.fail("opened")))
        again = load_router(Store.open(made.store.path))
    assert same(again, wanted)
    assert again.forks == wanted.forks == dict.fromkeys(("chem", "law"), made.module.fork)


def test_a_module_that_was_removed_while_the_router_is_read_is_not_damage(new_store, monkeypatch):
    made = new_store({"law": 13, "chem": 11})
    read = fitting.read_evidence  # the point at which files are opened

    def removed(module: StoredModule, file: str, width: int) -> dict[str, Tensor]:
        if module.name == "law":
            made.store.remove("law")
        return read(module, file, width)

    monkeypatch.setattr(fitting, "read_evidence", removed)
    assert load_router(made.store).names == ["chem"]


@pytest.mark.parametrize("fitted", [False, True])
def test_a_module_that_goes_before_it_was_looked_at_is_not_damage(new_store, monkeypatch, fitted):
    """Between the listing of the store and the first look at what it listed."""
    made = new_store({"law": 13, "chem": 11})
    if fitted:
        load_router(made.store)
    listing = Store.modules.fget
    looks = []

    def listed(store: Store) -> dict[str, StoredModule]:
        looks.append(listing(store))
        if len(looks) == 1:
            made.store.remove("law")
        return looks[-1]

    monkeypatch.setattr(Store, "modules", property(listed))
    assert load_router(made.store).names == ["chem"]


def test_an_old_version_without_evidence_is_replaced_by_one_with(new_store):
    made = new_store({"chem": 11})
    old = made.store.commit("law", made.module, {})
    load_router(made.store)  # and keeps its sums, without the one that has none
    new, _ = made.commit("law", kept(13))
    add_domain(made.store, new, old)
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "law": 13}).store))


@pytest.mark.parametrize("damage", ["vectors", "manifest"])
def test_an_old_version_that_is_damaged_does_not_stand_in_the_way_of_the_next(new_store, damage):
    made = new_store({"chem": 11, "law": 14})
    load_router(made.store)
    new, old = made.commit("law", kept(13))
    path = old.folder / (evidence.VECTORS if damage == "vectors" else "module.json")
    path.write_bytes(path.read_bytes()[:-1])
    add_domain(made.store, new, made.store.module("law", 1))
    assert same(load_router(made.store), load_router(new_store({"chem": 11, "law": 13}).store))


def test_what_was_fitted_in_another_way_is_fitted_again(new_store, monkeypatch):
    made = new_store({"law": 13, "chem": 11})
    before = load_router(made.store)
    monkeypatch.setattr(fitting, "_SHRINK", 0.4)
    monkeypatch.setattr(fitting, "_FIT", fitting._FIT + 1)
    found = load_router(made.store)
    assert not same(found, before)
    assert same(found, load_router(new_store({"law": 13, "chem": 11}).store))


def test_without_is_the_router_less_some_names(new_store):
    found = load_router(new_store({"law": 13, "chem": 11, "med": 14}).store)
    left = found.without({"chem"})
    assert left.names == ["law", "med"]
    assert set(left.forks) == {"law", "med"}
    assert left.num_bytes() < found.num_bytes()
    for seed in (13, 14):
        probes = states(seed, 6, sample=5)
        assert names_of(left.route_pooled(probes)) == names_of(found.route_pooled(probes))
    assert "chem" not in names_of(left.route_pooled(states(11, 6, sample=5)))


def test_a_store_that_cannot_be_written_still_routes(new_store, monkeypatch):
    made = new_store({"law": 13})
    wanted = load_router(made.store)
    made.commit("chem", kept(11))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(TensorVersions, "write", refuse)
    found = load_router(made.store)
    assert found.names == ["chem", "law"]
    assert not same(found, wanted)
