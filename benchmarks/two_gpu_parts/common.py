"""What the parts share: sizes, policies with random weights, rows of the table, processes that are ranks."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.multiprocessing as mp

from cispo.actors import prepare_process
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.decoder import Decoder
from cispo.model.families import read_hf_config
from cispo.parallel.ranks import Ranks, RankSettings

HYBRID = ModelConfig(
    vocabulary_size=32768,
    hidden_size=1024,
    mixers=((LIGHTNING,) * 7 + (SOFTMAX,)) * 2,
    heads=16,
    key_heads=4,
    head_dim=64,
    rotary_dim=32,
    rope_theta=1e7,
    expert_width=1408,
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
"""Of 0.68 billion parameters."""
LARGE = replace(HYBRID, hidden_size=2048, head_dim=128, rotary_dim=64, expert_width=2560)
"""Of 2.46 billion, 0.95 of them met by a token, embedding and head included."""
SHORT = replace(HYBRID, mixers=HYBRID.mixers[:8])
"""Half of the hybrid: its equalities in float32 are computed by plain PyTorch."""
TINY = replace(
    HYBRID, vocabulary_size=512, hidden_size=64, mixers=(LIGHTNING, SOFTMAX), heads=4, key_heads=2, head_dim=32,
    rotary_dim=16, expert_width=64, experts=4,
)  # fmt: skip
SMOLLM2 = read_hf_config({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "hidden_act": "silu", "initializer_range": 0.04,
})  # fmt: skip
"""SmolLM2-135M's sizes; how long its weights travel does not depend on their values."""


@dataclass(frozen=True)
class Row:
    """A line of the table. limit: what is asked of the value. holds: whether it does; None without a limit."""

    item: str
    what: str
    value: str
    limit: str = ""
    holds: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.holds is None else "yes" if self.holds else "NO"
        return f"| {self.item} | {self.what} | {self.value} | {self.limit} | {verdict} |"


@dataclass(frozen=True)
class Setting:
    """Where a part runs: two GPUs, or two gloo ranks with small sizes; rows go to standard output and into a file."""

    device: str
    rows: Path

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def of_rank(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.is_gpu else torch.device("cpu")

    def say(self, row: Row) -> None:
        print(row, flush=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def new_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """With random weights that are the same on any device of a kind."""
    with torch.device(device):
        decoder = Decoder(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            if not name.endswith("router"):  # those are float32 whatever the rest is
                parameter.data = parameter.to(dtype)
    return decoder


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is a file system there: how fast a disk takes checkpoints is not the question."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def on_two_ranks(task: Callable[[int, Setting, Path], None], setting: Setting) -> None:
    """Run a task as rank 0 and 1 in processes of their own, with a folder that both see."""
    with scratch_folder() as scratch:
        mp.spawn(_enter, args=(task, setting, Path(scratch)), nprocs=2)


def _enter(rank: int, task: Callable[[int, Setting, Path], None], setting: Setting, scratch: Path) -> None:
    prepare_process(max(1, len(os.sched_getaffinity(0)) // 2))
    if setting.is_gpu:
        torch.cuda.set_device(rank)
    task(rank, setting, scratch)


def join(rank: int, setting: Setting, scratch: Path, meeting: str, expert_parallel: int = 1) -> Ranks:
    """The two processes as ranks. meeting: a name for each time that they join."""
    settings = RankSettings(rank, 2, f"file://{scratch / meeting}", expert_parallel, timeout_s=300.0)
    return Ranks.join(settings, setting.of_rank(rank))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
