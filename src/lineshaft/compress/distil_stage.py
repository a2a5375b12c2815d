"""The distillation stage: a teacher and tokens to a smaller checkpoint that answers much as the teacher does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lineshaft.base.errors import BadCheckpoint, ConfigError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Artifact, Draft
from lineshaft.base.terminal import say
from lineshaft.compress.config import NAMED
from lineshaft.compress.distil import Distil, Mixture, cut, cut_config, evenly_spaced, pairs_of
from lineshaft.compress.distil_preflight import Distilling, judge_distilling
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.model.config import Architecture, ModelConfig
from lineshaft.model.cost import cost_of
from lineshaft.model.decoder import Decoder
from lineshaft.model.folder import load_config
from lineshaft.model.memory import Stored, stored_in
from lineshaft.text import contract
from lineshaft.train.preflight import Training
from lineshaft.train.stage import FitConfig, check_context, check_tokenizer, keep, settled, train


class DistilConfig(FitConfig):
    """Training a student on what a teacher finds likely. One of `student` and `keep_layers` says what the student is."""

    model_config = NAMED
    step: Literal["distil"] = "distil"
    student: Architecture | None = None
    """Shape of a student with fresh weights; the vocabulary is the teacher's."""
    keep_layers: PositiveInt | None = None
    """The student begins as so many evenly spaced layers of the teacher, the first and the last among them."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Share of the loss that the teacher's chances have; the next token has the rest."""
    temperature: PositiveFloat = 2.0
    """Divides the logits of both before they are compared: above 1 unlikely tokens count more. Used where alpha is not 0."""
    hidden_weight: float = Field(0.0, ge=0)
    """What the mean squared error between hidden states counts for, through a learnt linear map where widths differ; 0: not compared."""

    @model_validator(mode="after")
    def _one_student_and_a_lesson(self) -> DistilConfig:
        if (self.student is None) == (self.keep_layers is None):
            raise ValueError("student: set one of student (a shape) and keep_layers (so many of the teacher's)")
        if not self.alpha and not self.hidden_weight:
            raise ValueError("alpha: 0 with hidden_weight 0 leaves nothing to learn from the teacher: raise one, or train without it")
        return self

    @property
    def mixture(self) -> Mixture:
        """The parts of the loss."""
        return Mixture(self.alpha, self.temperature, self.hidden_weight, self.further_weight)


def student_config(config: DistilConfig, teacher: ModelConfig) -> ModelConfig:
    """The description of the student. ConfigError where more layers are to be kept than the teacher has."""
    if config.keep_layers is not None:
        try:
            return cut_config(teacher, config.keep_layers)
        except ConfigError as error:
            raise ConfigError(f"distil: {error}") from None
    assert config.student is not None  # the config sees to it
    vocabulary = {name: getattr(teacher, name) for name in ("vocab_size", "bos_token_id", "eos_token_ids")}
    return ModelConfig.model_validate(config.student.model_dump() | vocabulary)


def _settle(config: DistilConfig, parents: Mapping[str, Artifact]) -> DistilConfig:
    tokens, checkpoint = parents["tokens"], parents["checkpoint"]
    check_tokenizer("distil", checkpoint, tokens)
    teacher = load_config(checkpoint.root)
    if (wanted := tokens.manifest.facts["vocab_size"]) > teacher.vocab_size:
        raise BadCheckpoint(f"distil: the tokenizer has {wanted} tokens, the teacher's vocab_size is {teacher.vocab_size}: no pair")
    check_context("distil, for the teacher", config, teacher)
    check_context("distil, for the student", config, student_config(config, teacher))
    return settled(config)


def _build(draft: Draft, config: DistilConfig) -> None:
    checkpoint = draft.parents["checkpoint"]
    contract.check_folder(checkpoint.root)
    described = load_config(checkpoint.root)
    shape = student_config(config, described)
    judge_distilling(planned(config, described, stored_in(checkpoint.root))).enforce()
    _tell_sizes(described, shape)
    teacher = load_checkpoint(checkpoint.root)
    student = _begun(config, teacher, shape)
    objective = Distil(teacher, student, config.mixture, config.seed)
    with objective.learning(student):
        trained = train(draft, student, config, objective)
    keep(draft, student, checkpoint, trained)
    draft.facts["teacher_parameters"] = cost_of(teacher.config).parameters
    if config.keep_layers is not None:
        draft.facts["kept_layers"] = list(evenly_spaced(config.keep_layers, described.num_hidden_layers))


def planned(config: DistilConfig, teacher: ModelConfig, stored: Stored) -> Distilling:
    """What is to be done, as the memory forecast takes it; `stored`: the teacher's weights."""
    student = student_config(config, teacher)
    training = Training(student, config.rows, config.sequence_tokens, config.loop.accumulate, config.loop.precision)
    pairs = len(pairs_of(student.num_hidden_layers, teacher.num_hidden_layers)) if config.hidden_weight else 0
    return Distilling(training, teacher, stored, config.alpha > 0, pairs)


def _tell_sizes(teacher: ModelConfig, student: ModelConfig) -> None:
    large, small = cost_of(teacher).parameters, cost_of(student).parameters
    if small >= large:
        say(f"distil: the student has {small} parameters, the teacher {large}: it will be no smaller")


def _begun(config: DistilConfig, teacher: Decoder, shape: ModelConfig) -> Decoder:
    if config.keep_layers is not None:
        return cut(teacher, config.keep_layers)
    student = Decoder(shape)
    student.initialise(config.seed)
    return student


DISTIL = Stage(
    name="distil",
    kind="checkpoint",
    version=1,
    config=DistilConfig,
    build=_build,
    parents={"checkpoint": "checkpoint", "tokens": "tokens"},
    settle=_settle,
)
