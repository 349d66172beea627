"""Identity rewards by Hungarian matching, with text and aesthetic rewards."""

from id_reward.aggregate import CompositeReward, CompositeScore, as_composite
from id_reward.alignment import (
    CONVENTIONS,
    IdentityScore,
    box_overlap,
    copy_paste,
    cosine_similarity,
    multi_id_alignment_reward,
    off_pair_similarity,
    placed_confusion,
    score_similarity,
    swap_matrix,
    swap_rate,
)
from id_reward.backends.faces import get_face_backend
from id_reward.identity import IdentityScorer, OffPairSimilarity
from id_reward.matching import Matching, match
from id_reward.metrics import Evaluation, Evaluator, id_confidence
from id_reward.protocols import FaceBackend, Faces, Scorer

__version__ = "0.2.0"

__all__ = [
    "CONVENTIONS",
    "CompositeReward",
    "CompositeScore",
    "Evaluation",
    "Evaluator",
    "FaceBackend",
    "Faces",
    "IdentityScore",
    "IdentityScorer",
    "Matching",
    "OffPairSimilarity",
    "Scorer",
    "as_composite",
    "box_overlap",
    "copy_paste",
    "cosine_similarity",
    "get_face_backend",
    "id_confidence",
    "match",
    "multi_id_alignment_reward",
    "off_pair_similarity",
    "placed_confusion",
    "score_similarity",
    "swap_matrix",
    "swap_rate",
]
