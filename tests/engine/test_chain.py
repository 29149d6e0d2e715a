"""Multilayer perceptrons as one product: all classes at once against autograd, and against a pass for each class."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoo
from emr_kernels import (
    EffectiveWeightPenalty,
    effective_margins,
    effective_weight_norms,
    effective_weights,
    linearize,
    margins,
)
from emr_kernels.linearize import LinearizedPoint
from emr_kernels.linearize import chain as chains
from emr_kernels.linearize.program import Program
from oracle import double_backward, evaluation_mode

CLASSES = 5


class Normalized(nn.Module):
    """An MLP behind the normalisation of its images, its logits divided by a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3, 0.5]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.7]).view(2, 1, 1))
        self.gain = nn.Parameter(torch.rand(12) + 0.5)
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = ((x - self.mean) / self.std).flatten(1) * self.gain
        logits: Tensor = -self.second(torch.relu(3 - self.first(h))) / 2.5
        return logits


def dense(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def built(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.to(dtype)


CHAINS = {
    "relu": lambda: dense(nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, CLASSES)),
    "one hidden layer": lambda: dense(nn.Linear(12, 65), nn.ReLU(), nn.Linear(65, CLASSES)),
    "leaky relu": lambda: dense(
        nn.Linear(12, 13), nn.LeakyReLU(0.1), nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, CLASSES)
    ),
    "no bias": lambda: dense(nn.Linear(12, 9, bias=False), nn.ReLU(), nn.Linear(9, CLASSES, bias=False)),
    "batch norm": lambda: dense(
        nn.BatchNorm1d(12),
        nn.Linear(12, 9),
        nn.BatchNorm1d(9),
        nn.LeakyReLU(0.2),
        nn.Linear(9, 8),
        nn.ReLU(),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    ),
    "two linear layers at the end": lambda: dense(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, CLASSES)),
    "batch norm of images": lambda: nn.Sequential(
        nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(12, 9), nn.Hardtanh(), nn.Linear(9, CLASSES)
    ),
    "normalized": Normalized,
}
NO_CHAINS = {
    "no relu": lambda: dense(nn.Linear(12, CLASSES)),
    "relu first": lambda: dense(nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
    "relu last": lambda: dense(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, CLASSES), nn.ReLU()),
    "bottleneck": lambda: dense(nn.Linear(12, 2), nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)),
    "silu": lambda: dense(nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, CLASSES)),
    "prelu": lambda: dense(nn.Linear(12, 9), nn.PReLU(), nn.Linear(9, CLASSES)),
    "tokens": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Flatten(), nn.Linear(12, CLASSES)),
}


