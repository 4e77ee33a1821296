"""The head's logprobs and gradients on CUDA: the library's products, and three kernels over rows of float32 logits.

    statistics    one program a row, one sweep over V: maximum, sum and sum(p z), hence logprob, entropy and log-sum-exp
    settle        one program a block: the block's share of the loss, and which rows have a coefficient that is not 0
    dlogits       p and target into a row of dlogits, rows of coefficient 0 left out

All dlogits of a span of up to 8192 rows lie in one buffer, so a span is one product for dhidden and one for dweight.
Its float32 logits are made in blocks behind them, in the same buffer: each block takes what is free, so blocks shrink
as dlogits fill it, and the whole takes little more than dlogits alone. After the last block the host asks how many rows
are left (the one wait of a span), and the products run on those.

A row's logprob depends on its logits alone: one kernel, one layout, one order of sums, in learner and sampling. Its
logits depend on its hidden state alone when they come from cispo.kernels.gpu.product, as here and in sampling.

N rows, V vocabulary, D model width, C rows of one block, S rows of one span.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.product import product_into
from cispo.kernels.product import product

SPAN_ROWS = 8192
SPARE_ROWS = 512
"""Rows of dlogits that a span's buffer is larger than its dlogits: what the last blocks of logits have."""
BLOCK_MULTIPLE = 128
SCORE_BYTES = 1 << 30
"""Logits of one block when no gradient is asked for."""

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _statistics_kernel(logits_NV, targets_N, temperature_N, logprob_N, entropy_N, lse_N, V, BLOCK: tl.constexpr):
    """Logprob of the target, entropy and log-sum-exp of one row at its temperature. A target outside V gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_NV + row * V
    temperature = tl.load(temperature_N + row)
    at = tl.arange(0, BLOCK)
    high = tl.full((), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits_V + start + at, mask=at < V - start, other=float("-inf"))
        if temperature != 1.0:
            z = tl.div_rn(z, temperature)
        higher = tl.maximum(high, tl.max(z, 0))
        shift = high - higher
        shrink = tl.exp(shift)
        below = z - higher
        weight = tl.exp(below)
        # A weight of 0, exp(-200) as much as exp(-inf), adds 0.
        moments = (moments + sums * shift) * shrink + weight * tl.maximum(below, -200.0)
        sums = sums * shrink + weight
        high = higher
    total = tl.sum(sums, 0)
    log_total = tl.log(total)
    target = tl.load(targets_N + row)
    z_target = tl.load(logits_V + target, mask=(target >= 0) & (target < V), other=float("nan"))
    if temperature != 1.0:
        z_target = tl.div_rn(z_target, temperature)
    tl.store(logprob_N + row, (z_target - high) - log_total)
    tl.store(entropy_N + row, log_total - tl.sum(moments, 0) / total)
    tl.store(lse_N + row, high + log_total)


@triton.jit(do_not_specialize=["first_row", "C"])
def _settle_kernel(coefficient_C, logprob_C, loss, used, place_C, row_S, first_row, C, BLOCK: tl.constexpr):
    """Subtract the block's share from the loss; give rows with a coefficient the next places, and the others -1.

    used: how many places are taken in the span; first_row: the block's first row in the span. One program.
    """
    taken = tl.load(used)
    share = tl.zeros((), tl.float32)
    at = tl.arange(0, BLOCK)
    for start in range(0, C, BLOCK):
        inside = at < C - start
        coefficient = tl.load(coefficient_C + start + at, mask=inside, other=0.0)
        logprob = tl.load(logprob_C + start + at, mask=inside, other=0.0)
        share += tl.sum(coefficient * logprob, 0)
        is_used = (coefficient != 0.0).to(tl.int32)
        place = taken + tl.cumsum(is_used, 0) - 1
        tl.store(place_C + start + at, tl.where(is_used != 0, place, -1), mask=inside)
        tl.store(row_S + place, (first_row + start + at).to(tl.int64), mask=is_used != 0)
        taken += tl.sum(is_used, 0)
    tl.store(loss, tl.load(loss) - share)
    tl.store(used, taken)


@triton.jit
def _dlogits_kernel(
    logits_CV, targets_C, temperature_C, lse_C, coefficient_C, place_C, dlogits_SV, V, dlogits_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """-coefficient (1[v = target] - p_v) / temperature of some columns of one row, into the row's place."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(place_C + row).to(tl.int64)
    if place < 0:
        return
    temperature = tl.load(temperature_C + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_CV + row * V + at, mask=at < V, other=0.0)
    if temperature != 1.0:
        z = tl.div_rn(z, temperature)
    p = tl.exp(z - tl.load(lse_C + row))
    scale = tl.load(coefficient_C + row) / temperature
    dlogits = tl.where(at == tl.load(targets_C + row), p - 1.0, p) * scale
    tl.store(dlogits_SV + place * dlogits_stride + at, dlogits.to(dlogits_SV.dtype.element_ty), mask=at < V)


