"""Run every package's micro-benchmarks and save the figures with commit, versions and device.

    make bench                    # smoke size: seconds, proves that they run
    make bench BENCH_SIZE=full    # the sizes the recorded figures have

pytest-benchmark measures; this file only chooses where the JSON goes (``runs/bench/<package>.json``) and what is written beside the timings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("torch", "numpy", "diffusers", "gspo", "idar", "moe-lora", "id-reward", "multicrafter")


def processor() -> str:
    """Name of the processor and its units for matrices of 16 bits: the same programme takes twice as long without them."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, value in told.items()}
    units = {"avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split())
    return " ".join([fields.get("model name", platform.machine()), *sorted(units)])


def circumstances() -> dict[str, object]:
    """Commit, whether the tree differs from it, versions, processor and device."""
    import torch

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "size": os.environ.get("BENCH_SIZE", "smoke"),
    }


def run(package: Path, out: Path) -> int:
    """Benchmarks of one package; its JSON appears at `out` complete or not at all."""
    unfinished = out.with_suffix(".tmp")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(package / "benchmarks"),
        "-o",
        "python_files=bench_*.py",
        "--benchmark-only",
    ]
    command += ["--benchmark-columns=median,iqr,rounds", f"--benchmark-json={unfinished}"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code == 0:
        figures = json.loads(unfinished.read_text())
        figures["circumstances"] = circumstances() | {"command": " ".join(command[1:])}
        unfinished.write_text(json.dumps(figures, indent=1))
        os.replace(unfinished, out)
    unfinished.unlink(missing_ok=True)
    return code


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="names; default: all that have benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder for the JSON files")
    arguments = parser.parse_args()
    known = {p.parent.name: p.parent for p in sorted(ROOT.glob("packages/*/benchmarks")) if list(p.glob("bench_*.py"))}
    if unknown := set(arguments.packages) - set(known):
        parser.error(f"packages: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    codes = [run(known[name], arguments.out / f"{name}.json") for name in arguments.packages or known]
    print(f"figures of {len(codes)} packages in {arguments.out}")
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
