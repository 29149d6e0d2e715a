"""The training loop, on Lightning Fabric."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from emr_training.attacks.tally import counting
from emr_training.config import ConfigError, RunConfig
from emr_training.costs import Costs
from emr_training.data import Data
from emr_training.penalties import EMR
from emr_training.training.build import make_model
from emr_training.training.loop import Loop
from emr_training.training.metrics import EpochMetrics
from emr_training.training.watch import StopSignal

#: Seconds.
_TO_LET_GO = 0.1
_PRECISIONS: dict[str, Any] = {"32": "32-true", "tf32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class TrainResult:
    """What training leaves.

    model: in evaluation mode; the averaged one where weights are averaged. engine: the EMR penalty's (None without).
    best: the epoch that validation chose (None without validation). stopped: what ended the run before its last epoch,
    if anything did: the name of a signal, or "patience". rank: of this process; the first one is 0.
    """

    model: nn.Module
    history: list[EpochMetrics]
    engine: str | None
    costs: Costs
    best: EpochMetrics | None = None
    stopped: str | None = None
    rank: int = 0

    @property
    def seconds(self) -> float:
        """Wall clock, earlier parts of a resumed run included."""
        return self.costs.seconds


def train(
    config: RunConfig,
    data: Data,
    validation: Data | None,
    classes: int,
    *,
    extra: Data | None = None,
    output: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> TrainResult:
    """Train a model from scratch as `config` says; the same config and data give the same weights on the same device.

    After each epoch the model is validated on `validation`, clean and under PGD, if given. The caller's global random
    state is left as it was. With `output`, that folder holds

        config.yaml               the whole configuration
        metrics.jsonl, .csv       a line an epoch
        best.pt, last.pt          the model that validation prefers, and the last one; see `load_checkpoint`
        state.pt                  what `resume` goes on from; on the CPU with the weights of a run in one piece

    SIGTERM and Ctrl-C end the run after the step that is being made, with its state saved; `stopped` then names the
    signal.

    Args:
        config: the run; of its section `data` only augmentation and extra_fraction are looked at.
        data, validation: images and labels.
        classes: how many.
        extra: further training images, of which each batch takes data.extra_fraction.
        output: folder of the run; None: nothing is written. What another run left there is deleted, unless `resume`.
        resume: go on from output/state.pt.
        on_epoch: called with each epoch's metrics, in the first process.
        on_step: called with (step, steps in all, images of the step), in the first process.

    Raises:
        ConfigError: for what data or devices rule out, before any work: labels that are no class, a device that is not
            there, a batch larger than `data`, or one that does not divide by the number of devices; augmentation of
            what are no images; "16-mixed" or synchronised BatchNorm on CPUs; MAIL's normalised weights, or TRADES's
            nominal batch, where a batch is split unevenly.
        TrainingDiverged: when the loss is no longer finite; names the step, the images and the last good checkpoint.
        CheckpointError: for a state that is damaged or of another run, or that cannot be written.
    """
    trainer = config.trainer
    if resume and output is None:
        raise ConfigError("resume is true without output; expected the folder of the run")
    devices, nodes = _processes(config)
    _check(config, data, extra, classes, devices * nodes)
    fabric = _fabric(config, devices, nodes)
    with ExitStack() as stack:
        stack.enter_context(_seeded(trainer.seed, fabric.device))
        stack.enter_context(_matmul_precision("high" if trainer.precision == "tf32" else None))
        stop = stack.enter_context(StopSignal())
        model = make_model(config, data.x.shape[1:], classes)
        loop = Loop(config, fabric, model, data, validation, classes, extra, output, on_epoch, on_step)
        with counting(loop.meter.tally):
            try:
                loop.prepare(resume)
                stopped = loop.run(stop)
            finally:
                loop.close()
    engines = {p.engine for p in loop.penalties.values() if isinstance(p, EMR)}
    return TrainResult(
        loop.result.eval(),
        loop.history,
        engines.pop() if engines else None,
        loop.meter.read(),
        loop.best,
        stopped,
        fabric.global_rank,
    )


def _processes(config: RunConfig) -> tuple[int, int]:
    """How many on each machine, and machines. Under torchrun as many as that has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return config.trainer.devices, 1
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return devices, int(os.environ["WORLD_SIZE"]) // devices


