"""Does the default test set notice a fault? One is put into each rule file and each stage in turn.

    python tests/seeded_faults.py              every fault: caught, MISSED, or no longer there
    python tests/seeded_faults.py --only ops   those of one stage
    python tests/seeded_faults.py --check      only look whether every place is still there

A fault replaces one piece of text, which must occur exactly once in the modules of its stage, in a
copy of the package; the tests named with it run against that copy up to the first failure. The exit
code is 0 where every fault was caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "depcut"


@dataclass(frozen=True)
class Fault:
    """One wrong line.

    Attributes:
        stage: Folder or root module of the package.
        old: What stands there, exactly once in the stage.
        new: What is put in its place.
        tests: Arguments of pytest: files, and an expression after `-k`.
    """

    stage: str
    old: str
    new: str
    tests: str


LATER = "tests/field/test_later_calls.py -k"
FIRST = "tests/field/test_transformers_call.py"
RULES = "tests/test_rules.py -k"
TEXTS = "tests/test_synthetic_texts.py -k"
CALLS = "tests/field/test_example_calls.py"
ATTENTION = "tests/field/test_attention"
SOURCE = "tests/field/test_patched_source.py"
FAULTS = [
    # What is the same for every conversion to ONNX.
    Fault(
        "deploy",
        "_list_of(plain, translations())",
        "_list_of(plain, ())",
        "tests/test_translations.py -k registered_later",
    ),
    # Times of several kinds of call.
    Fault(
        "latency",
        "call.times * beside.ratio * beside.dense_seconds",
        "beside.ratio * beside.dense_seconds",
        "tests/test_workload.py -k sum_of_all",
    ),
    Fault(
        "plan",
        "starts = other.starts[1:] - behind + len(self.coefficients)",
        "starts = other.starts[1:] + len(self.coefficients)",
        "tests/test_workload.py -k a_sum_is",
    ),
    Fault(
        "integrations",
        "cache = _emptied(self._empty)",
        "cache = self._empty",
        "tests/test_workload.py -k one_more_token",
    ),
    # Captures without what nobody reads.
    Fault("capture", "or size < 2:", "or size < 0:", "tests/test_lean.py"),
    # Data that a model makes itself.
    Fault("synthetic", "_SHARE = 0.1", "_SHARE = 1.5", "tests/test_self_made.py"),
    Fault(
        "calibration",
        "last = len(items) - (len(items) > 1)",
        "last = len(items)",
        "tests/test_self_made.py",
    ),
    Fault(
        "shrinking",
        "if not near <= far:\n            plan",
        "if near <= far:\n            plan",
        "tests/test_self_made.py",
    ),
    # Budgets and frontiers.
    Fault(
        "allocate",
        "far = np.abs(errors) > NEAR * self.target",
        "far = np.abs(errors) > self.target",
        "tests/test_budgets.py",
    ),
    Fault(
        "frontiers",
        "data = self.calibration if data is None else data",
        "pass",
        "tests/test_frontier.py",
    ),
    # Inputs made for floating-point data.
    Fault(
        "synthetic",
        " + ((var + eps).sqrt() / scale - 1) ** 2",
        "",
        "tests/test_synthetic_vision.py -k reached",
    ),
    Fault(
        "synthetic",
        "RATE * work.scales[p][1]",
        "RATE",
        "tests/test_synthetic_vision.py -k reached",
    ),
    Fault(
        "synthetic",
        "int(min(examples, affordable / steps))",
        "examples",
        "tests/test_synthetic_vision.py -k fewer",
    ),
    Fault(
        "synthetic",
        "min((1, len(shape) - 1), key=lambda d: shape[d])",
        "1",
        "tests/test_synthetic_vision.py -k spatial",
    ),
    Fault(
        "synthetic",
        "own, other = solved.read - mean, tried.read - mean",
        "own = other = solved.read - mean",
        "tests/test_synthetic_vision.py -k tell",
    ),
    Fault(
        "synthetic",
        "% classes",
        "% 1",
        "tests/test_synthetic_vision.py -k sure",
    ),
    # Branches and widths in one problem; massive activations.
    Fault(
        "allocate",
        "lost -= width_loss(self.chooser, plan, saved.own_groups(names))",
        "pass",
        "tests/test_branch_losses.py -k counts",
    ),
    Fault(
        "allocate",
        "return lost + width_loss(self.chooser, plan)",
        "return width_loss(self.chooser, plan)",
        "tests/test_branch_losses.py -k least",
    ),
    Fault(
        "calibration",
        "same = same - same.mean(means, keepdim=True) if means else torch.zeros_like(same)",
        "pass",
        "tests/test_branch_losses.py -k bias",
    ),
    Fault(
        "latency",
        "absent = np.array(sorted(narrowed.absent), dtype=np.int64)",
        "absent = np.array([], dtype=np.int64)",
        "tests/test_branch_losses.py -k time",
    ),
    Fault(
        "calibration",
        "found = torch.minimum(squares, most).mean(1)",
        "break",
        "tests/test_massive.py",
    ),
    # Fewer passes.
    Fault("calibration", "entry -= pair.lacking", "pass", "tests/test_windows.py"),
    Fault(
        "calibration",
        "across - across.mean(2, keepdim=True) - lost + lost.mean(2, keepdim=True)",
        "across - across.mean(2, keepdim=True)",
        "tests/test_moments.py -k misses",
    ),
    Fault(
        "scores",
        "scale = (energy * damping)[:, None].cpu()",
        "scale = energy[:, None].cpu()",
        "tests/test_reconstruction.py -k single",
    ),
    Fault(
        "streaming",
        "inside = None if first is None else first[(first >= start) & (first < end)] - start",
        "inside = None if first is None else first[(first >= start) & (first < end)]",
        "tests/test_checkpoints.py -k blocks",
    ),
    Fault(
        "streaming",
        "(take(stored, kept).double() + constants)",
        "take(stored, kept).double()",
        "tests/test_checkpoints_biases.py -m sweep -k folded",
    ),
    Fault(
        "calibration",
        "for number in reversed(range(self.left)):",
        "for number in reversed(range(len(self.cuts) + 1)):",
        "tests/test_checkpoints_resumed.py -k behind",
    ),
    Fault(
        "calibration",
        "half = torch.addmm(self.ex, matrix, self.xx, alpha=-0.5)",
        "half = torch.addmm(self.ex, matrix, self.xx, alpha=-1)",
        "tests/test_gaps.py",
    ),
    Fault(
        "repair",
        "gap[..., self.kept] -= narrow",
        "gap[..., self.kept] = 0",
        "tests/test_compensate.py",
    ),
    Fault(
        "scores",
        "            self._losses = self._reader.losses()\n            self._put_away()",
        "            self._put_away()",
        "tests/test_reconstruction.py -k wait",
    ),
    Fault(
        "apply",
        "closed = {name_now(name, stacks) for name in generated}",
        "closed: set[str] = set()",
        "tests/test_sharding.py -k generated",
    ),
    # Texts that are made.
    Fault(
        "synthetic",
        "if not whole or leaf.ndim != 2 or _counts(leaf):",
        "if not whole or leaf.ndim != 2:",
        f"{TEXTS} positions",
    ),
    Fault(
        "synthetic",
        "changed[:, half:] = (changed[:, half:] + 1",
        "changed[:, half:] = (changed[:, half:] - tokens.size // 3",
        f"{TEXTS} tried",
    ),
    Fault(
        "synthetic",
        "draw(logits[:, known - 1], self.generator)",
        "draw(logits[:, 0], self.generator)",
        f"{TEXTS} likely",
    ),
    Fault("synthetic", "torch.where(chosen, new, ids), float(", "ids, float(", f"{TEXTS} moves"),
    Fault(
        "synthetic", "met = far >= _UNUSED * far.median()", "met = far >= 0", f"{TEXTS} left_out"
    ),
    Fault("synthetic", "if not bool(shared > _COMMON):", "if True:", f"{TEXTS} rarer"),
    Fault(
        "synthetic",
        "inside = torch.arange(length) < ends[:, None]",
        "inside = torch.arange(length) <= ends[:, None]",
        f"{TEXTS} padded",
    ),
    # Later calls.
    Fault("coupling", "for leaf in tables - read:", "for leaf in ():", f"{LATER} rows"),
    Fault(
        "rewrite",
        "if any((file, line) in ran for ran in self.ran for line in lines):",
        "if True:",
        f"{LATER} branch",
    ),
    Fault("rewrite", "if truth != made.truth:", "if False:", f"{LATER} Asserting"),
    Fault(
        "graph",
        "if target is torch.ops.aten.view.default else target",
        "if False else target",
        f"{LATER} OtherLayout",
    ),
    Fault(
        "rebuild",
        "settle(slim.model, values)",
        "settle(slim.model, {})",
        "tests/field/test_rebuildable.py",
    ),
    Fault(
        "rebuild",
        "kept = tuple(i for i in range(stack.count) if i not in going)",
        "kept = tuple(range(stack.count - len(going)))",
        "tests/field/test_whole_layers.py -k middle",
    ),
    Fault(
        "plan",
        'return f"{holder}.{stack.kept[number]}{rest}"',
        "return name",
        "tests/field/test_whole_layers.py -k drawn",
    ),
    Fault(
        "capture",
        "uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == named[0]]",
        "uses: list[ast.Name] = []",
        "tests/field/test_shape_alone.py -k argument",
    ),
    Fault(
        "rewrite",
        'if hasattr(adapter, "finish"):',
        "if False:",
        "tests/field/test_conventions.py",
    ),
    Fault(
        "integrations",
        'for attribute, old, new in zip(("num_features", "head_hidden_size"), dense, slim):',
        "for attribute, old, new in ():",
        "tests/field/test_timm.py",
    ),
    Fault(
        "capture",
        "if i in outside]",
        "if i in ()]",
        "tests/field/test_part.py -k reaches",
    ),
    Fault(
        "verify",
        "if error <= _TOLERANCE and not why:",
        "if True:",
        "tests/field/test_part.py -k reaches",
    ),
    Fault(
        "apply",
        "problem = verify_whole(result, whole, part, calls)",
        'problem = ""',
        "tests/field/test_part.py -k reaches",
    ),
    Fault(
        "support",
        "while inner is not None:",
        "while False:",
        "tests/field/test_compiled.py",
    ),
    Fault(
        "pictures",
        "autoescape=True",
        "autoescape=False",
        "tests/test_pictures.py -k escaped",
    ),
    # The first call.
    Fault(
        "integrations",
        '"use_cache" not in taken else {"use_cache": False}',
        "True else {}",
        "tests/test_capture.py -k dummy",
    ),
    Fault(
        "capture",
        "at = str(name) if str(name) in tops else None",
        "at = str(name)",
        f"{FIRST} -k counts",
    ),
    Fault("coupling", "for n in program.counted if", "for n in program.outputs if", FIRST),
    Fault("plan", "if fixed and _is_of_one(", "if False and _is_of_one(", f"{FIRST} -k one_of"),
    # Rules of operators, a fault in each file.
    Fault("ops", "op.unify(q[-1], k[-1])", "pass", f"{RULES} sdpa"),
    Fault(
        "capture",
        "if blames or not isinstance(error, DepcutError):",
        "if False:",
        "tests/field/test_raw_exceptions.py -k wrong_inputs",
    ),
    Fault(
        "support",
        "if isinstance(error, MemoryError):",
        "if False:",
        "tests/field/test_raw_exceptions.py -k passes_through",
    ),
    Fault("ops", "op.unify(x[-1], weight[-1])", "pass", f"{RULES} linear"),
    Fault(
        "ops",
        "op.unify(channels, axes.product(groups, weight[1]))",
        "op.unify(channels, axes.product(weight[1], groups))",
        f"{RULES} conv2d",
    ),
    Fault("ops", 'op.freeze(x[i], "looked up by number")', "pass", f"{RULES} index"),
    Fault("ops", "axes.concat(tail, head)", "axes.concat(head, tail)", f"{RULES} roll"),
    Fault("ops", 'op.literals("normalized_shape", normalized)', "pass", f"{RULES} layer_norm"),
    Fault("ops", "op.unify(first, second)", "pass", f"{RULES} glu"),
    Fault(
        "ops",
        'axes.product(op.frozen(gates, "gates of a recurrent cell"), hidden)',
        'axes.product(hidden, op.frozen(gates, "gates of a recurrent cell"))',
        f"{RULES} recurrent",
    ),
    Fault(
        "ops",
        'op.freeze(op.dims("self")[dim], "positions along it are returned")',
        "pass",
        f"{RULES} argmax",
    ),
    Fault(
        "ops",
        "axes.product(axes.resolve(inner), axes.resolve(groups))",
        "axes.product(axes.resolve(groups), axes.resolve(inner))",
        f"{RULES} channel_shuffle",
    ),
    Fault("ops", "Literal(path, term, sign)", "Literal(path, term, 1)", f"{RULES} slice"),
    Fault(
        "ops",
        "torch.maximum(self.taint(given), (value != 0).float())",
        "(value != 0).float()",
        "tests/test_compact.py",
    ),
    Fault(
        "ops",
        ".maximum((table != table[0]).any(0).float())",
        "",
        "tests/test_compact.py -k column",
    ),
    Fault("ops", "op.unify(terms[label], term)", "pass", f"{RULES} einsum"),
    Fault(
        "ops",
        "return (*batch, axes.product(channels, taps), op.frozen(op.out_sizes[-1]",
        "return (*batch, axes.product(taps, channels), op.frozen(op.out_sizes[-1]",
        f"{RULES} im2col",
    ),
    # Stages, in the order of the folders.
    Fault(
        "support",
        'return "\\n".join(line.rstrip()',
        'return "".join(line.rstrip()',
        "tests/test_cli.py -k bench",
    ),
    Fault(
        "axes",
        "(out[:, None] * factor.size + indices(factor, kept))",
        "(out[:, None] + factor.size * indices(factor, kept))",
        "tests/test_axes.py",
    ),
    Fault(
        "capture",
        "[(2, first.in_features), (2, 16, first.in_features)]",
        "[(2, 16, first.in_features)]",
        "tests/test_capture.py -k inputs",
    ),
    Fault(
        "capture",
        "if isinstance(other, torch.SymInt | torch.SymFloat):",
        "if False:",
        "tests/field/test_feasible.py -k symbolic",
    ),
    Fault(
        "coupling",
        "parent[find(parent, x)] = find(parent, y)",
        "pass",
        "tests/field/test_feasible.py -k tied",
    ),
    Fault("graph", "return [bypass[node]]", "return node.all_input_nodes", "tests/test_depth.py"),
    Fault(
        "coupling",
        'role = "consumer" if (name, i) in consumers else "producer"',
        'role = "producer"',
        "tests/test_structures.py -k both_ends",
    ),
    Fault(
        "branches",
        "(t * math.prod(d.size for d in dims) for e",
        "(t * sum(d.size for d in dims) for e",
        "tests/test_depth.py -k measured",
    ),
    Fault(
        "plan",
        "np.add.reduceat(products, self.starts, axis=1)",
        "np.maximum.reduceat(products, self.starts, axis=1)",
        "tests/test_cost.py",
    ),
    Fault(
        "reference",
        "torch.from_numpy(kept).to(tensor.device))",
        "torch.from_numpy(kept[::-1].copy()).to(tensor.device))",
        "tests/test_structures.py -k residual",
    ),
    Fault(
        "calibration",
        "spans[key] = (min(known[0], begin), max(known[1], end))",
        "spans[key] = (begin, end)",
        "tests/test_walk.py -k what_they_share",
    ),
    Fault(
        "calibration",
        "if group.is_changed(number):",
        "if False:",
        "tests/test_gradient_memory.py -k written_to",
    ),
    Fault(
        "calibration",
        "if any(start <= at < end for at in changes.get(roots[source], ())):",
        "if False:",
        "tests/test_walk.py -k written_to",
    ),
    Fault(
        "calibration",
        "+ self.count * bias.square()",
        "+ bias.square()",
        "tests/test_compensate.py -k least_squares",
    ),
    Fault(
        "scores",
        "np.cumsum(ascending[..., ::-1], axis=-1)[..., ::-1]",
        "np.cumsum(ascending, axis=-1)",
        "tests/test_criteria.py -k lamp",
    ),
    Fault(
        "allocate",
        "change < 2 * abs(excess)",
        "change < 0",
        "tests/test_budgets.py -k aligned",
    ),
    Fault(
        "rewrite",
        "(after / before.clamp_min(1e-12))",
        "(before / after.clamp_min(1e-12))",
        "tests/test_structures.py -k weight_norm",
    ),
    Fault(
        "allocate",
        "gone *= float(where.readers[number]) ** _COHERENCE",
        "pass",
        "tests/test_allocations_default.py -k goes_last",
    ),
    Fault(
        "allocate",
        "key = 1 - (1 - share) ** where.nested[number] if nested else share",
        "key = share",
        "tests/test_allocations_default.py -k channels",
    ),
    Fault(
        "verify",
        "        return not self.message and self.excess <= 1",
        "        return not self.message",
        "tests/test_verify.py -k wrong_number",
    ),
    Fault(
        "verify",
        "            result.copy_(part)",
        "            pass",
        "tests/field/test_verification.py -k compared_by_value",
    ),
    Fault(
        "verify",
        "found.message, found.module = problem, module",
        "pass",
        "tests/field/test_verification.py -k out_of_sight",
    ),
    Fault(
        "verify",
        "return self._first_difference() if self.follows else None",
        "return None",
        "tests/field/test_verification.py -k elsewhere",
    ),
    Fault(
        "verify",
        "tolerance(pair.dtype, double=double)",
        "tolerance(pair.dtype)",
        "tests/field/test_verification.py -k coarse",
    ),
    Fault(
        "repair",
        "numbers[at] = contraction.numbers[at]",
        "numbers[at] = -contraction.numbers[at]",
        "tests/test_compact.py",
    ),
    Fault(
        "repair",
        "shift = reader.outputs(torch.where(at, mean, 0.0))",
        "shift = reader.outputs(torch.where(at, 0.0, mean))",
        "tests/test_mean_correction.py",
    ),
    Fault(
        "repair",
        "if root in open_ and len(node.users) > 1:",
        "if False:",
        "tests/test_mean_correction.py -k in_place",
    ),
    # In the field.
    Fault(
        "graph",
        "arguments[node] = given",
        "pass",
        "tests/field/test_data_forms.py -k other_lengths",
    ),
    Fault(
        "calibration",
        "if _is_target(self.takes[n])}",
        "if False}",
        "tests/field/test_data_forms.py -k batch_encoding",
    ),
    Fault(
        "repair",
        "if bool((here.fixed & ~kept).any()):",
        "if False:",
        "tests/field/test_constants.py",
    ),
    Fault(
        "plan",
        "if _signature(program) == _signature(now):",
        "if True:",
        "tests/field/test_changed.py",
    ),
    Fault(
        "reference",
        "if buffers and all(n in program.tensors for n in given):",
        "if False:",
        "tests/field/test_spectral_norm.py",
    ),
    Fault("verify", "if watch.seen:", "if False:", "tests/field/test_rebound.py -k refused"),
    Fault(
        "training",
        '"loss": callable_text(options.loss),',
        '"loss": "",',
        "tests/field/test_other_run.py",
    ),
    # Several example calls.
    Fault("coupling", "in program.captured:\n        more", "in (program,):\n        more", CALLS),
    Fault("allocate", "return along(where, counts, cost) if", "return counts if", CALLS),
    # Patches of source code.
    Fault(
        "capture",
        "        if not _is_machinery(frame.f_code):  # a function",
        "        if True:  # a function",
        "tests/field/test_patches.py",
    ),
    Fault(
        "rewrite",
        "            new = change.numbers.get(i, old)\n",
        "            new = old\n",
        "tests/field/test_branches_not_run.py",
    ),
    Fault(
        "rewrite",
        "        if number in (old, new):\n            return new",
        "        if True:\n            return new",
        "tests/field/test_patches.py",
    ),
    Fault(
        "rewrite",
        "            if suspect is None:",
        "            if True:",
        "tests/field/test_branches_not_run.py",
    ),
    Fault(
        "plan",
        "            fixed = right is not None and all(",
        "            fixed = True or all(",
        "tests/field/test_lengths_in_attributes.py",
    ),
    Fault(
        "apply",
        "        if not slim.generated:\n            return _noted",
        "        if True:\n            return _noted",
        "tests/field/test_own_code.py",
    ),
    Fault("rewrite", "and _form(a) == _form(b)", "and True", f"{CALLS} -k differently"),
    Fault(
        "rewrite",
        "softmax_scale=math.sqrt(1.0 / float(module.head_dim))",
        "softmax_scale=1.0",
        f"{ATTENTION}.py -k stock_sizes",
    ),
    Fault(
        "rewrite",
        "and (len(left.kept) % 2 == 0 or dense.num_heads % 2 == 1)",
        "",
        f"{ATTENTION}_encoders.py -k odd",
    ),
    Fault(
        "rewrite",
        "tuple(was[i] for i in left.kept)",
        "left.kept",
        f"{ATTENTION}_classes.py -k again",
    ),
    # Patched source.
    Fault("rewrite", "return functools.partial(whole, value)", "return value", f"{SOURCE} -k Proc"),
    Fault(
        "rewrite",
        "if not any(_is_alike(each, code) for each in made):",
        "if False:",
        f"{SOURCE} -k changed_since",
    ),
    Fault(
        "rewrite", "return 1 + max(map(int, levels), default=-1)", "return 0", f"{SOURCE} -k twice"
    ),
    Fault("verify", "enumerate(whole.calls)", "enumerate(whole.calls[:1])", f"{CALLS} -k later"),
    Fault(
        "repair",
        "common[name] = _common(reading) if len(nodes) == len(reading) else None",
        "common[name] = reading[0].fixed",
        f"{CALLS} -k compacted",
    ),
    Fault(
        "apply",
        "round(of(keep.coupling, keep.gone)(keep.counts))",
        "round(of(keep.coupling).total)",
        "tests/test_report.py tests/test_plan_report.py tests/test_iterate.py",
    ),
    Fault(
        "deploy",
        "return atol + rtol * scale",
        "return atol + scale",
        "tests/test_export.py -k disagreement",
    ),
    Fault(
        "deploy",
        "np.clip(held - np.rint(steps)",
        "np.clip(held + np.rint(steps)",
        "tests/test_quantize.py -k biases_move",
    ),
    Fault(
        "deploy",
        "    if not in_int8:",
        "    if in_int8 is None:",
        "tests/test_quantize.py -k leaves_the_old",
    ),
    Fault(
        "deploy",
        "if 2 * convolutions <= len(layers):",
        "if 2 * convolutions < len(layers):",
        "tests/test_quantize.py -k rule_counts",
    ),
    Fault(
        "timing", "first = max(below - 1, 0)", "first = below", "tests/test_timing.py -k interval"
    ),
    Fault(
        "timing",
        "(in_all * mean - done * before.get(name, 0.0)) / (in_all - done)",
        "mean",
        "tests/test_engines.py -k warm",
    ),
    Fault(
        "latency",
        "-(-exact // block) * block",
        "exact // block * block",
        "tests/test_latency.py -k recognised",
    ),
    Fault(
        "allocate",
        "reasons.setdefault(dimension.reason, []).append(dimension.tensor)",
        "pass",
        "tests/test_errors.py -k prunable",
    ),
    Fault(
        "dead_units",
        "np.setdiff1d(np.arange(coupling.groups[i].size), units)",
        "units",
        "tests/test_compact.py",
    ),
    Fault(
        "capture",
        "first.expand(time, *first.shape[1:])",
        "first.expand(time + 1, *first.shape[1:])",
        "tests/test_lean.py -k gru",
    ),
    # Masks.
    Fault("masking", "        masks.clear()", "        masks.release()", "tests/test_masked.py"),
    Fault(
        "masking",
        "[_ALL] = nothing",
        "[_ALL] = ~nothing",
        "tests/test_masked.py -k dropped_branch",
    ),
    Fault(
        "training",
        "return self.peak * step / self.ramp",
        "return self.peak",
        "tests/test_schedules.py",
    ),
    Fault(
        "integrations",
        "if state.is_world_process_zero and path.parent.is_dir():",
        "if False:",
        "tests/test_callbacks.py -k resumes",
    ),
    Fault(
        "storage",
        "    if others:",
        "    if False:",
        "tests/field/test_files_refused.py -k of_the_user",
    ),
    Fault("cli", "write_model(slim, draft)", "pass", "tests/test_cli.py -k compact"),
    Fault("cli", "if name in pruning or rivals", "if rivals", "tests/test_cli.py -k stand_behind"),
    Fault("cli", "not in shared]", "in ()]", "tests/test_cli_models.py"),
]


def modules(stage: str) -> list[Path]:
    """Files of a stage: a folder's, or one root module."""
    folder = PACKAGE / stage
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def place(fault: Fault) -> Path | None:
    """The one file that holds the fault's text once; None where it is not to be found so."""
    counts = {p: p.read_text().count(fault.old) for p in modules(fault.stage) if p.exists()}
    return max(counts, key=lambda p: counts[p]) if sum(counts.values()) == 1 else None


