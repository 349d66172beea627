"""How much of a pipeline is on the card at once while it is loaded, and that its numbers do not depend on the order."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from gspo import OnlineConfig, SlidingWindow
from id_reward import CompositeReward
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.placing import place_transformer, quantized_linears
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain import Pretrain, PretrainConfig
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import WorldConfig
from multicrafter.world.tiny_backbones import tiny_klein, tiny_qwen21
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("meta")  # any device that is not the CPU
WORLD = WorldConfig(numbers=(2,), shared_attributes=4)
PACKAGE = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def frozen(make):
    pipe = make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def plain_bytes(module, device=CARD):
    """Of tensors there that nothing has quantised."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(
        t.nbytes for t in tensors if t.device == device and type(t.data) is torch.Tensor and t.is_floating_point()
    )


class Watched(TorchDispatchMode):
    """The most unquantised bytes of a module that are on the card before any operation."""

    def __init__(self, module):
        super().__init__()
        self.module, self.most, self.busy = module, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.busy:
            self.busy = True
            self.most = max(self.most, plain_bytes(self.module))
            self.busy = False
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_one_linear_at_a_time_is_on_the_card_before_it_is_quantised(kind):
    pytest.importorskip("torchao", reason="needs multicrafter[quantize]")
    transformer = frozen(tiny_klein).transformer
    names = quantized_linears(transformer)
    sizes = [sum(p.nbytes for p in transformer.get_submodule(n).parameters()) for n in names]
    assert len(sizes) > 10 and max(sizes) < sum(sizes) / 4
    at_once = copy.deepcopy(transformer)
    biases = sum(b.nbytes for n in names if (b := transformer.get_submodule(n).bias) is not None)
    with Watched(transformer) as watched:
        place_transformer(transformer, CARD, kind)
    rest = plain_bytes(transformer)  # never quantised: embedders, norms, output, biases
    assert not quantized_linears(transformer) and {p.device for p in transformer.parameters()} == {CARD}
    assert 0 < watched.most <= max(max(sizes) + biases, rest)
    with Watched(at_once) as whole:  # as it was: all of it there, and only then quantised
        place_transformer(at_once.to(CARD), None, kind)
    assert whole.most >= sum(sizes) > watched.most


