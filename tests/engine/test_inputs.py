"""Bad arguments and inputs: the type of error, the argument's name, its value, and no work done before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_kernels import EffectiveWeightPenalty, EMRLoss
from side_effects import Normalising

EITHER = (ValueError, TypeError)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))


def good() -> tuple[Tensor, Tensor]:
    return torch.rand(3, 6), torch.tensor([0, 3, 1])


OPTIONS: list[tuple[str, Any, Any, str]] = [
    # argument, value, error, what the message must hold beside the argument's name
    ("temperature", 0, ValueError, "0"),
    ("temperature", -2.5, ValueError, "-2.5"),
    ("temperature", math.nan, ValueError, "nan"),
    ("temperature", math.inf, ValueError, "inf"),
    ("temperature", "hot", TypeError, "hot"),
    ("direction", "sideways", ValueError, "sideways"),
    ("direction", None, EITHER, "None"),
    ("reduction", "median", ValueError, "median"),
    ("layers", (), ValueError, r"\(\)|empty"),
    ("layers", (3,), EITHER, "3"),
    ("layers", ("input", "input"), ValueError, "input"),
    ("subset", 0.0, ValueError, "0.0"),
    ("subset", 1.5, ValueError, "1.5"),
    ("subset", -0.1, ValueError, "-0.1"),
    ("subset", math.nan, ValueError, "nan"),
    ("every", 0, ValueError, "0"),
    ("every", 2.5, EITHER, "2.5"),
    ("batch_size", 0, ValueError, "0"),
    ("batch_size", -4, ValueError, "-4"),
    ("batch_size", 1.5, EITHER, "1.5"),
    ("checks", "sometimes", ValueError, "sometimes"),
]


@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
@pytest.mark.parametrize(("argument", "value", "error", "text"), OPTIONS, ids=lambda v: repr(v)[:24])
def test_options(make: Any, argument: str, value: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=rf"(?s){argument}.*({text})"):
        make(net(), **{argument: value})


@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
def test_unknown_layer(make: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"(?s)layers.*'7'.*0"):
        make(model, layers=("input", "7"))(*good())
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type, call-overload]


def test_layer_that_the_forward_never_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match=r"(?s)layers.*idle|idle.*layer"):
        EffectiveWeightPenalty(Net(), layers=("idle",))(*good())


@pytest.mark.parametrize(
    ("value", "error"), [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("3", TypeError)]
)
def test_strength(value: Any, error: Any) -> None:
    with pytest.raises(error, match=rf"(?s)strength.*{value}"):
        EMRLoss(net(), strength=value)


def test_model_and_base_loss_must_be_callable_modules() -> None:
    with pytest.raises(TypeError, match=r"(?s)model.*function"):
        EMRLoss(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"(?s)base_loss.*5"):
        EMRLoss(net(), base_loss=5)  # type: ignore[arg-type]


def with_value(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 2] = value
    return x


BAD_X: list[tuple[str, Callable[[Tensor], Any], Any, str]] = [
    ("features", lambda x: x[:, :5], ValueError, r"5"),
    ("no_batch", lambda x: x[0, 0], ValueError, r"\(\)|0-d|dimension"),
    ("empty", lambda x: x[:0], ValueError, r"0"),
    ("integers", lambda x: (x * 255).long(), TypeError, r"int64"),
    ("complex", lambda x: x.to(torch.complex64), TypeError, r"complex64"),
    ("other_dtype", lambda x: x.double(), TypeError, r"float64"),
    ("device", lambda x: x.to("meta"), ValueError, r"meta"),
    ("nan", lambda x: with_value(x, math.nan), ValueError, r"[Nn]a[Nn]|finite"),
    ("inf", lambda x: with_value(x, math.inf), ValueError, r"inf|finite"),
    ("list", lambda x: x.tolist(), TypeError, r"list"),
    ("numpy", lambda x: x.numpy(), TypeError, r"ndarray"),
]
BAD_Y: list[tuple[str, Callable[[Tensor], Any], Any, str]] = [
    ("too_large", lambda y: y + 1, ValueError, r"4"),
    ("negative", lambda y: y - 1, ValueError, r"-1"),
    ("ignore_index", lambda y: y * 0 - 100, ValueError, r"-100"),
    ("floats", lambda y: y.float(), TypeError, r"float32"),
    ("bools", lambda y: y > 0, TypeError, r"bool"),
    ("short", lambda y: y[:2], ValueError, r"2"),
    ("column", lambda y: y.unsqueeze(1), ValueError, r"1"),
    ("device", lambda y: y.to("meta"), ValueError, r"meta"),
    ("list", lambda y: y.tolist(), TypeError, r"list"),
    ("missing", lambda y: None, EITHER, r"None|y"),
]


def assert_rejected(make: Any, x: Any, y: Any, error: Any, match: str, **options: Any) -> None:
    """Raised with the message, both as the very first call and after good ones, before the model ran."""
    for prepared in (False, True):
        model = net()
        criterion = make(model, **options)
        if prepared:
            criterion(*good())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=match):
            criterion(x, y)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD_X], ids=[b[0] for b in BAD_X])
def test_x(make: Any, change: Callable[[Tensor], Any], error: Any, text: str) -> None:
    x, y = good()
    assert_rejected(make, change(x), y, error, rf"(?s)\bx\b.*({text})")


@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD_Y], ids=[b[0] for b in BAD_Y])
def test_y_of_the_loss(change: Callable[[Tensor], Any], error: Any, text: str) -> None:
    x, y = good()
    assert_rejected(EMRLoss, x, change(y), error, rf"(?s)\by\b.*({text})")


@pytest.mark.parametrize("direction", ["label", "margin"])
@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD_Y], ids=[b[0] for b in BAD_Y])
def test_y_of_the_penalty(change: Callable[[Tensor], Any], error: Any, text: str, direction: str) -> None:
    x, y = good()
    assert_rejected(EffectiveWeightPenalty, x, change(y), error, rf"(?s)\by\b.*({text})", direction=direction)


class Outputs(nn.Module):
    """A linear layer whose output is changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.a(x))


