"""Where metrics and pictures of a run go besides ``metrics.jsonl``: TensorBoard (default of the command line), Weights & Biases, trackio.

All take the same names: ``loss``, ``reward_text`` or ``routing/<block>/load_0`` become scalars, figures become pictures. A tracker that
fails in the middle of a run is reported once and left out from then on: it must not cost the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from multicrafter import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger(__name__)
NAMES = ("tensorboard", "wandb", "trackio", "none")


class Tracker(Protocol):
    """A sink for metrics and pictures; used as a context manager around the run."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step; non-finite ones are left out."""
        ...

    def pictures(self, step: int, values: Mapping[str, Float[Tensor, "3 H W"]]) -> None:
        """Pictures in [0, 1] by name."""
        ...

    def __enter__(self) -> Tracker: ...

    def __exit__(self, *error: object) -> None: ...


class NoTracker:
    """Forgets everything."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def pictures(self, step: int, values: Mapping[str, Float[Tensor, "3 H W"]]) -> None:
        """Nothing."""

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Guarded:
    """What the trackers share: finite scalars only, and a failure is said once, not raised."""

    def __init__(self) -> None:
        self.broken = False

    def _try(self, action: Callable[[], object]) -> None:
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # a tracker talks to disks and networks; whatever it raises, the run is worth more
            self.broken = True
            logger.warning(
                f"{type(self).__name__} failed ({type(error).__name__}: {error}); training goes on without it"
            )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step; non-finite ones are left out."""
        finite = {k: float(v) for k, v in values.items() if k != "step" and math.isfinite(v)}
        self._try(lambda: self._scalars(step, finite))

    def pictures(self, step: int, values: Mapping[str, Float[Tensor, "3 H W"]]) -> None:
        """Pictures in [0, 1] by name."""
        self._try(lambda: self._images(step, {k: v.detach().float().cpu().clamp(0, 1) for k, v in values.items()}))

    def __exit__(self, *error: object) -> None:
        self._try(self._close)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _images(self, step: int, values: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class TensorBoardTracker(_Guarded):
    """Event files in ``folder``, for ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        """Opens nothing yet.

        Raises:
            ImportError: tensorboard is not installed.
        """
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tracker 'tensorboard' needs: pip install tensorboard") from error
        self._make, self.folder = SummaryWriter, folder
        self._writer: Any = None

    def __enter__(self) -> TensorBoardTracker:
        self._try(lambda: setattr(self, "_writer", self._make(str(self.folder))))
        return self

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _images(self, step: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._writer.add_image(name, value, step)
        self._writer.flush()

    def _close(self) -> None:
        self._writer.close()


class _Hosted(_Guarded):
    """wandb's interface, which trackio has too."""

    module_name = ""

    def __init__(self, project: str, name: str, config: Mapping[str, Any] | None = None) -> None:
        """Starts nothing yet; ``name`` is the run's, so that a resumed run goes on under it.

        Raises:
            ImportError: The package is not installed.
        """
        super().__init__()
        try:
            self._module = __import__(self.module_name)
        except ImportError as error:
            raise ImportError(f"tracker {self.module_name!r} needs: pip install {self.module_name}") from error
        self.project, self.name, self.config = project, name, dict(config or {})

    def _options(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> _Hosted:
        self._try(
            lambda: self._module.init(project=self.project, name=self.name, config=self.config, **self._options())
        )
        return self

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def _images(self, step: int, values: dict[str, Tensor]) -> None:
        arrays = {k: (v * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for k, v in values.items()}
        self._module.log({k: self._module.Image(a) for k, a in arrays.items()}, step=step)

    def _close(self) -> None:
        self._module.finish()


class WandbTracker(_Hosted):
    """Weights & Biases; without an account, ``WANDB_MODE=offline`` writes into ``./wandb``."""

    module_name = "wandb"

    def _options(self) -> dict[str, Any]:
        return {"resume": "allow", "id": "".join(c if c.isalnum() else "-" for c in self.name)}


class TrackioTracker(_Hosted):
    """trackio: local by default, seen with ``trackio show``."""

    module_name = "trackio"

    def _options(self) -> dict[str, Any]:
        return {"resume": "allow"}


def make_tracker(kind: str, out: Path, *, project: str = "multicrafter", config: Any = None) -> Tracker:
    """The tracker of a run in ``out``: "tensorboard" (into ``out/tensorboard``), "wandb", "trackio" or "none".

    Raises:
        ValueError: An unknown kind.
        ImportError: The package is missing; the message has the pip line.
    """
    if kind not in NAMES:
        raise UserError(f"tracker must be one of {NAMES}, got {kind!r}")
    if kind == "tensorboard":
        return TensorBoardTracker(out / "tensorboard")
    if kind == "none":
        return NoTracker()
    hosted = WandbTracker if kind == "wandb" else TrackioTracker
    return hosted(project, "-".join(out.absolute().parts[-2:]), config)
