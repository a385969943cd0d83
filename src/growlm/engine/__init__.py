"""Engine: serves prompts under a byte budget. See `engine.py`."""

from growlm.engine.engine import Engine, Generation
from growlm.engine.sampling import SamplingConfig
from growlm.engine.selection import AUTO, Wanted, select

__all__ = ["AUTO", "Engine", "Generation", "SamplingConfig", "Wanted", "select"]
