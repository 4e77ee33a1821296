"""The expert layer's CUDA kernels against their twins in the interpreter; on a GPU against float64, and bit for bit."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cispo.kernels import experts as twin
from cispo.kernels import routing
from cispo.kernels.gpu import experts, router
from cispo.kernels.gpu.expert_products import few_rows_product, few_rows_swiglu
from cispo.kernels.gpu.expert_rows import gather_sum, sort_rows, spread
from cispo.kernels.gpu.route import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def leaves(
    tokens: int, width: int, number: int, inner: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def leaf(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()

    return (
        leaf(tokens, width, scale=1.0),
        leaf(number, width, scale=width**-0.5, dtype=torch.float32),
        leaf(number, 2 * inner, width, scale=width**-0.5),
        leaf(number, width, inner, scale=inner**-0.5),
    )


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, inputs, dout)


def compare(mine: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for left, right in zip(mine, wanted, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)


def relative_error(mine: Tensor, wanted: Tensor) -> float:
    return float(((mine.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize(("tokens", "width", "number"), [(1, 16, 4), (70, 72, 20), (1100, 40, 3)])
def test_router_logits_equal_the_product(tokens: int, width: int, number: int) -> None:
    x, weight, _, _ = leaves(tokens, width, number, 8)
    mine, wanted = router.router_logits(x, weight), routing.router_logits(x, weight)
    compare((mine, *gradients(mine, (x, weight))), (wanted, *gradients(wanted, (x, weight))))


@pytest.mark.parametrize("is_renormalised", [True, False])
@pytest.mark.parametrize("has_threshold", [True, False])
@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize(("tokens", "number", "k"), [(1, 4, 2), (70, 33, 3), (9, 4, 4)])
def test_route_equals_its_twin(
    tokens: int, number: int, k: int, is_given: bool, has_threshold: bool, is_renormalised: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Halves, so that many logits are equal and go by index.
    logits = ((torch.randn(tokens, number, generator=generator) * 3).round() / 2).to(DEVICE).requires_grad_()
    given = torch.argsort(torch.rand(tokens, number, generator=generator))[:, :k].to(DEVICE) if is_given else None
    threshold = torch.rand(tokens, generator=generator).to(DEVICE) * 0.6 if has_threshold else None
    ids, weight, is_kept = route(logits, k, is_renormalised, threshold, given)
    wanted = routing.route(logits, k, is_renormalised=is_renormalised, threshold_N=threshold, given_ids_NK=given)
    assert torch.equal(ids, wanted.expert_ids_NK)
    if wanted.is_kept_NK is None:
        assert is_kept is None
    else:
        assert is_kept is not None
        assert torch.equal(is_kept, wanted.is_kept_NK)
    compare((weight, *gradients(weight, (logits,))), (wanted.weight_NK, *gradients(wanted.weight_NK, (logits,))))


def test_a_given_id_that_is_no_expert_spoils_its_token_alone() -> None:
    logits = torch.zeros(3, 4, device=DEVICE)
    given = torch.tensor([[0, 1], [2, 4], [-1, 3]], device=DEVICE)
    _, weight, _ = route(logits, 2, True, None, given)
    assert weight.isnan().any(1).tolist() == [False, True, True]


@pytest.mark.parametrize(("tokens", "number", "k"), [(1, 4, 2), (50, 5, 2), (700, 20, 3), (300, 40, 8)])
def test_rows_lie_by_expert_and_then_by_token(tokens: int, number: int, k: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # The second expert gets nothing.
    spread_ids = torch.argsort(torch.rand(tokens, number - 1, generator=generator))[:, :k]
    ids = (spread_ids + (spread_ids >= 1)).to(DEVICE)
    row, ends = sort_rows(ids, number)
    order = torch.sort(ids.flatten(), stable=True).indices
    assert torch.equal(row.flatten().long()[order], torch.arange(tokens * k, device=DEVICE))
    assert ends.tolist() == torch.bincount(ids.flatten(), minlength=number).cumsum(0).tolist()


def test_copies_and_sums_equal_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, k, width = 37, 3, 40
    x, weight = torch.randn(tokens, width, generator=generator), torch.rand(tokens, k, generator=generator)
    row = torch.randperm(tokens * k, generator=generator).view(tokens, k)
    x, weight, row = x.to(DEVICE), weight.to(DEVICE), row.to(DEVICE, torch.int32)
    rows, row_weight = spread(x, row, weight)
    assert torch.equal(rows[row.long()], x[:, None].expand(tokens, k, width))
    assert torch.equal(row_weight[row.long()], weight)
    different = torch.randn(tokens * k, width, generator=generator).to(DEVICE)
    torch.testing.assert_close(gather_sum(different, row), different[row.long()].sum(1))
    torch.testing.assert_close(gather_sum(different, row, weight), (different[row.long()] * weight[..., None]).sum(1))


def layers(
    tensors: Sequence[Tensor], k: int, is_renormalised: bool, threshold: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Our layer's result and the twin's."""
    x, weight, gate_up, down = tensors
    mine = experts.expert_layer(*tensors, k, is_renormalised=is_renormalised, threshold_N=threshold, given_ids_NK=given)
    decided = routing.route(
        routing.router_logits(x, weight), k, is_renormalised=is_renormalised, threshold_N=threshold, given_ids_NK=given
    )
    return mine, twin.swiglu_experts(x, decided, gate_up, down)


