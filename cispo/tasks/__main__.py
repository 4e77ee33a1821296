"""`python -m cispo.tasks OUT_DIR [--seed 0] [--imperfect-share 0.6] [--tokenizer FOLDER]` writes the task files."""

import argparse
import gzip
import json
from pathlib import Path

from cispo.tasks.generate import CORPUS_ROWS, write_files


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cispo.tasks", description="Generate Python function tasks.")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--imperfect-share", type=_share, default=0.6, help="share of wrong completions in the corpus, 0 to 1"
    )
    parser.add_argument("--corpus-rows", type=int, default=CORPUS_ROWS)
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="also train a tokenizer on the corpus")
    options = parser.parse_args()
    counts = write_files(
        options.folder, seed=options.seed, imperfect_share=options.imperfect_share, corpus=options.corpus_rows
    )
    for name, count in counts.items():
        print(f"{options.folder / name}: {count} rows")
    if options.tokenizer is not None:
        from cispo.tasks.tokenizer import length_summary, write_tokenizer

        with gzip.open(options.folder / "sft_corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        print(length_summary(write_tokenizer(options.tokenizer, rows), rows))


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 to 1, got {text}")
    return value


if __name__ == "__main__":
    main()