@pytest.mark.parametrize("kind", PACKAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_way_or_afterwards_the_numbers_are_the_same(kind, dtype):
    pytest.importorskip(PACKAGE[kind], reason="needs multicrafter[quantize]")
    linear = torch.nn.Linear(128, 64, dtype=dtype).requires_grad_(False)
    block = torch.nn.Module()
    block.blocks = torch.nn.ModuleList([torch.nn.Sequential(linear)])
    want, x = copy.deepcopy(linear), torch.randn(3, 128, dtype=dtype)
    place_transformer(block, torch.device("cpu"), kind)
    got = block.blocks[0][0]
    if kind == "nf4":  # the way of bitsandbytes' own page
        from bitsandbytes.nn import Linear4bit

        new = Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4")
        new.load_state_dict(want.state_dict())
        want = new.to("cpu")
        assert got.weight.dtype == torch.uint8 and torch.equal(got.weight, want.weight)
        assert torch.equal(got.weight.quant_state.absmax, want.weight.quant_state.absmax)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        quantize_(want, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
        assert torch.equal(got.weight.dequantize(), want.weight.dequantize())
    assert torch.equal(got(x), want(x))
    before = got.weight
    place_transformer(block, torch.device("cpu"), kind)
    assert block.blocks[0][0].weight is before  # quantised once


@contextmanager
def order(monkeypatch, pipe):
    """Where transformer and encoders are whenever something is encoded, and where they go."""
    seen = []
    for name in ("encode_prompts", "encode_prompts_with"):
        real = getattr(LoadedModel, name)

        def watched(self, *args, real=real):
            seen.append("encode")
            return real(self, *args)

        monkeypatch.setattr(LoadedModel, name, watched)
    import multicrafter.training.precision as precision

    real_place = precision.place_transformer
    monkeypatch.setattr(
        precision, "place_transformer", lambda *a, **k: (seen.append(f"place {a[1]} {a[2]}"), real_place(*a, **k))[1]
    )
    yield seen


def test_both_stages_encode_first_and_quantise_the_base_alone(monkeypatch, tmp_path):
    pytest.importorskip("torchao", reason="needs multicrafter[quantize]")
    pipe = frozen(tiny_klein)
    execution = ExecutionConfig(quantization="int8", cache=str(tmp_path))
    small = AdapterConfig(rank=2, alpha=2.0, num_experts=2)
    adapters = Adapters(pipe.transformer, small)
    count = len(quantized_linears(pipe.transformer, adapters.parameters()))
    reward = CompositeReward(
        {"bright": (lambda images, prompts, references: torch.stack([i.mean() for i in images]).double().numpy(), 1.0)}
    )
    config = AlignConfig(
        num_steps=1, prompts=1, execution=execution, online=OnlineConfig(window=SlidingWindow(4), group_size=2)
    )
    with order(monkeypatch, pipe) as seen:
        stage = Align(pipe, adapters, config, encode_scenes(pipe, WORLD, 2, seed=4, cache=str(tmp_path)), reward)
        assert seen[-1] == "place cpu int8" and "encode" in seen and seen.count("place cpu int8") == 1
        assert count > 10 and not quantized_linears(pipe.transformer, adapters.parameters())
        assert all(type(p.data) is torch.Tensor and p.dtype == torch.float32 for p in adapters.parameters())
        before = adapters.state_dict()
        stage.step(0)
        assert any(not torch.equal(v, before[k]) for k, v in adapters.state_dict().items())
        seen.clear()
        other = frozen(tiny_klein)
        config = PretrainConfig(batch=2, adapters=small, world=WORLD, execution=execution)
        Pretrain(other, config, encode_scenes(other, WORLD, 2, seed=5, cache=str(tmp_path)))
        assert seen[-1] == "place cpu int8" and "encode" in seen and seen.count("place cpu int8") == 1


def test_text_encoders_wait_until_they_are_asked():
    model = LoadedModel.of(frozen(tiny_klein))
    model.to(CARD, transformer=False)
    assert model.device == CARD and {p.device for p in model.transformer.parameters()} == {torch.device("cpu")}
    assert {p.device for e in model.text_encoders for p in e.parameters()} == {torch.device("cpu")}
    model.to(CARD)
    assert {p.device for p in model.transformer.parameters()} == {CARD}
    assert {p.device for e in model.text_encoders for p in e.parameters()} == {torch.device("cpu")}


@pytest.mark.parametrize(("room", "breaks"), [(0, False), (0, True), (1 << 40, False)])
def test_the_transformer_steps_aside_where_both_have_no_room(monkeypatch, room, breaks):
    """And comes back, also where what was to be encoded is refused."""
    from multicrafter.models import placing

    model = LoadedModel.of(frozen(tiny_qwen21))
    monkeypatch.setattr(placing, "free_memory", lambda device: room)
    monkeypatch.setattr(LoadedModel, "device", CARD)
    moves = []
    for name, part in (
        ("transformer", model.transformer),
        *((f"text {i}", e) for i, e in enumerate(model.text_encoders)),
    ):
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    monkeypatch.setattr(placing, "_tensors", lambda module: [torch.ones(4, device="meta" if moves[-1:] else "cpu")])
    monkeypatch.setattr(model.transformer, "parameters", lambda: iter([torch.ones(1, device=CARD)]))
    if breaks:
        monkeypatch.setattr(type(model.backbone), "encode_prompts_with", lambda *_: (_ for _ in ()).throw(LookupError))
    with pytest.raises(LookupError) if breaks else nullcontext():
        model.encode_prompts_with(["one person"], [[torch.rand(3, 32, 32)]])
    aside = [("transformer", "cpu"), ("transformer", "meta")]
    assert [m for m in moves if m[0] == "transformer"] == (aside if room == 0 else [])
