"""The first call: transformers models as they come, outputs that no graph carries, outputs=."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import zoo
from nets import normal, seeded
from oracle import all_tensors
from torch import Tensor, nn
from torch.testing import assert_close

import depcut
from depcut.capture.inputs import infer_inputs
from depcut.errors import CaptureError, InputError, PlanError
from depcut.integrations.transformers_calls import Transformers
from depcut.verify.compare import Expected, compare
from depcut.verify.module_results import ModuleResults
from depcut.verify.verify import masked_outputs

# Outputs of models of any kind -------------------------------------------------------------------


class Cache:
    """No container that torch.export knows, with tensors inside."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.length, self.owner = [keys], 3, self


@dataclass
class Result:
    """A dataclass that nobody registered with pytree."""

    logits: Tensor
    hidden: Tensor
    cache: Any = None
    loss: Any = None
    steps: int = 2
    kind: str = "result"


class Net(nn.Module):
    """Two layers and a part that only an auxiliary output needs, in a result of some form."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 16)
        self.head, self.pooler = nn.Linear(16, 4), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Any:
        hidden = self.second(self.first(x).relu()).tanh()
        logits = self.head(hidden)
        if self.form == "dataclass":
            return Result(logits, hidden, Cache(self.pooler(hidden)))
        if self.form == "tuple":
            return logits, Cache(hidden), None, "text", 3
        if self.form == "object":
            return Cache(logits)
        if self.form == "nothing":
            return Empty()
        parts = {"hidden": hidden, "pooled": [self.pooler(hidden)]}
        return {"logits": logits, "parts": parts, "count": 2, "none": None}


class Empty:
    """A result without a tensor."""

    def __init__(self) -> None:
        self.text = "none"


def net(form: str = "dict") -> Net:
    return cast(Net, seeded(lambda: Net(form), 0))


X = normal(2, 8)


def logits_of(result: Any) -> Tensor:
    """The logits of any form of result."""
    if isinstance(result, tuple):
        return result[0]
    if isinstance(result, Cache):
        return result.keys[0]
    return result["logits"] if isinstance(result, dict) else result.logits


@pytest.mark.parametrize("form", ["dict", "dataclass", "tuple", "object"])
def test_outputs_that_no_graph_carries_are_left_out_with_a_note(form: str) -> None:
    model = net(form)
    plan = depcut.analyze(model, X).plan(0.3, align=1)
    slim = plan.apply(model)
    assert type(slim(X)) is type(model(X))
    keep = plan.keep()
    expected = masked_outputs(keep, model, X)
    at = keep.coupling.program.results.counts.index(True)
    assert_close(logits_of(slim(X)), expected[at])
    dropped = {
        "dict": "",
        "dataclass": "Result",
        "tuple": "1 (Cache), 2 (NoneType), 3 (str), 4 (int)",
        "object": "Cache",
    }[form]
    assert any(dropped in note for note in depcut.report(slim).notes) or not dropped


def test_what_only_an_uncounted_output_needs_shrinks_along() -> None:
    """The pooler reads what shrinks: it must stay in step, and may become narrower itself."""
    model = net("dataclass")
    slim = depcut.shrink(model, 0.4, X, outputs=("logits",), of="channels", align=1)
    assert slim.second.out_features < 16
    assert slim.pooler.in_features == slim.second.out_features
    assert slim(X).cache.keys[0].shape == (2, slim.pooler.out_features)
    assert slim(X).hidden.shape == (2, slim.second.out_features)
    notes = "\n".join(depcut.report(slim).notes)
    assert "'hidden' does not count, and is narrower: 16 to" in notes


@pytest.mark.parametrize(
    ("outputs", "free"),
    [
        (None, {"first"}),
        ("*", {"first"}),
        (("logits",), {"first", "second", "pooler"}),
        ("log*", {"first", "second", "pooler"}),
        (0, {"first", "second", "pooler"}),
        ((0, "parts.pooled"), {"first", "second"}),
        (["logits", "parts.hidden"], {"first", "pooler"}),
        ((0, 1), {"first"}),
        (("logits", "parts"), {"first"}),
    ],
)
def test_the_outputs_that_count_are_named(outputs: Any, free: set[str]) -> None:
    analysis = depcut.analyze(net(), X, outputs=outputs)
    assert {group.name for group in analysis.groups} == free


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ("nope", "it returns logits, parts.hidden, parts.pooled.0, count, none"),
        (("logits", "hidden"), "returns no output 'hidden'"),
        (7, "returns no output 7"),
        ((), "outputs is ()"),
        (2.5, "outputs is 2.5"),
        ((True,), "outputs is (True,)"),
    ],
)
def test_unknown_outputs_are_refused(outputs: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        depcut.analyze(net(), X, outputs=outputs)
    assert said in str(caught.value)


def test_a_result_without_tensors_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns no tensor, but the result"):
        depcut.analyze(net("nothing"), X)


def test_a_plan_carries_the_outputs_that_count(tmp_path: Path) -> None:
    model = net()
    plan = depcut.analyze(model, X, outputs=("logits",)).plan(0.4, of="channels", align=1)
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert loaded.inputs["outputs"] == ["logits"]
    here, there = plan.apply(model), loaded.apply(net())
    assert here.second.out_features == there.second.out_features < 16
    assert_close(here(X)["logits"], there(X)["logits"])
    saved = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ("logits", [], [3]):
        saved["inputs"]["outputs"] = wrong
        (tmp_path / "wrong.json").write_text(json.dumps(saved))
        with pytest.raises(PlanError, match="outputs that count"):
            depcut.Plan.load(tmp_path / "wrong.json")


class Chosen(nn.Module):
    """One call returns a hidden output beside its own, the other only its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, which: str = "both") -> dict[str, Tensor]:
        hidden = self.b(self.a(x).relu()).tanh()
        out = {"[0]": self.c(hidden)}
        return {**out, "hidden": hidden} if which == "both" else out


