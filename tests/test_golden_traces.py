"""What training, drawing, evaluation and data set building computed before the code moved: it must compute the same now.

The numbers in ``golden_traces.json`` were recorded by ``python tests/test_golden_traces.py --record``. Where processor and
libraries are those of the recording, every number and every byte must be equal; elsewhere floats may differ by rounding
(1e-4), and digests of bytes are not compared.

A trace is allowed to change only where a formula was merged with another and rounds otherwise. Record it anew then, in a
commit of its own that says by how much the numbers moved, and why.

Two things moved the traces of stage 2 in two processes, by at most 4.2e-7. In one process it trains the same adapters bit for bit.

- ``ratio_spread`` is the spread over the samples of all ranks. It was the mean of the ranks' own spreads.
- A draw, ``next = mean + std * noise``, is one `torch.addcmul`, which rounds once. In several processes it was a product and a
  sum, which round twice, and differ in the last bit of a latent (at most 4.8e-7). With these two put back in the draw, pictures,
  gradients and adapters of the first iteration are those of before bit for bit. Entries of an adapter move by up to 2.6e-6
  although gradients move by 2.9e-9: Adam divides a gradient by its own size, however small that is.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gspo import FlowCPS, FlowSDE, OnlineConfig, PolicyConfig, SlidingWindow
from gspo.sde import Kernel
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.photos import BuildConfig, FilterConfig, ReferenceConfig, WriteConfig, build
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, evaluate
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain import IDARConfig, Pretrain, PretrainConfig
from multicrafter.training.scenes import EncodedScenes, encode_scenes
from multicrafter.training.watching import WatchConfig
from multicrafter.world import PEOPLE, WorldConfig, make_scenes
from multicrafter.world.rewards import RewardConfig
from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline
from PIL import Image

RECORDED = Path(__file__).with_name("golden_traces.json")
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # elsewhere than where the traces were recorded
WORLD = WorldConfig(
    family="people", split="train", size=64, reference_size=32, numbers=(2,), shared_attributes=4, weights=()
)

Trace = dict[str, Any]


# ---- what is computed: every knob is stated here, so that no default of the code decides


def adapters(num_experts: int) -> AdapterConfig:
    return AdapterConfig(
        rank=4, alpha=4.0, num_experts=num_experts, top_k=1, gating="softmax_then_topk", balance_coef=0.01, z_coef=0.001
    )


def execution(**changes: Any) -> ExecutionConfig:
    plain = ExecutionConfig(
        dtype="float32", gradient_checkpointing=False, quantization="none", optimizer="adamw", micro_batch=None,
        parallel="ddp", compile_blocks=False, attention_backend=None, ema_decay=0.0, cache=None,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


SHARE = IDARConfig(
    coef=0.1, direction="image_to_reference", kind="share_cross_entropy", normalization="none", sigma_max=0.8,
    all_blocks=True, until=1.0,
)  # fmt: skip
DICE = IDARConfig(
    coef=0.3, direction="reference_to_image", kind="dice", normalization="max", sigma_max=1.0, all_blocks=False, until=0.5
)  # fmt: skip


def stage1(*, num_experts: int = 2, idar: IDARConfig = SHARE, **changes: Any) -> PretrainConfig:
    return PretrainConfig(
        num_steps=10, batch=6, lr=2e-3, num_scenes=12, data=None, data_seed=1, seed=0, adapters=adapters(num_experts),
        idar=idar, world=WORLD, execution=execution(**changes),
    )  # fmt: skip


def policy(**changes: Any) -> PolicyConfig:
    plain = PolicyConfig(
        ratio="sequence", clip_range="auto", target_clip_fraction=0.1, clip_range_rate=0.2, kl_coef=0.0, num_inner_epochs=2,
        max_grad_norm=1.0, micro_batch_size=None, drop_zero_variance=True, reduce_gradients=True,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def stage2(
    *,
    micro_batch: int | None = None,
    parallel: str = "ddp",
    kernel: Kernel | None = None,
    tail_steps: int | None = 2,
    policy_changes: Any = None,
    **changes: Any,
) -> AlignConfig:
    reward = RewardConfig(
        text=1.0, aesthetics=0.5, multi_id=2.0, missing_penalty=0.0, extra_penalty=0.5, convention="multicrafter"
    )
    online = OnlineConfig(
        window=SlidingWindow(5, size=2, stride=1, interval=2, strategy="progressive"), kernel=kernel or FlowSDE(0.7), group_size=4,
        tail_steps=tail_steps, share_prefix=True, own_noise=False, advantage_scale="group", advantage_ddof=0,
        policy=policy(**(policy_changes or {})), seed=0,
    )  # fmt: skip
    plain = AlignConfig(
        num_steps=3, prompts=2, online=online, objective="ratio", separation=None, guidance=2.5, lr=1e-3, reward=reward,
        reward_normalization="sum", keep="last", watch=WatchConfig(action="none"), routing_replay=False, routing_jitter=False,
        reward_retries=2, reward_wait_s=0.0, execution=execution(micro_batch=micro_batch, parallel=parallel),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


STAGE1: dict[str, PretrainConfig] = {
    "experts": stage1(),
    "plain": stage1(num_experts=0),
    "paper": stage1(idar=DICE),
    "micro_batches": stage1(micro_batch=2, gradient_checkpointing=True),
    "two_processes": stage1(),
    "two_processes_sharded": stage1(micro_batch=2, parallel="fsdp"),
}
STAGE2: dict[str, tuple[AlignConfig, int]] = {
    "experts": (stage2(), 2),
    "plain": (stage2(kernel=FlowCPS(0.7), tail_steps=None, policy_changes={"kl_coef": 0.1}), 0),
    "replayed": (stage2(routing_replay=True, routing_jitter=True, policy_changes={"ratio": "guarded"}), 2),
    "micro_batches": (stage2(micro_batch=1, policy_changes={"micro_batch_size": 3}), 2),
    "two_processes": (stage2(), 2),
    "two_processes_sharded": (stage2(parallel="fsdp"), 0),
}


class Brightness:
    """A reward that needs no judge."""

    def __call__(self, images: Any, prompts: Any, references: Any) -> Any:
        values = np.array([float(i.mean()) for i in images])
        return type("Score", (), {"totals": values, "parts": {"brightness": values}})()


# ---- how it is computed


def digest(parts: Iterable[tuple[str, bytes]]) -> str:
    made = hashlib.sha256()
    for name, content in parts:
        made.update(f"{name}:{len(content)};".encode())
        made.update(content)
    return made.hexdigest()[:32]


def tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    whole = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    return digest((name, t.view(torch.uint8).numpy().tobytes() if t.ndim else b"") for name, t in whole.items())


def shake(made: Adapters, scale: float) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def small() -> tuple[Any, EncodedScenes]:
    """The smallest FLUX, its zero-initialised output layer filled so that everything matters, and encoded scenes."""
    made = build_pipeline(
        TinyFluxConfig(
            num_heads=2, head_dim=16, num_double=1, num_single=1, latent_channels=8, vae_channels=(8, 8, 8), text_width=16,
            guidance_embeds=False,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for part in (made.transformer, made.vae, made.text_encoder, made.text_encoder_2):
        part.requires_grad_(False).eval()
    for parameter in made.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made, encode_scenes(made, WORLD, 12, seed=3)


def steps(stage: Any, number: int, names: tuple[str, ...]) -> Trace:
    """The metrics of a stage's steps and the adapter after them (on every rank; equal on all)."""
    from multicrafter.training import distributed

    history = [stage.step(index) for index in range(number)]
    state = {name: distributed.unsharded(t.detach()) for name, t in stage.adapters.named_parameters()}
    norms = [float(torch.stack([t.double().norm() for t in state.values()]).norm())]
    return {
        **{name: [float(metrics[name]) for metrics in history if name in metrics] for name in names},
        "adapter_norm": norms,
        "adapter": tensor_digest(state),
    }


