"""Drawing a token from each row of float32 logits on CUDA: the inverse of the distribution function at a number.

    id = the first v with sum_{w <= v} exp(z_w - max z) > u sum_w exp(z_w - max z),  z = logits / temperature

One program a row, in one order of sums, so a row's token does not depend on the rows beside it.

B rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _choose_kernel(logits_BV, uniform_B, temperature_B, ids_B, V, BLOCK: tl.constexpr):
    """A temperature of 0 takes the first of the largest logits. A row with NaN gives some id of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_BV + row * V
    temperature = tl.load(temperature_B + row)
    is_greedy = temperature == 0.0
    divisor = tl.where(is_greedy, 1.0, temperature)
    at = tl.arange(0, BLOCK)
    high = tl.full((), _LOWEST, tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits_V + start + at, mask=at < V - start, other=float("-inf"))
        high = tl.maximum(high, tl.max(tl.div_rn(z, divisor), 0))
    total = tl.full((), 0.0, tl.float64)
    first_high = V
    last_possible = 0
    for start in range(0, V, BLOCK):
        z = tl.load(logits_V + start + at, mask=at < V - start, other=float("-inf"))
        z = tl.div_rn(z, divisor)
        weight = tl.exp(z - high)
        total += tl.sum(weight, 0).to(tl.float64)
        first_high = tl.minimum(first_high, tl.min(tl.where(z == high, start + at, V), 0))
        last_possible = tl.maximum(last_possible, tl.max(tl.where(weight > 0.0, start + at, 0), 0))
    threshold = tl.load(uniform_B + row) * total
    below = tl.full((), 0.0, tl.float64)
    found = V
    for start in range(0, V, BLOCK):
        if found == V:
            z = tl.load(logits_V + start + at, mask=at < V - start, other=float("-inf"))
            weight = tl.exp(tl.div_rn(z, divisor) - high)
            up_to = below + tl.cumsum(weight, 0).to(tl.float64)
            found = tl.min(tl.where((up_to > threshold) & (weight > 0.0), start + at, V), 0)
            below += tl.sum(weight, 0).to(tl.float64)
    # Sums of blocks round another way than running sums: a number next to 1 may pass all of them.
    drawn = tl.where(found < V, found, last_possible)
    chosen = tl.where(is_greedy, tl.where(first_high < V, first_high, 0), drawn)
    tl.store(ids_B + row, chosen.to(tl.int64))


_CHOOSE = Build(
    name="choose",
    kernel=_choose_kernel,
    types={"logits_BV": "*fp32", "uniform_B": "*fp64", "temperature_B": "*fp32", "ids_B": "*i64", "V": "i32"},
    constants={"BLOCK": 8192},
    num_warps=16,
    num_stages=1,
    has_products=False,
)
BUILDS = [_CHOOSE]


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor) -> Tensor:
    """An id a row, int64 [B]. uniform_B: float64 in [0, 1). temperature_B: float32; 0 takes the largest logit."""
    batch, vocabulary = logits_BV.shape
    ids_B = torch.empty(batch, dtype=torch.int64, device=logits_BV.device)
    if batch:
        rows = (logits_BV.contiguous(), uniform_B.contiguous(), temperature_B.contiguous())
        _CHOOSE.launch((batch,), *rows, ids_B, vocabulary)
    return ids_B
