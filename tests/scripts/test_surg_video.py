"""train_surg_video_vqa on a tiny Qwen2-VL and a tiny Whisper in the real formats: clips, recordings, the graft."""

import json
import re
import shutil
import wave
from copy import copy as shallow_copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, refuses_elsewhere, stop_in
from helpers import refused as script_refused
from helpers import run as run_script
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperFeatureExtractor, WhisperModel

import common
import train_qwen2vl_sentinel
import train_surg_video_vqa as script
from common import IGNORE, answering_prompt, pack
from inputs import images
from inputs.building import build_trees
from report import scoring
from report.baselines import blind_answers
from runtime import EXIT_STOPPED, Run, models

SMALL = ["--limit", 12, "--questions-per-step", 4, "--max-answer-tokens", 4]


def run(folder, out, *flags):
    run_script(folder, out, "--audio-model", folder / "whisper", *flags, script=script)


def refused(folder, out, *flags) -> str:
    return script_refused(folder, out, "--audio-model", folder / "whisper", *flags, script=script)


@pytest.fixture(scope="module")
def data(video_folder):
    return load_demo(video_folder, script, "--audio-model", video_folder / "whisper")


def set_up(task: script.SurgTask, measured=None, **settings) -> script.SurgTask:
    """A copy of the task with other settings, or with other files measured."""
    task = shallow_copy(task)
    task.args = SimpleNamespace(**{**vars(task.args), **settings})
    task.measured = measured or task.measured
    return task


def run_of(task) -> Run:
    return Run(task.args, Path("never written"), torch.device("cpu"), torch.float32, stop=None)


def load(data, **settings) -> script.SurgVideo:
    torch.manual_seed(0)
    model = script.load_model(data.folder / "model", set_up(data.task, **settings), torch.float32)
    for layer in common.lora_layers(model.vlm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # at zero, A would have no gradient
    return model


# --- tokens, frames, positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["text", "audio", "both"])
def test_prompt_and_placeholders_are_those_of_the_checkpoint_s_own_template(video_folder, data, question):
    """IDs equal those of the rendered text with each placeholder repeated; sound stands before the frames."""
    whisper = [] if question == "text" else ["--audio-model", video_folder / "whisper"]
    asked = load_demo(video_folder, script, "--question", question, *whisper)
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "model")
    tokenizer.add_tokens(list(script.AUDIO_TOKENS), special_tokens=True)
    examples = {example.id: example for example in asked.examples}
    for tree in asked.trees[:4]:
        for name, (input_ids, labels) in zip(tree.ids, tree.branches, strict=True):
            with wave.open(str(video_folder / "data/audio/train" / f"{name.split('/')[1]}.wav")) as file:
                positions = -(-round(file.getnframes() * 16_000 / file.getframerate()) // 320)  # 20 ms each
            sound = "" if question == "text" else f"<|audio_bos|>{'<|AUDIO|>' * positions}<|audio_eos|>"
            words = "Answer the spoken question." if question == "audio" else f"Question: {examples[name].question}"
            frame = f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>"
            text = (
                f"<|im_start|>system\n{script.SYSTEM}<|im_end|>\n<|im_start|>user\n{sound}{frame * 8}{words}"
                f"<|im_end|>\n<|im_start|>assistant\n"
            )
            given = [token for token, label in zip(input_ids, labels, strict=True) if label == IGNORE]
            assert tree.prefix + given == tokenizer.encode(text)
            assert (
                tokenizer.decode([label for label in labels if label != IGNORE]) == examples[name].answer + "<|im_end|>"
            )
    questions = {len(tree.ids) for tree in asked.trees}
    assert questions == ({3} if question == "text" else {1})  # a clip is read once for all written questions


def test_a_system_text_is_that_of_the_flag_or_of_the_example(video_folder):
    asked = load_demo(video_folder, script, "--system", "Be brief.")
    example = asked.examples[0]
    for system, text in (("", "Be brief."), ("You are a surgeon.", "You are a surgeon.")):
        (tree,), _ = build_trees([replace(example, system=system)], asked.task)
        assert asked.task.tokenizer.decode(tree.prefix).startswith(f"<|im_start|>system\n{text}<|im_end|>\n")
    entry = {"frames": ["a.jpg"], "question": "Is it?", "answer": "yes", "video_id": "v", "system": "Mind the time."}
    assert script.make_example(asked.args, "x", "train", entry).system == "Mind the time."


def test_evaluation_sees_fewer_frames_and_says_so(video_folder, data, capsys):
    task = data.task
    train, test = (next(e for e in data.examples if e.split == split) for split in ("train", "test"))
    assert task.frames(train) == train.shown and len(train.shown) == 8
    assert task.frames(test) == [test.shown[i] for i in (0, 1, 3, 4, 6, 7)]
    prefix, _, _ = task.encode(test, test.answer)
    assert prefix.count(task.image_id) == 6 * 16
    capsys.readouterr()
    script.SurgTask(video_folder / "model", data.args)
    assert "frames: 8 of a training clip, 6 of one of val and test" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(384, 288), (1440, 1080), (1350, 1080), (200, 100), (30, 900), (385, 3)])
