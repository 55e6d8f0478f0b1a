"""Claims of the notes that the project grew from: what is said, where, and which rows tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from measure import Row
from study_plot import of, zeros

Picks = Callable[[Row], bool]

ZEROS_AT = (0.5, 0.65, 0.8)  # shares of zeros that the papers on them claim something at


@dataclass(frozen=True)
class Claim:
    """What is said, where, and what has to be better than what for it to hold.

    Attributes:
        text: The claim.
        source: Who says it.
        first: Rows of what is said to be better, or as good.
        second: Rows of the other; None: the dense net, which loses nothing.
        ratios: Shares removed that count; all if empty.
        matches: Whether being level is enough.
    """

    text: str
    source: str
    first: Picks
    second: Picks | None
    ratios: tuple[float, ...] = ()
    matches: bool = False


CLAIMS: Sequence[Claim] = (
    Claim(
        "criteria that read data beat magnitudes (here: taylor, without repair)",
        "Molchanov et al. 2017; the notes on scoring",
        of("criteria", "taylor", False),
        of("criteria", "magnitude", False),
    ),
    Claim(
        "magnitudes beat a random choice of units",
        "the notes; disputed by Rethinking",
        of("criteria", "magnitude", False),
        of("criteria", "random", False),
    ),
    Claim(
        "SynFlow, which sees no data, does as well as criteria that do (taylor)",
        "Tanaka et al. 2020",
        of("criteria", "synflow", False),
        of("criteria", "taylor", False),
        matches=True,
    ),
    Claim(
        "weights times the norms of their inputs (Wanda) beat weights, as unstructured zeros "
        "of the same share in every layer",
        "Sun et al. 2024",
        of("unstructured", "Wanda"),
        of("unstructured", "magnitude by layer"),
        ZEROS_AT,
    ),
    Claim(
        "and weights alone of all layers together",
        "Sun et al. 2024",
        zeros("Wanda"),
        zeros("magnitude"),
        ZEROS_AT,
    ),
    Claim(
        "solving for what is left (SparseGPT) beats Wanda",
        "Frantar & Alistarh 2023",
        zeros("SparseGPT"),
        zeros("Wanda"),
        ZEROS_AT,
    ),
    Claim(
        "and Wanda comes close to it (as good)",
        "Sun et al. 2024; the notes",
        zeros("Wanda"),
        zeros("SparseGPT"),
        ZEROS_AT,
        matches=True,
    ),
    Claim(
        "unstructured zeros (magnitude) lose less than whole units of as many parameters (obs, "
        "repaired; norms anew for both)",
        "the notes: ShrinkBench, Blalock et al. 2020",
        of("unstructured", "magnitude, as many as obs"),
        of("criteria", "obs", True),
    ),
    Claim(
        "the same, by SparseGPT",
        "the notes; Frantar & Alistarh 2023",
        of("unstructured", "SparseGPT, as many as obs"),
        of("criteria", "obs", True),
    ),
    Claim(
        "the same, by SparseGPT with layers' shares by magnitude",
        "not of a paper: to rule out that equal shares are why",
        of("unstructured", "SparseGPT, shares by magnitude, as many as obs"),
        of("criteria", "obs", True),
    ),
    Claim(
        "the same, by SparseGPT with layers' shares as obs leaves them",
        "not of a paper: to rule out that the shares are why",
        of("unstructured", "SparseGPT, shares of obs, as many as obs"),
        of("criteria", "obs", True),
    ),
    Claim(
        "and up to as many parameters as half of the MACs hold",
        "not of a paper: its zeros are half of the weights",
        of("unstructured", "SparseGPT, shares of obs, as many as obs"),
        of("criteria", "obs", True),
        (0.2, 0.35, 0.5),
    ),
    Claim(
        "large-sparse models beat small-dense ones of as many parameters",
        "Zhu & Gupta 2017",
        of("sparse_dense", "large-sparse, gradual"),
        of("sparse_dense", "small-dense"),
    ),
    Claim(
        "rewinding the learning rate matches or beats rewinding weights",
        "Renda et al. 2020",
        of("tickets", "rate rewound"),
        of("tickets", "early ticket"),
        matches=True,
    ),
    Claim(
        "rewinding weights beats fine-tuning",
        "Renda et al. 2020",
        of("tickets", "early ticket"),
        of("tickets", "fine-tuned"),
    ),
    Claim(
        "a linear schedule from the peak does as well as the original one",
        "Zimmer et al. 2023",
        of("tickets", "linear"),
        of("tickets", "rate rewound"),
        matches=True,
    ),
    Claim(
        "winning tickets (weights of step 0) beat new random weights",
        "Frankle & Carbin 2019",
        of("tickets", "ticket of step 0"),
        of("tickets", "scratch-E"),
    ),
    Claim(
        "half of a net, trained from its initial weights for as long, matches the dense net",
        "Frankle & Carbin 2019",
        of("tickets", "ticket of step 0"),
        None,
        (0.5,),
        matches=True,
    ),
    Claim(
        "tickets of zeros anywhere, with half or a fifth of the weights, match the dense net",
        "Frankle & Carbin 2019",
        of("sparse_tickets", "ticket of step 0"),
        None,
        (0.5, 0.8),
        matches=True,
    ),
    Claim(
        "and beat the same zeros with new random weights",
        "Frankle & Carbin 2019",
        of("sparse_tickets", "ticket of step 0"),
        of("sparse_tickets", "new weights"),
    ),
    Claim(
        "so does half of a net with new random weights",
        "Liu et al. 2019, Rethinking",
        of("tickets", "scratch-E"),
        None,
        (0.5,),
        matches=True,
    ),
    Claim(
        "early tickets (weights after 5 %) beat those of step 0",
        "Frankle et al. 2020",
        of("tickets", "early ticket"),
        of("tickets", "ticket of step 0"),
    ),
    Claim(
        "a quarter of the steps with a linear schedule does as well as fine-tuning for T",
        "Zimmer et al. 2023",
        of("tickets", "linear, T/4"),
        of("tickets", "fine-tuned"),
        matches=True,
    ),
    Claim(
        "pruning and training in turns beats one shot, at as many steps",
        "the notes: iterative pruning; Renda et al. 2020",
        of("tickets", "linear, three cycles"),
        of("tickets", "linear"),
    ),
    Claim(
        "which units stay matters little once they are trained again (random as good)",
        "Liu et al. 2019; Mittal et al. 2018",
        of("tickets", "random units, rate rewound"),
        of("tickets", "rate rewound"),
        matches=True,
    ),
    Claim(
        "gradual masks want a rate above fine-tuning's (the original one beats a tenth)",
        "Zhu & Gupta 2017",
        of("sparse_dense", "large-sparse, gradual"),
        of("sparse_dense", "large-sparse, a tenth of the rate"),
    ),
    Claim(
        "and not too high a one (the original one beats three times it)",
        "Zhu & Gupta 2017",
        of("sparse_dense", "large-sparse, gradual"),
        of("sparse_dense", "large-sparse, three times the rate"),
    ),
    Claim(
        "nets can be pruned before training with little loss (half of the MACs, synflow)",
        "Lee et al. 2019; Tanaka et al. 2020",
        of("before_training", "synflow"),
        None,
        (0.5,),
        matches=True,
    ),
    Claim(
        "and so chosen at once (snip), it does as well as a ticket, at moderate shares (half)",
        "the notes; Tanaka et al. 2020",
        of("before_training", "snip"),
        of("tickets", "ticket of step 0"),
        (0.5,),
        matches=True,
    ),
    Claim(
        "at the start, synflow beats snip, which empties layers",
        "Tanaka et al. 2020",
        of("before_training", "synflow"),
        of("before_training", "snip"),
    ),
    Claim(
        "second-order criteria (hessian) beat first-order ones (taylor)",
        "the notes on scoring; LeCun et al. 1989",
        of("criteria", "hessian", False),
        of("criteria", "taylor", False),
    ),
    Claim(
        "training the small net from scratch (Scratch-B) does as well as fine-tuning it",
        "Liu et al. 2019, Rethinking",
        of("tickets", "scratch-B"),
        of("tickets", "fine-tuned"),
        matches=True,
    ),
    Claim(
        "training from scratch (Scratch-B) does as well as retraining at the original rates",
        "Liu et al. 2019, against Renda et al. 2020",
        of("tickets", "scratch-B"),
        of("tickets", "rate rewound"),
        matches=True,
    ),
    Claim(
        "a moderately pruned net (half) generalises better than the dense one, trained on as long",
        "the notes; Blalock et al. 2020",
        of("tickets", "rate rewound"),
        of("tickets", "dense, rate rewound"),
        (0.5,),
    ),
    Claim(
        "a budgeted dense training (T/2), pruned and retrained (T/2), beats pruning while training",
        "Zimmer et al. 2023 (BIMP)",
        of("tickets", "budgeted: T/2 dense, T/2 pruned"),
        of("tickets", "pruned while trained, T in all"),
    ),
    Claim(
        "and does as well as the dense training and as long a retraining (2 T, linear)",
        "Zimmer et al. 2023 (BIMP)",
        of("tickets", "budgeted: T/2 dense, T/2 pruned"),
        of("tickets", "linear"),
        matches=True,
    ),
    Claim(
        "distillation from the dense net beats the labels alone",
        "Hinton et al. 2015",
        of("tickets", "distilled"),
        of("tickets", "rate rewound"),
    ),
    Claim(
        "FLAP beats Wanda-sp",
        "An et al. 2024",
        of("papers", "FLAP"),
        of("papers", "Wanda-sp"),
    ),
    Claim(
        "widths chosen and re-solved with second-order terms (OBC; here obs) beat FLAP",
        "the notes: FANG's table of Llama-2-7B",
        of("papers", "depcut, widths"),
        of("papers", "FLAP"),
    ),
    Claim(
        "re-solving what is left beats leaving it as it was (obs)",
        "OBC, Tyr-the-Pruner, FANG",
        of("criteria", "obs", True),
        of("criteria", "obs", False),
    ),
)

NOT_TESTABLE: Sequence[tuple[str, str, str]] = (
    (
        "magnitudes are consistent across many hyperparameters and large models",
        "the notes",
        "not testable here: one recipe a net",
    ),
    (
        "the orders on 7-billion decoders (SliceGPT, SVD-LLM, OBC)",
        "the notes",
        "not testable here: no weights of that size",
    ),
)
