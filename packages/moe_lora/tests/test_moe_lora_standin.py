"""Whoever uses a module notices nothing but its output when a mixture stands in its place."""

from __future__ import annotations

import ast
import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import moe_lora
import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALayer, inject
from torch import Tensor, nn

CONFIG = MoELoRAConfig(rank=2, alpha=4.0, num_experts=3)
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def awake(module: nn.Module) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name or "router" in name:
                p.normal_(0, 0.5)


class Gated(nn.Module):
    """A feed-forward block as T5 has it: it reads a weight of its last linear before it calls it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.hidden_size = nn.GELU(), 8

    def forward(self, hidden_states: Tensor) -> Tensor:
        middle = self.act_fn(self.wi(input=hidden_states)).to(self.wo.weight.dtype)
        return self.wo(input=middle)


def test_attributes_of_the_base_are_visible_and_keyword_calls_work() -> None:
    plain = nn.Sequential(Gated())
    net = copy.deepcopy(plain)
    handle = inject(net, CONFIG, [r"0\.w[io]"])
    assert torch.equal(net(X), plain(X))
    wo = net[0].wo
    assert wo.weight is wo.base.weight and wo.bias is wo.base.bias and (wo.in_features, wo.out_features) == (12, 8)
    awake(net)
    by_name = net(X)
    assert not torch.allclose(by_name, plain(X))
    middle = torch.randn(3, 12)
    assert torch.equal(wo(middle), wo(input=middle))
    whole = copy.deepcopy(plain)
    inject(whole, CONFIG, "0")
    awake(whole)
    assert whole[0].hidden_size == 8 and whole[0].wo.weight is whole[0].base.wo.weight
    assert torch.equal(whole[0](X), whole[0](hidden_states=X))
    assert whole.get_submodule("0.wo") is whole[0].base.wo
    for missing in ("nothing", "_private", "base_layer"):
        assert not hasattr(wo, missing)
    handle.remove()
    assert net[0].wo.weight is wo.base.weight


def test_what_belongs_to_the_base_is_set_there() -> None:
    net = nn.Sequential(Gated())
    inject(net, CONFIG, r"0\.wo")
    wo, tied = net[0].wo, nn.Parameter(torch.zeros(8, 12))
    keys = list(net.state_dict())
    wo.weight = tied
    assert wo.base.weight is tied and wo.weight is tied and list(net.state_dict()) == keys
    wo.enabled, wo.note = False, "mine"
    assert wo.note == "mine" and not hasattr(wo.base, "note") and not hasattr(wo.base, "enabled")
    assert torch.equal(wo(torch.ones(1, 12)), wo.base.bias[None])


def test_a_hooked_base_is_not_taken_for_the_layer() -> None:
    """accelerate keeps `_old_forward` on a hooked module and puts it back in place of a later hook's."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    net = nn.Sequential(nn.Linear(8, 8))
    accelerate.hooks.add_hook_to_module(net[0], accelerate.hooks.ModelHook())
    handle = inject(net, CONFIG, "0")
    awake(net)
    out = net(X)
    accelerate.hooks.add_hook_to_module(net[0], accelerate.hooks.ModelHook())
    assert torch.equal(net(X), out)
    with handle.disable():
        assert not torch.allclose(net(X), out)


def test_copies_and_pickles_keep_the_base_apart() -> None:
    layer = MoELoRALayer(nn.Linear(8, 8), CONFIG)
    awake(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X), layer(X)) and twin.weight is twin.base.weight and twin.weight is not layer.weight


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.to_q, self.make = nn.Linear(8, 8), make

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None):  # type: ignore[no-untyped-def]
        return self.make(self.to_q(hidden_states))


class Pair(NamedTuple):
    out: Tensor
    weights: None


class SaysTuple(Returns):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.to_q(hidden_states), None


class SaysPair(Returns):
    def forward(self, hidden_states: Tensor) -> Pair:
        return Pair(self.to_q(hidden_states), None)


class SaysOutput(Returns):
    def forward(self, hidden_states: Tensor) -> OrderedDict:
        return OrderedDict(out=self.to_q(hidden_states))


