"""Router: hidden states of the base -> ranked modules, or none of them.

Knows what the base's last layer says about a text and what was kept of each domain; never loads a module's weights.
Three kinds answer the same interface: gaussian, which grows from each domain's own text; product-key, which gives the
same answers where there are very many modules; and transformer, trained on kept text of all.
"""

from growlm.router.committing import commit_and_route
from growlm.router.evidence import (
    EVIDENCE,
    VECTORS,
    Framed,
    evidence_bytes,
    files_of,
    frames_of,
    gather_evidence,
    has_general,
    of_same_states,
    require_same_states,
    write_general,
)
from growlm.router.fitting import add_domain
from growlm.router.gaussian import GaussianRouter
from growlm.router.interface import NONE, Route, Router, names_of
from growlm.router.loading import load_router
from growlm.router.product_key import ProductKeyRouter
from growlm.router.samples import SAMPLES, pack_samples, read_samples, unpack_samples
from growlm.router.states import mean_pool
from growlm.router.transformer import TransformerRouter

__all__ = [
    "EVIDENCE",
    "NONE",
    "SAMPLES",
    "VECTORS",
    "Framed",
    "GaussianRouter",
    "ProductKeyRouter",
    "Route",
    "Router",
    "TransformerRouter",
    "add_domain",
    "commit_and_route",
    "evidence_bytes",
    "files_of",
    "frames_of",
    "gather_evidence",
    "has_general",
    "load_router",
    "mean_pool",
    "names_of",
    "of_same_states",
    "pack_samples",
    "read_samples",
    "require_same_states",
    "unpack_samples",
    "write_general",
]
