"""Runs programs in children of one interpreter that has the heavy libraries imported: a document's snippets take a second instead of ten.

Only libraries of others are imported beforehand. What is ours, each program imports itself, into a namespace of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

HEAVY = """
import contextlib
with contextlib.suppress(ImportError):
    import matplotlib.figure, numpy, PIL.Image, scipy.optimize, torch
    from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel
    import peft
"""


class Interpreter:
    """A process that forks for every program. Nothing is computed in it, so no thread is lost in a fork."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program: str, folder: Path) -> tuple[int, str]:
        """Exit status of a program in an empty folder, and what it wrote to the standard error."""
        errors = folder / ".stderr"
        print(json.dumps([program, str(folder), str(errors)]), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        said = errors.read_text()
        errors.unlink()
        return code, said

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def child(program: str, folder: str, errors: str) -> None:
    """Runs a program as ``python -c`` does, and ends this process."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    sys.path[0], sys.argv = "", ["-c"]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(program, "<document>", "exec"), main.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def serve() -> None:
    """A line in, a line out."""
    exec(HEAVY, {})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(*json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