@pytest.mark.skipif(DEVICE == "cuda", reason="the library's grouped product on a GPU is for bfloat16")
@pytest.mark.parametrize("counts", [[3, 0, 1, 0], [40, 7], [0, 0, 0, 70, 140]])
def test_products_of_few_rows_equal_those_of_each_expert(counts: list[int]) -> None:
    width, inner, number = 72, 40, len(counts)
    _, _, gate_up, down = (tensor.detach() for tensor in leaves(1, width, number, inner))
    rows = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    row_ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    hidden = few_rows_swiglu(rows, gate_up, row_ends)
    out = few_rows_product(hidden, down, row_ends)
    pieces = [x @ weight.t() for x, weight in zip(rows.split(counts), gate_up, strict=True)]
    halves = [piece.chunk(2, dim=1) for piece in pieces]
    wanted = torch.cat([torch.nn.functional.silu(gate) * up for gate, up in halves])
    compare([hidden], [wanted])
    compare([out], [torch.cat([x @ weight.t() for x, weight in zip(wanted.split(counts), down, strict=True)])])


@pytest.mark.parametrize("is_renormalised", [True, False])
@pytest.mark.parametrize("has_threshold", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "number", "inner", "k"), [(1, 16, 4, 8, 2), (70, 48, 20, 40, 3), (150, 32, 3, 520, 1)]
)
def test_the_layer_equals_its_twin_forward_and_backward(
    tokens: int, width: int, number: int, inner: int, k: int, has_threshold: bool, is_renormalised: bool
) -> None:
    tensors = leaves(tokens, width, number, inner)
    threshold = torch.full((tokens,), 0.3) if has_threshold else None
    mine, wanted = layers(tensors, k, is_renormalised, threshold, None)
    compare((mine, *gradients(mine, tensors)), (wanted, *gradients(wanted, tensors)))


@pytest.mark.skipif(DEVICE == "cuda", reason="the library's grouped product on a GPU is for bfloat16")
def test_given_experts_are_taken_and_experts_without_a_token_get_no_gradient() -> None:
    tensors = leaves(30, 16, 6, 24)
    given = torch.tensor([5, 1]).expand(30, 2)
    mine, wanted = layers(tensors, 2, True, None, given)
    found = gradients(mine, tensors)
    compare((mine, *found), (wanted, *gradients(wanted, tensors)))
    assert not found[2][[0, 2, 3, 4]].any()
    assert not found[3][[0, 2, 3, 4]].any()


