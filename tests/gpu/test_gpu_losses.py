"""Losses on a GPU: cross-entropy in chunks, what routers are trained by, and a module's vocabulary rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growlm.layers import cross_entropy
from growlm.layers.cross_entropy import linear_cross_entropy, token_losses
from growlm.layers.losses import (
    load_balance,
    load_concentration,
    mutual_information,
    router_z,
    routing_regularisation,
)
from growlm.modules.vocabulary import HeadRows, InputRows, JoinedHeadRows

pytestmark = pytest.mark.gpu

N, D, V = 70, 24, 90
IDS = torch.arange(3, V, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy(device, near, monkeypatch, softcap, rows, dtype):
    monkeypatch.setattr(cross_entropy, "_CHUNK", 20 * V)  # several chunks
    monkeypatch.setattr(cross_entropy, "_ON_GPU", 1)
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(9))
    given = [draw(N, D).to(dtype), draw(V, D, seed=1).to(dtype), draw(len(IDS), D, seed=2).to(dtype)]
    results = []
    for where, kind in ((device, dtype), ("cpu", torch.float32)):
        hidden, weight, own = (x.to(where, kind, copy=True).requires_grad_() for x in given)
        options = {"rows": own, "ids": IDS.to(where)} if rows else {}
        loss = linear_cross_entropy(hidden, weight, labels.to(where), softcap=softcap, **options)
        loss.backward()
        each = token_losses(hidden, weight, labels.to(where), softcap=softcap, **options)
        results.append([loss, each, hidden.grad, weight.grad, *([own.grad] if rows else [])])
    for name, one, other in zip(("loss", "each token", "hidden", "head", "rows"), *results, strict=False):
        near(f"cross-entropy: {name}", one, other, dtype)


@pytest.mark.parametrize("counted", [False, True])
def test_losses_of_routers(device, near, counted):
    logits, experts = draw(N, 7), draw(N, 7).topk(2).indices
    mask = torch.arange(N) % 3 > 0 if counted else None
    for name, loss in (
        ("mutual information", lambda x, e, m: mutual_information(x, m)),
        ("load concentration", lambda x, e, m: load_concentration(x, m)),
        ("load balance", load_balance),
        ("z", lambda x, e, m: router_z(x, m)),
        ("regularisation", lambda x, e, m: routing_regularisation(x)),
    ):
        results = []
        for where in (device, "cpu"):
            x = logits.to(where, copy=True).requires_grad_()
            value = loss(x, experts.to(where), None if mask is None else mask.to(where))
            value.backward()
            results.append((value, x.grad))
        near(f"router losses: {name}", results[0][0], results[1][0])
        near(f"router losses: {name}, gradient", results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_rows(device, near, dtype):
    logits, hidden = draw(2, 9, V).to(dtype), draw(2, 9, D, seed=1).to(dtype)
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(2))
    results = []
    for where, kind in ((device, dtype), ("cpu", torch.float32)):
        # Values that the dtype can hold, in this place's own dtype.
        rows = [draw(len(IDS), D, seed=s).to(dtype).to(where, kind) for s in (3, 4)]
        head, into = HeadRows(IDS.to(where), rows[0]), InputRows(IDS.to(where), rows[1])
        both = JoinedHeadRows(
            [head, HeadRows(torch.arange(0, V, 5, device=where), draw(18, D, seed=5).to(where, kind))]
        )
        own = [part.to(where, kind) for part in (logits, hidden)]
        outs = [head.add_to(*own), both.add_to(*own), both.rows, into.add_to(own[1], ids.to(where), 2.0)]
        sum(out.float().square().sum() for out in outs).backward()
        results.append([*outs, head.rows.grad, into.rows.grad])
    names = ("head", "several heads", "rows of several", "input", "head's gradient", "input's gradient")
    for name, one, other in zip(names, *results, strict=True):
        near(f"vocabulary rows: {name}", one, other, dtype)


def test_rows_of_zero_leave_the_bits(device):
    logits, hidden = draw(2, 9, V).to(device), draw(2, 9, D).to(device)
    head = HeadRows(IDS.to(device), torch.zeros(len(IDS), D, device=device))
    assert torch.equal(head.add_to(logits, hidden), logits)
    into = InputRows(IDS.to(device), torch.zeros(len(IDS), D, device=device))
    ids = torch.arange(18, device=device).view(2, 9)
    assert torch.equal(into.add_to(hidden, ids, 3.0), hidden)