def test_frames_are_reduced_as_they_are_counted(data, tmp_path, size):
    """The longer side becomes 384 pixels, small frames stay, and placeholders equal what the processor cuts."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    task = set_up(data.task, measured={"a.png": data.task.measure(tmp_path, "a.png")[0]})
    read = task.read_media(tmp_path, [SimpleNamespace(media=["a.png"])])
    assert read["image_grid_thw"].tolist() == [list(task.images.grid(size))]
    width, height = images.reduced(size, 384)
    assert max(width, height) == min(384, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02) or min(width, height) <= 15
    expected = Image.new("RGB", size)
    expected.thumbnail((384, 384))
    assert abs(expected.width - width) <= 1 and abs(expected.height - height) <= 1


def test_positions_are_those_of_the_complete_sequence(data):
    """Prefix from get_rope_index, branches from its largest position on: what the model gives for them itself."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(data.folder / "model").model
    for tree in data.trees[:4]:
        (batch,) = pack([tree], 4096)
        is_image = (batch["input_ids"] == data.task.image_id).int()
        grid = data.read_media([tree])["image_grid_thw"]
        expected, _ = model.get_rope_index(batch["input_ids"], mm_token_type_ids=is_image, image_grid_thw=grid)
        assert torch.equal(batch["position_ids"], expected)


# --- sound ----------------------------------------------------------------------------------------------------------


def test_a_recording_is_a_token_every_20_ms(data):
    task = set_up(
        data.task, measured={"a.wav": (16_000 * 3, -20), "b.wav": (16_000 * 3 + 1, -20), "c.wav": (16_000 * 31, -20)}
    )
    task.extractor = WhisperFeatureExtractor(80)  # the real window of 30 s
    assert (task.audio_positions("a.wav"), task.audio_positions("b.wav")) == (150, 151)
    with pytest.raises(ValueError, match=r"c.wav lasts 31.0 s, longer than the encoder's window of 30 s; shorten it"):
        task.audio_positions("c.wav")


# --- packing is exact, with sound ------------------------------------------------------------------------------


def packed(model, data, trees, **changed):
    (batch,) = pack(trees, 4096)
    return gradients(model, model({**batch, **data.read_media(batch["prompts"]), **changed})[0])


def embedded(model, data, tree, input_ids) -> dict:
    """A sequence put together by hand: Qwen2-VL's embedding and tower, WhisperModel's encoder, the projector."""
    vlm, ids = model.vlm, torch.tensor([tree.prefix + input_ids])
    media = data.read_media([tree])
    heard = WhisperModel.from_pretrained(data.folder / "whisper").encoder.eval()
    with torch.no_grad():
        sound = heard(media["input_features"]).last_hidden_state[0, : int(media["audio_positions"])]
    images = torch.cat(vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"]).pooler_output)
    embeds = vlm.get_input_embeddings()(ids).clone()
    embeds[ids == data.task.image_id] = images
    embeds[ids == data.task.audio_id] = sound @ vlm.audio_projector.weight.T
    is_image = (ids == data.task.image_id).int()
    grids = media["image_grid_thw"]
    positions, _ = vlm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grids)
    return {"inputs_embeds": embeds, "position_ids": positions}


def separate(model, data, trees):
    """Each question in a sequence of its own through transformers' forward."""
    total = 0
    for tree in trees:
        for input_ids, labels in tree.branches:
            log_probs = model.vlm(**embedded(model, data, tree, input_ids)).logits[0].log_softmax(-1)
            for i, label in enumerate(labels):
                if label != IGNORE:
                    total = total - log_probs[len(tree.prefix) + i - 1, label]
    return gradients(model, total)


def test_spoken_questions_side_by_side_equal_separate_sequences(data):
    model = load(data, tune="lora").eval()
    trees = data.trees[:3]
    assert len({tree.prefix.count(data.task.audio_id) for tree in trees}) > 1  # of different lengths
    found = packed(model, data, trees)
    assert found["vlm.audio_projector.weight"].norm() > 0
    assert difference(found, separate(model, data, trees)) < 1e-5


