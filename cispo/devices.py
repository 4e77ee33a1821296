"""Names of devices and dtypes in recipes, as torch knows them."""

import torch

from cispo.errors import RecipeError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU; RecipeError for `cuda` where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("policy.device is cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]
