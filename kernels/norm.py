"""RMSNorm (Zhang and Sennrich, NeurIPS 2019) of rows, of a residual sum of rows, and behind a sigmoid gate.

    rms_norm(x) = weight x / sqrt(mean(x^2) + epsilon)

The statistics are float32 whatever the dtype. A row's bits do not depend on the rows beside it. On CUDA, bfloat16 rows
of up to 8192 columns are computed by cispo.kernels.gpu.norm, each in one pass over memory.

N rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import cpu_library, norm_cpu
from cispo.kernels.pointwise import sigmoid


def rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """The norm of each row; [N, D] in x's dtype, which is the weight's too. Differentiable in x and weight."""
    if cpu_library.serves(x_ND, weight_D):
        return norm_cpu.residual_norm(x_ND, None, 1.0, 0.0, weight_D, epsilon)
    if x_ND.is_cuda:
        from cispo.kernels.gpu import norm as gpu

        if gpu.serves(x_ND, weight_D):
            return gpu.residual_norm(x_ND, None, 1.0, 0.0, weight_D, epsilon)
    return F.rms_norm(x_ND, weight_D.shape, weight_D, epsilon)


def residual_norm(
    x_ND: Tensor, mixed_ND: Tensor, alpha: float, beta: float, weight_D: Tensor, epsilon: float
) -> Tensor:
    """rms_norm(alpha x + beta mixed) of operands of one dtype; [N, D]. Differentiable in x, mixed and weight."""
    if cpu_library.serves(x_ND, mixed_ND, weight_D):
        return norm_cpu.residual_norm(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)
    if x_ND.is_cuda:
        from cispo.kernels.gpu import norm as gpu

        if gpu.serves(x_ND, mixed_ND, weight_D):
            return gpu.residual_norm(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)
    return F.rms_norm(alpha * x_ND + beta * mixed_ND, weight_D.shape, weight_D, epsilon)


def sum_and_norm(x_ND: Tensor, mixed_ND: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + mixed and its rms_norm, of operands of one dtype; [N, D] each. Differentiable in x, mixed and weight."""
    if not torch.is_grad_enabled() and cpu_library.serves(x_ND, mixed_ND, weight_D):
        return norm_cpu.sum_and_norm(x_ND, mixed_ND, weight_D, epsilon)
    total_ND = x_ND + mixed_ND
    return total_ND, rms_norm(total_ND, weight_D, epsilon)


def gated_norm(x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """sigmoid(gate) rms_norm(x) of operands of one dtype; [N, D]. Differentiable in x, gate and weight.

    gate_ND: may be some columns of a wider matrix.
    """
    if cpu_library.serves(x_ND, gate_ND, weight_D):
        return norm_cpu.gated_norm(x_ND, gate_ND, weight_D, epsilon)
    if x_ND.is_cuda:
        from cispo.kernels.gpu import norm as gpu

        if gpu.serves(x_ND, gate_ND, weight_D):
            return gpu.gated_norm(x_ND, gate_ND, weight_D, epsilon)
    return sigmoid(gate_ND) * F.rms_norm(x_ND, weight_D.shape, weight_D, epsilon)
