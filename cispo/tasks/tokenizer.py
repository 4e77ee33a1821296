"""Trains the bundled policy's tokenizer: byte-level BPE of 1,024 entries, on the rendered corpus.

Each digit is a token of its own; an indent and the word after it may merge, as may brackets, so that short programs are
short in tokens. There is no padding token, because nothing is ever padded.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 1024
BOS, USER, ASSISTANT, EOS = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"
PIECES = r"\d|```[a-z]*\n?|\n *[A-Za-z_]*|\n```| ?[A-Za-z_]+| ?[^\sA-Za-z0-9_`]+| ?`|\s+"
"""One digit; a fence with its language; a line break with the indent and the word after it; a word; signs; the rest."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% else %}"
    f"{{{{ '{USER}' + message['content'] }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level, so any text can be encoded and comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BOS, USER, ASSISTANT, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, rows: Sequence[dict[str, object]]) -> Tokenizer:
    """Trains on the `prompt` and `completion` of corpus rows; writes tokenizer.json and tokenizer_config.json."""
    tokenizer = train_tokenizer(str(row[column]) for row in rows for column in ("prompt", "completion"))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def length_summary(tokenizer: Tokenizer, rows: Sequence[dict[str, object]]) -> str:
    """Mean, 95th percentile and maximum of the tokens of rendered prompts and completions, as one line."""
    parts = []
    for column, framing in (("prompt", 3), ("completion", 1)):
        lengths = sorted(len(tokenizer.encode(str(row[column])).ids) + framing for row in rows)
        mean = sum(lengths) / len(lengths)
        parts.append(f"{column} tokens: mean {mean:.1f}, p95 {lengths[int(0.95 * len(lengths))]}, max {lengths[-1]}")
    return "; ".join(parts)
