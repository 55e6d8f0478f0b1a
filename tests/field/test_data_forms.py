"""Calibration data as people have it: every form gives what the model itself computes on it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from nets import normal
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.data import DataLoader, Dataset

import depcut
from depcut.calibration import lengths
from depcut.calibration.gradients import gradients, trainable
from depcut.calibration.visits import visits
from depcut.errors import InputError


class Encoder(nn.Module):
    """Attention over texts with a padding mask; what it returns is (loss, logits), or logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(20, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        batch, length = input_ids.shape
        x = self.words(input_ids) + self.places(torch.arange(length))
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.norm(x + self.out(mixed.transpose(1, 2).reshape(batch, length, 16)))
        x = x + self.down(F.gelu(self.up(x)))
        logits = self.head(x)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


LENGTHS = (9, 5, 12, 9, 1)


def ids(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).mul(7).remainder(29).view(rows, length)


def texts(**more: Any) -> list[dict[str, Any]]:
    """Batches of other lengths, with masks that take out the end of the first text."""
    out = []
    for rows, length in zip((3, 2, 4, 1, 2), LENGTHS, strict=True):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, max(1, length - 3) :] = 0
        out.append({"input_ids": ids(rows, length), "attention_mask": mask, **more})
    return out


def assert_followed(model: nn.Module, data: Any, inputs: Any = None) -> depcut.Calibration:
    """What the graph reads at its linear layers is what the model's own layers read."""
    items = list(data)
    if inputs is None:
        inputs = depcut.calibration.data.read_with_inputs(items, 32, None, model, False)[1]
    analysis = depcut.analyze(model, inputs)
    calibration = analysis.calibrate(items, progress=False)
    assert calibration is not None
    seen: list[tuple[int, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append((id(m), i[0]))) for m in layers]
    for batch in calibration.batches:
        with torch.no_grad():
            model(*batch.args, **batch.kwargs)
    for hook in hooks:
        hook.remove()
    nodes = [
        n for n in analysis.program.graph.graph.nodes
        if str(n.target) in ("aten.linear.default", "aten.conv2d.default")
    ]  # fmt: skip
    found = visits(analysis.coupling, model, calibration, nodes)
    for (_, want), (_, _, call) in zip(seen, found, strict=True):
        torch.testing.assert_close(want, call["input"], rtol=1e-5, atol=1e-5)
    return calibration


# Other lengths and sizes -------------------------------------------------------------------------


def test_batches_of_other_lengths_are_followed_value_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = counted_captures(monkeypatch)
    calibration = assert_followed(Encoder().eval(), texts())
    assert "5 batches of 12 examples in all, of 4 sizes" in str(calibration)
    assert len(captured) == 1, "the numbers of the other lengths are on the line through two"


def counted_captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    captured: list[Any] = []
    capture = lengths.captured_again

    def counted(*given: Any) -> Any:
        captured.append(given)
        return capture(*given)

    monkeypatch.setattr(lengths, "captured_again", counted)
    return captured