def test_recordings_or_frames_in_another_order_are_caught(data):
    model = load(data, tune="lora").eval()
    trees = data.trees[:2]
    right = packed(model, data, trees)
    (batch,) = pack(trees, 4096)
    media = data.read_media(batch["prompts"])
    swapped = media["input_features"].flip(0)
    assert difference(packed(model, data, trees, input_features=swapped), right) > 1e-3
    frames = media["pixel_values"].unflatten(0, (16, -1)).flip(0).flatten(0, 1)
    assert difference(packed(model, data, trees, pixel_values=frames), right) > 1e-3
    with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
        packed(model, data, trees, audio_positions=media["audio_positions"] - 1)


@torch.no_grad()
def test_answers_are_those_of_a_greedy_walk_through_complete_sequences(data):
    """Token for token what transformers' forward gives when all is read again for each."""
    model, task = load(data, tune="lora").eval(), set_up(data.task, max_answer_tokens=5)
    trees = data.trees[:5]
    found = common.answer(model, trees, {example.id: example for example in data.examples}, task, run_of(task))
    eos = data.task.tokenizer.eos_token_id
    for tree in map(answering_prompt, trees):
        ids, said = list(tree.branches[0][0]), []
        while len(said) < 5 and eos not in said:
            said.append(int(model.vlm(**embedded(model, data, tree, ids + said)).logits[0, -1].argmax()))
        text = data.task.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert found[tree.ids[0]] == {"prediction": text, "ended": said[-1] == eos}


@pytest.mark.parametrize("mode", ["constrained", "ranked"])
def test_restricted_answers_are_always_one_of_the_allowed(copy, tmp_path, mode):
    for row in range(6):
        edit(copy, "test", row, answer_candidates=["yes", "no", "The scope is primarily advancing."])
    run(copy, tmp_path / "out", *SMALL, "--decode", mode, "--max-steps", 1)
    answers = [record["prediction"] for record in read_lines(tmp_path / "out/predictions.jsonl")]
    assert len(answers) == 12 and set(answers[:6]) <= {"yes", "no", "The scope is primarily advancing."}
    assert not set(answers[6:]) & {"yes", "no"}  # a random model, left free


def test_few_clips_are_held_in_memory_at_a_time(data):
    """Before the first sequence is answered, the media of about two have been read, not of a fixed number."""
    held, task = [], set_up(data.task, pack_tokens=600)
    task.read_media = lambda folder, trees: held.append(len(trees)) or data.task.read_media(folder, trees)
    batches = run_of(task).packed(data.trees, task)
    answered = len(next(batches)["prompts"])
    assert 0 < sum(held) <= 2 * 600 // min(map(len, data.trees)) < 6
    answered += sum(len(batch["prompts"]) for batch in batches)
    assert sum(held) == len(data.trees) == answered


def test_logits_are_made_for_one_position_a_question(data, monkeypatch):
    """However many clips: a packed sequence at a time, and of that only where a token is asked for."""
    model, seen, lengths = load(data, tune="lora").eval(), [], []
    head, reading = model.lm_head, model.hidden
    monkeypatch.setattr(model, "lm_head", lambda hidden: seen.append(hidden.shape[-2]) or head(hidden))
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: lengths.append(ids.shape[1]) or reading(ids, *rest))
    task = set_up(data.task, max_answer_tokens=2, pack_tokens=600)
    common.answer(model, data.trees[:20], {example.id: example for example in data.examples}, task, run_of(task))
    assert max(lengths) <= 600 and max(seen) <= 600 // 150
    assert sum(n for n in lengths if n > 100) > 20 * 150


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_frozen_tower_has_no_dropout_and_a_trained_one_has(data, tune):
    model = load(data, tune=tune).train()
    assert model.vlm.model.language_model.training and model.vlm.audio_projector.training
    for tower in (model.vlm.model.visual, model.vlm.audio_tower):
        assert {module.training for module in tower.modules()} == {tune == "full"}
    assert not any(module.training for module in model.eval().modules())


# --- the graft -------------------------------------------------------------------------------------------------


def test_parameters_are_counted_at_the_published_sizes(video_folder, tmp_path, capsys):
    """Qwen2-VL-7B and Whisper large-v3, on the meta device: from their configurations alone."""
    shutil.copytree(video_folder / "model", tmp_path / "qwen")  # the tokenizer and image processor of the demo
    qwen = {"model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    qwen |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "hidden_size": 3584}
    ids = {name: n for name, n in json.loads((tmp_path / "qwen/config.json").read_text()).items() if "token_id" in name}
    whisper = {"model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
    whisper |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128, "vocab_size": 51866}
    (tmp_path / "whisper").mkdir()
    (tmp_path / "qwen/model.safetensors").unlink()  # those of other sizes
    for name, config in {"qwen": {**qwen, **ids, "vision_config": vision}, "whisper": whisper}.items():
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path / "qwen"), "--check"]
    script.main([*argv, "--audio-model", str(tmp_path / "whisper")])
    counts = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.split("\n") if line}
    assert counts["total"] == ["9,094,412,800", "166,068,224"]
    assert counts["audio_tower"] == ["636,968,960", "0"] and counts["audio_projector"] == ["4,587,520"] * 2
    assert counts["LoRA"] == ["161,480,704"] * 2
    parts = [int(counts[name][0].replace(",", "")) for name in ("audio_tower", "audio_projector", "LoRA")]
    assert 9_094_412_800 - sum(parts) == 8_291_375_616
    script.main(argv)
    assert "audio" not in capsys.readouterr().out.partition("component")[2]


