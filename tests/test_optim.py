"""The row-wise AdamW: against torch's, by hand, on unread rows, through checkpoints and clipping."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.errors import ConfigError, Interrupted
from growlm.layers import PEER, retrievals
from growlm.training import checkpoints, loop, optim
from growlm.training.config import TrainConfig
from growlm.training.optim import RowAdamW, _Rounding, clip_gradients, make_optimizer, rows_of, untouched_zeros
from growlm.training.runs import require_same_rows
from interruptions import in_new_process, kill_everywhere


def sparse_of(rows: list[int], values: Tensor, size: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (size, *values.shape[1:]), check_invariants=True)


def model(num_experts: int = 64, seed: int = 0, **options) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), PEER(8, num_experts, 2, 4, **options), nn.Linear(8, 6))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed))
    return F.mse_loss(model(x), x.roll(1, -1))


def run(model: nn.Module, optimizer: RowAdamW, steps: range) -> list[float]:
    losses = []
    for i in steps:
        loss = loss_of(model, i % 3)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("held", [optim._CACHED, 10])
def test_equals_torchs_adamw_where_all_rows_are_read(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_CACHED", held)  # elements updated at a time
    table = nn.Parameter(torch.randn(7, 5))
    dense = nn.Parameter(table.detach().clone())
    ours = make_optimizer({"t": table}, lr=0.01, weight_decay=0.1, second_moment="element")
    torchs = torch.optim.AdamW([dense], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for i in range(20):
        values = torch.randn(7, 5, generator=torch.Generator().manual_seed(i))
        table.grad, dense.grad = sparse_of(list(range(7)), values, 7), values.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(table, dense, rtol=1e-5, atol=1e-6)


def test_rows_have_step_counts_of_their_own() -> None:
    """A row that is read now and then goes where it would go alone: torch's AdamW over its gradients."""
    table = nn.Parameter(torch.randn(5, 3))
    alone = [nn.Parameter(row.clone()) for row in table.detach()]
    ours = make_optimizer({"t": table}, lr=0.01, weight_decay=0.1, second_moment="element")
    torchs = [torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) for p in alone]
    for i in range(30):
        generator = torch.Generator().manual_seed(i)
        rows = (torch.rand(5, generator=generator) < 0.4).nonzero()[:, 0].tolist()
        values = torch.randn(len(rows), 3, generator=generator)
        table.grad = sparse_of(rows, values, 5)
        ours.step()
        for row, value in zip(rows, values, strict=True):
            alone[row].grad = value.clone()
            torchs[row].step()
    torch.testing.assert_close(table, torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)


def test_second_moment_by_row_by_hand() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = make_optimizer({"t": table}, lr=0.1, weight_decay=0.5)
    m, v, row = torch.zeros(2), 0.0, torch.ones(2)
    for t, gradient in enumerate(([3.0, 4.0], [1.0, -1.0]), start=1):
        g = torch.tensor(gradient)
        table.grad = sparse_of([2], g[None], 4)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * float(g.square().mean())
        row = row * (1 - 0.1 * 0.5)
        row = row - 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        torch.testing.assert_close(table[2].detach(), row)
    state = optimizer.state[table]
    assert state["row_steps"].tolist() == [0, 0, 2, 0]
    assert state["row_exp_avg_sq"].shape == (4,)
    assert torch.equal(table[[0, 1, 3]].detach(), torch.ones(3, 2))


