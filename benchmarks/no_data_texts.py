"""Nets of texts that no recipe of depcut.synthetic was tuned on, trained on the library's source.

A character GRU, a masked language model of words and an encoder of passages without a head, the
latter two transformers' classes as they come. Words are pieces of identifiers, numbers, spaces and
signs; the rarer ones are one and the same.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import torch
from accuracy_tasks import (
    RARE,
    Pair,
    Recipe,
    Task,
    Text,
    _digest,
    _text,
)
from torch import Tensor, nn
from torch.nn import functional
from walk_accuracy import LLAMA

WORDS = 1000  # most frequent ones
RARE_WORD, MASK, START, END = WORDS, WORDS + 1, WORDS + 2, WORDS + 3
PASSAGE = 48  # tokens, START and END among them
AMONG = 16  # passages, one of which is the next
PASSAGES = 512  # of validation text that the metrics read
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|\n *| +|[^\w\s]|_|\S")


class Passages:
    """Passages of the training files, and the same with some words masked."""

    unit, higher_is_better = "masked validation loss in nats", False

    @property
    def digest(self) -> str:
        return _digest(*(part.numpy().tobytes() for part in _words()))

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Masked passages, and the words that they had; -100 where none was to be found."""
        return masked(passages(_words()[0], generator, batch), generator)

    augmented = draw

    @torch.no_grad()
    def metric(self, model: nn.Module) -> float:
        generator = torch.Generator().manual_seed(1)
        read, wanted = masked(passages(_words()[1], generator, PASSAGES), generator)
        losses = [
            float(functional.cross_entropy(model(x).logits.transpose(1, 2), y, reduction="sum"))
            for x, y in zip(read.split(32), wanted.split(32), strict=True)
        ]
        return sum(losses) / int((wanted >= 0).sum())


class Neighbours(Passages):
    """Pairs of a passage and the one behind it; which is it, among several?"""

    unit, higher_is_better = "next passages found in %", True

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Half of the passages, then the ones behind them; no target is needed."""
        text = _words()[0]
        read = neighbours(
            text, torch.randint(len(text) - 2 * PASSAGE, (batch // 2,), generator=generator)
        )
        return read, torch.zeros(len(read))

    augmented = draw

    @torch.no_grad()
    def metric(self, model: nn.Module) -> float:
        text = _words()[1]
        starts = torch.linspace(0, len(text) - 2 * PASSAGE, PASSAGES + 1).long()[:-1]
        vectors = torch.cat([embedded(model(x)) for x in neighbours(text, starts).split(32)])
        first, second = (v.view(-1, AMONG, v.shape[1]) for v in vectors.chunk(2))
        found = (first @ second.transpose(1, 2)).argmax(2) == torch.arange(AMONG)
        return 100 * float(found.float().mean())


def passages(text: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """(count, PASSAGE) ids between START and END."""
    return _framed(text, torch.randint(len(text) - PASSAGE, (count,), generator=generator))


def neighbours(text: Tensor, starts: Tensor) -> Tensor:
    """Passages, then as many that each begin where one of the first ended."""
    return torch.cat([_framed(text, starts), _framed(text, starts + PASSAGE - 2)])


def _framed(text: Tensor, starts: Tensor) -> Tensor:
    words = text[starts[:, None] + torch.arange(PASSAGE - 2)].long()
    return functional.pad(functional.pad(words, (1, 0), value=START), (0, 1), value=END)


def masked(read: Tensor, generator: torch.Generator) -> Pair:
    """A share of 0.15 of the words are to be found; of these 80 % masked, 10 % other words."""
    chance = torch.rand(read.shape, generator=generator)
    chosen = (chance < 0.15) & (read < START)
    how = torch.rand(read.shape, generator=generator)
    other = torch.randint(WORDS, read.shape, generator=generator)
    given = torch.where(chosen & (how < 0.8), MASK, torch.where(chosen & (how < 0.9), other, read))
    return given, torch.where(chosen, read, -100)


def embedded(output: Any) -> Tensor:
    """Unit vectors of passages: means over their tokens."""
    return functional.normalize(output.last_hidden_state.mean(1), dim=1)


def masked_loss(output: Any, target: Tensor) -> Tensor:
    """Mean over the words to be found."""
    return functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def contrast(output: Any, _: Tensor) -> Tensor:
    """InfoNCE over the batch, both ways."""
    first, second = embedded(output).chunk(2)
    alike = first @ second.T / 0.1
    which = torch.arange(len(alike))
    return functional.cross_entropy(alike, which) + functional.cross_entropy(alike.T, which)


@functools.cache
def _words() -> tuple[Tensor, Tensor]:
    """Training and validation words as numbers, most frequent ones first."""
    pieces = [_PIECE.findall("".join(map(chr, part.tolist()))) for part in _text()]
    known = {w: i for i, (w, _) in enumerate(Counter(pieces[0]).most_common(WORDS))}
    shuffled = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0)).tolist()
    number = {w: shuffled[i] for w, i in known.items()}
    train, held_out = ([number.get(w, RARE_WORD) for w in part] for part in pieces)
    return torch.tensor(train, dtype=torch.int16), torch.tensor(held_out, dtype=torch.int16)


def _config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=END + 1,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=288,
        max_position_embeddings=PASSAGE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def masked_model() -> nn.Module:
    """Transformers' BertForMaskedLM."""
    from transformers import BertForMaskedLM

    model: nn.Module = BertForMaskedLM(_config())
    return model


def encoder() -> nn.Module:
    """The trunk of the masked model, trained as it was with seed 0, before it meets passages."""
    from transformers import BertModel

    model: nn.Module = BertModel(_config(), add_pooling_layer=False)
    path = TASKS["word_bert"].path(0)
    if path.exists():
        model.load_state_dict(TASKS["word_bert"].trained(0).bert.state_dict())
    return model


class CharGRU(nn.Module):
    """One recurrent layer between an embedding and a head."""

    def __init__(self, symbols: int, width: int = 64, hidden: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(tokens))[0])


TASKS = {
    "char_llama": LLAMA,
    "word_bert": Task(
        "word_bert", masked_model, Passages(), Recipe(steps=1500, batch=12, rate=3e-3), masked_loss
    ),
    "passage_bert": Task(
        "passage_bert", encoder, Neighbours(), Recipe(steps=150, batch=48, rate=1e-3), contrast
    ),
    "char_gru": Task(
        "char_gru",
        lambda: CharGRU(RARE + 1),
        Text(),
        Recipe(steps=800, batch=16, rate=4e-3, decay=0.01),
    ),
}