class Windows(nn.Module):
    """Fills a text up to windows of four: its sizes are no straight line of its length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mix, self.head = nn.Linear(6, 16), nn.Linear(4, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        y = F.pad(self.up(x), (0, 0, 0, -length % 4)).unflatten(1, (-1, 4))
        y = self.mix(y.transpose(2, 3)).transpose(2, 3).flatten(1, 2)
        return self.head(y.relu())[:, :length]


@pytest.mark.sweep
def test_sizes_on_no_line_are_captured_each(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = counted_captures(monkeypatch)
    assert_followed(Windows().eval(), [normal(2, n, 6) for n in (7, 5, 6, 11, 3)])
    assert len(captured) == 2, "of 5 and of 11: 6 is on the line to the one, 3 to the other"
    slim = depcut.shrink(Windows().eval(), 0.4, data=[normal(2, n, 6) for n in (7, 5, 6, 11, 3)])
    assert slim(normal(1, 7, 6)).shape == (1, 7, 3)


@pytest.mark.sweep
def test_images_of_other_sizes_are_followed_value_by_value() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    assert_followed(net.eval(), [normal(2, 3, s, t) for s, t in ((16, 16), (12, 20), (16, 9))])


@pytest.mark.sweep
@pytest.mark.parametrize("memory", ["4GiB", 1])
def test_repair_on_padded_batches_equals_repair_on_what_is_no_padding(memory: str | int) -> None:
    """Weights are the same from texts of one length a batch, and from the same texts padded."""
    model = Encoder().eval()
    plain, padded = [], []
    for rows, length in zip((3, 2, 4, 3), (9, 5, 7, 9), strict=True):
        words, ones = ids(rows, length), torch.ones(rows, length, dtype=torch.int64)
        plain.append({"input_ids": words, "attention_mask": ones})
        more = {"input_ids": F.pad(words, (0, 12 - length), value=3)}
        padded.append({**more, "attention_mask": F.pad(ones, (0, 12 - length))})
    analysis = depcut.analyze(model, plain[0])
    plan = analysis.plan(0.4, align=1)
    weights = []
    for data in (plain, padded):
        slim = plan.apply(model, data=data, memory=memory, progress=False)
        assert depcut.report(slim).compensation.repairs
        weights.append(slim.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.sweep
def test_every_criterion_takes_batches_of_other_lengths() -> None:
    model = Encoder().eval()
    items = [{**item, "labels": item["input_ids"] % 5} for item in texts()]
    analysis = depcut.analyze(model, {k: v for k, v in items[0].items() if k != "labels"})
    calibration = analysis.calibrate(items, loss="model", progress=False)
    for score in ("obs", "wanda", "flap", "apoz", "chip", "hrank", "taylor", "hessian"):
        plan = analysis.plan(0.3, data=calibration, score=score)
        assert plan.apply(model, compensate=False) is not None


@pytest.mark.sweep
def test_a_branch_is_chosen_on_batches_of_other_lengths() -> None:
    slim = depcut.shrink(Encoder().eval(), 0.5, data=texts(), depth=True, align=1)
    assert torch.isfinite(slim(ids(2, 7))).all()


@pytest.mark.sweep
def test_turns_read_the_same_batches() -> None:
    model = Encoder().eval()
    result = depcut.training.iterate(
        model, 0.4, data=texts(), steps=2, retrain=lambda m, _: m, align=1
    )
    assert torch.isfinite(result.model(ids(2, 7))).all()


class Tokens(nn.Module):
    """Mixes positions by a weight, so that its length is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.head = nn.Linear(6, 6), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.mix(x.transpose(1, 2)).transpose(1, 2)).relu())


