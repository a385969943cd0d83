"""Answers: text that is read off few tokens is that of all of them, and a stop text is cut wherever it lies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from growlm.engine.answers import Answer, Detokenizer
from growlm.engine.sampling import SamplingConfig
from tiny import TEXT, VOCAB, make_tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words that begin with a mark for the space before them, and bytes for what is in no word."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB + 256,
        special_tokens=["<|endoftext|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    # Bytes are no special tokens, which are left out of what is read.
    plain = Tokenizer.from_str(tokenizer.to_str().replace('"special": true', '"special": false'))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>")


TOKENIZERS = {"bytes": make_tokenizer(), "sentencepiece": sentencepiece_like()}
TEXTS = ["naïve 日本 🙂 e", "The quick brown fox  jumps\n\n over", " a", "🙂🙂", "é" * 9]


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(draw=st.data())
@settings(max_examples=100, deadline=None)
def test_text_that_comes_token_by_token_is_that_of_all_tokens(name, draw):
    tokenizer = TOKENIZERS[name]
    known = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    parts = draw.draw(st.lists(st.sampled_from(known) | st.lists(st.integers(0, VOCAB - 1), max_size=6), max_size=6))
    tokens = [token for part in parts for token in part]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join([*pieces, detokenizer.rest()]) == decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(name, text):
    tokenizer, detokenizer = TOKENIZERS[name], Detokenizer(TOKENIZERS[name])
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == decoded(tokenizer, tokens)


def test_a_token_is_read_with_few_others():
    tokenizer, widths = TOKENIZERS["bytes"], []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            widths.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    detokenizer = Detokenizer(Counting())
    for token in tokenizer.encode("日本 and some words " * 50):
        detokenizer.add(token)
    assert max(widths) < 10


@given(
    text=st.text("abc ", max_size=30),
    stop=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
    streams=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_an_answer_ends_before_the_first_stop_text(text, stop, streams):
    tokenizer = TOKENIZERS["bytes"]
    answer = Answer(tokenizer, tuple(stop), streams=streams)
    for token in tokenizer.encode(text):
        if not answer.add(token):
            break
    found = answer.generation(SamplingConfig(), [], scores={}, resident_bytes=0, loaded=[], prompt_tokens=1)
    if any(s in text for s in stop):
        assert answer.stopped_by is not None
        assert text.startswith(found.text)
        assert not any(s in found.text for s in stop)
        assert any(text[len(found.text) :].startswith(s) for s in stop)
    else:
        assert found.text == text
    assert "".join(answer.pieces) == (found.text if streams else "")
