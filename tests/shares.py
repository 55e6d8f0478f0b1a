"""Which share of a test's cases runs by default: the others run with `-m sweep`.

The default set has five minutes, the sweep a quarter of an hour. What is shown of many nets or
options alike is shown of some of them by default, evenly spread, of as many again or twice as many
in the sweep (none more where other tests run the same lines of depcut, see untraced.py), and of all
of them with `-m exhaustive`. With DEPCUT_TESTS=whole the sweep's cases run by default, as they do
where coverage is measured.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Sequence

import pytest
from untraced import untraced

# Names of tests of which every sixth case, every third, or none runs by default.
SIXTH = """
test_a_batch_of_one_beside_a_number test_a_dropped_branch_is_a_branch_of_zeros
test_a_file_changed_since_it_was_imported test_a_form_sums_what_the_operator_sums
test_a_later_call_with_any_masks_and_lengths test_a_model_that_caches_is_untouched
test_a_model_that_computes_something_else_is_refused test_a_plan_survives_saving_and_loading
test_a_product_with_zeros_is_not_tainted test_a_sum_is_the_sum_whatever_it_is_asked_for
test_an_interrupted_run_ends_with_the_same_weights
test_an_unaligned_budget_is_met_within_a_percent
test_another_checkpoint_is_cut_at_the_same_places
test_another_instance_with_the_same_weights_gives_the_same_tensors
test_cells_read_what_a_loop_over_the_steps_reads
test_contractions_of_weights_without_a_site_are_known test_criteria_need_weights
test_every_branch_is_found test_every_criterion_scores_every_net
test_every_structure_has_finite_scores test_gradient_criteria_are_their_formulas
test_impossible_rows_are_refused test_kept_weights_return_to_the_snapshot
test_keyword_arguments_in_every_form
test_little_data_dead_units_and_large_activations_give_finite_weights
test_losses_are_those_of_a_whole_pass test_macs_are_those_that_torch_counts
test_magnitudes_are_norms_of_all_that_a_unit_owns test_members_and_aggregates_are_those_of_a_loop
test_outputs_come_closer test_plans_keep_the_best_units_of_each_row
test_predictions_for_a_plan_are_what_the_slim_model_has test_recurrent_modules
test_rows_of_heads_and_groups test_scores_follow_a_permutation_of_the_units
test_sites_compute_what_their_nodes_compute test_state_is_sliced_like_its_parameter_and_trains_on
test_structure test_structures_with_dead_units_compute_the_same test_sums_of_rows_against_loops
test_terms_of_a_product_have_the_energy_of_what_zeroing_them_takes
test_the_harness_catches_a_missing_literal test_the_layer_with_a_wrong_number_is_named
test_the_masked_model_is_the_smaller_one test_the_model_is_only_read
test_the_penalty_is_the_sum_over_what_each_unit_owns test_two_plans_in_turn_are_one_plan
test_weight_norm_keeps_the_weights_that_stay test_what_a_run_advances_is_where_it_was
test_what_is_not_tainted_is_the_same_for_other_inputs test_what_mixes_the_rows_binds_them
test_widths_and_branches_together
test_work_grows_linearly
""".split()
THIRD = """
test_mistakes_are_named test_what_stays_takes_over_what_repeats_it
test_half_of_a_public_architecture
test_a_budget_is_met_with_branches_dropped
test_a_file_with_a_wrong_entry_ends_in_an_error_that_explains
test_a_fresh_model_is_the_same_architecture_with_other_weights
test_a_link_stays_one_and_its_file_is_written
test_a_longer_input_comes_out_as_from_the_dense_model test_a_model_is_served_while_it_is_captured
test_a_model_of_another_precision_passes test_a_model_that_draws_is_compared_by_value
test_a_run_that_failed_goes_on_to_the_same_end
test_a_scale_that_is_computed_out_of_sight_is_found test_a_state_of_another_run_is_refused
test_a_student_that_is_the_teacher_has_nothing_to_learn
test_a_width_that_is_compared_with_a_length test_budgets_are_of_the_dense_model
test_channels_that_look_at_their_neighbours_are_frozen
test_checkpoints_of_another_request_are_refused test_costs_are_those_of_the_result
test_every_group_is_read_somewhere test_form test_generated_modules_are_copied_and_loaded
test_generated_modules_keep_keys_and_take_any_batch test_gradients_reach_the_student_alone
test_half_of_a_public_architecture test_impossible_units test_inputs_and_outputs_of_all_forms
test_little_memory_gives_the_same_scores test_macs_do_not_depend_on_the_batch
test_many_candidates_at_once_cost_what_each_costs test_named_net test_one_call_of_a_shared_layer
test_other_runs_resume_alike test_predictions_equal_reality test_rows_of_attention_against_zeros
test_rows_of_convolutions_against_zeros test_shrunk_twice
test_shuffled_channels_and_gates_have_no_rows test_slicing_before_equals_slicing_after
test_steps_that_rank_units_row_by_row_are_one_plan
test_the_distance_counts_every_removed_element_once test_tied_parameters_stay_tied
test_units_of_each_row_are_masked_and_come_back_from_a_state
test_vectors_of_wrong_shapes_are_refused
test_what_a_class_cannot_express_is_generated_and_the_reason_recorded
test_what_was_cached_before_stays
test_whenever_an_export_is_killed_a_whole_pair_is_there test_wrong_calls
""".split()
NONE = """
test_a_few_that_cannot_be_measured_are_left_out_and_said test_a_fresh_process_replays_a_plan
test_a_public_architecture test_peak_memory_is_that_of_the_candidate_alone
test_two_sessions_of_one_file_do_not_differ test_whenever_an_export_is_killed_a_whole_pair_is_there
test_a_model_with_a_generated_module_is_exported test_a_pickle_in_another_process
test_branches_of_a_public_architecture test_half_of_a_public_architecture_with_branches_dropped
test_a_smaller_decoder_is_served_step_by_step
test_real_calls_are_modelled_and_timed_one_after_the_other test_a_file_holds_a_workload
test_milliseconds_are_of_the_sum test_a_candidate_that_is_close_by_chance_is_not_taken
test_a_time_is_met_between_what_was_too_fast_and_what_was_too_slow
test_a_process_that_timed_in_openvino_takes_signals test_demo_goes_through_without_training
test_flap_and_wanda_sp_come_to_the_macs test_every_way_to_train_has_its_steps
test_the_command_line_writes_int8_files test_data_may_be_made_from_the_model
test_equal_numbers_of_parameters test_the_footprint_of_a_file_grows_with_its_weights
test_tables_and_claims_come_from_the_rows test_the_trainer_resumes_with_its_masks
""".split()

# Names of tests of every net, of whose sweep every twelfth case runs: other nets for each test.
THINNED = """
test_every_criterion_scores_every_net test_every_net_is_untouched
test_every_structure_has_finite_scores test_every_structure_starts_afresh_or_says_why_not
test_contractions_of_weights_without_a_site_are_known test_outputs_come_closer
test_sites_compute_what_their_nodes_compute test_structure_group_by_group
test_the_masked_model_is_the_smaller_one test_two_plans_in_turn_are_one_plan
test_a_masked_net_computes_what_the_smaller_one_does
""".split()

# Names of tests of many nets, models or files, of whose sweep every second case runs.
HALVED = """
test_architectures_as_their_libraries_draw_them_are_fresh test_attention_at_other_ratios
test_branches_of_a_public_architecture test_branches_of_every_public_architecture test_every_place
test_half_of_every_public_architecture
test_random_transformers_with_several_lengths_and_masks
test_every_public_architecture test_other_families test_rows_of_public_architectures
test_a_budget_is_met_where_any_widths_meet_it test_a_dropped_branch_is_a_branch_of_zeros
test_a_later_call_with_any_masks_and_lengths test_a_model_that_caches_is_untouched
test_a_tampered_plan test_a_wrong_command_ends_with_a_message test_every_unaligned_budget_is_spent
test_form test_gradient_criteria_are_their_formulas test_nothing_is_generated_for_transformers
test_odd_places_are_refused test_predictions_for_a_plan_are_what_the_slim_model_has
test_rows_of_heads_and_groups test_structures_with_dead_units_compute_the_same
""".split()

# Long tests of what a shorter one shows, too: fewer blocks, other architectures, less memory.
SELDOM = """
test_a_large_vocabulary_takes_a_few_times_its_weights_in_single_precision
test_work_grows_linearly_to_100_blocks
""".split()

# Modules whose sweeps are the only tests of some lines: where coverage is measured, they count.
COVERING = """
test_rebuildable test_transformers_call test_stored_models test_data_forms test_timm test_part
test_yolo test_cli test_cli_models test_cli_pretrained test_whole_layers
test_checkpoints test_checkpoints_biases test_checkpoints_resumed test_processes test_walk
test_synthetic_texts test_synthetic_vision test_frontier test_branch_losses test_massive
""".split()

# Tests in them that take long and run few lines of their own.
LONG = """
test_other_families test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes
test_a_sharded_model_is_shrunk_and_trained_on test_families_come_back_without_depcut
test_shrink_to_a_share_of_the_time test_the_only_layer_of_a_kind_stays
test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space
test_a_shrunk_llama_comes_back_in_a_process_without_depcut
""".split()

# Tests of the source tree, which any change may break: they run by default, untraced as they are.
ALWAYS = """
test_every_test_asserts_on_every_path test_functions_import_heavy_libraries_and_nothing_else
test_one_module_writes test_private_names_stand_in_one_module_a_library
test_the_picture_and_the_table_of_folders_are_up_to_date
test_what_scripts_import_is_declared
test_what_the_package_imports_is_declared_and_the_other_way_round
""".split()

_LONG = 277  # of those that run no line of their own, left to the sweep by default

EVERY = dict.fromkeys(SIXTH, 6) | dict.fromkeys(THIRD, 3)
OF_SWEEP = dict.fromkeys(THINNED, 12) | dict.fromkeys(HALVED, 2)


def share_out(items: Sequence[pytest.Item]) -> None:
    """Mark the cases that are left to the sweep, or to who asks for all of them.

    Args:
        items: All tests that were collected.
    """
    whole = os.environ.get("DEPCUT_TESTS") == "whole"
    cases = defaultdict[tuple[str, str], list[pytest.Item]](list)
    thinned = defaultdict[tuple[str, str], list[pytest.Item]](list)
    longest_first = untraced()
    without, long = {*longest_first}, {*longest_first[:_LONG]}
    for item in items:
        name = getattr(item, "originalname", item.name)
        if f"{item.path.name}::{name}" in without:
            item.add_marker(pytest.mark.no_cover)
        if name in SELDOM:
            _leave_to_exhaustive(item)
        elif whole and item.path.stem in COVERING and name not in LONG:
            _run_by_default(item)
        if item.get_closest_marker("sweep") and name in OF_SWEEP:
            thinned[item.nodeid.partition("::")[0], name].append(item)
        left = any(item.get_closest_marker(mark) for mark in ("sweep", "exhaustive"))
        if left or name in ALWAYS:
            continue
        if not whole and (name in NONE or f"{item.path.name}::{name}" in long):
            item.add_marker(pytest.mark.sweep)
        elif name in EVERY:
            cases[item.nodeid.partition("::")[0], name].append(item)
    for (_, name), found in thinned.items():
        share = OF_SWEEP[name]
        first = zlib.crc32(name.encode()) % share
        for item in (item for number, item in enumerate(found) if number % share != first):
            _leave_to_exhaustive(item)
    for (_, name), found in cases.items():
        for number, item in enumerate(found):
            turn = number % EVERY[name]
            others_run_it = f"{item.path.name}::{name}" in without
            if turn and (others_run_it or (turn != 3 and name in SIXTH)):
                item.add_marker(pytest.mark.exhaustive)
            elif turn and not whole:
                item.add_marker(pytest.mark.sweep)


def _run_by_default(item: pytest.Item) -> None:
    item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "sweep"]


def _leave_to_exhaustive(item: pytest.Item) -> None:
    _run_by_default(item)
    item.add_marker(pytest.mark.exhaustive)
