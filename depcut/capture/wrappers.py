"""Inline the sub-graphs of higher-order wrappers: autocast regions and gradient switches."""

from __future__ import annotations

from typing import Any

from torch import fx

from depcut.support.torch_private import enter_autocast, exit_autocast


def inline_wrappers(graph_module: fx.GraphModule) -> None:
    """Replace wrap_with_autocast / wrap_with_set_grad_enabled by their bodies, in order."""
    wrappers = [n for n in graph_module.graph.nodes if _is_wrapper(n)]
    while wrappers:
        wrappers += filter(_is_wrapper, _inline_one(graph_module, wrappers.pop()))
    graph_module.graph.lint()


def _is_wrapper(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("wrap_with")


def _inline_one(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Replace a wrapper by its body; returns the copies of the body's calls."""
    at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body_node = node.args[at]
    assert isinstance(body_node, fx.Node)
    body = getattr(graph_module, str(body_node.target))
    settings = node.args[:at]
    autocast = "autocast" in str(node.target)
    graph = graph_module.graph
    with graph.inserting_before(node):
        token = graph.call_function(enter_autocast, settings) if autocast else None
        if token is not None:
            token.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        holders = [n for n in body.graph.nodes if n.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(holders, node.args[at + 1 :], strict=True))
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                env[inner] = graph.node_copy(inner, lambda n: env[n])
            elif inner.op == "get_attr":
                name = f"{body_node.target}_{inner.target}"
                setattr(graph_module, name, getattr(body, str(inner.target)))
                env[inner] = graph.get_attr(name)
        if token is not None:
            graph.call_function(exit_autocast, (token,))
        results = next(n for n in body.graph.nodes if n.op == "output").args[0]
    results = results if isinstance(results, list | tuple) else (results,)
    for user in list(node.users):
        user.replace_all_uses_with(env[results[user.args[1]]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
    if not body_node.users:
        graph.erase_node(body_node)
    return [env[inner] for inner in body.graph.nodes if inner.op == "call_function"]
