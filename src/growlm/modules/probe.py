"""Probe: what a base or a module answers to a fixed text, so that any later change of a single bit is seen.

The text is random tokens from a fixed seed: it says nothing of anyone's data.
"""

from __future__ import annotations

import hashlib
from typing import TypedDict

import torch

from growlm.disk.tensors import as_bytes
from growlm.modules.module_set import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses

_TOKENS = 64


class Probe(TypedDict):
    """`logits`: hash of all logits' bytes. `loss`: nats a token."""

    logits: str
    loss: float


@torch.inference_mode()
def probe(modules: ModuleSet) -> Probe:
    """Runs a module set on the probe text."""
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, modules.base.max_positions or _TOKENS)
    ids = torch.randint(modules.base.vocab_size, (1, length), generator=generator)
    logits = modules.logits(ids.to(modules.base.device)).cpu().contiguous()
    digest = hashlib.sha256(as_bytes(logits)).hexdigest()
    passage = ids.tolist()
    return {"logits": digest, "loss": float(passage_losses(modules, passage).sum()) / num_labels(passage)}
