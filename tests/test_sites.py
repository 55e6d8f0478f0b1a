"""Sites: X W^T + b is what the node computes, and what is written is what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import NETS, Net
from selection import SAMPLE, analysis_of, sampled
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depcut
from depcut.calibration.sites import find_sites
from depcut.capture.program import Program
from depcut.coupling.groups import Coupling
from depcut.graph.ancestry import Weights
from depcut.graph.arguments import Call, bound
from depcut.ops.site import Site
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, example

# Contractions with weights that no site reads, and why.
WITHOUT = {
    "transposed_grouped": 1,  # columns are a part of a dimension
    "transposed_depthwise": 1,
    "weight_norm": 2,  # the weight is computed
    "weight_norm_hook": 2,
    "weight_standardised": 1,
    "attention_einsum": 1,  # three operands
    "attention_native_cross": 3,  # a piece of a larger weight
    "transformer_decoder": 2,
    "attention_pooling": 1,  # a vector times a matrix of activations
    "matrix_products": 2,  # a weight for every example, by expansion
}


def visited(coupling: Coupling, model: nn.Module, inputs: Any) -> dict[Any, tuple[Call, Any]]:
    """(arguments, result) of every node with a site."""
    sites = {s.node for s in find_sites(coupling)}
    calls: dict[Any, tuple[Call, Any]] = {}
    steps = Reference(Keep(coupling, {}), model).steps(pytree.tree_leaves(inputs), stops=sites)
    with torch.no_grad():
        for step in steps:
            target: Any = step.node.target
            result = target(*step.args, **step.kwargs)
            calls[step.node] = bound(step.node, step.args, step.kwargs), result
    return calls


def computed(site: Site, call: Call, model: nn.Module) -> Tensor:
    """X W^T + b, (vectors, blocks * out)."""
    held = dict(model.named_parameters(remove_duplicate=False))
    x, w = site.family.inputs(call), site.family.matrix(call)
    exact = torch.promote_types(x.dtype, torch.float32)
    y = x.to(exact) @ w.to(exact).transpose(1, 2)
    for name in site.biases:
        y = y + held[name].detach().reshape(len(y), 1, -1)
    return y.transpose(0, 1).flatten(1)


def directly(site: Site, result: Tensor, program: Program) -> Tensor:
    """The node's own result with its features last."""
    rows = site.rows
    dim = {"Patches": 1}.get(type(site.family).__name__)
    if dim is None:
        feature = getattr(site.family, "features", -1)
        dim = feature + result.ndim
    elif result.ndim == len(program.sizes[site.node]) and result.ndim == site.family.rank + 1:  # type: ignore[attr-defined]
        dim = 0
    assert result.shape[dim] == rows.size
    return result.movedim(dim, -1).reshape(-1, rows.size)


# In an autocast region an operator converts its arguments by itself.
ALONE = {name: net for name, net in NETS.items() if name != "autocast_on"}


