"""What a parent process tells the server that it starts."""

from __future__ import annotations

from lineshaft.base.config import Config
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.server import ServeConfig


class Orders(Config):
    """One line of JSON on the server's stdin."""

    folder: str
    """The checkpoint."""
    name: str
    """Name to serve it under."""
    serve: ServeConfig
    engine: EngineConfig
