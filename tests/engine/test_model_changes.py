"""Whatever happens to the model after the first call, the next call computes with the model as it then is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss
from oracle import assert_gradients_match, double_backward, gradients


class Net(nn.Module):
    """One of each kind that can change: weights, statistics, plain tensor, buffer, number, module."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.rand(6)
        self.register_buffer("std", 0.5 + torch.rand(6))
        self.a, self.bn, self.b = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.act: nn.Module = nn.LeakyReLU(0.1)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.bn(self.a((x - self.mean.to(x)) / self.std)))) * self.gain


def data() -> Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).double()


def assert_right(penalty: EffectiveWeightPenalty, model: nn.Module, x: Tensor | None = None) -> None:
    x = data() if x is None else x
    reference = double_backward(model, x, temperature=0.7)
    model.zero_grad()
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    torch.testing.assert_close(value.detach(), reference.value, rtol=1e-11, atol=0)
    assert_gradients_match(model, reference.grads)


@torch.no_grad()
def optimizer_like_step(m: Net) -> None:
    for p in m.parameters():
        p.add_(0.1 * torch.randn_like(p))


def load_other_state(m: Net) -> None:
    other = Net().double()
    nn.init.normal_(other.bn.running_mean)  # type: ignore[arg-type]
    m.load_state_dict(other.state_dict())


def load_and_assign(m: Net) -> None:
    m.load_state_dict(Net().double().state_dict(), assign=True)


def replace_data(m: Net) -> None:
    m.a.weight.data = torch.randn(5, 6).double()


def replace_parameter(m: Net) -> None:
    m.b.weight = nn.Parameter(torch.randn(4, 5).double())


def more_classes(m: Net) -> None:
    m.b = nn.Linear(5, 7).double()


def other_width(m: Net) -> None:
    m.a, m.bn, m.b = nn.Linear(6, 9).double(), nn.BatchNorm1d(9).double(), nn.Linear(9, 4).double()


def replace_activation(m: Net) -> None:
    m.act = nn.SiLU()


def insert_module(m: Net) -> None:
    m.act = nn.Sequential(nn.Tanh(), nn.Linear(5, 5).double())


def add_parametrization(m: Net) -> None:
    parametrizations.weight_norm(m.a)


def rebind_attribute(m: Net) -> None:
    m.mean = torch.rand(6)


def change_attribute_in_place(m: Net) -> None:
    m.mean.mul_(0.3)


def change_buffer(m: Net) -> None:
    m.std.mul_(2.0)  # type: ignore[operator]


def replace_buffer(m: Net) -> None:
    m.std = torch.rand(6).double() + 1


def freeze(m: Net) -> None:
    m.a.requires_grad_(False)
    m.bn.weight.requires_grad_(False)


def tie(m: Net) -> None:
    m.act = nn.Sequential(nn.ReLU(), nn.Linear(5, 5).double(), nn.ReLU(), nn.Linear(5, 5).double())
    m.act[3].weight = m.act[1].weight


def move_statistics(m: Net) -> None:
    m.train()
    m(data() * 3)


def remove_statistics(m: Net) -> None:
    m.bn = nn.BatchNorm1d(5, track_running_stats=False).double()


def back_to_evaluation(m: Net) -> None:
    m.eval()


def change_options(m: Net) -> None:
    m.bn.eps = 0.3
    m.act.negative_slope = 0.6  # type: ignore[assignment]


CHANGES: list[Callable[[Net], None]] = [
    optimizer_like_step,
    load_other_state,
    load_and_assign,
    replace_data,
    replace_parameter,
    more_classes,
    other_width,
    replace_activation,
    insert_module,
    add_parametrization,
    rebind_attribute,
    change_attribute_in_place,
    change_buffer,
    replace_buffer,
    freeze,
    tie,
    move_statistics,
    remove_statistics,
    back_to_evaluation,
    change_options,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_after_the_first_call_is_noticed(change: Callable[[Net], None]) -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    change(model)
    assert_right(penalty, model)


def test_unfreezing_after_the_first_call() -> None:
    model = Net().double()
    freeze(model)
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    model.requires_grad_(True)
    assert_right(penalty, model)


def test_refresh_for_what_no_fingerprint_sees() -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    model.gain = 1.5
    penalty.refresh()
    assert_right(penalty, model)


@pytest.mark.parametrize("name", ["a.weight", "bn.weight", "b.weight"])
def test_nan_in_a_weight_shows_in_the_penalty(name: str) -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    assert penalty(data()).isnan()


def test_dtype_round_trip() -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    model.float()
    value = penalty(data().float())
    assert value.dtype == torch.float32
    value.backward()
    assert all(g is None or g.dtype == torch.float32 for g in gradients(model).values())
    model.zero_grad()
    model.double()
    assert_right(penalty, model)


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    result: nn.Module = torch.load(stream, weights_only=False)
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved], ids=lambda f: f.__name__)
def test_copies_of_a_prepared_model(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    assert_right(penalty, model)
    twin = duplicate(model)
    assert set(vars(twin)) == set(vars(Net()))
    if duplicate is not copy.copy:
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.3)
    assert_right(EffectiveWeightPenalty(twin, temperature=0.7), twin)
    assert_right(penalty, model)


def test_a_model_is_freed_with_its_programs() -> None:
    import gc
    import weakref

    model = Net().double()
    penalty = EffectiveWeightPenalty(model)
    penalty(data()).backward()
    alive = weakref.ref(model)
    del model, penalty
    gc.collect()
    assert alive() is None


def test_training_with_an_optimizer_follows_double_backward() -> None:
    """Ten SGD steps with moving BatchNorm statistics give the weights that double backward's loop gives."""
    model, x = Net().double(), data()
    y = torch.tensor([0, 1, 2, 3])
    twin = copy.deepcopy(model)
    criterion = EMRLoss(model, strength=2.0, temperature=0.7)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for _ in range(10):
        optimizers[0].zero_grad()
        criterion(x, y).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        reference = double_backward(twin, x, y, strength=2.0, temperature=0.7, base_loss=F.cross_entropy)
        for name, g in reference.grads.items():
            twin.get_parameter(name).grad = g
        optimizers[1].step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_batch_sizes_in_any_order(first: int) -> None:
    model = Net().double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    for n in (first, 1, 7, 3, 1, 2):
        assert_right(penalty, model, torch.rand(n, 6).double())


def test_other_resolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.SiLU(),
        nn.Conv2d(5, 5, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ).double()
    penalty = EffectiveWeightPenalty(model, temperature=0.7)
    for size in ((8, 8), (11, 9), (8, 8), (9, 11)):
        assert_right(penalty, model, torch.rand(3, 3, *size).double())


def test_two_criteria_share_one_model() -> None:
    entry = zoo.get("mlp_batchnorm")
    model, (x, y) = entry.make(), entry.data()
    a, b = EffectiveWeightPenalty(model), EffectiveWeightPenalty(model, layers=("4",), direction="label")
    a(x).backward()
    model.zero_grad()
    reference = double_backward(model, x, y, layers=("4",), direction="label")
    b(x, y).backward()
    assert_gradients_match(model, reference.grads)
