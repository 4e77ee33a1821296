"""Logits and gradients against `transformers`, family by family, on random weights and packed sequences."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.router_sums import RouterSums, load_balancing_loss
from cispo.model.routing import RoutingControl
from cispo.model.tensor_names import named_views

LENGTHS = (1, 255, 256, 257, 700)
TOLERANCE = 1e-4
RANDOM_WEIGHTS = 0.2
"""A wide initialiser: with 0.02 all logits are nearly flat and hide errors."""
PEERS = {
    "minimax": "MiniMax", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
}  # fmt: skip


@pytest.fixture(scope="module", params=PEERS)
def models(
    request: pytest.FixtureRequest,
    family_configs: Mapping[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[transformers.PreTrainedModel, Decoder]:
    """The peer with random weights, and this decoder with those that the peer has saved."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    settings = dict(family_configs[family]) | {"initializer_range": RANDOM_WEIGHTS, "max_position_embeddings": 2048}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    theta = settings.pop("rope_theta", None)
    if theta is not None:
        settings["rope_parameters"] = settings.pop("rope_scaling") | {"rope_theta": theta}
    torch.manual_seed(0)
    config = getattr(transformers, f"{PEERS[family]}Config")(**settings)
    peer = getattr(transformers, f"{PEERS[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if parameter.dim() == 1:  # norms and biases, which the peer makes ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    peer.save_pretrained(folder)
    return peer, load_policy(folder, dtype=torch.float32, device="cpu")


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator) for length in LENGTHS]


def logits_of_packed(decoder: Decoder, packed: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [len(ids) for ids in packed]
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return list(decoder.logits(decoder(torch.cat(packed), positions_N, cu_seqlens)).split(lengths))


def test_logits_of_every_length_alone_and_packed(models: tuple[transformers.PreTrainedModel, Decoder]) -> None:
    peer, decoder = models
    with torch.no_grad():
        packed = logits_of_packed(decoder, sequences())
        for ids, ours in zip(sequences(), packed, strict=True):
            expected = peer(ids.unsqueeze(0)).logits[0]
            assert expected.std() > 0.3
            assert (ours - expected).abs().max() <= TOLERANCE
            (alone,) = logits_of_packed(decoder, [ids])
            assert torch.equal(alone, ours)


def test_load_balancing_loss_and_its_gradients(models: tuple[transformers.PreTrainedModel, Decoder]) -> None:
    peer, decoder = models
    if not hasattr(peer.config, "router_aux_loss_coef"):
        with pytest.raises(ValueError, match="no router"):
            RouterSums(decoder.config, for_loss=True)
        return
    ids = sequences()[3]
    peer.zero_grad()
    expected = peer(ids.unsqueeze(0), output_router_logits=True).aux_loss
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters() if parameter.grad is not None}
    sums = RouterSums(decoder.config, for_loss=True)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    decoder(ids, torch.arange(len(ids)), cu_seqlens, rows_M=torch.tensor([5]), routing=RoutingControl(sums=sums))
    rows = len(ids) * len(decoder.config.routed_layers)
    loss = load_balancing_loss(sums.choices_LE.sum(0) / rows, sums.probability_E, rows)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert abs(float(loss.detach()) - decoder.config.experts_per_token) > 1e-3, "the loads are not even"
    parameters = dict(decoder.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    ours = {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
    routers = [name for name in ours if name.endswith("router")]
    assert len(routers) == len(decoder.config.routed_layers)
    for name in routers:
        layer = name.split(".")[1]
        assert (ours[name] - theirs[f"model.layers.{layer}.mlp.gate.weight"]).abs().max() <= TOLERANCE
        assert ours[name].abs().max() > 1e-4
    embedding = theirs["model.embed_tokens.weight"]
    assert embedding.abs().max() > 1e-4, "the loss reaches what lies below the routers"
    assert (ours["embedding"] - embedding).abs().max() <= TOLERANCE * max(1.0, float(embedding.abs().max()))


def test_gradients_of_every_parameter(models: tuple[transformers.PreTrainedModel, Decoder]) -> None:
    peer, decoder = models
    ids = sequences()[3]
    peer.zero_grad()
    decoder.zero_grad()
    weights = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(2)) / len(ids)
    (peer(ids.unsqueeze(0)).logits[0] * weights).sum().backward()
    (logits_of_packed(decoder, [ids])[0] * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in peer.named_parameters() if parameter.grad is not None}
    # The gradients in the checkpoint's names: the same views, of a decoder whose weights are the gradients.
    with torch.no_grad():
        for parameter in decoder.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    ours = named_views(decoder)
    compared = 0
    for name, gradient in expected.items():
        if ".experts." in name or name.endswith(".mlp.gate.weight"):
            continue
        scale = max(1.0, float(gradient.abs().max()))
        assert (ours[name] - gradient).abs().max() <= TOLERANCE * scale, name
        compared += 1
    assert compared >= 4 * 6
    for layer, prefix in ((index, f"model.layers.{index}.mlp.") for index in range(4)):
        fused = {name.removeprefix(prefix): gradient for name, gradient in expected.items() if name.startswith(prefix)}
        if "experts.gate_up_proj" not in fused:
            continue
        own = decoder.layers[layer].experts
        for mine, theirs in (
            (own.gate_up, "experts.gate_up_proj"),
            (own.down, "experts.down_proj"),
            (own.router, "gate.weight"),
        ):
            assert (mine - fused[theirs]).abs().max() <= TOLERANCE * max(1.0, float(fused[theirs].abs().max())), theirs
