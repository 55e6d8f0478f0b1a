"""Export: what appears is valid and agrees; what does not agree never appears."""

import inspect
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from depcut.deploy import convert, output_check, publish
from depcut.deploy.export import draft, export
from depcut.deploy.runtime import bind_inputs, resized
from depcut.errors import ExportError, InputError


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


def stored_beside(monkeypatch, limit=100):
    monkeypatch.setattr(convert, "_EXTERNAL_DATA_FROM", limit)


def agrees(path, model, features=64):
    x = torch.randn(4, features)
    name = onnx.load(path, load_external_data=False).graph.input[0].name
    (found,) = run(path, {name: x})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    stored_beside(monkeypatch)
    model = nn.Linear(64, 64).eval()
    report = export(model, tmp_path / "net.onnx", torch.randn(2, 64))
    graph, weights = sorted(tmp_path.iterdir())
    assert graph.name == "net.onnx"
    assert weights.match("net.onnx.*.data")
    assert report.bytes == graph.stat().st_size + weights.stat().st_size
    agrees(graph, model)


def test_a_second_export_replaces_both_files(tmp_path, monkeypatch):
    stored_beside(monkeypatch)
    path = tmp_path / "net.onnx"
    export(nn.Linear(64, 64), path, torch.randn(2, 64))
    before = set(tmp_path.iterdir())
    model = nn.Linear(64, 64).eval()
    export(model, path, torch.randn(2, 64))
    assert len(set(tmp_path.iterdir())) == 2
    assert set(tmp_path.iterdir()) & before == {path}
    agrees(path, model)
    stored_beside(monkeypatch, 2**30)
    export(model, path, torch.randn(2, 64))
    assert set(tmp_path.iterdir()) == {path}
    agrees(path, model)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_whenever_an_export_is_killed_a_whole_pair_is_there(tmp_path, monkeypatch, moved):
    stored_beside(monkeypatch)
    path = tmp_path / "net.onnx"
    old, new = nn.Linear(64, 64).eval(), nn.Linear(64, 64).eval()
    export(old, path, torch.randn(2, 64))
    honest, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        return honest(self, target)

    def unlink(self, missing_ok=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(publish.Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        export(new, path, torch.randn(2, 64))
    monkeypatch.undo()
    agrees(path, new if moved == 2 else old)


def linked(tmp_path, folder):
    """(file, link to it) in two folders; neither file is there."""
    (tmp_path / folder).mkdir(exist_ok=True)
    real, link = tmp_path / folder / "real.onnx", tmp_path / "link.onnx"
    link.symlink_to(real)
    return real, link


def test_weights_that_a_link_would_not_find_are_refused(tmp_path, monkeypatch):
    stored_beside(monkeypatch, 100)
    real, link = linked(tmp_path, "other")
    with pytest.raises(ExportError, match="not found through a link") as caught:
        export(nn.Linear(64, 64).eval(), link, torch.randn(2, 64))
    assert caught.value.remedy == f"export to {real}"
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(("folder", "limit"), [(".", 100), (".", 2**30), ("other", 2**30)])
def test_a_link_stays_one_and_its_file_is_written(tmp_path, monkeypatch, folder, limit):
    stored_beside(monkeypatch, limit)
    real, link = linked(tmp_path, folder)
    model = nn.Linear(64, 64).eval()
    report = export(model, link, torch.randn(2, 64))
    assert report.path == link
    assert link.is_symlink()
    agrees(link, model)
    agrees(real, model)


def test_a_pipe_is_refused_before_any_work(tmp_path):
    os.mkfifo(tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="is a FIFO"):
        export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4))


def test_an_exported_file_has_the_mode_of_the_umask_or_of_the_old_one(tmp_path):
    path = tmp_path / "net.onnx"
    before = os.umask(0o027)
    try:
        export(nn.Linear(4, 4), path, torch.randn(2, 4))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    export(nn.Linear(4, 4), path, torch.randn(2, 4))
    assert path.stat().st_mode & 0o777 == 0o604


def test_weights_of_another_name_are_not_ours_to_delete(tmp_path):
    path = tmp_path / "net.onnx"
    draft(nn.Linear(64, 64), torch.randn(2, 64), path)
    proto = onnx.load(path)
    onnx.save_model(
        proto, path, save_as_external_data=True, location="shared.bin", size_threshold=0
    )
    model = nn.Linear(64, 64).eval()
    export(model, path, torch.randn(2, 64))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "shared.bin"]
    agrees(path, model)


