"""Checkpoints shrunk from shards to shards: the tensors of the loaded model, or an error."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import libraries

import depcut
from depcut.cli.main import main
from depcut.errors import BudgetError, InputError, VerificationError
from depcut.streaming import job as jobs
from depcut.streaming import narrowing
from depcut.support import files

ROOT = Path(__file__).resolve().parent.parent
INDEX = "model.safetensors.index.json"


def write(folder, layers=2, shard="15KB", kind=torch.bfloat16, **given):
    """A Llama in bf16 whose norms and embeddings are not as initialised, in several shards."""
    transformers = libraries()["transformers"]
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, **given,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(kind)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture
def small(tmp_path):
    """One layer: each run captures it several times."""
    return write(tmp_path / "dense", layers=1)


def loaded(folder):
    return libraries()["transformers"].AutoModelForCausalLM.from_pretrained(folder).eval()


def tensors(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def assert_untouched(folder, before):
    assert contents(folder) == before


def assert_no_checkpoint(folder):
    """What is there cannot be taken for a whole checkpoint."""
    assert not (folder / "config.json").exists()
    assert not (folder / INDEX).exists()


def test_a_checkpoint_becomes_what_its_plan_makes_of_the_loaded_model(llama, tmp_path):
    before, out = contents(llama), tmp_path / "slim"
    report = depcut.shrink_checkpoint(llama, out, 0.3, progress=False)
    assert_untouched(llama, before)
    plan = depcut.Plan.load(out / "plan.json")
    same = plan.apply(loaded(llama), compensate=False)
    written = tensors(out)
    assert len(list(out.glob("*.safetensors"))) == len(list(llama.glob("*.safetensors"))) > 2
    assert written.keys() == same.state_dict().keys()
    for name, tensor in same.state_dict().items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], tensor), name
    slim = loaded(out)
    assert slim.config.intermediate_size == same.config.intermediate_size < 80
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(slim(ids).logits, same(ids).logits)
    assert (out / "tokenizer.json").exists()
    assert not list(out.glob(".*"))
    assert report.error <= 1e-4
    assert 0.6 < report.macs[1] / report.macs[0] <= 0.71


def test_blocks_of_rows_are_the_rows(llama, monkeypatch):
    source = jobs.Source(llama)
    monkeypatch.setattr(narrowing, "BLOCK", 100)
    import numpy as np

    name = "model.layers.0.mlp.down_proj.weight"
    for picked in ((np.array([0, 3, 31]), np.array([1, 79])), (None, np.array([5])), None):
        chosen = {name: picked} if picked is not None else {}
        got = torch.cat(list(narrowing.parts(source, chosen, name)))
        rows, columns = picked or (None, None)
        whole = source[name]
        whole = whole if rows is None else whole[rows]
        assert torch.equal(got, whole if columns is None else whole[:, columns])


def broken(llama, tmp_path, change):
    """A copy of the checkpoint in which something is wrong."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, data in contents(llama).items():
        (folder / name).write_bytes(data)
    change(folder)
    return folder


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def cut(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def reindex(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


def misplace(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    wrong = next(f for f in index.values() if f != index["model.norm.weight"])
    reindex(folder, **{"model.norm.weight": wrong})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def pickled(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def without_a_tensor(folder):
    file = shard(folder)
    held = load_file(file)
    name = sorted(held)[0]
    save_file({n: t for n, t in held.items() if n != name}, file)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


BROKEN = {
    "missing shard": (lambda f: shard(f).unlink(), "the shard .* is missing"),
    "truncated shard": (cut, "the shard .* is damaged"),
    "empty shard": (lambda f: shard(f).write_bytes(b""), "the shard .* is damaged"),
    "absent tensor": (lambda f: reindex(f, nobody="x.safetensors"), "x.safetensors is missing"),
    "wrong file": (misplace, "does not hold model.norm.weight|holds, which the index"),
    "index of another folder": (lambda f: reindex(f, w="../w.safetensors"), "is no name of a file"),
    "damaged index": (lambda f: (f / INDEX).write_text("{"), "the index of the shards is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config cannot be read"),
    "other sizes": (lambda f: configure(f, intermediate_size=96), "has shape .* the config builds"),
    "other class": (lambda f: configure(f, architectures=["Nobody"]), "has no class Nobody"),
    "quantized": (lambda f: configure(f, quantization_config={"bits": 4}), "are quantized"),
    "missing tensor": (without_a_tensor, "does not fit its config"),
    "pickled": (pickled, "the weights are pickled"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_checkpoint_is_named(llama, tmp_path, case):
    change, message = BROKEN[case]
    folder = broken(llama, tmp_path, change)
    before = contents(folder)
    with pytest.raises(InputError, match=message):
        depcut.shrink_checkpoint(folder, tmp_path / "slim", 0.3, progress=False)
    assert_untouched(folder, before)
    assert not (tmp_path / "slim").exists()


def test_folders_that_must_not_be_written_to_are_refused(llama, tmp_path):
    for dst in (llama, llama / "slim", llama.parent):
        with pytest.raises(InputError, match="dense checkpoint's, in it, or around it"):
            depcut.shrink_checkpoint(llama, dst, 0.3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        depcut.shrink_checkpoint(llama, tmp_path, 0.3)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


class Full:
    """In place of writing: no space is left from some file on."""

    def __init__(self, monkeypatch, after):
        self.left, self.real = after, files.replacing
        monkeypatch.setattr(files, "_finish", self.finish)
        self.moved = []

    def finish(self, draft, target, mode, flush):
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        draft.replace(target)


@pytest.mark.sweep
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(small, tmp_path, monkeypatch):
    before, out = contents(small), tmp_path / "slim"
    with monkeypatch.context() as patch:
        Full(patch, after=4)
        with pytest.raises(InputError, match="No space left"):
            depcut.shrink_checkpoint(small, out, 0.3, score="random", progress=False)
    assert_untouched(small, before)
    assert_no_checkpoint(out)
    assert not list(out.glob(f"{files.DRAFT}*"))
    depcut.shrink_checkpoint(small, out, 0.3, score="random", progress=False)
    depcut.shrink_checkpoint(small, tmp_path / "other", 0.3, score="random", progress=False)
    assert contents(out) == contents(tmp_path / "other")
    assert_requests_are_kept_apart(small, out)


def assert_requests_are_kept_apart(small, out):
    """Another request, or a changed source, does not go on in a folder."""
    whole = contents(out)
    with pytest.raises(InputError, match="begun with another request"):
        depcut.shrink_checkpoint(small, out, 0.4, score="random")
    os.utime(shard(small), (1, 1))
    with pytest.raises(InputError, match="changed since this folder was begun"):
        depcut.shrink_checkpoint(small, out, 0.3, score="random")
    assert contents(out) == whole


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from zoo import libraries
libraries()
import os, signal
import depcut
from depcut.support import files
finish, left = files._finish, int(sys.argv[4])
def killing(*given):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(*given)
    if left == 1 and sys.argv[5] == "after":
        os.kill(os.getpid(), signal.SIGKILL)
files._finish = killing
depcut.shrink_checkpoint(sys.argv[2], sys.argv[3], 0.3, score="random", progress=False)
"""


@pytest.mark.sweep
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(small, tmp_path):
    out = tmp_path / "slim"
    # The first files are the journal, the plan and the journal; then each shard and the journal.
    for moment, when in (("4", "before"), ("2", "after"), ("1", "before"), ("5", "after")):
        given = (str(Path(__file__).parent), str(small), str(out), moment, when)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *given], capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert_no_checkpoint(out)
    depcut.shrink_checkpoint(small, out, 0.3, score="random", progress=False)
    depcut.shrink_checkpoint(small, tmp_path / "other", 0.3, score="random", progress=False)
    assert contents(out) == contents(tmp_path / "other")


@pytest.mark.sweep
def test_what_was_written_wrong_is_noticed(small, tmp_path, monkeypatch):
    real = jobs.parts

    def wrong(source, picked, name):
        for part in real(source, picked, name):
            yield part.flip(0) if name.endswith("0.self_attn.v_proj.weight") else part

    monkeypatch.setattr(jobs, "parts", wrong)
    with pytest.raises(VerificationError, match=r"v_proj"):
        depcut.shrink_checkpoint(small, tmp_path / "slim", 0.3, progress=False)
    assert_no_checkpoint(tmp_path / "slim")


@pytest.mark.sweep
def test_tied_weights_stay_tied_and_one_file_stays_one(tmp_path):
    src = write(tmp_path / "tied", layers=1, shard="10GB", tie_word_embeddings=True)
    depcut.shrink_checkpoint(src, tmp_path / "slim", 0.3, score="l1", progress=False)
    assert not (tmp_path / "slim" / INDEX).exists()
    slim = loaded(tmp_path / "slim")
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors(tmp_path / "slim")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("synflow", "criterion 'synflow' does not read weights one by one"),
        (lambda coupling, model, seed: {}, "does not read weights one by one"),
        ("wanda", "criterion 'wanda' needs data"),
        (depcut.Score("obs", normalize="mean"), "criterion 'obs' has no option normalize"),
    ],
    ids=["synflow", "function", "wanda", "options"],
)
def test_criteria_that_read_a_whole_model_are_refused_before_any_file(tmp_path, score, message):
    data = [torch.zeros(1)] if "option" in message else None
    with pytest.raises(InputError, match=message):
        depcut.shrink_checkpoint(tmp_path / "none", tmp_path / "slim", 0.3, score=score, data=data)
    with pytest.raises(InputError, match="none"):
        depcut.shrink_checkpoint(tmp_path / "none", tmp_path / "slim", 0.3, score="l1")


@pytest.mark.sweep
def test_a_share_that_no_config_says_is_refused(small, tmp_path):
    with pytest.raises(BudgetError):
        depcut.shrink_checkpoint(small, tmp_path / "slim", 0.999, progress=False)
    assert not (tmp_path / "slim").exists()


@pytest.mark.sweep
def test_weights_are_re_solved_as_those_of_the_loaded_model_are(tmp_path):
    src = write(tmp_path / "dense", layers=1, kind=torch.float32)
    out, generator = tmp_path / "slim", torch.Generator().manual_seed(0)
    data = [torch.randint(96, (4, 12), generator=generator) for _ in range(4)]
    report = depcut.shrink_checkpoint(src, out, 0.3, data=data, progress=False)
    plan = depcut.Plan.load(out / "plan.json")
    same = plan.apply(loaded(src), data=data)
    assert report.compensation == depcut.report(same).compensation
    assert report.compensation.repairs
    assert report.settings["score"] == "obs"
    chosen = depcut.analyze(loaded(src), data[0]).plan(0.3, data=data)
    assert {n: list(k) for n, k in chosen.kept.items()} == {
        n: list(k) for n, k in plan.kept.items()
    }
    written, plain = tensors(out), plan.apply(loaded(src), compensate=False).state_dict()
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(written[name], plain[name]) for name in plain)
    assert not list(out.glob(".*"))


@pytest.mark.sweep
def test_the_command_line_streams_what_exceeds_the_memory(small, tmp_path, capsys):
    out = tmp_path / "slim"
    given = ["shrink", f"hf:{small}", "--ratio", "0.3", "--out", str(out), "--score", "random"]
    assert main([*given, "--memory", "10kB"]) == 0
    said = capsys.readouterr().out
    assert f"LlamaForCausalLM.from_pretrained({str(out)!r})" in said
    assert len(list(out.glob("*.safetensors"))) == len(list(small.glob("*.safetensors")))
    assert loaded(out).config.intermediate_size < 80
    assert main([*given, "--memory", "10kB", "--time"]) == 2
    assert "--time with a checkpoint of" in capsys.readouterr().err


def resident(name):
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.sweep
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of Linux")
def test_shards_are_written_and_checked_within_a_part_of_their_size(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import checkpoints

    libraries()
    total = checkpoints.write_llama(tmp_path / "dense", "80M")
    write_shards, before = jobs.Job.write, []

    def watched(job, *given):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before.append(resident("VmRSS"))
        write_shards(job, *given)

    monkeypatch.setattr(jobs.Job, "write", watched)
    depcut.shrink_checkpoint(tmp_path / "dense", tmp_path / "slim", 0.3, score="random")
    assert resident("VmHWM") - before[0] < total / 2


@pytest.mark.sweep
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of Linux")
@pytest.mark.parametrize("score", ["obs", "random"])
def test_a_large_vocabulary_takes_a_few_times_its_weights_in_single_precision(
    tmp_path, monkeypatch, score
):
    """Beside them: neither the whole model, nor sums in double precision as wide as they are."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import checkpoints

    libraries()
    import transformers

    checkpoints.write_llama(tmp_path / "dense", "50M-wide")
    hidden, *_, words = checkpoints.SIZES["50M-wide"]
    table = 4 * hidden * words  # bytes
    data = None
    if score == "obs":
        generator = torch.Generator().manual_seed(0)
        data = [torch.randint(words, (1, 64), generator=generator) for _ in range(8)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    depcut.shrink_checkpoint(
        tmp_path / "dense", tmp_path / "slim", 0.3, data=data, score=score, memory="64MiB"
    )
    # The code that runs, and the table as stored and in single precision, dense and narrowed.
    limit = (3.75 if score == "random" else 6.5) * table
    assert resident("VmHWM") - before < limit
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.hidden_size < hidden
