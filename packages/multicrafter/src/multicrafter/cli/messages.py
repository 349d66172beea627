"""What a command says besides its product: log records and warnings, one line each on standard error."""

from __future__ import annotations

import logging
import os
import sys
import traceback as tracebacks
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PACKAGES = ("multicrafter", "gspo", "idar", "moe_lora", "id_reward")
"""Each has a logger of its name."""
FOREIGN = (
    "bitsandbytes|diffusers|huggingface_hub|insightface|onnxruntime|peft|sklearn|tensorboard|torch|torchao|transformers"
)
"""Libraries that warn of their own insides (deprecations, backends that are not there); what ours warn of is shown."""
CHATTY = ("bitsandbytes", "torch.utils._pytree", "torch.utils.cpp_extension", "torchao")


class Lines(logging.Handler):
    """``warning: the reward raised ...``; information without its level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line to whatever standard error is now."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr, flush=True)


def _say(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:  # the signature of warnings.showwarning
    logging.getLogger("multicrafter.warnings").warning("%s", " ".join(str(message).split()))
    logging.getLogger("multicrafter.warnings").debug("%s from %s, line %d", category.__name__, filename, lineno)


@contextmanager
def shown(*, debug: bool = False) -> Iterator[None]:
    """Shows records of our packages, and warnings but those in which other libraries speak of themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"({FOREIGN})(\.|$)")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # but not of our own names
            warnings.filterwarnings("ignore", rf"(?!.*the old name leaves with ({'|'.join(PACKAGES)}) )", category)
    warnings.showwarning = _say
    handler, loggers = Lines(), [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def traceback(error: BaseException) -> None:
    """The traceback of an error and of what it came from."""
    tracebacks.print_exception(error)