def test_the_dense_layer_equals_one_expert() -> None:
    x, _, gate_up, down = leaves(70, 48, 1, 40)
    seen: list[Tensor] = []
    inputs = (x, gate_up, down)
    mine = experts.expert_layer(x, None, gate_up, down, 1, observe=lambda ids, entropy: seen.extend((ids, entropy)))
    wanted = experts_of_one(x, gate_up, down)
    compare((mine, *gradients(mine, inputs)), (wanted, *gradients(wanted, inputs)))
    assert seen[0].tolist() == [[0]] * 70
    assert seen[1].tolist() == [0.0] * 70


def experts_of_one(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up[0].t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down[0].t()


def test_what_a_router_decided_is_observed_once() -> None:
    x, weight, gate_up, down = leaves(12, 16, 4, 8, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    threshold = torch.full((12,), 0.45, device=DEVICE)
    seen: list[tuple[Tensor, Tensor]] = []
    experts.expert_layer(
        x, weight, gate_up, down, 2, threshold_N=threshold, observe=lambda ids, entropy: seen.append((ids, entropy))
    )
    logits = routing.router_logits(x, weight).detach()
    wanted = routing.route(logits, 2, threshold_N=threshold)
    assert wanted.is_kept_NK is not None
    assert 12 < int(wanted.is_kept_NK.sum()) < 24
    ((ids, entropy),) = seen
    assert torch.equal(ids, wanted.kept_ids_NK)
    torch.testing.assert_close(entropy, routing.router_entropy(logits))


def test_widths_that_the_grouped_product_cannot_take_are_refused() -> None:
    x, weight, gate_up, down = leaves(4, 12, 2, 8)
    with pytest.raises(ValueError, match="multiples of 8, got 12 and 8"):
        experts.expert_layer(x, weight, gate_up, down, 1)


def in_float64(tensors: Sequence[Tensor], ids: Tensor) -> Tensor:
    x, weight, gate_up, down = tensors
    chosen = torch.softmax(x @ weight.t(), -1).gather(1, ids)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        rows = experts_of_one(x[token], gate_up[expert : expert + 1], down[expert : expert + 1])
        out = out.index_add(0, token, chosen[token, choice, None] * rows)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "width", "number", "inner", "k"),
    [(1500, 1024, 32, 704, 2), (700, 512, 256, 128, 8), (40, 256, 4, 136, 2)],
)
def test_bfloat16_is_close_to_float64_and_repeats(tokens: int, width: int, number: int, inner: int, k: int) -> None:
    tensors = leaves(tokens, width, number, inner, torch.bfloat16)
    out = twin.expert_layer(*tensors, k)
    mine = (out, *gradients(out, tensors))
    ids, _, _ = route(router.router_logits(*tensors[:2]), k, True, None, None)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out_64 = in_float64(exact, ids)
    for found, wanted in zip(mine, (out_64, *gradients(out_64, exact)), strict=True):
        assert relative_error(found, wanted) < 8e-3
    again = twin.expert_layer(*tensors, k)
    assert all(torch.equal(a, b) for a, b in zip(mine, (again, *gradients(again, tensors)), strict=True))


@pytest.mark.gpu
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_training() -> None:
    x, *weights = leaves(700, 1024, 32, 512, torch.bfloat16)
    trained = twin.expert_layer(x, *weights, 2)
    with torch.no_grad():
        for rows in (1, 2, 3, 8, 33, 64, 100):
            assert torch.equal(twin.expert_layer(x[200 : 200 + rows], *weights, 2), trained[200 : 200 + rows])


@pytest.mark.gpu
def test_a_graph_of_the_layer_follows_its_input() -> None:
    x, *weights = (tensor.detach() for tensor in leaves(64, 256, 8, 128, torch.bfloat16))
    with torch.no_grad():
        twin.expert_layer(x, *weights, 2)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = twin.expert_layer(x, *weights, 2)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(out, twin.expert_layer(x, *weights, 2))
