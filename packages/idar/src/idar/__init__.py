"""Attention supervision by subject masks (IDAR, arXiv 2509.21953), and a microscope for attribute leakage."""

from idar.attention import Direction, Span, stratified_subset, subject_attention
from idar.capture import CapturedMaps, SubjectLayout
from idar.loss import IDARLoss, LossKind, idar_loss
from idar.masks import Normalization, normalize_maps, token_masks
from idar.metrics import leakage, map_iou, peak_in_mask

__version__ = "0.1.0"

__all__ = [
    "CapturedMaps",
    "Direction",
    "IDARLoss",
    "LossKind",
    "Normalization",
    "Span",
    "SubjectLayout",
    "idar_loss",
    "leakage",
    "map_iou",
    "normalize_maps",
    "peak_in_mask",
    "stratified_subset",
    "subject_attention",
    "token_masks",
]
