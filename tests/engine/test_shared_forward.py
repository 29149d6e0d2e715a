"""One forward for the loss on the logits and the penalty: the same gradients, only where it is the same function."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from emr_kernels import EMRLoss
from oracle import VANISHING
from zoo import ENTRIES, Entry
from zoo.entry import CLASSES, Lambda

OPTIONS: dict[str, Any] = {"strength": 2.0, "temperature": 0.7}


def cnn(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.GELU(),
        *extra,
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.rand(5, 3, 8, 8).to(dtype), torch.arange(5) % CLASSES


def ready(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    model(torch.rand(2, 3, 8, 8))
    return model.to(dtype)


def step(criterion: EMRLoss, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of x and of every parameter."""
    criterion.model.zero_grad()
    leaf = x.clone().requires_grad_()
    loss = criterion(leaf, y)
    loss.backward()
    tensors = [leaf, *criterion.model.parameters()]
    return loss.detach(), [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]


def assert_equal_gradients(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(float(g.norm()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), VANISHING * largest)


@pytest.mark.device
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.engine == "linearized"], ids=lambda entry: entry.id)
@pytest.mark.filterwarnings("ignore")
def test_zoo(entry: Entry) -> None:
    model = entry.make()
    for module in model.modules():
        module.training = False
    x, y = entry.data()
    torch.manual_seed(3)
    apart = step(EMRLoss(model, share_forward=False, **OPTIONS), x, y)
    torch.manual_seed(3)
    criterion = EMRLoss(model, **OPTIONS)
    together = step(criterion, x, y)
    assert criterion.last is not None
    if not criterion.last.shared_forward:
        assert entry.id in {"call_counter"} or any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    # PyTorch's hardsigmoid rounds its slope of 1/6 to float32 in the backward, whatever the dtype.
    tolerance = 1e-7 if "hardsigmoid" in entry.id else entry.tolerance
    torch.testing.assert_close(together[0], apart[0], rtol=tolerance, atol=0)
    assert_equal_gradients(together[1], apart[1], tolerance)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("extra", "shares"),
    [
        ([], True),
        ([nn.Dropout(0.0)], True),
        ([nn.Dropout(0.5)], False),
        ([nn.BatchNorm2d(5)], False),
        ([nn.BatchNorm2d(5).eval()], True),
        ([nn.BatchNorm2d(5, track_running_stats=False)], True),
        ([nn.GroupNorm(1, 5)], True),
        ([Branch()], False),
        ([Branch().eval()], True),
        ([Counter()], False),
        ([Lambda(lambda h: F.dropout(h, 0.5, True))], False),
    ],
    ids=[
        "plain",
        "dropout-0",
        "dropout",
        "batchnorm",
        "frozen-batchnorm",
        "batch-statistics",
        "groupnorm",
        "branch",
        "frozen-branch",
        "counter",
        "functional-dropout",
    ],
)
@pytest.mark.filterwarnings("ignore:the effective weight penalty falls back")
def test_training_mode(extra: list[nn.Module], shares: bool) -> None:
    frozen = [m for m in extra if not m.training]
    model = ready(cnn(*extra))
    for module in frozen:
        module.eval()
    x, y = data()
    criterion, apart = EMRLoss(model, **OPTIONS), EMRLoss(model, share_forward=False, **OPTIONS)
    torch.manual_seed(1)
    expected = step(apart, x, y)
    torch.manual_seed(1)
    found = step(criterion, x, y)
    assert criterion.last is not None and criterion.last.shared_forward is shares
    assert apart.last is not None and not apart.last.shared_forward
    assert model.training
    if shares or not any(isinstance(m, nn.BatchNorm2d) for m in extra):
        assert_equal_gradients(found[1], expected[1], 1e-10)


def test_follows_the_mode() -> None:
    model = ready(cnn(nn.Dropout(0.5)))
    criterion = EMRLoss(model)
    seen = []
    for mode in (True, False, True):
        model.train(mode)
        criterion(*data())
        assert criterion.last is not None
        seen.append(criterion.last.shared_forward)
    assert seen == [False, True, False]


def test_hooks_are_run() -> None:
    model = ready(cnn())
    criterion = EMRLoss(model)
    criterion.prepare(data()[0])
    seen: list[int] = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    criterion(*data())
    assert seen and criterion.last is not None and not criterion.last.shared_forward
    handle.remove()
    criterion(*data())
    assert criterion.last.shared_forward