_STATISTICS = Build(
    name="head_statistics",
    kernel=_statistics_kernel,
    types={
        "logits_NV": "*fp32", "targets_N": "*i64", "temperature_N": "*fp32", "logprob_N": "*fp32",
        "entropy_N": "*fp32", "lse_N": "*fp32", "V": "i32",
    },
    constants={"BLOCK": 4096},
    num_warps=8,
    num_stages=1,
    has_products=False,
    aligned=("V",),
)  # fmt: skip
_SETTLE = Build(
    name="head_settle",
    kernel=_settle_kernel,
    types={
        "coefficient_C": "*fp32", "logprob_C": "*fp32", "loss": "*fp32", "used": "*i32", "place_C": "*i32",
        "row_S": "*i64", "first_row": "i32", "C": "i32",
    },
    constants={"BLOCK": 1024},
    num_warps=8,
    num_stages=1,
    has_products=False,
)  # fmt: skip
_DLOGITS = Build(
    name="head_dlogits",
    kernel=_dlogits_kernel,
    types={
        "logits_CV": "*fp32", "targets_C": "*i64", "temperature_C": "*fp32", "lse_C": "*fp32",
        "coefficient_C": "*fp32", "place_C": "*i32", "dlogits_SV": "*bf16", "V": "i32", "dlogits_stride": "i32",
    },
    constants={"BLOCK": 4096},
    num_warps=8,
    num_stages=1,
    has_products=False,
    aligned=("V", "dlogits_stride"),
)  # fmt: skip
BUILDS = [_STATISTICS, _SETTLE, _DLOGITS]


_DTYPES = (torch.bfloat16, torch.float32)


def _launch(build: Build, grid: tuple[int, ...], *arguments: Any) -> None:
    build.kernel[grid](*arguments, **build.constants, num_warps=build.num_warps, num_stages=build.num_stages)


