"""How far a token's logprob differs between decoding it and one forward over the whole sequence.

    python benchmarks/decode_against_forward.py bundled:tiny path/to/policy --dtype bfloat16 float32

Sampled completions of 256 tokens; the logprob kept while sampling against the learner's, at the same weights. Sampling
and learner of other toolkits are two programs that disagree; here the figure is the toolkit's own claim, measured.
"""

import argparse
from pathlib import Path

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
from cispo.types import Prompt, Rollout

PROMPTS = [
    "Write a function f(x) that returns x + 1.",
    "Explain why the sky is blue.",
    "Write a function that sorts a list of numbers and drops those below zero, with an example.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
]


def sample(decoder: Decoder, tokenizer: Tokenizer, tokens: int, completions: int) -> list[Rollout]:
    engine = Engine(
        decoder,
        tokenizer,
        SamplingSettings(max_completion_tokens=tokens, seed=0),
        max_concurrent_completions=len(PROMPTS) * completions,
        max_prompt_tokens=256,
    )
    for number, text in enumerate(PROMPTS):
        engine.submit(GroupRequest(Prompt(id=str(number), text=text), completions, Drawing(1.0), "0"))
    rollouts: list[Rollout] = []
    while not engine.is_idle:
        engine.step()
        rollouts += [rollout for group in engine.collect() for rollout in group.rollouts]
    return rollouts


@torch.no_grad()
def learner_logprobs(decoder: Decoder, rollouts: list[Rollout]) -> np.ndarray:
    """The logprobs of all sampled tokens by one packed forward."""
    device = decoder.head_weight.device
    sequences = [np.concatenate((r.prompt_token_ids_T, r.completion_token_ids_T)) for r in rollouts]
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    ids_N = torch.from_numpy(np.concatenate(sequences)).long().to(device)
    positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
    hidden_ND = decoder(ids_N, positions_N, torch.from_numpy(starts.astype(np.int32)))
    targets = [
        start + np.arange(len(r.prompt_token_ids_T), length)
        for start, length, r in zip(starts, lengths, rollouts, strict=False)
    ]
    target_M = torch.from_numpy(np.concatenate(targets)).to(device)
    logprob_M, _ = head_logprobs(hidden_ND[target_M - 1], decoder.head_weight, ids_N[target_M], temperature=1.0)
    return logprob_M.cpu().numpy()


def compare(name: str, dtype: str, device: torch.device, tokens: int, completions: int) -> None:
    folder = resolve_policy(name, base_path=Path.cwd())
    decoder = load_policy(folder, dtype=resolve_dtype(dtype), device=device)
    rollouts = sample(decoder, Tokenizer.load(folder), tokens, completions)
    sampled = np.concatenate([rollout.logprobs_T for rollout in rollouts])
    learned = learner_logprobs(decoder, rollouts)
    difference = np.abs(sampled - learned)
    correlation = np.corrcoef(np.exp(sampled), np.exp(learned))[0, 1]
    print(
        f"| {name} | {dtype} | {len(sampled)} | {np.mean(difference != 0):.3f} | {difference.mean():.2e} | "
        f"{np.quantile(difference, 0.99):.2e} | {difference.max():.2e} | {correlation:.6f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help="policy folders or bundled policies")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion, at most")
    parser.add_argument("--completions", type=int, default=4, help="completions of each of the four prompts")
    options = parser.parse_args()
    device = resolve_device(options.device)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    print("| policy | dtype | tokens | share that differs | mean | p99 | largest | Pearson of probabilities |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.policies:
        for dtype in options.dtype:
            compare(name, dtype, device, options.tokens, options.completions)


if __name__ == "__main__":
    main()
