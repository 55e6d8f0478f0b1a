"""The walk: what is kept between stretches, in memory or on the disk, changes no result."""

from __future__ import annotations

import os
import stat
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from deep_nets import subject
from nets import NETS, Net
from selection import swept
from torch import Tensor, fx, nn

import depcut
from depcut.calibration import sensitivity
from depcut.calibration.cuts import cut, joined
from depcut.calibration.data import Calibration
from depcut.calibration.packing import packed
from depcut.calibration.sensitivity import sensitivities
from depcut.calibration.shelf import Shelf
from depcut.calibration.sites import find_sites
from depcut.calibration.store import Store
from depcut.calibration.visits import visits
from depcut.calibration.walk import Graph, Walk
from depcut.capture.held import held_tensors
from depcut.errors import DepcutError, InputError
from depcut.plan.keep import Keep
from depcut.reference.narrowed import Narrowed
from depcut.reference.run import Reference, ReferenceRun
from depcut.repair.compensate import re_solve
from depcut.support.memory import check_memory, free_memory

GENEROUS = 1 << 40
QUICK = ("unet", "attention_gqa_expand", "copy_into_slices")
SOME: list[Any] = [pytest.param(NETS[name], id=name) for name in QUICK]
SOME += swept((net for name, net in NETS.items() if name not in QUICK), 6)


def calibrated(net: Net, memory: int, batches: int = 3) -> tuple[depcut.Analysis, Calibration]:
    torch.manual_seed(0)
    analysis = depcut.analyze(net.build().eval(), net.inputs(2))
    items = [net.inputs(rows) for rows in (3, 4, 3)[:batches]]
    data = analysis.calibrate(items, progress=False, memory=memory)
    assert data is not None
    return analysis, data


def site_nodes(analysis: depcut.Analysis) -> list[fx.Node]:
    return list(dict.fromkeys(s.node for s in find_sites(analysis.coupling)))


def walked(analysis: depcut.Analysis, data: Calibration, store: Store) -> list[Any]:
    """Outputs of all batches, each of which has paused at every site."""
    held = Shelf(held_tensors(analysis.model))
    graph = Graph(Reference(Keep(analysis.coupling, {}), held))
    walk = Walk(data, [graph], [[n] for n in site_nodes(analysis)], store, [held])
    for (node,) in walk.stretches():
        assert [(n, at) for n, at, _ in walk.batches()] == [(i, node) for i in range(3)]
    return [walk.outputs(number, 0) for number in range(3)]


