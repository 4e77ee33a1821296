"""`cispo inspect`: what a model holds and costs at lengths up to a million tokens, as a table and as a plot."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cispo.errors import CheckpointError, CispoError
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.families import read_hf_config
from cispo.model.sizes import PRESETS, generation_flops, parameters, softmax_twin, state_bytes

if TYPE_CHECKING:
    from rich.console import Console

LENGTHS = tuple(1024 << shift for shift in range(11))
BYTES = {"float32": 4, "bfloat16": 2}
KEY_BYTES = BYTES["bfloat16"]
NOTES = (
    "Generation of one completion from an empty prompt; keys and values in bfloat16, states in float32.",
    "`of softmax` is the share of the same model with softmax attention in every layer.",
)


def find_config(name: str) -> ModelConfig:
    """The configuration of a policy folder, a `config.json`, or a preset; CheckpointError when it is none of these."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no {file}; name a policy folder, its config.json, or {', '.join(PRESETS)}")
    try:
        return read_hf_config(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore it from its source") from error


def print_report(name: str, config: ModelConfig, console: "Console") -> None:
    """Parameters and memory, then operations and state by length, beside the same model with softmax everywhere."""
    from rich.table import Table

    counted, twin = parameters(config), softmax_twin(config)
    weights = ", ".join(f"{_size(counted.total * width)} in {dtype}" for dtype, width in BYTES.items())
    for line in (
        f"{name}: {config.family}, {_layers(config)}, hidden size {config.hidden_size:,}",
        f"parameters   {counted.total:,} in all, {counted.active:,} active a token (no embedding, no LM head)",
        f"weights      {weights}",
    ):
        console.print(line, soft_wrap=True)
    table = Table("tokens", "operations", "of softmax", "state", "of softmax", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for length in LENGTHS:
        flops, state = generation_flops(config, length), state_bytes(config, length, key_bytes=KEY_BYTES)
        twin_state = state_bytes(twin, length, key_bytes=KEY_BYTES)
        table.add_row(
            f"{length:,}", f"{flops:.2e}", f"{flops / generation_flops(twin, length):.2f}",
            _size(state), f"{state / twin_state:.2f}",
        )  # fmt: skip
    console.print(table)
    for line in NOTES:
        console.print(line, soft_wrap=True)


def draw_report(name: str, config: ModelConfig, file: Path) -> None:
    """The same figures over length as two panels; the file's ending chooses the format (png, svg, pdf)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CispoError("--plot needs matplotlib, which is not installed; run: pip install 'cispo[plot]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, drawn in ((name, config), ("softmax in every layer", softmax_twin(config))):
        left.plot(LENGTHS, [generation_flops(drawn, length) for length in LENGTHS], label=label)
        states = [state_bytes(drawn, length, key_bytes=KEY_BYTES) / 2**30 for length in LENGTHS]
        right.plot(LENGTHS, states, label=label)
    left.set(title="Operations to generate", xlabel="tokens", ylabel="FLOPs", xscale="log", yscale="log")
    right.set(title="State of one sequence", xlabel="tokens", ylabel="GiB", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise CispoError(f"cannot write the plot {file} ({error}); choose another place or ending") from error


def _layers(config: ModelConfig) -> str:
    lightning, softmax = config.mixers.count(LIGHTNING), config.mixers.count(SOFTMAX)
    dense = len(config.dense_layers)
    experts = f"{config.experts_per_token} of {config.experts} experts a token" if dense < config.layers else "dense"
    mixed = f" ({dense} layers dense)" if 0 < dense < config.layers else ""
    return f"{lightning} lightning and {softmax} softmax layers, {experts}{mixed}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
