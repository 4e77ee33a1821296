"""Text in pieces gives the ids of the whole, and ids one by one the text of the whole."""

from importlib.resources import files
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from cispo.model.text_stream import TextDecoder, encode_pieces

TINY = Path(str(files("cispo.model"))) / "assets" / "tiny" / "tokenizer.json"
WORDS = [
    "def f(x):\n    return x + 1",
    "hello",
    " ",
    "   ",
    "\n\n",
    "Grüße",
    "漢字",
    "🙂",
    "```",
    "<|end|>",
    "\t",
    "1024",
    "...",
]


def gpt2_like() -> tokenizers.Tokenizer:
    """Spaces belong to the word that follows them, as in GPT-2, Llama 3 and Qwen."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([word + " hello world " for word in WORDS], trainer)
    return tokenizer


TOKENIZERS = {"tiny": tokenizers.Tokenizer.from_file(str(TINY)), "gpt2-like": gpt2_like()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=300), piece=st.integers(1, 400), window=st.integers(4, 200))
def test_pieces_encode_as_the_whole(name: str, words: list[str], piece: int, window: int) -> None:
    tokenizer, text = TOKENIZERS[name], "".join(words)
    pieces = (text[start : start + piece] for start in range(0, len(text), piece))
    lists = list(encode_pieces(tokenizer, pieces, window_characters=window))
    assert [token for ids in lists for token in ids] == tokenizer.encode(text, add_special_tokens=False).ids


def test_little_text_is_held_at_a_time() -> None:
    longest = max(len(ids) for ids in encode_pieces(TOKENIZERS["tiny"], ["a few words "] * 5000, window_characters=500))
    assert longest < 1000


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_no_character_is_ever_split(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoder = TextDecoder(tokenizer)
    shown = [decoder.push(token) for token in ids]
    assert "".join(shown) + decoder.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in part for part in shown) or "\ufffd" in text


def test_bytes_that_never_become_a_character_come_last() -> None:
    tokenizer = TOKENIZERS["tiny"]
    decoder = TextDecoder(tokenizer)
    ids = tokenizer.encode("a🙂", add_special_tokens=False).ids
    assert [decoder.push(token) for token in ids[:-1]][-1] == ""
    assert decoder.finish() == "\ufffd"
