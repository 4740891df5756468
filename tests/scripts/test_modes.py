"""What a run leaves behind, and every mode of the script, as a user starts it."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import read_lines, read_tensors, refused, run
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import common
import train_llava_med
from runtime import folders, models, record
from runtime.files import sha256

SMALL = ["--limit", 24, "--questions-per-step", 12, "--max-steps", 2, "--lr", 1e-3, "--max-answer-tokens", 6]


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """A short run with adapters. Tests must not write here."""
    out = tmp_path_factory.mktemp("modes") / "run"
    run(demo_folder, out, *SMALL)
    return out


@pytest.fixture
def folder(demo_folder, tmp_path):
    """A model folder to be damaged, beside the data."""
    shutil.copytree(demo_folder / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(demo_folder / "data")
    return tmp_path


def predictions(out: Path) -> dict[str, str]:
    return {line["id"]: line["prediction"] for line in read_lines(out / "predictions.jsonl")}


def validation_loss(out: Path) -> float:
    return next(line["val_loss"] for line in read_lines(out / "metrics.jsonl") if "val_loss" in line)


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(trained):
    names = {p.name for p in trained.iterdir()}
    files = {"config.json", "check.json", "metrics.jsonl", "steps.jsonl", "predictions.jsonl", "results.json"}
    assert names == files | {"check_cache.json", "checkpoints", "adapter"}
    files = {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "README.md"}
    files |= {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"}
    files |= {"tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (trained / "adapter").iterdir()} == files
    (checkpoint,) = (trained / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000002"
    files = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"}
    assert {p.name for p in checkpoint.iterdir()} == files | {"manifest.json"}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest == {name: sha256(checkpoint / name) for name in files}


def test_config_records_settings_command_versions_and_data(demo_folder, trained):
    config = json.loads((trained / "config.json").read_text())
    assert (config["settings"]["lr"], config["settings"]["limit"], config["settings"]["lora_r"]) == (0.001, 24, 16)
    assert config["argv"][-2:] == ["--max-answer-tokens", "6"]
    assert config["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "transformers", "safetensors", "numpy"} == config["versions"].keys()
    assert {"script", "script_sha256", "git_commit", "git_differs"} <= config.keys()
    assert config["data_sha256"] == {path.name: sha256(path) for path in sorted((demo_folder / "data").glob("*.jsonl"))}
    assert config["same"]["steps"] == 2 and len(config["same"]["examples"]) == 64


def test_config_says_which_script_and_whether_its_checkout_was_changed(tmp_path, monkeypatch):
    """A commit alone says nothing about files that were edited since."""
    script = tmp_path / "train_mine.py"
    script.write_text("print(1)")
    monkeypatch.setattr("sys.argv", [str(script), "--lr", "1"])
    found = record.describe(SimpleNamespace(command=["--lr", "1"], data=str(tmp_path), lr=1.0))
    assert (found["script"], found["script_sha256"]) == ("train_mine.py", sha256(script))
    assert (found["argv"], found["settings"]["lr"]) == (["--lr", "1"], 1.0)

    def git(*command):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *name, *command], check=True, capture_output=True)

    found = record.code(script)
    assert (found["git_commit"], found["git_differs"]) == (None, None)
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    first = record.code(script)
    assert len(first["git_commit"]) == 40 and first["git_differs"] is False
    script.write_text("print(2)")
    assert record.code(script) == {**first, "git_differs": True} | {"script_sha256": sha256(script)}


def test_every_step_has_every_documented_metric(demo_folder, trained):
    documented = {"step", "epoch", "loss", "grad_norm", "lr", "trees", "questions", "tokens"}
    documented |= {"tokens_per_s", "questions_per_s", "peak_memory_mb"}
    *steps, last = read_lines(trained / "metrics.jsonl")
    planned = read_lines(trained / "steps.jsonl")
    assert [line.keys() for line in steps] == [documented] * 2
    assert last.keys() == {"step", "val_loss"}
    rows = {row["id"]: row for row in read_lines(demo_folder / "data" / "train.jsonl")}
    for line, ids in zip(steps, [step["ids"] for step in planned], strict=True):
        assert line["questions"] == len(ids) == len(set(ids))
        assert line["trees"] == len({rows[i]["image"] for i in ids})
        assert len(json.dumps(line)) < 300
        assert line["tokens"] > 64 * line["trees"]


def test_predictions_has_a_line_a_question_and_results_count_them(demo_folder, trained):
    rows = read_lines(demo_folder / "data" / "test.jsonl")[:24]
    lines = read_lines(trained / "predictions.jsonl")
    assert [(line["id"], line["answer"], line["group"]) for line in lines] == [
        (row["id"], row["answer"], row["group"]) for row in rows
    ]
    keys = {"id", "group", "media", "question_type", "question", "answer", "prediction", "ended", "correct", "relaxed"}
    assert [line.keys() - {"candidates"} for line in lines] == [keys | {"baselines"}] * 24
    assert {line["question_type"] for line in lines if "candidates" in line} == {"yes_no", "color", "mcq"}
    results = json.loads((trained / "results.json").read_text())
    assert results["micro"]["n"] == sum(entry["n"] for entry in results["types"].values()) == 24
    gain = {"baselines", "best_baseline", "gain", "gain_interval"}
    assert results["micro"].keys() == {"n", "groups", "exact", "relaxed", "interval", *gain}
    assert results["micro"]["exact"] == sum(line["correct"] for line in lines) / 24


def test_missing_predictions_count_as_wrong(demo_folder, trained, tmp_path, monkeypatch):
    rows = read_lines(demo_folder / "data" / "test.jsonl")[:24]
    right = {row["id"]: {"prediction": row["answer"]} for row in rows}
    flags = [*SMALL, "--eval-only", "--resume", trained / "checkpoints" / "step-00000002"]
    monkeypatch.setattr(common, "answer", lambda *rest: right)
    run(demo_folder, tmp_path, *flags)
    assert json.loads((tmp_path / "results.json").read_text())["micro"]["exact"] == 1.0
    monkeypatch.setattr(common, "answer", lambda *rest: dict(list(right.items())[:18]))
    run(demo_folder, tmp_path, *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["micro"]["n"], results["micro"]["exact"]) == (24, 0.75)
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert [line["correct"] for line in lines] == [True] * 18 + [False] * 6
    assert [line["prediction"] for line in lines[18:]] == [None] * 6


# ------------------------------------------------------------------------------------------------------------
# Modes
# ------------------------------------------------------------------------------------------------------------


def test_eval_only_answers_the_same_whatever_adapter_flags_are_given(demo_folder, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "predictions.jsonl").unlink()
    run(demo_folder, out, *SMALL, "--eval-only", "--lora-r", 8)
    assert (out / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()
    assert (out / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_eval_only_without_a_checkpoint_is_refused(demo_folder, tmp_path):
    assert "no checkpoint to answer with" in refused(demo_folder, tmp_path, *SMALL, "--eval-only")


def test_eval_only_without_examples_is_refused(demo_folder, trained, tmp_path):
    (tmp_path / "model").symlink_to(demo_folder / "model")
    shutil.copytree(demo_folder / "data", tmp_path / "data")
    (tmp_path / "data" / "val.jsonl").unlink()
    flags = ["--eval-only", "--eval-split", "val", "--resume", trained / "checkpoints" / "step-00000002"]
    said = refused(tmp_path, tmp_path / "run", *SMALL, *flags)
    assert said == "--eval-split val: the data has no such examples, only of train and test"


def test_val_is_answered_and_it_is_said_why_test_is_not(demo_folder, trained, tmp_path, capsys):
    flags = ["--eval-only", "--resume", trained / "checkpoints" / "step-00000002", "--eval-split", "val"]
    run(demo_folder, tmp_path, *SMALL, *flags)
    said = "val will be answered; test only with --eval-split test: each look at it while settings are chosen wears it"
    assert said in capsys.readouterr().out
    rows = read_lines(demo_folder / "data" / "val.jsonl")[:24]
    assert list(predictions(tmp_path)) == [row["id"] for row in rows]
    assert json.loads((tmp_path / "results.json").read_text())["split"] == "val"


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_merged_model_opens_plainly_and_generates_the_same_answers(demo_folder, trained, tmp_path, tune):
    """Through transformers alone: the text from the chat template, one placeholder repeated, greedy generate."""
    out, merged = trained, tmp_path / "merged"
    if tune == "full":
        out = tmp_path / "run"
        run(demo_folder, out, *SMALL, "--tune", "full")
    run(demo_folder, out, "--merge", merged)
    model = LlavaForConditionalGeneration.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    processor = CLIPImageProcessorPil.from_pretrained(merged)
    assert tokenizer.convert_tokens_to_ids("<image>") == 600 == model.config.image_token_id
    assert (tokenizer.pad_token_id, model.config.pad_token_id) == (601, 601)
    rows = read_lines(demo_folder / "data" / "test.jsonl")[:24:4]
    answers = {}
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        input_ids = [i for token in tokenizer(text).input_ids for i in [token] * (64 if token == 600 else 1)]
        pixels = processor([Image.open(demo_folder / "data" / row["image"])], return_tensors="pt")["pixel_values"]
        tokens = model.generate(
            input_ids=torch.tensor([input_ids]),
            attention_mask=torch.ones(1, len(input_ids), dtype=torch.long),
            pixel_values=pixels,
            max_new_tokens=6,
            do_sample=False,
        )
        answers[row["id"]] = tokenizer.decode(tokens[0, len(input_ids) :], skip_special_tokens=True).strip()
    assert len(set(answers.values())) > 1 or tune == "full"  # or the comparison would say little
    assert answers == {row["id"]: predictions(out)[row["id"]] for row in rows}
    if tune == "full":
        saved, again = read_tensors(out / "model"), read_tensors(merged)
        assert saved.keys() == again.keys() and all(torch.equal(saved[k], again[k]) for k in saved)


@pytest.mark.parametrize(("dtype", "tune"), [(torch.bfloat16, "lora"), (torch.float16, "full")])
def test_a_merged_model_has_the_base_s_number_format_and_is_rounded_once(demo_folder, tmp_path, dtype, tune):
    """On a CPU, where a run computes in float32."""
    (tmp_path / "data").symlink_to(demo_folder / "data")
    LlavaForConditionalGeneration.from_pretrained(demo_folder / "model", dtype=dtype).save_pretrained(
        tmp_path / "model"
    )
    for path in (demo_folder / "model").iterdir():
        if not (tmp_path / "model" / path.name).exists():
            shutil.copy(path, tmp_path / "model")
    run(tmp_path, tmp_path / "run", *SMALL, "--max-steps", 1, "--tune", tune)
    run(tmp_path, tmp_path / "run", "--merge", tmp_path / "merged")
    names = "model.language_model.layers.0.mlp.up_proj", "model.multi_modal_projector.linear_1"
    base, merged = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name, dtype="auto") for name in ("model", "merged")
    )
    saved = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    trained = load_file(next(p for p in (tmp_path / "run/checkpoints/step-00000001").glob("*model.safetensors")))
    for name in names:
        weight = merged.get_submodule(name).weight
        if tune == "full" or "projector" in name:
            exact = next(tensor for key, tensor in trained.items() if key.endswith(f"{name}.weight"))
        else:
            a, b = (trained[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            exact = base.get_submodule(name).weight.float() + 2 * (b @ a)  # alpha 32, r 16
        assert exact.dtype == torch.float32 and torch.equal(weight, exact.to(dtype))
        assert not torch.equal(weight, base.get_submodule(name).weight)


def test_every_file_has_the_permissions_that_the_umask_gives(demo_folder, tmp_path):
    """Safetensors and whatever is made in temporary files is written for one user alone: 0600."""
    before = os.umask(0o027)
    try:
        run(demo_folder, tmp_path / "run", *SMALL, "--report")
        run(demo_folder, tmp_path / "run", "--merge", tmp_path / "merged")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "optimizer.safetensors" for path in files)
    assert {path: oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o777 != 0o640} == {}


def test_a_file_system_without_permissions_is_written_all_the_same(demo_folder, trained, tmp_path, monkeypatch):
    """Such as one of a network: what was trained would be lost for a nicety."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    run(demo_folder, trained, "--merge", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_a_base_that_cannot_be_written_is_merged(folder, trained, tmp_path, monkeypatch):
    """Copied with its permissions, its config.json could not be replaced by the merged model's."""
    for path in (folder / "model").iterdir():
        path.chmod(0o444)
    merge = common.merge_lora

    def look(vlm):
        assert {oct(path.stat().st_mode & 0o200) for path in (tmp_path / "merged.writing").iterdir()} == {"0o200"}
        return merge(vlm)

    monkeypatch.setattr(common, "merge_lora", look)
    run(folder, trained, "--merge", tmp_path / "merged")


