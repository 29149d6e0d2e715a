"""The whole configuration of a run."""

from __future__ import annotations

from pydantic import Field, model_validator

from emr_training.config.inputs import DataConfig, ModelConfig
from emr_training.config.method import AttackConfig, DefenseConfig, PenaltiesConfig
from emr_training.config.optimization import EvaluationConfig, OptimizerConfig, ScheduleConfig, TrainerConfig
from emr_training.config.section import Section


class RunConfig(Section):
    """What `emr train` trains, and how: everything that decides the weights, the seed included."""

    name: str = Field("", description="What to call the run.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    defense: DefenseConfig = Field(default_factory=DefenseConfig)
    attack: AttackConfig = Field(default_factory=AttackConfig)
    penalties: PenaltiesConfig = Field(default_factory=PenaltiesConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        trainer = self.trainer
        if trainer.batch_size % trainer.accumulate:
            raise ValueError(
                f"trainer.batch_size is {trainer.batch_size}; expected a multiple of trainer.accumulate, "
                f"{trainer.accumulate}"
            )
        if trainer.patience is not None and self.evaluation.split == "validation" and not self.data.validation:
            raise ValueError("trainer.patience is given, data.validation is 0; expected images to validate on")
        if self.data.extra_fraction and self.data.extra is None:
            raise ValueError("data.extra_fraction is given without data.extra; expected a file of images")
        if self.data.extra is not None and not self.data.extra_fraction:
            raise ValueError("data.extra is given, data.extra_fraction is 0; expected the share of each batch it fills")
        if self.data.augmentation.cutmix:
            self._check_mixed_labels()
        return self

    def _check_mixed_labels(self) -> None:
        """Refuse what is defined for images of one label."""
        given = self.defense
        burn_in = None if given.burn_in is None else given.burn_in.name
        found = {
            "defense.name is mart": given.name == "mart",
            "defense.burn_in.name is mart": burn_in == "mart",
            "defense.mail is given": given.mail is not None,
            "defense.logit_margin is given": given.logit_margin > 0,
        }
        for what, there in found.items():
            if there:
                raise ValueError(
                    f"{what} with data.augmentation.cutmix; expected none, as CutMix mixes two labels in an image and "
                    "this needs one"
                )

    @property
    def method(self) -> str:
        """The defense and its penalties in one word, such as "at-emr"; "emr" for standard training with it."""
        parts: list[str] = [self.defense.name] if self.defense.name != "standard" else []
        if self.defense.mail is not None:
            parts.insert(0, "mail")
        parts += [name.replace("_", "-") for name in self.penalties.given()]
        return "-".join(parts) or "standard"
