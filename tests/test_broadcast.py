"""Weights on their way: what arrives is what was sent, and a receipt that differs in anything is refused by name."""

import pickle

import pytest
import torch
from torch import Tensor

from cispo.broadcast import Proof, Weights, pack_weights, verify_receipt, weights_checksum
from cispo.errors import BroadcastError


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.matrix": torch.randn(6, 5, generator=generator).to(torch.bfloat16),
        "router": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "scale": torch.tensor(1.5),
    }


def packed(version: int, tensors: dict[str, Tensor]) -> Weights:
    return pack_weights(Proof(version, weights_checksum(tensors)), tensors.items())


def test_tensors_arrive_bit_for_bit_in_their_own_dtype_and_memory() -> None:
    sent = some_tensors()
    weights = pickle.loads(pickle.dumps(packed(3, sent)))
    arrived = weights.tensors()
    assert list(arrived) == list(sent)
    for name, tensor in sent.items():
        assert arrived[name].dtype is tensor.dtype
        assert torch.equal(arrived[name], tensor)
    assert weights.version == 3
    assert weights.bytes == sum(tensor.numel() * tensor.element_size() for tensor in sent.values())
    arrived["router"].zero_()
    assert weights_checksum(weights.tensors()) == weights.checksum == weights_checksum(sent)


def test_the_checksum_sees_names_values_shapes_and_dtypes_but_not_the_order() -> None:
    tensors = some_tensors()
    checksum = weights_checksum(tensors)
    assert weights_checksum(dict(reversed(tensors.items()))) == checksum
    one_bit = tensors["router"].clone()
    one_bit.view(torch.int32)[1, 2] ^= 1
    others = [
        {**tensors, "router": one_bit},
        {**tensors, "router": tensors["router"].view(4, 3)},
        {**tensors, "router": tensors["router"].view(torch.int32)},
        {("gate" if name == "router" else name): tensor for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if name != "scale"},
        {**tensors, "router": tensors["transposed"].t().view(3, 4), "transposed": tensors["router"].view(4, 3)},
    ]
    sums = [checksum, *map(weights_checksum, others)]
    assert len(set(sums)) == len(sums)


def test_a_receipt_must_agree_in_version_and_checksum() -> None:
    sent = packed(4, some_tensors()).proof
    verify_receipt("rollout:1", sent, 4, sent.checksum)
    for version, checksum in ((3, sent.checksum), (4, "0" * 32)):
        with pytest.raises(BroadcastError, match=f"rollout:1 holds weights version {version} with checksum {checksum}"):
            verify_receipt("rollout:1", sent, version, checksum)
