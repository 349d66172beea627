"""Running a stage over batches: in this process, or on Ray Data; the results are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from multicrafter import UserError, renamed
from multicrafter.photos.cache import Result

renamed(__name__, {"Stage": "BatchFunction"})


class Job(NamedTuple):
    """One photo for a stage: cache key, absolute path, and what earlier stages found that this one needs."""

    key: str
    path: str
    inputs: Mapping[str, Any]


class BatchFunction(Protocol):
    """A function on batches. Instances hold configuration only: models are loaded in the process that runs them, once."""

    @property
    def name(self) -> str:
        """Of the stage, as in the log."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything the results depend on, apart from the jobs."""
        ...

    def prepare(self) -> None:
        """Loads what the stage needs, so that a missing model or extra fails once and before any photo."""
        ...

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """One JSON result per job."""
        ...


class Engine(Protocol):
    """Runs a stage."""

    def run(
        self, stage: BatchFunction, batches: Iterable[Sequence[Job]]
    ) -> Iterator[tuple[Sequence[Job], list[Result]]]:
        """Yields every batch with its results, in any order."""
        ...


def run_batch(stage: BatchFunction, jobs: Sequence[Job]) -> list[Result]:
    """The stage on a batch; if it fails, on one photo after the other, so that a broken one spoils only its own result (``error``)."""
    try:
        return stage(jobs)
    except Exception as error:
        if len(jobs) == 1:
            return [{"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
    return [run_batch(stage, [job])[0] for job in jobs]


class InProcess:
    """One batch after the other, here."""

    def run(
        self, stage: BatchFunction, batches: Iterable[Sequence[Job]]
    ) -> Iterator[tuple[Sequence[Job], list[Result]]]:
        """See `Engine`."""
        stage.prepare()
        for batch in batches:
            yield batch, run_batch(stage, batch)


class _Worker:
    """What a Ray actor runs: a row is a whole batch, so that batches, and with them rounding, are those of `InProcess`."""

    def __init__(self, stage: BatchFunction) -> None:
        stage.prepare()
        self.stage = stage

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        jobs = [Job(*job) for job in json.loads(row["jobs"])]
        return {"index": row["index"], "results": json.dumps(run_batch(self.stage, jobs))}


class RayData:
    """Batches as rows of a Ray dataset, a stage as a pool of ``workers`` actors (extra ``ray``).

    Uses the cluster that ``ray.init`` or RAY_ADDRESS names, or starts one here and leaves it to the next stage.
    """

    def __init__(self, workers: int | None = None, *, gpus_per_worker: float = 0.0) -> None:
        """Starts Ray if it does not run yet; ``workers`` defaults to one per core of the cluster.

        Raises:
            ImportError: Ray is missing.
        """
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError(f'--engine ray needs Ray Data: pip install "multicrafter[ray]" ({error})') from error
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.gpus = gpus_per_worker

    def run(
        self, stage: BatchFunction, batches: Iterable[Sequence[Job]]
    ) -> Iterator[tuple[Sequence[Job], list[Result]]]:
        """See `Engine`."""
        import ray.data

        stage.prepare()  # here first: Ray would wrap an error of its actors beyond recognition
        held = [list(batch) for batch in batches]
        if not held:
            return
        rows = [{"index": i, "jobs": json.dumps(batch)} for i, batch in enumerate(held)]
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), 200)).map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(stage,),
            compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(rows))),
            num_gpus=self.gpus or None,
        )
        for row in data.iter_rows():
            yield held[row["index"]], json.loads(row["results"])


def make_engine(name: str, workers: int | None = None) -> Engine:
    """``local`` or ``ray``."""
    if name == "local":
        return InProcess()
    if name == "ray":
        return RayData(workers)
    raise UserError(f"engine must be 'local' or 'ray', got {name!r}")
