"""Router files: what a store keeps for its router, by the names of the folders under `router/`."""

# Under router/: what it was shown as none of the modules, and what is derived from the modules' own files.
GENERAL, ROUTER_SUMS, ROUTER_FITTED = "general", "gaussian", "gaussian-fitted"
ROUTER_INDEX = "product-key"
ROUTER_DERIVED = (ROUTER_SUMS, ROUTER_FITTED, ROUTER_INDEX)
ROUTER_TRAINED = "transformer"
ROUTERS = ("gaussian", "product-key", "transformer")
