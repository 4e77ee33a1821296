"""Policy folders: `config.json` and safetensors in MiniMax-M1's own names, read and written.

One map serves both ways: every Hugging Face tensor is a view into one of our parameters, so saving reads the views and
loading writes them. What this decoder fuses (q, k, v and gate; gate and up of all experts) is slices of it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cispo.errors import CheckpointError
from cispo.model.config import LIGHTNING, ModelConfig
from cispo.model.decoder import Decoder

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

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
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore it from its source") from error
    return ModelConfig.from_hf_config(config)


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS_NAME]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} has no weights ({', '.join(missing[:3])} missing); train them with `cispo sft` or copy them there"
        )
    return [path / name for name in names]


def load_tensors(decoder: Decoder, path: Path) -> None:
    """Copy the weights of a policy folder into the decoder, one tensor at a time.

    Raises CheckpointError that names every missing, extra and misshapen tensor, or the file that cannot be read.
    """
    views = named_views(decoder)
    mistakes: list[str] = []
    seen: set[str] = set()
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    seen.add(name)
                    if name.endswith(_DERIVED_SUFFIXES):
                        continue
                    if name not in views:
                        mistakes.append(f"unknown tensor {name}")
                        continue
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != views[name].shape:
                        mistakes.append(f"{name} has shape {list(tensor.shape)}, not {list(views[name].shape)}")
                    else:
                        views[name].copy_(tensor)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); restore it from its source") from error
    mistakes += [f"{name} is missing" for name in views if name not in seen]
    if mistakes:
        shown = "; ".join(mistakes[:8]) + (f"; and {len(mistakes) - 8} more" if len(mistakes) > 8 else "")
        raise CheckpointError(f"{path} does not fit its {CONFIG_NAME}: {shown}; use the weights of this configuration")


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