@pytest.mark.parametrize("options", [{"subset": 0.5}, {"every": 2}, {"strength": 0.0}], ids=str)
def test_not_where_the_penalty_is_not_of_the_whole_batch(options: dict[str, Any]) -> None:
    criterion = EMRLoss(ready(cnn()), **options)
    for _ in range(2):
        criterion(*data()).backward()
        assert criterion.last is not None and not criterion.last.shared_forward


def test_not_through_a_wrapper() -> None:
    criterion = EMRLoss(torch.compile(ready(cnn()), backend="eager"))
    criterion(*data())
    assert criterion.last is not None and not criterion.last.shared_forward


@pytest.mark.parametrize(
    "options", [{"direction": "all"}, {"direction": "margin"}, {"center": True}, {"layers": ("input", "2")}], ids=str
)
def test_options(options: dict[str, Any]) -> None:
    model, (x, y) = ready(cnn()), data()
    expected = step(EMRLoss(model, share_forward=False, **OPTIONS, **options), x, y)
    criterion = EMRLoss(model, **OPTIONS, **options)
    found = step(criterion, x, y)
    assert criterion.last is not None and criterion.last.shared_forward
    assert set(criterion.last.effective_weight_norms) == set(options.get("layers", ("input",)))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert_equal_gradients(found[1], expected[1], 1e-10)


def test_a_base_loss_with_parameters_of_its_own() -> None:
    model, (x, y) = ready(cnn()), data()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    criterion = EMRLoss(model, base_loss=lambda logits, target: F.cross_entropy(scale * logits, target))
    criterion(x, y).backward()
    assert criterion.last is not None and criterion.last.shared_forward
    (expected,) = torch.autograd.grad(F.cross_entropy(scale * model(x), y), scale)
    torch.testing.assert_close(scale.grad, expected)


def test_backward_twice_and_changed_parameters() -> None:
    model, (x, y) = ready(cnn()), data()
    criterion = EMRLoss(model)
    loss = criterion(x, y)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    loss.backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = criterion(x, y)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_lets_go_of_the_activations() -> None:
    model, (x, y) = ready(cnn()), data()
    criterion = EMRLoss(model)
    criterion(x, y)
    before = live_bytes()
    loss = criterion(x, y)
    held = live_bytes()
    loss.backward()
    model.zero_grad()
    # The loss is still there, the activations of the first convolution (5 x 6 x 8 x 8 float64) are not.
    assert held - before > 15000
    assert live_bytes() - before < 5000
    assert loss is not None


def live_bytes() -> int:
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_second_derivatives_are_refused() -> None:
    model, (x, y) = ready(cnn()), data()
    grads = torch.autograd.grad(EMRLoss(model)(x, y), list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        sum(g.sum() for g in grads).backward()  # type: ignore[union-attr]


def test_evaluation_without_gradients() -> None:
    model, (x, y) = ready(cnn()), data()
    criterion = EMRLoss(model)
    with torch.no_grad():
        quiet = criterion(x, y)
    torch.testing.assert_close(quiet, criterion(x, y).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, (x, y) = ready(cnn(), torch.float32), data(torch.float32)
    expected = step(EMRLoss(model, share_forward=False, **OPTIONS), x, y)
    criterion = EMRLoss(model, **OPTIONS)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = criterion(x, y)
    # As a GradScaler does; the scale is taken out again below.
    (loss * 1024).backward()
    assert criterion.last is not None and criterion.last.shared_forward
    errors = [
        float((p.grad / 1024 - g).norm() / g.norm())  # type: ignore[operator]
        for p, g in zip(model.parameters(), expected[1][1:], strict=True)
    ]
    # Unit roundoff 4.9e-4 and 3.9e-3, and units that switch; the bounds of the penalty's own autocast test.
    assert sorted(errors)[len(errors) // 2] <= (1e-2 if dtype == torch.float16 else 5e-2)


def test_a_wrong_gradient_is_not_shared() -> None:
    """A model whose own backward is not its forward's derivative falls back, and so shares nothing."""
    entry = next(e for e in ENTRIES if e.engine == "autograd")
    x, y = entry.data()
    criterion = EMRLoss(entry.make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion(x, y).backward()
    assert criterion.last is not None and not criterion.last.shared_forward
    assert zoo.get(entry.id) is entry


def test_bad_option() -> None:
    with pytest.raises(TypeError, match="share_forward is 1; expected True or False"):
        EMRLoss(ready(cnn()), share_forward=1)  # type: ignore[arg-type]
