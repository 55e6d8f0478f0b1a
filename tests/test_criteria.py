"""Criteria against loops over units written from their formulas."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, normal
from selection import analysis_of, sampled
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import depcut
from depcut import axes
from depcut.calibration.activations import find_activations
from depcut.calibration.data import calibrate
from depcut.errors import InputError
from depcut.scores import CRITERIA, Score, score

BRUTE = [
    "plain", "mlp", "concat_itself", "dense_block", "grouped_bottleneck", "module_called_twice",
    "flatten_linear", "attention_gqa_expand", "tied_embedding", "layer_scale", "lstm",
]  # fmt: skip
FEW = ["plain", "grouped_bottleneck", "tied_embedding", "attention_gqa_expand"]

Loss = Callable[[Any, Any], Tensor]


def loss_of(output: Any, target: Any) -> Tensor:
    """Mean square against fixed random targets, over all outputs of any structure."""
    generator = torch.Generator().manual_seed(7)
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    parts = [
        (t.float() - torch.randn(t.shape, generator=generator)).square().mean()
        for t in leaves
        if t.is_floating_point()
    ]
    return torch.stack(parts).sum()


def data_of(analysis: Any, name: str, loss: Loss | None = loss_of) -> Any:
    inputs = NETS[name].inputs
    sizes = (2, 3) if analysis.program.dynamic else (2,)
    items = [(inputs(n), 0) for n in sizes]
    return calibrate(analysis.program, analysis.model, items, loss=loss, progress=False)


def scores(analysis: Any, criterion: Any, data: Any = None) -> list[np.ndarray]:
    return score(criterion, analysis.coupling, analysis.model, 0, data)


# What a unit owns, by loops ----------------------------------------------------------------------


def owned(analysis: Any, group: Any, unit: int, role: str = "") -> list[tuple[str, int, Tensor]]:
    """(parameter, dimension, indices) of everything that goes with a unit; shared ones once."""
    others = [u for u in range(group.size) if u != unit]
    kept = analysis.plan_keeping({group.name: others}).tensor_indices()
    found, seen = [], {}
    for name, parameter in analysis.model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        for dim, indices in enumerate(kept.get(name, ())):
            if indices is None or any(m[:2] == (first, dim) for m in found):
                continue
            gone = np.setdiff1d(np.arange(parameter.shape[dim]), indices)
            found.append((first, dim, torch.from_numpy(gone)))
    names: dict[str, set[str]] = {}
    for name, parameter in analysis.model.named_parameters(remove_duplicate=False):
        names.setdefault(seen[id(parameter)], set()).add(name)
    of_role = [
        (n, d, i)
        for n, d, i in found
        if any(m.tensor in names[n] and m.dim == d and m.role == role for m in group.members)
    ]
    assert found
    return of_role or found


def sums(analysis: Any, elements: dict[str, Tensor], score: Score) -> list[np.ndarray]:
    """Sums over slices, aggregated over members: what `totals` does, unit by unit."""
    role = {"producers": "producer", "consumers": "consumer"}.get(score.members or "", "")
    reduce = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max}[score.aggregate or "sum"]

    def one(group: Any, unit: int, row: int | None) -> float:
        return float(
            reduce(
                [
                    float(
                        in_row(analysis, group, name, elements[name].double(), row)
                        .index_select(dim, indices)
                        .sum()
                    )
                    for name, dim, indices in owned(analysis, group, unit, role)
                ]
            )
        )

    return [
        np.array([one(group, unit, None) for unit in range(group.size)])
        if group.row_axis is None
        else np.array(
            [[one(group, unit, row) for unit in range(group.size)] for row in range(group.rows)]
        )
        for group in analysis.groups
    ]


def in_row(analysis: Any, group: Any, name: str, values: Tensor, row: int | None) -> Tensor:
    """Zeros but in one row of a group's outer axis."""
    if row is None:
        return values
    for dim, term in enumerate(analysis.coupling.dims[name]):
        rows = torch.from_numpy(axes.units(term, group.row_axis))
        if (rows >= 0).any():
            shape = [-1 if d == dim else 1 for d in range(values.ndim)]
            return values * (rows == row).reshape(shape)
    raise AssertionError(f"{name} does not hold the outer axis")


