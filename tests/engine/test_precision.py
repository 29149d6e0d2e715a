"""Precisions and memory formats: float32, half models, autocast, GradScaler, channels_last."""

from __future__ import annotations

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss
from oracle import TOLERANCES, assert_gradients_match, double_backward, errors, gradients

MODELS = ["mlp_batchnorm", "wrn_10_2", "densenet", "act_silu", "vit"]
LOW = [torch.float16, torch.bfloat16]


def supports(dtype: torch.dtype) -> bool:
    try:
        F.conv2d(torch.ones(1, 1, 3, 3, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype)).item()
    except RuntimeError:
        return False
    return True


def skip_unsupported(dtype: torch.dtype) -> None:
    if not supports(dtype):
        pytest.skip(f"this CPU build of torch has no {dtype} convolution")


def exact(entry_id: str, batch: int = 8) -> dict[str, Tensor | None]:
    """float64 gradients of the sum at the float32 weights and inputs."""
    entry = zoo.get(entry_id)
    return double_backward(entry.make(), *entry.data(batch), temperature=1.0, reduction="mean").grads


def nonzero(found: dict[str, Tensor | None], reference: dict[str, Tensor | None]) -> list[float]:
    """Relative errors of the parameters whose exact gradient is not zero."""
    return [e for n, e in errors(found, reference).items() if (g := reference[n]) is not None and g.any()]


