"""int8 files: what appears computes in int8, near the float file; what does not never appears."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import depcut
from depcut.deploy import bias_correction, convert, int8_check, quantization, quantize
from depcut.deploy.feeds import fed
from depcut.deploy.quantization import DYNAMIC, STATIC, Request, chosen_scheme
from depcut.deploy.runtime import open_session
from depcut.errors import ExportError, InputError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def images(seed=0, count=3, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, 8, 8, generator=generator) for _ in range(count)]


def convolutional():
    """Padding, strides, groups, batch norms and a convolution without a bias."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    with torch.no_grad():
        net.train()
        for batch in images(7):
            net(batch)
    return net.eval()


class Transformer(nn.Module):
    """One attention block that classifies texts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, scale=None):
        hidden = self.block(self.table(tokens))
        return {"scores": self.head(hidden[:, 0] if scale is None else hidden[:, 0] * scale)}


TOKENS = torch.arange(12).view(2, 6)


def outputs(path, feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {e.name: feeds.numpy() for e in session.get_inputs()})[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def static(folder):
    return depcut.export(
        convolutional(), folder / "static.onnx", IMAGE, quantize="int8", data=images()
    )


@pytest.fixture(scope="module")
def floating(folder):
    return depcut.export(convolutional(), folder / "float.onnx", IMAGE)


# What appears -------------------------------------------------------------------------------------


def test_convolutions_with_data_are_quantized_once_and_for_all(static, floating):
    found = static.quantization
    assert found.scheme == STATIC
    assert found.why == "3 of 4 layers are convolutions, and there is data to take ranges from"
    assert found.kernels == {"QGemm": 1, "QLinearConv": 3}
    assert found.float_kernels == {}
    assert found.share == 1
    assert found.batches == 3
    assert found.float_bytes == floating.bytes
    assert static.bytes == static.path.stat().st_size
    assert static.batch_sizes == (2, 3)
    assert "int8 kernels in the runtime's profile: 1 QGemm, 3 QLinearConv (100%" in str(static)


def test_weights_are_of_eight_bits_by_channel(static):
    graph = onnx.load(static.path).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 4
    for node in layers:
        stored, scale = (tensors[name] for name in made_by[node.input[1]].input[:2])
        assert stored.dtype == np.int8
        assert scale.shape == (len(stored),)
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert not [t for t in tensors.values() if t.dtype == np.float32 and t.ndim > 1]


def test_errors_are_those_of_the_outputs_on_the_data(static, floating):
    pairs = [(outputs(floating.path, x), outputs(static.path, x)) for x in images()]
    exact, found = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    error = found - exact
    about = static.quantization
    assert about.rms_error == pytest.approx(np.sqrt((error**2).sum() / (exact**2).sum()))
    assert about.max_abs_error == pytest.approx(np.abs(error).max())
    assert about.max_rel_error == pytest.approx(np.abs(error).max() / np.abs(exact).max())
    assert 0 < about.rms_error < 0.05


def test_an_int8_file_that_is_far_off_is_warned_of(tmp_path):
    model = convolutional()
    with torch.no_grad():  # a channel that nothing reads takes the whole range
        model[0].weight[0] *= 1e5
        model[2].weight[0] = 0
    with pytest.warns(UserWarning, match=r"int8 outputs are off by \d+% .* on 3 batches of data"):
        far = depcut.export(
            model, tmp_path / "far.onnx", IMAGE, quantize="int8", data=images()
        ).quantization
    assert far.rms_error > 0.1


def test_the_file_takes_other_batch_sizes_and_says_who_made_it(static):
    model = convolutional()
    for x in (*images(3, 1, 1), *images(3, 1, 7)):
        found, wanted = outputs(static.path, x), model(x).detach().numpy()
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    notes = {e.key: e.value for e in onnx.load(static.path).metadata_props}
    assert notes.keys() == {"depcut_version", "depcut_quantization"}
    assert notes["depcut_quantization"] == STATIC


def test_a_slim_model_keeps_its_plan_in_the_file(tmp_path):
    slim = depcut.shrink(convolutional(), 0.4, IMAGE, data=images())
    report = depcut.export(slim, tmp_path / "slim.onnx", IMAGE, quantize="int8", data=images())
    assert report.quantization.share == 1
    assert "plan_digest" in {e.key for e in onnx.load(report.path).metadata_props}
    assert report.quantization.rms_error < 0.05


def test_attention_is_quantized_at_each_call(tmp_path):
    model = Transformer().eval()
    report = depcut.export(model, tmp_path / "net.onnx", TOKENS, quantize="int8")
    found = report.quantization
    assert found.scheme == DYNAMIC
    assert found.why.startswith("0 of ")
    assert found.batches == 0
    assert "on the example inputs" in str(report)
    assert not found.corrected
    assert set(found.kernels) <= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"}
    assert sum(found.kernels.values()) == 5
    wanted = model(TOKENS)["scores"].detach().numpy()
    assert np.abs(outputs(report.path, TOKENS) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_the_scheme_is_the_callers_to_choose(tmp_path, static):
    report = depcut.export(
        convolutional(), tmp_path / "net.onnx", quantize="int8-dynamic", data=images()
    )
    assert report.quantization.scheme == DYNAMIC
    assert report.quantization.why == "as asked for"
    assert report.quantization.kernels["ConvInteger"] == 3
    assert report.quantization.batches == 3
    assert report.quantization.float_bytes == static.quantization.float_bytes


@pytest.mark.parametrize(
    ("kinds", "data", "scheme"),
    [
        ("Conv Conv Gemm", [1], STATIC),
        ("Conv Conv Gemm", None, DYNAMIC),
        ("Conv Gemm", [1], DYNAMIC),
        ("Conv MatMul MatMul", [1], DYNAMIC),
        ("LSTM", None, DYNAMIC),
    ],
)
def test_the_rule_counts_layers(kinds, data, scheme):
    nodes = [helper.make_node(k, ["x", f"w{i}"], [f"y{i}"]) for i, k in enumerate(kinds.split())]
    nodes.append(helper.make_node("MatMul", ["y0", "y0"], ["z"]))  # no weights
    weights = [numpy_helper.from_array(np.ones(1, np.float32), f"w{i}") for i in range(len(nodes))]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    assert chosen_scheme(Request("int8", data, 1, None), graph)[0] == scheme
    assert chosen_scheme(Request(STATIC, [1], 1, None), graph) == (STATIC, "as asked for")


# Data and metric ----------------------------------------------------------------------------------


def as_calibration(model, x):
    from depcut.calibration.data import calibrate

    return calibrate(depcut.analyze(model, IMAGE).program, model, x)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, model: x,
        lambda x, model: [(one, torch.zeros(len(one))) for one in x],
        lambda x, model: [{"input": one} for one in x],
        lambda x, model: iter(x),
        lambda x, model: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat(x), torch.zeros(12)), batch_size=4
        ),
        lambda x, model: as_calibration(model, x),
    ],
    ids=["tensors", "pairs", "dicts", "generator", "loader", "calibration"],
)
def test_data_of_all_forms(floating, form):
    model, session = convolutional(), open_session(floating.path)
    batches = fed(model, session, form(images(), model), 32)
    assert len(batches) == 3
    for batch, x in zip(batches, images(), strict=True):
        (array,) = batch.feeds.values()
        assert np.array_equal(array, x.numpy())
        np.testing.assert_allclose(batch.outputs[0], model(x).detach().numpy(), atol=1e-5)


def test_data_may_be_made_from_the_model(tmp_path):
    model = convolutional()
    with torch.no_grad():  # directions of low rank, as training adds them
        for layer in (model[5], model[9]):
            ramp = torch.linspace(-1, 1, layer.weight.shape[1]).view(
                1, -1, *[1] * (layer.weight.dim() - 2)
            )
            layer.weight.add_(ramp)
    report = depcut.export(model, tmp_path / "net.onnx", IMAGE, quantize="int8", data="auto")
    assert report.quantization.scheme == STATIC
    assert report.quantization.batches > 1
    exact = model(IMAGE).detach().numpy()
    assert np.abs(outputs(report.path, IMAGE) - exact).max() < 0.15 * np.abs(exact).max()


def test_no_more_items_than_asked_for_are_read(tmp_path):
    read = []

    def data():
        for x in images(count=5):
            read.append(len(x))
            yield x

    report = depcut.export(
        convolutional(), tmp_path / "net.onnx", quantize="int8", data=data(), batches=2
    )
    assert read == [4, 4]
    assert report.quantization.batches == 2


def test_a_metric_is_of_outputs_as_the_model_returns_them(tmp_path):
    model = Transformer().eval()
    data = [(TOKENS, torch.tensor([0, 1])), (TOKENS[:1] + 5, torch.tensor([2]))]

    def accuracy(output, target):
        return (output["scores"].argmax(1) == target).float().mean()

    report = depcut.export(
        model, tmp_path / "net.onnx", quantize="int8", data=data, metric=accuracy
    )
    right = [int((outputs(report.path, x).argmax(1) == y.numpy()).sum()) for x, y in data]
    exact = [int((model(x)["scores"].argmax(1) == y).sum()) for x, y in data]
    assert report.quantization.metric == pytest.approx((sum(exact) / 3, sum(right) / 3))
    assert f"metric: {sum(exact) / 3:.6g} in float" in str(report)


# Bias correction ----------------------------------------------------------------------------------


def prepared(floating, folder):
    path, graph = quantize._prepared(floating.path, folder, large=False)
    return path, graph


def test_what_rounding_adds_to_the_means_is_that_of_a_convolution(floating, tmp_path, monkeypatch):
    session = open_session(floating.path)
    batches = fed(convolutional(), session, images(), 32)
    path, graph = prepared(floating, tmp_path)
    seen = {}
    honest = bias_correction._means

    def means(model, layers, feeds, folder):
        seen["layers"], seen["means"] = layers, honest(model, layers, feeds, folder)
        return seen["means"]

    monkeypatch.setattr(bias_correction, "_means", means)
    quantize._static(path, graph, tmp_path, batches, large=False)
    assert len(seen["layers"]) == 4
    nodes = {node.name: node for node in graph.graph.node}
    hidden = torch.cat(images())
    errors = [torch.from_numpy(error) for error, _, _ in seen["layers"].values()]
    net = convolutional()
    settings = [{"padding": 1}, {"padding": 1, "stride": 2, "groups": 16}, {}]
    wanted = []
    for layers, error, given in zip((net[:2], net[2:5], net[5:7]), errors, settings, strict=False):
        wanted.append(nn.functional.conv2d(hidden, error, **given).mean((0, 2, 3)))
        hidden = layers(hidden)
    features = hidden.mean((2, 3))
    wanted.append((features @ errors[3].reshape(5, 24).T).mean(0))
    assert {nodes[name].op_type for name in seen["layers"]} == {"Conv", "Gemm"}
    for mean, exact in zip(seen["means"].values(), wanted, strict=True):
        np.testing.assert_allclose(mean, exact.detach().numpy(), rtol=1e-3, atol=1e-6)


def test_biases_move_against_it_by_as_many_steps(floating, tmp_path):
    batches = fed(convolutional(), open_session(floating.path), images(), 32)
    path, graph = prepared(floating, tmp_path)
    quantize._static(path, graph, tmp_path, batches, large=False)
    before, after = (onnx.load(tmp_path / f"{name}.onnx") for name in ("static", "corrected"))
    stored = [
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (before, after)
    ]
    changed = [n for n in stored[0] if not np.array_equal(stored[0][n], stored[1][n])]
    layers = bias_correction._layers(graph, before)
    assert set(changed) == {bias for _, bias, _ in layers.values()}
    means = bias_correction._means(graph, layers, [b.feeds for b in batches], tmp_path)
    for name, (_, bias, scale) in layers.items():
        moved = (stored[1][bias] - stored[0][bias]) * stored[0][scale]
        np.testing.assert_allclose(moved, -means[name], atol=0.51 * stored[0][scale].max())


def test_correction_is_kept_only_where_it_helps(floating, tmp_path, monkeypatch):
    batches = fed(convolutional(), open_session(floating.path), images(), 32)
    path, graph = prepared(floating, tmp_path)
    for errors, name in (([0.2, 0.1], "corrected"), ([0.1, 0.2], "static")):
        left = iter(errors)
        monkeypatch.setattr(quantize, "_rms", lambda path, data, left=left: next(left))
        chosen, corrected = quantize._static(path, graph, tmp_path, batches, large=False)
        assert chosen.stem == name
        assert corrected == (name == "corrected")


@pytest.mark.parametrize("seven", [True, False])
def test_weights_have_seven_bits_where_bytes_overflow(tmp_path, monkeypatch, floating, seven):
    monkeypatch.setattr(quantize, "needs_seven_bits", lambda: seven)
    batches = fed(convolutional(), open_session(floating.path), images(), 32)
    path, graph = prepared(floating, tmp_path)
    chosen, _ = quantize._static(path, graph, tmp_path, batches, large=False)
    tensors = map(numpy_helper.to_array, onnx.load(chosen).graph.initializer)
    most = max(int(np.abs(t.astype(int)).max()) for t in tensors if t.dtype == np.int8)
    assert (most <= 64) is seven


@pytest.mark.parametrize(
    ("machine", "flags", "needed"),
    [
        ("x86_64", "flags : sse avx2", True),
        ("x86_64", "flags : sse avx2 avx512_vnni", False),
        ("x86_64", "flags : avx_vnni", False),
        ("aarch64", "Features : asimd", False),
    ],
)
def test_the_processor_says_how_many_bits(monkeypatch, machine, flags, needed):
    monkeypatch.setattr(quantization.platform, "machine", lambda: machine)
    monkeypatch.setattr(quantization.Path, "read_text", lambda self, encoding: f"cpu\n{flags}\n")
    assert quantization.needs_seven_bits() is needed


# What does not appear -----------------------------------------------------------------------------


def test_a_file_without_int8_kernels_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(int8_check, "INT8", ())
    with pytest.raises(ExportError, match="shows no int8 kernel") as caught:
        depcut.export(nn.Linear(4, 4), path, torch.randn(2, 4), quantize="int8")
    assert "DynamicQuantizeMatMul" in caught.value.what
    assert "choose the other scheme" in caught.value.remedy
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_quantizer_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def fails(*given, **named):
        raise RuntimeError("no such type")

    monkeypatch.setattr(quantization.quantizer(), "quantize_dynamic", fails)
    with pytest.raises(ExportError, match="onnxruntime's quantizer fails: RuntimeError: no such"):
        depcut.export(nn.Linear(4, 4), path, torch.randn(2, 4), quantize="int8")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_that_are_no_numbers_are_refused(floating):
    session = open_session(floating.path)
    (batch,) = fed(convolutional(), session, images(count=1), 1)
    broken = int8_check.Fed(batch.feeds, (batch.outputs[0][:, :2],))
    with pytest.raises(ExportError, match=r"gives shape \(4, 5\), the float one \(4, 2\)"):
        int8_check.distance(session, [broken])
    with pytest.raises(ExportError, match="gives NaN or infinite values where"):
        int8_check._finite("y", np.zeros(2, np.float32), np.array([0, np.nan], np.float32))


def test_logging_and_output_are_left_alone(tmp_path, capfd):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    depcut.export(nn.Linear(4, 4), tmp_path / "a.onnx", torch.randn(2, 4), quantize="int8")
    assert root.handlers == before
    assert root.level == level
    assert capfd.readouterr() == ("", "")


def test_large_weights_lie_beside_the_int8_file(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_EXTERNAL_DATA_FROM", 100)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(2, 64)
    report = depcut.export(model, tmp_path / "net.onnx", x, quantize="int8")
    graph, weights = sorted(tmp_path.iterdir())
    assert graph.name == "net.onnx"
    assert weights.match("net.onnx.*.data")
    assert report.bytes == graph.stat().st_size + weights.stat().st_size
    assert report.bytes < 0.6 * report.quantization.float_bytes
    assert np.abs(outputs(graph, x) - model(x).detach().numpy()).max() < 0.05


NAN = torch.full((4, 3, 8, 8), torch.nan)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"quantize": "int4"}, InputError, r"quantize is 'int4'.*int8, int8-static, int8-dynamic"),
        ({"quantize": 8}, InputError, "quantize is 8.*use one of int8"),
        (
            {"quantize": "int8-static"},
            InputError,
            'int8-static needs data.*quantize="int8-dynamic"',
        ),
        ({"quantize": "int8", "metric": len}, InputError, "metric needs data, and there is none"),
        ({"data": images()}, InputError, 'data is given, and nothing is quantized.*"int8" too'),
        ({"metric": len}, InputError, "metric is given, and nothing is quantized"),
        ({"quantize": "int8", "data": IMAGE}, InputError, r"data is a Tensor.*\[x\], not x"),
        ({"quantize": "int8", "data": []}, InputError, "the data is empty"),
        ({"quantize": "int8", "data": "some"}, InputError, "data is 'some'.*\"auto\""),
        ({"quantize": "int8", "data": images(), "batches": 0}, InputError, "batches is 0"),
        ({"quantize": "int8", "data": images(), "metric": 3}, InputError, "metric is"),
        ({"quantize": "int8", "data": [IMAGE, IMAGE[:, :2]]}, InputError, "not take it.*item 1"),
        ({"quantize": "int8", "data": [IMAGE, NAN]}, InputError, "768 of the 768.*data, item 1"),
        (
            {"quantize": "int8", "data": images(), "metric": lambda output, target: output},
            InputError,
            "it failed: ValueError.*metric=",
        ),
    ],
)
def test_bad_input_names_what_and_what_to_do(tmp_path, given, error, says):
    path = tmp_path / "net.onnx"
    with pytest.raises(error, match=f"(?s){says}"):
        depcut.export(convolutional(), path, IMAGE, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (nn.ReLU(), torch.randn(2, 4), "no layer of the model multiplies by weights"),
        (nn.Linear(4, 4).half(), torch.randn(2, 4).half(), "weights are float16.*model.float()"),
    ],
)
def test_models_that_cannot_be_quantized(tmp_path, model, x, says):
    with pytest.raises(ExportError, match=f"(?s){says}"):
        depcut.export(model, tmp_path / "net.onnx", x, quantize="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_data_can_be_made_of(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(InputError, match="no data can be made from the model: ") as caught:
        depcut.export(model, tmp_path / "a.onnx", torch.randn(2, 4), quantize="int8", data="auto")
    assert "judged" not in str(caught.value)
    assert caught.value.where == 'data="auto"'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("absent", ["onnxruntime", "onnxruntime.quantization"])
def test_a_quantizer_that_is_absent_is_named(tmp_path, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delattr(ort, "quantization", raising=False)
    with pytest.raises(
        ExportError, match=r"(?s)quantizer cannot be imported.*pip install"
    ) as caught:
        depcut.export(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 4), quantize="int8")
    assert caught.value.where == "quantize="
    assert list(tmp_path.iterdir()) == []


# Command line -------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

def data():
    return [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]

def mean(output, target):
    return float((output.argmax(1) == target).float().mean())
"""


def command(folder, *arguments):
    root = str(Path(depcut.__file__).parent.parent)
    script = f"import sys; sys.path[0] = {root!r}; " + (
        "from depcut.cli.main import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", script, "export", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_line_writes_int8_files(tmp_path):
    (tmp_path / "own.py").write_text(MODULE)
    done = command(
        tmp_path, "own:net", "--out", "net.onnx", "--quantize", "int8-static", "--data", "own:data",
        "--batches", "2", "--metric", "own:mean", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["export"]["quantization"]
    assert found["scheme"] == STATIC
    assert found["batches"] == 2
    assert found["kernels"] == {"QGemm": 1, "QLinearConv": 1}
    assert len(found["metric"]) == 2
    refused = command(tmp_path, "own:net", "--out", "b.onnx", "--quantize", "int8-static")
    assert refused.returncode != 0
    assert "int8-static needs data" in refused.stderr
    assert sorted(f.name for f in tmp_path.glob("*.onnx")) == ["net.onnx"]
