"""The short tables of README.md: of each benchmark the numbers that answer its question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev

import retrain_summary as retrain
from accuracy_summary import BEST, losses, with_best
from measure import Row, geometric_mean

FAMILIES = {"tv": "torchvision", "timm": "timm", "hf": "transformers"}
TASKS = ("digits_resnet", "digits_vit", "char_gpt", "char_lstm")
ABSENT = "-"  # not measured, or no result


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (head, *rows))
    return "\n".join([first, rule, *others])


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and standard deviation; one value is marked as such."""
    values = list(values)
    if not values:
        return ABSENT
    text = f"{mean(values):.{digits}f}"
    return f"{text}±{stdev(values):.{digits}f}" if len(values) > 1 else f"{text} (1)"


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Members by the library that they come from."""
    every = {label: [r for r in rows if _family(r) == key] for key, label in FAMILIES.items()}
    return {label: own for label, own in every.items() if own}


def _family(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def middle(values: Iterable[float], digits: int) -> str:
    """Median and maximum."""
    values = list(values)
    return f"{median(values):.{digits}f} / {max(values):.{digits}f}"


def milliseconds(row: Row, *stages: str) -> list[str]:
    return [f"{1e3 * row[f'{stage}_s']:.1f}" for stage in stages]


def zoo(rows: Sequence[Row], _: Row) -> str:
    made = []
    for label, members in families(rows).items():
        own = [r for r in members if "error" not in r]
        made.append(
            [
                label,
                f"{len(own)}/{len(members)}",
                str(sum(abs(r["macs_kept"] - 0.5) <= 0.01 for r in own)),
                str(sum(not r["other_types"] for r in own)),
                middle((r["capture_s"] for r in own), 2),
                middle((r["analysis_ms"] for r in own), 1),
                middle((r["plan_s"] + r["apply_s"] for r in own), 2),
            ]
        )
    head = "from,shrunk,halved,own classes,capture s,analysis ms,plan to verified s"
    return lines(head.split(","), made)


def speed(rows: Sequence[Row], _: Row) -> str:
    good = [r for r in rows if "error" not in r]
    outcomes = list(dict.fromkeys(r["peer"] for r in good))
    made = []
    for outcome in sorted(outcomes, key=lambda o: -sum(r["peer"] == o for r in good)):
        own = [r for r in good if r["peer"] == outcome]
        timed = [r for r in own if "ratio" in r]
        made.append(
            [
                outcome,
                str(len(own)),
                f"{median(r['after_capture_s'] for r in own):.3f}",
                f"{median(r['peer_s'] for r in timed):.3f}" if timed else ABSENT,
                f"{geometric_mean(r['ratio'] for r in timed):.2f}" if timed else ABSENT,
                f"{max(r['ratio'] for r in timed):.2f}" if timed else ABSENT,
            ]
        )
    head = "Torch-Pruning,members,depcut s,Torch-Pruning s,ratio,largest ratio"
    return lines(head.split(","), made)


def scaling(rows: Sequence[Row], _: Row) -> str:
    deep = [
        [str(r["blocks"]), *milliseconds(r, "capture", "infer", "plan", "apply", "after_capture")]
        for r in rows
        if "blocks" in r
    ]
    wide = [
        [
            str(r["width"]),
            f"{r['params'] / 1e6:.1f}",
            *milliseconds(r, "capture", "analysis_plan_random", "analysis_plan_magnitude"),
        ]
        for r in rows
        if "width" in r
    ]
    head = "blocks,capture ms,inference,plan,rewrite + verify,after capture"
    other = "width,M parameters,capture ms,analysis + random plan,analysis + magnitude plan"
    return lines(head.split(","), deep) + "\n\n" + lines(other.split(","), wide)


def latency(rows: Sequence[Row], facts: Row) -> str:
    made = []
    for name in dict.fromkeys(r["name"] for r in rows):
        own = {r["candidate"]: r for r in rows if r["name"] == name and "candidate" in r}
        known = {k.removeprefix(f"{name}: "): v for k, v in facts.items() if k.startswith(name)}
        kinds = ("unaligned", "aligned", "Torch-Pruning", "Torch-Pruning round_to=8", "latency")
        off = max(map(abs, known["of='latency' off its target"].values()))
        kept = [known[f"{k}"] for k in KEPT]
        made.append(
            [
                name,
                f"{own['dense']['ms']:.1f}",
                *(_speedup(own.get(f"{kind}, 50% removed", {})) for kind in kinds),
                f"{off:.1%}",
                f"{known['largest of these']:.1%}",
                f"{known['seconds to make the model of time']:.0f}",
                " / ".join(f"{k:.3f}" for k in kept),
            ]
        )
    head = (
        "model,dense ms,align=1,align=8,Torch-Pruning,its round_to=8,of latency,off its target,"
        "prediction off,model made in s,score kept"
    )
    return lines(head.split(","), made)


KEPT = ("at half of the time, score kept by of='latency'", "and by of='macs' at equal time")


def _speedup(row: Row) -> str:
    if "speedup" not in row:
        return "fails" if "error" in row else ABSENT
    return f"{row['speedup']:.2f}"


def export(rows: Sequence[Row], _: Row) -> str:
    made = []
    for label, members in families(rows).items():
        own = [r for r in members if "error" not in r]
        worst = max(own, key=lambda r: r["error_largest"])
        made.append(
            [
                label,
                f"{len(own)}/{len(members)}",
                f"{worst['error_largest']:.1e} ({worst['name'].partition('/')[2]})",
                f"{median(r['params_kept'] for r in own):.3f}",
                f"{median(r['file_kept'] for r in own):.3f}",
                str(sum(abs(r["file_kept"] - r["tensors_kept"]) <= 0.02 for r in own)),
            ]
        )
    head = "from,exported,largest relative error,parameters kept,file kept,within 0.02"
    return lines(head.split(","), made)


AT_HALF = (
    *("random", "l1", "magnitude", "wanda", "taylor", "obs"),
    *("random+compensate", "magnitude+compensate", "default", "default, align=8", BEST),
)
AT_FIFTH = ("magnitude", "magnitude+compensate", "default", BEST)


def accuracy(rows: Sequence[Row], _: Row) -> str:
    rows = with_best(rows)
    made = []
    for removed, methods in ((0.5, AT_HALF), (0.8, AT_FIFTH)):
        for method in methods:
            cells = (spread(losses(rows, n, method, removed).values(), 2) for n in TASKS)
            made.append([f"{removed:.0%} {method}", *cells])
    return lines(["removed", *TASKS], made)


def retraining(rows: Sequence[Row], _: Row) -> str:
    names = list(retrain.DIGITS)
    finds = {name: retrain.found(rows, name) for name in names}
    ratios = sorted({r for find in finds.values() for _, _, r, _ in find})
    places = [(name, ratio) for name in names for ratio in ratios]

    def cells(values: Iterable[Mapping[int, float]]) -> list[str]:
        pairs = zip(places, values, strict=True)
        return [spread(v.values(), retrain.DIGITS[name]) for (name, _), v in pairs]

    def at(part: str, method: str) -> list[str]:
        """At the common budget, or where there is only one, at that."""
        return cells(
            finds[name].get((part, method, ratio, retrain.AT))
            or retrain.whole(finds[name], part, method, ratio)
            for name, ratio in places
        )

    made = [[method, *at("schedules", method)] for method in retrain.OF_SCHEDULES]
    parts = ("rewinding", "iterative", "gradual", "scratch", "lottery")
    for part in parts:
        methods = dict.fromkeys(m for find in finds.values() for p, m, _, _ in find if p == part)
        shown = [m for m in methods if m != retrain.ONE_SHOT]
        made += [[m, *at(part, m)] for m in shown]
    for by in retrain.BY:
        values = (retrain.rival(finds[name], name, ratio, by)[1] for name, ratio in places)
        made.append([f"{retrain.BEST}, {by}", *cells(values)])
    return lines(["", *(f"{name.partition('_')[0]} {r:.0%}" for name, r in places)], made)


def gradual(rows: Sequence[Row], _: Row) -> str:
    made = [
        [
            r["name"],
            *milliseconds(r, "dense", "masked", "choice"),
            f"{r['ratio']:.3f}",
            f"{r['amortized']:.3f}",
        ]
        for r in rows
    ]
    head = "model,step ms,with masks,a choice ms,paired ratio,with a choice every 100 steps"
    return lines(head.split(","), made)


DEPTH = (
    "analyze",
    "plan, obs",
    "plan, synflow",
    "plan_depth",
    "apply",
    "compensate",
    "compact",
    "gradual",
    "iterate",
    "distillation",
    "export",
)


def depth(rows: Sequence[Row], _: Row) -> str:
    seconds = {(r["name"], r["net"]): (r["50"], r["100"]) for r in rows if "100" in r}
    nets = list(dict.fromkeys(net for _, net in seconds))
    shown = []
    for name in DEPTH:
        pairs = [seconds.get((name, net)) for net in nets]
        shown.append([name, *(f"{p[0]:.2f}/{p[1]:.2f}" if p else "" for p in pairs)])
    return lines(["", *nets], shown)


SECTIONS = {
    "zoo": zoo,
    "speed": speed,
    "scaling": scaling,
    "latency": latency,
    "export": export,
    "accuracy": accuracy,
    "retrain": retraining,
    "gradual_cost": gradual,
    "depth": depth,
}
