"""Results show themselves: short, complete on demand, escaped, and without another file."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import depcut
from depcut.dead_units import Compaction
from depcut.pictures import Point, frontier, pareto
from depcut.pictures.layered import layered
from depcut.pictures.page import fragment, page
from depcut.pictures.summary import Summary, Table
from depcut.repair.compensate import Compensation, Repair
from depcut.support.repeats import collapsed
from depcut.timing.clock import Speedup, Timing
from depcut.timing.comparison import Comparison, Figures
from depcut.timing.measurements import BenchResult, Measurement

LAYERS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(2, 8)
    analysis = depcut.analyze(model, x)
    kept = {f"layers.{i}.up": range(8 + i) for i in range(LAYERS)}
    plan = analysis.plan_keeping(kept)
    repairs = Compensation((Repair("layers.0.down", 0.5, 0.01, 1e-3),), {"head": "not read"})
    report = replace(depcut.report(plan.apply(model)), compensation=repairs)
    times = {name: Timing.of([t] * 6) for name, t in (("dense", 2e-3), ("slim", 1e-3))}
    both = [Figures(1000, 4000, 900, times["dense"]), Figures(500, 2000, 450, times["slim"])]
    speedup = Speedup.between(times["dense"], times["slim"])
    measured = {name: {2: Measurement(2, timing)} for name, timing in times.items()}
    files = dict.fromkeys(times)
    return {
        "analysis": analysis,
        "plan": plan,
        "report": report,
        "comparison": Comparison(*both, speedup, "one thread", 2),
        "bench": BenchResult(measured, files, "torch", "cpu", 1, "a machine", 6),
        "compaction": Compaction(plan, (), (), model, ()),
    }


KINDS = ["analysis", "plan", "report", "comparison", "bench", "compaction"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"], ["layers.{0..2}.mlp"]),
        (["block1.layer1.conv1", "block1.layer2.conv1"], ["block1.layer{1,2}.conv1"]),
        (["a.conv1", "a.conv2"], ["a.conv1", "a.conv2"]),
        (["0", "2", "4", "6", "norm"], ["{0,2..6}", "norm"]),
        (["h.0", "x", "h.1", "h.5"], ["h.{0,1,5}", "x"]),
        (["h.3.qkv[1]", "h.4.qkv[1]", "h.3.qkv[2]"], ["h.{3,4}.qkv[1]", "h.3.qkv[2]"]),
        (["stage1.0.a", "stage2.0.a"], ["stage{1,2}.0.a"]),
        ([f"h.{i}" for i in (0, 2, 3, 5, 7, 8, 11, 13, 14)], ["h.{0,2,3,5,7,8,..14}"]),
    ],
)
def test_names_that_differ_in_an_index_are_one(names: list[str], expected: list[str]) -> None:
    assert collapsed(names) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_repr_is_short(results: dict[str, Any], kind: str) -> None:
    text = repr(results[kind])
    assert len(text) <= 300
    assert "\n" not in text


def test_what_a_result_holds_has_a_short_repr(results: dict[str, Any]) -> None:
    analysis = results["analysis"]
    for part in (analysis.coupling, analysis.groups[0], analysis.program, analysis.branches[0]):
        assert len(repr(part)) <= 300


def test_repeated_layers_are_one_row_and_all_are_listed_on_demand(results: dict[str, Any]) -> None:
    analysis = results["analysis"]
    text = str(analysis)
    assert f"layers.{{0..{LAYERS - 1}}}.up  x{LAYERS}" in text
    assert len(text.splitlines()) < 25
    full = analysis.listing(full=True)
    assert all(re.search(rf"layers\.{i}\.up ", full) for i in range(LAYERS))
    assert "group 'layers.5.up', 32 units" in analysis.explain("layers.5.up")


def test_rows_of_other_sizes_or_places_stay_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    text = str(depcut.analyze(model, torch.randn(2, 4)))
    assert "{0,1}  x2" in text
    assert re.search(r"│ 2 +│ 6 ", text)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_data_is_json(results: dict[str, Any], kind: str) -> None:
    assert len(json.dumps(results[kind].to_dict(), allow_nan=False)) > 2
    rows = results[kind].rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == json.loads(json.dumps(rows))


def test_the_plan_as_plain_data_is_what_its_file_holds(
    results: dict[str, Any], tmp_path: Any
) -> None:
    results["plan"].save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == results["plan"].to_dict()


def test_sizes_by_layer_add_up_to_those_of_the_model(results: dict[str, Any]) -> None:
    report = results["report"]
    for i in (0, 1):
        assert sum(layer.params[i] for layer in report.layers) == report.params[i]
        assert sum(layer.macs[i] for layer in report.layers) == report.macs[i]
    sizes = {layer.name: layer.shape for layer in report.layers}
    assert sizes["layers.3.up"] == ((32, 16), (11, 16))
    assert sizes["layers.3.down"] == ((16, 32), (16, 11))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_frame(results: dict[str, Any], kind: str) -> None:
    pytest.importorskip("pandas")
    frame = results[kind].to_pandas()
    assert len(frame) == len(results[kind].rows()) > 0


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("pandas", lambda results: results["plan"].to_pandas()),
        ("matplotlib", lambda results: results["plan"].plot()),
        ("matplotlib", lambda results: frontier([Point(1, 1)])),
    ],
)
def test_an_absent_library_is_named(
    results: dict[str, Any], library: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(depcut.InputError, match=f"pip install {library}"):
        call(results)


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_gets_a_fragment(results: dict[str, Any], kind: str) -> None:
    html = results[kind]._repr_html_()
    assert "<script" not in html
    assert results[kind].summary().title in html


def test_one_page_shows_all_that_is_known(results: dict[str, Any], tmp_path: Any) -> None:
    path = tmp_path / "page.html"
    others = [results[kind] for kind in ("report", "comparison")]
    results["plan"].to_html(path, *others, title="Deep & slim")
    text = path.read_text(encoding="utf-8")
    for heading in ("Sizes by layer", "Coupling", "Frozen dimensions", "Measured", "repairs"):
        assert f"<h2>{heading}" in text or f"{heading}</h2>" in text
    assert "<title>Deep &amp; slim" in text
    assert "model input" in text
    assert re.search(r"test_pictures\.py:\d+: return self\.head\(x\)", text)
    links = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)|@import""", text)
    assert all(target.startswith(("#", "data:")) for pair in links for target in pair if target)