def relative(values: list[np.ndarray]) -> list[np.ndarray]:
    """Divided by the mean size of the group, then shifted by one number to be positive."""
    values = [v / np.abs(v).mean() if np.abs(v).mean() > 0 else np.ones_like(v) for v in values]
    lowest = min(0.0, *(v.min() for v in values))
    return [v - lowest for v in values]


def assert_same(got: list[np.ndarray], expected: list[np.ndarray], rtol: float = 1e-5) -> None:
    assert expected
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max() + 1e-30))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in model.named_parameters()}


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRUTE)
def test_members_and_aggregates_are_those_of_a_loop(name: str) -> None:
    analysis = analysis_of(name)
    elements = {n: w.abs() for n, w in weights_of(analysis.model).items()}
    for aggregate in ("sum", "mean", "max"):
        for members in ("all", "producers", "consumers"):
            wanted = Score("l1", aggregate=aggregate, members=members, normalize="none")
            assert_same(scores(analysis, wanted), sums(analysis, elements, wanted))


@pytest.mark.parametrize("name", FEW)
def test_normalisations_are_those_of_their_names(name: str) -> None:
    analysis = analysis_of(name)
    found = {
        how: scores(analysis, Score("l1", normalize=how))
        for how in ("none", "mean", "size", "zscore")
    }
    elements = {n: torch.ones_like(w) for n, w in weights_of(analysis.model).items()}
    counts = sums(analysis, elements, Score("l1"))
    assert_same(found["mean"], [v / v.mean() for v in found["none"]])
    assert_same(found["size"], [v / n for v, n in zip(found["none"], counts, strict=True)])
    plain = [(v - v.mean()) / v.std() for v in found["none"]]
    lowest = min(v.min() for v in plain)
    assert_same(found["zscore"], [v - lowest for v in plain])


def test_scores_are_never_negative_and_shifted_all_alike() -> None:
    analysis = analysis_of("plain")
    found = scores(analysis, Score("l2", normalize="zscore"))
    assert min(v.min() for v in found) == 0
    assert len({round(float(v.mean()), 9) for v in found}) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("aggregate", "median"), ("members", "both"), ("normalize", "max")]
)
def test_an_unknown_option_lists_the_known_ones(option: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        Score("l1", **{option: value})
    assert f"{option} is {value!r}" in str(caught.value)
    assert "use one of" in str(caught.value)


@pytest.mark.parametrize("name", ["random", "synflow", "hrank"])
def test_an_option_that_a_criterion_does_not_have_is_refused(name: str) -> None:
    analysis = analysis_of("plain")
    option = "normalize" if name == "synflow" else "members"
    value = "mean" if name == "synflow" else "all"
    with pytest.raises(InputError, match=f"criterion '{name}' has no option {option}"):
        scores(analysis, Score(name, **{option: value}), data_of(analysis, "plain"))


@pytest.mark.parametrize("name", [n for n, m in CRITERIA.items() if m.needs])
def test_what_is_missing_is_said_before_any_work(name: str) -> None:
    analysis = analysis_of("plain")
    with pytest.raises(InputError) as caught:
        score(name, analysis.coupling, None, 0)  # type: ignore[arg-type]
    message = str(caught.value)
    if CRITERIA[name].needs == "data":
        assert f"criterion {name!r} needs data\n" in message
        assert message.endswith("pass data=")
    else:
        assert f"criterion {name!r} needs data and a loss\n" in message
        assert message.endswith("pass data= and loss=")
        with pytest.raises(InputError, match="needs data and a loss"):
            scores(analysis, name, data_of(analysis, "plain", None))


def test_an_unknown_name_with_options_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"(?s)unknown criterion 'tailor'.*taylor_gate"):
        scores(analysis_of("plain"), Score("tailor"))