def test_a_plan_of_several_calls_carries_the_outputs_of_each(tmp_path: Path) -> None:
    """All that one call returns counts: that says nothing of the other."""
    calls = [{"x": X}, {"x": X, "which": "one"}]
    model = seeded(Chosen, 0)
    plan = depcut.analyze(model, calls, outputs=(0,)).plan(0.4, of="channels", align=1)
    plan.save(tmp_path / "plan.json")
    slim = depcut.Plan.load(tmp_path / "plan.json").apply(seeded(Chosen, 0))
    assert slim(X)["hidden"].shape[-1] == plan.apply(model)(X)["hidden"].shape[-1] < 16


def test_compact_keeps_all_outputs_unless_some_are_named() -> None:
    model = net()
    with torch.no_grad():
        model.head.weight[:, :6] = 0
        model.pooler.weight[:, :6] = 0
    assert depcut.compaction(model, X).removed == {}
    slim = depcut.compact(model, X, outputs=("logits",))
    assert slim.second.out_features == 10
    assert_close(slim(X)["logits"], model(X)["logits"])


def test_what_does_not_count_is_still_compared_in_shape() -> None:
    """An output that lost its structure is no matter of widths."""
    model = net()
    keep = depcut.analyze(model, X, outputs=("logits",)).plan(0.4, of="channels", align=1).keep()
    wanted = list(keep.coupling.program.results.flat(model(X)))
    wrong = [v[:, :1] if isinstance(v, Tensor) and v.shape[-1] == 16 else v for v in wanted]
    found = compare(keep, Expected(wanted, {}), ModuleResults(wrong), None, double=False)
    assert "'parts.hidden', which does not count, has the shape (2, 1)" in found.message