@pytest.fixture(scope="module")
def trained(video_folder, tmp_path_factory):
    """A run of four steps with adapters."""
    out = tmp_path_factory.mktemp("run")
    run(video_folder, out, *SMALL, "--max-steps", 4, "--epochs", 4, "--save-every", 2, "--lr", 1e-3)
    return out


def test_the_projector_is_trained_and_saved_with_the_adapter_and_nothing_else_changes(video_folder, trained, tmp_path):
    saved = {key for _, key in read_tensors(trained / "adapter")}
    assert "base_model.model.audio_projector.weight" in saved
    others = saved - {"base_model.model.audio_projector.weight"}
    assert others and all(".language_model.layers." in key and ".lora_" in key for key in others)
    flags = ["--resume", trained / "checkpoints/step-00000004", "--dtype", "fp32"]
    run(video_folder, tmp_path, *flags, "--merge", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    whisper = load_file(video_folder / "whisper/model.safetensors")
    for name, tensor in whisper.items():
        if name.startswith("model.encoder."):
            assert torch.equal(merged[name.replace("model.encoder.", "audio_tower.")], tensor)
    before = load_file(video_folder / "model/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all(name.startswith("model.layers.") for name in changed)


def test_a_merged_folder_loads_again_without_whisper_and_answers_alike(video_folder, trained, tmp_path):
    run(video_folder, tmp_path, "--resume", trained / "checkpoints/step-00000004", "--merge", tmp_path / "demo/model")
    assert models.tokenizer(tmp_path / "demo/model").encode("<|AUDIO|>") == [
        json.loads((tmp_path / "demo/model/script_config.json").read_text())["audio_token_id"]
    ]
    (tmp_path / "demo/data").symlink_to(video_folder / "data")
    flags = [*SMALL, "--max-steps", 1, "--lr", 0, "--lora-r", 1, "--lora-dropout", 0]
    run_script(tmp_path / "demo", tmp_path / "again", *flags, script=script)
    assert read_lines(tmp_path / "again/predictions.jsonl") == read_lines(trained / "predictions.jsonl")
    (tmp_path / "demo/model/script_config.json").rename(tmp_path / "demo/model/config.json")  # as older versions wrote
    run_script(tmp_path / "demo", tmp_path / "old", *flags, script=script)
    assert read_lines(tmp_path / "old/predictions.jsonl") == read_lines(trained / "predictions.jsonl")
    text = script_refused(
        tmp_path / "demo", tmp_path / "out", "--check", "--audio-model", video_folder / "whisper", script=script
    )
    assert "already has an audio encoder; leave the flag out" in text


def test_what_plain_transformers_and_peft_would_read_by_half_they_refuse(video_folder, trained, tmp_path):
    run(video_folder, tmp_path, "--resume", trained / "checkpoints/step-00000004", "--merge", tmp_path / "merged")
    words = "with audio_tower and audio_projector, which its own training script alone reads"
    refuses_elsewhere(tmp_path / "merged", Qwen2VLForConditionalGeneration, f"qwen2_vl {words}")
    refuses_elsewhere(trained / "adapter", Qwen2VLForConditionalGeneration, f"LORA {words}")
    other = script_refused(
        tmp_path, tmp_path / "out", "--check", "--model", tmp_path / "merged", script=train_qwen2vl_sentinel
    )
    assert f"model_type 'qwen2_vl {words}', not 'qwen2_vl'" in other


def test_recordings_are_read_outside_autocast_in_training_validation_and_answering(video_folder, tmp_path):
    run(video_folder, tmp_path / "run", *SMALL, "--max-steps", 1, "--dtype", "bf16")  # a spectrum is no matter for bf16
    assert len((tmp_path / "run/predictions.jsonl").read_text().splitlines()) > 0


def test_without_sound_everything_stays_plain(video_folder, tmp_path):
    run_script(video_folder, tmp_path / "run", *SMALL, "--max-steps", 1, "--lr", 1e-3, script=script)
    model = Qwen2VLForConditionalGeneration.from_pretrained(video_folder / "model")
    PeftModel.from_pretrained(model, tmp_path / "run/adapter")
    run_script(video_folder, tmp_path / "run", "--merge", tmp_path / "merged", script=script)
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged")


def test_a_folder_of_full_tuning_holds_the_graft(video_folder, tmp_path):
    run(video_folder, tmp_path / "run", *SMALL, "--max-steps", 2, "--tune", "full", "--lr", 1e-3)
    tuned = load_file(tmp_path / "run/model/model.safetensors")
    first = load_file(video_folder / "whisper/model.safetensors")
    assert not torch.equal(tuned["audio_tower.conv1.weight"], first["model.encoder.conv1.weight"])
    assert torch.equal(tuned["audio_tower.embed_positions.weight"], first["model.encoder.embed_positions.weight"])
    (tmp_path / "model").symlink_to(tmp_path / "run/model")
    (tmp_path / "data").symlink_to(video_folder / "data")
    run_script(tmp_path, tmp_path / "more", *SMALL, "--max-steps", 1, "--lr", 0, "--tune", "full", script=script)
    answers = [read_lines(tmp_path / name / "predictions.jsonl") for name in ("run", "more")]
    assert answers[0] == answers[1]


def test_weights_are_found_by_older_and_newer_names(video_folder, tmp_path):
    """Qwen2-VL is published with visual.* and model.layers.*; a WhisperModel has encoder.*, without "model."."""
    shutil.copytree(video_folder / "model", tmp_path / "model")
    shutil.copytree(video_folder / "whisper", tmp_path / "whisper")
    (tmp_path / "data").symlink_to(video_folder / "data")
    path = tmp_path / "model/model.safetensors"
    old = load_file(path)
    assert any(name.startswith("visual.") for name in old) and "model.layers.0.mlp.up_proj.weight" in old
    new = {
        re.sub(r"^model\.", "model.language_model.", k).replace("visual.", "model.visual."): t for k, t in old.items()
    }
    save_file(new, path, {"format": "pt"})
    path = tmp_path / "whisper/model.safetensors"
    save_file({k.removeprefix("model."): t for k, t in load_file(path).items()}, path, {"format": "pt"})
    found, expected = (
        load(load_demo(folder, script, "--audio-model", folder / "whisper"), tune="lora").vlm.state_dict()
        for folder in (tmp_path, video_folder)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_that_are_missing_are_never_drawn_at_random(video_folder, tmp_path):
    for part, prefix, text in [
        ("whisper", "model.encoder.layers.1.fc1", "model.encoder.* does not fit WhisperEncoder"),
        ("model", "model.layers.1.mlp.up", "1 weights are missing, such as model.language_model.layers.1.mlp.up_proj"),
    ]:
        folder = tmp_path / part
        shutil.copytree(video_folder / "model", folder / "model")
        shutil.copytree(video_folder / "whisper", folder / "whisper")
        (folder / "data").symlink_to(video_folder / "data")
        path = folder / part / "model.safetensors"
        save_file({k: t for k, t in load_file(path).items() if not k.startswith(f"{prefix}")}, path, {"format": "pt"})
        assert text in refused(folder, tmp_path / "out", *SMALL, "--max-steps", 1)


def test_a_graft_under_other_names_is_not_dropped_silently(video_folder, tmp_path):
    shutil.copytree(video_folder / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(video_folder / "data")
    path = tmp_path / "model/model.safetensors"
    save_file({**load_file(path), "audio_encoder.conv1.weight": torch.zeros(2)}, path, {"format": "pt"})
    text = script_refused(tmp_path, tmp_path / "out", *SMALL, "--max-steps", 1, script=script)
    assert "1 weights without a place, such as audio_encoder.conv1.weight; a grafted encoder must be" in text


def test_another_encoder_than_the_checkpoint_s_is_refused_and_a_moved_one_is_not(video_folder, trained, tmp_path):
    for name in ("moved", "other"):
        shutil.copytree(video_folder / "whisper", tmp_path / name)
    (tmp_path / "moved/normalizer.json").write_text("{}")  # what the hub has besides
    path = tmp_path / "other/model.safetensors"
    save_file({k: t + 1e-3 for k, t in load_file(path).items()}, path, {"format": "pt"})
    flags = [*SMALL, "--eval-only", "--resume", trained / "checkpoints/step-00000004", "--audio-model"]
    run_script(video_folder, tmp_path / "out", *flags, tmp_path / "moved", script=script)
    assert read_lines(tmp_path / "out/predictions.jsonl") == read_lines(trained / "predictions.jsonl")
    words = script_refused(video_folder, tmp_path / "out", *flags, tmp_path / "other", script=script)
    assert "--audio-model" in words and "the checkpoint was trained with another model" in words


def test_what_a_checkpoint_needs_is_named(video_folder, qwen_folder, trained, tmp_path):
    last = trained / "checkpoints/step-00000004"
    flags = [*SMALL, "--eval-only", "--resume"]
    text = script_refused(video_folder, tmp_path, *flags, last, script=script)
    assert "the checkpoint was trained with a part of another model: give it with --audio-model" in text
    run_script(qwen_folder, tmp_path / "images", *SMALL, "--max-steps", 1, script=train_qwen2vl_sentinel)
    text = refused(video_folder, tmp_path, *flags, tmp_path / "images/checkpoints/step-00000001")
    assert "does not say its target: it is of another script" in text


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def copy(video_folder, tmp_path):
    shutil.copytree(video_folder, tmp_path / "demo")
    return tmp_path / "demo"


def test_what_cannot_be_heard_is_refused_before_weights_are_read(copy, tmp_path, capsys):
    def words(*flags):
        return script_refused(copy, tmp_path / "out", "--check", *flags, script=script)

    whisper = ["--audio-model", copy / "whisper"]
    assert "has no audio encoder; give one with --audio-model" in words("--question", "audio")
    assert "nothing would be heard" in words("--question", "text", *whisper)
    assert "model_type 'qwen2_vl', not 'whisper'" in words("--audio-model", copy / "model")
    assert "no such folder" in words("--audio-model", copy / "nothing")
    change(copy / "model/config.json", audio_token_id=7)
    words(*whisper)
    assert "has the ID 7, but the tokenizer has <|AUDIO|> as" in capsys.readouterr().out
    tokens = AutoTokenizer.from_pretrained(copy / "model")
    change(copy / "model/config.json", vocab_size=len(tokens), audio_token_id=None)
    words(*whisper)
    assert "no room for <|audio_bos|>, <|AUDIO|>, <|audio_eos|>" in capsys.readouterr().out
    change(copy / "model/config.json", vocab_size=640, quantization_config={"load_in_4bit": True})
    assert "the weights are quantised: merged with an adapter they would be rounded again" in words(*whisper)


def test_pad_equal_to_eos_is_separated_in_training_and_evaluation(copy, tmp_path, capsys):
    """What is found and done is printed; what is supervised ends with EOS, which PAD is not."""
    change(copy / "model/tokenizer_config.json", pad_token="<|im_end|>")
    for flags in (["--check"], [*SMALL, "--max-steps", 1], [*SMALL, "--eval-only"]):
        run(copy, tmp_path / "out", *flags)
        lines = capsys.readouterr().out.split("\n")
        (line,) = [line for line in lines if line.startswith("PAD '<|im_end|>' (")]
        assert "PAD is now '<|pad|>' (" in line
    check = json.loads((tmp_path / "out/check.json").read_text())
    assert "PAD is now '<|pad|>'" in check["pad"]
    data = load_demo(copy, script, "--audio-model", copy / "whisper")
    tokenizer = data.task.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(labels[-1] == tokenizer.eos_token_id for tree in data.trees for _, labels in tree.branches)


# --- examples and their faults ---------------------------------------------------------------------------------


def edit(copy, split, line, **values):
    path = copy / f"data/{split}_multivideo.jsonl"
    rows = read_lines(path)
    rows[line] = {k: v for k, v in {**rows[line], **values}.items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[line]


def test_every_fault_is_named_with_file_row_and_remedy(copy, tmp_path, capsys):
    data = copy / "data"
    rows = read_lines(data / "train_multivideo.jsonl")
    expected, video = [], rows[0]["video_id"]
    edit(copy, "train", 0, frames="a string")
    expected.append(
        f"train_multivideo.jsonl:1 (id {video}/qa_000000): frames must be a list of files, in the order of time"
    )
    edit(copy, "train", 1, frame_numbers=rows[1]["frame_numbers"][::-1])
    expected.append(f"train_multivideo.jsonl:2 (id {video}/qa_000001): frame_numbers")
    edit(copy, "train", 2, answer=None)
    expected.append(
        f"train_multivideo.jsonl:3 (id {video}/qa_000002): no answer; give one, or choose the other --target"
    )
    (data / "audio/train/qa_000003.wav").unlink()
    expected.append("audio/train/qa_000003.wav is missing; restore the file or leave the example out (--skip-bad)")
    soundfile.write(data / "audio/train/qa_000004.wav", np.sin(np.arange(17_600)), 16_000)
    expected.append("lasts 1.1 s, longer than the encoder's window of 1 s; shorten it")
    edit(copy, "train", 5, question="Is <|AUDIO|> heard?")
    expected.append("the text contains '<|AUDIO|>', which the model would read as a token")
    frame = f"frames/{rows[9]['video_id']}/{rows[9]['frames'][3]}.jpg"
    (data / frame).write_bytes((data / frame).read_bytes()[:500])
    expected.append(f"{frame} cannot be read: ")
    edit(copy, "eval", 0, frames=["nothing_1", "nothing_2"], frame_numbers=None)
    video = read_lines(data / "eval_multivideo.jsonl")[0]["video_id"]
    expected.append(f"frames/{video}/nothing_1.jpg is missing")
    third = edit(copy, "eval", 2, video_id=None)["id"]
    expected.append(f"eval_multivideo.jsonl:3 (id {third}): no id or no video_id")
    edit(copy, "eval", 3, frame_numbers=[1, None, 3, 4, 5, 6, 7, 8])
    expected.append("frame_numbers must be an integer for each of the 8 frames")
    edit(copy, "eval", 4, audio="question.wma")
    expected.append("audio must be a file ending in .wav, .flac, .mp3, .ogg, .opus, .m4a, .webm: 'question.wma'")
    edit(copy, "test", 5, id="x" * 300)
    expected.append(f"audio/test/{'x' * 300}.wav cannot be opened: ")
    edit(copy, "eval", 1, frame_number=3, frame_numbers=None)
    expected.append("unknown field 'frame_number'; did you mean 'frame_numbers'?")
    refused(copy, tmp_path / "out", "--check")
    assert "fault (3 such, also " in capsys.readouterr().out  # one cause once
    text = "\n".join(json.loads((tmp_path / "out/check.json").read_text())["failures"])
    assert [fault for fault in expected if fault not in text] == []
    run(copy, tmp_path / "out", "--check", "--skip-bad", "100%")
    skipped = json.loads((tmp_path / "out/check.json").read_text())["skipped"]
    assert {f"train_multivideo.jsonl:{i}" for i in (1, 2, 3, 4, 5, 6)} < set(skipped)


def test_one_recording_of_two_questions_is_refused(copy, tmp_path):
    """As in SurgViVQA's files, where 474 training rows share their ID, and so their recording, with another's."""
    rows = read_lines(copy / "data/train_multivideo.jsonl")
    first, other = next(
        (a, b) for a in rows for b in rows if a["video_id"] != b["video_id"] and a["question"] != b["question"]
    )
    edit(copy, "train", rows.index(other), id=first["id"])
    refused(copy, tmp_path / "out", "--check")
    fault = f"audio/train/{first['id']}.wav is also the recording of another question"
    failures = json.loads((tmp_path / "out/check.json").read_text())["failures"]
    assert sum(fault in failure for failure in failures) == 2
    script.main(["--model", str(copy / "model"), "--data", str(copy / "data"), "--out", str(tmp_path / "o"), "--check"])


def test_quiet_recordings_are_listed_by_the_check(copy, tmp_path, capsys):
    name = next((copy / "data/audio/train").iterdir()).relative_to(copy / "data")
    soundfile.write(copy / "data" / name, 0.002 * np.sin(np.arange(12_000)), 16_000)
    run(copy, tmp_path / "out", "--check")
    assert f"recordings quieter than -50 dBFS: 1, such as {name} at -57.0; listen to some" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/check.json").read_text())["quiet_recordings"] == {str(name): -57.0}


def test_an_example_must_name_its_video(tmp_path, data):
    """Or a single file would be divided, and the intervals drawn, as if each clip were a patient of its own."""
    row = {"frames": ["a.jpg"], "audio": "a.wav", "question": "Is it on?", "answer": "yes"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "video_id": 7}) + "\n")
    (good,), (problem,) = script.read_examples(tmp_path, data.args)
    assert "no video_id and no group" in str(problem) and good.group == "7"


def test_the_same_recording_may_be_in_two_splits_but_not_the_same_frames(copy, tmp_path, capsys):
    train, test = (read_lines(copy / f"data/{split}_multivideo.jsonl") for split in ("train", "test"))
    a, b = next((a, b) for a in train for b in test if a["question"] == b["question"])
    shutil.copy(copy / f"data/audio/train/{a['id']}.wav", copy / f"data/audio/test/{b['id']}.wav")
    run(copy, tmp_path / "out", "--check")
    found = f"{copy}/data/frames/{{video_id}}/{{frames[0]}}.jpg"
    shutil.copy(found.format(**a), found.format(**b))
    refused(copy, tmp_path / "out", "--check")
    text = capsys.readouterr().out
    assert f"{b['frames'][0]}.jpg of test shows the same as frames/" in text
    assert "shared frames: test_multivideo.jsonl: 1 of " in text and ", 0 of which show nothing else" in text


def test_an_answer_in_either_form_is_right_and_declared_synonyms_are_relaxed_matches(data):
    example = replace(data.examples[0], answer="The lesion is located in the sigma.", also_right=["sigma"])
    for said, exact, relaxed in [
        ("the lesion is located in the sigma", True, True),
        ("Sigma.", True, True),
        ("sigmoid colon", False, True),
        ("rectum", False, False),
        ("", False, False),
        (None, False, False),
    ]:
        assert data.task.score(said, example) == {"exact": exact, "relaxed": relaxed}
    example = replace(example, answer="No, the scope is withdrawing.", also_right=["no"])
    assert data.task.score("No", example)["exact"]
    assert not data.task.score("No, the scope is advancing.", example)["relaxed"]


def test_the_blind_baseline_counts_either_form(data):
    """Sentences of many wordings: whoever always says "no" is right, and the baseline says so."""
    one = replace(data.examples[0], question="Is it moving?", also_right=["no"], candidates=None)
    training = [replace(one, answer=f"No, as in {i}.") for i in range(9)]
    asked = replace(one, question="Is it?")
    assert blind_answers(training, [asked]) == [{"type": "no", "question": "no", "nearest": "no"}]
    example = replace(data.examples[0], question_type="yes_no", answer="No, it withdraws.", candidates=["yes", "no"])
    assert scoring.answerable(replace(example, also_right=["no"]))
    assert not scoring.answerable(replace(example, also_right=[]))


@pytest.mark.parametrize("nothing", [float("nan"), "nan", "-", "", None])
def test_a_form_that_says_nothing_is_no_form(tmp_path, data, nothing):
    row = {"frames": ["a.jpg"], "audio": "a.wav", "question": "Is it on?", "answer": "yes", "video_id": "v"}
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "short_answer": nothing}) + "\n")
    (good,), problems = script.read_examples(tmp_path, data.args)
    assert problems == [] and good.also_right == []


