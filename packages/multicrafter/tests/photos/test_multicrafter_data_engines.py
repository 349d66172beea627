"""Ray Data gives the same files as the local engine."""

from __future__ import annotations

import pytest
from multicrafter.photos import build
from multicrafter.photos.engines import Job, make_engine, run_batch


class Doubling:
    name = "doubling"

    def settings(self):
        return {}

    def prepare(self):
        pass

    def __call__(self, jobs):
        if any(job.inputs["x"] == 13 for job in jobs):
            raise RuntimeError("thirteen")
        return [{"y": 2 * job.inputs["x"]} for job in jobs]


def test_a_failing_job_spoils_only_itself():
    jobs = [Job(str(x), "", {"x": x}) for x in (1, 13, 3)]
    assert run_batch(Doubling(), jobs) == [{"y": 2}, {"error": "RuntimeError: thirteen"}, {"y": 6}]


def test_engines_by_name():
    jobs = [[Job("a", "", {"x": 1})], [Job("b", "", {"x": 2})]]
    assert [r for _, r in make_engine("local").run(Doubling(), jobs)] == [[{"y": 2}], [{"y": 4}]]
    with pytest.raises(ValueError, match="'local' or 'ray'"):
        make_engine("spark")


def test_without_ray_the_pip_line_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "multicrafter\[ray\]"'):
        make_engine("ray")


@pytest.mark.slow
def test_ray_gives_the_same_dataset(drawn, built, make_config, tmp_path):
    ray = pytest.importorskip("ray", reason="needs multicrafter[ray]")
    try:
        summary = build(drawn[0], tmp_path / "out", make_config(), engine=make_engine("ray", 2), progress=False)
    finally:
        ray.shutdown()
    assert summary.records == built[1].records
    files = [p.relative_to(built[0]) for p in built[0].rglob("*") if p.is_file() and ".build" not in p.parts]
    for path in files:
        if path.suffix not in (".html",) and path.name not in ("dataset.json", "README.md"):
            assert (tmp_path / "out" / path).read_bytes() == (built[0] / path).read_bytes(), path
