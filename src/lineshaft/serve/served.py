"""A model that requests can be handed to."""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.serve.remote import RemoteEngine
from lineshaft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A loaded model."""

    engine: RemoteEngine
    tokenizer: Tokenizer
