"""Tables and statements of the retraining benchmark, made from the rows of results/retrain.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from accuracy_summary import PEER, spread
from accuracy_tasks import TASKS
from measure import Row
from rich.console import Console
from rich.table import Table

DIGITS = {"digits_resnet": 2, "char_gpt": 3}
# differences that mean nothing: one test image of 449; a two-hundredth of a nat
TOLERANCE = {"digits_resnet": 100 / 449 + 1e-3, "char_gpt": 0.005}
FT, FT_SHARE, AUTO = "ft", "ft/100", "auto"
# ft/100: constant at a hundredth of the peak, the end of a schedule with two drops by ten;
# auto: what `retrain` does of itself, ALLR by the distance of the outputs where it is less
BY = ("llr", AUTO, FT_SHARE)
DEFAULT, LOW, OWN = (f"default, {by}" for by in ("llr", FT_SHARE, AUTO))
SCHEDULES = (FT, FT_SHARE, "lrw", "slr", "clr", "llr", "allr")
OF_SCHEDULES = ("none", *SCHEDULES, "default, none", DEFAULT, OWN, LOW)
ONE_SHOT, GRADUAL, REWOUND = "one shot", "gradual", "weight rewinding"
BEST = f"{PEER}, better of two"
AT = 0.1  # the budget at which Torch-Pruning is compared
LARGER = (0.1, 0.25)  # budgets of which the paper's claim is made

Find = Mapping[tuple[str, str, float, float], dict[int, float]]


def found(rows: Iterable[Row], name: str) -> Find:
    """The metric by (part, method, removed, budget), then by seed."""
    out: dict[tuple[str, str, float, float], dict[int, float]] = {}
    for r in rows:
        if r["name"] == name and "error" not in r:
            point = r["part"], r["method"], r["removed"], r["budget"]
            out.setdefault(point, {})[r["seed"]] = r["metric"]
    return out


def budgets(find: Find, part: str, method: str) -> list[float]:
    return sorted({b for p, m, _, b in find if (p, m) == (part, method)})


def whole(find: Find, part: str, method: str, removed: float) -> dict[int, float]:
    """A method that has one budget for each ratio."""
    chosen = [v for (p, m, r, _), v in find.items() if (p, m, r) == (part, method, removed)]
    return chosen[0] if chosen else {}


def gains(name: str, a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """How much better a is than b, for every seed that both have."""
    sign = 1 if TASKS[name].higher_is_better else -1
    return [sign * (a[s] - b[s]) for s in sorted(set(a) & set(b))]


def rival(find: Find, name: str, removed: float, by: str = "llr") -> tuple[str, dict[int, float]]:
    """Of the variants retrained by a schedule, the one that ends better, by the mean."""
    every = {
        m.removesuffix(f", {by}"): v
        for (p, m, r, _), v in find.items()
        if (p, r) == ("rival", removed) and (m.rpartition(", ")[2] if ", " in m else "llr") == by
    }
    return _better(every, name)


def own(find: Find, name: str, removed: float) -> tuple[str, dict[int, float]]:
    """The default, by the schedule that ends best."""
    every = {m: find.get(("schedules", m, removed, AT), {}) for m in (DEFAULT, OWN, LOW)}
    return _better({m: v for m, v in every.items() if v}, name)


def rivals_best(find: Find, name: str, removed: float) -> tuple[str, dict[int, float]]:
    """The rival, by the variant and the schedule that end best."""
    every = {}
    for by in BY:
        variant, values = rival(find, name, removed, by)
        if values:
            every[f"{variant}, {by}"] = values
    return _better(every, name)


def _better(every: Mapping[str, dict[int, float]], name: str) -> tuple[str, dict[int, float]]:
    if not every:
        return "", {}
    sign = 1 if TASKS[name].higher_is_better else -1
    best = max(every, key=lambda m: sign * mean(every[m].values()))
    return best, every[best]


def comparisons(find: Find, name: str) -> dict[str, list[tuple[str, list[float]]]]:
    """What is compared, at each place the gain of the first over the second by seed."""
    ratios = sorted({r for _, _, r, _ in find})
    of = "schedules"
    cycles = next((m for p, m, _, _ in find if m.startswith("iterative")), "iterative")
    pairs = {
        "weight rewinding over ft": (("rewinding", REWOUND), (of, FT)),
        "weight rewinding over ft/100": (("rewinding", REWOUND), (of, FT_SHARE)),
        "weight rewinding over lrw": (("rewinding", REWOUND), (of, "lrw")),
        "iterative over one shot": (("iterative", cycles), ("iterative", ONE_SHOT)),
        "gradual over iterative": ((GRADUAL, GRADUAL), ("iterative", cycles)),
        "default, llr over magnitude, llr": ((of, DEFAULT), (of, "llr")),
        "default, ft/100 over default, llr": ((of, LOW), (of, DEFAULT)),
        "default, auto over default, llr": ((of, OWN), (of, DEFAULT)),
        "default, auto over magnitude, allr": ((of, OWN), (of, "allr")),
    }
    out = {
        what: [
            (f"{r:.0%} removed, {b:.1%} of T", gains(name, find[(*a, r, b)], find[(*z, r, b)]))
            for r in ratios
            for b in budgets(find, *a)
            if (*a, r, b) in find and (*z, r, b) in find
        ]
        for what, (a, z) in pairs.items()
    }
    longest = max(budgets(find, of, "llr"), default=0.0)
    singles = {
        f"pruned + llr at {longest:.0%} of T over scratch-{c}": (
            [find.get((of, "llr", r, longest), {}) for r in ratios],
            [whole(find, "scratch", f"scratch-{c}", r) for r in ratios],
        )
        for c in "EB"
    }
    for ticket in ("ticket of step 0", "early ticket"):
        singles[f"{ticket} over random reinit (scratch-E)"] = (
            [whole(find, "lottery", ticket, r) for r in ratios],
            [whole(find, "scratch", "scratch-E", r) for r in ratios],
        )
    for control in ("lrw", FT_SHARE):
        singles[f"early ticket over trained weights, {control}, equal steps"] = (
            [whole(find, "lottery", "early ticket", r) for r in ratios],
            [whole(find, "long", control, r) for r in ratios],
        )
    for by in BY:
        singles[f"default over {BEST}, both {by} at {AT:.0%} of T"] = (
            [find.get((of, f"default, {by}", r, AT), {}) for r in ratios],
            [rival(find, name, r, by)[1] for r in ratios],
        )
    singles[f"default over {BEST}, each by its best schedule at {AT:.0%} of T"] = (
        [own(find, name, r)[1] for r in ratios],
        [rivals_best(find, name, r)[1] for r in ratios],
    )
    for what, (first, second) in singles.items():
        out[what] = [
            (f"{r:.0%} removed", gains(name, a, b))
            for r, a, b in zip(ratios, first, second, strict=True)
            if set(a) & set(b)
        ]
    return {what: places for what, places in out.items() if places}


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """The statements that the benchmark is there to make."""
    facts: dict[str, str] = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        find, tolerance = found(rows, name), TOLERANCE[name]
        for method in ("llr", "allr"):
            for other in (FT, FT_SHARE, "lrw", "slr", "clr"):
                places = _against(find, name, method, other)
                if places:
                    facts[f"{name}: {method} matches or beats {other}, all budgets"] = _verdict(
                        places, tolerance
                    )
        larger = _either(find, name)
        if larger:
            facts[f"{name}: llr or allr matches or beats ft at the larger budgets"] = _verdict(
                larger, tolerance
            )
        for what, places in comparisons(find, name).items():
            text = ", ".join(f"{where} {_gain(g, name)}" for where, g in places)
            facts[f"{name}: {what}"] = f"{_verdict(places, tolerance)}: {text}"
        seconds = {
            part: sum(r["seconds"] for r in rows if (r["name"], r["part"]) == (name, part))
            / len({r["seed"] for r in rows if (r["name"], r["part"]) == (name, part)})
            for part in dict.fromkeys(r["part"] for r in rows if r["name"] == name)
        }
        facts[f"{name}: minutes a seed"] = ", ".join(
            f"{part} {s / 60:.1f}" for part, s in seconds.items()
        )
        failed = [r for r in rows if r["name"] == name and "error" in r]
        if failed:
            facts[f"{name}: failed"] = "; ".join(
                f"{r['part']}, {r['method']}, {r['removed']:.0%}: {r['error']}" for r in failed
            )
    return facts


def _against(find: Find, name: str, a: str, b: str) -> list[tuple[str, list[float]]]:
    return [
        (f"{r:.0%} removed, {t:.1%} of T", gains(name, find["schedules", a, r, t], values))
        for (part, method, r, t), values in sorted(find.items())
        if (part, method) == ("schedules", b) and ("schedules", a, r, t) in find
    ]


def _either(find: Find, name: str) -> list[tuple[str, list[float]]]:
    """The better of LLR and ALLR against FT, where the paper claims something."""
    best: dict[str, list[float]] = {}
    for method in ("llr", "allr"):
        for where, g in _against(find, name, method, FT):
            if g and (where not in best or mean(g) > mean(best[where])):
                best[where] = g
    return [(w, g) for w, g in best.items() if any(w.endswith(f" {b:.1%} of T") for b in LARGER)]


def _verdict(places: Sequence[tuple[str, list[float]]], tolerance: float) -> str:
    """At how many places the mean gain is no loss, and where it is one."""
    good = [where for where, g in places if g and mean(g) >= -tolerance]
    beaten = sum(bool(g) and mean(g) > tolerance for _, g in places)
    less = [where for where, g in places if g and mean(g) < -tolerance]
    text = f"{len(good)} of {len(places)} (better at {beaten})"
    return f"{text}; worse at {'; '.join(less)}" if less else text


def _gain(values: Sequence[float], name: str) -> str:
    digits = DIGITS[name]
    text = f"{mean(values):+.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def tables(rows: Sequence[Row], name: str) -> dict[str, list[list[str]]]:
    """Title, header and lines: the schedules, shared budgets, whole trainings, the rival."""
    find, digits = found(rows, name), DIGITS[name]
    ratios = sorted({r for _, _, r, _ in find})
    shared = sorted({b for p, _, _, b in find if p == "schedules" and b})
    head = ["method", *(f"{r:.0%} removed, {b:.1%} of T" for r in ratios for b in shared)]

    def cell(values: Mapping[int, float]) -> str:
        return spread(list(values.values()), digits)

    def line(part: str, method: str, label: str = "") -> list[str]:
        # what is not retrained is the same at every budget
        cells = (
            find.get((part, method, r, b)) or find.get((part, method, r, 0.0), {})
            for r in ratios
            for b in shared
        )
        return [label or method, *map(cell, cells)]

    made = {"schedules": [head, *(line("schedules", m) for m in OF_SCHEDULES)]}
    mixed = [
        line(part, method)
        for part in ("rewinding", "iterative", GRADUAL)
        for method in dict.fromkeys(m for p, m, _, _ in find if p == part)
    ]
    made["rewinding, cycles, gradual masks (schedules above: one shot)"] = [head, *mixed]
    short = ["method", *(f"{r:.0%} removed" for r in ratios)]
    lines = [
        [f"{method} ({part})", *(cell(whole(find, part, method, r)) for r in ratios)]
        for part in ("scratch", "lottery", "long")
        for method in dict.fromkeys(m for p, m, _, _ in find if p == part)
    ]
    made["trained as long as the dense net, or longer"] = [short, *lines]
    theirs = {by: [rival(find, name, r, by) for r in ratios] for by in BY}
    lines = []
    for by, best in theirs.items():
        values = (find.get(("schedules", f"default, {by}", r, AT), {}) for r in ratios)
        lines.append([f"default, {by}", *map(cell, values)])
        lines.append([f"{BEST}, {by}", *(cell(values) for _, values in best)])
        lines.append(["which that is", *(method.removeprefix(f"{PEER} ") for method, _ in best)])
    if any(values for best in theirs.values() for _, values in best):
        made[f"beside {PEER}, {AT:.0%} of T"] = [short, *lines]
    return {title: cells for title, cells in made.items() if len(cells) > 1}


def _dense(rows: Sequence[Row], name: str) -> str:
    values = {r["seed"]: r["dense"] for r in rows if r["name"] == name and "error" not in r}
    return f"{TASKS[name].unit}; dense: {spread(list(values.values()), DIGITS[name])}"


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(r["name"] for r in rows):
        for title, (header, *lines) in tables(rows, name).items():
            table = Table(title=f"{name}: {title} ({_dense(rows, name)})")
            for i, column in enumerate(header):
                table.add_column(column, justify="right" if i else "left", overflow="fold")
            for line in lines:
                table.add_row(*line)
            console.print(table)
    for key, value in summary(rows).items():
        console.print(f"{key}: {value}", markup=False)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables for README.md."""
    parts = []
    for name in dict.fromkeys(r["name"] for r in rows):
        parts.append(f"### {name}: {_dense(rows, name)}")
        for title, (header, *lines) in tables(rows, name).items():
            made = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
            text = "\n".join("| " + " | ".join(line) + " |" for line in made)
            parts.append(f"{title[0].upper()}{title[1:]}:\n\n{text}")
    return "\n\n".join(parts)
