"""Every setting of a run: the sections together, and what they are read as.

A section's fields, with their types, defaults and meaning, and the rules that tie them to others, are in ``sections/``.
Models are frozen and refuse unknown keys. Field descriptions are shown by ``copsd train --help-settings``.
"""

from __future__ import annotations

from megatron_copsd.config.method import TRAITS, MethodTraits
from megatron_copsd.config.sections.data import DataSettings, DataSource, PromptSettings
from megatron_copsd.config.sections.model import LoraSettings, ModelSettings, ParallelSettings
from megatron_copsd.config.sections.objective import LossSettings, ObjectiveSettings, PolicySettings, TeacherSettings
from megatron_copsd.config.sections.optimizer import OptimizerSettings
from megatron_copsd.config.sections.rollout import EvalSettings, RolloutSettings
from megatron_copsd.config.sections.run import CheckpointSettings, LogSettings, RecipeSettings, RunSettings
from megatron_copsd.config.sections.sdrrl import SdrrlSettings
from megatron_copsd.config.sections.sglang import SglangSettings
from megatron_copsd.config.settings import Settings

__all__ = [
    "CheckpointSettings",
    "Config",
    "DataSettings",
    "DataSource",
    "EvalSettings",
    "LogSettings",
    "LoraSettings",
    "LossSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "PolicySettings",
    "PromptSettings",
    "RecipeSettings",
    "RolloutSettings",
    "RunSettings",
    "SdrrlSettings",
    "Settings",
    "SglangSettings",
    "TeacherSettings",
]


class Config(Settings):
    """One run."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    rollout: RolloutSettings = RolloutSettings()
    sglang: SglangSettings = SglangSettings()
    teacher: TeacherSettings = TeacherSettings()
    loss: LossSettings = LossSettings()
    policy: PolicySettings = PolicySettings()
    lora: LoraSettings = LoraSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    log: LogSettings = LogSettings()
    sdrrl: SdrrlSettings = SdrrlSettings()
    recipe: RecipeSettings = RecipeSettings()

    @property
    def method(self) -> MethodTraits:
        """What the objective asks of a step."""
        return TRAITS[self.objective.name]

    @property
    def evaluates(self) -> bool:
        """Whether training evaluates on the held-out sources at all."""
        return bool(self.eval.every or self.eval.at_start or self.eval.at_end)

    @property
    def shown_prompt(self) -> PromptSettings:
        """The prompt section as the method takes it: one without the English problem shows none by default."""
        if self.method.shows_problem_en:
            return self.prompt
        return self.prompt.model_copy(update={"include_problem_en": False})

    @property
    def evaluation_prompt(self) -> PromptSettings:
        """The prompt section as evaluation takes it: the student's, which may think where it does not in training."""
        own = self.eval.thinking
        return self.prompt if own is None else self.prompt.model_copy(update={"student_thinking": own})

    @property
    def trains_with_servers(self) -> bool:
        """Whether a training's responses come from SGLang; a method that samples none evaluates by itself."""
        return self.rollout.engine == "sglang" and self.method.samples_responses
