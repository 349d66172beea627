"""Several visitors and one model: requests wait in line, can be cancelled, and everything of a visitor is forgotten when they leave."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from id_reward.errors import InputError
from PIL import Image

from multicrafter import UserError
from multicrafter.demo.serve.drawing import Cancelled, Drawing, DrawRequest, Limits, draw, read_upload
from multicrafter.pipeline import MultiCrafterPipeline

logger = logging.getLogger(__name__)
State = Literal["waiting", "drawing", "done", "failed", "cancelled"]
DEFECT = "Something went wrong in the server, and its log says what. Your pictures and settings are still here."


@dataclass
class Job:
    """A request of a visitor, and how far it is."""

    request: DrawRequest
    state: State = "waiting"
    step: int = 0
    of: int = 0
    sentence: str = ""
    drawing: Drawing | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def finish(self, state: State, sentence: str = "") -> None:
        """Nothing more will happen to it."""
        self.state, self.sentence = state, sentence
        self.over.set()


@dataclass
class Visitor:
    """What is remembered of somebody while their page is open."""

    references: list[Image.Image] = field(default_factory=list)
    job: Job | None = None
    drawing: Drawing | None = None
    drawn_people: int = 0


class Desk:
    """Takes requests and draws them one after the other, in a thread of its own."""

    def __init__(self, pipeline: MultiCrafterPipeline, limits: Limits | None = None, *, tiny: bool = False) -> None:
        """Opens the desk.

        Args:
            pipeline: Draws; with a finder.
            limits: What a visitor may ask for.
            tiny: Whether the pipeline is the tiny model of the drawn world, which knows nothing else.
        """
        self.pipeline, self.limits, self.tiny = pipeline, limits or Limits(), tiny
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open, self._busy = True, 0
        self._thread = threading.Thread(target=self._work, name="multicrafter-desk", daemon=True)
        self._thread.start()

    def visitor(self, key: str) -> Visitor:
        """The visitor of this key; a new one at the first sight. Whoever was away longest is forgotten when there are too many."""
        with self._changed:
            found = self._visitors.setdefault(key, Visitor())
            self._visitors.move_to_end(key)
            idle = [k for k, v in self._visitors.items() if v.job is None or v.job.over.is_set()]
            for other in idle[: max(0, len(self._visitors) - self.limits.max_visitors)]:
                if other != key:
                    del self._visitors[other]
            return found

    def add_upload(self, key: str, content: bytes, name: str) -> None:
        """Adds an uploaded file to the visitor's references.

        Raises:
            ValueError: It is no picture, or one too many.
        """
        self._require_room(key, 1)
        picture = read_upload(content, name, self.limits)
        self.visitor(key).references.append(picture)

    def set_references(self, key: str, references: list[Image.Image]) -> None:
        """Replaces the visitor's references."""
        self.visitor(key).references[:] = references[: self.limits.max_references]

    def _require_room(self, key: str, more: int) -> None:
        most = self.limits.max_references
        if len(self.visitor(key).references) + more > most:
            raise UserError(f"There is room for {most} pictures: remove one first.")

    def submit(self, key: str, request: DrawRequest) -> Job:
        """Puts a request into the line.

        Raises:
            ValueError: It asks for too much, the line is full, or one of this visitor is still being drawn.
        """
        request.check(self.limits)
        visitor = self.visitor(key)
        with self._changed:
            if not self._open:
                raise UserError("The server is closing.")
            if visitor.job is not None and not visitor.job.over.is_set():
                raise UserError("A picture of yours is being drawn: wait for it, or cancel it.")
            if len(self._line) >= self.limits.max_waiting:
                raise UserError(
                    f"{len(self._line)} requests are waiting, which is as many as may wait: try again soon."
                )
            visitor.job = Job(request)
            self._line.append(visitor.job)
            self._changed.notify_all()
            return visitor.job

    def ahead(self, job: Job) -> int:
        """Requests that will be drawn before this one; 0 where it is being drawn."""
        with self._changed:
            return self._line.index(job) + self._busy if job in self._line else 0

    def cancel(self, key: str) -> bool:
        """Stops the visitor's request, before the next pass of the model; whether there was one."""
        with self._changed:
            visitor = self._visitors.get(key)
            job = visitor.job if visitor else None
            if job is None or job.over.is_set():
                return False
            job.stop.set()
            if job in self._line:
                self._line.remove(job)
                job.finish("cancelled", "Cancelled.")
            return True

    def leave(self, key: str) -> None:
        """Stops what the visitor waits for and forgets them."""
        self.cancel(key)
        with self._changed:
            self._visitors.pop(key, None)

    def close(self) -> None:
        """Draws nothing more; everything is forgotten."""
        with self._changed:
            self._open = False
            for visitor in self._visitors.values():
                if visitor.job is not None:
                    visitor.job.stop.set()
            for job in self._line:
                job.finish("cancelled", "The server is closing.")
            self._line.clear()
            self._visitors.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = 0
                self._changed.wait_for(lambda: self._line or not self._open)
                if not self._open:
                    return
                job = self._line.popleft()
                job.state, self._busy = "drawing", 1
            self._draw(job)
            del job  # a thread that waits holds on to nothing

    def _draw(self, job: Job) -> None:
        def progress(step: int, of: int) -> None:
            job.step, job.of = step, of

        try:
            drawing = draw(self.pipeline, job.request, progress=progress, cancelled=job.stop.is_set)
        except Cancelled:
            job.finish("cancelled", "Cancelled.")
        except (UserError, InputError) as error:
            job.finish("failed", _sentence(error))
        except Exception:
            logger.exception("a request failed")
            job.finish("failed", DEFECT)
        else:
            job.drawing = drawing
            with self._changed:
                for visitor in self._visitors.values():
                    if visitor.job is job:
                        visitor.drawing = drawing
            job.finish("done")


def _sentence(error: Exception) -> str:
    """A message of the pipeline as a sentence."""
    text = " ".join(str(error).split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
