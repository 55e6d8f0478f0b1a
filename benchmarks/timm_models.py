"""Do timm's own functions work on smaller models of timm as they do on the dense ones?

Each architecture is shrunk with random weights; what its attributes say is compared with what its
forward returns. The table goes to docs/timm.md.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import measure
import torch
from measure import HERE, Row
from rich.progress import track

import depcut

sys.path.insert(0, str(HERE.parent / "tests"))

import zoo

MODELS = """
    resnet18 mobilenetv3_small_050 efficientnet_lite0 convnext_atto vit_tiny_patch16_224
    regnety_002 densenet121 vgg11 mixer_s32_224 edgenext_xx_small swin_tiny_patch4_window7_224
    xcit_nano_12_p16_224 lcnet_050 deit_tiny_distilled_patch16_224 levit_128s ghostnet_100
    mobilenetv4_conv_small repvgg_a0 starnet_s1 mobilevit_xxs resnest14d hgnetv2_b0 pvt_v2_b0
    poolformer_s12 cait_xxs24_224 efficientvit_b0 convnextv2_atto rexnet_100 mobileone_s0
    hrnet_w18_small gmlp_ti16_224 resmlp_12_224 skresnet18 visformer_tiny pit_ti_224
    inception_next_atto tinynet_e cspdarknet53 res2net50_26w_4s dla34 tiny_vit_5m_224 davit_tiny
    fastvit_t8 repvit_m0_9 nfnet_l0 twins_svt_small maxvit_rmlp_pico_rw_256
    swinv2_tiny_window8_256 crossvit_9_240 inception_v3
""".split()
PAGE = HERE.parent / "docs" / "timm.md"
CHECKS: dict[str, Callable[[Case], Any]] = {}


class Case:
    """One architecture, dense and smaller."""

    def __init__(self, name: str, ratio: float) -> None:
        self.timm, self.name, self.ratio = zoo.libraries()["timm"], name, ratio
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.dense = self.timm.create_model(name, pretrained=False).eval()
        self.config = self.timm.data.resolve_model_data_config(self.dense)
        self.x = torch.randn(2, *self.config["input_size"], generator=zoo.generator())
        self.slim = depcut.shrink(self.dense, ratio, self.x)


def check(function: Callable[[Case], Any]) -> Callable[[Case], Any]:
    """Register a check: it raises `WrongError`, or what the library raises, where it fails."""
    CHECKS[function.__name__] = function
    return function


class WrongError(Exception):
    """What an attribute says is not what the model does."""


def equal(told: Any, done: Any) -> None:
    if told != done:
        raise WrongError(f"{told} told, {done} returned")


@check
def num_features(case: Case) -> None:
    """Also `head_hidden_size`, where the dense model's are right."""
    dense, slim = widths(case.dense, case.x), widths(case.slim, case.x)
    for attribute, old, new in zip(("num_features", "head_hidden_size"), dense, slim, strict=False):
        told = getattr(case.dense, attribute, None)
        if told in old:
            equal(getattr(case.slim, attribute), new[old.index(told)])


def widths(model: Any, x: torch.Tensor) -> list[list[int]]:
    features = model.forward_features(x)
    if not isinstance(features, torch.Tensor):
        return [[sum(f.shape[-1] for f in features)]]
    try:
        return [list(features.shape), list(model.forward_head(features, pre_logits=True).shape)]
    except TypeError:  # a head that knows no pre_logits
        return [list(features.shape)]


@check
def feature_info(case: Case) -> None:
    dense, slim = returned(case.dense, case.x), returned(case.slim, case.x)
    told = {d["module"]: d["num_chs"] for d in case.slim.feature_info}
    for entry in case.dense.feature_info:
        old, new = (seen.get(entry["module"]) for seen in (dense, slim))
        if old is not None and entry["num_chs"] in old:
            at = [i for i, size in enumerate(old) if size == entry["num_chs"]]
            changed = [new[i] for i in at if new[i] != old[i]]
            equal(told[entry["module"]], changed[0] if changed else entry["num_chs"])
    if hasattr(case.slim, "forward_intermediates"):
        maps = case.slim.forward_intermediates(case.x, intermediates_only=True)
        wide = case.dense.forward_intermediates(case.x, intermediates_only=True)
        right = [m.shape[1] == t["num_chs"] for m, t in zip(wide, case.dense.feature_info)]  # noqa: B905
        for fits, m, t in zip(right, maps, case.slim.feature_info):  # noqa: B905
            if fits:
                equal(t["num_chs"], m.shape[1])


