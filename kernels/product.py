"""The matrix product of every linear layer: a row's bits do not depend on how many rows come with it.

Libraries pick another kernel for one to three rows; rows padded to a multiple of 4 avoid that on every processor
measured, together with the settings of cispo.model.arithmetic.
"""

import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 4


def product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """x W^T for x [N, K] and W [M, K], both of one dtype; [N, M]. Differentiable in both."""
    rows = x_NK.shape[0]
    spare = -rows % ROW_MULTIPLE
    if spare:
        return (F.pad(x_NK, (0, 0, 0, spare)) @ weight_MK.t())[:rows]
    return x_NK @ weight_MK.t()
