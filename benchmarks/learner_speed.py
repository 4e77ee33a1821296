"""The learner's forward, backward and update on packed tokens: tokens a second, MFU, and where the time goes.

    pip install -e '.[bench]' && python benchmarks/learner_speed.py [--peer] [--profile]

The policy is a hybrid of M1's kind with random weights: 2.46 billion parameters, 0.95 of them met by a token, embedding
and head included; `--size tiny` is for a look on a CPU. With --peer, transformers' MiniMax of the same sizes does the
same forward and backward in the same process, with SDPA, without gradient checkpointing; its batch is halved until it
fits. Where liger-kernel is installed, the same once more with its norms and its fused head and loss, put in by hand, as
it has no patch for MiniMax.
MFU counts what the model needs (`cispo.model.sizes.training_flops`), the peer's as ours.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cispo.model.arithmetic import prepare_products

prepare_products()

import torch
from torch import Tensor

from cispo.devices import peak_flops
from cispo.kernels.head_loss import head_policy_loss
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.decoder import Decoder
from cispo.model.sizes import training_flops
from cispo.optimizer import MasterAdamW
from cispo.parallel.recompute import checkpoint_activations

FULL = ModelConfig(
    vocabulary_size=32768,
    hidden_size=2048,
    mixers=((LIGHTNING,) * 7 + (SOFTMAX,)) * 2,
    heads=16,
    key_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=1e7,
    expert_width=2560,
    experts=8,
    experts_per_token=2,
    norm_epsilon=1e-5,
    lightning_alpha=2.38,
    lightning_beta=1.0,
    softmax_alpha=2.38,
    softmax_beta=1.0,
    expert_alpha=2.38,
    expert_beta=1.0,
    initializer_range=0.02,
    tie_embeddings=False,
    max_positions=1 << 17,
)
TINY = replace(
    FULL, vocabulary_size=512, hidden_size=64, mixers=(LIGHTNING, SOFTMAX), heads=2, key_heads=1, head_dim=32,
    rotary_dim=16, expert_width=64, experts=4,
)  # fmt: skip


class Ours:
    """What the learner does with one micro batch, every token with a loss and a coefficient of CISPO's size."""

    def __init__(self, config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype, *, recomputes: bool) -> None:
        sequences, length = ids_BT.shape
        self.decoder = _decoder(config, dtype, ids_BT.device)
        if recomputes:
            checkpoint_activations(self.decoder)
        self.optimizer = MasterAdamW(self.decoder, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
        self.ids_N, self.targets_N = ids_BT.flatten(), ids_BT.roll(-1).flatten()
        self.positions_N = torch.arange(length, device=ids_BT.device).repeat(sequences)
        self.cu_seqlens = torch.arange(0, length * sequences + 1, length, dtype=torch.int32)
        self.rows_N = torch.arange(length * sequences, device=ids_BT.device)
        self.coefficient_N = torch.linspace(-1, 1, length * sequences, device=ids_BT.device) / len(self.rows_N)

    def backward(self) -> None:
        hidden_ND = self.decoder(self.ids_N, self.positions_N, self.cu_seqlens, rows_M=self.rows_N)
        head = head_policy_loss(
            hidden_ND,
            self.decoder.head_weight,
            self.targets_N,
            lambda logprob_C, rows: self.coefficient_N[rows],
            temperature=1.0,
        )
        head.loss.backward()
        self.optimizer.collect()

    def forward_backward(self) -> None:
        self.backward()
        self.optimizer.forget()

    def step(self) -> None:
        self.backward()
        self.optimizer.clip(1.0)
        self.optimizer.update(1e-6)


class Theirs:
    """transformers' MiniMax of the same sizes on the same sequences as a batch."""

    def __init__(self, config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype) -> None:
        import transformers

        kinds = {LIGHTNING: "linear_attention", SOFTMAX: "full_attention"}
        settings = transformers.MiniMaxConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            head_dim=config.head_dim,
            num_local_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            layer_types=[kinds[mixer] for mixer in config.mixers],
        )
        with torch.device(ids_BT.device):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
        self.name, self.model, self.ids_BT = f"transformers {transformers.__version__}", model.train(), ids_BT
        self._fused_loss: Any = None

    def put_liger_in(self) -> None:
        """Liger's RMSNorm in place of every norm, and its LM head with cross entropy, which holds no logits."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerRMSNorm

        for module in list(self.model.modules()):
            for name, norm in list(module.named_children()):
                if type(norm).__name__ == "MiniMaxRMSNorm":
                    # Not in place: a norm's output is the residual stream too, whose gradient is still needed.
                    fused = LigerRMSNorm(len(norm.weight), eps=norm.variance_epsilon, in_place=False)
                    fused.weight = norm.weight
                    setattr(module, name, fused)
        self._fused_loss = LigerFusedLinearCrossEntropyLoss()
        self.name += " and Liger"

    def forward_backward(self) -> None:
        self.model.zero_grad()
        targets_N = self.ids_BT.roll(-1).flatten()
        if self._fused_loss is not None:
            hidden_ND = self.model.model(self.ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
            self._fused_loss(self.model.lm_head.weight, hidden_ND, targets_N).backward()
            return
        logits_NV = self.model(self.ids_BT, use_cache=False).logits.flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits_NV, targets_N).backward()


def _decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    with torch.device(device):
        decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=config.initializer_range)
            if not name.endswith("router"):  # those are float32 whatever the rest is
                parameter.data = parameter.to(dtype)
    return decoder


def _timed(work: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Median seconds of so many runs after two that warm up."""
    seconds = []
    for _ in range(rounds + 2):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _measure(
    name: str, work: Callable[[], None], config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype, rounds: int
) -> None:
    """One row of the table."""
    if ids_BT.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(work, ids_BT.device, rounds)
    sequences, length = ids_BT.shape
    flops = training_flops(config, [length] * sequences, sequences * length) / seconds
    peak = peak_flops(ids_BT.device, dtype)
    mfu = "" if peak is None else f"{flops / peak:.1%}"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if ids_BT.is_cuda else ""
    tokens = sequences * length
    print(f"| {name} | {tokens} | {tokens / seconds:,.0f} | {flops / 1e12:.2f} | {mfu} | {memory} |", flush=True)