def returned(model: Any, x: torch.Tensor) -> dict[str, list[int]]:
    """Shapes of what the modules named in `feature_info` return."""
    seen: dict[str, list[int]] = {}
    handles = []
    for entry in model.feature_info:
        name = entry["module"]
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue

        def note(_: Any, __: Any, out: Any, name: str = name) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor):
                seen[name] = list(out.shape)

        handles.append(module.register_forward_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@check
def reset_classifier(case: Case) -> None:
    for classes in (10, 0):
        dense, slim = copy.deepcopy(case.dense), copy.deepcopy(case.slim)
        dense.reset_classifier(classes)
        slim.reset_classifier(classes)
        old, new = shapes(dense(case.x)), shapes(slim(case.x))
        if classes:
            equal(old, new)
        elif old == [(2, case.dense.head_hidden_size)]:
            equal([(2, case.slim.head_hidden_size)], new)


def shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in (result if isinstance(result, tuple | list) else [result])]


@check
def features_only(case: Case) -> None:
    """Features of a model made for them, and of the slim classifier wrapped afterwards."""
    try:
        with torch.random.fork_rng():
            dense = case.timm.create_model(case.name, pretrained=False, features_only=True).eval()
    except RuntimeError as error:
        raise MissingError from error
    slim = depcut.shrink(dense, case.ratio, case.x)
    equal(slim.feature_info.channels(), [channels(m, n) for m, n in told(slim, case.x)])
    equal(dense.feature_info.channels(), slim.feature_info.channels())
    indices = dense.feature_info.out_indices
    try:
        type(dense)(copy.deepcopy(case.dense), out_indices=indices)
    except Exception:  # noqa: BLE001  (timm itself wraps it with other arguments)
        return
    wrapped = type(dense)(copy.deepcopy(case.slim), out_indices=indices)
    equal(wrapped.feature_info.channels(), [channels(m, n) for m, n in told(wrapped, case.x)])


class MissingError(Exception):
    """The library does not have it for this architecture."""


def told(model: Any, x: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    return list(zip(model(x), model.feature_info.channels(), strict=True))


def channels(features: torch.Tensor, wanted: int) -> int:
    """The channels of features that come first or last."""
    return wanted if wanted in (features.shape[1], features.shape[-1]) else features.shape[1]


@check
def transforms(case: Case) -> None:
    equal(case.timm.data.resolve_model_data_config(case.slim), case.config)
    equal(case.slim.pretrained_cfg, case.dense.pretrained_cfg)


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    names = [n for n in MODELS if any(fnmatchcase(n, p) for p in options.only)]
    console = measure.console()
    rows = []
    for name in track(names, console=console):
        rows.append(attempt(name, options.ratio))
        wrong = {k: v for k, v in rows[-1].items() if k in (*CHECKS, "error") and v not in GOOD}
        write_page(rows[-1])
        console.print(f"{name} {rows[-1].get('seconds', 0):.0f} s {wrong or ''}", highlight=False)
    console.print(measure.table("timm", COLUMNS, rows))
    return int(any(r.get(c) not in GOOD for r in rows for c in CHECKS))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="globs over models whose rows are made anew"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    return parser.parse_args()


GOOD = ("yes", "timm has none")


def attempt(name: str, ratio: float) -> Row:
    """The row of one model; a failure becomes a row, too."""
    row: Row = {"name": name}
    with quiet():
        try:
            seconds, case = measure.timed(lambda: Case(name, ratio))
            row |= {"seconds": seconds}
            report = depcut.report(case.slim)
            row |= {"macs_kept": report.macs[1] / report.macs[0], "notes": list(report.notes)}
        except Exception as error:  # noqa: BLE001  (whatever a model does, the others still run)
            return {**row, "error": measure.first_line(error)}
        for title, function in CHECKS.items():
            try:
                function(case)
                row[title] = "yes"
            except MissingError:  # noqa: PERF203
                row[title] = GOOD[1]
            except Exception as error:  # noqa: BLE001
                row[title] = measure.first_line(error)
    return row


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def column(title: str) -> Callable[[Row], str]:
    return lambda row: row.get(title, row.get("error", "")).replace("|", "/")


COLUMNS = {
    "model": lambda r: r["name"],
    **{title: column(title) for title in CHECKS},
    "MACs kept": lambda r: f"{r['macs_kept']:.1%}" if "macs_kept" in r else "",
}


def write_page(row: Row) -> None:
    """Put a row into the table of docs/timm.md, in place of an older one of its model."""
    text = PAGE.read_text()
    before, table, after = re.split(
        r"(?<=<!-- table -->\n)(.*?)(?=<!-- /table -->)", text, flags=re.S
    )
    lines = {line.split()[1]: line for line in table.splitlines()[2:] if line}
    lines[row["name"]] = line_of(cell(row) for cell in COLUMNS.values())
    made = [lines[name] for name in MODELS if name in lines]
    head = [line_of(COLUMNS), line_of("---" for _ in COLUMNS)]
    PAGE.write_text(before + "\n".join([*head, *made, ""]) + after)


def line_of(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
