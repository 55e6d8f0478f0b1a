"""Every structure of `nets.py`: random units of every group removed, equal outputs.

The named tests below say for the most telling structures what is coupled with what.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from oracle import check, cut, outputs, random_keep
from selection import analysis_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETS)
def test_structure_group_by_group(name: str) -> None:
    net = NETS[name]
    check(
        net.build(),
        net.inputs,
        seeds=(1,),
        alone=True,
        independent=False,
        same_class=net.same_class,
        tolerance=net.tolerance,
    )


@pytest.mark.parametrize("name", NETS)
def test_structure(name: str) -> None:
    net = NETS[name]
    analysis = check(
        net.build(),
        net.inputs,
        held=net.held,
        same_class=net.same_class,
        tolerance=net.tolerance,
    )
    sizes = tuple(sorted(group.size for group in analysis.groups if group.size > 1))
    if isinstance(net.prunable, tuple):
        assert sizes == net.prunable
    else:
        assert len(sizes) >= net.prunable, f"only groups of sizes {sizes}"


# Who is coupled with whom -------------------------------------------------------------------------


def members(analysis: Any, tensor: str, dim: int) -> set[tuple[str, int]]:
    """All (tensor, dimension) pairs of the one group that this dimension belongs to."""
    [group] = groups_of(analysis, tensor, dim)
    return {(m.tensor, m.dim) for m in group.members}


def groups_of(analysis: Any, tensor: str, dim: int) -> list[Any]:
    return [
        group
        for group in analysis.groups
        if any((m.tensor, m.dim) == (tensor, dim) for m in group.members)
    ]


def roles(analysis: Any, tensor: str, dim: int) -> set[str]:
    return {
        member.role
        for group in analysis.groups
        for member in group.members
        if (member.tensor, member.dim) == (tensor, dim)
    }


def frozen(analysis: Any, tensor: str, dim: int) -> Any:
    [found] = [f for f in analysis.frozen if (f.tensor, f.dim) == (tensor, dim)]
    return found


def test_both_ends_of_a_residual_are_one_group() -> None:
    analysis = analysis_of("residual")
    assert members(analysis, "stem.0.weight", 0) == {
        ("stem.0.weight", 0),
        ("stem.0.bias", 0),
        ("stem.1.weight", 0),
        ("stem.1.bias", 0),
        ("stem.1.running_mean", 0),
        ("stem.1.running_var", 0),
        ("conv1.0.weight", 1),
        ("conv2.0.weight", 0),
        ("conv2.0.bias", 0),
        ("conv2.1.weight", 0),
        ("conv2.1.bias", 0),
        ("conv2.1.running_mean", 0),
        ("conv2.1.running_var", 0),
        ("head.classifier.weight", 1),
    }
    assert roles(analysis, "conv2.0.weight", 0) == {"producer"}
    assert roles(analysis, "conv2.0.weight", 1) == {"consumer"}


def test_inputs_and_outputs_are_frozen_with_a_reason() -> None:
    analysis = analysis_of("plain")
    assert frozen(analysis, "0.0.weight", 1).size == 3
    assert "input" in frozen(analysis, "0.0.weight", 1).reason
    assert frozen(analysis, "2.classifier.weight", 0).size == 5
    assert "output" in frozen(analysis, "2.classifier.weight", 0).reason
    assert not groups_of(analysis, "0.0.weight", 2)


def test_a_depthwise_filter_goes_with_its_channel() -> None:
    analysis = analysis_of("depthwise")
    assert {("0.0.weight", 0), ("1.0.weight", 0), ("2.0.weight", 1)} <= members(
        analysis, "1.0.weight", 0
    )


def test_the_gate_of_a_squeeze_excite_goes_with_what_it_gates() -> None:
    analysis = analysis_of("squeeze_excite")
    assert {("0.0.weight", 0), ("1.squeeze.weight", 1), ("1.excite.weight", 0)} <= members(
        analysis, "1.excite.bias", 0
    )


def test_swapped_halves_are_the_same_indices() -> None:
    analysis = analysis_of("halves_swapped")
    [group] = groups_of(analysis, "stem.0.weight", 0)
    assert group.size == 6
    kept = analysis.plan_keeping({group.name: [0, 4]}).tensor_indices()["stem.0.weight"][0]
    assert kept.tolist() == [0, 4, 6, 10]


def test_a_concat_shifts_the_indices_of_what_comes_later() -> None:
    analysis = analysis_of("concat")
    [left] = groups_of(analysis, "left.0.weight", 0)
    [right] = groups_of(analysis, "right.0.weight", 0)
    plan = analysis.plan_keeping({left.name: [1, 5], right.name: [0, 9]})
    assert plan.tensor_indices()["fuse.0.weight"][1].tolist() == [1, 5, 6, 15]


def test_a_flattened_channel_takes_all_of_its_places() -> None:
    analysis = analysis_of("flatten_linear")
    [group] = groups_of(analysis, "0.0.weight", 0)
    kept = analysis.plan_keeping({group.name: [2, 7]}).tensor_indices()["2.weight"][1]
    assert kept.tolist() == [*range(32, 48), *range(112, 128)]


def test_shuffled_channels_stay_with_their_filters() -> None:
    net = NETS["channel_shuffle"]
    analysis = analysis_of("channel_shuffle")
    produced = groups_of(analysis, "stem.0.weight", 0)
    assert produced
    assert {g.name for g in produced} == {g.name for g in groups_of(analysis, "fuse.0.weight", 1)}
    plan = analysis.plan_keeping({g.name: list(range(g.size - 1)) for g in produced})
    kept = plan.tensor_indices()
    shuffled = torch.arange(12).view(3, 4).t().flatten().tolist()
    read = [shuffled[i] for i in kept["fuse.0.weight"][1]]
    assert sorted(read) == kept["stem.0.weight"][0].tolist()
    assert outputs(plan.apply(net.build()), net.inputs(3))[0].shape == (3, 5)


def test_query_heads_go_with_their_key_head() -> None:
    for name in ("attention_gqa_expand", "attention_gqa_repeat", "attention_gqa_sdpa"):
        analysis = analysis_of(name)
        key_heads = [g for g in groups_of(analysis, "attention.k.weight", 0) if g.size == 2]
        assert len(key_heads) == 1, name
        touched = {(m.tensor, m.dim) for m in key_heads[0].members}
        assert touched >= {
            ("attention.q.weight", 0),
            ("attention.k.weight", 0),
            ("attention.v.weight", 0),
            ("attention.out.weight", 1),
        }
        kept = analysis.plan_keeping({key_heads[0].name: [1]}).tensor_indices()
        assert kept["attention.q.weight"][0].tolist() == list(range(12, 24))
        assert kept["attention.v.weight"][0].tolist() == list(range(4, 8))


def test_queries_and_keys_share_their_features_and_values_have_their_own() -> None:
    analysis = analysis_of("attention_separate")
    by_size = {group.size: {m.tensor for m in group.members} for group in analysis.groups}
    assert {"attention.q.weight", "attention.k.weight"} <= by_size[4]
    assert not by_size[4] & {"attention.v.weight", "attention.out.weight"}
    assert {"attention.v.weight", "attention.out.weight"} <= by_size[5]
    assert not by_size[5] & {"attention.q.weight", "attention.k.weight"}
    assert by_size[3] >= by_size[4] | by_size[5]


def test_a_tied_embedding_keeps_its_words_and_one_group_of_features() -> None:
    analysis = analysis_of("tied_embedding")
    assert frozen(analysis, "embedding.weight", 0).size == 20
    assert {("embedding.weight", 1), ("mlp.up.weight", 1), ("mlp.down.weight", 0)} <= members(
        analysis, "mlp.down.weight", 0
    )
    net = NETS["tied_embedding"]
    model = net.build()
    keep = {g.name: [0, 2] for g in analysis.groups}
    slim = analysis.plan_keeping(keep).apply(model)
    assert slim.head.weight is slim.embedding.weight


def test_a_relative_position_table_loses_the_columns_of_removed_heads() -> None:
    analysis = analysis_of("window_attention")
    [heads] = groups_of(analysis, "attention.table", 1)
    assert heads.size == 3
    assert ("attention.qkv.weight", 0) in {(m.tensor, m.dim) for m in heads.members}


def test_token_mixing_leaves_the_tokens_alone() -> None:
    analysis = analysis_of("mlp_mixer")
    assert frozen(analysis, "mix_tokens.up.weight", 1).size == 16
    assert {("mix_tokens.up.weight", 0), ("mix_tokens.down.weight", 1)} <= members(
        analysis, "mix_tokens.up.weight", 0
    )


def test_an_lstm_loses_a_unit_in_all_four_gates() -> None:
    analysis = analysis_of("lstm")
    [unit] = groups_of(analysis, "classifier.weight", 1)
    kept = analysis.plan_keeping({unit.name: [0, 3]}).tensor_indices()
    assert kept["cell.weight_hh_l0"][1].tolist() == [0, 3]
    assert kept["cell.weight_ih_l0"][0].tolist() == [
        7 * gate + u for gate in range(4) for u in (0, 3)
    ]


@pytest.mark.parametrize("name", ["channel_convolution", "cumulative_channels", "neighbour_norm"])
def test_channels_that_look_at_their_neighbours_are_frozen(name: str) -> None:
    analysis = analysis_of(name)
    tensor = "stem.0.weight" if name == "cumulative_channels" else "0.0.weight"
    assert frozen(analysis, tensor, 0).size == 8
    assert not groups_of(analysis, tensor, 0)


def test_experts_share_what_they_read_and_own_what_they_hide() -> None:
    analysis = analysis_of("experts")
    shared = members(analysis, "embed.weight", 0)
    assert {(f"experts.{i}.up.weight", 1) for i in range(3)} <= shared
    assert {(f"experts.{i}.down.weight", 0) for i in range(3)} <= shared
    assert ("router.weight", 1) in shared
    assert not groups_of(analysis, "router.weight", 0)


def test_a_frozen_parameter_is_cut_and_stays_frozen() -> None:
    net = NETS["frozen_parameters"]
    model, analysis = net.build(), analysis_of("frozen_parameters")
    slim = analysis.plan_keeping({g.name: [0, 1, 2] for g in analysis.groups}).apply(model)
    assert slim.stem[0].weight.shape == (3, 3, 3, 3)
    assert not slim.stem[0].weight.requires_grad
    assert slim.body[0].weight.requires_grad


def test_module_attributes_say_the_new_sizes() -> None:
    net = NETS["inverted_residual"]
    analysis = analysis_of("inverted_residual")
    sizes = {5: [0, 1], 6: [0, 2, 4], 14: [0, 3, 7, 13]}
    keep = {group.name: sizes[group.size] for group in analysis.groups}
    slim, _ = cut(analysis, net.build(), net.inputs(2), keep, 1e-5)
    depthwise, norm = slim.depthwise[0], slim.depthwise[1]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert norm.num_features == 4
    assert (slim.excite.squeeze.in_channels, slim.excite.squeeze.out_channels) == (4, 2)
    assert slim.head.classifier.in_features == 3


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    net = NETS["residual"]
    model, analysis = net.build(), analysis_of("residual")
    slim = analysis.plan_keeping({}).apply(model)
    assert torch.equal(outputs(slim, net.inputs(2))[0], outputs(model, net.inputs(2))[0])


def test_random_keep_removes_something_everywhere() -> None:
    analysis = analysis_of("dense_block")
    keep = random_keep(analysis, np.random.default_rng(0))
    assert set(keep) == {g.name for g in analysis.groups}
    assert all(0 < len(keep[g.name]) < g.size for g in analysis.groups)


def test_the_graph_of_layers_and_groups_has_who_makes_and_who_reads_each_unit() -> None:
    analysis = analysis_of("plain")
    graph = analysis.graph
    groups = {name for name, kind in graph.nodes(data="kind") if kind == "group"}
    assert groups == {group.name for group in analysis.groups}
    for group in analysis.groups:
        for role, found in (
            ("producer", graph.predecessors(group.name)),
            ("consumer", graph.successors(group.name)),
        ):
            tensors = {m.tensor for m in group.members if m.role == role}
            assert set(found) == {f"layer:{t.rpartition('.')[0]}" for t in tensors}
