"""The state of a run, from which it goes on as if it had not been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emr_training.checkpoint import FORMAT, CheckpointError, load_payload, save_payload
from emr_training.costs import Costs
from emr_training.penalties import LLR, Penalty
from emr_training.training.metrics import EpochMetrics, flat

if TYPE_CHECKING:
    from emr_training.training.loop import Loop

STATE = "state.pt"
#: What a run leaves in its folder beside its configuration.
RUN_FILES = (STATE, "best.pt", "last.pt", "metrics.jsonl", "metrics.csv", "run.json")


def penalty_state(penalty: Penalty) -> dict[str, Any]:
    """What a penalty remembers between steps: the calls it has counted, its own random numbers."""
    inner = getattr(penalty, "penalty", None)
    state: dict[str, Any] = {}
    if isinstance(inner, nn.Module):
        state["calls"] = dict(inner.get_extra_state())
    if isinstance(penalty, LLR) and penalty._generator is not None:
        state["generator"] = penalty._generator.get_state()
    return state


def set_penalty_state(penalty: Penalty, state: dict[str, Any], device: torch.device) -> None:
    """Take up the state of `penalty_state`."""
    inner = getattr(penalty, "penalty", None)
    if isinstance(inner, nn.Module) and "calls" in state:
        inner.set_extra_state(state["calls"])
    if isinstance(penalty, LLR) and "generator" in state:
        penalty._generator = torch.Generator(device)
        penalty._generator.set_state(state["generator"])


def of_all_processes(state: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Each process's own `state`, in the order of their ranks."""
    if world == 1:
        return [state]
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, state)
    return gathered


def capture(loop: Loop) -> dict[str, Any]:
    """The whole state of a run between two steps; all processes take part, as each has random numbers of its own."""
    own: dict[str, Any] = {
        "random": torch.get_rng_state(),
        "starts": loop.starts.get_state(),
        "changes": loop.images.changes.get_state(),
        "penalties": {name: penalty_state(penalty) for name, penalty in loop.penalties.items()},
        "sums": loop.sums,
        "seen": loop.seen,
    }
    if loop.device.type == "cuda":
        own["random_cuda"] = torch.cuda.get_rng_state(loop.device)
    return {
        "config": loop.config.model_dump(mode="json"),
        "epoch": loop.epoch,
        "step": loop.step,
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "precision": loop.fabric.strategy.precision.state_dict(),
        "average": None if loop.average is None else loop.average.state_dict(),
        "order": loop.order.state_dict(),
        "processes": of_all_processes(own, loop.world),
        "seconds": loop.epoch_seconds() if loop.seen else 0.0,
        "history": [metrics.as_dict() for metrics in loop.history],
        "best": None if loop.best is None else loop.best.as_dict(),
        "worse": loop.worse,
        "costs": vars(loop.meter.read()),
    }


def restore(loop: Loop, state: dict[str, Any]) -> None:
    """Put a fresh run into a captured state. Raises CheckpointError for that of a run that was set up otherwise."""
    if len(state["processes"]) != loop.world:
        raise CheckpointError(f"{STATE} is of a run on {len(state['processes'])} devices; expected {loop.world}")
    theirs, ours = (_decisive(config) for config in (state["config"], loop.config.model_dump(mode="json")))
    if changed := [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]:
        name = changed[0]
        raise CheckpointError(
            f"{STATE} is of a run with another configuration: {name} is {ours.get(name)!r} ({len(changed)} such); "
            f"expected {theirs.get(name)!r}, as it was started with"
        )
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.fabric.strategy.precision.load_state_dict(state["precision"])
    if loop.average is not None:
        loop.average.load_state_dict(state["average"])
    loop.order.load_state_dict(state["order"])
    own = state["processes"][loop.rank]
    loop.starts.set_state(own["starts"])
    loop.images.changes.set_state(own["changes"])
    for name, penalty in loop.penalties.items():
        set_penalty_state(penalty, own["penalties"][name], loop.device)
    loop.sums = {name: value.to(loop.device) for name, value in own["sums"].items()}
    loop.seen, loop.seconds = own["seen"], state["seconds"]
    loop.epoch, loop.step, loop.worse = state["epoch"], state["step"], state["worse"]
    loop.history = [EpochMetrics.from_dict(values) for values in state["history"]]
    loop.best = None if state["best"] is None else EpochMetrics.from_dict(state["best"])
    loop.meter.go_on(Costs(**state["costs"]))
    torch.set_rng_state(own["random"])
    if loop.device.type == "cuda" and "random_cuda" in own:
        torch.cuda.set_rng_state(own["random_cuda"], loop.device)


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration by dotted names, without what may change between the parts of a run."""
    trainer = ("epochs", "patience", "checkpoint_steps", "log_steps", "tensorboard", "device")
    free = {"name", "data.root", *(f"trainer.{name}" for name in trainer)}
    return {name: value for name, value in flat(config).items() if name not in free}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state to the run's folder, whole or not at all. Raises CheckpointError when it cannot be written."""
    save_payload(folder / STATE, {"format": FORMAT, "kind": "state", **state})


def load_state(folder: Path) -> dict[str, Any]:
    """The state in the run's folder. Raises FileNotFoundError, or CheckpointError naming the fault and what is left."""
    path = folder / STATE
    try:
        state = load_payload(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no run to resume in {folder}: {STATE} is not there") from None
    except CheckpointError as error:
        left = [name for name in ("best.pt", "last.pt") if (folder / name).is_file()]
        raise CheckpointError(f"{error}; {' and '.join(left) or 'no other checkpoint'} in {folder} left") from None
    if state.get("kind") != "state":
        raise CheckpointError(f"{path} is a model, not the state of a run; expected what training wrote there")
    return state
