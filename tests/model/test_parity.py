"""Logits and gradients against `transformers`, family by family, on random weights and packed sequences."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
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
