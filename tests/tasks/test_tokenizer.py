"""The bundled policy's tokenizer: training, its files, and how short tasks are in it."""

import itertools
import json
from importlib.resources import files
from pathlib import Path

import pytest

from cispo.data_files import read_rows
from cispo.model.tokenizer import Tokenizer
from cispo.resources import recipes_folder
from cispo.tasks.tokenizer import VOCABULARY_SIZE, length_summary, train_tokenizer, write_tokenizer

BUNDLED = Path(str(files("cispo.model"))) / "assets" / "tiny"


def corpus(limit: int) -> list[dict[str, object]]:
    rows = read_rows(recipes_folder() / "data" / "code" / "sft_corpus.jsonl.gz")
    return [row.values for row in itertools.islice(rows, limit)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocabulary_size == VOCABULARY_SIZE == 1024
    assert tokenizer.encode("<|bos|><|user|><|assistant|><|end|>") == [0, 1, 2, 3]
    assert tokenizer.eos_id == 3
    assert json.loads((BUNDLED / "config.json").read_text())["vocab_size"] == VOCABULARY_SIZE


def test_chat_rendering(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_prompt("Write `f(n)`.") == [0, 1, *tokenizer.encode("Write `f(n)`."), 2]


def test_any_text_comes_back_and_each_digit_is_a_token(tokenizer: Tokenizer) -> None:
    for text in ("def f(x):\n    return x + 1024\n", "  \t\n\n ", "Grüße 漢字 🙂", "```python\nx\n```", "a_b-c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("1024")
    assert [tokenizer.decode([token]) for token in digits] == ["1", "0", "2", "4"]


def test_prompts_and_completions_are_short(tokenizer: Tokenizer) -> None:
    rows = corpus(3000)
    prompts = [len(tokenizer.render_prompt(str(row["prompt"]))) for row in rows]
    completions = [len(tokenizer.encode(str(row["completion"]))) + 1 for row in rows]
    assert sum(prompts) / len(rows) <= 38 and max(prompts) <= 64
    assert sum(completions) / len(rows) <= 38 and max(completions) <= 96


def test_training_is_deterministic_and_its_files_load(tmp_path: Path) -> None:
    rows = corpus(400)
    for name in ("one", "two"):
        write_tokenizer(tmp_path / name, rows)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert Tokenizer.load(tmp_path / "one").eos_id == 3
    assert length_summary(train_tokenizer(["a b"]), [{"prompt": "a", "completion": "a b"}]) == (
        "prompt tokens: mean 4.0, p95 4, max 4; completion tokens: mean 3.0, p95 3, max 3"
    )


def test_transformers_loads_it(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(BUNDLED))
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    messages = [{"role": "user", "content": "Write `f(n)`."}]
    ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.render_prompt("Write `f(n)`.")
    whole = loaded.apply_chat_template([*messages, {"role": "assistant", "content": "x = 1"}], tokenize=False)
    assert whole == "<|bos|><|user|>Write `f(n)`.<|assistant|>x = 1<|end|>"
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|end|>", None)
