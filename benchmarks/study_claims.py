"""Claims of the notes that the project grew from, each judged by the study's rows.

A claim compares two methods at the points that both have (task, seed and ratio), in pairs. It is
confirmed where the first is better (or as good, where the claim is only that) in at least three
quarters of the pairs and on the average of tasks; else it is not, and where the second is better by
that measure the reverse holds. Few pairs, or those of one net, are too few to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from measure import Row
from study_plot import of, zeros

Picks = Callable[[Row], bool]
Point = tuple[str, int, float]

SHARE = 0.75  # of the pairs
PAIRS, NETS = 6, 2  # at least, to judge a claim by
ZEROS_AT = (0.5, 0.65, 0.8)  # shares of zeros that the papers on them claim something at
ALIKE = 0.05  # of a task's range between dense and the worst: a difference that counts


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
        "re-solving what is left beats leaving it as it was (obs)",
        "OBC, Tyr-the-Pruner, FANG",
        of("criteria", "obs", True),
        of("criteria", "obs", False),
    ),
)

NOT_TESTABLE: Sequence[tuple[str, str, str]] = (
    (
        "unstructured zeros need special hardware or kernels to be faster",
        "the notes",
        "see the table of times: dense kernels gain nothing; kernels for zeros are cited, not run",
    ),
    (
        "magnitudes are consistent across many hyperparameters and large models",
        "the notes",
        "not testable here: one recipe a net",
    ),
    (
        "a budgeted dense training makes later pruning no worse (BIMP)",
        "Zimmer et al. 2023",
        "not measured: the dense nets were trained once, to the end of their schedule",
    ),
    (
        "the orders on 7-billion decoders (SliceGPT, SVD-LLM, OBC)",
        "the notes",
        "not testable here: no weights of that size",
    ),
)


def table(good: Sequence[Row]) -> str:
    """Markdown: a row a claim."""
    ranges = ranges_of(good)
    lines = ["| claim | source | here | figures |", "| --- | --- | --- | --- |"]
    for claim in CLAIMS:
        verdict, figures = judged(claim, good, ranges)
        lines.append(f"| {claim.text} | {claim.source} | {verdict} | {figures} |")
    lines += [f"| {text} | {source} | {how} | |" for text, source, how in NOT_TESTABLE]
    return "\n".join(lines)


def ranges_of(good: Iterable[Row]) -> dict[str, float]:
    """How far a task can fall: the median loss of a random choice at the highest ratios."""
    losses: dict[str, list[float]] = defaultdict(list)
    for row in good:
        if of("criteria", "random", False)(row) and row["removed"] >= 0.8:
            losses[row["task"]].append(row["lost"])
    return {task: max(median(found), 1e-9) for task, found in losses.items()}


def judged(claim: Claim, good: Sequence[Row], ranges: Mapping[str, float]) -> tuple[str, str]:
    """The verdict, and the figures that it rests on."""
    first = losses(claim, good, claim.first)
    second = losses(claim, good, claim.second) if claim.second else dict.fromkeys(first, 0.0)
    pairs = [p for p in sorted(first.keys() & second.keys()) if p[0] in ranges]
    if not pairs:
        return "not measured yet", ""
    # positive: the second loses more, as a share of what the task can lose
    gains = {p: (second[p] - first[p]) / ranges[p[0]] for p in pairs}
    better = mean(gain > 0 for gain in gains.values())
    level = mean(gain > -ALIKE for gain in gains.values())
    by_task = [mean(g for p, g in gains.items() if p[0] == task) for task in {p[0] for p in pairs}]
    tasks = f"{sum(gain > 0 for gain in by_task)} of {len(by_task)} tasks"
    wins = level if claim.matches else better
    if len(pairs) < PAIRS or len({(task, seed) for task, seed, _ in pairs}) < NETS:
        verdict = "too few yet"
    elif wins >= SHARE and (claim.matches or mean(by_task) > 0):
        verdict = "confirmed"
    elif 1 - wins >= SHARE and mean(by_task) < 0:
        verdict = "**not confirmed**, the reverse"
    else:
        verdict = "not confirmed, mixed"
    as_good = f"as good in {level:.0%} and " if claim.matches else ""
    figures = (
        f"{as_good}better in {better:.0%} of {len(pairs)} pairs and on {tasks}; "
        f"{mean(by_task):+.1%} of what a task can lose"
    )
    return verdict, figures


def losses(claim: Claim, good: Iterable[Row], picks: Picks) -> dict[Point, float]:
    return {
        (row["task"], row["seed"], row["removed"]): row["lost"]
        for row in good
        if picks(row) and "lost" in row and (not claim.ratios or row["removed"] in claim.ratios)
    }
