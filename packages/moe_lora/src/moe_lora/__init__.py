"""Sparse mixtures of LoRA experts that train, route and ship."""

from moe_lora import replay as route_replay
from moe_lora.config import Dispatch, Gating, MoELoRAConfig
from moe_lora.inject import MoELoRA, find_targets, inject
from moe_lora.layer import AuxLoss, MoELoRALayer
from moe_lora.routing import Routing, load_balance_loss, route, router_z_loss
from moe_lora.stats import RoutingStatistics, load_by_kind, mutual_information, routing_statistics

__version__ = "0.1.0"

__all__ = [
    "AuxLoss",
    "Dispatch",
    "Gating",
    "MoELoRA",
    "MoELoRAConfig",
    "MoELoRALayer",
    "Routing",
    "RoutingStatistics",
    "find_targets",
    "inject",
    "load_balance_loss",
    "load_by_kind",
    "mutual_information",
    "route",
    "route_replay",
    "router_z_loss",
    "routing_statistics",
]
