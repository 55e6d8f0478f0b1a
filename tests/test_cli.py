"""The command line: files written, messages, exit codes."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from safetensors import safe_open

from depcut.apply.plan import Plan
from depcut.cli import main as command_line
from depcut.cli.main import main
from depcut.errors import InputError, VerificationError
from depcut.support.weights import load_weights

SHAPE = ("--input-shape", "2,3,16,16")
COMMANDS = ("demo", "analyze", "frontier", "shrink", "compact", "export", "bench", "report")

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.inner = nn.Linear(32, 64)
        self.row_axis = nn.Linear(64, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        h = self.table(ids)
        return self.head(h + self.row_axis(self.inner(h).relu()))


def net():
    torch.manual_seed(0)
    return Net()


def tied():
    torch.manual_seed(0)
    return Tied()


def broken():
    raise ValueError("no such checkpoint")


def narrow(width, *, scale=1):
    print("building")
    return Net(width * scale)


number = int


def half_dead():
    model = net()
    with torch.no_grad():
        model.conv1.weight[:16] = 0.0
        model.conv1.bias[:16] = -1.0
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    (path / "my_models.py").write_text(MODELS)
    return path


def in_a_process(folder, *arguments):
    # The console script is a two-liner around this, and need not be installed for the tests.
    code = "import sys; from depcut.cli.main import main; sys.exit(main())"
    root = str(Path(__file__).parent.parent)
    script = f"import sys; sys.path[0] = {root!r}; {code}"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def depcut(folder, *arguments):
    """The command in this process: one of its own spends its time on imports."""
    path, here, out, err = sys.path.copy(), Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*map(str, arguments)])
    except SystemExit as stopped:  # of argparse
        code = stopped.code or 0
    finally:
        os.chdir(here)
        sys.path[:] = path
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def succeeds(folder, *arguments):
    done = depcut(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fails(folder, *arguments):
    done = depcut(folder, *arguments)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def shrunk(folder):
    out = folder / "out"
    text = succeeds(
        folder, "shrink", "my_models:net", "--ratio", 0.5, "--input-shape", "2,3,16,16",
        "--out", out, "--onnx",
    )  # fmt: skip
    return out, text


def test_a_real_process(folder):
    done = in_a_process(folder, "analyze", "my_models:net", "--input-shape", "2,3,16,16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "conv1" in done.stdout


def test_version_and_help(folder):
    assert succeeds(folder, "--version").startswith("depcut ")
    text = succeeds(folder, "--help")
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "(default: None)" not in text
    assert ("package.module:factory" in text) == (command != "demo")


def test_no_command_is_an_error(folder):
    assert "COMMAND" in fails(folder)


def test_analyze(folder):
    text = succeeds(folder, "analyze", "my_models:net", "--input-shape", "2,3,16,16")
    assert "conv1" in text
    one = succeeds(folder, "analyze", "my_models:net", "--explain", "conv1")
    assert "conv1" in one
    assert one != text


def test_frontier(folder):
    text = succeeds(
        folder, "frontier", "my_models:net", *SHAPE, "--at", 0.25, 0.5, "--align", 1, "--plot",
        folder / "frontier.svg",
    )  # fmt: skip
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    assert rows == ["0.25", "0.5"]
    assert "<svg" in (folder / "frontier.svg").read_text()


def test_shrink_writes_plan_weights_and_graph(shrunk):
    out, text = shrunk
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "depcut.json", "model.json", "model.onnx", "plan.json", "report.json",
        "weights.safetensors",
    ]  # fmt: skip
    json.loads((out / "plan.json").read_text())
    for part in ("parameters", "MACs", "written", "plan.json", "load it with depcut.load("):
        assert part in text


def test_written_files_rebuild_the_slim_model(folder, shrunk):
    out, _ = shrunk
    text = succeeds(
        folder, "export", "my_models:net", "--plan", out / "plan.json", "--slim-weights",
        out / "weights.safetensors", "--out", folder / "again.onnx", "--input-shape", "2,3,16,16",
    )  # fmt: skip
    assert "agrees with PyTorch" in text
    first, second = (onnx.load(file).graph for file in (out / "model.onnx", folder / "again.onnx"))
    assert len(first.initializer) > 0
    assert list(first.initializer) == list(second.initializer)


def test_a_folder_is_a_model(folder, shrunk):
    text = succeeds(folder, "analyze", shrunk[0], "--explain", "conv1", *SHAPE)
    assert "conv1.weight dim 0 (24)" in text


def test_folders_of_others_are_not_replaced(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    given = ("shrink", "my_models:net", "--ratio", 0.5, "--out", "mine")
    assert "holds what is no stored model's: notes.txt" in fails(folder, *given)
    assert [file.name for file in (folder / "mine").iterdir()] == ["notes.txt"]


def test_a_page_on_a_folder_and_on_a_model(folder, shrunk):
    out = shrunk[0]
    text = succeeds(folder, "report", out, "--out", "slim.html")
    assert "Report on plan" in text
    text = succeeds(
        folder, "report", "my_models:net", *SHAPE, "--plan", out / "plan.json", "--slim-weights",
        out / "weights.safetensors", "--out", "both.html",
    )  # fmt: skip
    assert "written: both.html" in text
    for page in ("slim.html", "both.html"):
        assert "conv2" in (folder / page).read_text()


def test_tied_weights_survive(folder, monkeypatch):
    out = folder / "tied"
    succeeds(
        folder, "shrink", "my_models:tied", "--ratio", 0.3, "--of", "params", "--out", out,
        "--input-shape", "2,6:int64",
    )  # fmt: skip
    succeeds(
        folder, "export", "my_models:tied", "--plan", out / "plan.json", "--slim-weights",
        out / "weights.safetensors", "--out", out / "net.onnx", "--input-shape", "2,6:int64",
    )  # fmt: skip
    plan = Plan.load(out / "plan.json")
    monkeypatch.syspath_prepend(str(folder))
    from my_models import tied

    slim = plan.apply(tied())
    load_weights(slim, out / "weights.safetensors")
    assert slim.head.weight is slim.table.weight
    with safe_open(out / "weights.safetensors", "pt") as file:
        stored = set(file.keys())
    assert ("head.weight" in stored) != ("table.weight" in stored)
    assert slim.inner.out_features < 64


def test_dense_weights_are_loaded(folder):
    from safetensors.torch import save_file

    sys.path.insert(0, str(folder))
    try:
        import my_models
    finally:
        sys.path.pop(0)
    dense = my_models.Net()
    save_file(dense.state_dict(), folder / "dense.safetensors")
    shape = ("--input-shape", "2,3,16,16")
    succeeds(
        folder, "export", "my_models:net", "--weights", "dense.safetensors", "--out", "a.onnx",
        *shape,
    )  # fmt: skip
    save_file({"x": dense.head.bias.detach()}, folder / "other.safetensors")
    message = fails(
        folder, "export", "my_models:net", "--weights", "other.safetensors", "--out", "b.onnx",
        *shape,
    )  # fmt: skip
    assert "cannot be loaded" in message
    assert not (folder / "b.onnx").exists()


def test_bench_of_a_model_and_its_slim_version(folder, shrunk):
    out, _ = shrunk
    text = succeeds(
        folder, "bench", "my_models:net", "--plan", out / "plan.json", "--rounds", 6,
        "--input-shape", "1,3,16,16", "--runtime", "torch",
    )  # fmt: skip
    assert "95 % interval" in text
    assert "my_models:net after" in " ".join(text.split())


def test_bench_of_files(folder, shrunk):
    out, _ = shrunk
    file = out / "model.onnx"
    text = succeeds(folder, "bench", file, "--rounds", 6, "--input-shape", "1,3,16,16")
    assert "onnxruntime" in text


@pytest.mark.skipif(sys.platform != "linux", reason="needs sched_setaffinity and /proc")
def test_bench_at_several_batch_sizes(folder, shrunk):
    out, _ = shrunk
    text = succeeds(
        folder, "bench", out / "model.onnx", "--rounds", 6, "--input-shape", "1,3,16,16",
        "--batch-size", 2, "--batch-size", 5, "--peak-memory", "--pin", "auto",
    )  # fmt: skip
    rows = [line for line in text.splitlines() if " ms (" in line]
    assert [row.split("│")[2].strip() for row in rows] == ["2", "5"]
    for part in ("examples/s", "peak memory", "file", "on CPU"):
        assert part in text


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:the widths explain:UserWarning")
@pytest.mark.filterwarnings("ignore:the closest of:UserWarning")
def test_shrink_to_a_share_of_the_time(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    arguments = ["my_models:net", "--of", "latency", "--ratio", "0.3", "--out", "by_time"]
    done = depcut(folder, "shrink", *arguments, "--input-shape", "1,3,32,32")
    assert done.returncode == 0, done.stderr
    assert "latency: " in done.stdout
    settings = json.loads((folder / "by_time" / "plan.json").read_text())["settings"]
    assert settings["of"] == "latency"
    assert settings["latency"]["measured_ms"] < settings["latency"]["dense_ms"]
    assert len(list((folder / "cache" / "depcut" / "latency").iterdir())) == 1


def test_a_budget_is_one_of_two(folder):
    both = ("shrink", "my_models:net", "--ratio", "0.5", "--latency-ms", "3", "--out", "out")
    assert "not allowed with argument --ratio" in depcut(folder, *both).stderr
    neither = depcut(folder, "shrink", "my_models:net", "--out", "out")
    assert neither.returncode == 2
    assert "one of the arguments --ratio --latency-ms is required" in neither.stderr


def test_shrink_times_both(folder):
    text = succeeds(
        folder, "shrink", "my_models:net", "--ratio", 0.5, "--input-shape", "2,3,16,16",
        "--out", folder / "timed", "--time", "--batch-size", 4, "--rounds", 6, "--threads", 1,
    )  # fmt: skip
    flowing = " ".join(text.split())  # the processor's name decides where the lines break
    for part in ("latency, batch 4", "examples/s", "file", "95 % interval"):
        assert part in flowing


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("analyze", "my_models"), "is no import path"),
        (("analyze", "no_such_module:net"), "cannot build the model"),
        (("analyze", "my_models:missing"), "cannot build the model"),
        (("analyze", "my_models:broken"), "no such checkpoint"),
        (("analyze", "my_models:number"), "the factory returned a int"),
        (("analyze", "my_models:net", "--weights", "none.safetensors"), "cannot be loaded"),
        (("analyze", "my_models:net", "--weights", "my_models.py"), "cannot be loaded"),
        (("analyze", "my_models:net", "--input-shape", "2,x"), "cannot read the input shape"),
        (("analyze", "my_models:net", "--input-shape", "2,3:f8"), "cannot read the input shape"),
        (("shrink", "my_models:net", "--ratio", "1.5", "--out", "never"), "ratio"),
        (("frontier", "my_models:net", "--at", "0.5", "1.5"), "the ratio is 1.5"),
        (("export", "my_models:net", "--out", "no/folder/x.onnx"), "does not exist"),
        (("export", "my_models:net", "--slim-weights", "w", "--out", "x.onnx"), "without --plan"),
        (("export", "my_models:net", "--plan", "none.json", "--out", "x.onnx"), "none.json"),
        (("bench", "none.onnx", "--input-shape", "1,3"), "no file"),
        (("bench", "my_models:net", "--rounds", "2"), "rounds=2"),
        (("bench", "my_models:net", "--batch-size", "0"), "batch_sizes=[0]"),
        (("bench", "my_models:net", "--pin", "first"), "cannot read the CPUs 'first'"),
        (
            ("bench", "no_such_module:net", "--runtime", "torch", "--provider", "tensorrt"),
            "tensorrt is a provider of onnxruntime",
        ),
        (
            ("shrink", "my_models:net", "--ratio", "0.5", "--out", "never", "--peak-memory"),
            "--peak-memory without --time",
        ),
    ],
)
def test_mistakes_are_messages(folder, arguments, says, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith(f"depcut {arguments[0]}: ")
    assert "to do: " in printed.err
    assert printed.out == ""
    assert not (folder / "never").exists()


def test_a_mistake_in_a_real_process(folder):
    done = in_a_process(folder, "analyze", "my_models:missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "to do: " in done.stderr
    assert "Traceback" not in done.stderr


def test_compact_writes_what_the_plan_then_loads(folder):
    out = folder / "compacted"
    text = succeeds(
        folder, "compact", "my_models:half_dead", "--input-shape", "2,3,16,16", "--out", out
    )
    assert "16 of 64 units are dead and can go" in text
    assert Plan.load(out / "plan.json").kept["conv1"].tolist() == list(range(16, 32))
    with safe_open(out / "weights.safetensors", "pt") as weights:
        assert weights.get_slice("conv1.weight").get_shape() == [16, 3, 3, 3]


def test_a_factory_takes_arguments(folder):
    text = succeeds(folder, "analyze", "my_models:narrow(8, scale=2)", *SHAPE, "--explain", "conv1")
    assert "conv1.weight dim 0 (16)" in text


def document(folder, *arguments):
    """The one JSON document that is on standard output, and the exit code."""
    done = depcut(folder, *arguments, "--json")
    return json.loads(done.stdout), done


def test_json_stands_alone_on_standard_output(folder):
    found, done = document(folder, "analyze", "my_models:narrow(16)", *SHAPE)
    assert (found["command"], done.returncode, done.stderr) == ("analyze", 0, "building\n")
    assert found["inputs"]["args"] == [{"shape": [2, 3, 16, 16], "dtype": "float32"}]
    names = {group["group"]: group["units"] for group in found["analysis"]["groups"]}
    assert names == {"conv1": 16, "conv2": 16}


def test_json_of_an_error(folder):
    found, done = document(folder, "analyze", "my_models:broken")
    assert done.returncode == 2
    assert found["error"]["kind"] == "InputError"
    assert "no such checkpoint" in found["error"]["what"]
    assert "no such checkpoint" in done.stderr
    found, done = document(folder, "shrink", "my_models:net")
    assert "--out" in found["error"]["what"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.exhaustive if c == "demo" else pytest.mark.sweep)
        for c in COMMANDS
    ],
)
def test_json_of_every_command(folder, shrunk, command):
    arguments = {
        "demo": ("--epochs", 0, "--retrain-epochs", 1, "--rounds", 6),
        "analyze": ("my_models:net", *SHAPE, "--explain", "conv1"),
        "frontier": ("my_models:net", *SHAPE, "--at", 0.25, 0.5),
        "shrink": ("my_models:net", *SHAPE, "--ratio", 0.5, "--out", "json", "--onnx"),
        "compact": ("my_models:half_dead", *SHAPE, "--out", "json"),
        "export": ("my_models:net", *SHAPE, "--out", "json.onnx"),
        "bench": (shrunk[0] / "model.onnx", "--input-shape", "1,3,16,16", "--rounds", 6),
        "report": ("my_models:net", *SHAPE, "--out", "json.html"),
    }[command]
    found, done = document(folder, command, *arguments)
    assert done.returncode == 0, done.stderr
    assert found["command"] == command
    assert len(found) > 2


def test_made_inputs_are_said(folder):
    text = succeeds(folder, "analyze", "my_models:net", "--explain", "head")
    assert text.startswith("inputs: float32[2, 3, 224, 224] (made up; --input-shape gives others)")
    assert "inputs:" not in succeeds(folder, "analyze", "my_models:net", *SHAPE)


def test_options_of_a_file_stand_behind_those_of_the_command_line(folder):
    out = folder / "by_file"
    (folder / "options.toml").write_text(
        f'model = "my_models:net"\nout = "{out}"\nlatency-ms = 3.0\nof = "params"\nalign = 4\n'
        'input_shape = "2,3,16,16"\nignore = ["conv2"]\n'
    )
    given = ("shrink", "--options", "options.toml")
    succeeds(folder, *given, "--ratio", 0.3, "--align", 1)
    plan = Plan.load(out / "plan.json")
    assert plan.settings["options"] == {"of": "params", "align": 1, "ignore": ["conv2"]}
    assert plan.settings["ratio"] == 0.3
    assert plan.inputs["args"][0]["shape"] == [2, 3, 16, 16]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed = 3", "unknown options: speed"),
        ('ratio = "much"', "ratio is 'much'"),
        ("onnx = 1", "onnx is 1"),
        ('runtime = "cuda"', "runtime is 'cuda'"),
        ("latency-ms = 1\nlatency_ms = 2", "latency_ms is given twice"),
        ("align = 0", "align is 0"),
        ("json = true", "unknown options: json"),
    ],
)
def test_files_of_options_that_are_refused(folder, text, says):
    (folder / "wrong.toml").write_text(text)
    given = ("my_models:net", "--options", "wrong.toml", "--ratio", "0.5", "--out", "never")
    given = (*given[:3], *given[5:]) if "ratio" in text else given
    assert says in fails(folder, "shrink", *given)


def test_debug_shows_the_traceback_of_the_users_code(folder):
    done = depcut(folder, "analyze", "my_models:broken", "--debug")
    assert done.returncode == 2
    assert 'raise ValueError("no such checkpoint")' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("  to do: ")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyError("x"), 1, "an error of depcut itself: KeyError"),
        (MemoryError(), 1, "memory ran out"),
        (VerificationError("differs"), 1, "differs"),
        (InputError("wrong"), 2, "wrong"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(folder, error, code, says, monkeypatch):
    def run(*_):
        raise error

    wrong = SimpleNamespace(name="analyze", summary="fail", declare=lambda _: None, run=run)
    monkeypatch.setitem(command_line._COMMANDS, "analyze", wrong)
    done = depcut(folder, "analyze")
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_warnings_are_lines_of_the_command(folder, monkeypatch):
    def run(*_):
        warnings.simplefilter("always")
        warnings.warn("it is coarse", stacklevel=1)

    loud = SimpleNamespace(name="analyze", summary="warn", declare=lambda _: None, run=run)
    monkeypatch.setitem(command_line._COMMANDS, "analyze", loud)
    assert depcut(folder, "analyze").stderr == "depcut analyze: warning: it is coarse\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script(folder, shell):
    assert "--input-shape" in succeeds(folder, "--print-completion", shell)