# Results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", SOME)
def test_what_is_kept_on_the_disk_changes_no_result(net: Net) -> None:
    analysis, data = calibrated(net, 1)
    with Store(1) as store:
        found = walked(analysis, data, store)
        assert store.spilled
        assert not store.most
    reference = Reference(Keep(analysis.coupling, {}), analysis.model)
    for outputs, batch in zip(found, data.batches, strict=True):
        with torch.no_grad():
            wanted, _ = reference.run(data.leaves(batch))
        for a, b in zip(outputs, wanted, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("net", SOME)
def test_derivatives_of_stretches_are_those_of_the_whole(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []

    def counted(*args: Any, **more: Any) -> list[fx.Node]:
        found = cut(*args, **more)
        cuts.append(len(found))
        return found

    monkeypatch.setattr(sensitivity, "cut", counted)
    found = []
    for memory in (GENEROUS, 1):
        analysis, data = calibrated(net, memory, 2)
        features = {s.node: s.family.result for s in find_sites(analysis.coupling)}
        found.append(sensitivities(analysis.coupling, analysis.model, data, features))
    assert cuts[0] == 0 < cuts[1]
    assert len(found[0]) == len(found[1])
    named = [{n.name: v for n, v in each.items()} for each in found]
    assert named[0].keys() == named[1].keys()
    for name, value in named[0].items():
        torch.testing.assert_close(named[1][name], value, rtol=1e-5, atol=0)


def test_batches_of_other_lengths_are_walked() -> None:
    net = NETS["attention_fused"]
    analysis = depcut.analyze(net.build().eval(), net.inputs(2))
    items = [net.inputs(4), net.inputs(3)[:, :3], net.inputs(4)[:, 1:]]
    whole = analysis.calibrate(items, progress=False, memory=GENEROUS)
    assert whole is not None
    both = (whole, replace(whole, memory=1))
    assert len({id(batch.resized) for batch in whole.batches}) == 3
    scores = [
        depcut.scores.score("obs", analysis.coupling, analysis.model, 0, data) for data in both
    ]
    for a, b in zip(*scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    plan = analysis.plan_keeping(oracle.random_keep(analysis, np.random.default_rng(0)))
    slim = [plan.apply(analysis.model, data=data, progress=False) for data in both]
    for a, b in zip(*(each.parameters() for each in slim), strict=True):
        torch.testing.assert_close(a, b)


# Weights that live elsewhere ----------------------------------------------------------------------


class Elsewhere(Mapping[str, Tensor]):
    """A model's tensors, each read anew; what is still alive of them is counted."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held, self.read = held, Counter[str]()
        self.alive = self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        self.read[name] += 1
        array = self.held[name].detach().numpy().copy()
        self.alive += array.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._freed, array.nbytes)
        return torch.from_numpy(array)

    def _freed(self, nbytes: int) -> None:
        self.alive -= nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __len__(self) -> int:
        return len(self.held)


def test_weights_are_read_once_and_held_for_a_stretch() -> None:
    it = subject("attention", 12)
    data = it.analysis.calibrate(it.data(), progress=False, memory=1)
    assert data is not None
    elsewhere = Elsewhere(held_tensors(it.model))
    whole = sum(t.numel() * t.element_size() for t in elsewhere.held.values())
    with closing(visits(it.analysis.coupling, elsewhere, data, site_nodes(it.analysis))) as found:
        shown = sum(1 for _ in found)
    assert shown == len(site_nodes(it.analysis)) * len(data.batches)
    assert set(elsewhere.read.values()) == {1}
    assert 0 < elsewhere.most < whole / 8
    assert not elsewhere.alive
    features = {s.node: s.family.result for s in find_sites(it.analysis.coupling)}
    away = Elsewhere(elsewhere.held)
    found_away = sensitivities(it.analysis.coupling, away, data, features)
    assert max(away.read.values()) <= 2  # forward, and back
    assert 0 < away.most < whole / 8
    for node, value in sensitivities(it.analysis.coupling, it.model, data, features).items():
        torch.testing.assert_close(found_away[node], value)


def test_narrowed_weights_are_re_solved_where_they_live() -> None:
    it = subject("attention", 8)
    data = it.analysis.calibrate(it.data(), progress=False, memory=1)
    assert data is not None
    plan = it.plan()
    keep = plan.keep()
    slim = plan.apply(it.model, data=data, progress=False)
    elsewhere = Elsewhere(held_tensors(it.model))
    whole = sum(t.numel() * t.element_size() for t in elsewhere.held.values())
    dense, written = Shelf(elsewhere), dict[str, Tensor]()
    with torch.no_grad():
        done, _ = re_solve(dense, Shelf(Narrowed(keep, dense, written)), keep, data)
    assert done.repairs
    assert set(elsewhere.read.values()) == {1}
    assert elsewhere.most < whole / 4
    assert len(written) < len(elsewhere.held)
    for name, tensor in held_tensors(slim).items():
        torch.testing.assert_close(Narrowed(keep, elsewhere, written)[name], tensor.detach())


def test_weights_that_share_a_module_are_read_again() -> None:
    net = NETS["module_called_twice"]
    analysis, data = calibrated(net, 1)
    elsewhere = Elsewhere(held_tensors(analysis.model))
    with closing(visits(analysis.coupling, elsewhere, data, site_nodes(analysis))) as found:
        assert len(list(found)) == 3 * len(site_nodes(analysis))
    assert 1 < max(elsewhere.read.values()) <= len(site_nodes(analysis))


# The store ----------------------------------------------------------------------------------------


def test_values_come_back_with_what_they_share() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    part, wide = base[1:, ::2], torch.ones(1, 3).expand(5, 3)
    lone = torch.arange(1000)[7:9]
    tree = {"a": [base, (part, 3)], "b": base.t(), "c": wide, "d": lone, "e": torch.empty(0, 2)}
    tree["f"], tree["g"] = torch.tensor([1 + 2j]).conj(), "text"
    assert packed(tree).nbytes < 64 + base.nbytes + 64 + 12 + 64 + 16
    for budget in (GENEROUS, 0):
        with Store(budget) as store:
            store.put("key", tree)
            found: dict[str, Any] = store.look("key")
            again = store.take("key")
            assert "key" not in store
            assert store.held == 0
        for out in (found, again):
            torch.testing.assert_close(out["a"][0], base)
            torch.testing.assert_close(out["a"][1][0], part)
            assert out["a"][1][0].stride() == part.stride()
            assert (out["a"][1][1], out["g"], out["c"].stride()) == (3, "text", (0, 1))
            torch.testing.assert_close(out["d"], lone)
            torch.testing.assert_close(out["f"], tree["f"])
            assert out["e"].shape == (0, 2)
        again["a"][1][0].fill_(-1)
        assert again["b"][0, 1] == again["a"][0][1, 0] == -1
        base.copy_(torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("share", [0, 1, 2, 3])
def test_no_more_is_held_than_the_budget(share: int) -> None:
    analysis, data = calibrated(NETS["unet"], 1)
    with Store(GENEROUS) as store:
        walked(analysis, data, store)
        everything = store.most
    budget = everything * share // 3
    with Store(budget) as store:
        walked(analysis, data, store)
        assert store.most <= budget
        assert bool(store.spilled) == (share < 3)
        assert not store.held or share


def tensors(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("work", ["obs", "wanda", "compensate"])
def test_temporary_files_are_private_and_always_removed(
    work: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    analysis, data = calibrated(NETS["plain"], 1)
    plan = analysis.plan_keeping(oracle.random_keep(analysis, np.random.default_rng(0)))
    calls, modes = [], set[int]()
    plain = ReferenceRun.call

    def watched(run: ReferenceRun, node: fx.Node) -> Any:
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*"))
        calls.append(bool(tensors(tmp_path)))
        if error is not None and sum(calls) == 5:
            raise error
        return plain(run, node)

    def call() -> None:
        if work == "compensate":
            plan.apply(analysis.model, data=data, progress=False)
        else:
            depcut.scores.score(work, analysis.coupling, analysis.model, 0, data)

    if work == "wanda":  # one stretch, as its weights are in memory; the visits alone are walked
        call()
        assert not any(calls)
        return
    monkeypatch.setattr(ReferenceRun, "call", watched)
    if error is None:
        call()
    else:
        with pytest.raises(error):
            call()
    assert any(calls)
    assert modes == {0o600, 0o700}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        return Path("/dev/full").open(mode)

    analysis, data = calibrated(NETS["plain"], 1)
    plan = analysis.plan_keeping(oracle.random_keep(analysis, np.random.default_rng(0)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(DepcutError, match="No space left") as caught:
            plan.apply(analysis.model, data=data, progress=False)
    assert str(tmp_path) in str(caught.value)
    assert "memory=" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Store(0) as store:
        store.put(0, torch.ones(3))
        for path in tensors(tmp_path):
            path.write_bytes(b"")
        with pytest.raises(DepcutError, match="shorter than it was"):
            store.look(0)


# Where to pause -----------------------------------------------------------------------------------


def test_what_reads_the_same_is_seen_together() -> None:
    analysis, _ = calibrated(NETS["attention_separate"], 1)
    nodes = site_nodes(analysis)
    found = joined(analysis.program, nodes, lambda n: n.all_input_nodes)
    assert [len(each) for each in found].count(3) == 1  # queries, keys, values
    assert [n for each in found for n in each] == nodes


class Between(nn.Module):
    """Two layers read one tensor, which is written to between them."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.first, self.second, self.writes = nn.Linear(4, 4), nn.Linear(4, 4), writes

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.first(x)
        if self.writes:
            x.add_(1)
        return y + self.second(x)


@pytest.mark.parametrize("writes", [True, False])
def test_what_is_written_to_in_between_is_not_seen_together(writes: bool) -> None:
    analysis = depcut.analyze(Between(writes=writes), torch.randn(2, 4))
    found = joined(analysis.program, site_nodes(analysis), lambda n: n.all_input_nodes)
    assert list(map(len, found)) == ([1, 1] if writes else [2])


def test_cuts_are_where_little_is_alive() -> None:
    it = subject("attention", 6)
    program = it.analysis.program
    cost = {n: 1 for n in program.graph.graph.nodes if n.op == "call_function"}
    found = cut(program, cost, len(cost) // 4)
    assert 4 <= len(found) <= 8
    for node in found:
        alive = {s for n in program.graph.graph.nodes if n >= node for s in n.all_input_nodes}
        before = [s for s in alive if s < node and s not in program.tensors and s.op != "get_attr"]
        assert len([s for s in before if isinstance(s.meta.get("val"), Tensor)]) == 1
    assert cut(program, cost, len(cost)) == []


# Amounts of memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 kib", 1536),
        ("12", 12),
        (7, 7),
        ("3T", 3e12),
    ],
)
def test_amounts_of_memory(given: str | int, nbytes: int) -> None:
    assert check_memory(given) == nbytes


@pytest.mark.parametrize("given", [0, -1, "", "GiB", "4 goats", "1e3", 2.5, True, "9" * 30, b"1"])
def test_what_is_no_amount_of_memory_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="memory is") as caught:
        check_memory(given)
    assert "4GiB" in str(caught.value)


def test_the_machine_has_some_memory() -> None:
    assert check_memory(None) is None
    assert 1 << 20 < free_memory() < 1 << 50
