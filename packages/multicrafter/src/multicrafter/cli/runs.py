"""What both stages share when they start: the base, the tracker, the processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multicrafter.models.loaded import LoadedModel


def load(run: Any, arguments: argparse.Namespace) -> LoadedModel:
    """The base of a run, after a look at whether it fits into memory; the stage brings its transformer onto the device."""
    from multicrafter.models.backbones import get_backbone
    from multicrafter.models.loading import get_device, load_model
    from multicrafter.plan import require_memory
    from multicrafter.training.distributed import world_size

    backbone = get_backbone(run.model.backbone)
    if not arguments.force:
        require_memory(run, device=arguments.device, gpus=world_size())
    if arguments.device is not None:
        get_device(arguments.device)
    loaded = load_model(run.model.path, dtype=run.execution.torch_dtype, backbone=backbone)
    return loaded if arguments.device is None else loaded.to(arguments.device, transformer=False)


def tracker(arguments: argparse.Namespace, run: Any) -> Any:
    """The tracker that --tracker names, said before the work if its package is missing; TensorBoard where it is installed."""
    from dataclasses import asdict
    from importlib.util import find_spec

    from multicrafter.training.trackers import make_tracker

    kind = arguments.tracker or ("tensorboard" if find_spec("tensorboard") else "none")
    return make_tracker(kind, arguments.out, config=asdict(run))


def together(arguments: argparse.Namespace, function: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command as one of the processes that torchrun started, on this process's GPU where there is one."""
    from multicrafter.training.distributed import session

    with session() as device:
        if device.type != "cpu" and arguments.device is None:
            arguments.device = str(device)
        return function(arguments)