def uncovered() -> Iterator[str]:
    """Rule files and stages without a fault."""
    places = {place(fault) for fault in FAULTS}
    for path in modules("ops"):
        if path not in places and "\n@rule(" in path.read_text():
            yield str(path.relative_to(ROOT))
    stages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    yield from sorted(f"depcut/{s}/" for s in stages - {fault.stage for fault in FAULTS})


def outcome(fault: Fault, at: Path) -> str:
    """What the tests say of a copy with the fault."""
    code = run(fault.tests, {at: at.read_text().replace(fault.old, fault.new)})
    return {0: "MISSED", 1: "caught"}.get(code, f"no verdict: pytest ended with {code}")


def run(tests: str, changed: dict[Path, str]) -> int:
    """Exit code of the tests on a copy of the package in which some files say something else."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "depcut"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for path, text in changed.items():
            (copy / path.relative_to(PACKAGE)).write_text(text)
        return in_a_child(tests, Path(name))


def in_a_child(tests: str, path: Path) -> int:
    """Exit code of pytest with the package of a folder, in a child that has torch already."""
    files, _, expression = tests.partition(" -k ")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *files.split()]
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        with (path / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.path[:] = [str(path), *(p for p in sys.path if p and Path(p) != ROOT)]
        os.environ["PYTHONPATH"] = str(path)
        import pytest

        code = int(pytest.main(arguments + (["-k", expression] if expression else [])))
    finally:
        os._exit(code)


def main() -> int:
    """Run the faults that were asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="STAGE", help="the faults of one stage")
    parser.add_argument("--check", action="store_true", help="look for the places only")
    options = parser.parse_args()
    os.chdir(ROOT)
    import torch  # for all children

    torch.set_num_threads(1)
    if not options.check and run(f"{RULES} glu", {}):
        print("without a fault, the tests fail as well")
        return 1
    missing = list(uncovered())
    for name in missing:
        print(f"no fault in {name}")
    wrong = len(missing)
    for fault in FAULTS:
        if options.only not in (None, fault.stage):
            continue
        at, started = place(fault), time.monotonic()
        if at is None:
            text = "no longer matches: give it another place"
        else:
            text = "there" if options.check else outcome(fault, at)
        wrong += text not in ("there", "caught")
        where = at.relative_to(ROOT) if at else f"depcut/{fault.stage}"
        print(f"{text:8} {where}: {fault.old!r} ({time.monotonic() - started:.0f} s)", flush=True)
    print("every fault was caught" if not wrong and not options.check else f"{wrong} to look at")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
