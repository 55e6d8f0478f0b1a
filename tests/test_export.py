"""Export: what appears is valid and agrees; what does not agree never appears."""

import importlib
import inspect

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from depcut.errors import ExportError, InputError
from depcut.export import export
from depcut.runtime import bind_inputs, resized

# `import depcut.export as ...` would give the function of that name in the package.
export_module = importlib.import_module("depcut.export")


class Several(nn.Module):
    """Two inputs, one optional and in an order of its own; outputs in a dict and a tuple."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, image, scale=None, ids=None):
        hidden = self.drop(self.norm(self.conv(image)).relu()).mean((2, 3))
        if scale is not None:
            hidden = hidden * scale
        if ids is not None:
            hidden = hidden + self.table(ids).mean(1)
        return {"scores": self.head(hidden), "hidden": (hidden, hidden.sum(1))}


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).view(3, 4) * 2


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand(4)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def run(path, feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


IMAGE = torch.randn(2, 3, 8, 8)


def test_tensor_input_takes_any_batch_size(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    report = export(model, tmp_path / "net.onnx", IMAGE)
    assert report.batch_sizes == (2, 3)
    assert report.path == tmp_path / "net.onnx"
    assert report.bytes == report.path.stat().st_size
    assert report.max_rel_error < 1e-4
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        (found,) = run(report.path, {report.inputs[0]: x})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_batch_of_one_is_no_constant(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    report = export(model, tmp_path / "net.onnx", IMAGE[:1])
    (found,) = run(report.path, {report.inputs[0]: torch.randn(7, 3, 8, 8)})
    assert found.shape == (7, 4 * 36)


@pytest.mark.parametrize(
    "inputs",
    [
        (IMAGE, torch.rand(2, 1), torch.tensor([[1, 2], [3, 4]])),
        {"ids": torch.tensor([[1, 2], [3, 4]]), "scale": torch.rand(2, 1), "image": IMAGE},
        {"ids": torch.tensor([[1, 2], [3, 4]]), "image": IMAGE},
        (IMAGE,),
    ],
    ids=["tuple", "dict out of order", "dict with a gap", "one of three"],
)
def test_inputs_and_outputs_of_all_forms(tmp_path, inputs):
    model = Several().eval()
    report = export(model, tmp_path / "net.onnx", inputs)
    assert len(report.outputs) == 3
    bound = resized(bind_inputs(model, inputs), 3)
    tensors = {n: v for n, v in bound.arguments.items() if isinstance(v, torch.Tensor)}
    assert set(report.inputs) == set(tensors)
    expected = model(*bound.args, **bound.kwargs)
    found = run(report.path, tensors)
    for want, got in zip((expected["scores"], *expected["hidden"]), found, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_model_state_is_the_same_afterwards(tmp_path):
    model = Several()
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "net.onnx", IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ExportError):
        export(Branching().train(), tmp_path / "no.onnx", torch.randn(2, 4))


def test_file_is_valid_and_says_who_made_it(tmp_path):
    report = export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4), metadata={"a": "b"})
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["a"] == "b"
    assert "depcut_version" in metadata
    assert report.opset == proto.opset_import[0].version >= 18


def test_fixed_batch_is_reported_and_written_as_a_number(tmp_path):
    report = export(FixedBatch(), tmp_path / "net.onnx", torch.randn(3, 4))
    assert report.batch_sizes == (3,)
    assert "this batch size only" in str(report)
    (entry,) = onnx.load(report.path).graph.input
    assert entry.type.tensor_type.shape.dim[0].dim_value == 3


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_EXTERNAL_DATA_FROM", 100)
    model = nn.Linear(64, 64).eval()
    report = export(model, tmp_path / "net.onnx", torch.randn(2, 64))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    x = torch.randn(4, 64)
    (found,) = run(report.path, {report.inputs[0]: x})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_half_precision(tmp_path):
    model = nn.Linear(8, 8).half()
    report = export(model, tmp_path / "net.onnx", torch.randn(2, 8).half())
    assert (
        onnx.load(report.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    )


def test_attention_has_an_onnx_form_in_eval_mode(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).requires_grad_(False)
    report = export(layer, tmp_path / "net.onnx", torch.randn(2, 5, 16))
    assert report.batch_sizes == (2, 3)
    assert torch.backends.mha.get_fastpath_enabled()


class Windows(nn.Module):
    """Attention whose result is contiguous by its kernel, but not by its formula."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(2, 5, 5))  # no fused kernel has a gradient for it

    def forward(self, x):
        heads = (*x.shape[:-1], -1, 8)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in self.layers[:3])
        bias = self.bias.unsqueeze(0)  # without gradients while captured, with them converted
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.layers[3](y.transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))


def test_attention_with_strides_of_its_own(tmp_path):
    report = export(Windows(), tmp_path / "net.onnx", torch.randn(2, 5, 16))
    assert report.batch_sizes == (2, 3)


def test_disagreement_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match="differ by") as caught:
        export(Random(), path, torch.randn(2, 4))
    assert "output" in caught.value.where
    assert "rtol" in caught.value.remedy
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_tolerances_are_the_callers_to_widen(tmp_path):
    report = export(Random(), tmp_path / "net.onnx", torch.randn(2, 4), atol=2.0)
    assert 0 < report.max_abs_error < 2


def test_no_agreement_where_only_one_has_nan(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    honest = export_module.as_array
    monkeypatch.setattr(export_module, "as_array", lambda tensor: honest(tensor) * np.nan)
    with pytest.raises(ExportError, match="differ by inf"):
        export(model, tmp_path / "net.onnx", torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "inputs", "error", "says"),
    [
        (Branching(), torch.randn(2, 4), ExportError, "torch.export cannot capture"),
        (nn.Linear(4, 4), "x", InputError, "inputs is a str"),
        (nn.Linear(4, 4), {"wrong": torch.randn(2, 4)}, InputError, "do not fit forward"),
        (nn.Linear(4, 4), (), InputError, "do not fit forward"),
        (nn.Linear(4, 4), (3,), InputError, "no tensor"),
        (nn.Linear(4, 4).bfloat16(), torch.randn(2, 4).bfloat16(), ExportError, "onnxruntime"),
    ],
)
def test_bad_input_names_what_and_what_to_do(tmp_path, model, inputs, error, says, capfd):
    with pytest.raises(error, match=says) as caught:
        export(model, tmp_path / "net.onnx", inputs)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_missing_folder(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        export(nn.Linear(4, 4), tmp_path / "no" / "net.onnx", torch.randn(2, 4))


def test_nothing_is_printed(tmp_path, capfd):
    export(Several(), tmp_path / "net.onnx", IMAGE)
    assert capfd.readouterr() == ("", "")


def test_resizing_changes_the_batch_only():
    rows, other = torch.arange(6).view(2, 3), torch.randn(4, 2)
    signature = inspect.signature(lambda a, b, c, d: None)
    bound = resized(signature.bind(rows, [rows, other], 3, torch.tensor(1.0)), 5)
    grown, (nested, same), number, scalar = bound.args
    assert grown[:, 0].tolist() == [0, 3, 0, 3, 0]
    assert torch.equal(nested, grown)
    assert same is other
    assert number == 3
    assert scalar.dim() == 0
