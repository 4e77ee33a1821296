"""Text and tokens in pieces: encoding of a text larger than memory, and decoding that never splits a character.

Both give what the whole would give: the ids of the whole text, the text of the whole ids.
"""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers.decoders import DecodeStream

WINDOW_CHARACTERS = 1 << 16


class TextDecoder:
    """Ids in, one by one; text out as soon as its characters are whole. Special tokens are dropped."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """The text that this id completes, which may be none."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._given += len(text)
        return str(text)

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as the replacement character."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return str(whole[self._given :])


def encode_pieces(
    tokenizer: tokenizers.Tokenizer, pieces: Iterable[str], *, window_characters: int = WINDOW_CHARACTERS
) -> Iterator[list[int]]:
    """Ids of the text that the pieces make up, in order, as lists; about two windows of text are held at a time.

    A window is cut where a word begins and what follows encodes by itself as it did in the window, well before the
    window's end, so that no text to come can change what was handed out. Where no such place is, the window grows.
    """
    held, wanted = "", 2 * window_characters
    for piece in pieces:
        held += piece
        while len(held) >= wanted:
            ids, rest = _settled(tokenizer, held, window_characters)
            if rest == held:
                wanted = 2 * len(held)
                break
            yield ids
            held, wanted = rest, 2 * window_characters
    if held:
        yield _encode(tokenizer, held).ids


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    return tokenizer.encode(text, add_special_tokens=False)


def _settled(tokenizer: tokenizers.Tokenizer, text: str, margin: int) -> tuple[list[int], str]:
    """The ids of a leading part, and the rest of the text; no ids and the whole text where it cannot be cut."""
    encoding = _encode(tokenizer, text)
    starts = {start: index for index, (start, end) in reversed(list(enumerate(encoding.offsets))) if end > start}
    last = len(text) - margin
    for cut in range(last, max(0, last - margin), -1):
        index = starts.get(cut)
        # A run of spaces is cut differently by what follows it, so a place within one is no place.
        if index is None or text[cut - 1].isspace() or not text[cut].isspace():
            continue
        if _encode(tokenizer, text[cut:]).ids == encoding.ids[index:]:
            return list(encoding.ids[:index]), text[cut:]
    return [], text