BAD_OUTPUTS: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("vector", lambda z: z[:, 0], r"\b3\b"),
    ("cube", lambda z: z.unsqueeze(2), r"3, 4, 1"),
    ("pooled_batch", lambda z: z.mean(0, keepdim=True), r"1, 4"),
    ("tuple", lambda z: (z, z), "tuple"),
    ("dict", lambda z: {"logits": z}, "dict"),
    ("classes_missing", lambda z: z[:, :0], r"3, 0"),
    ("integers", lambda z: z.argmax(1, keepdim=True), r"int64"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [EMRLoss, EffectiveWeightPenalty])
@pytest.mark.parametrize(("change", "text"), [b[1:] for b in BAD_OUTPUTS], ids=[b[0] for b in BAD_OUTPUTS])
def test_model_output(make: Any, change: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(EITHER, match=rf"(?s)(model|logits).*{text}"):
        make(Outputs(change))(*good())


def test_margin_direction_needs_two_classes() -> None:
    penalty = EffectiveWeightPenalty(nn.Linear(6, 1), direction="margin")
    with pytest.raises(ValueError, match=r"(?s)margin.*1"):
        penalty(torch.rand(3, 6), torch.zeros(3, dtype=torch.long))


def test_base_loss_must_return_a_scalar() -> None:
    criterion = EMRLoss(net(), base_loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(EITHER, match=r"(?s)base_loss.*3"):
        criterion(*good())


@pytest.mark.parametrize("training", [True, False])
def test_models_that_write_into_their_input(training: bool) -> None:
    inner = net().train(training)
    x, y = good()
    given = x.clone()
    models = [Normalising(copy.deepcopy(inner), in_place) for in_place in (True, False)]
    found, expected = (EMRLoss(model, temperature=1.0)(x, y) for model in models)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, given)
