"""Texts that are made from a model: found by what it computes, as likely as it says, repeatable."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import Tensor, nn

from depcut.capture.capture import capture
from depcut.synthetic.choose import make
from depcut.synthetic.filled import Filler, filled
from depcut.synthetic.prediction import draw, prediction
from depcut.synthetic.sampled import sampled
from depcut.synthetic.subject import Made, Subject
from depcut.synthetic.texts import LENGTH, Texts, token_inputs
from depcut.synthetic.tokens import chances, known_tokens, tokens

ROW = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.1, 0.8, 0.0], [0.5, 0.3, 0.2, 0.0]])
CHAIN = torch.cat([ROW, torch.tensor([[0.3, 0.3, 0.4, 0.0]])])


class Chain(nn.Module):
    """The next token's logits by the one before: a Markov chain with a known matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(CHAIN.log().clamp(min=-30))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Reader(nn.Module):
    """Logits, or features, of each token by it and all before, or by all there are.

    Positions and a mask may be given.
    """

    def __init__(self, causal: bool = True, head: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.places = nn.Embedding(50, 8), nn.Embedding(40, 8)
        self.kinds = nn.Embedding(2, 8)
        self.head = nn.Linear(8, 50) if head else nn.Linear(8, 6)

    def forward(
        self,
        ids: Tensor,
        places: Tensor | None = None,
        kinds: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(ids)
        if places is not None:
            x = x + self.places(places)
        if kinds is not None:
            x = x + self.kinds(kinds)
        if mask is not None:
            x = x * mask[..., None]
        whole = x.cumsum(1) if self.causal else x.sum(1, keepdim=True) + x
        return self.head(torch.tanh(whole))


def drawn(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(7))


def subject_of(model: nn.Module, inputs: object, examples: int = 8, **more: float) -> Subject:
    model.eval()
    return Subject(capture(model, inputs), model, examples, **more)  # type: ignore[arg-type]


def texts_of(subject: Subject) -> Texts:
    return Texts(subject, subject.own_model(), token_inputs(subject))


def together(made: Made | None) -> list[Tensor]:
    assert made is not None
    return [torch.cat(tensors) for tensors in zip(*made.items, strict=True)]


def ids_of(made: Made | None) -> Tensor:
    return together(made)[0]


@pytest.mark.parametrize("causal", [True, False])
def test_whether_later_tokens_count_is_tried(causal: bool) -> None:
    found = prediction(texts_of(subject_of(Reader(causal), drawn())))
    assert found is not None
    assert found.causal is causal


def test_features_predict_no_tokens() -> None:
    assert prediction(texts_of(subject_of(Reader(head=False), drawn()))) is None


def test_positions_and_token_types_are_no_tokens() -> None:
    places = torch.arange(12).expand(2, -1)
    kinds = (places > 5).long()
    inputs = {"ids": drawn(), "places": places, "kinds": kinds, "mask": torch.ones(2, 12).long()}
    subject = subject_of(Reader(), inputs)
    (found,) = token_inputs(subject)
    assert (found.leaf, found.size) == (0, 50)


def test_positions_go_on_and_masks_stay_ones_in_longer_texts() -> None:
    inputs = {"ids": drawn(), "places": torch.arange(12).expand(2, -1), "mask": torch.ones(2, 12)}
    ids, places, mask = together(sampled(subject_of(Reader(), inputs)))
    assert ids.shape == places.shape == mask.shape == (8, LENGTH // 4)  # of 40 positions
    assert torch.equal(places, torch.arange(LENGTH // 4).expand(8, -1))
    assert bool((mask == 1).all())


def test_texts_are_as_likely_as_the_model_says() -> None:
    subject = subject_of(Chain(), torch.randint(0, 4, (2, 64)), examples=64)
    ids = ids_of(sampled(subject))
    counts = torch.zeros(4, 4)
    counts.index_put_(
        (ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    met = counts.sum(1, keepdim=True)[:3]
    assert int(counts[:, 3].sum()) == 0, "a token without a chance was drawn"
    expected = met * CHAIN[:3, :3]
    chi_square = float(((counts[:3, :3] - expected) ** 2 / expected).sum())
    assert chi_square < 22.5  # six degrees of freedom: exceeded once in a thousand


def test_texts_begin_amid_a_text() -> None:
    first = ids_of(sampled(subject_of(Chain(), torch.randint(0, 4, (2, 64)), examples=96)))[:, 0]
    assert int((first == 3).sum()) == 0, "the first token was drawn without the model"


def test_surprise_is_that_of_what_was_drawn() -> None:
    ids, surprise = draw(CHAIN.log(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(surprise, -CHAIN[torch.arange(4), ids].log())


@pytest.mark.parametrize("net", [Reader(True), Reader(False), Reader(head=False)])
def test_texts_are_the_same_again_and_nothing_else_changes(net: nn.Module) -> None:
    subject, state = subject_of(net, drawn(length=64)), copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = ids_of(make(subject)), ids_of(make(subject))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    other = Subject(subject.program, net, 8, seed=1)
    assert not torch.equal(first, ids_of(make(other)))


def test_without_time_there_is_no_text() -> None:
    assert sampled(subject_of(Reader(True), drawn(), seconds=0.0)) is None
    assert filled(subject_of(Reader(False), drawn(), seconds=0.0)) is None


def test_a_filled_text_keeps_what_all_texts_begin_and_end_with() -> None:
    example = drawn()
    example[:, 0], example[:, -1] = 7, 9
    made = filled(subject_of(Reader(False), example))
    ids = ids_of(made)
    assert ids.shape == (8, LENGTH)
    assert bool((ids[:, 0] == 7).all())
    assert bool((ids[:, -1] == 9).all())


def test_filling_moves_towards_what_the_model_predicts() -> None:
    net = Reader(False)
    with torch.no_grad():
        net.head.bias.fill_(-9.0)
        net.head.bias[5] = 9.0
    ids = ids_of(filled(subject_of(net, drawn())))
    assert float((ids == 5).float().mean()) > 0.98


def test_a_share_is_masked_where_the_mask_is_known() -> None:
    filler = Filler(texts := texts_of(subject_of(Reader(False), drawn())), prediction(texts))  # type: ignore[arg-type]
    ids = torch.full((100, 100), 3)
    assert torch.equal(filler.masked(ids), ids)
    filler.mask = 4
    assert 0.13 < float((filler.masked(ids) == 4).float().mean()) < 0.17


def test_tokens_that_training_did_not_meet_are_left_out() -> None:
    net = Reader(head=False)
    with torch.no_grad():
        net.embed.weight[10:20] = net.embed.weight.mean(0)
    texts = texts_of(subject_of(net, drawn()))
    ids = known_tokens(texts, texts.inputs[0])
    assert not set(ids.tolist()) & set(range(10, 20))
    assert set(ids_of(tokens(texts.subject)).flatten().tolist()) <= set(ids.tolist())


def test_tokens_are_rarer_along_the_direction_that_embeddings_share() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert len(chances(table - table.mean(0)).unique()) == 1
    table[:, 0] = torch.arange(50) / 5
    likely = chances(table)
    assert float(likely[:10].mean()) > 1.5 * float(likely[-10:].mean())


def test_half_of_the_texts_are_padded_by_the_mask() -> None:
    net = Reader(head=False)
    inputs = {"ids": drawn(), "mask": torch.ones(2, 12, dtype=torch.int64)}
    _, mask = together(tokens(subject_of(net, inputs, examples=64)))
    ends = mask.sum(1)
    assert bool((mask.diff(dim=1) <= 0).all()), "a token behind the end counts"
    assert bool((ends[::2] == mask.shape[1]).all())
    assert bool((ends[1::2] < mask.shape[1]).all())
    assert len(set(ends.tolist())) > 2


def test_other_nets_get_no_texts() -> None:
    subject = subject_of(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    assert sampled(subject) is None
    assert filled(subject) is None
    assert tokens(subject) is None


def _transformers() -> dict[str, nn.Module]:
    import transformers as t

    small = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = t.BertConfig(**small, intermediate_size=32, max_position_embeddings=64)
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return {
        "sampled Llama": t.LlamaForCausalLM(
            t.LlamaConfig(**small, intermediate_size=32, max_position_embeddings=64)
        ),
        "sampled GPT2": t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=99, **tiny, bos_token_id=1, eos_token_id=1)
        ),
        "sampled T5": t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        "filled Bert": t.BertForMaskedLM(encoder),
        "tokens Bert": t.BertModel(encoder),
    }  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", ["sampled Llama", "sampled GPT2", "sampled T5", "filled Bert", "tokens Bert"]
)
def test_transformers_classes_as_they_come(name: str) -> None:
    zoo.libraries()
    subject = subject_of(_transformers()[name], None, examples=1)
    made, again = make(subject), make(subject)
    assert made is not None
    assert again is not None
    assert made.recipe.startswith(name.partition(" ")[0])
    outputs = subject.call(subject.own_model(), made.items[0])
    assert all(bool(o.isfinite().all()) for o in outputs if isinstance(o, Tensor))
    assert torch.equal(made.items[0][0], again.items[0][0])
