"""Attention supervision by subject masks (IDAR, arXiv 2509.21953), and a microscope for attribute leakage."""

from idar.attention import Direction, Span, stratified_subset, subject_attention
from idar.capture import CapturedMaps, capture_attention, stack_blocks
from idar.integrations.watching import Watched, watch
from idar.layout import SubjectLayout
from idar.loss import IDARLoss, LossKind, idar_loss, sigma_weight
from idar.masks import Fit, Normalization, box_masks, map_boxes, normalize_maps, owner_masks, token_masks
from idar.metrics import AttentionProfile, attention_profile, leakage, map_iou, map_overlap, peak_in_mask
from idar.separate import Separation, separate_attention
from idar.separation import ARROWS, SUBJECT_ARROWS, Arrow, Background, attention_owners, separation_bias

__version__ = "0.2.0"

__all__ = [
    "ARROWS",
    "SUBJECT_ARROWS",
    "Arrow",
    "AttentionProfile",
    "Background",
    "CapturedMaps",
    "Direction",
    "Fit",
    "IDARLoss",
    "LossKind",
    "Normalization",
    "Separation",
    "Span",
    "SubjectLayout",
    "Watched",
    "attention_owners",
    "attention_profile",
    "box_masks",
    "capture_attention",
    "idar_loss",
    "leakage",
    "map_boxes",
    "map_iou",
    "map_overlap",
    "normalize_maps",
    "owner_masks",
    "peak_in_mask",
    "separate_attention",
    "separation_bias",
    "sigma_weight",
    "stack_blocks",
    "stratified_subset",
    "subject_attention",
    "token_masks",
    "watch",
]
