"""Names of devices and dtypes in recipes, as torch knows them."""

import torch

from cispo.errors import RecipeError

_BFLOAT16_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bfloat16 operations a second by the device's name, as its data sheet has them."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU; RecipeError for `cuda` where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("policy.device is cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def own_device(device: torch.device) -> torch.device:
    """With its number, as NCCL needs it: of the CUDA devices that this process sees, the one in use."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def resolve_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a device can do at best in products of this dtype; None where that is not known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    return _BFLOAT16_FLOPS.get(torch.cuda.get_device_name(device))
