import math

import pytest
import torch
from torch import nn

from cispo.errors import CheckpointError
from cispo.optimizer import MasterAdamW


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype))
        self.vector = nn.Parameter(torch.randn(3, generator=generator).to(dtype))
        self.unused = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)


def optimizer(module: nn.Module, weight_decay: float = 0.1) -> MasterAdamW:
    return MasterAdamW(module, betas=(0.9, 0.95), eps=1e-15, weight_decay=weight_decay)


def test_an_update_is_adamw_by_its_formula_and_decay_spares_vectors() -> None:
    module = Small()
    subject = optimizer(module)
    start = {name: p.detach().double() for name, p in module.named_parameters()}
    want = dict(start)
    first, second = ({name: torch.zeros_like(p) for name, p in start.items()} for _ in range(2))
    for t, scale in enumerate((1.0, -3.0, 1e-9), start=1):
        torch.autograd.backward((scale * module.matrix**2).sum() + (scale * module.vector).sum())
        gradient = {"matrix": 2 * scale * want["matrix"], "vector": torch.full((3,), scale).double()}
        subject.collect()
        subject.clip(math.inf)
        subject.update(0.01)
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            decay = 0.01 * 0.1 * want[name] if name == "matrix" else 0.0
            step = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)) ** 0.5 + 1e-15)
            want[name] = want[name] - decay - 0.01 * step
    for name in ("matrix", "vector"):
        torch.testing.assert_close(getattr(module, name).detach().double(), want[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(module.frozen, torch.ones(2))
    assert subject.updates == 3


def test_clipping_scales_the_whole_gradient_and_reports_its_norm() -> None:
    module = Small()
    subject = optimizer(module)
    torch.autograd.backward(3 * module.vector[0] + 4 * module.matrix[0, 0])
    assert float(subject.clip(1.0)) == pytest.approx(5.0)
    assert module.vector.grad is not None and module.matrix.grad is not None
    assert float(module.vector.grad[0]) == pytest.approx(0.6, rel=1e-5)
    assert float(module.matrix.grad[0, 0]) == pytest.approx(0.8, rel=1e-5)
    assert float(subject.clip(100.0)) == pytest.approx(1.0, rel=1e-5)
    assert float(module.vector.grad[0]) == pytest.approx(0.6, rel=1e-5)


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    module = Small(torch.bfloat16)
    subject = optimizer(module)
    # 256 + 1 is 256 in bfloat16, so these would be lost if they were added in it.
    for scale in (256.0, *[1.0] * 8):
        torch.autograd.backward((scale * module.vector).sum())
        subject.collect()
        assert module.vector.grad is None
    assert float(subject.clip(math.inf)) == pytest.approx(264.0 * 3**0.5)


def test_forgotten_gradients_have_no_effect() -> None:
    module, other = Small(), Small()
    subject, clean = optimizer(module), optimizer(other)
    torch.autograd.backward(module.vector.sum())
    subject.forget()
    subject.update(0.1)
    clean.update(0.1)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def update(module: Small, subject: MasterAdamW, scale: float) -> None:
        torch.autograd.backward((scale * module.matrix**2).sum() + (scale * module.vector**3).sum())
        subject.collect()
        subject.clip(1.0)
        subject.update(0.01)

    module, resumed = Small(dtype), Small(dtype)
    subject = optimizer(module)
    update(module, subject, 1.0)
    state = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    update(module, subject, -2.0)
    after = optimizer(resumed)
    after.load_state_dict(state)
    update(resumed, after, -2.0)
    assert after.updates == subject.updates == 2
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(tensor, subject.state_dict()[name]) for name, tensor in after.state_dict().items())


def test_a_state_that_does_not_fit_is_refused() -> None:
    subject = optimizer(Small())
    state = subject.state_dict()
    with pytest.raises(CheckpointError, match="master/vector"):
        subject.load_state_dict({name: tensor for name, tensor in state.items() if name != "master/vector"})
