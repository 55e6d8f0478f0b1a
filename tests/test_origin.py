"""Where a model comes from: in its files without being asked for, and nowhere in the model."""

import copy
import gc

import onnx
import pytest
import torch
from torch import nn

import depcut
from depcut.deploy.lineage import _ORIGINS, origin_of, record_origin


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
    assert origin_of(first)["ratio"] == "0.3"
    assert origin_of(second)["ratio"] == "0.5"


def test_the_model_itself_does_not_know():
    model = net()
    slim = depcut.shrink(model, 0.5, INPUTS)
    assert set(vars(slim)) == set(vars(model))
    assert list(slim.state_dict()) == list(model.state_dict())
    assert type(slim) is type(model)
    assert origin_of(slim.half())  # in place: the same object
    assert not origin_of(copy.deepcopy(slim))


def test_it_lasts_as_long_as_the_model():
    gc.collect()
    before = len(_ORIGINS)
    slim = depcut.shrink(net(), 0.5, INPUTS)
    assert len(_ORIGINS) == before + 1
    del slim
    gc.collect()
    assert len(_ORIGINS) == before


class Equal(nn.Module):
    __hash__ = None

    def __eq__(self, other):
        return True


def test_models_are_told_apart_by_identity():
    first, second = Equal(), Equal()
    record_origin(first, lambda: {"name": "first"})
    assert origin_of(first) == {"name": "first"}
    assert origin_of(second) == {}
    record_origin(first, lambda: {"name": "again"})
    assert origin_of(first) == {"name": "again"}


def test_a_broken_origin_is_not_hidden():
    model = nn.Identity()
    record_origin(model, lambda: {}["missing"])
    with pytest.raises(KeyError):
        origin_of(model)
