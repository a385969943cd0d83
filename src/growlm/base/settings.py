"""Settings: the JSON files that describe a base. What a later step would stumble over, or in words of its own, is one
clear error here, which names the file and, where it can be told, the key.

Knows keys, their types and bounds; builds no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growlm.disk.files import read_json
from growlm.errors import BaseModelError, GrowlmError, shortened

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_MOST = 2**53  # no whole number in a config is as large
_MOST_COUNTED = 65_536  # of what a config counts, as layers and heads: lists of so many are made


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        BaseModelError: it cannot be read, or holds something else.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: not readable JSON ({error}); get the checkpoint again") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{path}: holds {shortened(content)}, expected an object; get the checkpoint again")
    return content


def config_settings(path: Path, families: Mapping[str, Any]) -> dict[str, Any]:
    """What a base's config.json says, once its sizes are known to be sizes. Of the rest, transformers asks more.

    Args:
        families: by model type.

    Raises:
        BaseModelError: it cannot be read, is of a family that is not there, or asks for what cannot be.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = read_object(path)
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in families:
        raise BaseModelError(
            f"{path}: model family {shortened(family)} is not supported; supported are {', '.join(families)}"
        )
    kind = CONFIG_MAPPING[family]
    common = {own: name for name, own in kind.attribute_map.items()}  # what a family spells in its own way
    for place, value in _numbers(settings):
        if abs(value) >= _MOST:
            raise BaseModelError(f"{path}: {shortened(place)[1:-1]} is {shortened(value)}, beyond what can be")
    for key, value in settings.items():
        if key.startswith("__") or callable(getattr(kind, key, None)):  # it would take a method's place
            raise BaseModelError(f"{path}: {shortened(key)} is no setting; leave it out")
        name = common.get(key, key)
        counted = name.startswith("num_")
        for number in value if isinstance(value, list) else [value]:
            if name in _SIZES or (counted and isinstance(number, int)):
                _require_size(path, key, number, int(name in _SIZES), _MOST_COUNTED if counted else _MOST)
    return settings


def _require_size(path: Path, key: str, value: Any, minimum: int, maximum: int) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum):
        return
    wanted = f"a whole number from {minimum} to {maximum}"
    raise BaseModelError(f"{path}: {key} is {shortened(value)}, expected {wanted}")


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a value, with where it stands."""
    if isinstance(value, int):
        yield place, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{place}.{key}" if place else str(key))


def require_read_settings(path: Path, config: Any) -> None:
    """Checks the settings that `Base` and the engine read of a config, in families too whose own code ignores them.

    Raises:
        BaseModelError: one of another type, or out of its range.
    """
    require_end_tokens(path, getattr(config, "eos_token_id", None), config.vocab_size)
    window = getattr(config, "sliding_window", None)
    if window is not None:
        _require_size(path, "sliding_window", window, 0, _MOST)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None and (not isinstance(cap, int | float) or isinstance(cap, bool) or not cap > 0):
        raise BaseModelError(f"{path}: final_logit_softcapping is {shortened(cap)}, expected a number above 0")
    patterns = getattr(config, "layer_types", None)
    if patterns is None:
        return
    known = ("full_attention", "sliding_attention")
    if not isinstance(patterns, list | tuple) or len(patterns) != config.num_hidden_layers:
        raise BaseModelError(
            f"{path}: layer_types is {shortened(patterns)}, expected a list of one for each of "
            f"{config.num_hidden_layers} layers"
        )
    for pattern in patterns:
        if pattern not in known:
            raise BaseModelError(f"{path}: layer_types has {shortened(pattern)}, expected {' or '.join(known)}")


def require_end_tokens(path: Path, ends: Any, vocab_size: int) -> None:
    """Checks `eos_token_id`, one token or several.

    Raises:
        BaseModelError: it is no token of the base.
    """
    if ends is None:
        return
    for token in ends if isinstance(ends, list | tuple) else [ends]:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise BaseModelError(
                f"{path}: eos_token_id is {shortened(ends)}, expected tokens of the base, from 0 to {vocab_size - 1}"
            )


def check_generation_config(folder: Path, vocab_size: int) -> None:
    """Checks generation_config.json, where there is one: transformers reads it with the model.

    Raises:
        BaseModelError: it cannot be read, or its end of text is no token of the base.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if path.is_file():
        settings = read_object(path)
        require_end_tokens(path, settings.get("eos_token_id"), vocab_size)
        with foreign(path):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def foreign(where: Path | str, what: str = "") -> Iterator[None]:
    """Around code of others that reads files: whatever it raises becomes one line.

    Args:
        where: the file.
        what: what it cannot do.

    Raises:
        BaseModelError: for everything that is not an error of ours.
    """
    try:
        yield
    except GrowlmError:
        raise
    except Exception as error:
        raise BaseModelError(f"{where}: {what}{_reason(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        raise BaseModelError(f"{where}: {what}{_reason(error)}") from None


def _reason(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told}"[:300] if told else type(error).__name__