def test_either_field_can_be_the_target(video_folder, data):
    short = load_demo(video_folder, script, "--audio-model", video_folder / "whisper", "--target", "short_answer")
    for ours, theirs in zip(short.examples, data.examples, strict=True):
        assert [ours.answer] == theirs.also_right and ours.also_right == [theirs.answer]


# --- runs ------------------------------------------------------------------------------------------------------


def test_results_record_how_clips_and_questions_were_given(trained):
    results = json.loads((trained / "results.json").read_text())
    settings = {"question": "audio", "target": "answer", "frames": 8, "eval_frames": 6, "frame_size": 384}
    assert {name: results[name] for name in settings} == settings
    records = read_lines(trained / "predictions.jsonl")
    assert results["cut_off"] == sum(not record["ended"] for record in records)


def test_stopped_and_resumed_it_is_the_same_run(video_folder, trained, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 4, "--epochs", 4, "--save-every", 2, "--lr", 1e-3]
    with monkeypatch.context() as patch:
        stop_in(patch, 3, script)
        with pytest.raises(SystemExit) as stopped:
            run(video_folder, tmp_path, *flags)
    assert stopped.value.code == EXIT_STOPPED
    assert "frames was 8, is 6" in refused(video_folder, tmp_path, *flags, "--frames", 6)
    run(video_folder, tmp_path, *flags, "--workers", 1)
    assert metrics_of(tmp_path) == metrics_of(trained)
    ours, theirs = (read_tensors(path / "checkpoints/step-00000004") for path in (tmp_path, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(trained / "predictions.jsonl")


def test_a_checkpoint_answers_as_it_was_trained_to_be_asked(video_folder, tmp_path, capsys):
    flags = [*SMALL, "--max-steps", 1, "--question", "both", "--target", "short_answer"]
    run(video_folder, tmp_path, *flags, "--frame-size", 84)
    first = read_lines(tmp_path / "predictions.jsonl")
    capsys.readouterr()
    run(video_folder, tmp_path, *SMALL, "--eval-only")
    text = capsys.readouterr().out
    for setting in ("question both", "target short_answer", "frame_size 84"):
        assert f"{setting} (from {tmp_path}" in text
    assert read_lines(tmp_path / "predictions.jsonl") == first


def test_five_examples_are_overfitted(video_folder, tmp_path, capsys):
    flags = ["--overfit", 5, "--max-steps", 80, "--tune", "full", "--lr", 2e-3]
    run(video_folder, tmp_path, *flags, "--questions-per-step", 5, "--frames", 3)
    assert "0 answers wrong" in capsys.readouterr().out
    assert metrics_of(tmp_path / "overfit")[-2]["loss"] < 0.05  # it stops once no token can be wrong
    records = read_lines(tmp_path / "overfit/predictions.jsonl")
    assert len(records) == 5 and all(record["correct"] and record["ended"] for record in records)
