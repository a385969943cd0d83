"""The optimiser on a GPU: the same steps as on the processor, its state through a file, and clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from growlm.layers.peer import PEER
from growlm.training.optim import RowAdamW, clip_gradients, make_optimizer

pytestmark = pytest.mark.gpu

D = 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Dense parameters of two dimensions and one, and two tables."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.pool = PEER(D, 10 * 12, 2, 3, query_norm="layer", dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.pool(x)


def train(net: Net, device: str, steps: int, optimizer: RowAdamW | None = None, clip: float = math.inf, first: int = 0):
    optimizer = optimizer or make_optimizer(net, lr=1e-2, weight_decay=0.1)
    for step in range(first, first + steps):
        net(draw(20, D, seed=step).to(device)).square().mean().backward()
        clip_gradients(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def new(device: str, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype).to(device)


@pytest.mark.parametrize("second_moment", ["row", "element"])
@pytest.mark.parametrize("clip", [math.inf, 0.01])
def test_steps_are_those_of_the_processor(device, near, clip, second_moment):
    nets = {}
    for where in (device, "cpu"):
        net = nets[where] = new(where)
        train(net, where, 4, make_optimizer(net, lr=1e-2, weight_decay=0.1, second_moment=second_moment), clip)
    for (name, one), other in zip(nets[device].named_parameters(), nets["cpu"].parameters(), strict=True):
        near(f"optimiser, 4 steps: {name}", one, other, times=10)


def test_tables_in_bfloat16_are_rounded_by_the_same_draws(device, near):
    nets = {}
    for where in (device, "cpu"):
        nets[where] = new(where, torch.bfloat16)
        torch.manual_seed(7)
        train(nets[where], where, 4)
    for part in ("up", "down"):
        one, other = getattr(nets[device].pool, part), getattr(nets["cpu"].pool, part)
        assert one.dtype == torch.bfloat16
        near(f"optimiser, tables in bfloat16: {part}", one, other, torch.bfloat16)
        assert float((one.cpu() != other).float().mean()) < 0.02


def test_rows_without_a_gradient_keep_their_bits(device):
    net, untouched = new(device), new(device)
    net(draw(2, D).to(device)).square().mean().backward()
    read = net.pool.up.grad._indices()[0]
    make_optimizer(net, lr=1e-2, weight_decay=0.5).step()
    same = (net.pool.up == untouched.pool.up).all(-1)
    assert not bool(same[read].any())
    assert int(same.sum()) == len(same) - len(read.unique())


@pytest.mark.parametrize("place", ["same", "cpu"])
def test_its_state_goes_on_where_it_was(device, place):
    net = new(device)
    optimizer = train(net, device, 3)
    again = new(device)
    again.load_state_dict(net.state_dict())
    other = make_optimizer(again, lr=1e-2, weight_decay=0.1)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        state = {k: v.cpu() if place == "cpu" else v for k, v in optimizer.state[p].items()}
        other.load_parameter_state(q, state)
        assert {v.device.type for v in other.state[q].values()} == {device}
    train(net, device, 2, optimizer, first=3)
    train(again, device, 2, other, first=3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


def test_state_dict_round_trip(device):
    net = new(device)
    optimizer = train(net, device, 2)
    again = new(device)
    again.load_state_dict(net.state_dict())
    other = make_optimizer(again, lr=1e-2, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, device, 1, optimizer, first=2)
    train(again, device, 1, other, first=2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_clipping(device, near, dense):
    norms = []
    for where in (device, "cpu"):
        net = new(where)
        if dense:
            net.pool.requires_grad_(False)
        net(draw(20, D).to(where)).square().mean().backward()
        norms.append(clip_gradients(net.parameters(), 1e-3))
        grads = [p.grad.to_dense() for p in net.parameters() if p.grad is not None]
        assert float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()) == pytest.approx(1e-3, rel=1e-3)
    near("clipping: norm", *norms)
