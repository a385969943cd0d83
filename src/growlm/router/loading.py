"""Loading: the router that a store says, or another kind of it. Knows which kinds there are, and nothing of either."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from growlm.errors import ConfigError
from growlm.router.fitting import load_gaussian
from growlm.router.interface import Router
from growlm.router.product_key import load_product_key
from growlm.router.transformer import load_transformer
from growlm.store import ROUTERS

if TYPE_CHECKING:
    from growlm.store import Store

_LOADERS: dict[str, Callable[[Store, Collection[str] | None], Router]] = {
    "gaussian": load_gaussian,
    "product-key": load_product_key,
    "transformer": load_transformer,
}


def load_router(store: Store, among: Collection[str] | None = None, *, kind: str | None = None) -> Router:
    """A store's router; `bind` it to the base before it routes.

    Args:
        among: names of modules; the router then is what it would be if the store held no others, as far as its kind can
            say.
        kind: gaussian, product-key or transformer; by default the store's own.

    Raises:
        ConfigError: no such kind.
        IntegrityError: a file of the router is not what its manifest says.
    """
    kind = kind or store.manifest.router
    if kind not in _LOADERS:
        raise ConfigError(f"router {kind!r} is not one of {', '.join(ROUTERS)}")
    return _LOADERS[kind](store, among)