def data(batch: int = 19, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(batch, 2, 2, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (batch,), generator=generator)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[N, C, *x.shape[1:]] by autograd."""
    with evaluation_mode(model):
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        rows = [torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0] for c in range(logits.shape[1])]
    return torch.stack(rows, 1)


def expected_margins(model: nn.Module, x: Tensor, y: Tensor, order: float) -> Tensor:
    weights = jacobian(model, x).flatten(2)
    with torch.no_grad(), evaluation_mode(model):
        logits = model(x)
    sample = torch.arange(len(y))
    norms = torch.linalg.vector_norm(weights[sample, y][:, None] - weights, order, dim=2)
    return ((logits[sample, y][:, None] - logits) / norms).scatter(1, y[:, None], math.inf).amin(1)


def has_chain(model: nn.Module, x: Tensor) -> bool:
    return linearize(model, x)(x).chain() is not None


@pytest.mark.parametrize("name", CHAINS)
def test_all_classes_at_once(name: str) -> None:
    model, (x, y) = built(CHAINS[name]), data()
    assert has_chain(model, x)
    expected = jacobian(model, x)
    torch.testing.assert_close(effective_weights(model, x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(effective_weights(model, x, [3, 0, 3]), expected[:, [3, 0, 3]], rtol=1e-10, atol=1e-12)
    for order in (1, 2, math.inf):
        norms = torch.linalg.vector_norm(expected.flatten(2), order, dim=2)
        found = effective_weight_norms(model, x, classes=range(CLASSES), ord=order)
        torch.testing.assert_close(found, norms, rtol=1e-10, atol=1e-12)
        found = effective_weight_norms(model, x, direction="all", ord=order)
        torch.testing.assert_close(found, norms.norm(dim=1), rtol=1e-10, atol=1e-12)
        found = effective_margins(model, x, y, ord=order)
        torch.testing.assert_close(found, expected_margins(model, x, y, order), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entry_id", ["mlp", "mlp_batchnorm", "mlp_no_bias"])
def test_zoo(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model, (x, y) = entry.shared(), entry.data(9)
    assert has_chain(model, x)
    torch.testing.assert_close(effective_weights(model, x), jacobian(model, x), rtol=1e-10, atol=1e-12)
    for center in (False, True):
        expected = double_backward(model, x, y, direction="all", center=center, reduction="none").per_sample
        found = effective_weight_norms(model, x, direction="all", center=center)
        torch.testing.assert_close(found, expected.sqrt(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NO_CHAINS)
def test_other_models_go_class_by_class(name: str) -> None:
    model, (x, y) = built(NO_CHAINS[name]), data()
    assert not has_chain(model, x)
    torch.testing.assert_close(effective_weights(model, x), jacobian(model, x), rtol=1e-10, atol=1e-12)
    if name != "relu last":  # of two dead logits neither moves
        torch.testing.assert_close(effective_margins(model, x, y), expected_margins(model, x, y, 2))


@pytest.mark.parametrize("name", ["leaky relu", "batch norm", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = built(CHAINS[name], dtype), data(dtype=dtype)
    assert has_chain(model, x)

    def both() -> list[Tensor]:
        weights = effective_weights(model, x)
        assert weights.dtype == dtype
        norms = effective_weight_norms(model, x, direction="all")
        assert norms.dtype == torch.float32
        return [weights, norms, effective_weight_norms(model, x, direction="all", center=True), 1 / margin_norms()]

    def margin_norms() -> Tensor:
        return effective_margins(model, x, y)

    together = both()
    monkeypatch.setattr(margins, "_LEAST_ROWS", 100)
    monkeypatch.setattr(LinearizedPoint, "chain", lambda _: pytest.fail("the chain was asked for"))
    one_by_one = both()
    # Both round each of a few layers to the dtype, at different places, from the same bits.
    for found, expected in zip(together, one_by_one, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 8 * torch.finfo(dtype).eps


def test_a_single_sample_and_none() -> None:
    model, (x, y) = built(CHAINS["leaky relu"]), data(1)
    assert has_chain(model, x)
    torch.testing.assert_close(effective_weights(model, x), jacobian(model, x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(effective_margins(model, x, y), expected_margins(model, x, y, 2))
    with pytest.raises(ValueError, match=r"\bx\b"):
        effective_weights(model, x[:0])


@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_blocks_give_the_same_numbers(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = built(CHAINS["relu"]), data(21)
    calls = []
    original = chains.ops.masked_chain_sq_norms
    monkeypatch.setattr(
        chains.ops, "masked_chain_sq_norms", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    results = []
    for size in (chains._BLOCK, limit):
        calls.clear()
        monkeypatch.setattr(chains, "_BLOCK", size)
        found = [effective_weight_norms(model, x, direction="all", ord=order) for order in (1, 2)]
        results.append([*found, *(effective_margins(model, x, y, ord=order) for order in (1, 2))])
        assert len(calls) == 2 if size != limit else len(calls) > 4
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_norms_never_write_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = built(CHAINS["relu"]), data()
    penalty = EffectiveWeightPenalty(model, direction="all")
    penalty.prepare(x)
    for name in ("masked_chain", "masked_gemm"):
        monkeypatch.setattr(chains.ops, name, lambda *_, **__: pytest.fail("the effective weights were written"))
    monkeypatch.setattr(Program, "vjp", lambda *_, **__: pytest.fail("a pass for one class"))
    effective_weight_norms(model, x, classes=[1, 2])
    effective_weight_norms(model, x, direction="all")
    effective_margins(model, x, y)
    with torch.no_grad():
        penalty(x)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("layers", [("input",), ("3",), ("input", "3"), ("0",)])
def test_the_penalty_without_gradient(layers: tuple[str, ...], center: bool) -> None:
    model, (x, y) = built(CHAINS["relu"]), data()
    expected = double_backward(model, x, y, direction="all", center=center, layers=layers, reduction="none")
    penalty = EffectiveWeightPenalty(model, direction="all", center=center, layers=layers, reduction="none")
    with torch.no_grad():
        found = penalty(x)
    torch.testing.assert_close(found, expected.per_sample, rtol=1e-10, atol=1e-12)
    assert penalty.last is not None
    for layer in layers:
        norms = penalty.last.effective_weight_norms[layer]
        torch.testing.assert_close(norms, expected.norms[layer], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(penalty(x).detach(), found, rtol=1e-10, atol=1e-12)


def test_classes_with_the_same_weights() -> None:
    """A tie with a class that moves along is on the boundary; a gap to it is never closed."""
    model, (x, y) = built(CHAINS["relu"]), data()
    last = model[5]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight[1:] = last.weight[0]
        last.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    found = effective_margins(model, x, y)
    assert torch.equal(found, torch.where(y < 2, 0.0, -math.inf).double())


def test_the_live_model_is_read() -> None:
    model, (x, _) = built(CHAINS["batch norm"]), data()
    before = effective_weights(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    after = effective_weights(model, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, jacobian(model, x), rtol=1e-10, atol=1e-12)


def test_autocast_goes_class_by_class() -> None:
    model, (x, _) = built(CHAINS["relu"], torch.float32), data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_chain(model, x)
        found, expected = effective_weights(model, x), jacobian(model, x)
    assert found.dtype == torch.float32
    # Both round the same passes to bfloat16, summed in another order.
    assert (found - expected).norm() < 4 * torch.finfo(torch.bfloat16).eps * expected.norm()