@pytest.mark.sweep
def test_more_than_two_gigabytes(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8704, 8704) for _ in range(8)))
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    bytes_of_weights = sum(parameter.nbytes for parameter in model.parameters())
    assert bytes_of_weights > 2.2 * 2**30
    report = export(model, tmp_path / "net.onnx", torch.randn(2, 8704))
    assert report.batch_sizes == (2, 3)
    assert report.bytes > bytes_of_weights
    graph, weights = sorted(tmp_path.iterdir())
    assert graph.stat().st_size < 1e5
    assert weights.stat().st_size >= bytes_of_weights


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:-1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(nn.functional.gelu(y.transpose(1, 2).reshape(x.shape)))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(8, 8), (2, 8)),
        pytest.param(Attention(), (2, 5, 16), marks=pytest.mark.sweep),
        pytest.param(convolutions(), (2, 3, 8, 8), marks=pytest.mark.sweep),
    ],
)
def test_half_precision(tmp_path, model, shape):
    report = export(model.half(), tmp_path / "net.onnx", torch.randn(shape).half())
    (entry,) = onnx.load(report.path).graph.input
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert report.batch_sizes == (2, 3)
    assert report.max_rel_error < 2e-2


def test_bfloat16_is_compared_where_the_runtime_has_kernels(tmp_path):
    model = nn.RMSNorm(8).bfloat16()
    x = torch.randn(2, 8).bfloat16()
    report = export(model, tmp_path / "net.onnx", x, opset=20)  # computed in float32 there
    assert report.batch_sizes == (2, 3)
    assert report.max_rel_error < 5e-2
    assert output_check.TOLERANCES[torch.bfloat16] == (5e-2, 1e-2)


def test_bfloat16_is_not_taken_for_equal(tmp_path, monkeypatch):
    honest = output_check._values
    monkeypatch.setattr(output_check, "_values", lambda value: honest(value) * 1.1)
    with pytest.raises(ExportError, match="differ by"):
        export(
            nn.RMSNorm(8).bfloat16(), tmp_path / "net.onnx", torch.randn(2, 8).bfloat16(), opset=20
        )


@pytest.mark.parametrize(
    ("model", "shape", "operator"),
    [
        (nn.Linear(4, 4), (2, 4), "Gemm"),
        (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), "Conv"),
        pytest.param(convolutions(), (2, 3, 8, 8), "Conv", marks=pytest.mark.sweep),
        pytest.param(Attention(), (2, 5, 16), "MatMul", marks=pytest.mark.sweep),
    ],
)
def test_a_missing_kernel_is_named(tmp_path, model, shape, operator):
    with pytest.raises(ExportError, match=rf"onnxruntime .*\b{operator}\b.*bfloat16") as caught:
        export(model.bfloat16(), tmp_path / "net.onnx", torch.randn(shape).bfloat16())
    assert "model.float()" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "opset", [18, *(pytest.param(n, marks=pytest.mark.sweep) for n in (20, 25)), 23]
)
def test_the_operator_set_is_the_callers_to_choose(tmp_path, opset):
    report = export(Attention(), tmp_path / "net.onnx", torch.randn(2, 5, 16), opset=opset)
    assert report.opset == opset
    operators = [node.op_type for node in onnx.load(report.path).graph.node]
    assert ("Attention" in operators) == (opset >= 23)


def test_the_newest_operator_set_with_translations_is_the_default(tmp_path):
    assert export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4)).opset == 23


@pytest.mark.sweep
def test_an_older_operator_set_where_the_runtime_has_no_newer_kernel(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), Random())
    for limit in (2**30, 1):
        stored_beside(monkeypatch, limit)
        report = export(model, tmp_path / "net.onnx", torch.randn(2, 4), atol=2.0)
        assert report.opset == 20
        assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    with pytest.raises(ExportError, match="no kernel for RandomUniformLike") as caught:
        export(model, tmp_path / "other.onnx", torch.randn(2, 4), atol=2.0, opset=23)
    assert "opset=" in caught.value.remedy


