"""The signal of a run, from the gradients that it computes anyway: one number a line of the log, no extra pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from gspo.signal_estimators import random_walk_length, samples_needed


def flat_gradient(parameters: Sequence[torch.nn.Parameter], *, out: Tensor | None = None) -> Tensor:
    """All gradients in one fp32 vector, which is ``out`` where that is given; 0 where a parameter has none."""
    parts = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float() for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts], out=out)


class SignalLog:
    """Running estimates of `gradient_signal` from successive iterations, whose batches are independent and whose weights hardly differ.

    It keeps room for two gradients (and, with ``walk_window``, two copies of the trained weights), and takes two inner products an iteration.
    """

    def __init__(self, *, rate: float = 0.1, walk_window: int = 0, momentum: float = 0.0) -> None:
        """Estimates start as plain means and become exponential ones.

        Args:
            rate: Share of the newest iteration, in (0, 1].
            walk_window: Updates over which `walk_ratio` is measured, at least 2; 0 measures none.
            momentum: Of the optimizer (Adam's first beta), for `walk_ratio`.

        Raises:
            ValueError: rate, walk_window or momentum is out of range.
        """
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        if walk_window < 0 or walk_window == 1:
            raise ValueError(f"walk_window must be 0 or at least 2, got {walk_window}")
        random_walk_length(1, momentum)  # refuses what is out of range
        self.rate, self.walk_window, self.momentum = rate, walk_window, momentum
        self.means: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self._previous: Tensor | None = None
        self._spare: Tensor | None = None  # where the next gradient goes: new memory takes longer than copying into old
        self._previous_length = self._previous_norm = 0.0  # of the gradient that is kept, and before it was clipped
        self._before: list[Tensor] = []
        self._anchor: list[Tensor] = []
        self._path, self._steps = 0.0, 0

    def _average(self, name: str, value: float) -> None:
        count = self.counts.get(name, 0.0) + 1
        old = self.means.get(name, 0.0)
        self.means[name] = old + max(self.rate, 1 / count) * (value - old)
        self.counts[name] = count

    @torch.no_grad()
    def observe(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        num_samples: int,
        grad_norm: float | None = None,
        max_grad_norm: float | None = None,
    ) -> dict[str, float]:
        """Takes in the gradient that lies in the parameters; call it once an iteration, always at the same place of the loop.

        Args:
            parameters: The trained ones.
            num_samples: Samples that the gradient is a mean over.
            grad_norm: Its norm before clipping, if it has been clipped already.
            max_grad_norm: To count how often it is clipped.

        Returns:
            `summary`.
        """
        gradient = flat_gradient(parameters, out=self._room(parameters))
        length = float(gradient.norm())
        if not math.isfinite(length) or length == 0:
            self._spare = gradient
            return self.summary()
        norm = length if grad_norm is None else grad_norm
        if self._previous is not None and self._previous.shape == gradient.shape:
            cosine = float(gradient @ self._previous.to(gradient)) / length / self._previous_length
            self._average("cosine", cosine)
            self._average("product", cosine * norm * self._previous_norm)
        self._average("square", norm**2)
        self._average("samples", float(num_samples))
        if max_grad_norm is not None:
            self._average("clipped", float(norm > max_grad_norm))
            self._average("relative_norm", norm / max_grad_norm)
        self._spare = self._previous
        self._previous, self._previous_length, self._previous_norm = gradient, length, norm
        if self.walk_window:
            self._walk(parameters)
        return self.summary()

    def _room(self, parameters: Sequence[torch.nn.Parameter]) -> Tensor | None:
        """The spare vector, if it holds these gradients."""
        spare, size = self._spare, sum(p.numel() for p in parameters)
        fits = type(spare) is Tensor and len(spare) == size and spare.device == parameters[0].device
        return spare if fits else None

    def _walk(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        now = [p.detach() for p in parameters]
        if not self._before:
            self._before = [p.clone() for p in now]
            self._anchor = [p.clone() for p in now]
            return
        self._path += _squared_distance(now, self._before)
        self._steps += 1
        for kept, value in zip(self._before, now, strict=True):
            kept.copy_(value)
        if self._steps == self.walk_window:
            if self._path > 0:
                walked = _squared_distance(now, self._anchor)
                self.means["walk"] = walked / (self._path * random_walk_length(self._steps, self.momentum))
            for kept, value in zip(self._anchor, now, strict=True):
                kept.copy_(value)
            self._path, self._steps = 0.0, 0

    def summary(self) -> dict[str, float]:
        """What is known so far, to log.

        ``gradient_cosine``, ``signal_share`` and ``samples_for_half_cosine`` as in `gradient_signal` (NaN before the second gradient),
        ``clipped`` (share of updates shortened), ``relative_norm`` (mean norm over max_grad_norm), ``walk_ratio``.
        """
        means, nan = self.means, math.nan
        signal, square = means.get("product", nan), means.get("square", nan)
        known = math.isfinite(signal) and square > 0
        return {
            "gradient_cosine": means.get("cosine", nan),
            "signal_share": signal / square if known else nan,
            "samples_for_half_cosine": samples_needed(signal, square - signal, means["samples"]) if known else nan,
            "clipped": means.get("clipped", nan),
            "relative_norm": means.get("relative_norm", nan),
            "walk_ratio": means.get("walk", nan),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps, the last gradient and the copies of the weights too, so that a run resumed logs what one untouched logs."""
        numbers = {f"mean.{n}": v for n, v in self.means.items()} | {f"count.{n}": v for n, v in self.counts.items()}
        kept = {n: getattr(self, f"_{n}") for n in _COPIES}
        tensors = {f"{n}.{i}": t.clone() for n, copies in kept.items() for i, t in enumerate(copies)}
        if self._previous is not None:
            tensors["previous"] = self._previous.clone()
            numbers |= {"previous_norm": self._previous_norm, "previous_length": self._previous_length}
        if self._before:
            numbers |= {"path": self._path, "steps": float(self._steps)}
        return tensors | {n: torch.tensor(v, dtype=torch.float64) for n, v in sorted(numbers.items())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`; of a state without the last gradient (gspo 0.2 wrote none) the next one is the first."""
        for prefix, target in (("mean.", self.means), ("count.", self.counts)):
            target.clear()
            target.update({k.removeprefix(prefix): float(v) for k, v in state.items() if k.startswith(prefix)})
        self._previous = state["previous"].clone() if "previous" in state else None
        self._previous_norm = float(state.get("previous_norm", 0.0))
        self._previous_length = float(state.get("previous_length", 1.0))  # before, a unit vector was kept
        self._before, self._anchor = ([state[k].clone() for k in _numbered(state, n)] for n in _COPIES)
        self._path, self._steps = float(state.get("path", 0.0)), int(state.get("steps", 0))


_COPIES = ("before", "anchor")


def _numbered(state: Mapping[str, Tensor], name: str) -> list[str]:
    """The keys ``name.0``, ``name.1``, ..., in order."""
    return sorted((k for k in state if k.startswith(f"{name}.")), key=lambda k: int(k.rpartition(".")[2]))


def _squared_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of all tensors together; what a checkpoint brought may be on another device."""
    pairs = ((a.float(), b.to(a.device).float()) for a, b in zip(one, other, strict=True))
    return float(torch.stack([mse_loss(a, b, reduction="sum") for a, b in pairs]).sum())