# Weights alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_lamp_divides_by_what_is_not_smaller(name: str) -> None:
    analysis = analysis_of(name)
    elements = {n: w.square() for n, w in weights_of(analysis.model).items()}
    expected = [
        np.array(
            [[n / sum(m for m in row if m >= n) for n in row] for row in np.atleast_2d(norms)]
        ).reshape(norms.shape)
        for norms in sums(analysis, elements, Score("lamp"))
    ]
    assert_same(scores(analysis, "lamp"), expected)
    assert all(v.max() == pytest.approx(1) for v in expected)


@pytest.mark.parametrize("name", BRUTE)
def test_fpgm_is_the_sum_of_distances_to_all_others(name: str) -> None:
    analysis = analysis_of(name)
    weights = weights_of(analysis.model)
    expected = []
    for group in analysis.groups:
        vectors = [
            torch.cat(
                [
                    weights[n].index_select(dim, indices).movedim(dim, 0).flatten()
                    for n, dim, indices in owned(analysis, group, unit, "producer")
                ]
            )
            for unit in range(group.size)
        ]
        expected.append(np.array([sum(float((a - b).norm()) for b in vectors) for a in vectors]))
    assert_same(scores(analysis, "fpgm"), relative(expected))


def test_fpgm_gives_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysis_of("attention_gqa_expand")
    whole = scores(analysis, "fpgm")
    monkeypatch.setattr("depcut.scores.geometry._ENTRIES", 20)
    assert_same(scores(analysis, "fpgm"), whole, 1e-12)


