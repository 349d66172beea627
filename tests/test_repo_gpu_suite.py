"""The suite that waits for a card: it is there, it is skipped for one reason here, and `make bench-gpu` runs as far as a CPU can."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("packages/*/tests/test_*_gpu.py"))
MARKED = [
    p
    for p in [*ROOT.glob("packages/*/tests/**/test_*.py"), *ROOT.glob("tests/test_*.py")]
    if "mark.gpu" in p.read_text()
]


def test_tests_for_a_card_are_in_files_of_that_name():
    assert sorted(p for p in MARKED if p != Path(__file__)) == FILES
    assert len(FILES) >= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: run make test-gpu")
def test_the_suite_collects_and_skips_for_one_reason():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] [^ ]+ (.*)$", done.stdout, re.MULTILINE)
    assert sum(int(count) for count, _ in skipped) >= 25
    assert {reason for _, reason in skipped} == {"needs a CUDA device, and there is none here"}
    assert not re.search(r"\d+ (passed|failed|error)", done.stdout)


def test_every_test_for_a_card_has_a_twin_on_the_cpu():
    """A test function that is parametrised over a card is parametrised over the CPU too, or says in its docstring where its twin is."""
    for file in FILES:
        text = file.read_text()
        for match in re.finditer(
            r"((?:^@pytest\.mark[^\n]*\n(?:^[ \])][^\n]*\n)*)+)^def (test_\w+)[^\n]*\n(?:[ \)][^\n]*\n)*",
            text,
            re.MULTILINE,
        ):
            marks, name = match.group(1), match.group(2)
            if "GPU" in marks or "ON_CARD" in marks:
                assert '"cpu"' in marks or "twin" in match.group(0), f"{file.name}: {name}"


def test_the_benchmarks_run_on_a_cpu_in_miniature(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--size", "smoke", "--out", str(tmp_path / "gpu.json")]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["figures"].keys() == gpu.GROUPS.keys()
    for rows in content["figures"].values():
        first, *others = rows.values()
        assert first["ratio"] == 1 and len(others) >= 2
        assert all(row["low_ms"] <= row["high_ms"] and row["ratio"] > 0 for row in rows.values())
    assert {"commit", "versions", "device"} <= content["circumstances"].keys()
    assert "figures:" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_benchmarks_say_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "no card here" in capsys.readouterr().err
