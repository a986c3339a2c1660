"""What several files of tests do."""

import hashlib
import json
from pathlib import Path
from typing import Any

from abe.checkpoint import checkpoints


def forge(path: Path, **changes: Any) -> None:
    """Change meta.json and its checksum; a dictionary changes a part of one."""
    meta = json.loads((path / "meta.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(meta[key], dict):
            meta[key] |= value
        else:
            meta[key] = value
    del meta["checksum"]
    content = json.dumps(meta, sort_keys=True).encode()
    meta = {"checksum": hashlib.sha256(content).hexdigest()} | meta
    (path / "meta.json").write_text(json.dumps(meta))


def shorten(run: Path, *, steps: int) -> None:
    """Let the newest checkpoint of a run have only a few steps to go."""
    path = checkpoints(run)[-1]
    config = json.loads((path / "meta.json").read_text())["config"]
    forge(path, config=config | {"train": config["train"] | {"steps": steps}})
