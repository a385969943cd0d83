"""Base: the frozen model, and all that touches the internals of transformers' layers and caches. See `base.py`."""

from growlm.base.base import Base, LayerToRun, Pass, tensor_bytes

__all__ = ["Base", "LayerToRun", "Pass", "tensor_bytes"]
