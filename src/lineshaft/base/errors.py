"""Every error a user can meet, whose fault it is, and what it ends with.

    LineshaftError
    +-- ConfigError          a recipe, an option or a call asks for what does not exist        exit 2
    +-- SourceError          the raw files handed in can't be used                             exit 3
    +-- StoreError           the artifact store                                                exit 4
    |   +-- NotFound             no artifact, reference or file of that name
    |   +-- Corrupt              bytes on disk are not the bytes that were written
    |   +-- StorageFull          the disk has no room; nothing half-written stays loadable
    +-- ModelError           a checkpoint or a model description                               exit 5
    |   +-- UnsupportedModel     a family or an option of one that we do not run
    |   +-- BadCheckpoint        files that do not fit the description beside them
    |   +-- BrokenContract       a tokenizer or chat template that gives other tokens than it did when the model was made
    +-- TrainingError        a run that can't go on (loss not a number, ...)                   exit 6
    +-- RequestError         a request that can't be answered as asked; the server answers 4xx  exit 7
    |   +-- UnknownModel         the model named is not the one served
    |   +-- TooLong              prompt and answer do not fit the model's context
    +-- Capacity             asked for more than there is now; the server answers 429          exit 8
    |   +-- CacheFull            the request can never fit into the cache
    |   +-- QueueFull            too many requests wait
    |   +-- DoesNotFit           a task that would need more memory than there is; refused before it begins
    +-- EngineError          the engine failed while it worked on the request; it may be retried  exit 9
    |   +-- Unrecordable         an operation of PyTorch's own stands between the native calls of a step; caught where it is recorded
    +-- MissingExtra         an optional dependency is not installed                           exit 10

The text of each says what is wrong and what to do. `assert` is for what cannot happen.
"""

from __future__ import annotations


class LineshaftError(Exception):
    """Base of all errors that lineshaft raises on purpose."""

    exit_code = 1


class ConfigError(LineshaftError):
    """A recipe, an option or a call asks for what does not exist."""

    exit_code = 2


class SourceError(LineshaftError):
    """The raw files handed in can't be used."""

    exit_code = 3


class StoreError(LineshaftError):
    """The artifact store could not do what was asked."""

    exit_code = 4


class NotFound(StoreError):
    """No artifact, reference or file of that name."""


class Corrupt(StoreError):
    """Bytes on disk are not the bytes that were written."""


class StorageFull(StoreError):
    """The disk has no room left for an artifact."""


class ModelError(LineshaftError):
    """A checkpoint or a model description can't be used."""

    exit_code = 5


class UnsupportedModel(ModelError):
    """A model family, or an option of one, that lineshaft does not run."""


class BadCheckpoint(ModelError):
    """Weights that do not fit the description beside them."""


class BrokenContract(ModelError):
    """A tokenizer or chat template that gives other tokens than it did when the model was made."""


class TrainingError(LineshaftError):
    """A training run that can't go on."""

    exit_code = 6


class RequestError(LineshaftError):
    """A request that can't be answered as asked. `param` names the field at fault, if one is."""

    exit_code = 7
    status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(RequestError):
    """The model named in the request is not the one served."""

    status = 404
    code = "model_not_found"


class TooLong(RequestError):
    """Prompt and answer together do not fit the model's context."""

    code = "context_length_exceeded"


class Capacity(LineshaftError):
    """More was asked for than there is now; later, or smaller, may work."""

    exit_code = 8
    status = 429
    code = "over_capacity"


class CacheFull(Capacity):
    """A request that can never fit into the cache, even alone."""

    def __init__(self, need: int, have: int) -> None:
        told = "lower max_tokens or give the engine more cache memory"
        super().__init__(f"the request needs {need} cache pages, the cache has {have}: {told}")


class QueueFull(Capacity):
    """Too many requests wait already."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting, which is the limit: try again later")


class DoesNotFit(Capacity):
    """A task that would need more memory than there is; refused before it begins."""


class EngineError(LineshaftError):
    """The engine failed while it worked on a request."""

    exit_code = 9


class Unrecordable(EngineError):
    """An operation of PyTorch's own stands between the native calls of a step; the message names it."""


class MissingExtra(LineshaftError):
    """An optional dependency is not installed."""

    exit_code = 10

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'lineshaft[{extra}]'")