def serves(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether these kernels take this head: on CUDA, both in bfloat16 or both in float32."""
    return hidden_ND.is_cuda and hidden_ND.dtype is weight_VD.dtype and hidden_ND.dtype in _DTYPES


def _logits_into(logits_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
    if hidden_ND.dtype is torch.float32:
        logits_NV.copy_(product(hidden_ND, weight_VD))
    else:
        product_into(logits_NV, hidden_ND, weight_VD)


def _statistics(logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor, *out_N: Tensor) -> None:
    """Logprob, entropy and log-sum-exp of contiguous rows."""
    rows, vocabulary = logits_NV.shape
    if rows:
        _launch(_STATISTICS, (rows,), logits_NV, targets_N, temperature_N, *out_N, vocabulary)


def row_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """Log-probability of each target from float32 logits [N, V], with the bits that the learner's pass gives; [N].

    targets_N: int64. temperature_N: float32, > 0, divides each row's logits; None is 1.
    """
    rows = logits_NV.shape[0]
    temperature_N = logits_NV.new_ones(rows) if temperature_N is None else temperature_N.contiguous()
    logprob_N, entropy_N, lse_N = logits_NV.new_empty(3, rows).unbind(0)
    _statistics(logits_NV.contiguous(), targets_N.contiguous(), temperature_N, logprob_N, entropy_N, lse_N)
    return logprob_N


def head_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As cispo.kernels.head_loss.head_logprobs; NaN for a target outside the vocabulary."""
    rows, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    targets_N = targets_N.contiguous()
    temperature_N = hidden_ND.new_full((rows,), temperature, dtype=torch.float32)
    logprob_N, entropy_N, lse_N = hidden_ND.new_empty(3, rows, dtype=torch.float32).unbind(0)
    step = _whole_blocks(SCORE_BYTES // (4 * vocabulary))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        logits_CV = logprob_N.new_empty(logprob_N[block].shape[0], vocabulary)
        _logits_into(logits_CV, hidden_ND[block], weight_VD)
        outputs = (logprob_N[block], entropy_N[block], lse_N[block])
        _statistics(logits_CV, targets_N[block], temperature_N[block], *outputs)
        del logits_CV
    return logprob_N, entropy_N


def _whole_blocks(rows: int) -> int:
    return max(rows // BLOCK_MULTIPLE * BLOCK_MULTIPLE, BLOCK_MULTIPLE)


class _Span:
    """The buffer of a span: dlogits from its front, a block's float32 logits at its end."""

    def __init__(self, rows: int, vocabulary: int, like: Tensor) -> None:
        self.rows, self.vocabulary, self.dtype = rows, vocabulary, like.dtype
        # Rows of dlogits begin at multiples of 16 bytes, as fast products ask.
        self.stride = -(-vocabulary // 8) * 8
        self._row_bytes = self.stride * like.element_size()
        self._buffer = like.new_empty((rows + SPARE_ROWS) * self._row_bytes, dtype=torch.uint8)
        self.row_S = like.new_empty(rows, dtype=torch.int64)
        self.used = like.new_zeros(1, dtype=torch.int32)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The span's rows in order, each block with room for its logits; the room is gone with the next block."""
        start, logits_row = 0, 4 * self.stride
        while start < self.rows:
            room = (self._buffer.numel() - start * self._row_bytes) // (self._row_bytes + logits_row)
            stop = min(self.rows, start + _whole_blocks(room))
            elements = (stop - start) * self.vocabulary
            logits = self._buffer[self._buffer.numel() - (stop - start) * logits_row :].view(torch.float32)[:elements]
            yield slice(start, stop), logits.view(stop - start, self.vocabulary)
            start = stop

    def dlogits(self) -> Tensor:
        """All places, [S, V]; rows lie `stride` apart."""
        whole = self._buffer[: self.rows * self._row_bytes].view(self.dtype)
        return whole.view(self.rows, self.stride)[:, : self.vocabulary]

    def settle(self, first_row: int, coefficient_C: Tensor, logprob_C: Tensor, loss: Tensor) -> Tensor:
        """Take a block's share from the loss; the place of each of its rows, -1 where the coefficient is 0."""
        place_C = torch.empty_like(coefficient_C, dtype=torch.int32)
        outputs = (loss, self.used, place_C, self.row_S)
        _launch(_SETTLE, (1,), coefficient_C, logprob_C, *outputs, first_row, place_C.shape[0])
        return place_C

    def differentiate(self, logits_CV: Tensor, *of_rows_C: Tensor) -> None:
        """Dlogits of a block into its rows' places. of_rows_C: target, temperature, log-sum-exp, coefficient, place."""
        grid = (logits_CV.shape[0], triton.cdiv(self.vocabulary, _DLOGITS.constants["BLOCK"]))
        _launch(_DLOGITS, grid, logits_CV, *of_rows_C, self.dlogits(), self.vocabulary, self.stride)


class _HeadPolicyLoss(torch.autograd.Function):
    """As the twin's: gradients come with the logits, and are only scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        coefficients: Callable[[Tensor, slice], Tensor],
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_ND.shape[0]
        temperature_N = hidden_ND.new_full((rows,), temperature, dtype=torch.float32)
        logprob_N, entropy_N, lse_N = hidden_ND.new_empty(3, rows, dtype=torch.float32).unbind(0)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient = _Gradient(hidden_ND, weight_VD)
        for start, stop in _span_bounds(rows):
            span = _Span(stop - start, weight_VD.shape[0], hidden_ND)
            for block, logits_CV in span.blocks():
                here = slice(start + block.start, start + block.stop)
                inputs = (logits_CV, targets_N[here], temperature_N[here])
                _logits_into(logits_CV, hidden_ND[here], weight_VD)
                _statistics(*inputs, logprob_N[here], entropy_N[here], lse_N[here])
                coefficient_C = coefficients(logprob_N[here], here).to(torch.float32).contiguous()
                place_C = span.settle(block.start, coefficient_C, logprob_N[here], loss)
                span.differentiate(*inputs, lse_N[here], coefficient_C, place_C)
                del logits_CV, inputs
            gradient.add(span, start)
            del span
        ctx.save_for_backward(gradient.dhidden_ND, gradient.dweight())
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        return loss, logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        # One more wait, which spares a pass over both where the loss is the root, as in training.
        if float(gradients[0]) != 1.0:
            dhidden_ND, dweight_VD = dhidden_ND * gradients[0], dweight_VD * gradients[0]
        return dhidden_ND, dweight_VD, None, None, None


def _span_bounds(rows: int) -> Iterator[tuple[int, int]]:
    spans = max(-(-rows // SPAN_ROWS), 1)
    bounds = [rows * index // spans for index in range(spans + 1)]
    return pairwise(bounds)


class _Gradient:
    """Gradients to hidden and weight of one span after the other; dweight adds up in float32 if there are several."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        self._hidden_ND, self._weight_VD = hidden_ND, weight_VD
        self.dhidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
        self._dweight_VD: Tensor | None = None

    def add(self, span: _Span, start: int) -> None:
        used = int(span.used)
        dlogits_SV, row_S = span.dlogits()[:used], span.row_S[:used]
        stop = start + span.rows
        hidden_SD, dhidden_SD = self._hidden_ND[start:stop], self.dhidden_ND[start:stop]
        if used == span.rows:
            torch.mm(dlogits_SV, self._weight_VD, out=dhidden_SD)
        else:
            dhidden_SD.zero_().index_copy_(0, row_S, dlogits_SV @ self._weight_VD)
            hidden_SD = hidden_SD.index_select(0, row_S)
        is_only = span.rows == self._hidden_ND.shape[0]
        self._dweight_VD = _add_product(self._dweight_VD, dlogits_SV.t(), hidden_SD, keep_dtype=is_only)

    def dweight(self) -> Tensor:
        """In the weight's dtype."""
        if self._dweight_VD is None:
            return torch.zeros_like(self._weight_VD)
        return self._dweight_VD.to(self._weight_VD.dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, *, keep_dtype: bool) -> Tensor:
    """total + a b, in total's memory if there is one; in float32 unless the dtype is to be kept."""
    if keep_dtype or a.dtype is torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def head_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    coefficients: Callable[[Tensor, slice], Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cispo.kernels.head_loss.head_policy_loss; loss, logprob_N and entropy_N."""
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _HeadPolicyLoss.apply
    return apply(hidden_ND, weight_VD, targets_N.contiguous(), coefficients, temperature)