class Normed(nn.Module):
    """Two norms scale the first units, one written out the second, none the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1, self.n2 = nn.Linear(5, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.b, self.gain = nn.Linear(8, 7), nn.Parameter(torch.rand(7) - 0.5)
        self.c, self.d = nn.Linear(7, 6), nn.Linear(6, 3)
        nn.init.uniform_(self.n1.weight, -1, 1)
        nn.init.uniform_(self.n2.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.n2(self.n1(self.a(x)).relu()))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.d(self.c(x).relu())


def test_bn_reads_the_scales_that_the_graph_has() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    analysis = depcut.analyze(model, normal(4, 5))
    gammas = [model.n1.weight.abs() + model.n2.weight.abs(), model.gain.abs()]
    expected = [g.detach().double().numpy() for g in gammas]
    sizes = [g.size for g in analysis.groups]
    first, second, third = (sizes.index(n) for n in (8, 7, 6))
    found, norms = scores(analysis, "bn"), scores(analysis, "l2")
    assert_same([found[first], found[second]], [e / e.mean() for e in expected])
    assert_same([found[third]], [norms[third]])
    raw = scores(analysis, Score("bn", normalize="none"))
    assert_same([raw[first], raw[second]], [expected[0] / 2, expected[1]])


@pytest.mark.parametrize("name", ["plain", "inverted_residual", "window_attention"])
def test_bn_works_on_batch_and_layer_norms_of_any_module(name: str) -> None:
    analysis = analysis_of(name)
    assert any(
        not np.allclose(a, b)
        for a, b in zip(scores(analysis, "bn"), scores(analysis, "l2"), strict=True)
    )


# Gradients ---------------------------------------------------------------------------------------


def written_out(analysis: Any, data: Any, of: str) -> list[dict[str, Tensor]]:
    """For each batch the gradient, or the Hessian times the weights or the gradient."""
    model, found = copy.deepcopy(analysis.model).eval(), []
    held = dict(model.named_parameters())
    for batch in data.batches:
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model(*batch.args, **batch.kwargs), 0)
            first = torch.autograd.grad(
                loss, list(held.values()), create_graph=True, allow_unused=True
            )
            first = [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(first, held.values(), strict=True)
            ]
            result = first
            if of != "g":
                vector = first if of == "Hg" else list(held.values())
                product = sum((g * v.detach()).sum() for g, v in zip(first, vector, strict=True))
                second = torch.autograd.grad(product, list(held.values()), allow_unused=True)
                result = [
                    torch.zeros_like(p) if g is None else g
                    for g, p in zip(second, held.values(), strict=True)
                ]
        found.append({n: r.detach().double() for n, r in zip(held, result, strict=True)})
    return found


def mean(values: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.mean(parts, axis=0) for parts in zip(*values, strict=True)]


@pytest.mark.parametrize("name", sampled(BRUTE, ["concat_itself", "lstm", *FEW]))
@pytest.mark.parametrize(
    "criterion", ["taylor", "taylor_gate", "fisher", "snip", "hessian", "grasp"]
)
def test_gradient_criteria_are_their_formulas(name: str, criterion: str) -> None:
    analysis = analysis_of(name)
    data = data_of(analysis, name)
    w = weights_of(analysis.model)
    kind = {"hessian": "Hw", "grasp": "Hg"}.get(criterion, "g")
    found = written_out(analysis, data, kind)

    def per_batch(element: Callable[[Tensor], Tensor], members: str = "all") -> list[Any]:
        wanted = Score(criterion, members=members)
        return [
            sums(analysis, {n: element(g[n] * w[n]) for n in w}, wanted) for g in found
        ]  # fmt: skip

    if criterion in ("taylor", "taylor_gate"):
        members = "all" if criterion == "taylor" else "consumers"
        expected = mean([[s**2 for s in batch] for batch in per_batch(lambda p: p, members)])
    elif criterion == "fisher":
        expected = mean(per_batch(lambda p: p**2 / 2))
    elif criterion == "snip":
        average = {n: sum(g[n] for g in found) / len(found) for n in w}
        expected = sums(analysis, {n: (average[n] * w[n]).abs() for n in w}, Score("snip"))
    elif criterion == "hessian":
        expected = [np.abs(s) / 2 for s in mean(per_batch(lambda p: p))]
    else:
        expected = mean(per_batch(lambda p: p))
    assert_same(scores(analysis, criterion, data), relative(expected), 1e-3)


def test_taylor_gate_is_the_derivative_with_respect_to_a_gate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten()
    ).eval()
    analysis = depcut.analyze(model, normal(2, 3, 6, 6))
    batches = [(normal(n, 3, 6, 6), 0) for n in (2, 5)]
    expected = np.zeros(8)
    for x, _ in batches:
        gate = torch.ones(8, requires_grad=True)
        output = model[4](model[3](model[2](model[1](model[0](x))) * gate[:, None, None]))
        [slope] = torch.autograd.grad(loss_of(output, 0), gate)
        expected += slope.double().square().numpy() / len(batches)
    data = calibrate(analysis.program, model, batches, loss=loss_of, progress=False)
    [found] = scores(analysis, Score("taylor_gate", normalize="none"), data)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_grasp_keeps_what_the_gradient_flow_needs() -> None:
    """The paper removes the largest -w (H g): here it has the lowest score."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    analysis = depcut.analyze(model, normal(2, 6))
    data = calibrate(analysis.program, model, [(normal(8, 6), 0)], loss=loss_of, progress=False)
    [found] = scores(analysis, Score("grasp", normalize="none"), data)
    flows = []
    for unit in range(9):
        ends = []
        for share in (1.0, 1 - 1e-3):
            moved = copy.deepcopy(model).double()
            with torch.no_grad():
                moved[0].weight[unit] *= share
                moved[0].bias[unit] *= share
                moved[2].weight[:, unit] *= share
            output = moved(normal(8, 6).double())
            generator = torch.Generator().manual_seed(7)
            loss = (output - torch.randn(8, 3, generator=generator).double()).square().mean()
            gradient = torch.autograd.grad(loss, list(moved.parameters()))
            ends.append(sum(float(g.square().sum()) for g in gradient))
        flows.append((ends[0] - ends[1]) / 1e-3 / 2)
    np.testing.assert_allclose(np.diff(found), np.diff(flows), rtol=2e-2, atol=2e-3)


