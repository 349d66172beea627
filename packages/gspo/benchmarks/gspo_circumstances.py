"""What is written beside every recorded figure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def circumstances() -> dict[str, object]:
    """Commit, whether this package differs from it, versions, device and command."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent / "src"))),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "gspo", "diffusers")},
        "python": platform.python_version(),
        "device": f"cpu, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", *sys.argv]),
    }


def trained_flux() -> str:
    """The folder of the tiny FLUX that multicrafter ships, trained on drawn scenes.

    Raises:
        ImportError: multicrafter is not installed.
    """
    spec = importlib.util.find_spec("multicrafter")
    if spec is None or spec.origin is None:
        raise ImportError("this needs the trained tiny FLUX of multicrafter: pip install multicrafter")
    return str(Path(spec.origin).parent / "world" / "weights" / "tiny_flux")