def test_an_analysis_alone_is_a_page(results: dict[str, Any], tmp_path: Any) -> None:
    results["analysis"].to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>Deep</h1>" in text
    assert "before and after" not in text


def test_what_is_no_result_is_refused(results: dict[str, Any], tmp_path: Any) -> None:
    with pytest.raises(depcut.InputError, match="no result of depcut"):
        results["plan"].to_html(tmp_path / "page.html", results["plan"].model)
    with pytest.raises(depcut.DepcutError, match="page"):
        results["plan"].to_html(tmp_path / "absent" / "page.html")
    assert list(tmp_path.iterdir()) == []


HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{ 1 }}"


def test_names_and_code_of_the_user_are_escaped() -> None:
    layer = {"layer": HOSTILE, "kind": HOSTILE, "shape": [4, 4], "shape_now": [2, 4]}
    layer |= {"params": 16, "params_now": 8, "macs": 16, "macs_now": 8}
    group = {"group": HOSTILE, "units": 4, "rows": 1, "tie": None, "narrows": [HOSTILE]}
    group |= {"read_by": [], "members": [[HOSTILE, 0, "producer"]]}
    frozen = {"tensor": HOSTILE, "dim": 0, "size": 4, "reason": HOSTILE, "where": HOSTILE}
    analysis = {"model": HOSTILE, "groups": [group], "frozen": [frozen], "frozen_share": 0.5}
    analysis |= {"notes": [HOSTILE], "unused": [HOSTILE], "unknown": {HOSTILE: [HOSTILE]}}
    repairs = {"repairs": [{"layer": HOSTILE, "before": 0.5, "after": 0.1, "ridge": 0.1}]}
    report = {"digest": HOSTILE, "settings": {HOSTILE: HOSTILE}, "generated": {HOSTILE: HOSTILE}}
    report |= {"error": None, "macs": [16, 8], "params": [16, 8], "patched": {HOSTILE: HOSTILE}}
    report |= {"unreached": [HOSTILE], "notes": [], "compensation": {**repairs, "left": {}}}
    text = page({"analysis": analysis, "report": report, "layers": [layer]})
    assert "<img" not in text
    assert text.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["tensors"] == [HOSTILE]
    table = Table((HOSTILE,), [(HOSTILE,)], HOSTILE)
    short = fragment(Summary(HOSTILE, {HOSTILE: HOSTILE}, (table,), (HOSTILE,), {HOSTILE: HOSTILE}))
    assert "<img" not in short


def test_boxes_stand_below_what_feeds_them_and_do_not_touch() -> None:
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "b"), ("a", "e"), ("e", "d"), ("a", "d")]
    widths = dict.fromkeys("abcdefg", 40.0)
    found = layered(widths, edges)
    assert found.upward == {("d", "b")}
    for a, b in edges:
        assert (found.rank[a] > found.rank[b]) == ((a, b) in found.upward)
    for a in widths:
        for b in widths:
            if a < b and found.rank[a] == found.rank[b]:
                assert abs(found.x[a] - found.x[b]) >= 40
    assert found.paths["a", "d"][0] == (found.x["a"], found.rank["a"])
    assert found.paths["d", "b"][-1] == (found.x["b"], found.rank["b"])


def test_the_frontier_is_what_none_beats() -> None:
    points = [Point(10, 0.9, "a"), Point(6, 0.89, "b"), Point(7, 0.6, "c"), Point(6, 0.5, "d")]
    assert [point.name for point in pareto(points)] == ["b", "a"]
    with pytest.raises(depcut.InputError, match="Point"):
        frontier([(1, 2)])  # type: ignore[list-item]
    with pytest.raises(depcut.InputError, match="cost"):
        Point(float("nan"), 1)


def test_plots(results: dict[str, Any]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = results["plan"].plot()
    groups = len(results["plan"].sizes)
    assert [bar.get_width() for bar in axes.patches[groups:]] == [
        row["kept"] for row in results["plan"].rows()
    ]
    drawn = results["analysis"].plot_scores("l2", plan=results["plan"], ax=plt.figure().subplots())
    assert sum(line.get_marker() == "." for line in drawn.lines) == groups
    points = [Point(2, 0.9, "dense", (1.8, 2.2)), Point(1, 0.8, "slim")]
    assert frontier(points, cost="ms").get_xlabel() == "ms"
    with pytest.raises(depcut.InputError, match="ax is"):
        results["plan"].plot(ax="axes")
    plt.close("all")
