"""EMRLoss inside a training loop: order, modes, state, options over time, and autograd's usual manners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss
from oracle import assert_gradients_match, double_backward, gradients, relative_error


def made(entry_id: str = "mlp_batchnorm", batch: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    entry = zoo.get(entry_id)
    return entry.make(), *entry.data(batch)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "resnet_post_activation", "dropout", "vit"])
def test_total_is_cross_entropy_in_the_own_mode_then_the_penalty(entry_id: str) -> None:
    """The oracle runs the same order: a forward that moves BatchNorm, then the evaluation."""
    model, x, y = made(entry_id)
    twin = copy.deepcopy(model)
    criterion = EMRLoss(model, strength=2.5, temperature=0.8)
    criterion.prepare(x)
    torch.manual_seed(1)
    reference = double_backward(twin, x, y, strength=2.5, temperature=0.8, base_loss=F.cross_entropy)
    torch.manual_seed(1)
    total = criterion(x, y)
    total.backward()
    assert total.shape == () and criterion.engine == "linearized"
    torch.testing.assert_close(total.detach(), reference.value, rtol=1e-11, atol=0)
    assert_gradients_match(model, reference.grads)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry_id", [e.id for e in zoo.ENTRIES if e.engine == "autograd"])
def test_total_of_models_that_fall_back(entry_id: str) -> None:
    """The fallback draws what two forwards draw, in the same order, and drops no gradient."""
    model, x, y = made(entry_id)
    criterion = EMRLoss(model, strength=2.5, temperature=0.8)
    criterion.prepare(x)
    torch.manual_seed(1)
    reference = double_backward(model, x, y, strength=2.5, temperature=0.8, base_loss=F.cross_entropy)
    torch.manual_seed(1)
    total = criterion(x, y)
    total.backward()
    assert criterion.engine == "autograd"
    torch.testing.assert_close(total.detach(), reference.value, rtol=1e-11, atol=0)
    assert_gradients_match(model, reference.grads)


def test_batchnorm_moves_once_by_the_base_loss_and_never_by_the_penalty() -> None:
    model, x, y = made("resnet_post_activation")
    before = snapshot(model)
    EffectiveWeightPenalty(model)(x).backward()
    assert not changed(model, before)
    criterion = EMRLoss(model)
    criterion.prepare(x)
    assert not changed(model, before)
    criterion(x, y).backward()
    tracked = {name: int(t) for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert tracked and set(tracked.values()) == {1}
    assert changed(model, before) == {n for n in before if "running" in n or "num_batches" in n}


def test_evaluation_mode_model_keeps_its_statistics() -> None:
    model, x, y = made()
    model.eval()
    before = snapshot(model)
    EMRLoss(model)(x, y).backward()
    assert not changed(model, before) and not any(m.training for m in model.modules())


def test_modes_are_restored_module_by_module() -> None:
    model, x, y = made("resnet_post_activation")
    for module in list(model.modules())[3::3]:
        module.training = False
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    twin = copy.deepcopy(model)
    reference = double_backward(twin, x, y, strength=3.0, base_loss=F.cross_entropy)
    EMRLoss(model)(x, y).backward()
    assert [module.training for module in model.modules()] == modes
    assert_gradients_match(model, reference.grads)


class Breaks(nn.Module):
    """Works in training mode and raises in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(12, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("broken in evaluation mode")
        return self.bn(self.a(x))


@pytest.mark.filterwarnings("ignore")
def test_modes_are_restored_after_an_exception() -> None:
    model = Breaks().double()
    model.bn.training = False
    x, y = torch.rand(4, 12, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for call in (EMRLoss(model), EffectiveWeightPenalty(model)):
        with pytest.raises((RuntimeError, ValueError), match="broken in evaluation mode"):
            call(x, y)
        assert (model.training, model.a.training, model.bn.training) == (True, True, False)


def test_requires_grad_and_inputs_are_untouched() -> None:
    model, x, y = made("partially_frozen")
    flags = [p.requires_grad for p in model.parameters()]
    kept = x.clone(), y.clone()
    EMRLoss(model)(x, y).backward()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not x.requires_grad and x.grad is None and x.grad_fn is None
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    assert all((p.grad is None) or p.requires_grad for p in model.parameters())


def test_hooks_of_the_user_stay_and_none_are_added() -> None:
    model, x, y = made()
    EMRLoss(model, layers=("input", "4"))(x, y).backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
def test_the_model_is_not_part_of_the_criterion(make: Any) -> None:
    model, x, y = made()
    criterion = make(model)
    criterion(x, y)
    assert not list(criterion.parameters()) and not set(model.modules()) & set(criterion.modules())
    assert all(t.numel() == 1 for t in criterion.state_dict().values() if isinstance(t, Tensor))
    criterion.to(torch.float32)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    criterion.eval()
    assert model.training
    model.eval()
    criterion.train()
    assert not model.training
    assert set(model.state_dict()) == set(zoo.get("mlp_batchnorm").make().state_dict())


def test_random_state_is_left_alone() -> None:
    """Neither preparing nor a deterministic penalty draws from the global generator."""
    model, x, _ = made("act_silu")
    before = torch.get_rng_state()
    EffectiveWeightPenalty(model)(x).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_strength_follows_a_schedule() -> None:
    model, x, y = made("act_silu")
    model.eval()
    criterion = EMRLoss(model, strength=3.0, temperature=1.0)
    base = F.cross_entropy(model(x), y)
    penalty = double_backward(model, x, temperature=1.0).value
    for strength in (3.0, 0.3, 0.0, 10):
        criterion.strength = strength
        model.zero_grad()
        total = criterion(x, y)
        total.backward()
        torch.testing.assert_close(total, base + strength * penalty)
        reference = double_backward(model, x, y, temperature=1.0, strength=strength, base_loss=F.cross_entropy)
        assert_gradients_match(model, reference.grads)


def test_terms_of_the_last_call() -> None:
    model, x, y = made("mlp_batchnorm")
    model.eval()
    layers = ("input", "2", "4")
    criterion = EMRLoss(model, strength=2.0, temperature=0.7, layers=layers)
    total = criterion(x, y)
    reference = double_backward(model, x, temperature=0.7, layers=layers)
    last = criterion.last
    torch.testing.assert_close(last.base_loss, F.cross_entropy(model(x), y).detach())
    assert last.cross_entropy is last.base_loss
    torch.testing.assert_close(last.penalty, reference.value)
    torch.testing.assert_close(last.total, total.detach())
    torch.testing.assert_close(last.logits, model(x).detach())
    assert list(last.effective_weight_norms) == list(layers)
    for name in layers:
        torch.testing.assert_close(last.effective_weight_norms[name], reference.norms[name])
    tensors = [last.base_loss, last.penalty, last.total, last.logits, *last.effective_weight_norms.values()]
    assert not any(t.requires_grad for t in tensors)
    assert last.base_loss.shape == last.penalty.shape == last.total.shape == ()


def test_last_holds_the_logits_of_the_training_forward() -> None:
    model, x, y = made("mlp_batchnorm")
    twin = copy.deepcopy(model)
    criterion = EMRLoss(model)
    criterion(x, y)
    torch.testing.assert_close(criterion.last.logits, twin(x).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_base_loss_of_the_user(reduction: str) -> None:
    def smoothed(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=0.1, reduction=reduction)

    model, x, y = made("act_silu")
    model.eval()
    reference = double_backward(model, x, y, strength=3.0, base_loss=smoothed)
    total = EMRLoss(model, base_loss=smoothed)(x, y)
    total.backward()
    torch.testing.assert_close(total.detach(), reference.value)
    assert_gradients_match(model, reference.grads)


def test_nominal_batch_size() -> None:
    model, x, _ = made(batch=4)
    own, nominal = EffectiveWeightPenalty(model)(x), EffectiveWeightPenalty(model, batch_size=16)(x)
    torch.testing.assert_close(nominal * 4, own)
    mean = EffectiveWeightPenalty(model, reduction="mean", batch_size=16)(x)
    torch.testing.assert_close(mean, own * 4)


def test_gradient_accumulation() -> None:
    model, x, y = made("act_silu", batch=8)
    model.eval()
    reference = double_backward(model, x, y, strength=3.0, base_loss=F.cross_entropy)
    criterion = EMRLoss(model, batch_size=8)
    for part in range(4):
        chunk = slice(2 * part, 2 * part + 2)
        (criterion(x[chunk], y[chunk]) / 4).backward()
    assert_gradients_match(model, reference.grads)


def test_several_calls_before_one_backward() -> None:
    """Two penalties of one criterion alive at once: neither overwrites what the other keeps."""
    model, x, _ = made("act_silu", batch=4)
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    first, second = penalty(x), penalty(x.flip(3) * 0.5)
    (first + 2 * second).backward()
    a = double_backward(model, x, temperature=1.0).grads
    b = double_backward(model, x.flip(3) * 0.5, temperature=1.0).grads
    assert_gradients_match(model, {n: None if a[n] is None else a[n] + 2 * b[n] for n in a})  # type: ignore[operator]


def test_gradient_flows_into_what_made_x() -> None:
    model, x, _ = made("act_silu")
    shift = torch.zeros(3, 6, 6, dtype=torch.float64, requires_grad=True)
    reference = double_backward(model, x, temperature=1.0)
    EffectiveWeightPenalty(model, temperature=1.0)(x + shift).backward()
    assert relative_error(shift.grad, reference.grad_x.sum(0)) < 1e-10


def test_autograd_grad_for_chosen_parameters() -> None:
    model, x, _ = made("act_silu")
    (found,) = torch.autograd.grad(EffectiveWeightPenalty(model)(x), [model.get_parameter("3.weight")])
    assert relative_error(found, double_backward(model, x).grads["3.weight"]) < 1e-10
    assert all(g is None for g in gradients(model).values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients(context: Any) -> None:
    model, x, y = made("wrn_10_2")
    model.eval()
    criterion = EMRLoss(model, temperature=1.0)
    with context():
        total = criterion(x, y)
    reference = double_backward(model, x, y, strength=3.0, temperature=1.0, base_loss=F.cross_entropy)
    assert not total.requires_grad and total.grad_fn is None
    torch.testing.assert_close(total.clone(), reference.value)
    criterion(x, y).backward()
    assert_gradients_match(model, reference.grads)


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_work_is_that_of_the_linear_passes() -> None:
    """In forwards, for a ReLU net: two without gradients (forward, vjp), four with (jvp, weights)."""
    model, x, _ = made("preact_resnet18_narrow", batch=3)
    penalty = EffectiveWeightPenalty(model)
    penalty.prepare(x)
    penalty(x)
    x.requires_grad_()
    forward = flops(lambda: model(x.detach()))
    with torch.no_grad():
        evaluation = flops(lambda: penalty(x))
    assert forward < evaluation <= 2.02 * forward
    assert 3 * forward < flops(lambda: penalty(x.detach()).backward()) <= 4.05 * forward


def test_backward_twice() -> None:
    model, x, y = made("act_silu")
    total = EMRLoss(model)(x, y)
    total.backward(retain_graph=True)
    once = {name: g.clone() for name, g in gradients(model).items() if g is not None}
    total.backward()
    for name, g in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * g, rtol=1e-13, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("entry_id", ["act_silu", "mlp_batchnorm"])
@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
def test_differentiating_twice_is_an_error(make: Any, entry_id: str) -> None:
    model, x, y = made(entry_id)
    weight = next(p for p in model.parameters() if p.dim() > 1)

    def second_derivative() -> None:
        (g,) = torch.autograd.grad(make(model)(x, y), [weight], create_graph=True)
        torch.autograd.grad(g.square().sum(), [weight])

    with pytest.raises(RuntimeError):
        second_derivative()


def test_inplace_change_of_a_weight_between_forward_and_backward_is_noticed_or_harmless() -> None:
    """A gradient from the old weights, or autograd's own error; never a mixture of old and new."""
    model, x, _ = made("act_silu")
    reference = double_backward(model, x)
    value = EffectiveWeightPenalty(model)(x)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(1.5)
    try:
        value.backward()
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        assert_gradients_match(model, reference.grads)


def test_float64_as_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4))
    x, y = torch.rand(3, 6), torch.tensor([0, 3, 1])
    reference = double_backward(model, x, y, strength=3.0, base_loss=F.cross_entropy)
    EMRLoss(model)(x, y).backward()
    assert_gradients_match(model, reference.grads)


def test_engine_before_and_after_preparing() -> None:
    model, x, _ = made()
    criterion = EMRLoss(model)
    assert criterion.engine == "unprepared"
    criterion.prepare(x)
    assert criterion.engine == "linearized" and criterion.engine_reason is None
    assert all(g is None for g in gradients(model).values())
