"""Policy folders: `config.json` and safetensors in MiniMax-M1's own names, read and written.

One map serves both ways: every Hugging Face tensor is a view into one of our parameters, so saving reads the views and
loading writes them. What this decoder fuses (q, k, v and gate; gate and up of all experts) is slices of it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cispo.errors import CheckpointError
from cispo.model.config import LIGHTNING, ModelConfig
from cispo.model.decoder import Decoder
from cispo.model.weight_files import WEIGHTS_NAME, missing_weights, weight_files

CONFIG_NAME = "config.json"
SHOWN_MISTAKES = 3

_DERIVED_SUFFIXES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Constants that transformers stores beside the weights; they follow from the configuration."""


def named_views(decoder: Decoder) -> dict[str, Tensor]:
    """Every tensor of the policy by its Hugging Face name, as views into the decoder's parameters."""
    config = decoder.config
    views = {"model.embed_tokens.weight": decoder.embedding.data, "model.norm.weight": decoder.final_norm.data}
    if not config.tie_embeddings:
        views["lm_head.weight"] = decoder.head.data
    parameters = {name: parameter.data for name, parameter in decoder.named_parameters()}
    for index, mixer in enumerate(config.mixers):
        layer = {
            name.removeprefix(f"layers.{index}."): tensor
            for name, tensor in parameters.items()
            if name.startswith(f"layers.{index}.")
        }
        prefix = f"model.layers.{index}."
        views[prefix + "input_layernorm.weight"] = layer["mixer_norm"]
        views[prefix + "post_attention_layernorm.weight"] = layer["expert_norm"]
        mixer_views = _lightning_views(layer) if mixer == LIGHTNING else _softmax_views(layer, config)
        views.update({f"{prefix}self_attn.{name}.weight": view for name, view in mixer_views.items()})
        views.update({f"{prefix}block_sparse_moe.{n}.weight": view for n, view in _expert_views(layer, config).items()})
    return views


def _lightning_views(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    fused = layer["mixer.qkv_gate"]
    qkv, gate = fused.split([fused.shape[0] // 4 * 3, fused.shape[0] // 4])
    return {"qkv_proj": qkv, "output_gate": gate, "norm": layer["mixer.norm"], "out_proj": layer["mixer.out"]}


def _softmax_views(layer: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    rows = [heads * config.head_dim for heads in (config.heads, config.key_heads, config.key_heads)]
    q, k, v = layer["mixer.qkv"].split(rows)
    return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": layer["mixer.out"]}


def _expert_views(layer: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    views = {"gate": layer["experts.router"]}
    for expert in range(config.experts):
        gate, up = layer["experts.gate_up"][expert].split([config.expert_width] * 2)
        views |= {f"experts.{expert}.w1": gate, f"experts.{expert}.w3": up}
        views[f"experts.{expert}.w2"] = layer["experts.down"][expert]
    return views


def read_config(path: Path) -> ModelConfig:
    """The configuration of a policy folder; CheckpointError when it is missing or is no JSON object."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_NAME}; name a policy folder in Hugging Face layout")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore it from its source") from error
    return ModelConfig.from_hf_config(config)


def _weight_files(path: Path) -> list[Path]:
    missing = missing_weights(path)
    if missing:
        raise CheckpointError(
            f"{path} has no weights ({', '.join(missing[:3])} missing); train them with `cispo sft` or copy them there"
        )
    return weight_files(path)


def check_weights(path: Path) -> None:
    """Whether the weights of a policy folder fit its `config.json`, from the files' headers alone.

    Raises CheckpointError that names missing, extra and misshapen tensors, or the file that cannot be read.
    """
    with torch.device("meta"):
        decoder = Decoder(read_config(path))
    _refuse_misfits(named_views(decoder), path)


def load_tensors(decoder: Decoder, path: Path) -> None:
    """Copy the weights of a policy folder into the decoder, one tensor at a time; errors as of `check_weights`."""
    views = named_views(decoder)
    _refuse_misfits(views, path)
    for file in _weight_files(path):
        with _opened(file) as tensors:
            for name in _stored_names(tensors):
                views[name].copy_(tensors.get_tensor(name))


def _refuse_misfits(views: Mapping[str, Tensor], path: Path) -> None:
    mistakes: list[str] = []
    seen: set[str] = set()
    for file in _weight_files(path):
        with _opened(file) as tensors:
            for name in _stored_names(tensors):
                seen.add(name)
                if name not in views:
                    mistakes.append(f"unknown tensor {name}")
                    continue
                shape, expected = tensors.get_slice(name).get_shape(), list(views[name].shape)
                if shape != expected:
                    mistakes.append(f"{name} has shape {shape}, not {expected}")
    mistakes += [f"{name} is missing" for name in views if name not in seen]
    if mistakes:
        more = len(mistakes) - SHOWN_MISTAKES
        shown = "; ".join(mistakes[:SHOWN_MISTAKES]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{path} does not fit its {CONFIG_NAME}: {shown}; use the weights of this configuration")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore it from its source") from error


def _stored_names(tensors: Any) -> list[str]:
    return [name for name in tensors.keys() if not name.endswith(_DERIVED_SUFFIXES)]  # noqa: SIM118 - it is no mapping


def _new_decoder(path: Path, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Routers stay float32 whatever the dtype, as MiniMax-M1 stores them."""
    decoder = Decoder(read_config(path)).to(dtype)
    for name, parameter in decoder.named_parameters():
        if name.endswith("experts.router"):
            parameter.data = parameter.data.float()
    return decoder.to(device)


def load_policy(path: Path, *, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """The decoder of a policy folder with its weights, in `dtype` on `device`."""
    decoder = _new_decoder(Path(path), dtype, device)
    load_tensors(decoder, Path(path))
    return decoder


def initialise_policy(path: Path, *, seed: int, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """The decoder that a folder's `config.json` describes, with random weights drawn from `seed`."""
    decoder = _new_decoder(Path(path), dtype, device)
    decoder.initialise(seed)
    return decoder


def save_policy(decoder: Decoder, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in Hugging Face names; `dtype` other than the decoder's rounds."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, view in named_views(decoder).items():
        keeps_float32 = name.endswith("block_sparse_moe.gate.weight")
        tensors[name] = view.detach().to("cpu", view.dtype if dtype is None or keeps_float32 else dtype).contiguous()
    save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
    (path / CONFIG_NAME).write_text(json.dumps(decoder.config.to_hf_config(), indent=2) + "\n", encoding="utf-8")
