"""Evaluation: what a store knows, whether its router finds it, and whether anything was forgotten."""

from growlm.evaluation.evaluate import EvalConfig, EvalResult, evaluate

__all__ = ["EvalConfig", "EvalResult", "evaluate"]
