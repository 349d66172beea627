"""Identity rewards by Hungarian matching, with text and aesthetic rewards."""

from id_reward.aggregate import CompositeReward, CompositeScore, IdentityScorer
from id_reward.alignment import (
    IdentityScore,
    copy_paste,
    cosine_similarity,
    multi_id_alignment_reward,
    score_similarity,
    swap_matrix,
)
from id_reward.backends.faces import get_face_backend
from id_reward.matching import Matching, match
from id_reward.protocols import FaceBackend, Faces, Scorer

__version__ = "0.1.0"

__all__ = [
    "CompositeReward",
    "CompositeScore",
    "FaceBackend",
    "Faces",
    "IdentityScore",
    "IdentityScorer",
    "Matching",
    "Scorer",
    "copy_paste",
    "cosine_similarity",
    "get_face_backend",
    "match",
    "multi_id_alignment_reward",
    "score_similarity",
    "swap_matrix",
]