def trace_stage1(name: str) -> Trace:
    pipe, scenes = small()
    stage = Pretrain(pipe, STAGE1[name], scenes)
    return steps(stage, 10, ("loss", "diffusion_loss", "attention_loss", "grad_norm", "skipped"))


def trace_stage2(name: str) -> Trace:
    config, num_experts = STAGE2[name]
    pipe, scenes = small()
    made = Adapters(pipe.transformer, adapters(num_experts))
    shake(made, 0.02)
    stage = Align(pipe, made, config, scenes, Brightness())
    names = ("reward", "reward_spread", "ratio_spread", "approx_kl", "kl", "clip_fraction", "clip_range", "grad_norm")
    return steps(stage, 3, (*names, "routing_jitter", "skipped"))


def trace_two_processes(folder: Path) -> dict[str, Trace]:
    """Both stages on two gloo processes, replicated and sharded; the traces of rank 0."""
    out = folder / "traces.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--store", str(folder / "store"), "--out", str(out), "--rank"]
    ranks = [subprocess.Popen([*command, str(r)], env=environment, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    said = [rank.communicate(timeout=580)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in said)
    traces: dict[str, Trace] = json.loads(out.read_text())
    return traces


def work(rank: int, store: Path, out: Path) -> None:
    """One of the two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made = {f"stage1_{name}": trace_stage1(name) for name in STAGE1 if name.startswith("two")}
    made |= {f"stage2_{name}": trace_stage2(name) for name in STAGE2 if name.startswith("two")}
    if rank == 0:
        out.write_text(json.dumps(made))
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # torch's threads sometimes abort a clean exit


def shipped_with_adapter(folder: Path) -> MultiCrafterPipeline:
    """The model that ships with an adapter with experts, which went over the disk."""
    from multicrafter.pipeline import load_flux

    made = Adapters(load_flux(None).transformer, adapters(2))
    shake(made, 0.02)
    saved = made.save(folder / "adapter", num_references=2)
    return MultiCrafterPipeline.from_pretrained(None, adapter=saved)


def trace_picture(folder: Path) -> Trace:
    scenes = make_scenes(1, WORLD, torch.Generator().manual_seed(5))
    pixels = (scenes.references[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    (picture,) = shipped_with_adapter(folder)(
        scenes.captions()[0], [Image.fromarray(p) for p in pixels], num_images=1, num_steps=4, seed=7, guidance=2.5,
        true_guidance=1.0, size=64, reference_size=32,
    )  # fmt: skip
    drawn = np.asarray(picture)
    return {"size": list(drawn.shape), "mean": [float(drawn.mean())], "pixels": digest([("rgb", drawn.tobytes())])}


def trace_evaluation(folder: Path) -> Trace:
    pipe = shipped_with_adapter(folder).pipe
    config = EvaluateConfig(
        num_cases=4, num_references=2, family="people", split="test", size=64, reference_size=32, shared_attributes=4,
        num_sampling_steps=4, guidance=2.5, seed=1000,
    )  # fmt: skip
    scenes = encode_scenes(pipe, config.world(), config.num_cases, seed=config.seed)
    metrics, pictures = evaluate(pipe, scenes, WorldJudges.load(), config)
    return {
        **{name: [float(v) for v in values] for name, values in sorted(metrics.items())},
        "mean": [float(pictures.mean())],
        "pictures": tensor_digest({"pictures": pictures}),
    }


def trace_data_set(folder: Path) -> Trace:
    """Photos of drawn people, and everything that a build of them writes but what tells the time."""
    photos, out = folder / "photos", folder / "set"
    photos.mkdir()
    generator = torch.Generator().manual_seed(4)
    people = PEOPLE.sample(6, "train", generator)
    pairs = torch.tensor([(a, b) for a in range(4) for b in range(a)] + [(4, 5), (5, 4)])
    scenes = make_scenes(len(pairs), WORLD, generator, identities=people[pairs])
    for index, picture in enumerate(scenes.images):
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(photos / f"{index:03d}.png")
    config = BuildConfig(
        faces="tiny", people="same", masks="boxes", captions="template", aesthetics="closed_form", detect_side=1280, batch=4,
        licence="unknown", consent="unknown",
        filter=FilterConfig(min_side=32, min_face_pixels=4, duplicate_distance=2),
        references=ReferenceConfig(threshold=None, per_subject=4, augment=True, scale=1.1, size=320),
        write=WriteConfig(format="jsonl", max_side=1024, quality=93, test_fraction=0.5, shard_size=10_000),
    )  # fmt: skip
    summary = build(photos, out, config, progress=False)
    files = {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file()
        and ".build" not in p.parts
        and p.suffix != ".html"
        and p.name not in ("dataset.json", "README.md")
    }
    return {
        "records": [float(summary.records[split]) for split in ("train", "test")],
        "identities": [float(summary.identities)],
        "names": digest((name, b"") for name in files),
        "files": digest(files.items()),
    }


ALONE: dict[str, Callable[[Path], Trace]] = {
    **{f"stage1_{n}": lambda _, n=n: trace_stage1(n) for n in STAGE1 if not n.startswith("two")},  # type: ignore[misc]
    **{f"stage2_{n}": lambda _, n=n: trace_stage2(n) for n in STAGE2 if not n.startswith("two")},  # type: ignore[misc]
    "picture": trace_picture,
    "evaluation": trace_evaluation,
    "data_set": trace_data_set,
}
TOGETHER = [f"stage{s}_{n}" for s, names in ((1, STAGE1), (2, STAGE2)) for n in names if n.startswith("two")]


def circumstances() -> dict[str, str]:
    """What decides over the last bit: processor and libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    packages = ("torch", "numpy", "diffusers", "transformers", "peft", "pillow", "scipy")
    return {
        "processor": info.get("model name", "unknown"),
        "instructions": digest([(flag, b"") for flag in sorted(info.get("flags", "").split())]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in packages},
    }


# ---- the tests


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Trace]:
    return trace_two_processes(tmp_path_factory.mktemp("two"))


def compare(name: str, got: Trace) -> None:
    recorded = json.loads(RECORDED.read_text())
    want, got = recorded["traces"][name], json.loads(json.dumps(got))
    assert got.keys() == want.keys()
    if recorded["circumstances"] == circumstances():
        assert got == want or repr(got) == repr(want)  # NaN is NaN
        return
    numbers = [key for key, value in want.items() if not isinstance(value, str)]
    for key in numbers:
        assert got[key] == pytest.approx(want[key], rel=RELATIVE, abs=ABSOLUTE, nan_ok=True), key
    left = [key for key in want if key not in numbers]
    print(f"{name}: another processor or other libraries than recorded, so {', '.join(left)} not compared")


@pytest.mark.parametrize("name", ALONE)
def test_one_process_computes_what_it_did(name, tmp_path):
    compare(name, ALONE[name](tmp_path))


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_compute_what_they_did(name, two_processes):
    compare(name, two_processes[name])


def test_a_change_in_the_last_bit_is_seen():
    one = torch.ones(3)
    assert tensor_digest({"a": one}) == tensor_digest({"a": one.clone()})
    assert tensor_digest({"a": one}) != tensor_digest({"a": torch.nextafter(one, 2 * one)})
    assert tensor_digest({"a": one}) != tensor_digest({"b": one})
    recorded = json.loads(RECORDED.read_text())["traces"]
    assert recorded.keys() == {*ALONE, *TOGETHER}
    digests = [trace["adapter"] for trace in recorded.values() if "adapter" in trace]
    assert len(set(digests)) == len(digests), "no two cases train the same adapter"


def record() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        traces = {}
        for name, function in ALONE.items():
            (Path(folder) / name).mkdir()
            traces[name] = function(Path(folder) / name)
        traces |= trace_two_processes(Path(folder))
    content = {"circumstances": circumstances(), "traces": traces}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {RECORDED}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--record", action="store_true", help="write golden_traces.json anew")
    options.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank is not None:
        work(chosen.rank, chosen.store, chosen.out)
    elif chosen.record:
        record()
    else:
        options.print_help()