def test_a_merge_that_does_not_end_leaves_no_model(demo_folder, trained, tmp_path, monkeypatch):
    (tmp_path / "merged.writing").mkdir()  # of one that was killed
    (tmp_path / "merged.writing/old.json").touch()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(models.card, "complete", lambda *_: signal.raise_signal(signal.SIGINT))
        run(demo_folder, trained, "--merge", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    run(demo_folder, trained, "--merge", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not (tmp_path / "merged/old.json").exists()


def test_generation_settings_that_cannot_be_saved_end_no_run_after_its_last_step(demo_folder, tmp_path):
    """As Vicuna publishes them: transformers refuses to save a temperature without sampling. Answers are greedy."""
    shutil.copytree(demo_folder / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(demo_folder / "data")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.3}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    run(tmp_path, tmp_path / "run", *SMALL, "--tune", "full", "--max-steps", 1)
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"]) == (1, 2)
    assert not saved.keys() & {"temperature", "top_p", "repetition_penalty"} and saved["do_sample"] is False


def test_merge_without_a_checkpoint_is_refused(demo_folder, tmp_path):
    assert refused(demo_folder, tmp_path, "--merge", tmp_path / "merged").startswith(
        "no checkpoint to answer with or to merge"
    )


def test_check_without_data_counts_parameters_and_needs_no_weights(folder, capsys):
    (folder / "model" / "model.safetensors").unlink()
    train_llava_med.main(["--model", str(folder / "model"), "--check"])
    table = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.split("\n") if line}
    # three layers of width 128 (64 for keys and values) and 320 in between: 16 x (in + out) each
    assert table["LoRA"] == [f"{3 * 16 * (2 * 256 + 2 * 192 + 3 * 448):,}"] * 2 == ["107,520"] * 2
    assert table["multi_modal_projector"] == [f"{96 * 128 + 128 + 128 * 128 + 128:,}"] * 2
    assert table["vision_tower"][1] == table["language_model"][1] == table["lm_head"][1] == "0"
    assert table["total"] == ["1,108,736", "136,448"]


def test_check_of_the_real_size_allocates_nothing(folder, capsys):
    """LLaVA-Med v1.5 as converted: CLIP ViT-L/14 at 336 pixels, Mistral 7B with 32,064 rows of embeddings."""
    text = {"model_type": "mistral", "vocab_size": 32064, "num_key_value_heads": 8, "sliding_window": None}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    LlavaConfig(text_config=text, vision_config=vision, image_token_index=600).save_pretrained(folder / "model")
    path = folder / "model" / "preprocessor_config.json"
    size = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **size}))
    (folder / "model" / "model.safetensors").unlink()
    train_llava_med.main(["--model", str(folder / "model"), "--check"])
    table = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.split("\n") if line}
    assert table["LoRA"] == ["41,943,040"] * 2  # 32 x 16 x (2 x 8,192 + 2 x 5,120 + 3 x 18,432)
    assert table["multi_modal_projector"] == ["20,979,712"] * 2  # 1,024 x 4,096 + 4,096 + 4,096^2 + 4,096
    # Mistral 7B has 7,241,732,096 with 32,000 rows, 131,072,000 of them in the head
    assert table["lm_head"] == [f"{32064 * 4096:,}", "0"]
    assert table["language_model"] == [f"{7_241_732_096 - 131_072_000 + 64 * 4096:,}", "0"]
    assert table["total"][1] == "62,922,752"


