"""Faults of one line each, over all rooms and scripts, and for each the test that must catch it.

    make mutants                                   # all of them, in ten minutes on two cores
    python tests/mutants.py lora --jobs 1          # those in whose words, file or test "lora" stands

A fault is made in a temporary copy of the repository, never in the working tree. There its test must fail, which passes
without it: this is tried first, for all the tests together. Exit code 1 unless every fault is caught.
"""

import argparse
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "logs", "build", "*.egg-info")
PATIENCE = 300  # seconds for one test
FORKS = multiprocessing.get_context("forkserver")  # one process imports what takes seconds, and is forked for each test
HEAVY = ["pytest", "peft", "torch.distributed.fsdp", "transformers.models.llava.modeling_llava"]
HEAVY += ["transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.whisper.modeling_whisper"]
VERDICTS = {0: "SURVIVED", 1: "caught", None: "hangs"}  # by pytest's exit code; any other: the test did not run


class Fault(NamedTuple):
    """`old`, which stands in `file` exactly once, becomes `new`; `test` is a pytest node ID."""

    what: str
    file: str
    old: str
    new: str
    test: str


RESUMED = "tests/runtime/test_resume.py::test_stopped_after_any_step_and_resumed_it_is_the_same_run"
RESUMED += "[4-metrics complete]"
# {file: [(what the fault breaks, old, new, test)]}
# fmt: off
FAULTS = {
    # ---- common.py: what decides the weights and the answers ----
    "common.py": [
        ("the image token's ID is computed from the vocabulary, not read",
         "token_id, rows = named.pop()", "token_id, rows = config.get_text_config().vocab_size - 1",
         "tests/common/test_token_ids.py::test_image_token_id_is_read_not_computed"),
        ("a placeholder takes the ID of a word piece",
         "if known != token_id:", "if known is None:",
         "tests/common/test_token_ids.py::test_register_placeholder_refuses_another_id_than_the_tokenizer_s"),
        ("a PAD that is EOS stays",
         "if pad in (None, eos):", "if pad is None:",
         "tests/common/test_token_ids.py::test_pad_equal_to_eos_masks_eos_and_is_separated"),
        ("an embedding larger than its tokenizer is shrunk",
         ">= model.get_input_embeddings().weight.shape[0]", "!= model.get_input_embeddings().weight.shape[0]",
         "tests/common/test_token_ids.py::test_a_padded_embedding_only_ever_grows"),
        ("rows of new tokens are drawn at random",
         "module.weight[:old].mean(0)", "torch.randn_like(module.weight[old:])",
         "tests/common/test_token_ids.py::test_grown_rows_are_the_mean_of_the_others_and_the_same_each_time"),
        ("training shows what the template writes before an answer, not what it asks with",
         "prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
         "prompt = tokenizer.apply_chat_template(answered, tokenize=False).partition(opening)[0]",
         "tests/inputs/test_prompts.py::test_the_trained_prompt_is_that_of_transformers_processor"),
        ("another chat template is not used while the process lives",
         'state = f"{tokenizer.chat_template} ', 'state = f"',
         "tests/inputs/test_prompts.py::test_a_question_is_rendered_once_for_all_images_and_anew_in_another_template"),
        ("an answer that another tokenizer state gave is taken from memory",
         "_encode(tokenizer, len(tokenizer), text", "_encode(tokenizer, 0, text",
         "tests/common/test_masking.py::test_a_tokenizer_that_grew_is_split_anew"),
        ("the BOS that the tokenizer puts first is left out",
         "return missing + input_ids, [IGNORE] * len(missing) + labels", "return input_ids, labels",
         "tests/common/test_masking.py::test_what_the_tokenizer_itself_puts_first_stands_there_once"),
        ("EOS is not supervised",
         "tokenizer.eos_token_id, start) + 1", "tokenizer.eos_token_id, start)",
         "tests/common/test_masking.py::test_any_answer_is_supervised_character_for_character"),
        ("EOS is not supervised where sentinels are kept",
         "(tokens[end + 1 : end + 2], 1)", "(tokens[end + 1 : end + 2], 0)",
         "tests/common/test_masking.py::test_kept_sentinels_become_their_ordinary_pieces_and_are_not_supervised"),
        ("the question is supervised, too",
         "parts = (asked, 0)", "parts = (asked, 1)",
         "tests/common/test_masking.py::test_any_answer_is_supervised_character_for_character"),
        ("a merge of pieces crosses the edge of the answer",
         "joined[:start] == asked and ", "",
         "tests/common/test_masking.py::test_no_merge_crosses_an_edge_of_the_answer"),
        ("tokens added after the first text are not known to the splitter",
         "_splitter(tokenizer, size)", "_splitter(tokenizer, 0)",
         "tests/common/test_masking.py::test_a_tokenizer_that_grew_is_split_anew"),
        ("every image stands for as many tokens as the first",
         "(next(left) if", "(counts[0] if",
         "tests/common/test_masking.py::test_expand_placeholder_repeats_each_by_its_own_count"),
        ("features that no placeholder waits for are dropped",
         "!= len(features):", "> len(features):",
         "tests/common/test_masking.py::test_another_number_of_features_than_placeholders_is_refused_with_both"),
        ("--seed does not change the order of the data",
         '{args.seed} {epoch}', '{epoch}',
         "tests/common/test_packing.py::test_plan_depends_on_seed_and_epoch_alone"),
        ("every epoch has the same order",
         '{args.seed} {epoch}', '{args.seed}',
         "tests/common/test_packing.py::test_plan_depends_on_seed_and_epoch_alone"),
        ("an epoch is drawn from the order of the one before",
         "parts.copy(), 0", "parts, 0",
         "tests/common/test_packing.py::test_every_epoch_is_drawn_from_the_order_of_the_data"),
        ("positions of a branch begin again at 0",
         "(after + torch.arange(len(part_ids)))", "(torch.arange(len(part_ids)))",
         "tests/common/test_packing.py::test_a_packed_sequence_has_the_written_layout"),
        ("M-RoPE positions continue from the number of tokens, not from the largest position",
         "int(prefix_positions.max()) + 1 if", "len(tree.prefix) if",
         "tests/common/test_packing.py::"
         "test_mrope_branches_continue_from_the_largest_prefix_position_in_all_three_rows"),
        ("a question that is asked twice counts once",
         "if repeats and supervised_tokens(answered) and not supervised_tokens(labels[:n]):",
         "if repeats and supervised_tokens(answered):",
         "tests/common/test_packing.py::"
         "test_the_turns_of_a_conversation_are_read_once_and_equal_separate_sequences"),
        ("an earlier turn of a conversation is not supervised",
         "branches[-1] = input_ids, answered + labels[n:]", "branches[-1] = input_ids, labels",
         "tests/common/test_packing.py::"
         "test_the_turns_of_a_conversation_are_read_once_and_equal_separate_sequences"),
        ("a prefix is seen by other documents",
         "(same_document & not_after & own_or_prefix)", "(not_after & own_or_prefix)",
         "tests/common/test_packing.py::test_visible_is_the_written_rule"),
        ("a question sees the questions and answers before it",
         "(same_document & not_after & own_or_prefix)", "(same_document & not_after)",
         "tests/common/test_packing.py::test_visible_draws_the_picture_in_the_source"),
        ("a token sees what follows it",
         "(same_document & not_after & own_or_prefix)", "(same_document & own_or_prefix)",
         "tests/common/test_packing.py::test_visible_is_the_written_rule"),
        ("every layer makes a mask of its own",
         "attention_mask=bias, position_ids", "attention_mask=mask, position_ids",
         "tests/runtime/test_attention.py::test_all_layers_keep_one_mask_for_the_backward_pass"),
        ("a question sees the questions before it where attention goes in pieces",
         "gaps = seen != torch.arange(1, keys + 1) - starts", "gaps = starts < 0",
         "tests/runtime/test_attention.py::test_attention_in_pieces_equals_that_over_the_complete_sequence"),
        ("labels are not shifted: each token predicts itself",
         "targets = labels[:, 1:]", "targets = labels[:, :-1]",
         "tests/common/test_packing.py::test_supervised_loss_is_cross_entropy_over_the_full_logits"),
        ("the loss is each sequence's mean, not the sum",
         'targets[supervised], reduction="sum")', 'targets[supervised], reduction="mean")',
         "tests/common/test_packing.py::test_supervised_loss_is_cross_entropy_over_the_full_logits"),
        ("a rank without a tree of its own supervises another's again",
         "[(ids, [IGNORE] * len(ids)) for ids, _ in p.branches]", "p.branches",
         "tests/common/test_packing.py::test_for_a_rank_without_a_tree_of_its_own_nothing_is_supervised"),
        ("LoRA's B does not begin at zero",
         "torch.zeros(base.out_features", "torch.ones(base.out_features",
         "tests/common/test_lora.py::test_training_starts_from_the_model_as_it_was"),
        ("LoRA's dropout is always on",
         "self.dropout(x)", "F.dropout(x, self.dropout.p)",
         "tests/common/test_lora.py::test_dropout_acts_on_the_adapter_alone_and_only_in_training"),
        ("the layer under an adapter is not frozen",
         "base.requires_grad_(False)", "base",
         "tests/common/test_lora.py::test_the_layer_underneath_is_frozen"),
        ("adapters are not scaled by alpha / r",
         "small = self.scaling * F.linear", "small = F.linear",
         "tests/common/test_lora.py::test_a_merged_model_gives_the_logits_of_the_unmerged"),
        ("an adapter is merged as often as it is asked",
         "model.set_submodule(name, layer.base_layer)", "pass",
         "tests/common/test_lora.py::test_merge_adds_scaling_b_a_once"),
        ("half of Phi-3's layers is adapted without a word",
         "if left:", "if False:",
         "tests/common/test_lora.py::test_a_decoder_layer_that_the_pattern_knows_in_part_is_refused_by_name"),
        ("what was trainable before stays trainable",
         "requires_grad_(name in chosen)", "requires_grad_(parameter.requires_grad or name in chosen)",
         "tests/common/test_lora.py::test_only_adapters_and_projector_move"),
        ("adapters are kept in the base's bfloat16",
         "base.in_features, dtype=torch.float32", "base.in_features, dtype=base.weight.dtype",
         "tests/common/test_lora.py::test_float32_adapters_keep_an_update_that_bfloat16_loses"),
        ("a model is given the first token of the answer that it is asked for",
         "(input_ids[:start], labels[:start])", "(input_ids[: start + 1], labels[: start + 1])",
         "tests/common/test_answering.py::test_answering_prompt_cuts_before_the_first_supervised_token"),
        ("decoding feeds each token at the position of the one before",
         "[..., own] + step,", "[..., own] + step - 1,",
         "tests/common/test_answering.py::test_decode_is_token_for_token_what_generate_gives"),
        ("a constrained answer may begin as one candidate and end as another",
         "if tokens[:step] == answers[b]", "if len(tokens) > step",
         "tests/common/test_answering.py::test_a_constrained_answer_is_always_exactly_one_of_the_allowed"),
        ("a candidate sees those that stand before it",
         '((batch["branch"] == 0) | path.to(sees.device))', "True",
         "tests/common/test_answering.py::test_log_probabilities_equal_separate_forward_passes"),
        ("candidates are at the positions where they stand in the sequence",
         " - (sees.sum(-1) - mask.sum(-1))[0]", "",
         "tests/common/test_answering.py::test_log_probabilities_equal_separate_forward_passes"),
        ("the least likely candidate is taken",
         "max(probabilities, key=", "min(probabilities, key=",
         "tests/common/test_answering.py::test_answers_are_greedy_constrained_or_ranked"),
        ("a question that was not answered counts as right",
         '{"prediction": None}', '{"prediction": example.answer}',
         "tests/common/test_answering.py::test_every_example_has_a_record_and_one_without_an_answer_is_wrong"),
    ],
    "inputs/building.py": [
        ("questions about different images share a prompt tree",
         "(id(prefix), repr(media)) if", "id(prefix) if",
         "tests/common/test_trees.py::test_questions_of_an_image_share_a_tree_in_the_order_of_their_appearance"),
        ("a text may hold EOS or another special token",
         "if token.special or i in placeholders", "if i in placeholders",
         "tests/common/test_trees.py::test_an_example_that_cannot_be_used_is_named_and_takes_no_other_with_it"),
        ("what is supervised is not compared with the answer",
         "if decoded != example.answer +", "if not decoded.endswith(task.tokenizer.eos_token) and example.answer +",
         "tests/common/test_masking.py::test_exactly_the_answer_and_its_eos_must_be_supervised"),
        ("a branch may begin with a supervised token",
         "if labels[0] != common.IGNORE:", "if False:",
         "tests/common/test_masking.py::test_a_branch_that_begins_with_a_supervised_token_is_refused"),
        ("an example longer than a packed sequence is no fault",
         "if length > task.args.pack_tokens:", "if length > 2 * task.args.pack_tokens:",
         "tests/common/test_trees.py::test_an_example_longer_than_a_packed_sequence_is_a_fault_with_a_remedy"),
    ],
    # ---- runtime: what keeps a run alive ----
    "runtime/saving.py": [
        ("the manifest is not checked",
         "if sha256(folder / name) != digest:", "if sha256(folder / name) == digest and False:",
         "tests/runtime/test_resume.py::test_resume_of_a_broken_folder_is_refused"),
        ("a checkpoint is written in place",
         "with replacing(folder) as temporary:", "folder.mkdir()\n        for temporary in [folder]:",
         "tests/runtime/test_resume.py::test_a_kill_while_saving_leaves_the_earlier_checkpoints_complete"),
        ("the best checkpoint goes with the old ones",
         " - {folder_of(run, best)}", "",
         "tests/runtime/test_best.py::test_what_answers_is_the_checkpoint_of_the_lowest_validation_loss"),
        ("later checkpoints stay where a run goes back to an earlier one",
         "if folder > folder_of(run, step):", "if False:",
         "tests/runtime/test_resume.py::test_resume_of_an_earlier_checkpoint_starts_from_there"),
    ],
    "runtime/checkpoints.py": [
        ("the best checkpoint that is loaded again is no more said to be the best",
         "return [last, best, step]", "return [last, 0, step]",
         "tests/runtime/test_best.py::test_what_answers_is_the_checkpoint_of_the_lowest_validation_loss"),
        ("a resumed run forgets the optimizer's state",
         "        if start:", "        if False:",
         RESUMED),
        ("a run is resumed at the wrong step",
         'return state["step"]', 'return state["step"] - 1',
         RESUMED),
        ("a run is resumed with other settings",
         "if changed and not anyway:", "if False:",
         "tests/runtime/test_resume.py::test_a_changed_setting_is_refused_by_name"),
        ("a checkpoint of a time before a flag is none of this script's",
         'return value is None or value is False or value == ""', "return False",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py::test_what_a_checkpoint_does_not_know_was_off"),
        ("a run is resumed with other answers in the data",
         "t.media, t.branches) for t in trees)", "t.media) for t in trees)",
         "tests/runtime/test_resume.py::test_a_changed_answer_in_the_data_is_refused"),
        ("what was trained is lost where the model's weights cannot be read again",
         "except OSError as error:", "except ZeroDivisionError as error:",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py"
         "::test_weights_that_go_while_they_are_trained_on_cost_no_step"),
        ("a run is resumed with weights that are others within their file",
         "if others and not anyway:", "if False:",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py::test_zeroes_within_the_weights_are_another_model[train]"),
    ],
    "runtime/optimizers.py": [
        ("an optimizer's file without any state is resumed from",
         "if not names or shapes", "if shapes",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py"
         "::test_a_checkpoint_that_is_complete_but_none_of_ours_is_refused[optimizer of no tensors]"),
        ("weight decay shrinks biases and the scales of norms",
         "args.weight_decay if parameter.ndim > 1 else 0.0", "args.weight_decay",
         "tests/runtime/test_resume.py::test_weight_decay_is_of_matrices_alone"),
    ],
    "runtime/lock.py": [
        ("a run whose folder another has taken over saves all the same",
         'if text_of(run / "lock") not in (None, json.dumps(process(os.getpid()))):', "if False:",
         "tests/runtime/test_survival.py::test_a_run_whose_folder_was_taken_over_saves_nothing_more"),
        ("a process number of another container is looked up in this one",
         "if owner.items() >= place().items():", 'if owner.get("host") == socket.gethostname():',
         "tests/runtime/test_survival.py::test_a_lock_of_another_container_with_this_host_name_is_watched_too"),
        ("a run whose folder was renamed makes a new one",
         "if not path.exists() or (", "if (",
         "tests/runtime/test_survival.py::test_a_run_whose_folder_goes_ends_and_makes_no_new_one"),
        ("the lock of a living run is ignored",
         'if owner == process(owner["pid"]):', "if False:",
         "tests/runtime/test_survival.py::test_a_second_run_on_the_same_folder_is_refused"),
    ],
    "runtime/files.py": [
        ("files are written in place",
         'temporary = path.with_name(path.name + ".writing")', "temporary = path",
         "tests/runtime/test_survival.py::test_a_kill_while_a_file_is_replaced_leaves_the_old_one"),
        ("what a run writes is readable to one user alone, whatever the umask",
         "path.chmod(0o666 & ~mask)", "pass",
         "tests/scripts/test_modes.py::test_every_file_has_the_permissions_that_the_umask_gives"),
        ("a merge that ends early leaves a model behind",
         "shutil.rmtree(temporary, ignore_errors=True)  # the room is needed", "pass",
         "tests/scripts/test_modes.py::test_a_merge_that_does_not_end_leaves_no_model"),
    ],
    "runtime/metrics.py": [
        ("--overfit ends before all is learned",
         "for tree in trees) < math.log(2)", "for tree in trees) < math.inf",
         "tests/scripts/test_modes.py::test_overfit_answers_every_example_right_or_exits_1"),
        ("the epoch is computed from --epochs, however early --max-steps ends the run",
         "self.run.epochs[step - 1]", "step / self.total * self.run.args.epochs",
         "tests/runtime/test_resume.py::test_the_epoch_counts_passes_over_the_data_however_early_the_run_ends"),
        ("a number at no step is taken for a validation loss",
         "if type(at) is int and type(loss) is float", "if type(loss) is float",
         "tests/runtime/test_best.py::test_what_is_no_validation_up_to_the_newest_checkpoint_chooses_nothing"),
        ("a run that --patience has ended trains on where it is started again",
         "        self.judge(start)\n", "        run.best = lowest(self.val_losses)\n",
         "tests/runtime/test_best.py::test_patience_ends_the_run_and_resumed_it_takes_no_further_step"),
        ("one bad byte in metrics.jsonl keeps a run from being resumed",
         'encoding="utf-8", errors="replace", newline', 'encoding="utf-8", newline',
         "tests/runtime/test_resume.py::test_a_long_metrics_file_with_bad_bytes_is_read_a_line_at_a_time"),
        ("lines of steps that are taken again stay in metrics.jsonl",
         'if line["step"] <= step:', "if line:",
         "tests/runtime/test_resume.py::test_resume_of_an_earlier_checkpoint_starts_from_there"),
    ],
    "runtime/program.py": [
        ("bf16 is computed on cards that only imitate it",
         "including_emulation=False", "including_emulation=True",
         "tests/runtime/test_cuda.py::test_a_card_without_bf16_takes_float32_and_refuses_bf16"),
        ("what was just drawn is measured as the model's own",
         'if args.eval_only and args.resume == "none":', "if False:",
         "tests/scripts/test_predict.py::test_new_parts_answer_nothing[plain]"),
        ("a folder without checkpoints is answered for by the model as it is",
         "if run.checkpoint is None:", "if False:",
         "tests/scripts/test_predict.py::test_a_run_without_checkpoints_is_not_taken_for_the_model_alone"),
        ("signals are ignored",
         "if ranks.any_rank(self.stop.received is not None):", "if False:",
         "tests/runtime/test_resume.py::test_a_signal_stops_after_the_step_with_exit_code_85[between validations]"),
        ("every step draws the same dropout",
         "{self.args.seed} {step} {ranks.rank()}", "{self.args.seed} {ranks.rank()}",
         "tests/runtime/test_resume.py::test_draws_depend_on_seed_step_and_rank_alone"),
    ],
    "runtime/batches.py": [
        ("what a worker cannot hand over is waited for",
         "staticmethod(lambda error, item: os._exit(1))", "staticmethod(lambda error, item: None)",
         "tests/runtime/test_cuda.py::test_a_full_dev_shm_is_said_at_once"),
        ("a rank's packed sequences get each other's media",
         'self.task.read_media(self.data, batch["prompts"])', 'self.task.read_media(self.data, mine[0]["prompts"])',
         "tests/common/test_packing.py::test_accumulation_1x8_equals_8x1_and_the_mean_of_means_does_not"),
        ("a rank takes another's packed sequences",
         "self.of, self.rank)", "self.of, 0)",
         "tests/runtime/test_ranks.py::test_two_ranks_train_and_answer_as_one[lora-ddp]"),
        ("what augments a step is drawn by its number since the run was resumed",
         "list(enumerate(plan, 1))[start:]", "list(enumerate(plan[start:], 1))",
         "tests/runtime/test_resume.py::test_a_stopped_run_with_augmented_media_is_the_same_run[images]"),
    ],
    "runtime/ranks.py": [
        ("gradients of the ranks are averaged, not summed",
         "p.grad = part.view_as(p)", "p.grad = part.view_as(p) / ranks()",
         "tests/runtime/test_ranks.py::test_what_ranks_say_to_each_other_arrives"),
        ("small gradients are enlarged to --clip",
         ".clamp(max=1.0)", "",
         "tests/runtime/test_ranks.py::test_gradients_are_only_ever_scaled_down"),
    ],
    "runtime/flags.py": [
        ("what is no answer is printed among the answers",
         "redirect_stdout(sys.stderr) if args.predict else", "redirect_stdout(sys.stderr) if False else",
         "tests/scripts/test_predict.py::test_one_image_from_the_command_line"),
        ("a dry run of a job that only answers is refused",
         "if len(modes) > 1 and (args.merge or args.predict or not args.check):", "if len(modes) > 1:",
         "tests/runtime/test_flags.py::test_two_modes_at_once_are_refused"),
        ("test is answered although nobody asks for it",
         'metavar="SPLIT", default="val"', 'metavar="SPLIT", default="test"',
         "tests/runtime/test_flags.py::test_test_is_answered_only_when_it_is_asked_for"),
        ("a --clip of 0 is taken, and nothing is learned",
         "lambda x: 0 < x < math.inf", "lambda x: 0 <= x < math.inf",
         "tests/runtime/test_flags.py::test_a_number_that_trains_nothing_or_garbage_is_refused"),
    ],
    "runtime/models.py": [
        ("the terminal is asked whether a model's own Python code may run",
         "AutoConfig.from_pretrained(path, trust_remote_code=False)", "AutoConfig.from_pretrained(path)",
         "tests/runtime/test_startup.py"
         "::test_code_in_a_model_folder_never_runs_and_is_never_asked_about[video_plain_lm-unknown]"),
        ("a part of a model asks so",
         "TIME_OUT_REMOTE_CODE = 0", "TIME_OUT_REMOTE_CODE = 15",
         "tests/runtime/test_startup.py"
         "::test_code_in_a_model_folder_never_runs_and_is_never_asked_about[llava_med-nested]"),
        ("plain transformers opens a model without the parts that a script has grafted on",
         'if words != vlm.config.model_type:', "if False:",
         "tests/scripts/test_surg_video.py::test_what_plain_transformers_and_peft_would_read_by_half_they_refuse"),
        ("a merged model has the number format of the run, not its base's",
         'own_format(folder) if run.args.dtype == "auto" else run.dtype', "run.dtype",
         "tests/scripts/test_modes.py::test_a_merged_model_has_the_base_s_number_format_and_is_rounded_once"),
        ("a weight that the checkpoint lacks is drawn at random",
         "    if missing:", "    if False:",
         "tests/scripts/test_scripts.py::test_a_missing_weight_of_the_language_model_is_refused_in_every_script"),
        ("weights without a place in the model are dropped",
         "if foreign and not part:", "if False:",
         "tests/scripts/test_surg_video.py::test_a_graft_under_other_names_is_not_dropped_silently"),
        ("a chat template in processor_config.json is passed over",
         '"tokenizer_config.json", "processor_config.json")', '"tokenizer_config.json")',
         "tests/scripts/test_scripts.py::test_the_checkpoint_s_chat_template_is_used_wherever_it_stands"),
    ],
    "runtime/original_llava.py": [
        ("LLaVA-Med's weights are merged under their old names, which transformers does not read",
         "    del model._weight_conversions", "    pass",
         "tests/runtime/test_original_llava.py::test_the_adapter_s_card_says_that_its_base_needs_the_script"),
        ("the rows that are added to LLaVA-Med's words are drawn",
         "    common.grow_embeddings(model, rows)", "    model.resize_token_embeddings(rows)",
         "tests/runtime/test_original_llava.py::test_a_tower_that_is_published_pickled_is_refused_with_the_remedy_which_helps"),
        ("a field of a model's configuration that changes what it does is passed over",
         "    if others:", "    if False:",
         "tests/runtime/test_original_llava.py::test_what_is_another_model_is_refused"),
        ("what a clean-up has taken from the cache stays away",
         "if not all((laid / name).is_file() for name in [*files, *links]):", "if not laid.is_dir():",
         "tests/runtime/test_original_llava.py"
         "::test_what_a_clean_up_has_taken_from_the_cache_is_written_again_by_several_jobs_at_once"),
    ],
    "runtime/card.py": [
        ("a merged folder has the checkpoint's image processor, not the run's",
         "    if task.processor is not None:", "    if False:",
         "tests/scripts/test_qwen2vl.py::test_a_merged_folder_opens_alone_and_keeps_the_pixels"),
        ("an adapter names a folder of this machine as its base",
         '{"base_model_name_or_path": run.args.model,', '{"base_model_name_or_path": str(folder),',
         "tests/runtime/test_deployment.py::test_the_base_is_named_as_it_was_given_with_commit_and_license"),
        ("an adapter folder is opened with a processor that cannot count an image's tokens",
         '"processor_config.json") | task.processor_settings', '"processor_config.json")',
         "tests/runtime/test_deployment.py::test_the_base_is_named_as_it_was_given_with_commit_and_license"),
        ("a card has the results of another checkpoint",
         "results=results if of_it else None", "results=results",
         "tests/runtime/test_deployment.py::test_a_card_has_the_results_of_its_own_checkpoint_alone"),
        ("answering writes a card anew, with the model and data of that day",
         "old.partition(RESULTS)[0]", "new.partition(RESULTS)[0]",
         "tests/runtime/test_deployment.py::test_answering_adds_results_to_a_card_and_changes_nothing_else"),
    ],
    "runtime/folders.py": [
        ("the digest of a file is taken for another's of its name",
         'before and before["file"] == file else', "before else",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py::test_zeroes_within_the_weights_are_another_model[train]"),
        ("weights that are cut off are read",
         "tensors = header(path)", "tensors = {}",
         "tests/scripts/test_modes.py::test_truncated_weights_are_refused_by_name"),
        ("a chat template may fill the memory",
         "return os.waitpid(child, 0)[1] != 0", "return os.waitpid(child, 0)[1] is None",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py"
         "::test_a_chat_template_that_would_not_end_is_refused[writes 2 MB]"),
        ("an adapter in a model folder is loaded without a word",
         'if (folder / "adapter_config.json").exists():', "if False:",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py"
         "::test_a_model_folder_with_a_file_that_is_none_is_refused_by_name[an adapter]"),
    ],
    "runtime/adapters.py": [
        ("peft opens an adapter without the parts that a script has grafted on",
         '"peft_type": with_grafts("LORA", model)', '"peft_type": "LORA"',
         "tests/runtime/test_adapters.py"
         "::test_an_adapter_with_parts_that_a_script_alone_reads_is_refused_by_peft_and_opens_here"),
        ("the projector is trained and not saved",
         "plain = trained_plain_modules(model)", "plain = []",
         "tests/runtime/test_adapters.py::test_whatever_is_trained_is_saved"),
        ("an adapter of another shape is broadcast into the model",
         "if places[name].shape != tensor.shape:", "if False:",
         "tests/runtime/test_adapters.py::test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing"),
        ("an adapter is loaded with the scaling of the command line, not its own",
         "layer.alpha, layer.rslora = alpha, rslora", "pass",
         "tests/runtime/test_adapters.py::test_an_adapter_saved_here_loads_here_with_its_own_scaling"),
        ("an adapter that also changes the base weights is loaded without them",
         'used.append("init_lora_weights")', "pass",
         "tests/runtime/test_adapters.py::test_peft_features_that_are_not_supported_are_refused"),
    ],
    "runtime/attention.py": [
        ("FlexAttention lets a token be seen by one more",
         "q < k + seen[k]", "q <= k + seen[k]",
         "tests/runtime/test_cuda.py::"
         "test_flexattention_in_compiled_layers_equals_the_complete_sequence_at_any_length"),
        ("a language model whose attention heeds no mask is trained",
         "if apart > 0.05:", "if False:",
         "tests/scripts/test_video_plain_lm.py::test_a_mask_that_is_not_heeded_is_caught_before_the_first_step"),
    ],
    # ---- inputs: from files to examples and media ----
    "inputs/prompts.py": [
        ("a chat template that leaves a system text out passes",
         'elif part["text"].strip() not in', 'elif False and part["text"] not in',
         "tests/scripts/test_several_images.py::test_a_system_text_that_the_template_does_not_write_is_a_fault"),
        ("a prompt that transformers does not write passes the check",
         "if ours[: len(theirs)] == theirs:", "if theirs:",
         "tests/inputs/test_prompts.py::test_a_prompt_that_is_not_transformers_ends_the_check"),
    ],
    "inputs/images.py": [
        ("where an augmented picture shows nothing its corners are black",
         '(0, 0)), "edge")', '(0, 0)), "constant")',
         "tests/inputs/test_augment.py::test_where_nothing_was_its_edge_goes_on"),
        ("an answer sees the images of later turns",
         "names[:shown] if total else names", "names",
         "tests/scripts/test_several_images.py"
         "::test_an_example_has_the_images_up_to_its_turn_and_those_alike_share_a_prefix"),
        ("texts alone of two splits are one group where their IDs are alike",
         "next(iter(names), place)", 'next(iter(names), entry.get("id"))',
         "tests/scripts/test_several_images.py::test_texts_alone_of_two_splits_may_have_the_same_id"),
        ("marks without an image are passed over",
         "if total not in (0, len(names)):", "if False:",
         "tests/scripts/test_several_images.py::test_images_that_nobody_could_place_are_a_fault"),
        ("images lose their colours",
         'image = image.convert("RGB")', 'image = image.convert("L").convert("RGB")',
         "tests/inputs/test_images.py::test_an_image_is_read_with_its_own_colours"),
        ("a photograph is not turned as its camera says",
         "image = ImageOps.exif_transpose(image)", "pass",
         "tests/inputs/test_check.py::test_an_image_is_turned_as_its_camera_says"),
        ("a drawing on transparency becomes one black rectangle",
         'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")',
         "tests/inputs/test_images.py::test_a_dark_drawing_on_transparency_is_laid_over_white_wherever_it_is_opened"),
        ("a white drawing vanishes over white",
         "if over_white and all(", "if False and all(",
         "tests/inputs/test_images.py::test_where_white_leaves_nothing_to_see_the_picture_is_refused"),
        ("the upper 8 of 16 bits are taken for the picture",
         ' or ";16" in f"{image.mode} {image.tile}"', "",
         "tests/inputs/test_images.py::test_sixteen_bits_are_refused_with_advice_that_keeps_what_they_show"),
        ("an image that cannot be read is replaced by a black one",
         'raise ValueError(f"{name} cannot be read: {what}") from None', 'return Image.new("RGB", (72, 72))',
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[truncated image]"),
        ("an image that has changed since the data check is read all the same",
         "if tuple(grid) != self.grid(size):", "if False:",
         "tests/scripts/test_qwen2vl.py::test_an_image_that_has_changed_since_the_check_is_refused"),
    ],
    "inputs/processors.py": [
        ("what the centre crop takes away is not counted",
         'return 1 - min(1.0, crop["width"] / resized[0])', "return 1 - 1.0",
         "tests/inputs/test_processors.py::test_the_share_of_an_image_that_is_cropped_away"),
        ("--image-fit pad squashes",
         "(known[1] if fit == \"pad\" else kind)", "kind",
         "tests/inputs/test_processors.py"
         "::test_an_image_is_cropped_squashed_or_padded_and_transformers_does_the_same_with_what_is_saved"),
    ],
    "inputs/files.py": [
        ("a missing file is replaced by another of the folder",
         'raise ValueError(f"{name} is missing; {remedy(media, name)}") from None', 'return next(media.rglob("*.jpg"))',
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[missing image]"),
        ("files outside the data folder are read",
         'if os.path.isabs(name) or ".." in Path(name).parts:', "if False:",
         "tests/inputs/test_images.py::test_nothing_outside_the_data_folder_is_opened"),
        ("a link's target says of which kind a file is",
         "    return media / name\n", "    return (media / name).resolve()\n",
         "tests/inputs/test_files.py::test_a_file_behind_a_link_is_of_the_kind_that_its_own_name_says"),
        ("frames of a folder are out of order: frame_10 before frame_2",
         "names = in_order(tuple(", "names = sorted(tuple(",
         "tests/inputs/test_videos.py::test_the_same_frames_come_out_of_every_kind_of_video"),
    ],
    "inputs/video_files.py": [
        ("a list of other files is played",
         'options={"format_whitelist": FORMATS}', "options={}",
         "tests/inputs/test_video_files.py::test_a_file_that_is_damaged_is_refused_with_its_name_and_the_time"
         "[a list of other files-mp4-cannot be read: Invalid argument; copy it again, or write it anew]"),
        ("what an editor has cut away is shown",
         " and not found.is_discard", "",
         "tests/inputs/test_video_files.py::test_what_an_editor_has_cut_away_is_not_shown_and_sound_may_begin_first"),
        ("of a video file the frame before the wanted one is shown",
         "self.seconds(shown.pts) + self.seconds(after.pts) < 2 * self.at",
         "self.seconds(after.pts) < self.at - ROUNDING",
         "tests/inputs/test_video_files.py::test_frames_are_those_that_pyav_decodes_in_their_order[short_gop.mp4]"),
        ("the first keyframe that a seek finds is believed to come before",
         "for back in (0, 1, 10, 60, math.inf)", "for back in (0,)",
         "tests/inputs/test_video_files.py::test_frames_are_those_that_pyav_decodes_in_their_order[refresh.mp4]"),
    ],
    "inputs/videos.py": [
        ("an animation of any size is decoded",
         "if count * image.width * image.height > 40 * largest:", "if False:",
         "tests/inputs/test_videos.py::test_an_animation_that_would_take_long_to_decode_is_refused_before_that"),
        ("frames that the data name out of order are taken",
         "numbers != sorted(numbers):", "numbers == []:",
         "tests/scripts/test_surg_video.py::test_every_fault_is_named_with_file_row_and_remedy"),
        ("frames whose names run backwards are taken",
         "if own != sorted(own):", "if False:",
         "tests/inputs/test_videos.py::test_a_list_of_frames_that_contradicts_its_numbers_is_refused"),
        ("frames that are missing from a video are not said",
         "numbered.uneven(tuple(files))", "None",
         "tests/scripts/test_video_plain_lm.py"
         "::test_missing_frames_are_noticed_once_with_how_many_examples_and_the_videos_are_read"),
        ("the last frame of a clip is never shown",
         "round(i * (count - 1) / max(1, n - 1))", "i * count // n",
         "tests/inputs/test_videos.py::test_frames_are_chosen_evenly_with_the_first_and_the_last"),
        ("parts of one video file may be in two splits",
         "list(dict.fromkeys([*groups, video] if in_file(video) else groups))", "list(groups)",
         "tests/scripts/test_clips_in_files.py"
         "::test_parts_of_one_file_and_frames_that_are_shown_twice_may_not_be_in_two_splits[video_plain_lm]"),
    ],
    "inputs/volumes.py": [
        ("of a volume that shrinks most voxels are never looked at",
         "if new > old:", "if True:",
         "tests/inputs/test_volumes.py::test_a_lesion_of_one_voxel_leaves_a_trace_wherever_it_is_and_the_mean_stays"),
        ("the background of a volume is normalised, too",
         "tissue = channel != 0", "tissue = channel == channel",
         "tests/inputs/test_volumes.py::test_a_volume_is_normalised_over_its_tissue_and_the_background_stays_zero"),
    ],
    "inputs/scans.py": [
        ("left and right of a volume are as its file has them",
         "nibabel.apply_orientation(voxels, nibabel.io_orientation(affine))", "voxels",
         "tests/inputs/test_volumes.py::test_whatever_way_the_axes_run_left_stays_left"),
        ("a packed file is not read to its end, where its checksum is",
         "min(end + more, most) + 1)", "min(end + more, most))",
         "tests/inputs/test_scans.py::test_wherever_a_bit_of_a_packed_file_is_flipped_no_wrong_voxel_is_read"),
        ("of two orientations that contradict each other one is taken",
         "if np.linalg.det(turn) < 0 or (turn.diagonal() < 0.1).any():", "if False:",
         "tests/inputs/test_scans.py::test_a_header_that_contradicts_itself_is_refused"),
    ],
    "inputs/numbered.py": [
        ("0.5 comes before 0.25",
         "POINT + '|'", "''",
         "tests/inputs/test_numbered.py::test_names_are_in_the_order_of_their_numbers"),
        ("a series with frames missing is taken",
         "2 * step >= 3 * min(steps)", "False",
         "tests/inputs/test_volumes.py::test_a_series_with_a_frame_missing_or_another_file_in_it_is_refused"),
    ],
    "inputs/sound.py": [
        ("an offset is taken for sound",
         "tenths.var(axis=1, dtype=np.float64)", "(tenths.astype(np.float64) ** 2).mean(axis=1)",
         "tests/inputs/test_sound.py::test_what_is_silent_is_decided_by_a_level_about_the_mean"),
        ("a recording that is cut off is heard as it is",
         "        if size > left:", "        if left > size > left:",
         "tests/inputs/test_sound.py::test_recordings_that_cannot_be_heard_are_refused_by_name"),
        ("sound behind the declared end is not heard",
         'if b"data" in chunks and not (', "if False and (",
         "tests/inputs/test_sound.py::test_sound_behind_a_declared_end_is_a_fault"),
        ("of an MP3 without a length soundfile reads what it guesses",
         "if not counted and max(sizes)", "if False and max(sizes)",
         "tests/inputs/test_sound.py::test_an_mp3_that_does_not_say_its_length_is_read_where_its_frames_are_of_one_size"),
    ],
    "inputs/features.py": [
        ("features that are not as they were written are taken from the cache",
         "if digest_of(path.name, {\"features\": found}) == carried else", "if True else",
         "tests/scripts/test_video_plain_lm.py::test_no_flipped_bit_of_an_entry_of_the_cache_is_read"),
        ("features of another tower are taken from the cache",
         "json.dumps([self.tower, ", "json.dumps([",
         "tests/scripts/test_video_plain_lm.py::test_whatever_features_depend_on_misses_the_cache_when_it_changes"),
    ],
    "inputs/labels.py": [
        ("an answer is read to a label that it denies",
         "if words not in known:", "if False:",
         "tests/inputs/test_labels.py::test_no_answer_is_read_to_a_label_that_it_denies"),
        ("words that occur with one label alone are known from it",
         "if len(labels) > 1)", "if labels)",
         "tests/inputs/test_labels.py::test_words_that_occur_with_one_label_alone_are_not_known_from_it"),
        ("labels are ranked in words that tell whether two scans are alike",
         "if due <= seen", "if set(labels) <= seen",
         "tests/inputs/test_labels.py::test_a_comparison_is_read_by_its_metadata_and_ranked_in_words_that_do_not_tell_what_is_the_same"),
    ],
    "inputs/questions.py": [
        ("options are allowed as texts where training answers with their letters",
         "usual.most_common(1)[0][0] if usual else", "",
         "tests/inputs/test_questions.py::test_options_are_allowed_in_the_forms_in_which_training_answers"),
        ("candidates come from test answers, too",
         'training = [example for example in examples if example.split == "train"]', "training = examples",
         "tests/scripts/test_qwen2vl.py::test_test_answers_never_become_candidates"),
        ("an answer of punctuation alone is supervised",
         "if says_nothing(answer):", "if not answer:",
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[answer without a letter]"),
    ],
    "inputs/task.py": [
        ("a list is learned as Python writes it",
         "isinstance(value, str) or type(value) in (int, float)", "True",
         "tests/inputs/test_questions.py::test_what_is_no_text_is_a_fault_that_says_what_to_write"),
        ("duplicate IDs are accepted",
         "if other != example.where:", "if False:",
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[duplicate ID]"),
        ("every epoch augments an image alike",
         "{self.args.seed} {self.step} {tree.ids[0]}", "{self.args.seed} {tree.ids[0]}",
         "tests/inputs/test_augment.py::test_it_is_drawn_from_seed_step_and_example_alone"),
        ("a group's split is drawn anew each time",
         "random.Random(group).random()", "random.random()",
         "tests/inputs/test_layouts.py::test_added_and_reordered_rows_move_no_image_to_another_split"),
    ],
    "inputs/texts.py": [
        ("a file that cannot be read is left out with --skip-bad",
         "Problem(path.name, None, str(error), fatal=True)\n        return",
         "Problem(path.name, None, str(error))\n        return",
         "tests/inputs/test_files.py::test_a_file_that_cannot_be_read_ends_the_run_also_with_skip_bad"),
        ("half a character is found only where predictions.jsonl is written",
         "    if re.search(", "    if False and re.search(",
         "tests/inputs/test_files.py::test_odd_json_is_a_fault_of_its_line_alone"),
        ("of a field that is there twice the last counts",
         "        if found[name] != value:", "        if False:",
         "tests/inputs/test_files.py::test_odd_json_is_a_fault_of_its_line_alone"),
        ("absolute names stay absolute in what is written",
         "return str(path.relative_to(root)) if path.is_relative_to(root) else value", "return value",
         "tests/inputs/test_files.py::test_media_are_found_in_another_folder_also_by_absolute_names"),
    ],
    "inputs/layouts.py": [
        ("a question is heard in its other wording",
         'wording = "in" if file.startswith("in_") else "out"', 'wording = "out"',
         "tests/inputs/test_surgvivqa_layout.py::test_recordings_are_found_wherever_they_are_kept"),
    ],
    "inputs/turns.py": [
        ("what was said before a question is not read",
         "        history.append((", "        _ = ((",
         "tests/inputs/test_layouts.py::test_a_conversation_gives_a_row_an_answer_with_the_turns_before_it"),
    ],
    "inputs/fields.py": [
        ("a misspelt field is passed over",
         "    if meant:", "    if False:",
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[misspelt field]"),
        ("a second image is passed over",
         "    if any(is_medium(", "    if False and any(is_medium(",
         "tests/inputs/test_fields.py::test_a_field_that_changes_what_is_asked_or_shown_is_never_passed_over"),
        ("options are passed over",
         "    if (OPTIONS.fullmatch(parts(name)[0])", "    if (False",
         "tests/inputs/test_fields.py::test_a_field_that_changes_what_is_asked_or_shown_is_never_passed_over"),
        ("a patient is no group",
         "found = one_name(grouped, named[grouped]) if grouped else None", "found = None",
         "tests/inputs/test_fields.py::test_a_patient_is_the_group_by_its_usual_names"),
        ("an official split is overridden",
         "        split = split_of(name, others[name], split)", "        pass",
         "tests/inputs/test_fields.py::test_an_official_split_is_kept"),
        ("7.0 is another patient than 7",
         "isinstance(value, float) and value.is_integer()", "False",
         "tests/inputs/test_fields.py::test_a_patient_is_the_same_whether_pandas_has_written_a_fraction_or_not"),
        ("a kind of procedure is a group",
         "not (loose and not", "not (False and not",
         "tests/inputs/test_fields.py::test_the_columns_of_published_data_are_no_faults"),
    ],
    "inputs/content.py": [
        ("a mirrored scan is another one",
         "min(planes, planes[::-1])", "planes",
         "tests/inputs/test_content.py::test_a_scan_is_the_same_in_whatever_container_header_and_direction"),
    ],
    "inputs/data_check.py": [
        ("a fault of this machine is kept when the machine has been mended",
         "if not kept and not unread:", "if not kept:",
         "tests/inputs/test_check.py::test_what_could_not_be_read_is_not_kept_because_it_may_be_of_the_machine"),
        ("images that are others under the same name are trained on where a run is resumed",
         "fingerprint((name, digests[name]) for", "fingerprint(name for",
         "tests/runtime/test_what_a_checkpoint_is_bound_to.py"
         "::test_other_images_and_first_turns_are_another_run[swapped-media]"),
        ("a recording may ask two different questions",
         "in questions.items() if question != asked][:1]", "in questions.items() if not question][:1]",
         "tests/inputs/test_content.py::test_a_recording_asks_one_question_under_whatever_name"),
        ("--skip-bad leaves out any share",
         "> skip_bad\n", "> 2\n",
         "tests/inputs/test_fields.py::test_skip_bad_says_which_share_of_what_goes_and_stops_above_its_limit"),
        ("a file that cannot be read is skipped",
         "(problem for problem in faults if problem.fatal)]", "()]",
         "tests/inputs/test_fields.py::test_a_file_that_cannot_be_read_is_fatal_even_with_skip_bad"),
        ("a group in two splits is accepted",
         '[("video file" if videos.in_file(group) else "group", group, group) for group in example.groups]', "[]",
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[group of train]"),
        ("the same file under another name in two splits is accepted",
         "name, seen[name][2]) for", "name, name) for",
         "tests/inputs/test_check.py::test_a_fault_is_named_with_file_and_row[copy of an image of train]"),
        ("a scorer that fails its audit is believed",
         "if failures:  # on every rank", "if failures and faults:  # on every rank",
         "tests/report/test_audit.py::test_check_audits_the_scorer_before_any_weights_are_read"),
    ],
    "inputs/check_cache.py": [
        ("a restart trusts a file that was written anew with the same size and time",
         "now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino", "now.st_size, now.st_mtime_ns",
         "tests/inputs/test_check.py::test_after_any_change_all_is_opened_again[rewrite]"),
        ("a restart knows nothing of what has changed in the examples",
         "for example in examples:", "for example in examples[:0]:",
         "tests/inputs/test_check.py::test_after_any_change_all_is_opened_again[edit]"),
        ("a restart knows nothing of another Task.measure",
         ", Path(sys.argv[0]).resolve().parent}", "}",
         "tests/inputs/test_check.py::test_other_code_and_another_package_check_anew"),
    ],
    "inputs/contract.py": [
        ("a script whose model is not transformers' own passes the contract",
         "if not abs(ours - own) <=", "if not abs(ours - ours) <=",
         "tests/inputs/test_contract.py::test_what_breaks_the_contract_is_named"),
    ],
    # ---- report: what a result is worth ----
    "report/scoring.py": [
        ('"" is scored as right',
         "exact = predicted == true", "exact = not predicted or predicted == true",
         "tests/report/test_scoring.py::test_wrong_answers"),
        ('"no" is found in "normal"',
         "exact = predicted == true", "exact = all(one in str(prediction) for one in true)",
         "tests/report/test_scoring.py::test_wrong_answers"),
        ('the "A" of "hepatitis A virus" is an article',
         r'r"^(?:an? )+(?=\S)"', r'r"(?<!\S)(?:an? )+(?=\S)"',
         "tests/report/test_scoring.py::test_wrong_answers"),
        ('the "E." of "E. coli" is the label of an option',
         "return behind_point if", "return behind_point if behind_point or",
         "tests/report/test_scoring.py::test_wrong_answers"),
        ('"one hundred" is "1 hundred"',
         'UNITS[1:10]]), "one hundred"]', "UNITS[1:10]])]",
         "tests/report/test_scoring.py::test_normalise"),
        ('"below 2" counts 2',
         "(?:(?:{BEFORE_A_COUNT}) )*", "(?:\\D* )?",
         "tests/report/test_scoring.py::test_counts"),
        ('"two dozen" counts 2',
         "(?: (?:{AFTER_A_COUNT}))*", "(?: \\D*)?",
         "tests/report/test_scoring.py::test_counts"),
        ('"2 ulcers" are right for "2 polyps"',
         "(None in (thing, true_thing) or thing == true_thing)", "True",
         "tests/report/test_scoring.py::test_counts"),
        ("a size takes another's match and keeps it",
         "or find(owner[j], tried)", "or False",
         "tests/report/test_scoring.py::test_many_sizes_are_matched_in_no_time_as_trying_every_order_matches_them"),
        ("a prediction without an end is normalised",
         "if len(text) > LONGEST else", "if len(text) > 100 * LONGEST else",
         "tests/report/test_scoring.py::test_no_prediction_stops_the_scoring[signs of 18 letters each]"),
        ("a size within 20 % of the true one is right",
         "max(1.0, 0.1 * true_low)", "max(1.0, 0.2 * true_low)",
         "tests/report/test_scoring.py::test_sizes"),
        ("63 months are 63 years",
         'said[1] == true[1] or "" in (said[1], true[1])', "True",
         "tests/report/test_numbers.py::test_the_same_number_is_right_unless_the_unit_differs_and_no_other_type_knows_of_it"),
        ("of two numbers the first is read",
         "if len(numbers) == 1 and", "if",
         "tests/report/test_numbers.py::test_what_says_no_number_or_may_be_read_as_another_says_none[63 or 64]"),
        ("a minus that normalising leaves out is left out",
         'number[1].startswith("-") != bool(', "False and bool(",
         "tests/report/test_numbers.py::test_what_says_no_number_or_may_be_read_as_another_says_none[from -5]"),
        ("a synonym counts as an exact match",
         'return {"exact": any(', 'return {"exact": same or any(',
         "tests/report/test_scoring.py::test_synonyms_count_in_a_relaxed_match_alone"),
    ],
    "inputs/predict.py": [
        ("a line that is joined behind another file's is asked with no answer",
         'loads(line.lstrip("\\ufeff"))', "loads(line)",
         "tests/scripts/test_predict.py"
         "::test_lines_as_other_programs_write_them_are_answered_under_names_that_can_be_written"),
        ("the true answer stands before the question that is answered",
         "turns[:-1] if turns[-1].get(role) == name else turns", "turns",
         "tests/scripts/test_predict.py::test_of_a_conversation_the_last_question_is_answered"),
    ],
    "report/compare.py": [
        ("what another model answered counts as this one before training",
         '(*ANSWERED, "model")', "ANSWERED",
         "tests/scripts/test_predict.py::test_a_stale_measure_of_the_model_before_training_is_said"),
    ],
    "report/results.py": [
        ("baselines are told from test answers",
         "blind_answers(train_examples, asked)", "blind_answers(asked, asked)",
         "tests/report/test_baselines.py::test_baselines_are_told_from_training_answers_alone"),
    ],
    "report/baselines.py": [
        ("what was said before a question is unknown to the baselines",
         "*(text for turn in turns for text in turn), example.question]", "example.question]",
         "tests/report/test_baselines.py::test_what_was_said_before_counts"),
        ("spellings of one answer are counted apart",
         "functools.cache(answer_label)", "functools.cache(str)",
         "tests/report/test_baselines.py::test_a_baseline_counts_answers_that_are_the_same_together"),
        ("answers are guessed that are none of the candidates",
         "if not candidates:", "if True:",
         "tests/report/test_baselines.py::test_where_candidates_are_given_only_they_are_guessed"),
    ],
    "report/summary.py": [
        ("the interval is of single questions, not of complete groups",
         '"interval": clustered_interval(right, groups)', '"interval": clustered_interval(right, range(len(right)))',
         "tests/report/test_summary.py::test_intervals_are_of_complete_groups"),
        ("predictions without a number are not counted",
         'found = {"numbers": len(held)}', 'found = {"numbers": len(records)}',
         "tests/report/test_numbers.py::"
         "test_a_prediction_without_a_number_is_wrong_and_counted_and_the_baseline_is_asked_the_same_questions"),
        ("the gain is over the worst baseline",
         "best = max(baselines", "best = min(baselines",
         "tests/report/test_summary.py::test_the_best_baseline_is_the_one_that_counts"),
    ],
    "report/audit.py": [
        ("the audit is switched off",
         "elif verdict is None or verdict:", "elif False:",
         "tests/report/test_audit.py::test_the_audit_fails_on_lenient_scorers"),
    ],
    "report/near_duplicates.py": [
        ("the leakage check is blind to mirrored copies",
         '"mirrored left to right": (slice(None), slice(None, None, -1))', '"mirrored": (slice(None), slice(None))',
         "tests/report/test_leakage.py::test_a_mirrored_copy_is_found_and_called_so"),
    ],
    "report/leakage.py": [
        ("the leakage check looks at an example's first subject alone",
         "for g in e.groups if", "for g in e.groups[:1] if",
         "tests/report/test_leakage.py::test_every_subject_of_an_example_counts"),
        ("what was said before is no part of a question that is asked again",
         "repr([*example.history])", "None",
         "tests/report/test_leakage.py::test_what_was_said_before_is_part_of_the_question"),
    ],
    "report/blind.py": [
        ("blind runs see their media",
         "return task.blank(task.read_media(data, trees))", "return task.read_media(data, trees)",
         "tests/report/test_blind.py::test_every_script_answers_without_seeing[train_llava_med]"),
        ("an image is shown again in another list",
         "if not set(new.shown) & set(owner.shown)", "if new is not owner",
         "tests/scripts/test_several_images.py::test_a_blind_run_shows_no_image_again_in_another_list"),
        ("shuffled media come from the same patient",
         "places = max(sizes.values()) % len(owners) or", "places = 1 or",
         "tests/report/test_blind.py::test_shuffled_media_come_from_another_group_where_they_can"),
    ],
    "report/examples.py": [
        ("examples that others have not answered are left out",
         "    for example in test:\n        record =",
         "    for example in [one for one in test if one.id in answered]:\n        record =",
         "tests/report/test_summary.py::test_examples_that_another_program_has_not_answered_stay_in_it_too"),
    ],
    "report/intervals.py": [
        ("an error's interval is of single questions, not of complete groups",
         "of = {group: i for i, group in enumerate(dict.fromkeys(groups))}\n    if len(of) < 6:",
         "groups = range(len(groups))\n    of = {group: i for i, group in enumerate(groups)}\n    if len(of) < 6:",
         "tests/report/test_numbers.py::test_intervals_are_those_of_drawing_complete_groups_again_and_again"),
    ],
    # ---- the five scripts ----
    "train_llava_med.py": [
        ("every part learns at the same rate",
         'lr * group["scale"]', "lr",
         "tests/runtime/test_optimizers.py::test_the_parts_move_as_with_torch_s_own_groups_and_schedule"),
        ("PAD is taken before the placeholder",
         "        super().__init__(args, models.tokenizer(folder))",
         "        super().__init__(args, models.tokenizer(folder)); self.separate_pad()",
         "tests/scripts/test_llava_med.py::test_a_new_pad_does_not_take_the_id_of_the_image"),
        ("the loss is not divided by the supervised tokens",
         "(batch_loss / supervised).backward()", "batch_loss.backward()",
         "tests/common/test_packing.py::test_accumulation_1x8_equals_8x1_and_the_mean_of_means_does_not"),
        ("the gradient is a mean of the sequences' means",
         "batch_loss, _ = model(batch)", "batch_loss, supervised = model(batch)",
         "tests/common/test_packing.py::test_accumulation_1x8_equals_8x1_and_the_mean_of_means_does_not"),
        ("the seed of a step is dropped",
         "run.seed(step)  #", "pass  #",
         RESUMED),
        ("a step that is not finite is applied",
         "if math.isfinite(loss) and math.isfinite(grad_norm):", "if True:",
         "tests/runtime/test_survival.py::test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported"),
        ("gradients of earlier steps are kept",
         "optimizer.zero_grad(set_to_none=True)", "pass",
         RESUMED),
        ("a stopped run does not save its last step",
         "if stopped or due:", "if due:",
         "tests/runtime/test_resume.py::test_a_signal_stops_after_the_step_with_exit_code_85[between validations]"),
        ("the learning rate does not fall",
         "args.lr * 0.5 * (1 +", "args.lr * (1 + 0 *",
         "tests/scripts/test_scripts.py::test_the_learning_rate_rises_then_falls_as_half_a_cosine"),
        ("dropout is on in a frozen vision tower",
         "vision_tower.train(mode and self.tower_trains)", "vision_tower.train(mode)",
         "tests/scripts/test_scripts.py::test_a_tower_of_images_is_in_training_mode_where_it_is_trained"),
        ("the class token is shown for the last patch",
         "[state[:, 1:] for state in chosen]", "[state[:, :-1] for state in chosen]",
         "tests/scripts/test_llava_med.py::test_features_are_those_of_transformers_own_forward"),
        ("the vision tower stays frozen with --tune full",
         'common.train_only(vlm, r".*")', r'common.train_only(vlm, r"(?!model\.vision_tower\.).*")',
         "tests/scripts/test_scripts.py::test_a_tower_of_images_is_in_training_mode_where_it_is_trained"),
        ("adapters are put into the vision tower, too",
         r'LORA_PATTERN = r"model\.language_model\.layers', r'LORA_PATTERN = r"model\..*\.layers',
         "tests/scripts/test_llava_med.py::test_adapters_stay_out_of_the_tower_whose_layers_have_the_same_names"),
    ],
    "train_qwen2vl_sentinel.py": [
        ("positions of an image are those of a text",
         "return self.images.positions(", "return None and self.images.positions(",
         "tests/scripts/test_qwen2vl.py::test_positions_are_those_of_a_question_alone"),
        ("candidates depend on --limit",
         "    questions.allow_training_answers(examples)  #",
         "    questions.allow_training_answers(examples[: args.limit])  #",
         "tests/scripts/test_qwen2vl.py::test_candidates_do_not_depend_on_the_limit"),
    ],
    "train_surg_video_vqa.py": [
        ("the projector of sound is frozen",
         r'common.train_only(vlm, r"audio_projector\.weight")', "vlm.requires_grad_(False)",
         "tests/scripts/test_surg_video.py::"
         "test_the_projector_is_trained_and_saved_with_the_adapter_and_nothing_else_changes"),
        ("the silence behind a recording is heard instead of it",
         "heard = [one[:n] for", "heard = [one[-n:] for",
         "tests/scripts/test_surg_video.py::test_spoken_questions_side_by_side_equal_separate_sequences"),
        ("the same frames may be in two splits",
         "return [name for name in self.media if name not in self.audio]", "return []",
         "tests/scripts/test_surg_video.py::"
         "test_the_same_recording_may_be_in_two_splits_but_not_the_same_frames"),
    ],
    "train_umbrella_mri.py": [
        ("volumes of a conversation are sorted by modality",
         '[next(found[name]) for name in media["modalities"]]', '[next(found[n]) for n in sorted(media["modalities"])]',
         "tests/scripts/test_umbrella.py::test_two_modalities_in_one_conversation_keep_their_order"),
        ("voxels of a patch are spread over other patches",
         "batch.permute(0, *range(2, last, 2), 1, *range(3, last, 2))",
         "batch.permute(0, *range(3, last, 2), 1, *range(2, last, 2))",
         "tests/scripts/test_umbrella.py::test_a_voxel_changes_exactly_its_own_token"),
    ],
    "train_video_plain_lm.py": [
        ("the tower's class token is shown for a patch",
         "states[:, -math.prod(self.patches) :]", "states[:, : math.prod(self.patches)]",
         "tests/scripts/test_video_plain_lm.py::test_every_feature_stands_at_its_own_position"),
        ("dropout is on in the frozen tower",
         "self.vlm.vision_tower.eval()", "pass",
         "tests/scripts/test_video_plain_lm.py::test_the_tower_has_no_dropout_while_all_else_is_trained"),
        ("the slow path is shown the frames of the fast one",
         "slow += [before + i for i in video.slow]", "slow += [before + i for i in video.fast]",
         "tests/scripts/test_video_plain_lm.py::test_every_feature_stands_at_its_own_position"),
    ],
    "benchmarks/training.py": [
        ("what others make of a conversation has its last answer alone",
         "[max(at) for at in", "[at[-1] for at in",
         "tests/benchmarks/test_training.py::test_all_contestants_have_the_same_losses[conversation]"),
    ],
}
# fmt: on


def chosen(text: str = "") -> list[Fault]:
    """The faults in whose words, file or test `text` stands."""
    faults = [Fault(what, file, *rest) for file, part in FAULTS.items() for what, *rest in part]
    return [fault for fault in faults if any(text in words for words in (fault.what, fault.file, fault.test))]


def copy_of_the_repository(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT))


def run_tests(copy: Path, tests: list[str], patience: float | None = None) -> tuple[int | None, str]:
    """(pytest's exit code, or None where it took too long; what it printed), in a copy of the repository."""
    log = copy.parent / "log"
    process = FORKS.Process(target=in_copy, args=(copy, tests, log))
    process.start()
    process.join(patience)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has started
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def in_copy(copy: Path, tests: list[str], log: Path) -> None:
    """What a forked process does: the tests of the copy, which imports nothing of the working tree."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    sys.path[:] = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests")]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--basetemp", str(copy.parent / "temporary"), *tests]))


def attempt(fault: Fault, copy: Path) -> str:
    """What becomes of a fault, once it is made in the copy."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        return "no longer applies"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, _ = run_tests(copy, ["-x", fault.test], PATIENCE)
    finally:
        path.write_text(text, encoding="utf-8")
    return VERDICTS.get(code, "test did not run")


def on_copies(copies: list[Path], function, items: list):
    """function(item, copy) of every item, in order, as many at a time as there are copies."""
    free = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(item):
        copy = free.get()
        try:
            return function(item, copy)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(one, items)


def refuse_failing(tests: list[str], copies: list[Path]) -> None:
    """Ends the program where a test fails without any fault, which would catch everything; or is skipped, nothing."""
    parts = [part for part in (tests[i :: len(copies)] for i in range(len(copies))) if part]
    for code, text in on_copies(copies, lambda part, copy: run_tests(copy, part), parts):
        if code or " skipped" in text[-200:]:
            raise SystemExit(f"{text[-3000:]}\ntests fail, are skipped, or are not there, without any fault")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="", help="only faults in whose words, file or test it stands")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, each in its own copy (default: 2)")
    args = parser.parse_args(argv)
    faults, begun = chosen(args.text), time.monotonic()
    if not faults:
        raise SystemExit(f"no fault has {args.text!r} in its words, file or test")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    FORKS.set_forkserver_preload(HEAVY)
    verdicts = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [copy_of_the_repository(Path(folder, str(job))) for job in range(args.jobs)]
        refuse_failing(list(dict.fromkeys(fault.test for fault in faults)), copies)
        print(f"{len({fault.test for fault in faults})} tests pass without a fault", flush=True)
        for fault, verdict in zip(faults, on_copies(copies, attempt, faults), strict=True):
            verdicts[verdict] += 1
            print(f"{verdict:<18}{fault.file}: {fault.what} ({fault.test.partition('::')[2]})", flush=True)
    told = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
    print(f"{len(faults)} faults: {told}; {(time.monotonic() - begun) / 60:.1f} minutes")
    if verdicts["caught"] < len(faults):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
