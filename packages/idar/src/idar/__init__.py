"""Attention supervision by subject masks (IDAR, arXiv 2509.21953), and a microscope for attribute leakage."""

from idar.attention import Direction, Span, stratified_subset, subject_attention
from idar.capture import CapturedMaps, SubjectLayout, capture_attention, stack_blocks
from idar.loss import IDARLoss, LossKind, idar_loss, sigma_weight
from idar.masks import Fit, Normalization, normalize_maps, token_masks
from idar.metrics import AttentionProfile, attention_profile, leakage, map_iou, map_overlap, peak_in_mask

__version__ = "0.1.0"

__all__ = [
    "AttentionProfile",
    "CapturedMaps",
    "Direction",
    "Fit",
    "IDARLoss",
    "LossKind",
    "Normalization",
    "Span",
    "SubjectLayout",
    "attention_profile",
    "capture_attention",
    "idar_loss",
    "leakage",
    "map_iou",
    "map_overlap",
    "normalize_maps",
    "peak_in_mask",
    "sigma_weight",
    "stack_blocks",
    "stratified_subset",
    "subject_attention",
    "token_masks",
]