def test_check_without_data_refuses_a_checkpoint_with_faults(folder):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": 5, "image_token_id": 5}))
    with pytest.raises(SystemExit, match="copy image_token_index from the original config"):
        train_llava_med.main(["--model", str(folder / "model"), "--check"])


def test_overfit_answers_every_example_right_or_exits_1(demo_folder, tmp_path, capsys):
    flags = ["--overfit", 8, "--tune", "full", "--lr", 2e-3, "--save-every", 1000, "--eval-every", 1000]
    run(demo_folder, tmp_path, *flags, "--max-steps", 60)
    assert "0 answers wrong (must be none)" in capsys.readouterr().out
    assert json.loads((tmp_path / "overfit" / "results.json").read_text())["split"] == "train"
    lines = read_lines(tmp_path / "overfit" / "predictions.jsonl")
    rows = read_lines(demo_folder / "data" / "train.jsonl")[:8]
    assert [(line["id"], line["prediction"]) for line in lines] == [(row["id"], row["answer"]) for row in rows]
    with pytest.raises(SystemExit) as caught:  # the second time it starts over, in too few steps
        run(demo_folder, tmp_path, *flags, "--max-steps", 2, "--max-answer-tokens", 2)
    assert caught.value.code == 1
    assert "give more --max-steps" in capsys.readouterr().out