# Synaptic flow -----------------------------------------------------------------------------------

WIDTHS = (32, 256, 24, 192, 16, 128, 12, 96)


def deep(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [10, *WIDTHS]
    pairs = [
        m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())
    ]
    return nn.Sequential(*pairs, nn.Linear(sizes[-1], 5, bias=bias)).eval()


def test_synflow_is_its_algorithm() -> None:
    torch.manual_seed(1)
    sizes = [4, 6, 9, 5, 3]
    pairs = [
        m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=False), nn.ReLU())
    ]
    model = nn.Sequential(*pairs[:-1]).eval()
    analysis = depcut.analyze(model, normal(2, 4))
    matrices = [m.weight.detach().double().abs().numpy() for m in model[::2]]
    widths = sizes[1:-1]
    alive = [np.ones(n) for n in widths]
    expected = [np.zeros(n) for n in widths]
    total = left = sum(widths)
    flows: list[np.ndarray] = []
    for number in range(1, 101):
        wanted = round(total * (len(widths) / total) ** (number / 100))
        if wanted == left:
            continue
        forward, values = [], np.ones(4)
        for matrix, mask in zip(matrices, alive, strict=False):
            values = matrix @ values * mask
            forward.append(values)
        backward, values = [], np.ones(3)
        for matrix, mask in zip(matrices[:0:-1], alive[::-1], strict=True):
            values = matrix.T @ values * mask
            backward.insert(0, values)
        flows = [a * b for a, b in zip(forward, backward, strict=True)]
        top = max(f.max() for f in flows)
        while left > wanted:
            open_ = [
                (flows[i][u], i, u)
                for i in range(len(widths))
                for u in np.flatnonzero(alive[i])
                if alive[i].sum() > 1
                and flows[i][u] < max(flows[i][v] for v in np.flatnonzero(alive[i]))
            ]
            flow, i, u = min(open_)
            expected[i][u], alive[i][u] = number - 1 + flow / top, 0
            left -= 1
    for i, mask in enumerate(alive):
        assert mask.sum() == 1
        expected[i][mask > 0] = 100 + flows[i][mask > 0] / top
    assert_same(scores(analysis, "synflow"), expected, 1e-6)


def kept_of_all(values: list[np.ndarray], share: float) -> list[int]:
    """Kept units of each group when scores are ranked over all groups as they are."""
    flat = np.sort(np.concatenate(values))
    least = flat[-round(share * len(flat))]
    return [int((v >= least).sum()) for v in values]


def test_where_magnitude_and_snip_collapse_a_layer_synflow_does_not() -> None:
    model = deep()
    analysis = depcut.analyze(model, normal(2, 10))
    item = (normal(64, 10), torch.arange(64) % 5)
    data = calibrate(analysis.program, model, [item], loss=F.cross_entropy, progress=False)
    share = 0.08
    assert 0 in kept_of_all(scores(analysis, Score("magnitude", normalize="none")), share)
    assert 0 in kept_of_all(scores(analysis, Score("snip", normalize="none"), data), share)
    # One unit a group is protected; two are left by the flow alone.
    assert min(kept_of_all(scores(analysis, "synflow"), share)) >= 2


def test_synflow_removes_the_last_unit_of_no_group_before_all_others() -> None:
    found = scores(depcut.analyze(deep(), normal(2, 10)), "synflow")
    last = [v.max() for v in found]
    assert min(last) >= 100 > max(np.sort(v)[-2] for v in found)


def test_synflow_needs_no_data_and_is_blind_to_it() -> None:
    net = NETS["plain"]
    model = net.build()
    inputs = net.inputs(2)
    assert isinstance(inputs, Tensor)
    a = scores(depcut.analyze(model, inputs), "synflow")
    b = scores(depcut.analyze(model, -3 * inputs), "synflow")
    assert_same(a, b, 1e-12)


