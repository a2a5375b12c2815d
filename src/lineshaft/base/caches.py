"""Where things lie that can be made again: a folder of this user's, which may be removed at any time."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LINESHAFT_CACHE"
"""Environment variable: the folder, instead of lineshaft in the user's own cache folder (XDG_CACHE_HOME, ~/.cache)."""


def cache_root() -> Path:
    """The folder; it need not exist yet. RuntimeError for a user without a home."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lineshaft"


def is_ours(folder: Path) -> bool:
    """Does it belong to this user, and may nobody else write into it? What lies in another folder is not trusted."""
    found = folder.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022
