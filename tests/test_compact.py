"""Dead units: found, removed, and their constants folded, against the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, normal, seeded
from oracle import all_tensors, assert_close, assert_untouched, outputs, snapshot
from selection import sampled
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import depcut
from depcut import axes
from depcut.errors import InputError
from depcut.plan.keep import Keep
from depcut.reference.constants import interpret
from depcut.reference.run import Reference
from depcut.repair.contractions import find_contractions
from depcut.repair.dead import find_dead
from depcut.repair.folding import fold_constants
from depcut.rewrite.build import rewrite

STRUCTURES = """
mlp residual inverted_residual concat depthwise grouped dense_block unet attention_fused
attention_separate attention_native attention_pooling vision_transformer transformer_encoder
squeeze_excite group_norm causal_decoder lstm
""".split()
STRUCTURES = [name for name in NETS if name in STRUCTURES] or list(NETS)[:20]


def compacted(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """(result, what was found), compared with the dense model at two batch sizes."""
    before = snapshot(model)
    found = depcut.compaction(model, inputs)
    slim = found.apply()
    assert_untouched(model, before)
    assert_close(outputs(slim, inputs), outputs(model, inputs), 1e-5, str(found))
    return slim, found


@torch.no_grad()
def kill(model: nn.Module, inputs: Any, how: str, seed: int) -> None:
    """Set slices of random units to zero: where they are made, or where they are read."""
    rng = np.random.default_rng(seed)
    analysis, tensors = depcut.analyze(model, inputs), all_tensors(model)
    for group in analysis.groups:
        units = rng.choice(group.size, rng.integers(1, group.size), replace=False)
        for member in group.members:
            tensor = tensors[member.tensor]
            term = analysis.coupling.dims[member.tensor][member.dim]
            kept = np.setdiff1d(np.arange(group.size), units)
            gone = np.setdiff1d(np.arange(term.size), axes.indices(term, {group.axis: kept}))
            wanted = {
                "producers": member.role == "producer" and "running" not in member.tensor,
                "weights": member.role == "producer" and tensor.ndim > 1,
                "consumers": member.role == "consumer",
            }[how]
            if wanted and tensor.is_floating_point():
                tensor.index_fill_(member.dim, torch.from_numpy(gone), 0)


HOW = ["producers", "weights", "consumers"]
DEAD = {f"{name}-{how}": (name, how) for name in STRUCTURES for how in HOW}
# Every way on one structure, and one way, in turn, on every other.
QUICK = {f"{name}-{HOW[i % 3]}" for i, name in enumerate(STRUCTURES)} | {
    f"mlp-{how}" for how in HOW
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(*case, id=label, marks=() if label in QUICK else pytest.mark.sweep)
        for label, case in DEAD.items()
    ],
)
def test_structures_with_dead_units_compute_the_same(name: str, how: str) -> None:
    net = NETS[name]
    model = net.build()
    kill(model, net.inputs(2), how, seed=1)
    slim, found = compacted(model, net.inputs(2))
    assert_close(outputs(slim, net.inputs(3)), outputs(model, net.inputs(3)), 1e-5, str(found))
    if how == "consumers" and not found.stuck and name in ("mlp", "residual", "attention_fused"):
        assert found.removed


@pytest.mark.parametrize("name", sampled(STRUCTURES, STRUCTURES[::3]))
def test_what_is_not_tainted_is_the_same_for_other_inputs(name: str) -> None:
    net = NETS[name]
    model = net.build()
    kill(model, net.inputs(2), "weights", seed=2)
    coupling = depcut.analyze(model, net.inputs(2)).coupling
    known: dict[Any, tuple[Tensor, Tensor]] = {}

    def look(op: Any) -> None:
        for node in op.inputs:
            if isinstance(op.values[node], Tensor) and isinstance(op.taints[node], Tensor):
                known.setdefault(node, (op.values[node].clone(), op.taints[node].clone()))

    interpret(coupling, model, look)
    changed = [
        t.flip(0) if not t.is_floating_point() else 3 * torch.randn_like(t)
        for t in torch.utils._pytree.tree_leaves(net.inputs(2))
    ]
    with torch.no_grad():
        reference = Reference(Keep(coupling, {}), model)
        _, values = reference.run(changed, watch=set(known))
    assert known
    for node, (value, taint) in known.items():
        fixed = taint == 0
        torch.testing.assert_close(values[node][fixed], value[fixed], msg=str(node))


def test_nothing_dead_is_said() -> None:
    model = NETS["mlp"].build()
    inputs = NETS["mlp"].inputs(2)
    with pytest.warns(UserWarning, match="nothing was removed: none of 16 units are dead"):
        slim = depcut.compact(model, inputs)
    assert type(slim) is type(model)
    assert slim is not model
    for name, tensor in all_tensors(model).items():
        assert torch.equal(all_tensors(slim)[name], tensor)


class ConvBN(nn.Sequential):
    def __init__(self, *, padding: int = 0, bias: bool = True, norm: bool = False) -> None:
        after = [nn.BatchNorm2d(6)] if norm else []
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=padding, bias=bias),
            *after,
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )


@torch.no_grad()
def with_constants(model: nn.Module, positive: tuple[int, ...], negative: tuple[int, ...]) -> Any:
    """Scales of zero in the first norm, and shifts that ReLU passes or stops."""
    for units, shift in ((positive, 0.7), (negative, -0.7)):
        for unit in units:
            model[1].weight[unit] = 0.0
            model[1].bias[unit] = shift
    return model


IMAGE = normal(2, 3, 9, 9)


def build(make: Callable[[], nn.Module]) -> Any:
    return seeded(make, 0)


def test_an_unpadded_convolution_absorbs_a_constant() -> None:
    model = with_constants(build(ConvBN), (1, 5), (2,))
    slim, found = compacted(model, IMAGE)
    assert found.removed == {"0": 3}
    assert found.folded == ("3.bias",)
    assert found.stuck == ()
    assert slim[0].out_channels == 5
    larger = normal(2, 3, 14, 11)
    assert_close(outputs(slim, larger), outputs(model, larger), 1e-5, "another size")


def test_a_zero_filter_leaves_the_shift_of_its_norm() -> None:
    model = build(ConvBN)
    with torch.no_grad():
        model[0].weight[[0, 3]] = 0.0
    _slim, found = compacted(model, IMAGE)
    assert found.removed == {"0": 2}


def test_a_padded_convolution_reads_zeros_only() -> None:
    model = with_constants(build(lambda: ConvBN(padding=1)), (1, 5), (2,))
    _slim, found = compacted(model, IMAGE)
    assert found.removed == {"0": 1}
    [stuck] = found.stuck
    assert (stuck.group, stuck.units) == ("0", (1, 5))
    assert stuck.reason == (
        "'3' reads a constant, and it pads with zeros, so that the border differs"
    )
    assert "dead, but stays: 0, units 1, 5: '3' reads a constant" in str(found)


def test_a_running_mean_absorbs_where_there_is_no_bias() -> None:
    model = with_constants(build(lambda: ConvBN(bias=False, norm=True)), (1, 5), (2,))
    _, found = compacted(model, IMAGE)
    assert found.removed == {"0": 3}
    assert found.folded == ("4.running_mean",)


def test_without_bias_and_norm_a_constant_stays() -> None:
    model = with_constants(build(lambda: ConvBN(bias=False)), (1, 5), (2,))
    _, found = compacted(model, IMAGE)
    assert found.removed == {"0": 1}
    assert found.stuck[0].reason == "'3' reads a constant, and it has no bias"


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), activation, nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def test_gelu_of_a_bias_goes_into_the_next_bias() -> None:
    model = build(lambda: mlp(nn.GELU()))
    with torch.no_grad():
        model[0].weight[[2, 4, 7]] = 0.0
    slim, found = compacted(model, normal(4, 6))
    assert found.removed == {"0": 3}
    assert found.folded == ("2.bias",)
    assert not torch.equal(slim[2].bias, model[2].bias)


def test_death_spreads_backwards() -> None:
    model = build(lambda: mlp(nn.ReLU()))
    with torch.no_grad():
        model[4].weight[:, [0, 1, 2]] = 0.0
        model[2].weight[3:, [5, 6]] = 0.0  # read by the dead rows 0 to 2 alone
    _, found = compacted(model, normal(4, 6))
    assert found.removed == {"0": 2, "2": 3}


def test_a_dead_group_keeps_one_unit_and_says_so() -> None:
    model = build(lambda: mlp(nn.ReLU()))
    with torch.no_grad():
        model[4].weight.zero_()
    _, found = compacted(model, normal(4, 6))
    assert found.removed["2"] == 7
    assert any(s.group == "2" and s.reason == "1 must stay" for s in found.stuck)


@pytest.mark.parametrize("dim", [0, 1])
def test_pruned_layers_become_plain(dim: int) -> None:
    model = build(lambda: mlp(nn.GELU()))
    prune.ln_structured(model[2], "weight", 0.5, 2, dim)
    prune.ln_structured(model[4], "weight", 0.5, 2, 1)
    prune.l1_unstructured(model[0], "bias", 0.3)
    slim, found = compacted(model, normal(4, 6))
    assert sum(found.removed.values()) >= 4
    assert not list(slim.buffers())
    assert all(not m._forward_pre_hooks for m in slim.modules())
    assert hasattr(model[2], "weight_mask")


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_masks_as_parametrizations() -> None:
    model = build(lambda: mlp(nn.ReLU()))
    mask = torch.ones(8, 10)
    mask[:, [1, 2, 3]] = 0.0
    parametrize.register_parametrization(model[2], "weight", Mask(mask))
    slim, found = compacted(model, normal(4, 6))
    assert found.removed == {"0": 3}
    assert not parametrize.is_parametrized(slim[2])
    assert parametrize.is_parametrized(model[2])


def test_a_head_of_constant_values_goes() -> None:
    net = NETS["attention_separate"]
    model = net.build()
    [layer] = [m for n, m in model.named_modules() if n.endswith(".v") or n == "v"]
    with torch.no_grad():
        layer.weight[5:10] = 0.0  # the second of three heads; its bias passes the softmax
    slim, found = compacted(model, net.inputs(2))
    heads = [n for n, size in found.plan.sizes.items() if size == 3]
    assert {n: found.removed.get(n) for n in heads} == {heads[0]: 1}
    assert len(found.folded) == 1
    assert found.folded[0].endswith("out.bias")
    assert type(slim) is type(model)


def test_a_column_of_one_value_is_a_constant_and_no_other_is() -> None:
    model = build(lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 5)))
    with torch.no_grad():
        model[0].weight[:, 3] = 0.5
    _, found = compacted(model, torch.zeros(2, 2, dtype=torch.long))  # one row of the table
    assert found.removed == {"0": 1}
    assert found.folded == ("1.bias",)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(InputError, match="weights without values") as caught:
        depcut.compaction(mlp(nn.ReLU()).to("meta"), torch.zeros(2, 6, device="meta"))
    assert caught.value.remedy


def test_constants_of_a_plan_that_is_not_lossless() -> None:
    model = build(lambda: mlp(nn.GELU()))
    with torch.no_grad():
        model[0].weight[[2, 4]] = 0.0
    x = normal(4, 6)
    analysis = depcut.analyze(model, x)
    keep = analysis.plan_keeping({"0": [0, 1, 3, 5, 6, 7]}).keep()  # 2, 4 constant; 8, 9 not
    slim = rewrite(model, keep).model
    assert fold_constants(keep, model, slim) == ("2.bias",)
    masked = build(lambda: mlp(nn.GELU()))
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        masked[2].weight[:, [8, 9]] = 0.0
    assert_close(outputs(slim, x), outputs(masked, x), 1e-5, "constants folded")


def test_what_only_feeds_itself_is_dead() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 8)
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return self.head(h + self.down(self.up(h).relu()))

    model = build(Loop)
    with torch.no_grad():
        model.head.weight[:, 7] = 0.0  # stream 7 is read by inner unit 0 alone, which writes 7
        model.up.weight[1:, 7] = 0.0
        model.down.weight[:7, 0] = 0.0
    x = normal(4, 6)
    coupling = depcut.analyze(model, x).coupling
    dead = find_dead(coupling, find_contractions(coupling, model))
    assert sorted(map(list, dead.units.values())) == [[0], [7]]
    compacted(model, x)
