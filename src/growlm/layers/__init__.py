"""Layers: tensors in, tensors out. Nothing here imports more than torch."""

from growlm.layers.peer import PEER, ProductKeyMemory
from growlm.layers.product_keys import ProductKeys, retrievals

__all__ = ["PEER", "ProductKeyMemory", "ProductKeys", "retrievals"]