# Activations -------------------------------------------------------------------------------------


class Reads(nn.Module):
    """A convolution, a depthwise and a linear layer that read; the inputs of all are kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.c, self.d = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.d(x.mean((2, 3)))


def reads() -> tuple[Any, Any, dict[str, Tensor]]:
    """Analysis, data, and what each layer reads on all batches."""
    model = Reads().eval()
    analysis = depcut.analyze(model, normal(2, 3, 8, 8))
    items = [normal(n, 3, 8, 8) for n in (3, 3)]
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double())
        )
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        for x in items:
            model(x)
    for handle in handles:
        handle.remove()
    data = calibrate(analysis.program, model, items, progress=False)
    return analysis, data, {n: torch.cat(v) for n, v in seen.items()}


@pytest.mark.parametrize("criterion", ["wanda", "flap"])
def test_column_criteria_are_their_formulas(criterion: str) -> None:
    analysis, data, seen = reads()
    model = analysis.model
    patches = {"b": F.unfold(seen["b"], 3, padding=1, stride=2), "c": F.unfold(seen["c"], 3)}
    columns = {n: p.transpose(1, 2).flatten(0, 1) for n, p in patches.items()}

    def of(x: Tensor, weight: Tensor) -> float:
        if criterion == "wanda":
            return sum(
                float(abs(row[j])) * float(x[:, j].square().mean().sqrt())
                for row in weight
                for j in range(x.shape[1])
            )
        return sum(
            float(x[:, j].var() * weight[:, j].square().sum()) for j in range(x.shape[1])
        )  # fmt: skip

    w = weights_of(model)
    first = [
        of(columns["b"][:, 9 * u : 9 * u + 9], w["b.weight"][:, u].flatten(1)) for u in range(8)
    ]
    second = [
        of(columns["c"][:, 9 * u : 9 * u + 9], w["c.weight"][u].flatten(1))
        + of(seen["d"][:, u : u + 1], w["d.weight"][:, u : u + 1])
        for u in range(6)
    ]
    found = scores(analysis, Score(criterion, normalize="none"), data)
    assert_same(found, [np.array(first), np.array(second)], 1e-4)


def nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())


@pytest.mark.parametrize("criterion", ["apoz", "hrank", "chip"])
def test_map_criteria_are_their_formulas(criterion: str) -> None:
    analysis, data, seen = reads()

    def of(maps: Tensor, unit: int) -> float:
        if criterion == "apoz":
            flat = maps[:, unit].flatten().tolist()
            return sum(v != 0 for v in flat) / len(flat)
        images = maps if maps.ndim > 2 else None
        if criterion == "hrank":
            if images is not None:
                ranks = [np.linalg.matrix_rank(m.numpy(), tol=1e-5) for m in images[:, unit]]
                return float(np.mean(ranks))
            return float(np.mean([m[:, unit].any() for m in maps.split(3)]))
        matrices = images.flatten(2) if images is not None else [m.T for m in maps.split(3)]
        losses = []
        for matrix in matrices:
            without = matrix.clone()
            without[unit] = 0
            losses.append(nuclear(matrix) - nuclear(without))
        return float(np.mean(losses))

    # The mean over positions is no contraction: the last layer reads vectors.
    first = [of(seen["b"], u) for u in range(8)]
    second = [(of(seen["c"], u) + of(seen["d"], u)) / 2 for u in range(6)]
    found = scores(analysis, Score(criterion, normalize="none"), data)
    assert_same(found, [np.array(first), np.array(second)], 1e-4)


def test_maps_of_heads_are_tokens_by_features() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(6, 3 * 3 * 4), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    model = Heads().eval()
    with torch.no_grad():
        model.qkv.weight.view(3, 3, 4, 6)[2, 1] = 0  # the values of the second head
        model.qkv.bias.view(3, 3, 4)[2, 1, 1:] = 0
    x = normal(2, 5, 6)
    analysis = depcut.analyze(model, x)
    data = calibrate(analysis.program, model, [x], progress=False)
    heads = next(g for g in analysis.groups if g.size == 3)
    found = scores(analysis, Score("hrank", normalize="none", aggregate="max"), data)
    assert found[heads.index][[0, 2]].min() > 1
    wanda = scores(analysis, Score("wanda", normalize="none"), data)[heads.index]
    assert wanda.argmin() == 1


@pytest.mark.parametrize("criterion", ["hrank", "chip"])
def test_map_criteria_give_the_same_in_blocks(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, data, _ = reads()
    whole = scores(analysis, criterion, data)
    monkeypatch.setattr("depcut.scores.maps._ENTRIES", 1)
    assert_same(scores(analysis, criterion, data), whole, 1e-9)


@pytest.mark.parametrize("name", BRUTE)
def test_every_group_is_read_somewhere(name: str) -> None:
    analysis = analysis_of(name)
    activations = find_activations(analysis.coupling)
    assert {i for r in activations for i in r.groups} == set(range(len(analysis.groups)))
    assert len({(r.source, r.dim) for r in activations}) == len(activations)
    for activation in activations:
        dims = analysis.coupling.env[activation.source]
        leaves = set(axes.leaves(axes.resolve(dims[activation.dim])))
        assert all(analysis.groups[i].axis in leaves for i in activation.groups)
        assert activation.source in activation.reader.all_input_nodes


def test_a_group_that_no_weight_reads_has_its_norm() -> None:
    analysis = analysis_of("attention_gqa_expand")
    data = data_of(analysis, "attention_gqa_expand", None)
    norms, found = scores(analysis, "l2"), scores(analysis, "wanda", data)
    unread = [i for i, (a, b) in enumerate(zip(norms, found, strict=True)) if np.allclose(a, b)]
    assert unread
    assert len(unread) < len(found)


# All of them -------------------------------------------------------------------------------------


def permuted(model: nn.Sequential, order: Tensor) -> nn.Sequential:
    """The same function with the units of the first layer in another order."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other[:2]:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim:
                    tensor.copy_(tensor[order])
        other[3].weight.copy_(other[3].weight[:, order])
    return other


