"""What of the pool an argument may take; all else must be refused."""

from __future__ import annotations

_NONE = {"None"}
_FLAGS = {"True", "False"}
_COUNTS = {"1", "2", "np.int64", "np.uint8", "int tensor"}
_SEEDS = _COUNTS | {"0"}
_BIG = _COUNTS | {"10^30", "10^5000"}
_RATIOS = {"0.5", "Fraction", "np.float32"}
_NUMBERS = _RATIOS | {"1", "2", "10^30", "1.0", "1.5", "np.int64", "np.uint8"}
_GLOBS = {"list", "tuple", "set", "iterator", "empty tensor"}  # of nothing: nothing is held
_TEXTS = {"empty string", "number as string", "string", "NUL string", "surrogate", "long string"}
_PATHS = {"number as string", "string", "path"}
_CALLED = {"class", "type", "module class", "module", "lazy module", "function"}
_CALLED |= {"raising function", "builtin", "hostile"}
_SEQUENCES = {"array", "object array", "tensor", "empty tensor", "list", "tuple", "[1]", "[None]"}
_SEQUENCES |= {"['a']", "nested", "itself", "range", "meta tensor", "sparse tensor", "memoryview"}
_SEQUENCES |= {"0-d tensor", "int tensor", "0-d array", "module class"}  # judged when they are read

_TAKES: dict[str, set[str]] = {
    "inputs": _NONE,
    "data": _NONE,
    "loss": _NONE,
    "optimizer": _NONE,
    "options": _NONE,
    "valid": _NONE,
    "plan": set(),
    "dense": _NONE,
    "original": _NONE,
    "distillation": _NONE,
    "mixed_precision": _NONE,
    "accelerator": _NONE,
    "allocation": _NONE,
    "latency_ms": _NONE,
    "score": _NONE,
    "ratios": {"None", "dict"},
    "ignore": _GLOBS,
    "dropped": _GLOBS,
    "hidden": _GLOBS,
    "kept": {"dict"},
    "ratio": _RATIOS,
    "initial": {"0", "0.0"},
    "seed": _SEEDS,
    "batches": _COUNTS,
    "align": _COUNTS,
    "threads": _COUNTS,
    "patience": _BIG | _NONE,
    "every": _BIG | _NONE,
    "gradient_accumulation": _BIG,
    "rounds": set(),
    "warmup": _SEEDS,
    "provider": _NONE,
    "runtime": _NONE,
    "batch_size": _NONE,
    "batch_sizes": {"None", "[1]", "{1: 2}", "array", "bytes", "bytearray", "memoryview"},
    "pin": {"True", "False", "[1]", "{1: 2}"},
    "resume": _FLAGS,
    "progress": _FLAGS,
    "depth": _FLAGS,
    "maximize": _FLAGS,
    "memory": _FLAGS | _COUNTS | {"None", "number as string"},
    "compensate": {"True", "False"},
    "lr": _NUMBERS | _NONE,
    "max_grad_norm": _NUMBERS | {"None", "inf"},
    "aggregate": _NONE,
    "members": _NONE,
    "normalize": _NONE,
    "path": _PATHS,
    "text": _PATHS,
    "folder": {"None", "folder"} | _PATHS,
    "checkpoint": _NONE | _PATHS,
    "rtol": _NUMBERS | {"None", "0", "0.0"},
    "atol": _NUMBERS | {"None", "0", "0.0"},
    "metadata": {"None", "dict", "{'*': 'x'}"},
    "opset": _NONE,
    "distance": {"None", "0.5", "0.0", "1.0", "-0.5", "1.5", "nan", "inf"},
    "epochs": _BIG,
    "cycles": _COUNTS,
    "steps": _COUNTS,
    "step": {"0"},
    "name": set(),
    "metric": _NONE,
    "schedule": set(),
    "retrain": {"None", "function"},
    "train": {"None", "function", "type"},
    "init": {"None", "type", "function"},
    "strength": _NUMBERS,
    "increment": _NUMBERS,
    "ceiling": _NUMBERS,
    "temperature": _NUMBERS,
    "output_weight": _NUMBERS,
    "hidden_weight": _NUMBERS | {"0", "0.0"},
    "share": _RATIOS | {"0", "0.0", "1", "1.0"},
    "logits": _NONE | _CALLED,
    "dim": {"0", "1", "-1", "2", "np.int64", "np.uint8", "int tensor"},
}
# Where a function takes other things than most.
_APART: dict[str, set[str]] = {
    "Options.score": _NONE | _TEXTS | _CALLED,
    "Options.latency_ms": _NUMBERS | _NONE,
    "Options.ignore": _GLOBS | _TEXTS | {"['a']"},
    "TrainingOptions.schedule": _CALLED,
    "TrainingOptions.mixed_precision": _NONE | _TEXTS,
    "TrainingOptions.dense": {"None", "module", "lazy module"},
    "Distillation.slim": {"module"},
    "Snapshots.take.model": {"module"},
    "Snapshots.take.step": _BIG | {"0"},
    "Snapshots.steps": _GLOBS
    | {"empty string", "bytes", "bytearray", "array", "dict", "[1]"}
    | {"{1: 2}", "range", "memoryview"},
    "Options.read.path": set(),
    "OriginalSchedule.rates": _NONE | _SEQUENCES | _CALLED,
    "OriginalSchedule.length": _BIG | _NONE,
    "OriginalSchedule.peak": _NUMBERS | _NONE,
    "budget_phases.schedule": _TEXTS,
    "budget_phases.dense": _RATIOS,
    "budget_phases.epochs": {"2", "np.int64", "np.uint8", "int tensor"},
    "schedule.original": _NUMBERS,
    "schedule.steps": _COUNTS,
    "compare.memory": {"False"},
    "compare.runtime": _NONE,
    "compare.pin": {"False"},
    "Gradual.start": {"0", "1"},
    "Gradual.end": _COUNTS,
    "Gradual.every": {"1", "2"},
    "bench.runtime": set(),
    "run_phases.train": {"function"},
    "retrain.plan": _NONE,
    "retrain.lr": {"None", *_NUMBERS},
    "retrain.schedule": set(),
    "retrain.epochs": {"1", "2", "np.int64", "np.uint8", "int tensor"},
}

# Functions of the caller that train, judge or draw: what these raise is not caught.
CALLERS_OWN = {
    "retrain.loss",
    "retrain.metric",
    "retrain.schedule",
    "fresh.init",
    "lottery_ticket.init",
    "lottery_ticket.train",
    "run_phases.train",
    "iterate.retrain",
}

# They return within milliseconds whatever they are given.
QUICK = [
    *("Options", "TrainingOptions", "Analysis.plan", "Analysis.plan_keeping", "Analysis.explain"),
    *("Analysis.calibrate", "Score", "Plan.save", "Options.read", "schedule", "OriginalSchedule"),
    *("budget_phases", "scratch_epochs", "GroupLasso", "GrowingRegularization", "Snapshots.take"),
]


def taken(function: str, argument: str, label: str) -> bool:
    """Whether a call may succeed with a value of the pool in an argument's place."""
    apart = _APART.get(f"{function}.{argument}")
    return label in (apart if apart is not None else _TAKES.get(argument, set()))