@pytest.mark.parametrize("net", sampled(ALONE))
def test_sites_compute_what_their_nodes_compute(net: Net) -> None:
    model = net.build()
    coupling = depcut.analyze(model, net.inputs(2)).coupling
    calls = visited(coupling, model, example(Keep(coupling, {})))
    sites = find_sites(coupling)
    assert sites
    for site in sites:
        call, result = calls[site.node]
        before = site.family.matrix(call).clone()
        if isinstance(result, Tensor) and type(site.family).__name__ != "Einsum":
            got, want = computed(site, call, model), directly(site, result, coupling.program)
            scale = float(want.abs().max())
            torch.testing.assert_close(
                got.double(), want.double(), rtol=0, atol=1e-5 * max(scale, 1e-2)
            )
        elif isinstance(result, Tensor):
            got = computed(site, call, model)
            torch.testing.assert_close(got.sum(), result.sum(), rtol=1e-4, atol=1e-4)
            assert got.numel() == result.numel()
        assert before.shape[0] * before.shape[1] == site.rows.size
        assert before.shape[2] == site.term.size
        held = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            site.family.write(call, 2 * before)
            torch.testing.assert_close(site.family.matrix(call), 2 * before)
            site.family.write(call, before)
        assert all(torch.equal(p, held[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("net", sampled(NETS, {*SAMPLE, *WITHOUT}))
def test_contractions_of_weights_without_a_site_are_known(net: Net) -> None:
    coupling = analysis_of(net.name).coupling
    found, weights = {s.node for s in find_sites(coupling)}, Weights(coupling.program)
    missing = {
        node
        for node, effects in coupling.effects.items()
        if node.graph is coupling.program.graph.graph and node not in found
        for source, _ in effects.contracts
        if weights.behind(source)
    }
    assert len(missing) == WITHOUT.get(net.name, 0), missing


# Recurrent cells, by hand ------------------------------------------------------------------------


def by_hand(kind: str, gates: Tensor, hidden: Tensor, own: Tensor, cell: Tensor) -> Any:
    """(hidden, cell) after one step from the sums that sites compute."""
    if kind == "LSTM":
        i, f, g, o = gates.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "GRU":
        (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), own.chunk(3, -1)
        reset, update = (r + hr).sigmoid(), (z + hz).sigmoid()
        return (1 - update) * (n + reset * hn).tanh() + update * hidden, cell
    return gates.tanh(), cell


class Cells(nn.Module):
    def __init__(self, kind: str, both: bool, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"bidirectional": both, "batch_first": first, "num_layers": 2}
        self.kind = kind
        self.cell = getattr(nn, kind)(4, 5, **options)
        self.head = nn.Linear(5 * (1 + both), 3)
        self.register_buffer("h", torch.randn(2 * (1 + both), 1, 5))
        self.register_buffer("c", torch.randn(2 * (1 + both), 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0 if self.cell.batch_first else 1]
        h, c = (state.expand(-1, rows, -1).contiguous() for state in (self.h, self.c))
        return self.head(self.cell(x, (h, c) if self.kind == "LSTM" else h)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_cells_read_what_a_loop_over_the_steps_reads(kind: str, both: bool, first: bool) -> None:
    model, length, batch, ways = Cells(kind, both, first).eval(), 6, 3, 1 + both
    x = torch.randn(batch, length, 4) if first else torch.randn(length, batch, 4)
    states = [s.expand(-1, batch, -1) for s in (model.h, model.c)]
    coupling = depcut.analyze(model, x).coupling
    calls = visited(coupling, model, x)
    sites = [s for s in find_sites(coupling) if s.name == "cell"]
    assert len(sites) == 2 * ways * (2 if kind == "GRU" else 1)
    (call, result) = calls[sites[0].node]
    outs = []
    for number in range(2 * ways):
        mine = sites[2 * number : 2 * number + 2] if kind == "GRU" else [sites[number]]
        shape = (batch, length, -1) if first else (length, batch, -1)
        sums = [computed(s, call, model).reshape(shape) for s in mine]
        sums = [s.transpose(0, 1) if first else s for s in sums]
        hidden, cell = states[0][number], states[1][number]
        made = []
        order = range(length)[::-1] if number % ways else range(length)
        for t in order:
            hidden, cell = by_hand(kind, sums[0][t], hidden, sums[-1][t], cell)
            made.append(hidden)
        outs.append(torch.stack(made[::-1] if number % ways else made))
    top = torch.cat(outs[-ways:], -1)
    want = result[0].transpose(0, 1) if first else result[0]
    torch.testing.assert_close(top, want, rtol=1e-4, atol=1e-5)


# Depth ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stream that every block reads twice: paths back to the start double with each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(4) for _ in range(blocks))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.head.weight
        for scale in self.scales:
            weight = weight + weight * scale
        return nn.functional.linear(x, weight)


def test_what_a_node_is_computed_from_is_found_in_one_pass() -> None:
    # Walked path by path, 60 blocks are 2^60 steps.
    program = depcut.analyze(Residual(60), torch.randn(2, 4)).program
    (linear,) = (n for n in program.graph.graph.nodes if str(n.target) == "aten.linear.default")
    weights = Weights(program)
    names = weights.behind(linear.args[1])
    assert names == ("head.weight", *(f"scales.{i}" for i in range(60)))
    assert weights.behind(linear) == ()
