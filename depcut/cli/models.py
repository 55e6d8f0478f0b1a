"""Models as the command line names them: of a library, of a folder, or of the user's own code."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from depcut.apply.plan import Plan
from depcut.cli.factories import Named, called, guarded
from depcut.cli.inputs import example_inputs
from depcut.cli.weights import fill
from depcut.errors import InputError, listed
from depcut.storage.folder import MODEL
from depcut.storage.load import load

MODEL_HELP = """\
MODEL is one of
  package.module:factory                 the model that the factory returns; arguments are literals:
  package.module:factory(10, deep=True)  modules in the current folder are found
  timm:resnet50                          timm.create_model; timm:resnet50(pretrained=True)
  torchvision:resnet18                   torchvision.models.get_model, weights="DEFAULT" if wanted
  hf:folder                              what save_pretrained of transformers wrote; or a hub's id
  folder                                 what depcut.save wrote, or depcut shrink
"""


def build_model(target: str) -> nn.Module:
    """The model that a user names.

    Args:
        target: See `MODEL_HELP`.

    Raises:
        InputError: It cannot be built, or is no module.
    """
    library, _, rest = target.partition(":")
    make = _LIBRARIES.get(library)
    if make and rest:
        model = make(rest, target)
    elif Path(target).is_dir():
        model = _stored(Path(target))
    else:
        model = called(target, "the model")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the factory returned a {type(model).__name__}",
            where=target,
            remedy="it must return a torch.nn.Module",
        )
    return model


def dense_model(options: argparse.Namespace) -> nn.Module:
    """The dense model with its weights, if some are named.

    Args:
        options: Of a command with `model` and `weights`.
    """
    model = build_model(options.model)
    if options.weights:
        fill(model, options.weights)
    return model


def slim_model(options: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model after the plan and with the slim weights that the options name, if any.

    Args:
        options: Of a command with `plan` and `slim_weights`.
        model: The dense model.
    """
    if options.plan:
        model = Plan.load(options.plan).apply(model, example_inputs(options.input_shape))
    elif options.slim_weights:
        raise InputError(
            "--slim-weights without --plan",
            remedy="name the plan that made the model slim, or use --weights",
        )
    if options.slim_weights:
        fill(model, options.slim_weights)
    return model


def hub_folder(target: str) -> Path | None:
    """The folder of a model that is named as `hf:folder`; None for all others.

    Args:
        target: What the user wrote.
    """
    library, _, rest = target.partition(":")
    folder = Path(rest if Path(rest).is_dir() else Named.read(rest).name)
    return folder if library == "hf" and rest and folder.is_dir() else None


def _stored(folder: Path) -> nn.Module:
    """What `depcut.save` wrote."""
    if not (folder / MODEL).is_file() and (folder / "config.json").is_file():
        raise InputError(
            "the folder is none of depcut.save's", where=str(folder), remedy=f"write hf:{folder}"
        )
    return load(folder)


def _library(name: str, target: str) -> Any:
    """A library by the name of its module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        distribution = name.partition(".")[0]
        raise InputError(
            f"{distribution} cannot be imported: {error}",
            where=target,
            remedy=f"pip install {distribution}",
        ) from error


def _of_a_catalogue(module: str, function: str) -> Callable[[str, str], Any]:
    """A library's function from a model's name to the model."""

    def make(text: str, target: str) -> Any:
        named = Named.read(text)
        return guarded(
            lambda: getattr(_library(module, target), function)(
                named.name, *named.args, **named.kwargs
            ),
            target,
            "the model",
            f"name a model of {module.partition('.')[0]}, and arguments that it takes",
        )

    return make


def _pretrained(text: str, target: str) -> Any:
    """What `from_pretrained` makes of a folder or a hub's id: the class that its config names."""
    named = Named.read(text) if not Path(text).is_dir() else Named(text)
    return guarded(
        lambda: _from_pretrained(named, target),
        target,
        "the model",
        "name a folder that save_pretrained of transformers wrote, with config.json in it",
    )


def _from_pretrained(named: Named, target: str) -> Any:
    transformers = _library("transformers", target)
    given = dict(named.kwargs)
    if Path(named.name).is_dir():
        given["local_files_only"] = True
    found = {n: given[n] for n in ("local_files_only", "revision", "subfolder") if n in given}
    config = transformers.AutoConfig.from_pretrained(named.name, **found)
    architectures = getattr(config, "architectures", None) or ["AutoModel"]
    kind = getattr(transformers, architectures[0], None)
    if kind is None:
        raise InputError(
            f"transformers {transformers.__version__} has no class {architectures[0]}",
            where=target,
            remedy="use a transformers that has it; code that lies beside the weights is not run",
        )
    model, loading = kind.from_pretrained(
        named.name, *named.args, **given, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        warnings.warn(
            f"{target} has no weights for {listed(missing, 3)}: they are drawn at random",
            stacklevel=2,
        )
    return model


_LIBRARIES: dict[str, Callable[[str, str], Any]] = {
    "timm": _of_a_catalogue("timm", "create_model"),
    "torchvision": _of_a_catalogue("torchvision.models", "get_model"),
    "hf": _pretrained,
}