def test_overfit_stops_once_all_is_learned_and_then_blames_answering(demo_folder, tmp_path, capsys):
    flags = ["--overfit", 4, "--tune", "full", "--lr", 2e-3, "--max-steps", 150, "--max-answer-tokens", 1]
    with pytest.raises(SystemExit) as caught:
        run(demo_folder, tmp_path, *flags)
    steps = [line["step"] for line in read_lines(tmp_path / "overfit/metrics.jsonl") if "loss" in line]
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "look at how it is answered (--max-answer-tokens" in said
    assert len(steps) < 150 and f"overfit: 4 examples, {len(steps)} of 150 steps" in said


def test_constrained_answers_are_candidates_only(demo_folder, trained, tmp_path):
    flags = [*SMALL, "--eval-only", "--resume", trained / "checkpoints" / "step-00000002", "--decode", "constrained"]
    run(demo_folder, tmp_path, *flags, "--max-answer-tokens", 1)
    rows = {row["id"]: row for row in read_lines(demo_folder / "data" / "test.jsonl")}
    allowed = 0
    for name, prediction in predictions(tmp_path).items():
        row = rows[name]
        candidates = ["yes", "no"] if row["question_type"] == "yes_no" else row.get("answer_candidates")
        assert candidates is None or prediction in candidates, (row, prediction)
        allowed += candidates is not None
    assert 5 < allowed < 24
    others = [
        line["id"] for line in read_lines(tmp_path / "predictions.jsonl") if line["question_type"] == "open_ended"
    ]
    # others are answered greedily: here to the first token
    assert all(predictions(trained)[name].startswith(predictions(tmp_path)[name]) for name in others) and others


