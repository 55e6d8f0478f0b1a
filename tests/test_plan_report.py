"""Where a model comes from: in its files without being asked for, and nowhere in the model."""

import copy
import pickle

import onnx
import pytest
import torch
from torch import nn

import depcut
from depcut.apply.report import lineage_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


INPUTS = torch.randn(2, 8)


def metadata(report):
    return {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}


def test_a_shrunk_model_tells_its_plan_in_the_file(tmp_path):
    model = net()
    slim = depcut.shrink(model, 0.5, INPUTS, of="params")
    plan = depcut.analyze(model, INPUTS).plan(0.5, of="params")
    expected = {
        "depcut_version": depcut.__version__,
        "plan_digest": plan.digest,
        "ratio": "0.5",
        "of": "params",
    }
    assert metadata(depcut.export(slim, tmp_path / "slim.onnx", INPUTS)) == expected
    dense = metadata(depcut.export(model, tmp_path / "dense.onnx", INPUTS))
    assert dense == {"depcut_version": depcut.__version__}


def test_a_plan_from_a_file_tells_the_same(tmp_path):
    model = net()
    plan = depcut.analyze(model, INPUTS).plan(0.5)
    plan.save(tmp_path / "plan.json")
    slim = depcut.Plan.load(tmp_path / "plan.json").apply(net())
    report = depcut.export(slim, tmp_path / "slim.onnx", INPUTS, metadata={"of": "all", "by": "me"})
    entries = metadata(report)
    assert entries["plan_digest"] == plan.digest
    assert entries["ratio"] == "0.5"
    assert (entries["of"], entries["by"]) == ("all", "me")


def test_the_last_plan_counts():
    first = depcut.shrink(net(), 0.3, INPUTS, align=1)
    second = depcut.shrink(first, 0.5, INPUTS, align=1)
    assert lineage_of(first)["ratio"] == "0.3"
    assert lineage_of(second)["ratio"] == "0.5"


def test_the_model_stays_what_it_was():
    model = net()
    slim = depcut.shrink(model, 0.5, INPUTS)
    assert set(vars(slim)) - set(vars(model)) == {"_depcut_report", "_depcut_plans"}
    assert list(slim.state_dict()) == list(model.state_dict())
    assert type(slim) is type(model)


def test_the_report_says_what_was_done():
    model = net()
    plan = depcut.analyze(model, INPUTS).plan(0.5, of="params")
    slim = plan.apply(model)
    found = depcut.report(slim)
    assert found.digest == plan.digest
    assert found.settings == plan.settings
    assert found.params == (sum(map(torch.numel, model.parameters())), plan.params)
    assert found.params[1] == sum(map(torch.numel, slim.parameters()))
    assert found.macs == (depcut.analyze(model, INPUTS).macs, plan.macs)
    assert found.generated == {}
    assert 0 <= found.error < 1e-5
    assert found.compensation is None
    assert plan.digest in str(found)


def test_repairs_are_in_the_report():
    data = [torch.randn(16, 8) for _ in range(4)]
    found = depcut.report(depcut.shrink(net(), 0.5, data=data, progress=False))
    assert {r.layer for r in found.compensation.repairs} == {"2", "4"}
    assert "layers re-solved" in str(found)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda slim: pickle.loads(pickle.dumps(slim)),  # noqa: S301  (our own bytes)
        lambda slim: slim.half(),
    ],
)
def test_copies_tell_the_same(again):
    slim = depcut.shrink(net(), 0.5, INPUTS)
    expected = depcut.report(slim)
    assert depcut.report(again(slim)) == expected


def test_a_dense_model_has_no_report():
    with pytest.raises(depcut.PlanError, match=r"no plan was applied(.|\n)*depcut.shrink"):
        depcut.report(net())
    with pytest.raises(depcut.InputError, match="model is a str"):
        depcut.report("model")
