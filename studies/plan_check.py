"""Checks `multicrafter plan` against measured peaks: full-width slices (1 double and 1 single block) on the CPU.

    python -m studies.plan_check --out benchmarks/results/plan_validation.json

Every case is a process of its own that builds the slice, runs one step of stage 1 (forward, attention loss, backward, clipping, AdamW
with its states) and reads the peak of its resident memory from the kernel (VmHWM, reset before the step), less what it had before the
slice was built. The plan predicts the same number from fake tensors. Needs Linux; about 5 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

SLICE = {"num_layers": 1, "num_single_layers": 1}
REPOSITORY = Path(__file__).resolve().parents[1]


def cases() -> list[dict]:
    """512 and 1024 pixels, 1 to 4 references, both backbones as the recipes compute them; fp32 and no recomputation besides."""
    grid = [(size, n) for size in (512, 1024) for n in (1, 2, 3, 4)]
    made = [
        {"recipe": recipe, "size": size, "references": n, "dtype": "bfloat16", "checkpointing": False}
        for recipe in ("flux1_dev_stage1", "flux2_klein_stage1")
        for size, n in grid
    ]
    for recipe in ("flux1_dev_stage1", "flux2_klein_stage1"):
        made.append({"recipe": recipe, "size": 512, "references": 2, "dtype": "float32", "checkpointing": False})
        made.append({"recipe": recipe, "size": 512, "references": 2, "dtype": "bfloat16", "checkpointing": True})
    return made


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def setting(case: dict):
    """Run and shape of a case."""
    from multicrafter.config.recipes import resolve
    from multicrafter.plan.steps import Shape

    run = resolve(
        recipe=case["recipe"],
        changes=[
            f"pretrain.execution.dtype={case['dtype']}",
            f"pretrain.execution.gradient_checkpointing={str(case['checkpointing']).lower()}",
        ],
    )
    return run, Shape(512, (case["size"] // 16,) * 2, (20, 20), case["references"])


def predict(case: dict) -> dict:
    """From fake tensors."""
    from multicrafter.plan import measure

    start = time.monotonic()
    run, shape = setting(case)
    one = measure(run, rows=1, device="cpu", config=SLICE, shape=shape)
    return {
        "predicted": one.peak, "base": one.base, "adapters": one.adapters, "optimizer": one.optimizer,
        "activations_and_gradients": one.activations, "flops": one.flops, "predict_seconds": time.monotonic() - start,
    }  # fmt: skip


def measured(case: dict) -> dict:
    """With real tensors, in this process."""
    import torch
    from multicrafter.plan import measure

    run, shape = setting(case)
    measure(run, rows=1, device="cpu", fake=False, config={**SLICE, "num_attention_heads": 1}, shape=Shape_small())
    gc.collect()
    before, seen = status("VmRSS"), {}

    @contextmanager
    def watch():
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        start = time.monotonic()
        yield
        seen.update(peak=status("VmHWM") - before, seconds=time.monotonic() - start)

    one = measure(run, rows=1, device="cpu", fake=False, config=SLICE, shape=shape, around=watch())
    return {
        "measured": seen["peak"],
        "seconds": seen["seconds"],
        "tracked_for_real": one.peak,
        "threads": torch.get_num_threads(),
    }


def Shape_small():
    """A first, tiny step, so that libraries have loaded and made their buffers before the measurement."""
    from multicrafter.plan.steps import Shape

    return Shape(16, (4, 4), (2, 2), 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "plan_validation.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases; the others are kept from --out")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print("RESULT " + json.dumps(measured(json.loads(arguments.case))))
        return
    from benchmarks.run import circumstances

    known = {}
    if arguments.out.exists():
        known = {json.dumps(r["case"]): r for r in json.loads(arguments.out.read_text())["results"]}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for index, case in enumerate(cases()):
        if arguments.only is not None and index not in arguments.only:
            continue
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if not lines:
            print(f"case {index} {case} failed:\n{done.stderr[-2000:]}", flush=True)
            continue
        result = {"case": case, **predict(case), **json.loads(lines[0].removeprefix("RESULT "))}
        result["ratio"] = result["predicted"] / result["measured"]
        known[json.dumps(case)] = result
        print(
            index,
            case,
            {k: round(result[k] / 1e9, 3) for k in ("predicted", "measured")},
            f"{result['ratio']:.3f}",
            flush=True,
        )
        ordered = [known[key] for key in map(json.dumps, cases()) if key in known]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"what": __doc__, "circumstances": circumstances(), "results": ordered}
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
