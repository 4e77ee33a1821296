"""The decoder beside transformers' on the same weights: forward, forward and backward, decode; interleaved.

    pip install -e '.[dev]' && python benchmarks/decoder_vs_transformers.py [--policy FOLDER] [--device cuda]

Without --policy both sides run a random MiniMax (hidden 256, 8 layers of which one is softmax attention, 8 heads, 4 key
heads, head dim 32, 4 experts of width 512, top 2, vocabulary 1,024), transformers' own weights saved and loaded here.
transformers runs batches without padding, with SDPA and no gradient checkpointing; here the same sequences are packed.
Float32 on CPU, bfloat16 on CUDA. Logits are compared before anything is timed. Medians of rounds, one call of each side
in turn.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cispo.model.arithmetic import prepare_products

prepare_products()

import numpy as np
import torch
import transformers
from torch import Tensor

from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder

SEQUENCES, TOKENS = 8, 256
DECODED, PROMPT = 64, 32


def random_minimax(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
        layer_types=["linear_attention"] * 7 + ["full_attention"], full_attn_alpha_factor=2.0,
        linear_attn_alpha_factor=2.0, mlp_alpha_factor=2.0, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    transformers.MiniMaxForCausalLM(config).save_pretrained(folder)


class Ours:
    """This project's decoder on packed sequences."""

    def __init__(self, decoder: Decoder, ids_BT: Tensor) -> None:
        self.decoder, self.device = decoder, ids_BT.device
        sequences, tokens = ids_BT.shape
        self.ids_N = ids_BT.flatten()
        self.positions_N = torch.arange(tokens, device=self.device).repeat(sequences)
        self.cu_seqlens = torch.arange(0, (sequences + 1) * tokens, tokens, dtype=torch.int32)
        self.prompt_BT = ids_BT[:, :PROMPT]

    def logits(self) -> Tensor:
        return self.decoder.logits(self.decoder(self.ids_N, self.positions_N, self.cu_seqlens))

    @torch.no_grad()
    def forward(self) -> None:
        self.logits()

    def backward(self) -> None:
        self.decoder.zero_grad()
        torch.nn.functional.cross_entropy(self.logits(), self.ids_N.roll(-1)).backward()

    @torch.inference_mode()
    def decode(self) -> None:
        sequences = len(self.prompt_BT)
        cache = self.decoder.new_cache(capacity=sequences, max_tokens=PROMPT + DECODED)
        target = cache.extend(range(sequences), [PROMPT] * sequences)
        positions = torch.arange(PROMPT, device=self.device).repeat(sequences)
        cu_seqlens = torch.arange(0, (sequences + 1) * PROMPT, PROMPT, dtype=torch.int32)
        hidden = self.decoder(self.prompt_BT.flatten(), positions, cu_seqlens, target)[PROMPT - 1 :: PROMPT]
        for _ in range(DECODED - 1):
            ids_B = self.decoder.logits(hidden).argmax(-1)
            hidden = self.decoder.decode(ids_B, cache.begin_step(np.arange(sequences)), cache)
        self.decoder.logits(hidden).argmax(-1)


class Theirs:
    """transformers' model on the same sequences as a batch."""

    def __init__(self, model: transformers.PreTrainedModel, ids_BT: Tensor) -> None:
        self.model, self.ids_BT = model, ids_BT

    def logits(self) -> Tensor:
        return self.model(self.ids_BT, use_cache=False).logits.flatten(0, 1).float()

    @torch.no_grad()
    def forward(self) -> None:
        self.logits()

    def backward(self) -> None:
        self.model.zero_grad()
        torch.nn.functional.cross_entropy(self.logits(), self.ids_BT.flatten().roll(-1)).backward()

    def decode(self) -> None:
        prompt = self.ids_BT[:, :PROMPT]
        self.model.generate(prompt, do_sample=False, max_new_tokens=DECODED, min_new_tokens=DECODED)


def timed(work: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(
    name: str, ours: Callable[[], None], theirs: Callable[[], None], tokens: int, options: argparse.Namespace
) -> None:
    device = torch.device(options.device)
    for work in (theirs, ours):
        timed(work, device)
    pairs = [(timed(theirs, device), timed(ours, device)) for _ in range(options.rounds)]
    their_s, our_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"| {name} | {tokens / their_s:,.0f} | {tokens / our_s:,.0f} | {their_s / our_s:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="a policy folder that transformers loads too")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.policy or Path(scratch)
        if options.policy is None:
            random_minimax(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).train()
        decoder = load_policy(folder, dtype=dtype, device=options.device)
    ids_BT = torch.randint(0, decoder.trained_ids, (SEQUENCES, TOKENS), device=options.device)
    ours, theirs = Ours(decoder, ids_BT), Theirs(model, ids_BT)
    with torch.no_grad():
        difference = (ours.logits() - theirs.logits())[:, : decoder.trained_ids].abs().max()
    size = sum(parameter.numel() for parameter in decoder.parameters()) / 1e6
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.device}, {dtype}", end="; ")
    print(f"{size:.1f} million parameters; logits differ by at most {difference:.1e}")
    print("| work | transformers, tokens/s | cispo, tokens/s | ratio |\n|---|---|---|---|")
    compare("forward", ours.forward, theirs.forward, SEQUENCES * TOKENS, options)
    compare("forward and backward", ours.backward, theirs.backward, SEQUENCES * TOKENS, options)
    model.eval()
    compare("decode", ours.decode, theirs.decode, SEQUENCES * DECODED, options)


if __name__ == "__main__":
    main()
