"""Flags: few, explained, and named to those who know them from other trainers."""

import argparse
import importlib

import pytest

import train_llava_med
from runtime import flags
from runtime.foreign_flags import NAMES, REMARKS

SCRIPTS = ["llava_med", "qwen2vl_sentinel", "surg_video_vqa", "umbrella_mri", "video_plain_lm"]
NEEDED = ["--model", "M", "--data", "D", "--out", "R"]


@pytest.fixture
def parser(request, monkeypatch):
    """The parser of a script, as it builds it itself."""
    found = []
    monkeypatch.setattr(flags, "parse", lambda parser, argv: found.append(parser) or parser.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(f"train_{request.param}").parse_arguments([])
    return found[0]


each_script = pytest.mark.parametrize("parser", SCRIPTS, indirect=True)


def actions(parser) -> list[argparse.Action]:
    """Its flags but for --help."""
    return [action for action in parser._actions if action.dest != "help"]


@pytest.mark.parametrize("parser", ["llava_med"], indirect=True)
def test_the_llava_script_has_at_most_50_flags(parser):
    """40; what decides what is seen: --media-root, --image-fit, --system, --augment; what users of such scripts ask
    for most: --predict, --lr-projector, --lr-vision, --patience, --answer-with."""
    assert len(actions(parser)) <= 50


@each_script
def test_help_has_fewer_than_110_lines(parser):
    lines = parser.format_help().splitlines()
    assert len(lines) < 110
    assert max(map(len, lines)) <= 120


@each_script
def test_every_flag_has_a_help_text_with_its_default(parser):
    without = {"--model", "--data", "--out"}  # required
    without |= {"--check", "--overfit", "--eval-only", "--predict", "--merge"}  # modes
    for action in actions(parser):
        assert action.help and len(action.help) > 10, action.option_strings
        if action.option_strings[0] not in without:
            assert "default: " in action.help, action.option_strings


@each_script
def test_each_name_of_other_trainers_leads_to_a_flag_that_there_is(parser):
    ours = set(parser._option_string_actions)
    theirs = {name for names in NAMES.values() for name in names}
    assert NAMES.keys() <= ours and not theirs & ours
    assert REMARKS.keys() <= theirs
    assert len(theirs) == sum(map(len, NAMES.values()))  # none in two places


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--batch-size", "--questions-per-step"),
        ("--per_device_train_batch_size", "--questions-per-step"),
        ("--gradient-accumulation-steps", "--questions-per-step"),
        ("--learning-rate", "--lr"),
        ("--learning_rate=1e-4", "--lr"),
        ("--num-train-epochs", "--epochs"),
        ("--output_dir", "--out"),
        ("--max-length", "--pack-tokens"),
        ("--max_seq_length", "--pack-tokens"),
        ("--bf16", "--dtype"),
        ("--fp16", "--dtype"),
        ("--lora_rank", "--lora-r"),
        ("--warmup-ratio", "--warmup"),
        ("--report_to", "--log-to"),
        ("--model-name-or-path", "--model"),
        ("--resume_from_checkpoint", "--resume"),
        ("--gradient-checkpointing", "--grad-checkpoint"),
        ("--save-steps", "--save-every"),
        ("--eval-steps", "--eval-every"),
        ("--dataset", "--data"),
        ("--data_path", "--data"),
        ("--deepspeed", "--parallel"),
    ],
)
def test_an_unknown_flag_that_other_trainers_have_gets_its_name_here(capsys, flag, ours):
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.main([*NEEDED, flag, "3"])
    assert f"unknown flag {flag.split('=')[0]}: here it is {ours}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--questions_per_step", "it is written --questions-per-step"),
        ("--no_report", "it is written --no-report"),
        ("--question-per-step", "did you mean --questions-per-step?"),
        ("--epoch-s", "did you mean --epochs?"),
        ("--pack-token", "did you mean --pack-tokens?"),
        ("--frobnicate", "--help lists those there are"),
    ],
)
def test_a_misspelt_flag_is_guessed(capsys, flag, said):
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.main([*NEEDED, flag, "3"])
    assert f"unknown flag {flag}: {said}" in capsys.readouterr().err


def test_all_unknown_flags_are_said_at_once_and_words_that_are_none(capsys):
    with pytest.raises(SystemExit):
        train_llava_med.main([*NEEDED, "--batch-size", "4", "--lr_rate", "1"])
    text = capsys.readouterr().err
    assert "unknown flag --batch-size" in text and "unknown flag --lr_rate" in text
    with pytest.raises(SystemExit):
        train_llava_med.main([*NEEDED, "stray"])
    assert "unexpected: stray" in capsys.readouterr().err


def test_a_flag_is_not_abbreviated(capsys):
    """--eval would silently become another flag as soon as one is added."""
    with pytest.raises(SystemExit):
        train_llava_med.main([*NEEDED, "--eval-spl", "val"])
    assert "unknown flag --eval-spl: did you mean --eval-split?" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--model", "M"], ["--model", "M", "--data", "D"], ["--data", "D", "--check"]])