def _fabric(config: RunConfig, devices: int, nodes: int) -> Fabric:
    """Fabric with its processes running."""
    precision = config.trainer.precision
    fabric = Fabric(
        accelerator=config.trainer.device,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=_PRECISIONS.get(precision, precision),
    )
    fabric.launch()
    if devices * nodes > 1:
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return fabric


def _leave_group() -> None:
    """At the end of a process, so that it does not abort.

    The thread of gloo that ran the last collective lets go of its tensors a little later, and needs the interpreter for
    that; one that is shutting down ends the thread, and with it the process ("terminate called without an active
    exception").
    """
    time.sleep(_TO_LET_GO)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check(config: RunConfig, data: Data, extra: Data | None, classes: int, world: int) -> None:
    """Refuse what only the data and the devices together tell to be impossible."""
    trainer, defense = config.trainer, config.defense
    if trainer.batch_size > len(data):
        raise ConfigError(
            f"trainer.batch_size is {trainer.batch_size}; expected at most {len(data)}, the training images"
        )
    for what, part in (("data", data), ("data.extra", extra)):
        if part is not None and not 0 <= int(part.y.min()) <= int(part.y.max()) < classes:
            found = f"{int(part.y.min())} to {int(part.y.max())}"
            raise ConfigError(f"{what} has labels from {found}; expected 0 to {classes - 1}, the {classes} classes")
    if any(config.data.augmentation.model_dump().values()) and data.x.dim() != 4:
        raise ConfigError(f"data.augmentation is given with images {list(data.x.shape[1:])}; expected [C, H, W]")
    gpus = torch.cuda.device_count()
    if trainer.device == "cuda" and not gpus:
        raise ConfigError("trainer.device is cuda, which this PyTorch does not find here; expected auto or cpu")
    on_cpu = trainer.device == "cpu" or not torch.accelerator.is_available()
    if not on_cpu and gpus and trainer.devices > gpus:
        raise ConfigError(f"trainer.devices is {trainer.devices}; expected at most {gpus}, the GPUs of this machine")
    if on_cpu and trainer.precision == "16-mixed":
        raise ConfigError("trainer.precision is 16-mixed on the CPU; expected 32 or bf16-mixed there")
    if on_cpu and trainer.sync_batchnorm and world > 1:
        raise ConfigError("trainer.sync_batchnorm is true on CPUs; expected false there, as it needs GPUs")
    parts = world * trainer.accumulate
    split = f"{world} devices, {trainer.accumulate} parts each"
    if trainer.batch_size % parts:
        raise ConfigError(f"trainer.batch_size is {trainer.batch_size}; expected a multiple of {parts}: {split}")
    if parts > 1 and defense.mail is not None and defense.mail.normalize:
        raise ConfigError(
            f"defense.mail.normalize is true with {split}; expected one device and trainer.accumulate 1, as the mean "
            "of the weights is the whole batch's"
        )
    short = 0 if trainer.drop_last else len(data) % trainer.batch_size
    if defense.nominal_batch and (short % parts or (parts > 1 and not trainer.drop_last and extra is not None)):
        raise ConfigError(
            f"defense.nominal_batch is true with {split}, into which an epoch's last batch does not divide evenly; "
            "expected trainer.drop_last true, or defense.nominal_batch false"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random state set from `seed` inside, and as it was after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _matmul_precision(precision: str | None) -> Iterator[None]:
    """Products and convolutions of float32 in TF32 inside, if asked for."""
    if precision is None:
        with nullcontext():
            yield
        return
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