def _measure_theirs(config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype, rounds: int) -> None:
    theirs = Theirs(config, ids_BT, dtype)
    _measure_what_fits(theirs, config, dtype, rounds)
    if not ids_BT.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        print("| with Liger: needs CUDA and liger-kernel | | | | | |")
        return
    theirs.model.zero_grad()
    theirs.ids_BT = ids_BT
    theirs.put_liger_in()
    _measure_what_fits(theirs, config, dtype, rounds)


def _measure_what_fits(theirs: Theirs, config: ModelConfig, dtype: torch.dtype, rounds: int) -> None:
    while True:
        try:
            name = f"{theirs.name}: forward, backward"
            return _measure(name, theirs.forward_backward, config, theirs.ids_BT, dtype, rounds)
        except torch.OutOfMemoryError:
            if len(theirs.ids_BT) == 1:
                print(f"| {theirs.name}: a single sequence does not fit | | | | | |")
                return
            theirs.model.zero_grad()
            theirs.ids_BT = theirs.ids_BT[: len(theirs.ids_BT) // 2]
        torch.cuda.empty_cache()


def _profile(work: Callable[[], None], device: torch.device, rows: int) -> str:
    """A table of the kernels with the largest shares of the device's time, in one run."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        _wait(device)
    times = [
        (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in profile.key_averages()
    ]
    total = sum(spent for spent, _, _ in times)
    lines = [
        f"\nforward, backward and update: {total / 1e3:.1f} ms of {'kernels' if on_gpu else 'operations'}",
        "| share | ms | calls | name |\n|---|---|---|---|",
    ]
    for spent, count, name in sorted(times, reverse=True)[:rows]:
        lines.append(f"| {spent / total:.1%} | {spent / 1e3:.2f} | {count} | {name[:80]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    parser.add_argument("--peer", action="store_true", help="measure transformers too")
    parser.add_argument("--profile", type=int, nargs="?", const=25, default=0, metavar="ROWS")
    options = parser.parse_args()
    config, device = (FULL if options.size == "full" else TINY), torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    ids_BT = torch.randint(0, config.vocabulary_size, (options.sequences, options.length), device=device)
    ours = Ours(config, ids_BT, dtype, recomputes=options.recompute)
    size = sum(parameter.numel() for parameter in ours.decoder.parameters()) / 1e9
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}, {dtype}, {size:.2f} billion parameters")
    print("| work | tokens | tokens/s | TFLOP/s | MFU | peak GiB |\n|---|---|---|---|---|---|")
    _measure("cispo: forward, backward", ours.forward_backward, config, ids_BT, dtype, options.rounds)
    _measure("cispo: forward, backward, update", ours.step, config, ids_BT, dtype, options.rounds)
    profile = _profile(ours.step, device, options.profile) if options.profile else ""
    if options.peer:
        del ours
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _measure_theirs(config, ids_BT, dtype, options.rounds)
    print(profile)


if __name__ == "__main__":
    main()
