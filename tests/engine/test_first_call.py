"""The first-call check sees what the first batch hides, and leaves the model and the input alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss, effective_margins
from emr_kernels.linearize import verify
from emr_kernels.linearize.program import Program
from oracle import double_backward, relative_error


class StraightThrough(torch.autograd.Function):
    """Rounds forward, passes gradients on as they are."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return grad


class RoundsActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(StraightThrough.apply(self.a(x))))


class RoundsWeights(RoundsActivations):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.linear(x, StraightThrough.apply(self.a.weight))))


class HidesLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.b = [nn.Linear(4, 5)], nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.hidden[0](x)))


def first_batch() -> Tensor:
    return torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:the effective weight penalty falls back")
def test_a_zero_head_does_not_hide_a_custom_backward() -> None:
    model, x = RoundsActivations(), first_batch()
    nn.init.zeros_(model.b.weight)
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    assert penalty(x) == 0
    assert penalty.engine == "autograd"
    nn.init.ones_(model.b.weight)
    model.b.weight.data[0] = -1
    torch.testing.assert_close(penalty(x).detach(), double_backward(model, x, temperature=1.0).value)


@pytest.mark.filterwarnings("ignore:the effective weight penalty falls back")
def test_frozen_parameters_do_not_hide_a_custom_backward() -> None:
    model, x = RoundsWeights().requires_grad_(False), first_batch()
    effective_margins(model, x, torch.zeros(5, dtype=torch.long))
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    penalty(x).backward()
    assert penalty.engine == "autograd"
    assert model.a.weight.grad is not None and model.a.weight.grad.any()


@pytest.mark.filterwarnings("ignore:the effective weight penalty falls back")
def test_a_layer_that_the_model_does_not_register_gets_its_gradient() -> None:
    model = HidesLayer()
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    penalty(first_batch()).backward()
    assert penalty.engine == "autograd"
    grad = model.hidden[0].weight.grad
    assert grad is not None and grad.any()


def test_parameters_come_out_of_the_check_bit_for_bit() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    before = [(p.detach().clone(), p.requires_grad) for p in model.parameters()]
    EffectiveWeightPenalty(model).prepare(first_batch())
    for p, (value, requires_grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.requires_grad == requires_grad


def test_a_model_that_writes_into_its_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = first_batch() - 0.5
    before = x.clone()
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    value = penalty(x)
    assert penalty.engine == "linearized"
    assert torch.equal(x, before)
    twin = nn.Sequential(nn.ReLU(), *model[1:])
    torch.testing.assert_close(value.detach(), double_backward(twin, x, temperature=1.0).value)


def test_an_input_made_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.inference_mode():
        x = first_batch()
    EffectiveWeightPenalty(model)(x).backward()
    assert model[0].weight.grad is not None


def test_the_batch_must_come_first_at_a_layer() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.unflatten(1, (2, 2)).transpose(0, 1)
            return self.head(torch.tanh(self.inner(tokens)).mean(0))

    with pytest.raises(ValueError, match=r"'inner'.*batch"):
        EffectiveWeightPenalty(TokensFirst(), layers=("inner",))(first_batch())


def test_the_model_still_pickles() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    EffectiveWeightPenalty(model)(first_batch())
    assert pickle.loads(pickle.dumps(model))[0].weight.shape == (3, 4)


def test_what_rounding_decides_in_float32_is_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network's gradients differ by percents between two float32 computations that are both right."""
    monkeypatch.setitem(verify._TOLERANCES, torch.float32, (-1.0, -1.0))  # even equal ones differ
    monkeypatch.setitem(verify._TOLERANCES, torch.float64, (1e-10, 0.0))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)), torch.rand(5, 40)
    before = copy.deepcopy(model.state_dict())
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    penalty(x).backward()
    assert penalty.engine == "linearized"
    loss = EMRLoss(model)
    loss(x, torch.zeros(5, dtype=torch.long))
    assert loss.last is not None and loss.last.shared_forward
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.state_dict().items())
    monkeypatch.setitem(verify._TOLERANCES, torch.float64, (0.0, 0.0))
    with pytest.warns(RuntimeWarning, match="falls back"):
        penalty = EffectiveWeightPenalty(copy.deepcopy(model), temperature=1.0)
        penalty(x)
    assert penalty.engine == "autograd"


@pytest.mark.filterwarnings("ignore:the effective weight penalty falls back")
def test_gross_errors_in_float32_are_not_settled_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_in_float32(*arguments, **options):  # type: ignore[no-untyped-def]
        grad, kept = vjp(*arguments, **options)
        return [g if g is None or g.dtype != torch.float32 else 2 * g for g in grad], kept

    vjp = Program.vjp
    monkeypatch.setattr(Program, "vjp", wrong_in_float32)
    penalty = EffectiveWeightPenalty(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    penalty(first_batch())
    assert penalty.engine == "autograd"


FLOAT32 = [entry for entry in zoo.ENTRIES if entry.engine == "linearized" and entry.reference_build is None]


@pytest.mark.device
@pytest.mark.parametrize("entry", FLOAT32, ids=lambda entry: entry.id)
def test_float32_is_as_good_as_double_backward_in_float32(entry: zoo.Entry) -> None:
    """Against float64, at most 10 times the error of plain float32 double backward, or 1e-3."""
    x, y = entry.data()
    exact = double_backward(entry.make(), x, y, temperature=0.7)
    model = entry.make(torch.float32)
    plain = double_backward(model, x.float(), y, temperature=0.7)
    model.zero_grad()
    value = EffectiveWeightPenalty(model, temperature=0.7)(x.float(), y)
    torch.testing.assert_close(value.detach().double(), exact.value, rtol=1e-2, atol=0)
    names = [name for name, grad in exact.grads.items() if grad is not None and grad.any()]
    if not names:  # a frozen model
        return
    value.backward()
    expected = torch.cat([_gradient(exact.grads[n]) for n in names])
    ours = torch.cat([_gradient(model.get_parameter(n).grad) for n in names])
    theirs = torch.cat([_gradient(plain.grads[n]) for n in names])
    assert relative_error(ours, expected) <= max(10 * relative_error(theirs, expected), 1e-3)


def _gradient(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.double().flatten()
