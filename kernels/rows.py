"""Rows of a table by index, bias and head norms: what lies between a decode step's products on CPU.

Each is one call of a CPU kernel for float32 without gradients, and plain PyTorch otherwise, with the same bits.

N rows, R rows of a table, D width, X = (H + 2 K) A columns of a projection: queries of H heads, keys and values of K.
"""

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction
from cispo.kernels.norm import rms_norm

_select_rows = CpuFunction("select_rows", "pppni")
_add_bias = CpuFunction("add_bias", "pppni")
_head_norms = CpuFunction("head_norms", "pppfpniii")


def _is_served(*tensors: Tensor) -> bool:
    return not torch.is_grad_enabled() and cpu_library.serves(*tensors)


def select_rows(table: Tensor, index_N: Tensor) -> Tensor:
    """Rows index_N (int64, each within the table) of a table [R, ...]; [N, ...]."""
    if not (_is_served(table) and table.is_contiguous()):
        return table.index_select(0, index_N)
    out = torch.empty(index_N.shape[0], *table.shape[1:])
    _select_rows(table, index_N.contiguous(), out, index_N.shape[0], table[0].numel())
    return out


def add_bias(x_NX: Tensor, bias_X: Tensor) -> Tensor:
    """x + bias; [N, X]."""
    if not (_is_served(x_NX, bias_X) and x_NX.is_contiguous()):
        return x_NX + bias_X
    out_NX = torch.empty_like(x_NX)
    _add_bias(x_NX, bias_X, out_NX, *x_NX.shape)
    return out_NX


def head_norms(x_NX: Tensor, q_norm_A: Tensor, k_norm_A: Tensor, epsilon: float, heads: int, key_heads: int) -> Tensor:
    """A projection with the RMSNorm of each head of its queries and of its keys; values as they are; [N, X]."""
    if _is_served(x_NX, q_norm_A, k_norm_A) and x_NX.is_contiguous():
        out_NX = torch.empty_like(x_NX)
        sizes = (x_NX.shape[0], heads, key_heads, q_norm_A.numel())
        _head_norms(x_NX, q_norm_A, k_norm_A, epsilon, out_NX, *sizes)
        return out_NX
    q, k, v = x_NX.split([count * q_norm_A.numel() for count in (heads, key_heads, key_heads)], dim=-1)
    return torch.cat((_head_norm(q, q_norm_A, epsilon), _head_norm(k, k_norm_A, epsilon), v), dim=-1)


def _head_norm(x_NX: Tensor, weight_A: Tensor, epsilon: float) -> Tensor:
    return rms_norm(x_NX.reshape(-1, weight_A.numel()), weight_A, epsilon).view(x_NX.shape)
