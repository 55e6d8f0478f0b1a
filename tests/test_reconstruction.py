"""The criterion "obs": greedy elimination by brute-force least squares gives the same losses."""

from __future__ import annotations

from contextlib import closing
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, Net
from selection import sampled
from torch import Tensor, nn

import depcut
from depcut.calibration.store import Store
from depcut.calibration.visits import visits
from depcut.scores import Score, score
from depcut.scores.context import Context
from depcut.scores.elimination import Terms, Weight, _rising, eliminated
from depcut.scores.quadratic import FullGram, FullInverse
from depcut.scores.reconstruction import _Elimination
from depcut.scores.waiting import Waiting


def explicit(h: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Least tr (W - W') H (W - W')^T over all W' without the columns that are gone."""
    left = [i for i in range(len(h)) if i not in gone]
    solved = torch.zeros_like(weight)
    if left:
        solved[:, left] = torch.linalg.solve(h[left][:, left], (weight @ h)[:, left].T).T
    d = weight - solved
    return float((d @ h @ d.T).trace())


def readers(taps: int, outputs: list[int], blocks: int = 1) -> tuple[Any, Any]:
    """Readers of six units, and their (H, W) by block."""
    made, plain = [], []
    for out in outputs:
        x = torch.randn(blocks, 200, 6 * taps, dtype=torch.float64)
        x[..., 1] = x[..., 0] + 0.1 * x[..., 1]
        h, w = x.transpose(1, 2) @ x, torch.randn(blocks, out, 6 * taps, dtype=torch.float64)
        columns = torch.arange(6 * taps).reshape(1, 6, taps)
        inverse, gram = FullInverse(torch.linalg.inv(h)), FullGram(w.transpose(1, 2) @ w)
        made.append(Weight(inverse, gram, 6 * taps, columns, blocks))
        plain += list(zip(h, w, strict=True))
    return made, plain


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("outputs", [[3], [3, 5]])
@pytest.mark.parametrize("blocks", [1, 2])
def test_scores_add_up_to_the_loss_of_explicit_greedy_elimination(
    taps: int, outputs: list[int], blocks: int
) -> None:
    torch.manual_seed(0)
    made, plain = readers(taps, outputs, blocks)
    columns = np.arange(6 * taps).reshape(6, taps)

    def loss(units: list[int]) -> float:
        gone = [int(c) for u in units for c in columns[u]]
        return sum(explicit(h, w, gone) for h, w in plain)

    gone: list[int] = []
    costs = []
    while len(gone) < 6:
        rest = [u for u in range(6) if u not in gone]
        best = min(rest, key=lambda u: loss([*gone, u]))
        costs.append(loss([*gone, best]) - loss(gone))
        gone.append(best)
    scores = eliminated(made, 1, 6)[0]
    assert np.argsort(scores, kind="stable").tolist() == gone
    np.testing.assert_allclose(scores[gone], _rising(costs, [1] * 6), rtol=2e-3)
    np.testing.assert_allclose(scores.sum(), loss(list(range(6))), rtol=2e-3)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("budget", [1, 2**20])
def test_readers_whose_matrices_wait_elsewhere_give_the_same_scores(taps: int, budget: int) -> None:
    torch.manual_seed(0)
    made, _ = readers(taps, [3, 5], 2)
    again = deepcopy(made)
    with Store(budget) as store:
        waiting = [Waiting(reader, store, i) for i, reader in enumerate(again)]
        assert not vars(again[0].gram)
        assert bool(store.spilled) == (budget == 1)
        scores = eliminated(waiting, 1, 6)
        assert not store.held
    np.testing.assert_array_equal(scores, eliminated(made, 1, 6))


@pytest.mark.parametrize("rows", [4, 40])
def test_scores_in_single_precision_are_those_in_double(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 30)).eval()
    data = [torch.randn(rows, 5) * 1e3 for _ in range(2)]
    analysis = depcut.analyze(model, data[0])
    calibration = analysis.calibrate(data, progress=False)
    found = []
    for wide in (1, 1 << 30):
        monkeypatch.setattr("depcut.scores.readers._WIDE", wide)
        found.append(score("obs", analysis.coupling, model, 0, calibration))
    singles, doubles = (np.concatenate(each) for each in found)
    assert not np.array_equal(singles, doubles)
    np.testing.assert_allclose(singles, doubles, rtol=1e-3)


def test_steps_that_cost_less_than_those_before_share_with_them() -> None:
    assert _rising([1.0, 0.0, 4.0], [1, 1, 2]).tolist() == [0.5, 0.5, 2.0, 2.0]
    assert _rising([0.0, 0.0], [1, 1]).tolist() == [0.0, 0.0]


