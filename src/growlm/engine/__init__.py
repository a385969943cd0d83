"""Engine: serves prompts under a byte budget. See `engine.py`."""

from growlm.engine.engine import AUTO, Engine, Generation
from growlm.engine.sampling import SamplingConfig

__all__ = ["AUTO", "Engine", "Generation", "SamplingConfig"]