@pytest.mark.parametrize("criterion", [n for n in CRITERIA if n != "random"])
def test_scores_follow_a_permutation_of_the_units(criterion: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.Flatten(),
    ).eval()  # fmt: skip
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    order = torch.randperm(8)
    found = []
    for net in (model, permuted(model, order)):
        analysis = depcut.analyze(net, normal(2, 3, 9, 9))
        items = [(normal(3, 3, 9, 9), 0)]
        data = calibrate(analysis.program, net, items, loss=loss_of, progress=False)
        found.append(scores(analysis, criterion, data))
    assert_same(found[1], [found[0][0][order.numpy()], found[0][1]], 1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_only_read(criterion: str) -> None:
    net = NETS["inverted_residual"]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    model.train()
    next(iter(model.children())).eval()
    parameter = next(iter(model.parameters()))
    parameter.grad = torch.ones_like(parameter)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    scores(analysis, criterion, data_of(analysis, "inverted_residual"))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "criterion", [n for n, m in CRITERIA.items() if not m.needs and n != "random"]
)
def test_criteria_need_weights(criterion: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    analysis = depcut.analyze(model, normal(2, 6))
    with pytest.raises(InputError, match=rf"(?s)criterion '{criterion}' needs weights.*0\.weight"):
        scores(analysis, criterion)


@pytest.mark.parametrize("name", sampled([*NETS]))
def test_every_criterion_scores_every_net(name: str) -> None:
    analysis = analysis_of(name)
    assert analysis.groups
    data = data_of(analysis, name)
    for criterion in CRITERIA:
        found = scores(analysis, criterion, data)
        assert all(np.isfinite(v).all() and (v >= 0).all() for v in found), criterion
