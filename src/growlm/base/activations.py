"""Activations: functions by the names that transformers' configs use, e.g. "silu"."""

from transformers.activations import ACT2FN

__all__ = ["ACT2FN"]
