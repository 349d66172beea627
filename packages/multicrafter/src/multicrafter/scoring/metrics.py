"""Scores of one picture, every convention by name: pure functions of embeddings, faces and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from id_reward import Faces, copy_paste, cosine_similarity, score_similarity, swap_matrix
from id_reward.alignment import box_overlap, placed_confusion, swap_rate
from jaxtyping import Float

Metric = Mapping[str, float]
NAN = float("nan")


class Description(NamedTuple):
    """What a metric says; whether more is better (None: neither)."""

    text: str
    better: str | None = "more"


METRICS: dict[str, Description] = {
    "clip_t": Description("CLIP-T: cosine of picture and prompt (CLIP)"),
    "clip_i": Description("CLIP-I: cosine of the whole picture with each reference, mean (CLIP; DreamBench's and UNO's way)"),
    "dino_i": Description("DINO-I: the same with DINO features"),
    "clip_i_matched": Description("CLIP-I of crops: each reference's head with that of the face matched to it; a missing face counts 0"),
    "dino_i_matched": Description("DINO-I of crops: the same with DINO features"),
    "face_sim": Description("Face-Sim: best one-to-one matching of faces, sum of cosines over the number of references, a missing one 0"),
    "id_xverse": Description("XVerseBench's ID-Sim: best face of each reference, one face may serve several (times 100 in its tables)"),
    "id_multihuman": Description("MultiHuman-Testbench: optimal matching, sum over the number of references, negative cosines count"),
    "id_multiid": Description("MultiID-Bench: the same, but only of pictures with as many faces as references: mind its number of cases"),
    "id_umo": Description("UMO's MIMR: matched cosines minus all others, mean over the matrix; a missing face is not punished"),
    "id_omnicontext": Description(
        "OmniContext-style: sqrt(PF x SC), 0 to 10, with PF = 10 CLIP-T and SC = 10 Face-Sim; its own judge is GPT-4.1: not comparable"
    ),
    "vlm_pf": Description("OmniContext's prompt following by a local vision-language judge, 0 to 10"),
    "vlm_sc": Description("OmniContext's subject consistency by the same judge, 0 to 10"),
    "vlm_overall": Description("sqrt(PF x SC) of the same judge"),
    "aes": Description("AES: the aesthetic scorer named above (paper: HPSv2)"),
    "count": Description("count accuracy: as many faces as people asked for"),
    "missing": Description("references without a face, share", "less"),
    "extra": Description("faces beyond the people asked for, per picture", "less"),
    "copy_paste": Description("copy-paste (MultiID-Bench): 1 a copy of the reference, -1 the target itself; needs targets", "less"),
    "swap_rate": Description(
        "faces more like another reference than like their own: by place where boxes were asked for, else by matching", "less"
    ),
}  # fmt: skip


def identity_metrics(similarity: Float[np.ndarray, "r f"], *, people: int) -> dict[str, float]:
    """All identity conventions of a matrix of cosines: references r (at least one) by faces f of the picture."""
    references, faces = similarity.shape
    ours = score_similarity(similarity)
    return {
        "face_sim": ours.reward,
        "id_xverse": score_similarity(similarity, convention="xverse").reward,
        "id_multihuman": score_similarity(similarity, convention="multihuman").reward,
        "id_multiid": score_similarity(similarity, convention="withanyone").reward,
        "id_umo": score_similarity(similarity, convention="umo").reward,
        "missing": len(ours.matching.unmatched_references) / references,
        **count_metrics(faces, people),
    }


def count_metrics(faces: int, people: int) -> dict[str, float]:
    """Count accuracy and faces too many."""
    return {"count": float(faces == people), "extra": float(max(0, faces - people))}


def swaps(
    similarity: Float[np.ndarray, "r f"],
    faces: Float[np.ndarray, "f 4"],
    asked: Sequence[Sequence[float] | None],
    size: tuple[int, int],
) -> float:
    """Swap rate of a picture with at least two references; NaN with fewer, or where nobody was painted.

    Where a box was asked for every reference (shares of width and height), faces belong to places; otherwise to whom the matching by looks
    gives them, which cannot see two people who traded places but sees one who looks like another.
    """
    if len(similarity) < 2 or not len(faces):
        return NAN
    if any(box is None for box in asked):
        return swap_rate(swap_matrix(similarity))
    scale = np.array([*size, *size], np.float64)
    places = np.array([box for box in asked if box is not None], np.float64) * scale
    # a face is smaller than the body's box: count how much of the face lies in the box rather than their IoU
    shares = np.array([[_inside(face, place) for face in faces] for place in places])
    return swap_rate(placed_confusion(similarity, shares + 1e-3 * box_overlap(places, faces)))


def _inside(face: np.ndarray, place: np.ndarray) -> float:
    w = min(face[2], place[2]) - max(face[0], place[0])
    h = min(face[3], place[3]) - max(face[1], place[1])
    area = (face[2] - face[0]) * (face[3] - face[1])
    return float(max(w, 0) * max(h, 0) / area) if area > 0 else 0.0


def copy_paste_metric(
    references: Float[np.ndarray, "r d"], generated: Float[np.ndarray, "f d"], target: Float[np.ndarray, "t d"]
) -> float:
    """Mean copy-paste over the references found both in the picture and in the target; NaN if there is none."""
    if not len(generated) or not len(target):
        return NAN
    painted = dict(score_similarity(cosine_similarity(references, generated)).matching.pairs)
    real = dict(score_similarity(cosine_similarity(references, target)).matching.pairs)
    values = [copy_paste(generated[painted[r]], target[real[r]], references[r]) for r in painted.keys() & real.keys()]
    return float(np.mean(values)) if values else NAN


def omnicontext(prompt_following: float, subject_consistency: float) -> float:
    """``sqrt(PF x SC)`` per picture (OmniContext, arXiv 2506.18871): either at 0 makes it 0.

    >>> omnicontext(9.0, 4.0)
    6.0
    """
    return float(np.sqrt(max(prompt_following, 0.0) * max(subject_consistency, 0.0)))


def mean_similarity(picture: Float[np.ndarray, " d"], references: Float[np.ndarray, "r d"]) -> float:
    """Mean cosine of a picture with its references; NaN without any."""
    return float(cosine_similarity(references, picture[None]).mean()) if len(references) else NAN


def matched_similarity(
    references: Float[np.ndarray, "r d"], crops: Float[np.ndarray, "f d"], pairs: Sequence[tuple[int, int]]
) -> float:
    """Sum of the cosines of matched crops over the number of references; a missing one counts 0."""
    if not len(references):
        return NAN
    return sum(float(cosine_similarity(references[r][None], crops[f][None])[0, 0]) for r, f in pairs) / len(references)


def head_box(face: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The crop compared by `matched_similarity`: a square of 1.8 times the face, inside the picture."""
    left, top, right, bottom = face
    side = min(1.8 * max(right - left, bottom - top), *size)
    x = float(np.clip((left + right - side) / 2, 0, size[0] - side))
    y = float(np.clip((top + bottom - side) / 2, 0, size[1] - side))
    return (round(x), round(y), max(round(x + side), round(x) + 1), max(round(y + side), round(y) + 1))


def largest_face(faces: Faces) -> int | None:
    """Index of the largest face, or None."""
    if not len(faces.boxes):
        return None
    return int((faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1).argmax())
