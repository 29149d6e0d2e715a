"""How long, how fast and where: optimizer, schedule, trainer and validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from emr_training.config.section import Number, Section


class OptimizerConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw, PyTorch's.")
    learning_rate: float = Field(0.1, gt=0, description="At the schedule's height.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD.")
    nesterov: bool = Field(False, description="SGD.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW.")
    weight_decay: float = Field(5e-4, ge=0, description="Added to the gradient by sgd; decoupled by adamw.")
    decay: Literal["all", "matrices"] = Field(
        "all", description="What decays: all parameters, or those of two or more dimensions (no biases, no BatchNorm)."
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; null: no clipping.")


class ScheduleConfig(Section):
    """The learning rate, set at every step."""

    name: Literal["constant", "piecewise", "cosine", "cyclic"] = Field(
        "cosine", description="cosine: half a cosine to 0; cyclic: a line from 0 up to the height and down to 0."
    )
    milestones: tuple[float, ...] = Field(
        (), description="piecewise: after this many epochs (60: from epoch 61 on) the rate is multiplied by gamma."
    )
    gamma: float = Field(0.1, gt=0, description="piecewise.")
    peak: float = Field(0.5, gt=0, lt=1, description="cyclic: where the height is, as a fraction of training.")
    warmup: float = Field(0.0, ge=0, description="Epochs of a linear rise before the schedule.")


class AverageConfig(Section):
    """The weights that are validated, kept and returned: those trained, or an average of them."""

    name: Literal["none", "ema", "swa"] = Field(
        "none", description="ema: exponential, at every step; swa: the mean of the epochs' ends."
    )
    decay: float = Field(0.995, ge=0, lt=1, description="ema: min(decay, (1 + t) / (10 + t)) after t steps.")
    start: int = Field(
        1, ge=1, description="First epoch (from 1) that counts; before it the weights are those trained."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TrainerConfig(Section):
    """Length, batches, devices, and what is kept."""

    epochs: int = Field(40, ge=1, description="Passes over the training split.")
    batch_size: int = Field(64, ge=1, description="Images an update, on all devices together; EMR's nominal batch.")
    accumulate: int = Field(1, ge=1, description="Parts in which each device runs its share of a batch.")
    drop_last: bool = Field(True, description="Leave out the incomplete batch at an epoch's end.")
    seed: int = Field(0, ge=0, description="Of the split, initial weights, order of batches, augmentation and starts.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    devices: int = Field(1, ge=1, description="How many, each with a process of its own; torchrun decides by itself.")
    precision: Literal["32", "tf32", "bf16-mixed", "16-mixed", "64"] = Field("32", description="Of the training step.")
    channels_last: bool = Field(False, description="Memory format of weights and images.")
    sync_batchnorm: bool = Field(False, description="BatchNorm statistics over all devices (needs GPUs).")
    average: AverageConfig = Field(default_factory=AverageConfig)
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations without a better one; null: never."
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Also keep the state for resuming every so many steps; null: at each epoch's end."
    )
    log_steps: int = Field(50, ge=1, description="Steps between TensorBoard's points.")
    tensorboard: bool = Field(False, description="Write TensorBoard's event files, too.")

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class EvaluationConfig(Section):
    """Validation between epochs, by which the best model is chosen."""

    every: int = Field(1, ge=1, description="Epochs between validations; the last epoch always has one.")
    split: Literal["validation", "test"] = Field(
        "validation", description="test lets the test set choose the model, as some released code does: not to be used."
    )
    select: Literal["robust", "clean"] = Field("robust", description="Whose accuracy decides which model is best.")
    epsilon: Number | None = Field(None, ge=0, description="PGD's radius; null: attack.epsilon.")
    steps: int = Field(10, ge=1, description="PGD's steps.")
    step_size: Number | None = Field(None, gt=0, description="null: 2.5 * epsilon / steps.")
    restarts: int = Field(1, ge=1, description="PGD's restarts.")
    random_start: bool = Field(True, description="PGD starts from a random point.")
    keep: Literal["best", "last"] = Field("best", description="best: any success on the path counts; last: its end.")
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="train attacks in training mode and moves the running statistics, as some released code."
    )
    batch_size: int = Field(1024, ge=1, description="Images at a time.")
