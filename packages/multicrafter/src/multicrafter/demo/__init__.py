"""The demonstration on the drawn world: both stages, their evaluation, figures, a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multicrafter._moved import moved_out

if not TYPE_CHECKING:  # what moved elsewhere, for one version
    __getattr__ = moved_out(__name__)
