"""Sparse mixtures of LoRA experts that train, route and ship."""

from moe_lora import replay as route_replay
from moe_lora.balance import load_balance_loss, router_z_loss
from moe_lora.config import Dispatch, Gating, MoELoRAConfig
from moe_lora.dispatch import experts
from moe_lora.export import Approximation, LowRank, approximate, save_peft_lora, to_lora
from moe_lora.inject import MoELoRA, find_targets, inject, inject_saved
from moe_lora.layer import Mixture, MoELoRALayer, mixture
from moe_lora.replay import RouteRecord
from moe_lora.routing import Routing, gate_logits, route
from moe_lora.state import AuxLoss, RoutingState
from moe_lora.stats import (
    RoutingLog,
    RoutingStatistics,
    Specialisation,
    collect,
    load_by_kind,
    mutual_information,
    routing_statistics,
    specialisation,
)

__version__ = "0.2.0"

__all__ = [
    "Approximation",
    "AuxLoss",
    "Dispatch",
    "Gating",
    "LowRank",
    "Mixture",
    "MoELoRA",
    "MoELoRAConfig",
    "MoELoRALayer",
    "RouteRecord",
    "Routing",
    "RoutingLog",
    "RoutingState",
    "RoutingStatistics",
    "Specialisation",
    "approximate",
    "collect",
    "experts",
    "find_targets",
    "gate_logits",
    "inject",
    "inject_saved",
    "load_balance_loss",
    "load_by_kind",
    "mixture",
    "mutual_information",
    "route",
    "route_replay",
    "router_z_loss",
    "routing_statistics",
    "save_peft_lora",
    "specialisation",
    "to_lora",
]