def test_ranking_writes_probabilities_that_sum_to_one(demo_folder, trained, tmp_path):
    flags = [*SMALL, "--eval-only", "--resume", trained / "checkpoints" / "step-00000002", "--decode", "ranked"]
    run(demo_folder, tmp_path, *flags)
    rows = {row["id"]: row for row in read_lines(demo_folder / "data" / "test.jsonl")}
    ranked = [line for line in read_lines(tmp_path / "predictions.jsonl") if "probabilities" in line]
    for line in ranked:
        row = rows[line["id"]]
        assert list(line["probabilities"]) == row.get("answer_candidates", ["yes", "no"])
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["probabilities"][line["prediction"]] == max(line["probabilities"].values())
    kinds = {line["question_type"] for line in ranked}
    assert "yes_no" in kinds and "open_ended" not in kinds
    others = {i: p for i, p in predictions(trained).items() if i not in {line["id"] for line in ranked}}
    assert {i: predictions(tmp_path)[i] for i in others} == others


def test_sharing_the_prefix_changes_no_loss_and_no_answer(demo_folder, tmp_path):
    """At learning rate 0, so that the steps, which do hold other questions, leave the model as it was."""
    shared, single = tmp_path / "shared", tmp_path / "single"
    flags = [*SMALL, "--lr", 0, "--max-steps", 1]
    run(demo_folder, shared, *flags, "--share-prefix")
    run(demo_folder, single, *flags, "--no-share-prefix", "--pack-tokens", 300)
    assert validation_loss(single) == pytest.approx(validation_loss(shared), rel=1e-5)
    assert predictions(single) == predictions(shared)
    first = [read_lines(out / "metrics.jsonl")[0] for out in (shared, single)]
    assert first[0]["trees"] < first[0]["questions"] and first[1]["trees"] == first[1]["questions"] == 12
    assert first[1]["tokens"] > 4 * first[0]["tokens"]