class Course(Tokens):
    """Another course for long inputs."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.head(hidden if x.shape[1] < 8 else hidden.flip(1) + hidden)


@pytest.mark.parametrize(
    ("model", "why"), [(Tokens(), "the model itself raises"), (Course(), "another course")]
)
def test_a_length_that_does_not_fit_is_named(model: nn.Module, why: str) -> None:
    data = [normal(2, 6, 8), normal(3, 10, 8)]
    with pytest.raises(InputError) as caught:
        depcut.shrink(model.eval(), 0.5, data=data)
    message = str(caught.value)
    assert "x has shape (3, 10, 8), the model was captured with (2, 6, 8)" in message
    assert why in message
    assert "data, item 1" in message
    assert "pad or cut" in message


# Items -------------------------------------------------------------------------------------------


def test_a_batch_encoding_with_texts_numbers_and_labels_is_read() -> None:
    items = [UserDict({**t, "text": ["a"], "idx": 1, "labels": ids(1, 1)}) for t in texts()]
    calibration = assert_followed(Encoder().eval(), items)
    assert list(calibration.batches[0].kwargs) == ["input_ids", "attention_mask"]
    assert "the model takes no text, idx" in str(calibration)
    assert "targets, left aside: labels" in str(calibration)


def test_a_mask_that_the_model_was_captured_without_is_named() -> None:
    model = Encoder().eval()
    with pytest.raises(InputError, match=r"(?s)has attention_mask, which the model takes.*item 0"):
        depcut.shrink(model, 0.5, ids(2, 9), data=texts())
    whole = [{**t, "attention_mask": torch.ones_like(t["input_ids"])} for t in texts()]
    assert_followed(model, whole, ids(2, 9))


@pytest.mark.sweep
def test_a_pair_whose_target_the_model_could_take_is_a_pair() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            logits = self.head(self.up(x).relu())
            return logits if targets is None else (logits, F.cross_entropy(logits, targets))

    pairs = [(normal(3, 6), torch.tensor([0, 1, 2]))] * 2
    model = Scored()
    calibration = assert_followed(model, pairs)
    assert torch.equal(calibration.batches[0].target, pairs[0][1])
    analysis = depcut.analyze(model, pairs[0][0])
    own, given = (
        analysis.calibrate(pairs, loss=loss, progress=False) for loss in ("model", F.cross_entropy)
    )
    assert_same_gradients(model, own, given)
    assert depcut.shrink(model, 0.5, data=pairs, loss="model", score="taylor").up.out_features == 8


def assert_same_gradients(model: nn.Module, *calibrations: Any) -> None:
    with trainable(model) as seen:
        for one, two in zip(*(gradients(seen, c) for c in calibrations), strict=True):
            for name, gradient in one.items():
                torch.testing.assert_close(gradient, two[name])


@pytest.mark.sweep
def test_the_models_own_loss_of_the_labels_is_that_of_a_function() -> None:
    model = Encoder().eval()
    items = [{**t, "labels": t["input_ids"] % 5} for t in texts()]
    analysis = depcut.analyze(model, {k: v for k, v in items[0].items() if k != "labels"})

    def loss(output: Tensor, item: Any) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), item["labels"].flatten())

    both = [analysis.calibrate(items, loss=given, progress=False) for given in ("model", loss)]
    assert "the model takes its loss of labels" in str(both[0])
    assert_same_gradients(model, *both)
    with pytest.raises(InputError, match=r'(?s)holds no loss.*loss="model"'):
        analysis.calibrate(texts(), loss="model")


@pytest.mark.sweep
def test_a_model_that_takes_the_whole_batch_gets_it() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.head(self.up(batch["x"]).relu() * batch["weight"][:, None])

    data = [
        {"x": normal(n, 6), "weight": normal(n), "name": ["n"] * n, "y": torch.zeros(n)}
        for n in (3, 2)
    ]
    calibration = assert_followed(Whole(), data)
    assert calibration.unused == ("name",)
    assert depcut.shrink(Whole(), 0.5, data=data).up.out_features == 8


# Datasets ----------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


class Table:
    """The part of Hugging Face's `datasets.Dataset` that tells it from other iterables."""

    column_names = ("input_ids", "attention_mask", "text")

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def with_format(self, kind: str) -> Table:
        assert kind == "torch"
        return Table([{k: torch.tensor(v) if k != "text" else v for k, v in row.items()}
                      for row in self.rows])  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.sweep
def test_rows_of_a_table_are_batched_by_their_lengths() -> None:
    rows = [
        {"input_ids": ids(1, n)[0].tolist(), "attention_mask": [1] * n, "text": "a"}
        for n in (4, 7, 4, 4, 7)
    ]
    for table in (Table(rows), Table(rows).with_format("torch")):
        slim = depcut.shrink(Encoder().eval(), 0.4, data=table, align=1)
        assert "item" not in str(depcut.report(slim))
        analysis = depcut.analyze(Encoder(), {"input_ids": ids(2, 4), "attention_mask": ids(2, 4)})
        calibration = analysis.calibrate(table, progress=False)
        assert [b.rows for b in calibration.batches] == [3, 2]
        assert calibration.unused == ("text",)


def test_rows_are_spread_over_a_dataset() -> None:
    data = Rows([(normal(6) + n, n) for n in range(1000)])
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    calibration = depcut.analyze(model, normal(2, 6)).calibrate(data, batches=2, progress=False)
    targets = torch.cat([b.target for b in calibration.batches])
    assert targets.tolist() == [1000 * i // 16 for i in range(16)]


def test_a_single_example_is_told_from_a_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"(?s)shape \(6,\), that of one example.*DataLoader"):
        depcut.analyze(model, normal(2, 6)).calibrate([normal(6)])


# transformers ------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 60, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


@pytest.mark.sweep
def test_transformers_are_followed_on_dynamically_padded_batches() -> None:
    zoo.libraries()
    import transformers

    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).eval()

    def collate(rows: list[Tensor]) -> Any:
        words = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        labels = words.masked_fill(mask == 0, -100)
        return transformers.BatchEncoding(
            {"input_ids": words, "attention_mask": mask, "labels": labels}
        )

    rows = [ids(1, n)[0] + 2 for n in (5, 8, 7, 11, 8, 3, 9)]
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    assert_followed(model, loader)
    slim = depcut.shrink(model, 0.3, data=loader, loss="model", score="taylor")
    assert len({b["input_ids"].shape for b in loader}) > 2
    for batch in loader:
        assert torch.isfinite(slim(**batch).loss)
