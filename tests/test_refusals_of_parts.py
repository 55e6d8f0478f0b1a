"""What functions below the surface refuse: files, programs, targets that are something else."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.calibration.rows import batched
from depcut.cli.factories import import_function
from depcut.deploy.program import _compare, _plain
from depcut.errors import ExportError, InputError, PlanError
from depcut.storage.graphs import _function, _graph
from depcut.timing.memory import session_memory

X = torch.randn(2, 4)


# Functions by their path -------------------------------------------------------------------------


def test_a_function_is_imported_by_its_path() -> None:
    assert import_function("torch.nn.functional:mse_loss") is torch.nn.functional.mse_loss


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("math:pi", "a float cannot be called"),
        ("no_such_module:loss", "No module named 'no_such_module'"),
        ("ends_the_process:loss", "cannot import it: SystemExit"),
    ],
)
def test_what_is_no_function_is_refused(
    target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_the_process.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=words):
        import_function(target)
    assert "ends_the_process" not in sys.modules


# Programs of torch.export ------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Any


def test_containers_become_those_of_python() -> None:
    given = {"a": Pair(X, None), "b": [X, (X,)], "c": None, "d": depcut.Options()}
    found = _plain(given)
    assert list(found) == ["a", "b", "d"]
    assert type(found["a"]) is tuple
    assert type(found["b"]) is list
    assert found["d"]["align"] == depcut.Options().align


class Returns(nn.Module):
    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made(x)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (ValueError("no room"), "the exported program stops: ValueError: no room"),
        (lambda x: x[:1], "returns other tensors than the model"),
        (lambda x: x + 1, "compute different values"),
    ],
)
def test_a_program_that_is_not_the_model_is_refused(made: Any, words: str) -> None:
    model = Returns(lambda x: x)
    arguments = inspect.signature(model.forward).bind(X)
    _compare(model, Returns(lambda x: x.clone()), arguments, "batch size 2")
    with pytest.raises(ExportError, match=re.escape(words)):
        _compare(model, Returns(made), arguments, "batch size 2")


def test_whole_numbers_of_a_program_are_compared_exactly() -> None:
    model = Returns(lambda x: x.argmax(1))
    arguments = inspect.signature(model.forward).bind(X)
    _compare(model, Returns(lambda x: x.argmax(1)), arguments, "batch size 2")
    with pytest.raises(ExportError, match="compute different values"):
        _compare(model, Returns(lambda x: x.argmin(1)), arguments, "batch size 2")


# Stored graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("import os", "call_module", "has the target 'import os'"),
        ("a.b", "call_function", "has the target 'a.b'"),
        ({"function": "eval"}, "call_method", "is a call_method"),
        ({"operator": ["aten", "add"]}, "call_function", "aten.add is no operator"),
    ],
)
def test_a_stored_node_that_refers_to_something_else_is_refused(
    target: Any, kind: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        _function(target, kind)


def test_a_stored_node_has_a_name_that_is_one() -> None:
    node = {"name": "x = 1", "kind": "placeholder", "target": "x", "args": [], "kwargs": {}}
    with pytest.raises(ValueError, match="is called 'x = 1'"):
        _graph([node], lambda item: item)


# Rows of data ------------------------------------------------------------------------------------


def test_rows_that_make_no_batch_are_refused() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> Any:
            return {"x": X[0], "object": object()}

    with pytest.raises(InputError, match="cannot be made a batch"):
        batched(Rows(), 1)


def test_columns_become_tensors() -> None:
    class Rows(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield {"ids": [1, 2], "values": np.ones(2, np.float32), "text": ["a", "b"]}
            yield {"ids": [3, 4], "values": np.ones(2, np.float32), "text": ["c", "d"]}

    (batch,) = batched(Rows(), 1)
    assert torch.equal(batch["ids"], torch.tensor([[1, 2], [3, 4]]))
    assert batch["values"].shape == (2, 2)


# Kept units --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([[0, 1], [2]], "row 0 keeps 2 units and row 1 keeps 1"),
        ([[0, 1], [0, 1]], "rows of units are kept"),
        (object(), "they are no flat list"),
    ],
)
def test_impossible_units_of_a_group_are_refused(kept: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    analysis = depcut.analyze(model, X)
    with pytest.raises(PlanError, match=words):
        analysis.plan_keeping({analysis.groups[0].name: kept})


# The memory of a file ----------------------------------------------------------------------------


def test_the_memory_of_a_file_is_that_of_its_weights(tmp_path: Path) -> None:
    sizes = {}
    for width in (8, 2048):
        weight = np.ones((width, width), np.float32)
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = onnx.helper.make_graph(
            [node],
            "net",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, width])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, width])],
            [onnx.numpy_helper.from_array(weight, "w")],
        )
        opset = onnx.helper.make_opsetid("", 17)
        onnx.save(
            onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "n"
        )
        # A process of its own measures: this one would take again what it freed.
        sizes[width] = session_memory(tmp_path / "n", {"x": np.ones((1, width), np.float32)}, 1)
    assert sizes[2048] > 2048**2 * 4
    assert sizes[2048] > sizes[8]


@pytest.mark.parametrize("model", [1.5, None, "model", 10**30])
def test_a_plan_is_applied_to_a_module(model: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    plan = depcut.analyze(net, X).plan(0.3, align=1)
    with pytest.raises(PlanError, match=r"applies to a torch\.nn\.Module, not to a"):
        plan.apply(model)