class Repeats(nn.Module):
    """Keys of 4 heads, each repeated for 2 heads of queries, as grouped attention does it."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.q, self.k, self.o = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], -1, 3)
        k = repeated(self.k(x).view(*x.shape[:2], -1, 3), self.groups)
        out: Tensor = self.o((q * k).flatten(2))
        return out


def repeated(k: Tensor, times: int) -> Tensor:
    if times == 1:
        return k
    batch, length, heads, size = k.shape
    more = k[:, :, :, None].expand(batch, length, heads, times, size)
    return more.reshape(batch, length, heads * times, size)


def test_a_number_that_becomes_one_of_a_kind_is_set() -> None:
    """What does nothing to one of a kind is skipped; other code may read the attribute, too."""
    model = seeded(Repeats, 0)
    analysis = depcut.analyze(model, normal(2, 5, 8))
    (repeats,) = (group.name for group in analysis.groups if group.size == 2)
    slim: Any = analysis.plan_keeping({repeats: [[0], [1], [1], [0]]}).apply(model)
    assert slim.groups == 1
    assert depcut.report(slim).patched == {}


# What transformers has of all its models ---------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "auxiliary"),
    [
        ("logits past_key_values encoder_last_hidden_state", {1, 2}),
        ("last_hidden_state pooler_output hidden_states attentions", {2, 3}),
        ("last_hidden_state encoder_last_hidden_state", {1}),
        ("logits pred_boxes last_hidden_state encoder_hidden_states", {2, 3}),
        ("loss logits cache_params", {0, 2}),
        ("hidden_states", set()),
    ],
)
def test_which_outputs_of_a_library_are_auxiliary(names: str, auxiliary: set[int]) -> None:
    result = dict.fromkeys(names.split(), 0)
    found = Transformers().auxiliary(result)
    assert found == {names.split()[i] for i in auxiliary}


def llama() -> Any:
    transformers = zoo.libraries()["transformers"]
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.usefixtures("zoo_libraries")
def test_the_first_call_on_a_transformers_model_works() -> None:
    """A cache by default, no inputs given: neither is in the way, and the caller's config stays."""
    model = llama()
    before = {n: t._version for n, t in all_tensors(model).items()}
    config = model.config.to_dict()
    slim = depcut.shrink(model, 0.3, align=1)
    assert model.config.to_dict() == config
    assert slim.config.use_cache is True
    assert {n: t._version for n, t in all_tensors(model).items()} == before
    notes = depcut.report(slim).notes
    assert notes[0].startswith(
        "the example inputs were made: input_ids int64 [2, 16], attention_mask"
    )
    prompt = torch.arange(3, 9)[None]
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with_cache, without = (slim.generate(prompt, use_cache=c, **given) for c in (True, False))
    assert with_cache.tolist() == without.tolist()
    assert slim(prompt).past_key_values is not None


