"""Entry of the hosted Space: the page of ``multicrafter serve`` with the tiny model, on the port that a Space shows."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "src")]

from multicrafter.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["serve", "--host", "0.0.0.0", "--port", "7860", "--max-megabytes", "5", *sys.argv[1:]]))
