"""The command ``id-reward serve``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from id_reward.errors import InputError
from id_reward.options import FACES, PENALTIES, checked_options


def add_serve(commands: Any) -> argparse.ArgumentParser:
    """The command with its own options: address, processes, batches and limits."""
    serve: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="score for trainers on other machines, over HTTP",
        description="Answers requests for scores: POST /score, GET /health, GET /metrics. The server knows no passwords; it listens to "
        "this machine alone unless --host says otherwise, and then belongs into a trusted network.",
    )
    serve.set_defaults(run=run_serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    add("--scorer", metavar="MODULE:NAME", help="a function that builds another scorer, instead of the identity reward")
    add(
        "-r", "--reference", action="append", default=[], metavar="FILE", help="for requests without references; repeat"
    )
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that score, each with its own models (%(default)s)",
    )
    add("--max-batch", type=int, default=32, metavar="N", help="pictures scored together (%(default)s)")
    add("--max-wait", type=float, default=0.005, metavar="S", help="seconds a request waits for others (%(default)s)")
    add("--max-queue", type=int, default=256, metavar="N", help="pictures that may wait (%(default)s)")
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds until a caller is told it takes too long (%(default)s)",
    )
    add(
        "--batch-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds until a process that hangs is ended (%(default)s)",
    )
    add("--max-megabytes", type=float, default=64.0, metavar="X", help="of one request (%(default)s)")
    add("--max-pictures", type=int, default=64, metavar="N", help="in one request (%(default)s)")
    add("--max-references", type=int, default=16, metavar="N", help="of one picture (%(default)s)")
    add("--max-pixels", type=int, default=16_777_216, metavar="N", help="of one picture (%(default)s)")
    add(
        "--max-total-pixels",
        type=int,
        default=201_326_592,
        metavar="N",
        help="of all pictures of one request (%(default)s)",
    )
    add(
        "--missing-score",
        type=float,
        default=0.0,
        metavar="X",
        help="for callers that cannot be told 'none' (%(default)s)",
    )
    return serve


def _scorer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `id_reward.building.build_scorer` takes; options that would be ignored are refused."""
    given = {**checked_options(arguments), "backend": arguments.backend, "convention": arguments.convention}
    if not arguments.scorer:
        return given
    plain = {**dict.fromkeys(FACES), **dict.fromkeys(PENALTIES, 0.0), "backend": "auto", "convention": "multicrafter"}
    ignored = [name for name, value in given.items() if value != plain[name]]
    if ignored:
        option = ignored[0].replace("_", "-")
        raise InputError(f"--{option} is of the identity reward, which --scorer {arguments.scorer} takes the place of")
    return {"scorer": arguments.scorer}


def run_serve(arguments: argparse.Namespace) -> int:
    """The command ``serve``."""
    from id_reward.images import open_image
    from id_reward.serving import Limits, ScorerServer
    from id_reward.serving.server import LOOPBACK

    options = _scorer_options(arguments)
    if not 0 < arguments.max_megabytes < 1e6:
        raise InputError(f"--max-megabytes must be positive and below a million, got {arguments.max_megabytes}")
    for path in arguments.reference:
        open_image(path)
    server = ScorerServer.of_options(
        options,
        processes=arguments.processes,
        host=arguments.host,
        port=arguments.port,
        limits=Limits(
            max_bytes=int(arguments.max_megabytes * 1e6), max_pictures=arguments.max_pictures,
            max_references=arguments.max_references, max_pixels=arguments.max_pixels,
            max_total_pixels=arguments.max_total_pixels,
        ),
        timeout=arguments.timeout, batch_timeout=arguments.batch_timeout, max_batch=arguments.max_batch,
        max_wait=arguments.max_wait, max_queue=arguments.max_queue, missing_score=arguments.missing_score,
        references=[Path(path).read_bytes() for path in arguments.reference],
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"listening on {server.url}", flush=True)
        if arguments.host not in LOOPBACK and not arguments.quiet:
            print("warning: whoever can reach this address can use the server", file=sys.stderr)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0
