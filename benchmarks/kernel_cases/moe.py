"""The expert layer, router included, beside its grouped products alone and beside plain PyTorch around them.

"products alone" is what the library's grouped products take on rows that lie ready, two forward and four more backward.
The floor is those products at the rate of a large product, or every row and weight moved once, whichever is longer.
Beside our error stand those of exact arithmetic with roundings alone: of what the products read and of the results,
which bfloat16 has in any implementation; and of what the library's products write as well.

N packed tokens, D model width, E experts, K experts a token, F expert width, R = N K rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from cispo.kernels import experts as twin
from cispo.kernels import routing
from cispo.kernels.gpu.expert_rows import sort_rows
from cispo.kernels.gpu.route import route
from cispo.kernels.gpu.router import router_logits
from kernel_cases import Case, Machine

CHECKED_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int
    experts: int
    experts_per_token: int
    width: int
    inner: int

    @property
    def name(self) -> str:
        return f"experts N{self.tokens} E{self.experts} top-{self.experts_per_token} D{self.width} F{self.inner}"

    def leaves(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)

        def leaf(*shape: int, scale: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            made = torch.randn(shape, generator=generator, device="cuda") * scale
            return made.to(dtype).requires_grad_()

        return (
            leaf(tokens, self.width, scale=1.0),
            leaf(self.experts, self.width, scale=self.width**-0.5, dtype=torch.float32),
            leaf(self.experts, 2 * self.inner, self.width, scale=self.width**-0.5),
            leaf(self.experts, self.width, self.inner, scale=self.inner**-0.5),
        )

    def floor_s(self, machine: Machine, has_backward: bool) -> float:
        rows, passes = self.tokens * self.experts_per_token, 3 if has_backward else 1
        operations = passes * 6 * rows * self.width * self.inner
        weights = passes * 3 * self.experts * self.width * self.inner
        moved = 2 * (weights + passes * 2 * self.tokens * self.width)
        return max(operations / machine.products_flops_per_s, moved / machine.copy_bytes_per_s)


def _plain(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, k: int) -> Tensor:
    return twin.swiglu_experts(x, routing.route(routing.router_logits(x, router), k), gate_up, down)


def _products(sizes: Sizes, tensors: tuple[Tensor, ...], has_backward: bool) -> Callable[[], object]:
    x, router, gate_up, down = (tensor.detach() for tensor in tensors)
    ids, _, _ = route(router_logits(x, router), sizes.experts_per_token, True, None, None)
    _, ends = sort_rows(ids, sizes.experts)
    rows = x.repeat_interleave(sizes.experts_per_token, 0)
    hidden = torch.randn(rows.shape[0], sizes.inner, device="cuda").to(torch.bfloat16)
    wide = torch.randn(rows.shape[0], 2 * sizes.inner, device="cuda").to(torch.bfloat16)

    def work() -> None:
        grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        if has_backward:
            grouped_mm(rows, down, offs=ends)
            grouped_mm(rows.t(), hidden, offs=ends)
            grouped_mm(wide, gate_up, offs=ends)
            grouped_mm(wide.t(), rows, offs=ends)

    return work


def _prepare(sizes: Sizes, has_backward: bool) -> Mapping[str, Callable[[], object]]:
    tensors = sizes.leaves(sizes.tokens)
    k, dout = sizes.experts_per_token, torch.randn(sizes.tokens, sizes.width, device="cuda").to(torch.bfloat16)

    def timed(layer: Callable[..., Tensor]) -> Callable[[], object]:
        def forward() -> Tensor:
            with torch.no_grad():
                return layer(*tensors, k)

        return (lambda: torch.autograd.grad(layer(*tensors, k), tensors, dout)) if has_backward else forward

    return {
        "cispo": timed(twin.expert_layer),
        "products alone": _products(sizes, tensors, has_backward),
        "plain PyTorch": timed(_plain),
    }


def _rounded(x: Tensor, *, value: bool, gradient: bool) -> Tensor:
    """x through bfloat16, and what comes back to it."""
    out = x + ((x.bfloat16() - x).detach() if value else 0.0)
    if gradient:
        out.register_hook(lambda coming: coming.bfloat16().double())
    return out


def _in_float64(tensors: list[Tensor], ids_NK: Tensor, *, has_operands: bool, has_products: bool) -> Tensor:
    """Float64 arithmetic; has_operands, has_products: what products read, or write, is rounded to bfloat16."""
    x, router, gate_up, down = tensors
    chosen = torch.softmax(x @ router.t(), -1).gather(1, ids_NK)
    weight = chosen / chosen.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, choice = (ids_NK == expert).nonzero(as_tuple=True)
        read = _rounded(x[token], value=False, gradient=has_products)
        wide = _rounded(read @ gate_up[expert].t(), value=has_products, gradient=has_operands)
        gate, up = wide.chunk(2, -1)
        hidden = _rounded(torch.nn.functional.silu(gate) * up, value=has_operands, gradient=has_products)
        rows = _rounded(hidden @ down[expert].t(), value=has_products, gradient=False)
        out = out.index_add(0, token, weight[token, choice, None] * rows)
    return out


def _relative(ours: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    pairs = zip(ours, exact, strict=True)
    return max(float(((mine.double() - theirs).norm() / theirs.norm()).detach()) for mine, theirs in pairs)


def _error(sizes: Sizes, extra: dict[str, str]) -> float:
    """The largest relative error of the result and of the four gradients, on a few tokens, for the same experts."""
    tensors = sizes.leaves(CHECKED_TOKENS)
    out = twin.expert_layer(*tensors, sizes.experts_per_token)
    dout = torch.randn_like(out)
    ids, _, _ = route(router_logits(*tensors[:2]), sizes.experts_per_token, True, None, None)

    def exact(**roundings: bool) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
        result = _in_float64(leaves, ids, **roundings)
        return result, *torch.autograd.grad(result, leaves, dout.double())

    wanted = exact(has_operands=False, has_products=False)
    for name, has_products in (("operands and results", False), ("all that products read and write", True)):
        found = (x.bfloat16() for x in exact(has_operands=True, has_products=has_products))
        extra[f"error of rounding {name}"] = f"{_relative(found, wanted):.1e}"
    return _relative((out, *torch.autograd.grad(out, tensors, dout)), wanted)


def _case(sizes: Sizes, has_backward: bool, reach_ms: float | None = None) -> Case:
    extra: dict[str, str] = {}
    return Case(
        name=sizes.name + (" forward+backward" if has_backward else " forward"),
        floor_s=lambda machine: sizes.floor_s(machine, has_backward),
        reach_ms=reach_ms,
        prepare=lambda: _prepare(sizes, has_backward),
        error=lambda: _error(sizes, extra),
        error_limit=8.0e-3,
        extra=extra,
    )


COARSE = Sizes(tokens=16_384, experts=32, experts_per_token=2, width=2048, inner=1408)
FINE = Sizes(tokens=16_384, experts=256, experts_per_token=8, width=2048, inner=512)
CASES: list[Case] = [_case(sizes, has_backward) for sizes in (COARSE, FINE) for has_backward in (False, True)]