def test_dense_parameters_step_as_before() -> None:
    ours, torchs = (nn.Linear(4, 3) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    a = make_optimizer(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.AdamW(
        [{"params": [torchs.weight], "weight_decay": 0.1}, {"params": [torchs.bias], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for i in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
        for layer, optimizer in ((ours, a), (torchs, b)):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours.weight, torchs.weight)
    assert torch.equal(ours.bias, torchs.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_million_experts_unread_rows_keep_their_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = PEER(8, 1_000_000, 2, 4, dtype=dtype)
    before = [layer.up.detach().clone(), layer.down.detach().clone()]
    optimizer = make_optimizer(layer, lr=0.01, weight_decay=0.1)
    read = []
    for i in range(4):
        with retrievals() as found:
            x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(i))
            F.mse_loss(layer(x), x).backward()
        read.append(found[0].experts.flatten())
        clip_gradients(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.cat(read).unique()
    assert 50 < len(rows) < 2000
    for table, old in zip((layer.up, layer.down), before, strict=True):
        changed = (table != old).any(1).nonzero()[:, 0]
        assert torch.isin(changed, rows).all()  # to the bit: no decay, no moments
        assert len(changed) > 0.95 * len(rows)
        assert torch.equal(optimizer.state[table]["row_steps"].nonzero()[:, 0], rows)


def test_a_pool_learns() -> None:
    net = model()
    losses = run(net, make_optimizer(net, lr=0.02), range(90))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@pytest.mark.parametrize("second_moment", ["row", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_checkpoint(
    tmp_path: Path, second_moment: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_CACHED", 40)
    whole, first = model(dtype=dtype), model(dtype=dtype)
    optimizers = [make_optimizer(m, lr=0.02, second_moment=second_moment) for m in (whole, first)]
    torch.manual_seed(5)
    run(whole, optimizers[0], range(10))
    torch.manual_seed(5)
    run(first, optimizers[1], range(4))
    torch.save([first.state_dict(), optimizers[1].state_dict(), torch.get_rng_state()], tmp_path / "c.pt")
    weights, state, random = torch.load(tmp_path / "c.pt")
    second = model(seed=9, dtype=dtype)
    second.load_state_dict(weights)
    optimizer = make_optimizer(second, lr=0.5, second_moment=second_moment)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    run(second, optimizer, range(4, 10))
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    table = second[1].up
    assert optimizer.state[table]["exp_avg"].dtype == torch.float32
    assert optimizer.state[table]["row_steps"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_resumes_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    def train(folder: str, seed: int, stop_at: int | None = None) -> nn.Module:
        net = model(seed=seed, dtype=dtype)

        def loss(step: int) -> list[Tensor]:
            if step == stop_at:
                raise Interrupted("here")
            return [loss_of(net, step % 3)]

        named = dict(net.named_parameters())
        buffers = dict(net.named_buffers())
        config = TrainConfig(checkpoint_seconds=0.0, weight_decay=0.1)
        loop.train(
            named, loss, 10, lambda i: 20, config, 0.02, folder=tmp_path / folder, resume_hint="", buffers=buffers
        )
        return net

    torch.manual_seed(1)
    whole = train("whole", 0)
    with pytest.raises(Interrupted):
        train("cut", 0, stop_at=6)
    assert checkpoints.saved_step(tmp_path / "cut") == 6
    resumed = train("cut", 3)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_counts_dense_and_sparse(max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_CACHED", 20)
    net = model()
    loss_of(net, 0).backward()
    before = [p.grad.to_dense().clone() for p in net.parameters() if p.grad is not None]
    wanted = torch.cat([g.flatten() for g in before]).norm()
    norm = clip_gradients(net.parameters(), max_norm)
    torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
    share = min(1.0, max_norm / float(wanted))
    for p, old in zip((p for p in net.parameters() if p.grad is not None), before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense(), old * share, rtol=1e-4, atol=1e-9)


def test_a_gradient_with_rows_twice_counts_once() -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    table.grad = sparse_of([3, 1, 3], torch.tensor([[1.0, 0], [0, 2.0], [3.0, 0]]), 5)
    assert float(clip_gradients([table], 1e9)) == pytest.approx(math.sqrt(16 + 4))
    rows, values = rows_of(table.grad)
    assert rows.tolist() == [1, 3]
    assert values.tolist() == [[0.0, 2.0], [4.0, 0.0]]


def test_clipping_of_numbers_and_of_nothing() -> None:
    number, table, empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.ones(0))
    number.grad, table.grad = torch.tensor(3.0), sparse_of([1], torch.tensor([[0.0, 4.0]]), 5)
    assert float(clip_gradients([number, table], 1.0)) == pytest.approx(5.0)
    assert float(number.grad) == pytest.approx(0.6)
    table.grad, empty.grad = sparse_of([], torch.zeros(0, 2), 5), torch.zeros(0)
    assert float(clip_gradients([table, empty], 1.0)) == 0


def test_without_beta1_a_step_is_along_the_gradient() -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    optimizer = make_optimizer({"t": table}, lr=0.1, betas=(0.0, 0.95), weight_decay=0.0, second_moment="element")
    for sign in (1.0, -1.0):
        table.grad = sparse_of([1], torch.tensor([[2.0, -2.0]]) * sign, 3)
        before = table.detach().clone()
        optimizer.step()
        torch.testing.assert_close((table.detach() - before)[1], torch.tensor([-0.1, 0.1]) * sign, rtol=1e-3, atol=0)


@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaling(unscale: bool) -> None:
    """As torch's scaler expects it: the update is of the gradient as it is, and a step that overflowed is left out."""
    plain, scaled = model(), model()
    optimizers = [make_optimizer(m, lr=0.02) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        loss_of(plain, step).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if unscale:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
        optimizers[1].zero_grad()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(scaled.state_dict())
    scaler.scale(loss_of(scaled, 0) * torch.inf).backward()
    scaler.step(optimizers[1])
    for name, tensor in scaled.named_parameters():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("second_moment", ["row", "element"])
def test_copies_and_pickles_go_on(second_moment: str) -> None:
    whole = model()
    optimizer = make_optimizer(whole, lr=0.02, second_moment=second_moment)
    run(whole, optimizer, range(3))
    copies = [copy.deepcopy((whole, optimizer)), pickle.loads(pickle.dumps((whole, optimizer)))]
    run(whole, optimizer, range(3, 6))
    for net, its in copies:
        run(net, its, range(3, 6))
        for a, b in zip(whole.parameters(), net.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_state_brings_its_kind_of_second_moment() -> None:
    first, second = model(), model()
    optimizer = make_optimizer(first, lr=0.02, second_moment="element")
    run(first, optimizer, range(2))
    other = make_optimizer(second, lr=0.02)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["second_moment"] for group in other.param_groups} == {"element"}
    run(first, optimizer, range(2, 5)), run(second, other, range(2, 5))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hooks_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    net = model()
    optimizer = make_optimizer(net, lr=0.02)
    told: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: told.append("before"))
    optimizer.register_step_post_hook(lambda *_: told.append("after"))
    run(net, optimizer, range(1))
    assert told == ["before", "after"]


def test_what_tables_have_not_is_refused() -> None:
    table = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="maximize is not offered"):
        RowAdamW([{"params": [table], "maximize": True}], lr=0.1)
    optimizer = make_optimizer({"t": table}, lr=0.1)
    with pytest.raises(ValueError, match="amsgrad is not offered"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "amsgrad": True})
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1], [0]]), torch.ones(1), (4, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse in more than rows"):
        optimizer.step()


def test_parameters_without_names_are_told_what_to_give() -> None:
    with pytest.raises(TypeError, match="give the model itself, or its named_parameters"):
        make_optimizer(model().parameters(), lr=0.1)  # type: ignore[arg-type]


def test_state_is_copied_when_loaded() -> None:
    net = model()
    optimizer = make_optimizer(net, lr=0.02)
    run(net, optimizer, range(1))
    state = {key: value.clone() for key, value in optimizer.state[net[0].weight].items()}
    fresh = model()
    other = make_optimizer(fresh, lr=0.02)
    given = {key: value.clone() for key, value in state.items()}
    other.load_parameter_state(fresh[0].weight, given)
    run(fresh, other, range(1))
    assert all(torch.equal(given[key], state[key]) for key in state)


def test_rounding_keeps_the_mean_and_what_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.full((4000, 4), 1.0 + 1 / 512)  # a quarter of the way from 1 to the next bfloat16
    rounding = _Rounding(x.numel())
    first, second = rounding(x).float(), rounding(x).float()
    assert set(first.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    for rounded in (first, second):
        assert float(rounded.mean()) == pytest.approx(1.0 + 1 / 512, abs=2e-4)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, 3.0]).repeat(3)
    assert torch.equal(rounding(exact), exact.bfloat16())
    torch.manual_seed(7)
    a = _Rounding(999)(torch.linspace(-2, 2, 999))
    torch.manual_seed(7)
    assert torch.equal(a, _Rounding(999)(torch.linspace(-2, 2, 999)))


def test_rounding_of_a_number_does_not_tell_of_another() -> None:
    """Over many draws, any two are rounded up together a sixteenth of the time if each is a quarter."""
    torch.manual_seed(0)
    x = torch.full((8,), 1.0 + 1 / 512)
    ups = []
    for _ in range(3000):
        rounding = _Rounding(8)
        ups.append(torch.cat([rounding(x), rounding(x)]) > 1)
    together = torch.stack(ups).double()
    share = together.T @ together / len(together)
    off = share[~torch.eye(16, dtype=torch.bool)]
    assert float((off - 1 / 16).abs().max()) < 0.03
    assert float((share.diagonal() - 1 / 4).abs().max()) < 0.05


def test_small_updates_of_bfloat16_rows_are_not_lost() -> None:
    table = nn.Parameter(torch.ones(64, 8, dtype=torch.bfloat16))
    optimizer = make_optimizer({"t": table}, lr=1e-4, weight_decay=0.0)
    torch.manual_seed(0)
    for _ in range(100):
        table.grad = sparse_of(list(range(64)), torch.ones(64, 8, dtype=torch.bfloat16), 64)
        optimizer.step()
    assert float(table.detach().float().mean()) == pytest.approx(1 - 100 * 1e-4, abs=2e-3)


def test_state_of_unread_rows_takes_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    zeros = untouched_zeros((1 << 16, 1024), torch.float32, torch.device("cpu"))
    zeros[::4096] += 1
    assert float(zeros.sum(1)[:4097].sum()) == 2 * 1024
    assert resident() - before < zeros.nbytes / 2
    assert untouched_zeros((16_000_000, 2048), torch.float32, torch.device("cpu"))[-1, -1] == 0  # 131 GB


def test_a_parameter_is_either_a_table_or_dense() -> None:
    table = nn.Parameter(torch.zeros(4, 2))
    optimizer = make_optimizer({"t": table}, lr=0.1)
    table.grad = sparse_of([1], torch.ones(1, 2), 4)
    optimizer.step()
    table.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"parameter \(4, 2\) has a dense gradient, after sparse ones"):
        optimizer.step()
    other = copy.deepcopy(table)
    optimizer = make_optimizer([("t", other)], lr=0.1)
    other.grad = torch.ones(4, 2)
    optimizer.step()
    other.grad = sparse_of([1], torch.ones(1, 2), 4)
    with pytest.raises(ValueError, match="sparse gradient, after dense ones"):
        optimizer.step()
    with pytest.raises(ValueError, match="second_moment 'none'"):
        make_optimizer({"t": table}, lr=0.1, second_moment="none")  # type: ignore[arg-type]


def at_checkpoint(step: int) -> tuple[nn.Sequential, RowAdamW]:
    """A model and its optimiser as a run has them after so many steps."""
    net = model(16, seed=step)
    optimizer = make_optimizer(net, lr=0.01)
    run(net, optimizer, range(1))
    return net, optimizer


def save_second(folder: Path) -> None:
    net, optimizer = at_checkpoint(2)
    checkpoints.save(folder, dict(net.named_parameters()), dict(net.named_buffers()), optimizer, 2, 2.0)


@pytest.mark.slow
def test_a_checkpoint_that_a_kill_cut_short_is_the_one_before(tmp_path):
    """Killed at whatever it asks of the disk."""
    net, optimizer = at_checkpoint(1)
    checkpoints.save(tmp_path / "run", dict(net.named_parameters()), dict(net.named_buffers()), optimizer, 1, 1.0)
    in_new_process(kill_everywhere, save_second, tmp_path / "run", tmp_path / "killed")
    found = []
    for killed in (tmp_path / "killed").iterdir():
        other = model(16, seed=7)
        named, buffers = dict(other.named_parameters()), dict(other.named_buffers())
        step, seconds = checkpoints.restore(killed, named, buffers, make_optimizer(other, lr=0.01), 10)
        assert seconds == step
        wanted = at_checkpoint(step)[0].state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())
        found.append(step)
    assert set(found) == {1, 2}
    assert len(found) > 4


def test_a_stopped_run_goes_on_with_the_rows_that_it_began_with(tmp_path):
    net, rows = nn.Linear(3, 3), np.arange(12).reshape(3, 4)
    require_same_rows(tmp_path, rows, [])  # it begins
    require_same_rows(tmp_path, rows[:2], [])  # and again, since there is no checkpoint
    require_same_rows(tmp_path, rows, [])
    checkpoints.save(tmp_path, dict(net.named_parameters()), {}, make_optimizer(net, lr=0.01), 1, 1.0)
    require_same_rows(tmp_path, rows, [])
    for others in (rows + 1, rows[:2]):
        with pytest.raises(ConfigError, match=r"begun by another version of growlm.*--restart"):
            require_same_rows(tmp_path, others, [])
    (tmp_path / "text.sha256").unlink()  # as before there was one
    require_same_rows(tmp_path, rows, [])
    with pytest.raises(ConfigError, match="--restart"):
        require_same_rows(tmp_path, rows, [2])
