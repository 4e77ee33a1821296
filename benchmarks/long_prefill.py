"""A very long prompt in pieces: time per token and peak memory as it grows, by kind of layer.

    python benchmarks/long_prefill.py       a hybrid of 0.68 billion parameters, 1,048,576 tokens, on CUDA
    python benchmarks/long_prefill.py --policy bundled:tiny --device cpu --length 65536 --piece 4096

Without --policy the decoder is random: hidden 1024, 16 layers of which two are softmax attention, 16 heads, 4 key
heads, head dim 64, 8 experts of width 1408, top 2, vocabulary 32,768. A line is printed for the pieces that end at 64K,
256K and 1M tokens, the first and the last: its own milliseconds per thousand tokens, not an average over all before it.
Lightning layers do the same work for every piece; softmax layers read all keys so far.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cispo.model.arithmetic import prepare_products

prepare_products()

import torch

from cispo.devices import resolve_device
from cispo.model.cache import DecodeCache
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.families import read_hf_config
from cispo.resources import resolve_policy

SHOWN = (1 << 16, 1 << 18, 1 << 20)
HYBRID = {
    "model_type": "minimax_m1", "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 16,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 2, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "rotary_dim": 32, "rope_theta": 1e7, "intermediate_size": 1408, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
    "max_position_embeddings": 1 << 20, "postnorm": True,
    **{f"layernorm_{part}_alpha": 2.38 for part in ("linear_attention", "full_attention", "mlp")},
    **{f"layernorm_{part}_beta": 1.0 for part in ("linear_attention", "full_attention", "mlp")},
}  # fmt: skip


def random_hybrid(device: torch.device) -> Decoder:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        decoder = Decoder(read_hf_config(HYBRID)).to(dtype)
        for name, parameter in decoder.named_parameters():
            if name.endswith("experts.router"):
                parameter.data = parameter.data.float()
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=decoder.config.initializer_range)
    return decoder


class Clock:
    """Seconds spent in each kind of part of a decoder's layers, by hooks."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for layer, kind in zip(decoder.layers, decoder.config.mixers, strict=True):
            for part, name in ((layer.mixer, kind), (layer.experts, "experts")):
                part.register_forward_pre_hook(self._begin(name))
                part.register_forward_hook(self._end(name))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, name: str) -> Callable[..., None]:
        return lambda *_: self._spans[name].append((self._now(), None))

    def _end(self, name: str) -> Callable[..., None]:
        def close(*_: object) -> None:
            self._spans[name][-1] = (self._spans[name][-1][0], self._now())

        return close

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            seconds = {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self._spans.items()}
        else:
            seconds = {name: sum(b - a for a, b in spans) for name, spans in self._spans.items()}
        self._spans.clear()
        return seconds


@torch.inference_mode()
def prefill(decoder: Decoder, cache: DecodeCache, length: int, device: torch.device) -> None:
    """The next `length` tokens, random, of the sequence in slot 0."""
    start = cache.length(0)
    target = cache.extend([0], [length])
    ids_N = torch.randint(0, decoder.trained_ids, (length,), device=device)
    decoder(ids_N, torch.arange(start, start + length, device=device), torch.tensor([0, length]).int(), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="a policy folder or a bundled policy, in place of the random hybrid")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens in all")
    parser.add_argument("--piece", type=int, default=1 << 15, help="tokens of a piece")
    options = parser.parse_args()
    device = resolve_device(options.device)
    is_cuda = device.type == "cuda"
    if options.policy:
        folder = resolve_policy(options.policy, base_path=Path.cwd())
        decoder = load_policy(folder, dtype=torch.bfloat16 if is_cuda else torch.float32, device=device)
    else:
        decoder = random_hybrid(device)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    clock = Clock(decoder, device)
    for _ in range(2):
        warm_up = decoder.new_cache(capacity=1, max_tokens=options.piece)
        prefill(decoder, warm_up, options.piece, device)
        clock.take()
    del warm_up
    cache = decoder.new_cache(capacity=1, max_tokens=options.length)
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    print(
        f"{torch.cuda.get_device_name() if is_cuda else 'CPU'}, torch {torch.__version__}, {parameters / 1e6:.0f}",
        end=" ",
    )
    print(f"million parameters, pieces of {options.piece}")
    kinds = [*dict.fromkeys(decoder.config.mixers), "experts"]
    print("| tokens | ms per 1,000 tokens of this piece | " + " | ".join(kinds) + " | seconds so far | peak GiB |")
    print("|---" * (len(kinds) + 4) + "|")
    so_far = 0.0
    while cache.length(0) < options.length:
        begin = time.perf_counter()
        prefill(decoder, cache, min(options.piece, options.length - cache.length(0)), device)
        by_kind = clock.take()
        seconds = time.perf_counter() - begin
        so_far += seconds
        if cache.length(0) in (*SHOWN, options.piece, options.length):
            cells = " | ".join(f"{by_kind[kind] / options.piece * 1e6:.3f}" for kind in kinds)
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if is_cuda else "-"
            print(
                f"| {cache.length(0)} | {seconds / options.piece * 1e6:.3f} | {cells} | {so_far:.1f} | {peak} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