# ------------------------------------------------------------------------------------------------------------
# What is trained
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """The model of the next run, with a copy of its parameters from before training."""
    seen = {}
    load = train_llava_med.load_model

    def loading(*rest):
        model = load(*rest)
        seen["model"] = model.vlm
        seen["before"] = {name: p.detach().clone() for name, p in model.vlm.named_parameters()}
        return model

    monkeypatch.setattr(train_llava_med, "load_model", loading)
    return seen


def test_trained_parameters_change_and_frozen_ones_stay_bit_for_bit(demo_folder, tmp_path, watched):
    run(demo_folder, tmp_path, *SMALL)
    after = dict(watched["model"].named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, watched["before"][name])}
    layers = "model.language_model.layers."
    assert changed == {
        name for name in after if name.startswith("model.multi_modal_projector.") or name.split(".")[-1][:5] == "lora_"
    }
    assert {name.split(".")[-2] for name in changed if name.startswith(layers)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    saved = {key.removeprefix("base_model.model.") for _, key in read_tensors(tmp_path / "adapter")}
    assert saved == {name.replace("lora_A", "lora_A.weight").replace("lora_B", "lora_B.weight") for name in changed}


def test_bf16_with_checkpointing_trains_float32_parameters(demo_folder, trained, tmp_path, watched):
    run(demo_folder, tmp_path, *SMALL, "--dtype", "bf16", "--grad-checkpoint")
    types = {p.requires_grad: set() for p in watched["model"].parameters()}
    for p in watched["model"].parameters():
        types[p.requires_grad].add(p.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}
    assert {t.dtype for t in read_tensors(tmp_path / "adapter").values()} == {torch.float32}
    state = read_tensors(tmp_path / "checkpoints" / "step-00000002")
    assert {t.dtype for (_, key), t in state.items() if key != "rng cpu"} == {torch.float32}
    losses = [[line["loss"] for line in read_lines(o / "metrics.jsonl") if "loss" in line] for o in (tmp_path, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_checkpointing_alone_changes_no_step(demo_folder, trained, tmp_path):
    run(demo_folder, tmp_path, *SMALL, "--grad-checkpoint")
    mine, theirs = read_tensors(tmp_path / "adapter"), read_tensors(trained / "adapter")
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in theirs)


# ------------------------------------------------------------------------------------------------------------
# Model folders
# ------------------------------------------------------------------------------------------------------------


def test_an_unfinished_download_is_refused_by_name(folder):
    (folder / "model" / "blobs").mkdir()
    part = folder / "model" / "blobs" / "4f2a.incomplete"
    part.write_bytes(b"")
    text = refused(folder, folder / "run", *SMALL)
    assert text == f"--model {folder / 'model'} cannot be used:\n  {part}: a download that did not finish; run it again"


def test_truncated_weights_are_refused_by_name(folder):
    path = folder / "model" / "model.safetensors"
    size = path.stat().st_size
    for kept in (size - 1, 1000, 4, 0):
        with path.open("r+b") as file:
            file.truncate(kept)
        text = refused(folder, folder / "run", *SMALL)
        assert f"{path}: " in text and f"{kept} bytes" in text and "download it again" in text


def test_a_missing_shard_is_refused_by_name(folder):
    model = folder / "model"
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    text = refused(folder, folder / "run", *SMALL)
    assert text.split("\n")[1:] == [f"  {model / shards['b']}: missing; download the model again"]


def test_a_broken_index_is_refused_by_name(folder):
    (folder / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": ')
    assert "model.safetensors.index.json" in refused(folder, folder / "run", *SMALL)


def test_pickled_weights_are_refused(folder):
    model = folder / "model"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    text = refused(folder, folder / "run", *SMALL)
    assert "model.safetensors is missing (pytorch_model.bin found; pickled weights are never read)" in text


def test_a_folder_that_is_not_there_is_refused(folder):
    shutil.rmtree(folder / "model")
    assert refused(folder, folder / "run", *SMALL).startswith(f"--model {folder / 'model'}: no such folder")


def test_packed_sequences_longer_than_the_sliding_window_are_refused(folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["sliding_window"] = 300
    path.write_text(json.dumps(config))
    text = refused(folder, folder / "run", *SMALL, "--pack-tokens", 301)
    assert text == "--pack-tokens 301 is longer than the model's sliding window 300"
    run(folder, folder / "run", *SMALL, "--pack-tokens", 300)


# ------------------------------------------------------------------------------------------------------------
# Safety
# ------------------------------------------------------------------------------------------------------------


def test_nothing_is_unpickled_and_no_connection_is_opened(demo_folder, tmp_path, monkeypatch):
    used = []

    def forbidden(name):
        def refuse(*rest, **named):
            used.append(name)
            raise AssertionError(name)

        return refuse

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, forbidden(name))
    monkeypatch.setattr(socket.socket, "connect", forbidden("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", forbidden("getaddrinfo"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # not merely because it is switched off
    flags = [*SMALL, "--max-answer-tokens", 1]
    run(demo_folder, tmp_path / "run", *flags)
    run(demo_folder, tmp_path / "run", *flags)  # resumed
    run(demo_folder, tmp_path / "run", *flags, "--eval-only")
    run(demo_folder, tmp_path / "run", "--merge", tmp_path / "merged")
    assert used == []
    kinds = {p.suffix for p in (*(tmp_path / "run").rglob("*"), *(tmp_path / "merged").rglob("*")) if p.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".jinja", ".md"}


def test_a_download_that_breaks_off_is_tried_again_then_checked_like_a_folder(demo_folder, monkeypatch):
    # the hub itself tries again after neither; what its HTTP library raises is no OSError
    tries, broken = [], [OSError("503"), Exception("connection reset")]

    def snapshot_download(name, allow_patterns):
        tries.append((name, "*.safetensors" in allow_patterns))
        if len(tries) <= len(broken):
            raise broken[len(tries) - 1]
        return str(demo_folder / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a compute node: trying again is no help
    with pytest.raises(SystemExit, match=r"--model organisation/llava: .* nor to be downloaded: 503"):
        folders.find("organisation/llava")
    assert len(tries) == 1
    tries.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert folders.find("organisation/llava") == demo_folder / "model"
    assert tries == [("organisation/llava", True)] * 3
    with pytest.raises(SystemExit, match="no such folder"):
        folders.find("runs/no/such/folder")


@pytest.mark.parametrize("flag", ["--limit", "--save-every", "--eval-every", "--epochs", "--questions-per-step"])
def test_a_count_below_one_is_refused(demo_folder, tmp_path, capsys, flag):
    """--save-every 0 would divide by zero, --limit 0 train on nothing."""
    with pytest.raises(SystemExit, match="2"):
        run(demo_folder, tmp_path, flag, 0)
    assert f"argument {flag}: 0 is not a positive integer" in capsys.readouterr().err
