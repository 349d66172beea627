"""Metrics of the papers, in one evaluator, side by side by convention.

| name | what it is |
|---|---|
| Face-Sim | mean over references of the matched face's cosine, a missing face counts 0 (MultiCrafter, arXiv 2509.21953; "multihuman") |
| ID-Sim | mean over references of the best face's cosine, not exclusive (XVerseBench, arXiv 2506.21416) |
| ID-Conf | how far each reference prefers one face: mean over references of ``(first - second) / first`` (UMO, arXiv 2509.06818) |
| count | share of pictures with exactly as many faces as references (MultiHuman-Testbench, arXiv 2506.20879) |
| swaps | share of matched faces that are more like another reference than like their own |
| copy-paste | see `id_reward.copy_paste` (WithAnyone, arXiv 2510.14975); needs targets |
| CLIP-T | cosine of picture and prompt |
| CLIP-I, DINO-I | cosine of picture and reference, mean over references (DreamBooth, arXiv 2208.12242) |
| AES | HPSv2 score (MultiCrafter), or what scorer is given |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from id_reward.alignment import CONVENTIONS, copy_paste, cosine_similarity, score_similarity, swap_matrix, swap_rate
from id_reward.errors import InputError
from id_reward.floats import as_floats, part_values
from id_reward.identity import IdentityScorer
from id_reward.inputs import listed_batch, listed_references, row_keys
from id_reward.matching import check_similarity, match
from id_reward.protocols import Scorer
from id_reward.shapes import Float

PictureEmbedder = Callable[[Sequence[Any]], Float[np.ndarray, "b d"]]


def id_confidence(similarity: Float[np.ndarray, "r f"]) -> float:
    """``mean over references of min(1, (first - second) / first)``, first and second the largest two cosines of a reference with the faces.

    1: every reference is one face's alone; 0: two faces are equally like it, or none is (first at most 0). NaN with fewer than two faces:
    there is nothing to confuse. ID-Conf of UMO (arXiv 2509.06818; as its evaluation computes it).

    >>> round(id_confidence(np.array([[0.8, 0.4], [0.0, 0.5]])), 3)
    0.75

    Raises:
        ValueError: The matrix is none, or not finite.
    """
    matrix = check_similarity(similarity)
    if not len(matrix) or matrix.shape[1] < 2:
        return float("nan")
    second, first = np.sort(matrix, axis=1)[:, -2:].T
    margin = np.divide(first - second, first, out=np.zeros_like(first), where=first > 0)
    return float(np.minimum(margin, 1.0).mean())


def mean_reference_cosine(
    pictures: Float[np.ndarray, "b d"], references: Sequence[Float[np.ndarray, "_ d"]]
) -> Float[np.ndarray, " b"]:
    """``mean over the picture's references of cos(picture, reference)``: CLIP-I and DINO-I; NaN without references."""
    return np.array(
        [
            float(cosine_similarity(given, picture[None]).mean()) if len(given) else np.nan
            for picture, given in zip(pictures, references, strict=True)
        ]
    )


