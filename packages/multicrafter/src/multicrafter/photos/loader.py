"""Streaming batches: aspect buckets, any number of references, deterministic shuffling, exact resume, workers."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.photos.samples import Draw, Size, read_sample
from multicrafter.photos.store import open_split
from multicrafter.photos.write import Record


def aspect_buckets(
    pixels: int, *, multiple: int = 16, ratios: Sequence[float] = (0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0)
) -> tuple[Size, ...]:
    """(height, width) of about ``pixels`` each, for ratios width / height, sides multiples of ``multiple``.

    >>> aspect_buckets(512 * 512, ratios=(1.0, 2.0))
    ((512, 512), (368, 720))
    """
    if pixels < multiple**2 or any(r <= 0 for r in ratios):
        raise UserError(f"pixels must be at least {multiple**2} and ratios positive, got {pixels} and {tuple(ratios)}")
    sides = [
        (
            max(multiple, round(math.sqrt(pixels / r) / multiple) * multiple),
            max(multiple, round(math.sqrt(pixels * r) / multiple) * multiple),
        )
        for r in ratios
    ]
    return tuple(dict.fromkeys(sides))


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a batch is.

    Attributes:
        batch: Records a batch, on this rank.
        buckets: Sizes (height, width) of pictures; a record goes to the one nearest in aspect. See `aspect_buckets`.
        reference_size: Side of a reference in pixels.
        reference_shapes: Sizes (height, width) of references that are no squares of ``reference_size``; a batch holds one of them, and there
            are as many records of each.
        references_per_subject: References of each subject, different ones; where somebody on a photo has fewer, everybody on it has so few.
        max_references: Subjects of a record used at most; which ones is drawn anew every epoch.
        num_subjects: Take only records with exactly so many subjects; None takes all.
        mix_counts: Let a batch hold records of different numbers of subjects, padded; False keeps numbers apart.
        augmented: Whether augmented crops may serve as references; without them a subject that has no other is left out.
        drop_last: Leave out batches that are not full.
        seed: Of the order, the references and the crops.
        num_workers: Processes that read; 0 reads in this one.
    """

    batch: int = 8
    buckets: tuple[Size, ...] = ((512, 512),)
    reference_size: int = 320
    reference_shapes: tuple[Size, ...] | None = None
    references_per_subject: int = 1
    max_references: int = 8
    num_subjects: int | None = None
    mix_counts: bool = False
    augmented: bool = True
    drop_last: bool = True
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("batch", "reference_size", "references_per_subject", "max_references"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise UserError(f"num_workers must not be negative, got {self.num_workers}")
        for name, shapes in (("buckets", self.buckets), ("reference_shapes", self.references)):
            if not shapes or any(h < 1 or w < 1 for h, w in shapes):
                raise UserError(f"{name} must hold sizes (height, width), got {shapes}")

    @property
    def references(self) -> tuple[Size, ...]:
        """Sizes (height, width) of references."""
        square = (self.reference_size, self.reference_size)
        return (square,) if self.reference_shapes is None else self.reference_shapes


class Bucket(NamedTuple):
    """What the records of a batch have in common."""

    size: Size
    subjects: int
    """Zero where batches mix numbers."""
    references_per_subject: int
    reference: Size


class Batch(NamedTuple):
    """Padded to the largest number of subjects m: absent ones have zero masks and references, and ``present`` False. r / m show each."""

    images: Float[Tensor, "b 3 h w"]
    masks: Float[Tensor, "b m h w"]
    references: Float[Tensor, "b r 3 rh rw"]
    present: Bool[Tensor, "b m"]
    captions: list[str]
    identities: list[list[str]]
    keys: list[str]


class PhotoLoader:
    """Iterates for ever over the records of a split, epoch after epoch.

    The order of an epoch depends on seed and epoch only, what is drawn for a record on seed, epoch and key: neither on workers nor on where
    an iteration began. ``state_dict`` counts the batches handed out, so that `load_state_dict` goes on with the very next one.
    """

    def __init__(
        self, folder: str | Path, config: LoaderConfig, *, split: str = "train", rank: int = 0, world_size: int = 1
    ) -> None:
        """Opens a dataset; rank r of n gets every n-th batch.

        Raises:
            ValueError: No dataset, no usable record, or an impossible rank.
        """
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be in [0, world_size), got {rank} of {world_size}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.store = open_split(folder, split)
        self.rows = [(i, s) for i, r in enumerate(self.store.records) if (s := usable_subjects(r, config))]
        if not self.rows:
            asked = f" with {config.num_subjects} subjects" if config.num_subjects else ""
            asked += "" if config.augmented else " with references of other photos"
            raise UserError(f"{folder} must hold {split} records{asked}, got none")
        self._groups = self._by_bucket()
        self.batches_per_epoch = sum(self._number(len(rows)) for rows in self._groups.values()) // world_size
        if self.batches_per_epoch < 1:
            raise UserError(
                f"{folder} must fill a batch of {config.batch} on each of {world_size} ranks from one bucket, but {len(self.rows)} records "
                "do not; take a smaller batch, fewer buckets, or drop_last=False"
            )
        self.epoch = self.position = 0

    def _by_bucket(self) -> dict[Bucket, list[int]]:
        alike: dict[tuple[Size, int, int], list[int]] = {}
        for row, (index, subjects) in enumerate(self.rows):
            record = self.store.records[index]
            count = 0 if self.config.mix_counts else min(len(subjects), self.config.max_references)
            size = nearest_bucket(record["width"], record["height"], self.config.buckets)
            each = min(self.config.references_per_subject, *(len(s["references"]) for s in subjects))
            alike.setdefault((size, count, each), []).append(row)
        shapes = self.config.references
        groups = {
            Bucket(*key, shape): rows[i :: len(shapes)]
            for key, rows in sorted(alike.items())
            for i, shape in enumerate(shapes)
        }
        return {bucket: rows for bucket, rows in groups.items() if rows}

    def _number(self, records: int) -> int:
        return records // self.config.batch if self.config.drop_last else -(-records // self.config.batch)

    def plan(self, epoch: int) -> list[tuple[Bucket, list[int]]]:
        """This rank's batches of an epoch, as bucket and rows."""
        random = np.random.default_rng([self.config.seed, epoch])
        batches = []
        for bucket, rows in self._groups.items():
            shuffled = [rows[i] for i in random.permutation(len(rows))]
            size = self.config.batch
            batches += [(bucket, shuffled[i * size : (i + 1) * size]) for i in range(self._number(len(rows)))]
        order = random.permutation(len(batches))[: self.batches_per_epoch * self.world_size]
        return [batches[i] for i in order[self.rank :: self.world_size]]

    def read(self, epoch: int, bucket: Bucket, rows: Sequence[int]) -> Batch:
        """One batch."""
        config, each = self.config, bucket.references_per_subject
        draw = Draw(config.seed, epoch, config.max_references, bucket.reference, each)
        samples = [
            read_sample(self.store, self.store.records[index], subjects, bucket.size, draw)
            for index, subjects in (self.rows[row] for row in rows)
        ]
        most = max(len(s.identities) for s in samples)

        def padded(tensor: Tensor, length: int) -> Tensor:
            return torch.nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, length - len(tensor)])

        return Batch(
            torch.stack([s.image for s in samples]),
            torch.stack([padded(s.masks, most) for s in samples]),
            torch.stack([padded(s.references, most * each) for s in samples]),
            torch.stack([torch.arange(most) < len(s.identities) for s in samples]),
            [s.caption for s in samples],
            [s.identities for s in samples],
            [s.key for s in samples],
        )

    def __iter__(self) -> Iterator[Batch]:
        """From the current position on; the position moves when a batch is handed out."""
        for batch in self._stream():
            self.position += 1
            if self.position == self.batches_per_epoch:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _ahead(self) -> Iterator[tuple[int, Bucket, list[int]]]:
        """What to read from the current position on, for ever: epoch, bucket and rows."""
        start = self.position
        for epoch in itertools.count(self.epoch):
            for bucket, rows in self.plan(epoch)[start:]:
                yield epoch, bucket, rows
            start = 0

    def _stream(self) -> Iterator[Batch]:
        if self.config.num_workers == 0:
            yield from itertools.starmap(self.read, self._ahead())
            return
        from torch.utils.data import DataLoader

        loader: DataLoader[Batch] = DataLoader(  # one for all epochs: starting workers costs more than a short epoch
            _Reading(self), sampler=self._ahead(), batch_size=None, num_workers=self.config.num_workers, prefetch_factor=4,
            multiprocessing_context="fork",
        )  # fmt: skip
        yield from loader

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, and what that refers to."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.config.seed,
            "records": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch that was handed out.

        Raises:
            ValueError: The state is of other records, another seed, batch, bucket or rank count: there is no "same place".
        """
        if state["seed"] != self.config.seed or state["records"] != self._fingerprint():
            raise UserError("state must be of the same records, seed, batch, buckets and ranks, but these differ")
        if not 0 <= state["position"] < self.batches_per_epoch:
            raise UserError(f"position must be in [0, {self.batches_per_epoch}), got {state['position']}")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _fingerprint(self) -> str:
        config = self.config
        what = (
            config.batch,
            config.buckets,
            config.max_references,
            config.num_subjects,
            config.mix_counts,
            config.augmented,
            config.drop_last,
            self.world_size,
            # states of earlier versions, which knew squares and one reference only, stay what they were
            *([] if config.reference_shapes is None else [config.reference_shapes]),
            *([] if config.references_per_subject == 1 else [config.references_per_subject]),
        )
        keys = "".join(r["key"] for r in self.store.records)
        return hashlib.sha256(f"{what}{keys}".encode()).hexdigest()[:16]


class _Reading(torch.utils.data.Dataset[Batch]):
    """Epoch, bucket and rows -> batch, for the workers."""

    def __init__(self, loader: PhotoLoader) -> None:
        self.loader = loader

    def __getitem__(self, job: tuple[int, Bucket, list[int]]) -> Batch:
        return self.loader.read(*job)


def usable_subjects(record: Record, config: LoaderConfig) -> list[dict[str, Any]]:
    """The subjects of a record with the references that may be used; a record one of whose people falls out is not used at all."""
    if config.num_subjects not in (None, len(record["subjects"])):
        return []
    subjects = []
    for subject in record["subjects"]:
        references = [r for r in subject["references"] if config.augmented or not r["augmented"]]
        if not references:
            return []
        subjects.append({**subject, "references": references})
    return subjects


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect is nearest on a log scale."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (abs(math.log(b[1] / b[0]) - aspect), b))
