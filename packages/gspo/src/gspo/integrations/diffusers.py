"""Any diffusers flow-matching pipeline as a policy: FLUX, SD3, Qwen-Image, and others that denoise through ``self.scheduler``.

A pipeline's ``__call__`` knows how to call its transformer (guidance, position ids, references, classifier-free guidance) and how
to decode. Instead of writing that down once per model, `PipelinePolicy` runs ``__call__`` itself with a scheduler that stops it
where something is to be taken out: the velocity before the first step, the noise levels of a schedule, the prepared noise. So what
is trained is what the pipeline samples with, to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _Stop(Exception):
    """Carries out of the pipeline what was wanted."""

    def __init__(self, value: Any) -> None:
        super().__init__("stopped by gspo.integrations.diffusers")
        self.value = value


class _Scheduler:
    """Stands in for a pipeline's scheduler: ``timesteps`` are given, and a step stops the pipeline with its velocity."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, original: Any, sigmas: Sequence[float] | None) -> None:
        self.original, self.config = original, original.config
        self.levels = sigmas
        self.timesteps = torch.zeros(0)
        self.sigmas = torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
        **options: Any,
    ) -> None:
        """Sets the wanted levels; or, without, lets the pipeline's own scheduler work out its schedule and stops with that."""
        if self.levels is None:
            given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps, **options}
            given = {k: v for k, v in given.items() if v is not None}
            if "sigmas" not in given:
                given["num_inference_steps"] = num_inference_steps
            self.original.set_timesteps(device=device, **given)
            raise _Stop(torch.as_tensor(self.original.sigmas).float().cpu())
        self.sigmas = torch.tensor([*self.levels, 0.0], device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one step at most."""

    def scale_model_input(self, sample: Tensor, *_: Any) -> Tensor:
        """Flow models take latents as they are."""
        return sample

    def step(self, model_output: Tensor, *_: Any, **__: Any) -> None:
        """Stops the pipeline with its velocity, after all guidance."""
        raise _Stop(model_output)


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _require_flow(scheduler: Any) -> None:
    """Refuses a scheduler whose noise levels and predictions are not a flow's."""
    config = scheduler.config
    flow = _name(scheduler).startswith("FlowMatch")
    flow = flow or (config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction")
    if not flow:
        raise ValueError(
            "pipe.scheduler must be one of flow matching (FlowMatchEulerDiscreteScheduler, or UniPC or DPM-Solver with "
            f"use_flow_sigmas=True and prediction_type='flow_prediction'), got {_name(scheduler)}"
        )


Encoded = list[Any]


def _rows(value: Any, index: Tensor) -> Any:
    """Rows of a tensor or a list."""
    return value[index.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]


class PipelinePolicy:
    """A diffusers pipeline and some prompts, as ``velocity_fn`` of `gspo.rollout` and everything around it.

    Needs ``pip install "gspo[diffusers]"``. Prompts are encoded once. Gradients flow through the transformer; which of its
    parameters are trained is the caller's choice (for example ``pipe.transformer.add_adapter(LoraConfig(...))``).

    Example (``pipe`` is any FLUX, SD3 or Qwen-Image pipeline)::

        policy = PipelinePolicy(pipe, ["a red fox", "a blue bird"], height=512, width=512, guidance_scale=3.5)
        sigmas = policy.sigmas(16)
        drawn = rollout(policy, policy.noise(generator), sigmas, kernel=FlowSDE(), window=(0, 1), group_size=8)
        pictures = policy.decode(drawn.latents, drawn.index)
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        per_prompt: Mapping[str, Sequence[Any] | Tensor] | None = None,
        **call: Any,
    ) -> None:
        """Encodes the prompts.

        Args:
            pipe: A pipeline whose ``__call__`` takes ``prompt``, ``latents`` and ``output_type`` and steps ``self.scheduler``.
            prompts: One per row of the noise.
            per_prompt: Arguments of ``__call__`` with one entry per prompt (negative prompts, reference pictures).
            call: Arguments of ``__call__`` that are the same for all prompts: height, width, guidance_scale, ...

        Raises:
            ValueError: There is no prompt, an argument has another length, is unknown to the pipeline, or is set by this class; or the
                pipeline's scheduler is none of flow matching.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of prompts, got the string {prompts!r}; write [{prompts!r}]")
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        _require_flow(pipe.scheduler)
        self.pipe, self.prompts, self.call = pipe, list(prompts), dict(call)
        self.per_prompt = dict(per_prompt or {})
        negative = self.call.pop("negative_prompt", None)
        if isinstance(negative, str):
            self.per_prompt["negative_prompt"] = [negative] * len(prompts)
        elif negative is not None:
            self.per_prompt["negative_prompt"] = list(negative)
        for name, values in self.per_prompt.items():
            if isinstance(values, str):
                raise ValueError(f"per_prompt[{name!r}] must be a list, got the string {values!r}; give it as {name}=")
            if len(values) != len(prompts):
                raise ValueError(
                    f"per_prompt[{name!r}] must have one entry per prompt ({len(prompts)}), got {len(values)}"
                )
        known = set(inspect.signature(self._function()).parameters)
        own = {"prompt", "latents", "output_type", "return_dict", "num_inference_steps", "sigmas", "timesteps"}
        for name in (*self.call, *self.per_prompt):
            if name not in known or name in own:
                raise ValueError(
                    f"{name} must be an argument of {type(pipe).__name__} that gspo does not set, got it anyway"
                )
        everyone = torch.arange(len(prompts))
        self._encoded = self._encode(everyone)
        one, two = self._encode(everyone[:1]), self._encode(everyone[:1].repeat(2))
        self._per_row = [
            [self._grows(a, b, c) for a, b, c in zip(x, y, z, strict=True)]
            for x, y, z in zip(one, two, self._encoded, strict=True)
        ]

    def _grows(self, one: Any, two: Any, full: Any) -> bool:
        """Whether an output of encode_prompt has one row per prompt (FLUX's text ids have not)."""
        if not isinstance(full, Tensor):
            return False
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            return one.shape[0] != two.shape[0]
        return len(full) == len(self.prompts)

    def _function(self) -> Callable[..., Any]:
        """The pipeline's ``__call__`` without ``torch.no_grad``."""
        function: Callable[..., Any] = inspect.unwrap(type(self.pipe).__call__)
        return function

    @contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        """The pipeline with other attributes, past its bookkeeping of components."""
        own = vars(self.pipe)
        before = {name: own[name] for name in attributes if name in own}
        own.update(attributes)
        try:
            yield
        finally:
            for name in attributes:
                own.pop(name)
            own.update(before)

    def _run(
        self,
        index: Tensor,
        sigmas: Sequence[float] | None,
        *,
        encode: Callable[..., Any] | None = None,
        num_inference_steps: int = 1,
        **call: Any,
    ) -> Any:
        """Runs the pipeline for these prompts, at these levels; returns what stopped it, or its result."""
        attributes: dict[str, Any] = {
            "scheduler": _Scheduler(self.pipe.scheduler, sigmas),
            "_progress_bar_config": {"disable": True},
            "encode_prompt": encode or self._recall(index),
        }
        rows = {name: _rows(values, index) for name, values in self.per_prompt.items()}
        with self._replaced(**attributes):
            try:
                return self._function()(
                    self.pipe,
                    prompt=_rows(self.prompts, index),
                    num_inference_steps=num_inference_steps,
                    return_dict=False,
                    **self.call,
                    **rows,
                    **call,
                )
            except _Stop as stop:
                return stop.value

    def _encode(self, index: Tensor) -> list[Encoded]:
        """What every call of ``encode_prompt`` returns for these prompts, one list of outputs per call."""
        outputs: list[Encoded] = []
        original = self.pipe.encode_prompt

        def record(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            outputs.append(list(result))
            return result

        with torch.no_grad():
            self._run(index, None, encode=record)
        return outputs

    def _recall(self, index: Tensor) -> Callable[..., Any]:
        """An ``encode_prompt`` that returns the recorded embeddings of these rows."""
        calls = iter(zip(self._encoded, self._per_row, strict=True))

        def recall(*_: Any, **__: Any) -> Any:
            encoded, per_row = next(calls)
            return tuple(_rows(v, index) if rows else v for v, rows in zip(encoded, per_row, strict=True))

        return recall

    def sigmas(self, num_steps: int) -> Float[Tensor, " t"]:
        """The pipeline's own noise levels for so many steps, shift included: ``num_steps + 1`` numbers from 1 to 0.

        Raises:
            ValueError: num_steps < 1, or the scheduler's levels do not fall from 1 to 0 (it takes two evaluations a step, say).
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        with torch.no_grad():
            levels: Tensor = self._run(torch.arange(1), None, num_inference_steps=num_steps)
        if not bool((levels[1:] < levels[:-1]).all()) or float(levels[0]) > 1 or float(levels[-1]) < 0:
            raise ValueError(
                "pipe.scheduler must have one noise level a step, falling from 1 to 0, got "
                f"{[round(x, 4) for x in levels.tolist()]} from {_name(self.pipe.scheduler)}"
            )
        return levels

    @torch.no_grad()
    def noise(self, generator: torch.Generator | None = None) -> Float[Tensor, "p ..."]:
        """One start per prompt, in the pipeline's (packed) form, fp32."""
        index = torch.arange(len(self.prompts))
        (latents,) = self._run(index, (), generator=generator, output_type="latent")
        return latents.float()  # type: ignore[no-any-return]

    def __call__(
        self, latents: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"], index: Int[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """The velocity, all guidance included.

        Raises:
            ValueError: Rows have different noise levels, which a pipeline cannot do.
        """
        if not bool((sigma == sigma[0]).all()):
            raise ValueError(f"sigma must be the same for all rows of a pipeline, got {sigma.tolist()}")
        velocity: Tensor = self._run(index, (float(sigma[0]),), latents=latents, output_type="latent")
        return velocity

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b ..."], index: Int[Tensor, " b"], *, output_type: str = "pil") -> Any:
        """The pipeline's pictures of final latents: a list of PIL images, or "pt" / "np" arrays, as the pipeline returns them."""
        return self._run(index, (), latents=latents, output_type=output_type)[0]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy: the transformer with its adapters off.

        Raises:
            ValueError: The transformer has no adapter.
        """
        transformer = self.pipe.transformer
        if not getattr(transformer, "_hf_peft_config_loaded", False):
            raise ValueError("pipe.transformer must have an adapter (add_adapter) for a reference policy, got none")
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()
