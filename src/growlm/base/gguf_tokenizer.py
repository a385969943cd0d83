"""GGUF tokenizer: the tokenizer that a GGUF file describes, as the files of a checkpoint folder.

Made from what the file says and nothing else, so that every release of transformers finds the same: their own readers
differ in the end of text, and read no `tokenizer.ggml.pre`, without which ids are not those that the model was trained
with. Knows the formats of both sides; runs no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from growlm.base.gguf_file import GGUFFile
from growlm.errors import BaseModelError, shortened

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of tokens; 1 is a normal one, 5 one that is not used
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # what transformers and a file call them
_PIECES_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}  # of pieces with scores, where the file says nothing
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_SPACE = "▁"
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> dict[str, Any]:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    pattern = (
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


@dataclass(frozen=True)
class _Splitting:
    """How text is cut before pairs are merged."""

    steps: list[dict[str, Any]]
    ignore_merges: bool = False  # a word that is a token is that token, whatever its merges
    begins: bool = False  # a text begins with the token for it, where the file says nothing
    normalizer: dict[str, Any] | None = None


_GPT2 = _Splitting([_bytes(use_regex=True)])
_DIGITS = _Splitting([{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)])
_LLAMA3 = _Splitting([_words(r"\p{N}{1,3}"), _bytes(use_regex=False)], ignore_merges=True, begins=True)
_DBRX = _Splitting([_words(r"\p{N}{1,3}"), _bytes(use_regex=False)])
# As transformers' own class for this family, which it takes whatever a folder says.
_QWEN2 = _Splitting([_words(r"\p{N}"), _bytes(use_regex=False)], normalizer={"type": "NFC"})

# By `tokenizer.ggml.pre`.
SPLITTINGS: dict[str, _Splitting] = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
}


@dataclass(frozen=True)
class GGUFTokenizer:
    """The files of a tokenizer, as JSON holds them.

    Attributes:
        vocabulary: tokenizer.json.
        settings: tokenizer_config.json.
        ids: of the tokens for begin, end, unknown and padding, by transformers' names, where there are any.
        ends: all tokens that end an answer.
    """

    vocabulary: dict[str, Any]
    settings: dict[str, Any]
    ids: dict[str, int]
    ends: list[int] = field(default_factory=list)


def tokenizer_of(file: GGUFFile, context: int) -> GGUFTokenizer:
    """
    Args:
        context: tokens that the model was made for.

    Raises:
        BaseModelError: the file has no tokenizer, or one of a kind that is not known.
    """
    model, tokens = file.get("tokenizer.ggml.model", str, ""), file.texts("tokenizer.ggml.tokens")
    if not model or not tokens:
        raise BaseModelError(f"{file.path}: no tokenizer in it (tokenizer.ggml.tokens); give a file that has one")
    if model not in ("gpt2", "llama"):
        raise BaseModelError(
            f"{file.path}: a tokenizer of kind {shortened(model)} (tokenizer.ggml.model); known are 'gpt2' (pairs of "
            "bytes) and 'llama' (pieces with scores)"
        )
    types = file.numbers("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise BaseModelError(f"{file.path}: {len(tokens):,} tokens, {len(types):,} types of them; get the file again")
    ids = _ids(file, len(tokens), {} if model == "gpt2" else _PIECES_DEFAULTS)
    vocab = {token: i for i, token in enumerate(tokens)}
    if model == "gpt2":
        splitting = _splitting(file)
        parts, begins = _byte_pairs(file, vocab, splitting), splitting.begins
    else:
        parts, begins = _pieces(file, tokens, vocab, types, ids.get("unk")), True
    begins = file.get("tokenizer.ggml.add_bos_token", bool, begins) and "bos" in ids
    ends = _ends(file, ids, vocab, len(tokens))
    added = _added(tokens, vocab, types, {*ids.values(), *ends})
    if model == "llama" and file.values.get("general.architecture") == "phi3":
        # This family's tokens for turns take the line's end behind them along.
        for token in added:
            token["rstrip"] = token["special"] and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    vocabulary = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "post_processor": _begun_by(tokens[ids["bos"]], ids["bos"]) if begins else _begun_by(None),
        **parts,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[ids[role]] if role in ids else None for role in _ROLES},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if template := file.get("tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    return GGUFTokenizer(vocabulary, settings, ids, ends)


def _ids(file: GGUFFile, count: int, defaults: dict[str, int]) -> dict[str, int]:
    found = {role: _token(file, f"{name}_token_id", count) for role, name in _ROLES.items()}
    given = {role: token for role, token in found.items() if token is not None}
    return {role: token for role, token in defaults.items() if token < count} | given


def _ends(file: GGUFFile, ids: dict[str, int], vocab: dict[str, int], count: int) -> list[int]:
    """Of the text, and of a turn where that is another token; older files do not say which, but all know its name."""
    turn = _token(file, "eot_token_id", count)
    if turn is None:
        turn = next((vocab[token] for token in _TURN_ENDS if token in vocab), None)
    return sorted({*([ids["eos"]] if "eos" in ids else []), *([turn] if turn is not None else [])})


def _token(file: GGUFFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}"
    found = file.values.get(key)
    if found is not None and (type(found) is not int or not 0 <= found < count):
        raise BaseModelError(f"{file.path}: {key} is {shortened(found)}, expected a token from 0 to {count - 1}")
    return found


def _splitting(file: GGUFFile) -> _Splitting:
    name = file.get("tokenizer.ggml.pre", str, "")
    if name not in SPLITTINGS:
        told = f"a way to cut words that is not known, {shortened(name)}" if name else "no word of how to cut words"
        raise BaseModelError(
            f"{file.path}: {told} (tokenizer.ggml.pre); known are {', '.join(SPLITTINGS)}; give the model as a "
            "checkpoint folder"
        )
    return SPLITTINGS[name]


def _byte_pairs(file: GGUFFile, vocab: dict[str, int], splitting: _Splitting) -> dict[str, Any]:
    merges = [tuple(merge.split(" ")) for merge in file.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or any(part not in vocab for part in (*merge, "".join(merge))):
            raise BaseModelError(f"{file.path}: tokenizer.ggml.merges has {shortened(' '.join(merge))}, no two tokens")
    return {
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitting.steps},
        "decoder": _bytes(use_regex=True),
        "model": _pairs(vocab, merges, ignore_merges=splitting.ignore_merges),
    }


def _pieces(
    file: GGUFFile, tokens: Sequence[str], vocab: dict[str, int], types: Sequence[float], unknown: int | None
) -> dict[str, Any]:
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise BaseModelError(f"{file.path}: {len(tokens):,} tokens, {len(scores):,} scores of them; get the file again")
    # A token that is found in the text as it stands takes no part in merging.
    merged = {t: i for t, i in vocab.items() if types[i] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)}
    merges = [
        (-scores[i], i, at, token)
        for token, i in merged.items()
        for at in range(1, len(token))
        if token[:at] in merged and token[at:] in merged
    ]
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefixed else []), spaces],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _pairs(
            vocab,
            [(token[:at], token[at:]) for _, _, at, token in sorted(merges)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _pairs(vocab: dict[str, int], merges: Sequence[tuple[str, ...]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        **settings, "vocab": vocab, "merges": [list(merge) for merge in merges],
    }  # fmt: skip


def _added(
    tokens: Sequence[str], vocab: dict[str, int], types: Sequence[float], roles: set[int]
) -> list[dict[str, Any]]:
    """The tokens that are found in a text as they stand."""
    special = {i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)} | roles
    found = special | {i for i, kind in enumerate(types) if kind == _USER_DEFINED}
    return [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": i in special,
        }
        for i in sorted(found)
        if vocab[tokens[i]] == i and tokens[i]
    ]  # fmt: skip


def _begun_by(token: str | None, number: int = 0) -> dict[str, Any]:
    """What is put before a text: a token or nothing. Said in both cases: where a file says nothing, transformers makes
    something of its own."""
    begin = [] if token is None else [{"SpecialToken": {"id": token, "type_id": 0}}]
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, second],
        "special_tokens": {} if token is None else {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
