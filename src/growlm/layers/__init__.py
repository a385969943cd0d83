"""Layers: tensors in, tensors out. Nothing here imports more than torch."""
