"""``multicrafter serve``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command, finder_option, loaded_pipeline, positive

logger = logging.getLogger(__name__)


def port(text: str) -> int:
    """A port, or 0 for a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def serve(arguments: argparse.Namespace) -> int:
    """A web page that draws: pictures and a prompt in, and beside the result who was matched to whom and where the model looked."""
    from multicrafter.demo.serve.drawing import Limits
    from multicrafter.demo.serve.page import import_gradio
    from multicrafter.demo.serve.server import LOOPBACK, serve

    import_gradio()
    tiny = arguments.model is None
    if arguments.max_references > 4:
        raise UserError(f"--max-references must be at most 4, got {arguments.max_references}")
    limits = Limits(
        max_references=arguments.max_references, max_size=arguments.max_size or (128 if tiny else 1024), max_steps=arguments.max_steps,
        max_waiting=arguments.max_waiting, max_bytes=1_000_000 * arguments.max_megabytes,
    )  # fmt: skip
    if not tiny:
        from multicrafter.models.loading import get_dtype
        from multicrafter.plan import require_weights

        require_weights(arguments.model, get_dtype(arguments.dtype), device=arguments.device)
    if arguments.host not in LOOPBACK:
        logger.warning(f"--host {arguments.host}: whoever reaches this machine can use the page")
    serve(loaded_pipeline(arguments), host=arguments.host, port=arguments.port, limits=limits, tiny=tiny)
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``serve`` to the command line."""
    sub = add_command(commands, "serve", serve, model=False)
    sub.add_argument("--model", help="pipeline directory of diffusers, or hub id; default: the tiny one that ships")
    sub.add_argument(
        "--adapter", type=Path,
        help="folder written by pretrain, align or demo; none is the base alone; default: the one that ships, with the tiny model",
    )  # fmt: skip
    finder_option(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    sub.add_argument("--port", type=port, default=7860, help="0 takes a free one")
    sub.add_argument("--max-references", type=positive, default=4, help="pictures of one request, at most 4")
    sub.add_argument(
        "--max-size", type=positive, help="side of a picture in pixels; default: 128 for the tiny model, else 1024"
    )
    sub.add_argument("--max-steps", type=positive, default=50, help="steps of one picture")
    sub.add_argument("--max-waiting", type=positive, default=8, help="requests that wait at the same time")
    sub.add_argument("--max-megabytes", type=positive, default=10, help="size of one uploaded file")
    sub.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--backbone", metavar="NAME", help="module:class of a backbone of your own")