_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_TEXT = _ENCODER | {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0}
_PIXELS = _ENCODER | {"image_size": 16, "patch_size": 8}
_WAVES = {
    "conv_dim": (16, 12),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_SPEECH = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_target_positions": 16,
}
# By model type: the auto class, options of the config, the inputs to make, the outputs that count.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "bert": (
        "",
        _TEXT,
        {"input_ids": (2, 16), "attention_mask": (2, 16)},
        "last_hidden_state pooler_output",
    ),
    "t5": (
        "",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50},
        {"input_ids": (2, 16), "decoder_input_ids": (2, 8), "attention_mask": (2, 16)},
        "last_hidden_state",
    ),
    "clip": (
        "",
        {"text_config": _TEXT, "vision_config": _PIXELS, "projection_dim": 12},
        {"input_ids": (2, 16), "pixel_values": (2, 3, 16, 16), "attention_mask": (2, 16)},
        "logits_per_image logits_per_text text_embeds image_embeds",
    ),
    "wav2vec2": ("", _ENCODER | _WAVES, {"input_values": (2, 330)}, "last_hidden_state"),
    "audio-spectrogram-transformer": (
        "ForAudioClassification",
        _ENCODER | {"max_length": 32, "num_mel_bins": 16},
        {"input_values": (2, 32, 16)},
        "logits",
    ),
    "whisper": (
        "ForSpeechSeq2Seq",
        _SPEECH | {"num_mel_bins": 20, "max_source_positions": 15},
        {"input_features": (2, 20, 30), "decoder_input_ids": (2, 8)},
        "logits",
    ),
    "speech_to_text": (
        "ForSpeechSeq2Seq",
        _SPEECH | {"input_feat_per_channel": 20, "max_source_positions": 64, "conv_channels": 8},
        {"input_features": (2, 64, 20), "decoder_input_ids": (2, 8)},
        "logits",
    ),
    "yolos": (
        "ForObjectDetection",
        _PIXELS | {"image_size": [32, 16]},
        {"pixel_values": (2, 3, 32, 16)},
        "logits pred_boxes",
    ),
    "videomae": (
        "ForVideoClassification",
        _PIXELS | {"num_frames": 4},
        {"pixel_values": (2, 4, 3, 16, 16)},
        "logits",
    ),
    "gpt2": (
        "ForSequenceClassification",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32},
        {"input_ids": (1, 16), "attention_mask": (1, 16)},  # it has no padding token
        "logits",
    ),
    "mixtral": (
        "ForCausalLM",
        _TEXT | {"num_key_value_heads": 1, "num_local_experts": 3},
        {"input_ids": (2, 16), "attention_mask": (2, 16)},
        "logits",
    ),
}


@pytest.mark.sweep
@pytest.mark.usefixtures("zoo_libraries")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_and_what_counts(kind: str) -> None:
    transformers = zoo.libraries()["transformers"]
    auto, options, shapes, counted = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng():
        model = getattr(transformers, f"AutoModel{auto}").from_config(config).eval()
    said = model.config.to_dict()
    analysis = depcut.analyze(model)
    tensors = {n: v for n, v in infer_inputs(model).items() if isinstance(v, Tensor)}
    assert {n: tuple(v.shape) for n, v in tensors.items()} == shapes
    results = analysis.program.results
    assert [p for p, c in zip(results.paths, results.counts, strict=True) if c] == counted.split()
    assert model.config.to_dict() == said
    assert analysis.groups


@pytest.mark.sweep
@pytest.mark.usefixtures("zoo_libraries")
@pytest.mark.filterwarnings("ignore")
def test_a_call_that_wants_a_cache_gets_one() -> None:
    """The cache is dropped from the capture; what is in it may become narrower."""
    model = llama()
    ids = torch.arange(3, 11).reshape(2, 4)
    slim = depcut.shrink(model, 0.3, {"input_ids": ids, "use_cache": True}, rebuildable=False)
    notes = "\n".join(depcut.report(slim).notes)
    assert "not captured of the outputs: past_key_values (DynamicCache)" in notes
    assert "'past_key_values.layers.0.keys' does not count, and is narrower" in notes


@pytest.mark.sweep
@pytest.mark.usefixtures("zoo_libraries")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_data_fits_without_the_settings_of_the_capture(form: str) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    batch = ids if form == "tensor" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    slim = depcut.shrink(llama(), 0.3, data=[batch, batch], rebuildable=False)
    assert depcut.report(slim).compensation is not None


@pytest.mark.sweep
@pytest.mark.usefixtures("zoo_libraries")
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_made_without_inputs(tmp_path: Path) -> None:
    made = depcut.export(llama(), tmp_path / "llama.onnx")
    assert "agrees with PyTorch" in str(made)


@pytest.mark.usefixtures("zoo_libraries")
def test_why_no_inputs_can_be_made_is_said() -> None:
    """The model's own error, not ours."""
    model = llama()

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("it takes three towers")

    model.model.forward = refuse
    with pytest.raises(InputError, match="the model itself raises ValueError: it takes three"):
        depcut.analyze(model)
