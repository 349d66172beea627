"""A second set of weights that follows the first: the old policy of DiffusionNFT, or the averaged weights that are saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gspo.checks import check_real
from gspo.inputs import require_tensor


class MovingAverage:
    """``average <- decay * average + (1 - decay) * parameters``, kept in fp32 beside the parameters.

    Attributes:
        values: The average, one tensor per parameter.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Starts at the parameters."""
        self.parameters = list(parameters)
        self.values = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """One step towards the parameters.

        Args:
            decay: In [0, 1]; 0 copies, 1 stays.

        Raises:
            ValueError: decay is outside.
        """
        check_real("decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        if decay == 0:
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter)  # exactly
        elif self.values:
            now = [p.detach().float() for p in self.parameters]
            get_ema_multi_avg_fn(decay)(self.values, now, 0)  # type: ignore[no-untyped-call]

    @property
    def is_current(self) -> bool:
        """Whether the average is what the parameters are, bit for bit."""
        pairs = zip(self.values, self.parameters, strict=True)
        return all(torch.equal(value.to(parameter.dtype), parameter.detach()) for value, parameter in pairs)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the average; afterwards they are what they were, whatever happened inside.

        Values are copied in place, so that an optimizer, DDP and hooks keep their parameters. A graph that was built outside must not be
        differentiated inside or after: its saved weights have been written to.
        """
        kept = [p.detach().clone() for p in self.parameters]
        try:
            self._write(self.values)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the parameter's position: "0", "1", ..."""
        return {str(i): value.clone() for i, value in enumerate(self.values)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: Another number of tensors, another shape, or NaN; nothing has changed then.
        """
        if not isinstance(state, dict):
            raise ValueError(f"state must be a dictionary as state_dict() gives it, got {type(state).__name__}")
        for name, tensor in state.items():
            require_tensor(**{f"state['{name}']": tensor})
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"state['{name}'] must be finite, got NaN or infinity")
        shapes = {str(i): tuple(value.shape) for i, value in enumerate(self.values)}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != found:
            raise ValueError(f"state must hold the average of {len(shapes)} parameters {shapes}, got {found}")
        for i, value in enumerate(self.values):
            value.copy_(state[str(i)].to(value.device))
