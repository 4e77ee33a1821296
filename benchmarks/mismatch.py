"""How far rollout and learner logprobs differ at equal weights, token by token, and in policies of one kind of layer.

    python benchmarks/mismatch.py bundled:tiny path/to/policy --dtype bfloat16 float32
    python benchmarks/mismatch.py hybrid lightning softmax experts dense --device cuda --tokens 256 --groups 32

Sampled completions through the engine with all that it does: groups whose prompts are forked, prompts read in pieces
beside decode steps, sequences that come and go at different times, CUDA graphs where there are any. Then one packed
forward a group by the learner's own functions. Sampling and learner of other toolkits are two programs that disagree
(MiniMax-M1 reports a correlation of 0.997 of the probabilities, after its fix); here the figure is the toolkit's own
claim, measured. Besides policy folders these names are known, random and of 0.68 billion parameters or less: `hybrid`,
and variants of it whose layers are all of one kind (`lightning`, `softmax`, each with one expert; `experts` and `dense`
on the hybrid's mixers, in four layers).
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cispo.model.arithmetic import prepare_products

prepare_products()

import numpy as np
import torch

from cispo.devices import resolve_device, resolve_dtype
from cispo.kernels.head_loss import head_logprobs
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer
from cispo.resources import resolve_policy
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Group, Prompt

ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}
FOUR_LAYERS = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
RANDOM: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "lightning": {"layer_types": ["linear_attention"] * 4, **ONE_EXPERT},
    "softmax": {"layer_types": ["full_attention"] * 4, **ONE_EXPERT},
    "experts": FOUR_LAYERS,
    "dense": FOUR_LAYERS | ONE_EXPERT,
}


def sample(decoder: Decoder, tokenizer: Tokenizer, options: argparse.Namespace) -> list[Group]:
    """Groups on prompts of random tokens and lengths, half of them submitted while the others are under way."""
    generator = np.random.default_rng(0)
    engine = Engine(
        decoder,
        tokenizer,
        SamplingSettings(max_completion_tokens=options.tokens, seed=0),
        max_concurrent_completions=max(options.completions, options.groups * options.completions * 3 // 4),
        max_prompt_tokens=options.prompt,
        max_prefill_tokens=max(64, options.prompt // 2),
    )
    requests = []
    for number in range(options.groups):
        ids = generator.integers(0, decoder.trained_ids, int(generator.integers(1, options.prompt + 1))).tolist()
        prompt = Prompt(id=str(number), text="")
        requests.append(GroupRequest(prompt, options.completions, Drawing(1.0), prompt_ids=ids))
    groups: list[Group] = []
    while requests or not engine.is_idle:
        if requests and engine.steps % 5 == 0:
            engine.submit(requests.pop())
        engine.step()
        groups += engine.collect()
    return groups


@torch.no_grad()
def learner_logprobs(decoder: Decoder, groups: list[Group]) -> Iterator[np.ndarray]:
    """The logprobs of all sampled tokens, a packed forward a group."""
    device = decoder.head_weight.device
    for group in groups:
        sequences = [np.concatenate((r.prompt_token_ids_T, r.completion_token_ids_T)) for r in group.rollouts]
        lengths = [len(sequence) for sequence in sequences]
        starts = np.cumsum([0, *lengths])
        ids_N = torch.from_numpy(np.concatenate(sequences)).long().to(device)
        positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
        hidden_ND = decoder(ids_N, positions_N, torch.from_numpy(starts.astype(np.int32)))
        targets = [
            start + np.arange(len(r.prompt_token_ids_T), length)
            for start, length, r in zip(starts, lengths, group.rollouts, strict=False)
        ]
        target_M = torch.from_numpy(np.concatenate(targets)).to(device)
        logprob_M, _ = head_logprobs(hidden_ND[target_M - 1], decoder.head_weight, ids_N[target_M], temperature=1.0)
        yield logprob_M.cpu().numpy()


def compare(name: str, folder: Path, dtype: str, device: torch.device, options: argparse.Namespace) -> None:
    decoder = load_policy(folder, dtype=resolve_dtype(dtype), device=device)
    groups = sample(decoder, Tokenizer.load(folder), options)
    sampled = np.concatenate([rollout.logprobs_T for group in groups for rollout in group.rollouts])
    learned = np.concatenate(list(learner_logprobs(decoder, groups)))
    difference = np.abs(sampled - learned)
    correlation = np.corrcoef(np.exp(sampled), np.exp(learned))[0, 1]
    print(
        f"| {name} | {dtype} | {len(sampled)} | {np.count_nonzero(difference)} | {difference.mean():.2e} | "
        f"{np.quantile(difference, 0.99):.2e} | {difference.max():.2e} | {correlation:.6f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help=f"policy folders, bundled policies, or {', '.join(RANDOM)}")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion, at most")
    parser.add_argument("--prompt", type=int, default=160, help="tokens of the longest prompt")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8, help="completions of each group")
    options = parser.parse_args()
    device = resolve_device(options.device)
    torch.use_deterministic_algorithms(True)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    print("| policy | dtype | tokens | that differ | mean | p99 | largest | Pearson of probabilities |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.policies:
        with tempfile.TemporaryDirectory() as scratch:
            if name in RANDOM:
                from policies import HYBRID, write_minimax

                folder = Path(scratch)
                write_minimax(folder, **HYBRID | RANDOM[name])
            else:
                folder = resolve_policy(name, base_path=Path.cwd())
            for dtype in options.dtype:
                compare(name, folder, dtype, device, options)


if __name__ == "__main__":
    main()
