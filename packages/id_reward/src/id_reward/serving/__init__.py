"""A scorer behind HTTP, so that trainers on many machines share one: ``id-reward serve``, and `RemoteScorer` as its client.

The server is the standard library's. Nothing that comes over the wire is unpickled, and no path in a request is opened.
"""

from id_reward.serving.client import RemoteScorer, ScorerUnavailable
from id_reward.serving.messages import Limits
from id_reward.serving.server import ScorerServer

__all__ = ["Limits", "RemoteScorer", "ScorerServer", "ScorerUnavailable"]