def test_what_is_missing_is_named(capsys, given):
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.main(given)
    needed = ["--model", "--data", "--out"]
    assert f"{', '.join(flag for flag in needed if flag not in given)} required" in capsys.readouterr().err


def test_merging_needs_to_know_what(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.main(["--model", "M", "--merge", "DIR"])
    assert "--merge: --out RUN required, or --resume FOLDER" in capsys.readouterr().err


def test_nothing_is_merged_into_what_exists_not_even_onto_the_base(demo_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for taken in (demo_folder / "model", tmp_path, tmp_path / "file"):  # said before the model is looked for
        with pytest.raises(SystemExit, match="2"):
            train_llava_med.main(["--model", "no/model", "--out", "RUN", "--merge", str(taken)])
        assert f"--merge {taken}: it exists already; name a new folder" in capsys.readouterr().err


def test_settings_are_printed_in_short_lines_by_the_first_rank_alone(capsys, monkeypatch):
    long = f"/{'x' * 300}/model"
    train_llava_med.parse_arguments(["--model", long, *NEEDED[2:], "--lr", "0.001", "--no-report", "--epochs", "1"])
    text = capsys.readouterr().out
    assert "lr 0.001, report False; all others are the defaults" in " ".join(text.split())
    assert "epochs" not in text and max(map(len, text.splitlines())) <= 200
    monkeypatch.setenv("RANK", "1")
    train_llava_med.parse_arguments(NEEDED)
    assert capsys.readouterr().out == ""


def test_test_is_answered_only_when_it_is_asked_for():
    assert train_llava_med.parse_arguments(NEEDED).eval_split == "val"
    assert train_llava_med.parse_arguments([*NEEDED, "--eval-split", "test"]).eval_split == "test"


def test_overfitting_takes_200_steps_or_max_steps():
    args = train_llava_med.parse_arguments([*NEEDED, "--overfit", "8"])
    assert (args.max_steps, args.epochs, args.resume, args.out) == (200, 200, "none", "R/overfit")
    assert args.eval_split == "train"  # what has been trained on is answered
    args = train_llava_med.parse_arguments([*NEEDED, "--overfit", "8", "--patience", "1"])
    assert (args.answer_with, args.patience) == ("last", None)  # it ends once all is learned
    assert train_llava_med.parse_arguments([*NEEDED, "--overfit", "8", "--max-steps", "3"]).epochs == 3


@pytest.mark.parametrize(
    ("flag", "values", "allowed"),
    [
        ("--lr", "-1 nan inf fast", "a finite number from 0"),
        ("--clip", "0 -1 nan inf 1e999", "a finite number above 0"),
        ("--lora-alpha", "0 -2 nan inf", "a finite number above 0"),
        ("--weight-decay", "-1 nan inf x", "a finite number from 0"),
        ("--warmup", "100 -0.1 nan inf", "between 0 and 1"),
        ("--lora-dropout", "1 2 -0.1 nan", "at least 0 and below 1"),
        ("--workers", "-1 1.5 nan", "an integer from 0 to 2^63 - 1"),
        ("--seed", "-1 1.5 99999999999999999999", "an integer from 0 to 2^63 - 1"),
        ("--epochs", "0 -1 1.5 nan", "a positive integer"),
        ("--lora-r", "0 -1 8.0", "a positive integer"),
    ],
)
def test_a_number_that_trains_nothing_or_garbage_is_refused(flag, values, allowed, capsys):
    """--clip 0 trained nothing without a word; --warmup 100 of 500 steps would end at a hundredth of the rate."""
    for value in values.split():
        with pytest.raises(SystemExit, match="2"):
            train_llava_med.parse_arguments([*NEEDED, flag, value])
        assert f"argument {flag}: {value} is not {allowed}" in capsys.readouterr().err


def test_numbers_at_the_edge_are_taken():
    given = ["--weight-decay", "0", "--warmup", "1", "--lora-dropout", "0", "--workers", "0", "--lora-alpha", "0.5"]
    args = train_llava_med.parse_arguments([*NEEDED, *given, "--clip", "1e9", "--lr", "1e-30"])
    assert (args.weight_decay, args.warmup, args.lora_dropout, args.workers, args.lora_alpha) == (0, 1, 0, 0, 0.5)
    assert (args.clip, args.lr) == (1e9, 1e-30)


def test_two_modes_at_once_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_llava_med.parse_arguments([*NEEDED, "--overfit", "4", "--eval-only"])
    assert "--overfit and --eval-only: one at a time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_llava_med.parse_arguments([*NEEDED, "--check", "--merge", "folder"])
    assert "--check and --merge: one at a time" in capsys.readouterr().err
    assert train_llava_med.parse_arguments([*NEEDED, "--check", "--eval-only"]).check  # of what would be answered