@pytest.mark.parametrize("opset", [17, 26, 20.0, "23", True])
def test_an_impossible_operator_set(tmp_path, opset):
    with pytest.raises(InputError, match=f"opset={opset!r} cannot be written") as caught:
        export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4), opset=opset)
    assert "18 to 25" in caught.value.remedy


@pytest.mark.parametrize("metadata", [{"ratio": 0.5}, {1: "a"}])
def test_metadata_are_texts(tmp_path, metadata):
    with pytest.raises(InputError, match="no pair of texts") as caught:
        export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4), metadata=metadata)
    assert "str(value)" in caught.value.remedy


def test_the_file_does_not_tell_whose_machine_wrote_it(tmp_path):
    report = export(Attention(), tmp_path / "net.onnx", torch.randn(2, 5, 16))
    data = report.path.read_bytes()
    assert str(Path(__file__).parent).encode() not in data
    assert b"stack_trace" not in data
    names = {
        entry.key for node in onnx.load(report.path).graph.node for entry in node.metadata_props
    }
    assert names == {"pkg.torch.onnx.name_scopes"}


@pytest.mark.sweep
def test_a_draft_may_fix_the_batch(tmp_path):
    model, x = Attention().train(), torch.randn(1, 5, 16)
    draft(model, x, tmp_path / "free.onnx", {"a": "b"})
    draft(model, x, tmp_path / "fixed.onnx", free_batch=False)
    assert model.training
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fixed.onnx", "free.onnx"]
    expected = model.eval()(x).detach().numpy()
    for name, batch in (("free", ""), ("fixed", 1)):
        proto = onnx.load(tmp_path / f"{name}.onnx")
        (entry,) = proto.graph.input
        size = entry.type.tensor_type.shape.dim[0]
        assert (size.dim_value == batch) if batch else size.dim_param
        (found,) = run(tmp_path / f"{name}.onnx", {entry.name: x})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


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


class Cancelling(nn.Module):
    """Single precision loses most digits of what it returns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 4), 1e4) + torch.randn(64, 4))

    def forward(self, x):
        return x @ self.weight - x.sum(1, keepdim=True) * 1e4


def test_an_error_as_large_as_pytorchs_own_is_rounding(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = Cancelling(), torch.randn(2, 64)
    monkeypatch.setitem(output_check.TOLERANCES, torch.float32, (0.0, 0.0))
    report = export(model, tmp_path / "net.onnx", x)
    assert 0 < report.max_rel_error < 0.05
    # the same difference where PyTorch is exact is an error
    monkeypatch.setattr(output_check, "_rounding", lambda *_: [0.0])
    with pytest.raises(ExportError, match=r"PyTorch's own rounding: 0\)"):
        export(model, tmp_path / "net.onnx", x)


def test_tolerances_are_the_callers_to_widen(tmp_path):
    report = export(Random(), tmp_path / "net.onnx", torch.randn(2, 4), atol=2.0)
    assert 0 < report.max_abs_error < 2


def test_no_agreement_where_only_one_has_nan(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    honest = output_check._exact
    monkeypatch.setattr(output_check, "_exact", lambda tensor: honest(tensor) * np.nan)
    with pytest.raises(ExportError, match="differ by inf"):
        export(model, tmp_path / "net.onnx", torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "inputs", "error", "says"),
    [
        (Branching(), torch.randn(2, 4), ExportError, "torch.export cannot capture"),
        (nn.Linear(4, 4), "x", InputError, "inputs is a str"),
        (nn.Linear(4, 4), {"wrong": torch.randn(2, 4)}, InputError, "do not fit forward"),
        (nn.Linear(4, 4), (), InputError, "inputs holds no tensor"),
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


@pytest.mark.parametrize(
    ("name", "says", "remedy"),
    [
        ("no/net.onnx", "no does not exist", "create it first"),
        ("", "is a folder", "name of a file"),
        ("n" * 300, "cannot be written: .*too long", "choose a folder"),
    ],
)
def test_a_place_where_no_file_can_be(tmp_path, name, says, remedy):
    with pytest.raises(ExportError, match=says) as caught:
        export(nn.Linear(4, 4), tmp_path / name, torch.randn(2, 4))
    assert str(tmp_path / name) in caught.value.where
    assert remedy in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_draft_that_cannot_be_written(tmp_path):
    with pytest.raises(ExportError, match="cannot be written") as caught:
        draft(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "no" / "net.onnx")
    assert caught.value.remedy


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
