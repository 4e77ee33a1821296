"""Completion tokens a second of the rollout engine beside `transformers.generate`, on the same weights.

    pip install -e '.[dev]' && python benchmarks/rollout_speed.py --device cuda --batch 64 256
    python benchmarks/rollout_speed.py --policy path/to/smollm2 --device cuda --batch 256
    python benchmarks/rollout_speed.py --size tiny --device cpu --batch 16 64 --prompt 16 --new 48

Without --policy both sides run a random hybrid (`benchmarks/policies.py`): of 0.68 billion parameters, or with `--size
tiny` that of `rl_step_vs_trl.py`. Prompts are random tokens, each sampled once, and no completion ends before its last
token. bfloat16 on CUDA, float32 on CPU; transformers with SDPA. After a warm-up of each, rounds in turn, medians. The
limit is what a decode step has to read and write, at the copy speed measured in the same run: weights (of the experts,
those that so many tokens meet), lightning states or their rounded copies with half of the recent rows, and keys and
values at half the completion.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cispo.model.arithmetic import prepare_products

prepare_products()

import torch
import transformers
from policies import SIZES, write_minimax

from cispo.actors import prepare_process
from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.model.checkpoint import load_policy
from cispo.model.config import LIGHTNING
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt


class Ours:
    """The engine on random prompts; a new set of requests a round."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, options: argparse.Namespace, batch: int) -> None:
        self.batch, self.prompt, self.rounds = batch, options.prompt, 0
        self.vocabulary, self.end = decoder.trained_ids, tokenizer.eos_id
        settings = SamplingSettings(max_completion_tokens=options.new, seed=0)
        self.engine = Engine(
            decoder, tokenizer, settings, max_concurrent_completions=batch, max_prompt_tokens=options.prompt
        )

    def run(self, ids_BT: torch.Tensor) -> int:
        """Sample a completion of each row; the number of tokens."""
        self.rounds += 1
        before = self.engine.completion_tokens
        for row, ids in enumerate(ids_BT.tolist()):
            drawing, prompt = Drawing(1.0), Prompt(id=str(row), text="")
            self.engine.submit(GroupRequest(prompt, 1, drawing, stream=str(self.rounds), prompt_ids=ids))
        while not self.engine.is_idle:
            self.engine.step()
        self.engine.collect()
        return self.engine.completion_tokens - before


def theirs(model: transformers.PreTrainedModel, ids_BT: torch.Tensor, new: int) -> int:
    out = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return int(out[:, ids_BT.shape[1] :].numel())


def bytes_of_step(decoder: Decoder, batch: int, positions: int) -> float:
    """What a decode step of so many sequences at a position has to move."""
    config, size = decoder.config, decoder.head_weight.element_size()
    total = 0.0
    for name, parameter in decoder.named_parameters():
        if name == "embedding" and not config.tie_embeddings:
            continue
        share = 1.0
        if parameter.dim() == 3 and parameter.shape[0] > 1:
            share = 1 - (1 - config.experts_per_token / parameter.shape[0]) ** batch
        total += parameter.nbytes * share
    for mixer in config.mixers:
        if mixer == LIGHTNING:
            state = config.heads * config.head_dim**2 * size
            total += batch * (state + 2 * config.heads * config.head_dim * CHUNK_LENGTH / 2 * size)
        else:
            total += batch * 2 * config.key_heads * config.head_dim * positions * size
    return total


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a copy of a gigabyte."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * x.nbytes / statistics.median(times)


def timed(work: Any, device: str) -> float:
    """Tokens a second."""
    begin = time.perf_counter()
    tokens = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return float(tokens / (time.perf_counter() - begin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="a policy folder that transformers loads too")
    parser.add_argument("--size", choices=list(SIZES), default="hybrid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--their-rounds", type=int, default=1, help="0 leaves transformers out")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    prepare_process(len(os.sched_getaffinity(0)))
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.policy or Path(scratch)
        if options.policy is None:
            write_minimax(folder, **SIZES[options.size])
        decoder = load_policy(folder, dtype=dtype, device=options.device)
        tokenizer = Tokenizer.load(folder)
        model = None
        if options.their_rounds:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    object.__setattr__(tokenizer, "eos_id", -1)  # no sample has this id, so no completion ends early
    size = sum(parameter.numel() for parameter in decoder.parameters()) / 1e6
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {size:.0f} M parameters, {dtype}"
    )
    speed = copy_bytes_per_s() if options.device == "cuda" else None
    if speed:
        print(f"copy {speed / 1e12:.2f} TB/s")
    print("| batch | transformers, tokens/s | cispo, tokens/s | ratio | limit, tokens/s | share |")
    print("|---|---|---|---|---|---|")
    for batch in options.batch:
        ids_BT = torch.randint(0, decoder.trained_ids, (batch, options.prompt), device=options.device)
        ours = Ours(decoder, tokenizer, options, batch)
        ours.run(ids_BT)
        our_rates, their_rates = [], []
        for index in range(max(options.rounds, options.their_rounds)):
            if model is not None and index < options.their_rounds:
                their_rates.append(timed(partial(theirs, model, ids_BT, options.new), options.device))
            our_rates.append(timed(partial(ours.run, ids_BT), options.device))
        our = statistics.median(our_rates)
        their = statistics.median(their_rates) if their_rates else float("nan")
        limit = float("nan")
        if speed:
            limit = batch * speed / bytes_of_step(decoder, batch, options.prompt + options.new // 2)
        print(
            f"| {batch} | {their:,.0f} | {our:,.0f} | {our / their:.2f} | {limit:,.0f} | {our / limit:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