ATTENTIONS = [n for n in NETS.values() if n.name.startswith("attention_")]


@pytest.mark.parametrize("net", ATTENTIONS, ids=lambda n: n.name)
def test_terms_of_a_product_have_the_energy_of_what_zeroing_them_takes(net: Net) -> None:
    """Indices of head_dim zeroed in q: what the product loses, by einsum on the captured values."""
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    coupling = analysis.coupling
    data = analysis.calibrate([net.inputs(3)], progress=False)
    assert data is not None
    work = _Elimination(Context(coupling, model, 0, Score("obs"), data))
    with closing(visits(coupling, model, data, work.shown)) as walk:
        for visit in walk:
            work._gather(*visit)
    assert work.gathered.inputs
    for product, grams in work.gathered.products.items():
        gram = grams.sum(0)
        terms = lost(coupling, model, data, product)
        size = len(gram)
        for units in ([0], [0, size - 1], list(range(size))):
            some = sorted(set(units))
            energy = float(sum(terms[u] for u in some).square().sum())  # type: ignore[union-attr]
            np.testing.assert_allclose(gram[np.ix_(some, some)].sum(), energy, rtol=1e-3)


def lost(coupling: Any, model: nn.Module, data: Any, product: Any) -> list[Tensor]:
    """What each index of the summed axis adds to a product, whatever operator computes it."""
    from depcut.plan.keep import Keep
    from depcut.reference.run import Reference

    steps = Reference(Keep(coupling, {}), model).steps(
        data.leaves(data.batches[0]), stops={product.node}
    )
    with torch.no_grad():
        step = next(steps)
    (q, d), (k, e) = [(step.values[source], dim) for source, dim in product.places]
    target, out = str(product.node.target), []
    for unit in range(q.shape[d]):
        a, b = (t.index_select(i, torch.tensor([unit])).double() for t, i in ((q, d), (k, e)))
        if "einsum" in target:
            out.append(torch.einsum(product.node.args[0], a, b))
        elif "scaled_dot" in target:
            first, second = (a, b) if product.node.args[0] is product.places[0][0] else (b, a)
            heads = first.shape[-3] // second.shape[-3]
            out.append(first @ second.repeat_interleave(heads, -3).transpose(-1, -2))
        else:
            first, second = (a, b) if product.node.args[0] is product.places[0][0] else (b, a)
            out.append(first @ second)
    return out


def test_removed_terms_add_up() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(9, 6).double(), torch.randn(7, 6).double()
    gram = ((a.T @ a) * (b.T @ b)).numpy()
    terms = Terms.of(gram[None], float(gram.sum()), 1)
    spent, gone, alive = 0.0, [], list(range(6))
    for unit in (3, 0, 2):
        alone = terms.losses()[0, unit]
        spent += terms.remove(torch.tensor([[unit]]))
        assert spent == pytest.approx(float(alone) + (spent - float(alone)))
        gone.append(alive.pop(unit))
        assert spent == pytest.approx(float((a[:, gone] @ b[:, gone].T).square().sum()))


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)
        with torch.no_grad():
            self.up.weight[3:6] = 0
            self.up.bias[3:6] = -1

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("dead", [1.0, 0.0])
def test_dead_units_go_first_and_give_no_nan(dead: float) -> None:
    model = Dead().eval()
    with torch.no_grad():
        model.up.weight *= dead
    x = torch.randn(40, 6)
    analysis = depcut.analyze(model, x)
    data = analysis.calibrate([x], progress=False)
    [found] = score("obs", analysis.coupling, model, 0, data)
    assert np.isfinite(found).all()
    assert set(np.argsort(found)[:3]) == {3, 4, 5} or not dead
    assert dead or float(found.max()) < 1e-6
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.bias.fill_(1000.1)
    [found] = score("obs", analysis.coupling, model, 0, data)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("net", sampled(NETS))
def test_every_structure_has_finite_scores(net: Net) -> None:
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    data = analysis.calibrate([net.inputs(3), net.inputs(4)], progress=False)
    found = score("obs", analysis.coupling, model, 0, data)
    assert [s.shape[-1] for s in found] == [g.size for g in analysis.groups]
    assert all((s >= 0).all() for s in found)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["plain", "attention_gqa_expand", "grouped_bottleneck"])
def test_little_memory_gives_the_same_scores(name: str) -> None:
    net = NETS[name]
    model, data = net.build().eval(), [net.inputs(4), net.inputs(4)]
    analysis = depcut.analyze(model, net.inputs(2))
    once, by_group = (
        score("obs", analysis.coupling, model, 0, analysis.calibrate(data, memory=memory))
        for memory in ("4GiB", 1)
    )
    assert once
    for a, b in zip(once, by_group, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
