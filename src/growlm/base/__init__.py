"""Base: the frozen model, and all that touches the internals of transformers' layers and caches. See `base.py`."""

from growlm.base.base import Base, Pass, Step, tensor_bytes

__all__ = ["Base", "Pass", "Step", "tensor_bytes"]
