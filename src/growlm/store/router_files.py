"""Router files: what a store keeps for its router, by the names of the folders under `router/`."""

# Under router/: what it was shown as none of the modules, and what is derived from the modules' own files.
GENERAL, ROUTER_SUMS, ROUTER_FITTED = "general", "gaussian", "gaussian-fitted"
ROUTER_INDEX, ROUTER_LEXICON = "product-key", "lexicon"
ROUTER_DERIVED = (ROUTER_SUMS, ROUTER_FITTED, ROUTER_INDEX, ROUTER_LEXICON)
ROUTER_TRAINED = "transformer"
ROUTERS = ("gaussian", "product-key", "transformer")


def layer_to_read(num_layers: int) -> int:
    """After how many of a base's layers the routers of a new store read its states: there they tell domains apart
    better than at the end, for a third of the work (docs/log.md). The trained router reads the last states."""
    return max(round(num_layers / 3), 1)
