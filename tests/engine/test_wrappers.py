"""Models in wrappers (compiled, DataParallel, DDP, Fabric) and the loss inside a compiled step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss
from oracle import assert_gradients_match, double_backward, errors, gradients


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(entry_id: str, batch: int = 4) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor | None]]:
    """A model, its batch, and the gradients of the whole loss at strength 3 and temperature 0.7."""
    entry = zoo.get(entry_id)
    model = entry.make()
    x, y = entry.data(batch)
    twin = copy.deepcopy(model)
    reference = double_backward(twin, x, y, strength=3.0, temperature=0.7, base_loss=F.cross_entropy)
    return model, x, y, reference.grads


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_compiled_model(entry_id: str, backend: str) -> None:
    model, x, y, expected = made(entry_id)
    criterion = EMRLoss(torch.compile(model, backend=backend), temperature=0.7)  # type: ignore[arg-type]
    criterion(x, y).backward()
    assert criterion.engine == "linearized", criterion.engine_reason
    assert_gradients_match(model, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_compiled_step(entry_id: str, backend: str) -> None:
    """The loss called inside a compiled function, beside other work; three steps, as graphs may change."""
    model, x, y, _ = made(entry_id)
    eager = copy.deepcopy(model)
    criteria = [EMRLoss(m, temperature=0.7) for m in (eager, model)]

    def step(criterion: EMRLoss, inputs: Tensor, labels: Tensor) -> Tensor:
        total: Tensor = criterion(inputs * 0.5 + 0.1, labels)
        return total * 2.0

    compiled = torch.compile(step, backend=backend)
    for n in (4, 4, 3):
        for m, criterion, run in ((eager, criteria[0], step), (model, criteria[1], compiled)):
            m.zero_grad()
            run(criterion, x[:n], y[:n]).backward()
        assert_gradients_match(model, gradients(eager))
    twin = zoo.get(entry_id).make()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    model.eval()
    model.zero_grad()
    compiled(criteria[1], x, y).backward()
    assert_gradients_match(
        model,
        double_backward(
            twin,
            x * 0.5 + 0.1,
            y,
            strength=6.0,
            temperature=0.7,
            base_loss=lambda z, t: 2 * F.cross_entropy(z, t),
        ).grads,
    )


def test_data_parallel() -> None:
    model, x, y, expected = made("resnet_post_activation")
    criterion = EMRLoss(nn.DataParallel(model), temperature=0.7)
    criterion(x, y).backward()
    assert criterion.engine == "linearized", criterion.engine_reason
    assert_gradients_match(model, expected)


def test_layers_are_named_as_in_the_wrapped_or_the_plain_model() -> None:
    model, x, _, _ = made("mlp_batchnorm")
    reference = double_backward(model, x, layers=("4",))
    EffectiveWeightPenalty(nn.DataParallel(model), layers=("4",))(x).backward()
    assert_gradients_match(model, reference.grads)


@pytest.mark.parametrize("wrap", ["model", "model_and_optimizer"])
def test_fabric(wrap: str) -> None:
    fabric_module = pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model, x, y, expected = made("resnet_post_activation")
    if wrap == "model":
        wrapped = fabric.setup_module(model)
    else:
        wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    criterion = EMRLoss(wrapped, temperature=0.7)
    fabric.backward(criterion(x, y))
    assert criterion.engine == "linearized", criterion.engine_reason
    assert_gradients_match(model, expected)


# Every rank takes its part of the batch; evaluation-mode BatchNorm makes the joint batch the reference.
DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
}


def ddp_options(world: int) -> dict[str, dict[str, Any]]:
    return DDP_OPTIONS if world > 1 else {"default": {}}


def ddp_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    outcome: dict[str, Any] = {}
    try:
        entry = zoo.get("norm_group")
        x, y = entry.data(4)
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        for name, options in ddp_options(world).items():
            model = entry.make().eval()
            ddp = DistributedDataParallel(model, **options)
            criterion = EMRLoss(ddp, temperature=0.7, batch_size=4)
            for _ in range(2):
                ddp.zero_grad()
                criterion(x[part], y[part]).backward()
            outcome[name] = {n: None if g is None else g.clone() for n, g in gradients(model).items()}
            outcome[name + ".engine"] = criterion.engine

        model = entry.make().eval()
        ddp = DistributedDataParallel(model)
        penalty = EffectiveWeightPenalty(ddp, temperature=0.7, batch_size=4)
        (F.cross_entropy(ddp(x[part]), y[part]) + 3.0 * penalty(x[part])).backward()
        outcome["own_loss_plus_penalty"] = {n: None if g is None else g.clone() for n, g in gradients(model).items()}
        try:
            penalty(x[part]).backward()
            outcome["penalty_alone"] = "no error"
        except RuntimeError as error:
            outcome["penalty_alone"] = f"RuntimeError: {error}"
    finally:
        torch.save(outcome, f"{folder}/rank{rank}.pt")
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("world", [1, 2])
def test_ddp(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_worker, args=(world, str(tmp_path)), nprocs=world)
    entry = zoo.get("norm_group")
    model = entry.make().eval()
    expected = double_backward(model, *entry.data(4), strength=3.0, temperature=0.7, base_loss=F.cross_entropy).grads
    for rank in range(world):
        outcome = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for name in [*ddp_options(world), "own_loss_plus_penalty"]:
            worst = max(errors(outcome[name], expected).values())
            assert worst < 1e-10, f"rank {rank}, {name}: relative error {worst:.2e}"
        assert all(outcome[name + ".engine"] == "linearized" for name in ddp_options(world))
        if world > 1:
            assert outcome["penalty_alone"].startswith("RuntimeError"), outcome["penalty_alone"]
            assert "synchron" in outcome["penalty_alone"]