@pytest.mark.device
@pytest.mark.parametrize("entry_id", [*MODELS, "preact_resnet18_narrow", "small_cnn", "transformer_encoder_layer"])
def test_float32(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model = entry.make(torch.float32)
    x, _ = entry.data(8, torch.float32)
    penalty = EffectiveWeightPenalty(model, temperature=1.0, reduction="mean")
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    assert value.dtype == torch.float32
    assert max(errors(gradients(model), exact(entry_id)).values()) < TOLERANCES[torch.float32]
    assert all(g is None or g.dtype == torch.float32 for g in gradients(model).values())


@pytest.mark.device
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("entry_id", MODELS)
def test_autocast(entry_id: str, dtype: torch.dtype) -> None:
    """Value, penalty terms and gradients in float32, near the exact ones."""
    skip_unsupported(dtype)
    entry = zoo.get(entry_id)
    model = entry.make(torch.float32)
    x, _ = entry.data(8, torch.float32)
    penalty = EffectiveWeightPenalty(model, temperature=1.0, reduction="mean")
    with torch.autocast(zoo.DEVICE.type, dtype=dtype):
        value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    assert value.dtype == torch.float32
    assert all(g is None or g.dtype == torch.float32 for g in gradients(model).values())
    assert median(nonzero(gradients(model), exact(entry_id))) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("entry_id", ["wrn_10_2", "act_silu"])
def test_autocast_runs_convolutions_in_its_dtype(entry_id: str, dtype: torch.dtype) -> None:
    skip_unsupported(dtype)
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[torch.dtype] = set()

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "convolution" in str(func):
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    entry = zoo.get(entry_id)
    model = entry.make(torch.float32)
    x, _ = entry.data(4, torch.float32)
    penalty = EffectiveWeightPenalty(model)
    with torch.autocast(zoo.DEVICE.type, dtype=dtype):
        penalty(x)
        with Convolutions():
            value = penalty(x)
    with Convolutions():
        value.backward()
    assert seen == {dtype}


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("entry_id", MODELS)
def test_float16_with_a_grad_scaler(entry_id: str, scale: float) -> None:
    """The paper's reduction over a large nominal batch, whose seed p/N would underflow float16 by itself."""
    skip_unsupported(torch.float16)
    entry = zoo.get(entry_id)
    model = entry.make(torch.float32)
    x, _ = entry.data(8, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = EffectiveWeightPenalty(model, temperature=1.0, batch_size=4096)
    with torch.autocast("cpu", dtype=torch.float16):
        value = penalty(x)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    found = {n: None if g is None else 4096 * g for n, g in gradients(model).items()}
    assert median(nonzero(found, exact(entry_id))) < TOLERANCES[torch.float16]


def test_the_whole_loss_trains_under_autocast_with_a_grad_scaler() -> None:
    skip_unsupported(torch.float16)
    entry = zoo.get("resnet_post_activation")
    model = entry.make(torch.float32)
    x, y = entry.data(8, torch.float32)
    criterion = EMRLoss(model, temperature=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and scaler.get_scale() == 1024.0


@pytest.mark.device
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("entry_id", MODELS)
def test_low_precision_models(entry_id: str, dtype: torch.dtype) -> None:
    """``.half()`` and ``.bfloat16()`` models: gradients in the model's dtype, twice autocast's bound."""
    skip_unsupported(dtype)
    entry = zoo.get(entry_id)
    model = entry.make(torch.float32).to(dtype)
    twin = entry.make(torch.float32).to(dtype).double()
    x = entry.data(8, dtype)[0]
    reference = double_backward(twin, x.double(), temperature=1.0, reduction="mean").grads
    penalty = EffectiveWeightPenalty(model, temperature=1.0, reduction="mean")
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    assert all(g is None or g.dtype == dtype for g in gradients(model).values())
    assert median(nonzero(gradients(model), reference)) < 2 * TOLERANCES[dtype]


@pytest.mark.device
@pytest.mark.parametrize("layout", ["input", "model", "both"])
@pytest.mark.parametrize("entry_id", ["wrn_10_2", "densenet", "act_silu", "pool_max_overlapping", "squeeze_excite"])
def test_channels_last(entry_id: str, layout: str) -> None:
    entry = zoo.get(entry_id)
    model = entry.make()
    x, y = entry.data()
    reference = double_backward(model, x, y, temperature=1.0)
    if layout != "input":
        model = model.to(memory_format=torch.channels_last)
    if layout != "model":
        x = x.to(memory_format=torch.channels_last)
    EffectiveWeightPenalty(model, temperature=1.0)(x).backward()
    assert_gradients_match(model, reference.grads)


def test_channels_last_survives_the_passes() -> None:
    """With input and model in channels_last no convolution falls back to contiguous activations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    strays: list[str] = []

    class Layouts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "convolution" in str(func):
                for t in args[:3]:
                    ambiguous = not isinstance(t, Tensor) or t.dim() != 4 or min(t.shape[1:]) == 1
                    if not ambiguous and not t.is_contiguous(memory_format=torch.channels_last):
                        strays.append(f"{func} {tuple(t.shape)} {t.stride()}")
            return func(*args, **(kwargs or {}))

    entry = zoo.get("wrn_10_2")
    model = entry.make(torch.float32).to(memory_format=torch.channels_last)
    x = entry.data(4, torch.float32)[0].to(memory_format=torch.channels_last)
    penalty = EffectiveWeightPenalty(model)
    penalty(x)
    with Layouts():
        value = penalty(x)
    with Layouts():
        value.backward()
    assert not strays, strays[:5]


def test_sliced_and_strided_inputs() -> None:
    entry = zoo.get("act_silu")
    model = entry.make()
    x = torch.rand(8, 6, 6, 3, dtype=torch.float64)[1::2].permute(0, 3, 2, 1)
    assert not x.is_contiguous()
    reference = double_backward(model, x.contiguous())
    EffectiveWeightPenalty(model)(x).backward()
    assert_gradients_match(model, reference.grads)


def test_float64_input_statistics_do_not_leak_between_dtypes() -> None:
    """One architecture in two precisions, used in turn."""
    entry = zoo.get("mlp_batchnorm")
    models: dict[torch.dtype, nn.Module] = {d: entry.make(d) for d in (torch.float32, torch.float64)}
    penalties = {d: EffectiveWeightPenalty(m, temperature=1.0, reduction="mean") for d, m in models.items()}
    reference = exact("mlp_batchnorm")
    for dtype in (torch.float32, torch.float64, torch.float32):
        models[dtype].zero_grad()
        penalties[dtype](entry.data(8, dtype)[0]).backward()
        assert max(errors(gradients(models[dtype]), reference).values()) < TOLERANCES[dtype]