class Evaluation(NamedTuple):
    """values: name -> (b,), one number per picture, NaN where it does not apply; conventions: the identity reward by convention."""

    values: dict[str, Float[np.ndarray, " b"]]
    conventions: dict[str, Float[np.ndarray, " b"]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, standard error and number of pictures of every metric; how many had to be left out stands beside it."""
        result = {}
        for name, column in {**self.values, **{f"id/{k}": v for k, v in self.conventions.items()}}.items():
            known = column[np.isfinite(column)]
            spread = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
            result[name] = {
                "mean": float(known.mean()) if len(known) else float("nan"),
                "standard_error": float(spread),
                "pictures": len(known),
                "left_out": len(column) - len(known),
            }
        return result

    def table(self) -> str:
        """The summary as Markdown."""
        lines = ["| metric | mean | standard error | pictures | left out |", "|---|---|---|---|---|"]
        for name, row in self.summary().items():
            lines.append(
                f"| {name} | {row['mean']:.4f} | {row['standard_error']:.4f} | {row['pictures']:.0f} | {row['left_out']:.0f} |"
            )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Computes whatever its parts allow.

    Attributes:
        identity: Gives Face-Sim, ID-Sim, ID-Conf, count, swaps, copy-paste and the conventions.
        text: CLIP-T, a scorer.
        aesthetics: AES, a scorer.
        clip_pictures: CLIP-I, for example ``encoder.embed_pictures``.
        dino_pictures: DINO-I, for example `DinoEmbedder.embed`.
        others: More scorers, by name.
    """

    identity: IdentityScorer | None = None
    text: Scorer | None = None
    aesthetics: Scorer | None = None
    clip_pictures: PictureEmbedder | None = None
    dino_pictures: PictureEmbedder | None = None
    others: Mapping[str, Scorer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any((self.identity, self.text, self.aesthetics, self.clip_pictures, self.dino_pictures, self.others)):
            raise InputError("an evaluator must have at least one part, got none")

    def __call__(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        references: Sequence[Sequence[Any]],
        targets: Sequence[Sequence[Any]] | None = None,
    ) -> Evaluation:
        """Evaluates pictures.

        Args:
            images: Generated pictures.
            prompts: One each.
            references: The references of each picture.
            targets: For copy-paste: another photo of each reference's person, in the same order.

        Raises:
            ValueError: Lengths differ.
        """
        images, prompts, references = listed_batch(images, prompts, references)
        targets = None if targets is None else listed_references(targets, len(images), "targets")
        values: dict[str, np.ndarray] = {}
        conventions: dict[str, np.ndarray] = {}
        if self.identity is not None:
            values, conventions = self._identity(self.identity, images, references, targets)
        scorers = {"CLIP-T": self.text, "AES": self.aesthetics, **self.others}
        for name, scorer in scorers.items():
            if scorer is not None:
                values[name] = part_values(scorer(images, prompts, references), name, len(images))
        for name, embed in (("CLIP-I", self.clip_pictures), ("DINO-I", self.dino_pictures)):
            if embed is not None:
                keys = row_keys(references)
                unique = {key: r for mine, given in zip(keys, references) for key, r in zip(mine, given)}
                known = dict(zip(unique, as_floats(embed(list(unique.values()))))) if unique else {}
                rows = [np.array([known[key] for key in mine]) for mine in keys]
                values[name] = mean_reference_cosine(as_floats(embed(images)), rows)
        return Evaluation(values, conventions)

    @staticmethod
    def _identity(
        scorer: IdentityScorer,
        images: Sequence[Any],
        references: Sequence[Sequence[Any]],
        targets: Sequence[Sequence[Any]] | None,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Everything that follows from who is like whom."""
        names = ("Face-Sim", "ID-Sim", "ID-Conf", "count", "swaps", *(("copy-paste",) if targets is not None else ()))
        values: dict[str, np.ndarray] = {name: np.full(len(images), np.nan) for name in names}
        conventions: dict[str, np.ndarray] = {name: np.full(len(images), np.nan) for name in CONVENTIONS}
        for row, ((score, faces), given) in enumerate(zip(scorer.inspect(images, references), references, strict=True)):
            if score is None:
                continue
            known = scorer.embed_references(given)
            found = faces.embeddings
            cosine = cosine_similarity(known, found).reshape(len(known), len(found))
            for name in CONVENTIONS:
                conventions[name][row] = score_similarity(
                    cosine,
                    convention=name,
                    missing_penalty=scorer.missing_penalty,
                    extra_penalty=scorer.extra_penalty,
                    min_similarity=scorer.min_similarity,
                    off_pair_penalty=scorer.off_pair_penalty,
                    among_references=cosine_similarity(known, known) if scorer.off_pair_penalty else None,
                ).reward
            values["Face-Sim"][row] = conventions["multihuman"][row]
            values["ID-Sim"][row] = conventions["xverse"][row]
            values["ID-Conf"][row] = id_confidence(cosine)
            values["count"][row] = float(len(found) == len(known))
            values["swaps"][row] = swap_rate(swap_matrix(cosine))
            if targets is not None:
                wanted = scorer.embed_references(targets[row])
                if len(wanted) != len(known):
                    raise InputError(
                        f"targets must match references ({len(known)}), got {len(wanted)} for picture {row}"
                    )
                pasted = [
                    copy_paste(found[face], wanted[reference], known[reference])
                    for reference, face in match(cosine).pairs
                    if np.isfinite(wanted[reference]).all()
                ]
                values["copy-paste"][row] = float(np.mean(pasted)) if pasted else np.nan
        return values, conventions