class SaysUnknown(Returns):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, OnlyForCheckers]:  # type: ignore[name-defined]
        return self.to_q(hidden_states), None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.MultiheadAttention(8, 2), "'0' must return one tensor, got MultiheadAttention, which returns a tuple"),
        (nn.LSTM(8, 8), "LSTM, which returns a tuple"),
        (SaysTuple(None), "SaysTuple, which returns a tuple: name the linears"),
        (SaysPair(None), "SaysPair, which returns a Pair"),
        (SaysOutput(None), "SaysOutput, which returns a OrderedDict"),
        (SaysUnknown(None), "SaysUnknown, which returns tuple"),
        (nn.ModuleList([nn.Linear(8, 8)]), "must be a module that is called, got ModuleList"),
        (nn.ModuleDict({"a": nn.Linear(8, 8)}), "must be a module that is called, got ModuleDict"),
        (nn.MultiheadAttention(8, 2).out_proj, "last linear of nn.MultiheadAttention"),
    ],
)
def test_what_cannot_be_adapted_is_refused_at_injection(target: nn.Module, message: str) -> None:
    net = nn.Sequential(target, nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        inject(net, CONFIG, ["0", "1"])
    assert net[0] is target and type(net[1]) is nn.Linear
    with pytest.raises(ValueError, match=message.replace("'0'", "base")):
        MoELoRALayer(target, CONFIG, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: (h, None), r"'0' \(Returns\) must return one tensor, got a tuple of 2: name the linears inside it"),
        (lambda h: [h], "got a list of 1"),
        (lambda h: {"out": h}, "got a dict"),
        (lambda h: h[..., :4], r"must map tokens \(2, 5, 8\) to \(2, 5, 8\), got \(2, 5, 4\)"),
        (lambda h: h.transpose(0, 1), r"got \(5, 2, 8\)"),
        (lambda h: h.mean(1), r"got \(2, 8\)"),
    ],
)
def test_outputs_that_are_not_known_before_are_refused_in_the_first_pass(make: Any, message: str) -> None:
    net = nn.Sequential(Returns(make))
    handle = inject(net, CONFIG, "0")
    with pytest.raises(ValueError, match=message):
        net(X)
    with handle.disable():
        net(X)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(2, 5, dtype=torch.int64),), {}, r"tokens of shape \(\.\.\., 8\).*got int64 \(2, 5\)"),
        ((X[..., :4],), {}, r"got float32 \(2, 5, 4\)"),
        ((), {"mask": torch.ones(2, 5)}, "got none"),
        (([1.0],), {}, "got a list of 1"),
    ],
)
def test_calls_without_tokens_are_refused(args: Any, kwargs: Any, message: str) -> None:
    class Anything(nn.Linear):
        def forward(self, hidden_states: Any = None, mask: Any = None) -> Tensor:
            return torch.zeros(2, 5, 8)

    with pytest.raises(ValueError, match=message):
        MoELoRALayer(Anything(8, 8), CONFIG)(*args, **kwargs)


def test_a_base_without_argument_names_takes_the_one_tensor_that_fits() -> None:
    class Bare(nn.Linear):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(args[0] if args else kwargs["h"])

    layer = MoELoRALayer(Bare(8, 8), CONFIG)
    awake(layer)
    assert torch.equal(layer(h=X, scale=torch.ones(3)), layer(X))
    with pytest.raises(ValueError, match="got none"):
        layer(h=X, other=X)


def test_keyword_calls_and_attributes_compile_to_one_graph() -> None:
    net = Gated()
    inject(net, CONFIG, [r"w[io]"])
    awake(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden_states=X), net(X))


@pytest.mark.parametrize("padding", [False, True])
def test_the_fast_path_of_torchs_encoder_does_not_go_past_the_mixture(padding: bool) -> None:
    """In evaluation it hands the weights of its linears to one kernel instead of calling them."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval().requires_grad_(False)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    mask = torch.arange(5)[None].expand(2, 5) > 3 if padding else None
    with torch.no_grad():
        plain = net(X, src_key_padding_mask=mask)
        handle = inject(net, CONFIG, [r"layers\.\d\.linear[12]"])
        torch.testing.assert_close(net(X, src_key_padding_mask=mask), plain, atol=1e-5, rtol=1e-4)
        awake(net)
        out = net(X, src_key_padding_mask=mask)
        with handle.disable():
            torch.testing.assert_close(net(X, src_key_padding_mask=mask), plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, plain, atol=1e-3)
    assert len(handle.stats()) == 4


def test_widths_of_gpt2s_linear() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx, self.weight = nf, nx, nn.Parameter(torch.randn(nx, nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    layer = MoELoRALayer(nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(6, 12)), CONFIG)
    assert layer.lora_a.shape == (3, 2, 8) and layer.lora_b.shape == (3, 6, 2) and layer(X).shape == (2, 5, 6)


def _imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & modules


def test_modules_do_not_import_in_circles() -> None:
    root = Path(moe_lora.__file__).parent
    files = {
        ".".join(p.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in root.rglob("*.py")
    }
    arrows = {name: _imports(path, set(files)) - {name, "moe_lora"} for name, path in files.items()}
    left = dict(arrows)
    while free := [name for name, to in left.items() if not to & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {left}"
