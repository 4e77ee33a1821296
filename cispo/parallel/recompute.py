"""Activation checkpointing: what a sublayer computes is forgotten after its forward and computed again in its backward.

Kept are the rows that go into each sublayer. The recomputation is the same arithmetic, so no bit changes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cispo.model.decoder import Decoder


def checkpoint_activations(decoder: Decoder) -> None:
    """Recompute every token mixer and every channel mixer in its backward. Each by itself, inside of what shards it:
    weights are gathered for a sublayer's backward before its recomputation needs them.
    """
    for layer in decoder.whole_layers:
        for module in (layer.mixer, layer.experts):
            _recompute(module)


def _recompute(module: nn.Module) -> None:
    module.forward = partial(_forward, module.forward)  # of this module alone, not of its class


def _forward(forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # Nothing here draws random numbers, so there is no state of a generator to put back.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
