"""Costs: predictions for a plan against the parameters and operations of the model it makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nets import MLP, NETS, Net, normal
from oracle import call, random_keep
from selection import analysis_of, sampled
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.flop_counter import FlopCounterMode

import depcut
from depcut.plan.cost import compile_cost, compile_staircase, count_macs, count_params

# One of each kind of layer, coupling and size.
MANY = """
mlp inverted_residual padded_shortcut concat_nested dense_block unet split_unequal halves_swapped
chunk_and_chain copy_into_slices unbind_and_stack shuffle_unit pixel_shuffle maxout
linear_view_deconv gram_matrix patch_merging squeeze_excite_linear glu grouped_bottleneck
depthwise_multiplier transposed_grouped conv1d weight_norm attention_chunked attention_gqa_sdpa
attention_native vision_transformer window_attention causal_decoder gru_bidirectional
tied_autoencoder transposed_weights text_convolutions stacked_experts training_only_head
unused_layer
""".split()


@pytest.mark.parametrize("name", sampled(MANY, MANY[::5]))
def test_predictions_for_a_plan_are_what_the_slim_model_has(name: str) -> None:
    net = NETS[name]
    model, inputs = net.build(), net.inputs(2)
    analysis = depcut.analyze(model, inputs)
    plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(5)))
    slim = plan.apply(model)
    assert plan.params == sum(p.numel() for p in slim.parameters()) == count_params(slim)
    assert plan.macs == count_macs(slim, inputs)
    assert plan.params < analysis.params
    assert plan.macs < analysis.macs


@pytest.mark.usefixtures("only_generated")
def test_a_model_generated_as_a_whole_can_be_analysed_again() -> None:
    net = NETS["adaptive_flatten"]
    model, inputs = net.build(), net.inputs(2)
    analysis = depcut.analyze(model, inputs)
    plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(5)))
    slim = plan.apply(model)
    assert "" in depcut.report(slim).generated
    assert plan.macs == depcut.analyze(slim, inputs).macs


# Operations of the dense model --------------------------------------------------------------------


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.kv, self.out = nn.Linear(6, 12), nn.Linear(6, 27), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q = self.q(x[:, :2]).view(batch, 2, self.heads, 4).transpose(1, 2)
        k, v = self.kv(x).split([12, 15], -1)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (k, v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def counted(model: nn.Module, net_inputs: Net | Tensor, batch: int = 2) -> float:
    """Multiply-accumulates of one example as torch counts them."""
    inputs = net_inputs if isinstance(net_inputs, Tensor) else net_inputs.inputs(batch)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2 / batch


@pytest.mark.parametrize(
    "name",
    [
        "plain", "mlp", "residual_projection", "unet", "grouped", "depthwise_multiplier",
        "transposed", "transposed_grouped", "conv1d", "conv3d", "functional_conv", "flatten_linear",
        "linear_view_deconv", "gram_matrix", "mlp_mixer", "swiglu_chunk", "attention_fused",
        "attention_separate", "attention_gqa_expand", "attention_width_over_heads",
        "vision_transformer", "window_attention", "causal_decoder", "tied_autoencoder",
        "transposed_weights", "matrix_products", "siamese", "stacked_experts",
    ],
)  # fmt: skip
def test_macs_are_those_that_torch_counts(name: str) -> None:
    assert analysis_of(name).macs == counted(analysis_of(name).model, NETS[name])


@pytest.mark.parametrize("name", ["attention_einsum", "einsum_linear"])
def test_macs_of_einsum_are_those_of_its_pairwise_products(name: str) -> None:
    net = NETS[name]
    model = net.build()
    assert depcut.analyze(model, net.inputs(2)).macs == counted(model, net)


def test_macs_of_attention_with_unequal_lengths_and_sizes() -> None:
    model = Cross().eval()
    expected = counted(model, normal(2, 7, 6))
    assert depcut.analyze(model, normal(2, 7, 6)).macs == expected
    by_hand = 2 * 6 * 12 + 7 * 6 * 27 + 3 * 2 * 7 * (4 + 5) + 2 * 15 * 5
    assert expected == by_hand


class Attends(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options
        self.q, self.kv, self.out = nn.Linear(6, 24), nn.Linear(6, 8), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = 3 if self.options.get("enable_gqa") else 1
        q = self.q(x).unflatten(-1, (2 * heads, -1)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, kv, kv, **self.options)
        return self.out(y.transpose(1, 2).flatten(2))


def test_macs_of_attention_with_shared_key_heads() -> None:
    macs = depcut.analyze(Attends(enable_gqa=True).eval(), normal(2, 7, 6)).macs
    assert macs == 7 * 6 * (24 + 8) + 2 * (6 * 7 * 7 * 4) + 7 * 24 * 5


def test_macs_of_recurrent_cells() -> None:
    macs = depcut.analyze(NETS["lstm"].build(), NETS["lstm"].inputs(2)).macs
    assert macs == 5 * (6 * 9 + 4 * 7 * (9 + 7) + 7 * 5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_macs_do_not_depend_on_the_batch(batch: int) -> None:
    net = NETS["vision_transformer"]
    analysis = depcut.analyze(net.build(), net.inputs(batch))
    assert analysis.macs == depcut.analyze(net.build(), net.inputs(3)).macs
    keep = {g.name: [0] for g in analysis.groups}
    slim = analysis.plan_keeping(keep).apply(analysis.model)
    assert analysis.plan_keeping(keep).macs == counted(slim, net)


def test_macs_of_a_plan_are_those_that_torch_counts() -> None:
    for name in ("unet", "grouped", "attention_gqa_expand", "window_attention", "matrix_products"):
        net = NETS[name]
        model = net.build()
        analysis = depcut.analyze(model, net.inputs(2))
        plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(7)))
        assert plan.macs == counted(plan.apply(model), net), name


# Parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied_embedding", "tied_autoencoder", "module_under_two_names"])
def test_shared_parameters_count_once(name: str) -> None:
    model = NETS[name].build()
    unique = {id(p): p.numel() for p in model.parameters()}
    analysis = depcut.analyze(model, NETS[name].inputs(2))
    assert analysis.params == count_params(model) == sum(unique.values())


def test_parameters_that_only_training_uses_count() -> None:
    model = NETS["training_only_head"].build()
    analysis = depcut.analyze(model, NETS["training_only_head"].inputs(2))
    assert analysis.params == sum(p.numel() for p in model.parameters())


# The compiled function ---------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
@pytest.mark.parametrize(
    "name", ["plain", "grouped", "dense_block", "attention_gqa_expand", "gram_matrix", "lstm"]
)
def test_the_gradient_is_the_change_a_unit(name: str, of: str) -> None:
    analysis = analysis_of(name)
    cost = analysis.costs[of]
    rng = np.random.default_rng(0)
    for counts in (cost.dense, 1 + rng.random(len(cost.dense)) * (cost.dense - 1)):
        step = 1e-4
        expected = [
            (cost(counts + step * unit) - cost(counts - step * unit)) / (2 * step)
            for unit in np.eye(len(counts))
        ]
        np.testing.assert_allclose(cost.gradient(counts), expected, rtol=1e-5, atol=1e-5)
        assert (cost.gradient(counts) > 0).all()


def test_total_is_the_cost_of_everything() -> None:
    analysis = depcut.analyze(NETS["grouped"].build(), NETS["grouped"].inputs(2))
    for cost in analysis.costs.values():
        assert cost.total == cost(np.array([g.size for g in analysis.groups]))
    assert analysis.costs["channels"].total == 12 + 18 + 7


def test_evaluating_does_not_change_the_counts() -> None:
    analysis = depcut.analyze(MLP(6, 9).eval(), normal(2, 6))
    counts = np.array([4])
    assert [analysis.costs["params"](counts) for _ in range(2)] == [4 * 6 + 4 + 6 * 4 + 6] * 2
    analysis.costs["params"].gradient(counts)
    assert counts.tolist() == [4]


def test_an_empty_sum_costs_nothing() -> None:
    coupling = depcut.analyze(MLP(6, 9).eval(), normal(2, 6)).coupling
    cost = compile_cost(coupling, [])
    assert cost.total == 0
    assert cost.gradient(cost.dense).tolist() == [0]
    assert math.isfinite(cost(np.array([1])))


# Evaluations -------------------------------------------------------------------------------------

FEW = ["concat_nested", "grouped_bottleneck", "attention_gqa_sdpa", "gru_bidirectional"]


@pytest.mark.parametrize("name", FEW)
def test_many_candidates_at_once_cost_what_each_costs(name: str) -> None:
    analysis = analysis_of(name)
    sizes = [g.size for g in analysis.groups]
    rows = np.random.default_rng(0).integers(1, np.array(sizes) + 1, size=(20, len(sizes)))
    assert analysis.costs
    for cost in analysis.costs.values():
        assert cost.many(rows) == pytest.approx([cost(row) for row in rows])


@pytest.mark.parametrize("name", FEW)
def test_what_depends_on_a_group_changes_as_the_whole_does(name: str) -> None:
    analysis = analysis_of(name)
    dense = np.array([g.size for g in analysis.groups])
    assert analysis.costs
    for cost in analysis.costs.values():
        for group in analysis.groups:
            part = cost.within(np.array([group.index]))
            less = dense.copy()
            less[group.index] = 1
            assert cost(dense) - cost(less) == pytest.approx(part(dense) - part(less))
            assert len(part.times) <= len(cost.times)


@pytest.mark.parametrize("name", FEW)
def test_counts_that_are_given_need_not_be_passed(name: str) -> None:
    analysis = analysis_of(name)
    generator = np.random.default_rng(1)
    sizes = np.array([g.size for g in analysis.groups])
    fixed = np.arange(0, len(sizes), 2)
    assert analysis.costs
    for cost in analysis.costs.values():
        counts, others = generator.integers(1, sizes + 1, size=(2, len(sizes)))
        given = cost.at(fixed, counts[fixed])
        others[1::2] = counts[1::2]
        assert given(others) == pytest.approx(cost(counts))
        assert given.total == cost.total
        assert (given.gradient(others)[fixed] == 0).all()


def test_blocks_round_counts_up_before_they_are_multiplied() -> None:
    net = NETS["concat_nested"]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    rest = [1] * (len(analysis.groups) - 2)
    first, second = {(0,): 1.0}, {(1,): 2.0, (): 3.0}
    cost = compile_staircase(
        analysis.coupling, [(0.5, [(first, 4), (second, 8)]), (7.0, []), (1.0, [(first, 1)])]
    )
    for a, b in ((1, 1), (4, 2), (5, 3), (7, 7)):
        expected = 0.5 * -(-a // 4) * 4 * -(-(2 * b + 3) // 8) * 8 + 7 + a
        assert cost(np.array([a, b, *rest])) == expected
