"""Policy folders: `config.json` and safetensors in the names of their family, read and written.

Reading checks every name and shape against the configuration before it touches a weight, then fills the decoder tensor
by tensor. Writing splits what is too large for one file into shards with an index.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cispo.errors import CheckpointError
from cispo.model.config import ModelConfig
from cispo.model.decoder import Decoder
from cispo.model.families import read_hf_config, write_hf_config
from cispo.model.tensor_names import ROUTER_SUFFIXES, alternatives, is_derived, named_views
from cispo.model.tokenizer import count_ids
from cispo.model.weight_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    StoredTensor,
    missing_weights,
    split_names,
    stored_tensors,
    weight_files,
)

CONFIG_NAME = "config.json"
SHOWN_MISTAKES = 3
SHARD_BYTES = 5_000_000_000

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(path: Path) -> ModelConfig:
    """The configuration of a policy folder; CheckpointError when it is missing or is no JSON object."""
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_NAME}; name a policy folder in Hugging Face layout")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore it from its source") from error
    return read_hf_config(config)


def check_weights(path: Path) -> None:
    """Whether the weights of a policy folder fit its `config.json`, from the files' headers alone.

    Raises CheckpointError that names missing, extra and misshapen tensors, or the file that cannot be read.
    """
    with torch.device("meta"):
        decoder = Decoder(read_config(path))
    _plan(decoder, path)


@torch.no_grad()
def load_tensors(decoder: Decoder, path: Path) -> None:
    """Copy the weights of a policy folder into the decoder, one tensor at a time; errors as of `check_weights`."""
    for stored, view in _plan(decoder, path):
        _read(stored, view)
    # Writes through views are not counted on the parameters, and packed copies of them are kept by that count.
    torch.autograd.graph.increment_version(list(decoder.parameters()))


def _read(stored: StoredTensor, view: Tensor) -> None:
    """Straight into the parameter's memory where that has the file's dtype, else through one tensor of it."""
    dtype = _DTYPES[stored.dtype]
    if stored.start == stored.end:
        return
    is_direct = view.device.type == "cpu" and view.dtype is dtype and view.is_contiguous()
    target = view if is_direct else torch.empty(stored.shape, dtype=dtype)
    stored.read_into(memoryview(target.view(torch.uint8).numpy().data).cast("B"))
    if not is_direct:
        view.copy_(target)


def _plan(decoder: Decoder, path: Path) -> list[tuple[StoredTensor, Tensor]]:
    """Which stored tensor goes where; CheckpointError that names all that do not fit."""
    missing_files = missing_weights(path)
    if missing_files:
        shown = ", ".join(missing_files[:3])
        raise CheckpointError(
            f"{path} has no weights ({shown} missing); train them with `cispo sft` or copy them there"
        )
    views, others = named_views(decoder), alternatives(decoder)
    plan: list[tuple[StoredTensor, Tensor]] = []
    mistakes: list[str] = []
    seen: set[str] = set()
    for stored in (tensor for file in weight_files(path) for tensor in stored_tensors(file)):
        if is_derived(stored.name):
            continue
        view, covered = others.get(stored.name) or (views.get(stored.name), [stored.name])
        if view is None:
            if not (stored.name == "lm_head.weight" and decoder.config.tie_embeddings):
                mistakes.append(f"unknown tensor {stored.name}")
            continue
        mistakes += [f"{name} is there twice" for name in covered if name in seen]
        seen.update(covered)
        mistakes += _misfits(stored, view)
        plan.append((stored, view))
    mistakes += [f"{name} is missing" for name in views if name not in seen]
    if mistakes:
        more = len(mistakes) - SHOWN_MISTAKES
        shown = "; ".join(mistakes[:SHOWN_MISTAKES]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"{path} does not fit its {CONFIG_NAME}: {shown}; use the weights of this configuration")
    return plan


def _misfits(stored: StoredTensor, view: Tensor) -> list[str]:
    expected = tuple(view.shape)
    if stored.shape != expected:
        return [f"{stored.name} has shape {list(stored.shape)}, not {list(expected)}"]
    if stored.dtype not in _DTYPES:
        return [f"{stored.name} is of type {stored.dtype}; this version reads {', '.join(_DTYPES)}"]
    length = math.prod(stored.shape) * _DTYPES[stored.dtype].itemsize
    if stored.end - stored.start != length:
        return [f"{stored.name} takes {stored.end - stored.start} bytes, not {length}"]
    return []


def _new_decoder(path: Path, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Routers stay float32 whatever the dtype, as MiniMax-M1 stores them; ids past the tokenizer's are untrained."""
    with torch.device("meta"):
        decoder = Decoder(read_config(path)).to(dtype)
        for name, parameter in decoder.named_parameters():
            if name.endswith("experts.router"):
                parameter.data = parameter.data.float()
    ids = count_ids(path)
    if ids is not None:
        decoder.trained_ids = min(ids, decoder.config.vocabulary_size)
    return decoder.to_empty(device=device)


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


def save_policy(
    decoder: Decoder, path: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `config.json` and the weights in Hugging Face names; a `dtype` other than the decoder's rounds.

    What does not fit into one file of shard_bytes goes into several, with an index; a tensor is never split.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    views = named_views(decoder)
    dtypes = {
        name: view.dtype if dtype is None or name.endswith(ROUTER_SUFFIXES) else dtype for name, view in views.items()
    }
    shards = split_names({name: view.numel() * dtypes[name].itemsize for name, view in views.items()}, shard_bytes)
    files = [WEIGHTS_NAME]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: views[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = path / INDEX_NAME
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(view.numel() * dtypes[name].itemsize for name, view in views.items())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        # An index of an earlier, sharded policy in this folder would hide the file just written.
        index.unlink(missing_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(write_hf_config(decoder.config), indent=2) + "\n", encoding="utf-8")
