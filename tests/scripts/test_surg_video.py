"""train_surg_video_vqa on a tiny Qwen2-VL and a tiny Whisper in the real formats: clips, recordings, the graft."""

import json
import random
import re
import shutil
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers import difference, gradients, load_demo, metrics_of, read_lines, read_tensors, stop_in
from helpers import refused as script_refused
from helpers import run as run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperFeatureExtractor, WhisperModel

import common
import runtime
import train_qwen2vl_sentinel
import train_surg_video_vqa as script
from common import IGNORE, answering_prompt, pack

SMALL = ["--limit", 12, "--questions-per-step", 4, "--max-answer-tokens", 4]
REAL = Path(__file__).parents[2] / "shared/data/surgvivqa_audio"


def run(folder, out, *flags):
    run_script(folder, out, "--audio-model", folder / "whisper", *flags, script=script)


def refused(folder, out, *flags) -> str:
    return script_refused(folder, out, "--audio-model", folder / "whisper", *flags, script=script)


@pytest.fixture(scope="module")
def data(video_folder):
    return load_demo(video_folder, script, "--audio-model", video_folder / "whisper")


def load(data, **settings) -> script.SurgVideo:
    args = SimpleNamespace(**{**vars(data.args), **settings})
    torch.manual_seed(0)
    model = script.load_model(data.folder / "model", args, data.text, torch.float32)
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
    rows = {row.id: row for row in asked.rows}
    for tree in asked.trees[:4]:
        for name, (input_ids, labels) in zip(tree.ids, tree.branches, strict=True):
            row = rows[name]
            with wave.open(str(video_folder / "data/audio/train" / f"{name.split('/')[1]}.wav")) as file:
                positions = -(-round(file.getnframes() * 16_000 / file.getframerate()) // 320)  # 20 ms each
            sound = "" if question == "text" else f"<|audio_bos|>{'<|AUDIO|>' * positions}<|audio_eos|>"
            words = "Answer the spoken question." if question == "audio" else f"Question: {row.question}"
            frame = f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>"
            text = (
                f"<|im_start|>system\n{script.SYSTEM}<|im_end|>\n<|im_start|>user\n{sound}{frame * 8}{words}"
                f"<|im_end|>\n<|im_start|>assistant\n"
            )
            given = [token for token, label in zip(input_ids, labels, strict=True) if label == IGNORE]
            assert tree.prefix + given == tokenizer.encode(text)
            assert tokenizer.decode([label for label in labels if label != IGNORE]) == row.answer + "<|im_end|>"
    questions = {len(tree.ids) for tree in asked.trees}
    assert questions == ({3} if question == "text" else {1})  # a clip is read once for all written questions


def test_frames_are_chosen_evenly_in_order_and_the_first_is_always_in():
    eight = list("abcdefgh")
    assert script.choose_frames(eight, 6) == list("abdegh")
    assert script.choose_frames(eight, 8) == script.choose_frames(eight, 20) == eight
    assert script.choose_frames(eight, 1) == ["a"] and script.choose_frames(eight, 2) == ["a", "h"]
    for n in range(1, 40):
        for count in range(1, 40):
            chosen = script.choose_frames(list(range(n)), count)
            assert len(chosen) == min(n, count) and chosen == sorted(set(chosen)) and chosen[0] == 0
            gaps = np.diff(chosen)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_evaluation_sees_fewer_frames_and_says_so(video_folder, data, capsys):
    text = data.text
    train, test = (next(row for row in data.rows if row.split == split) for split in ("train", "test"))
    assert text.frames(train) == train.frames and len(train.frames) == 8
    assert text.frames(test) == [test.frames[i] for i in (0, 1, 3, 4, 6, 7)]
    prefix, _, _ = script.encode_row(test, text)
    assert prefix.count(text.image_id) == 6 * 16
    script.load_text(video_folder / "model", data.args)
    assert "a training clip has up to 8, one of val and test up to 6" in capsys.readouterr().out
    script.load_text(video_folder / "model", SimpleNamespace(**{**vars(data.args), "eval_frames": 8}))
    assert "frames differ" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [(384, 288), (1440, 1080), (1350, 1080), (200, 100), (30, 900), (385, 3)])
def test_frames_are_reduced_as_they_are_counted(data, tmp_path, size):
    """The longer side becomes 384 pixels, small frames stay, and placeholders equal what the processor cuts."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    text = replace(data.text, measured={"a.png": script.measure(tmp_path, "a.png")})
    read = script.read_images(tmp_path, text, [SimpleNamespace(media={"frames": ["a.png"], "audio": None})])
    assert read["image_grid_thw"].tolist() == [list(text.grid("a.png"))]
    width, height = script.reduced(size, 384)
    assert max(width, height) == min(384, max(size))
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02) or min(width, height) <= 15
    expected = Image.new("RGB", size)
    expected.thumbnail((384, 384))
    assert abs(expected.width - width) <= 1 and abs(expected.height - height) <= 1


def test_positions_are_those_of_the_whole_row(data):
    """Prefix from get_rope_index, branches from its largest position on: what the model gives for the row itself."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(data.folder / "model").model
    for tree in data.trees[:4]:
        (row,) = pack([tree], 4096)
        is_image = (row["input_ids"] == data.text.image_id).int()
        grid = data.read_media([tree])["image_grid_thw"]
        expected, _ = model.get_rope_index(row["input_ids"], mm_token_type_ids=is_image, image_grid_thw=grid)
        assert torch.equal(row["position_ids"], expected)


# --- recordings ------------------------------------------------------------------------------------------------


def tone(rate: int, seconds: float, frequency: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000])
def test_resampling_keeps_a_tone_and_drops_what_16_khz_cannot_hold(rate):
    found = script.resample(tone(rate, 0.7, 440).astype(np.float32), rate)
    assert len(found) == -(-(round(0.7 * rate) * 16_000) // rate) and found.dtype == np.float32
    expected = tone(16_000, 0.7, 440)[: len(found)]
    assert np.abs(found[800:-800] - expected[800 : len(expected) - 800]).max() < 2e-3
    if rate > 20_000:
        assert np.abs(script.resample(tone(rate, 0.7, 10_000), rate)[800:-800]).max() < 2e-3


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_of_every_depth_is_read_as_soundfile_reads_it(tmp_path, subtype):
    sound = np.stack([tone(16_000, 0.1, 440), tone(16_000, 0.1, 1000)], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, 16_000, subtype=subtype)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(script.read_audio(tmp_path, "a.wav"), expected.mean(axis=1), atol=1e-6)


def test_wav_needs_no_other_package_and_the_rest_names_the_one_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    soundfile.write(tmp_path / "a.wav", tone(24_000, 0.3, 440), 24_000)
    soundfile.write(tmp_path / "a.flac", tone(24_000, 0.3, 440), 24_000)
    assert len(script.read_audio(tmp_path, "a.wav")) == 4800
    with pytest.raises(ValueError, match=r"a.flac cannot be read: .flac needs soundfile: pip install soundfile, or"):
        script.read_audio(tmp_path, "a.flac")


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_compressed_recordings_are_read(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", tone(24_000, 1.0, 440), 24_000)
    found = script.read_audio(tmp_path, f"a.{suffix}")
    loudest = np.abs(np.fft.rfft(found)).argmax() * 16_000 / len(found)
    assert loudest == pytest.approx(440, abs=3) and len(found) == pytest.approx(16_000, abs=2000)


def test_recordings_that_cannot_be_heard_are_refused_by_name(tmp_path):
    """Cut off, damaged, of nothing, of nothing but zeros: never silence in place of a question."""
    sound = tone(16_000, 0.5, 440)
    for name in ("whole.wav", "whole.mp3", "whole.flac"):
        soundfile.write(tmp_path / name, sound, 16_000)
    wav, mp3, flac = ((tmp_path / f"whole.{suffix}").read_bytes() for suffix in ("wav", "mp3", "flac"))
    kinds = {
        "float": ("WAV", "FLOAT"),
        "extended": ("WAVEX", "PCM_24"),
        "law": ("WAV", "ULAW"),
        "ima": ("WAV", "IMA_ADPCM"),
    }
    for name, (form, subtype) in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, 16_000, format=form, subtype=subtype)
        assert len(script.read_audio(tmp_path, f"{name}.wav")) == pytest.approx(8000, abs=500)
    no_rate = wav[:24] + bytes(4) + wav[28:]
    cut = {f"cut_{name}.wav": (tmp_path / f"{name}.wav").read_bytes()[:3000] for name in kinds}
    files = {
        **{name: (content, "cut off; copy it again") for name, content in cut.items()},
        "cut.wav": (wav[:1000], "cut off; copy it again"),
        "cut.mp3": (mp3[: len(mp3) // 2], "cut off; copy it again"),
        "cut.flac": (flac[: len(flac) // 2], ""),
        "header.wav": (wav[:20], "the file ends within its header"),
        "rate.wav": (no_rate, "0 samples a second"),
        "format.wav": (wav[:16] + b"\xff\xff" + wav[18:], "no WAV file"),
        "text.wav": (b"no sound at all" * 10, "no WAV file"),
        "empty.wav": (b"", "the file ends within its header"),
        "text.mp3": (b"no sound at all" * 10, ""),
    }
    for name, (content, why) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{why}"):
            script.read_audio(tmp_path, name)
    for name, samples in {
        "none.wav": np.zeros(0),
        "zeros.wav": np.zeros(1000),
        "cancel.wav": np.stack([sound, -sound], axis=1),
    }.items():
        soundfile.write(tmp_path / name, samples, 16_000, subtype="FLOAT")
        with pytest.raises(ValueError, match=f"{name} cannot be read: it is silent .* record it again"):
            script.read_audio(tmp_path, name)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan.wav cannot be read: not all of its samples are numbers"):
        script.read_audio(tmp_path, "nan.wav")
    with pytest.raises(ValueError, match=r"missing.wav is missing"):
        script.read_audio(tmp_path, "missing.wav")


def test_unusual_wav_headers_are_read(tmp_path):
    """Written to a pipe, which has no length to write; WAVE_FORMAT_EXTENSIBLE; with chunks that are no sound."""
    sound = tone(16_000, 0.2, 440)
    soundfile.write(tmp_path / "whole.wav", sound, 16_000)
    expected, whole = script.read_audio(tmp_path, "whole.wav"), (tmp_path / "whole.wav").read_bytes()
    at = whole.index(b"data") + 4
    endless = whole[:4] + b"\xff" * 4 + whole[8:at] + b"\xff" * 4 + whole[at + 4 :]
    (tmp_path / "pipe.wav").write_bytes(endless)
    (tmp_path / "more.wav").write_bytes(whole + b"LIST\x04\x00\x00\x00abcd")
    soundfile.write(tmp_path / "extended.wav", sound, 16_000, format="WAVEX")
    for name in ("pipe.wav", "more.wav", "extended.wav"):
        np.testing.assert_array_equal(script.read_audio(tmp_path, name), expected)


def test_a_recording_is_a_token_every_20_ms_or_the_whole_window(data):
    text = replace(data.text, measured={"a.wav": 16_000 * 3, "b.wav": 16_000 * 3 + 1, "c.wav": 16_000 * 31})
    text.extractor = WhisperFeatureExtractor(80)  # the real window of 30 s
    assert (text.audio_positions("a.wav"), text.audio_positions("b.wav"), text.audio_positions(None)) == (150, 151, 0)
    with pytest.raises(ValueError, match=r"c.wav lasts 31.0 s, longer than the encoder's window of 30 s; shorten it"):
        text.audio_positions("c.wav")
    text.settings = SimpleNamespace(**{**vars(data.args), "audio_tokens": "full"})
    assert text.audio_positions("a.wav") == 1500


# --- packing is exact, with sound ------------------------------------------------------------------------------


def packed(model, data, trees, **changed):
    (row,) = pack(trees, 4096)
    return gradients(model, model({**row, **data.read_media(row["prompts"]), **changed})[0])


def embedded(model, data, tree, input_ids) -> dict:
    """A whole row put together by hand: Qwen2-VL's embedding and tower, WhisperModel's encoder, the projector."""
    vlm, ids = model.vlm, torch.tensor([tree.prefix + input_ids])
    media = data.read_media([tree])
    heard = WhisperModel.from_pretrained(data.folder / "whisper").encoder.eval()
    with torch.no_grad():
        sound = heard(media["input_features"]).last_hidden_state[0, : int(media["audio_positions"])]
    images = torch.cat(vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"]).pooler_output)
    embeds = vlm.get_input_embeddings()(ids).clone()
    embeds[ids == data.text.image_id] = images
    embeds[ids == data.text.audio_id] = sound @ vlm.audio_projector.weight.T
    is_image = (ids == data.text.image_id).int()
    grids = media["image_grid_thw"]
    positions, _ = vlm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grids)
    return {"inputs_embeds": embeds, "position_ids": positions}


def separate(model, data, trees):
    """Each question in a row of its own through transformers' forward."""
    total = 0
    for tree in trees:
        for input_ids, labels in tree.branches:
            log_probs = model.vlm(**embedded(model, data, tree, input_ids)).logits[0].log_softmax(-1)
            for i, label in enumerate(labels):
                if label != IGNORE:
                    total = total - log_probs[len(tree.prefix) + i - 1, label]
    return gradients(model, total)


def test_spoken_questions_side_by_side_equal_separate_rows(data):
    model = load(data, tune="lora").eval()
    trees = data.trees[:3]
    assert len({tree.prefix.count(data.text.audio_id) for tree in trees}) > 1  # of different lengths
    found = packed(model, data, trees)
    assert found["vlm.audio_projector.weight"].norm() > 0
    assert difference(found, separate(model, data, trees)) < 1e-5


def test_recordings_or_frames_in_another_order_are_caught(data):
    model = load(data, tune="lora").eval()
    trees = data.trees[:2]
    right = packed(model, data, trees)
    (row,) = pack(trees, 4096)
    media = data.read_media(row["prompts"])
    swapped = media["input_features"].flip(0)
    assert difference(packed(model, data, trees, input_features=swapped), right) > 1e-3
    frames = media["pixel_values"].unflatten(0, (16, -1)).flip(0).flatten(0, 1)
    assert difference(packed(model, data, trees, pixel_values=frames), right) > 1e-3
    with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
        packed(model, data, trees, audio_positions=media["audio_positions"] - 1)


@torch.no_grad()
def test_answers_are_those_of_a_greedy_walk_through_whole_rows(data):
    """Token for token what transformers' forward gives when the whole row is read again for each."""
    args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 5})
    model = load(data, tune="lora").eval()
    state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, data.read_media)
    trees = data.trees[:5]
    found = script.answer(model, trees, {row.id: row for row in data.rows}, state)
    eos = data.text.tokenizer.eos_token_id
    for tree in map(answering_prompt, trees):
        ids, said = list(tree.branches[0][0]), []
        while len(said) < 5 and eos not in said:
            said.append(int(model.vlm(**embedded(model, data, tree, ids + said)).logits[0, -1].argmax()))
        text = data.text.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert found[tree.ids[0]] == {"prediction": text, "ended": said[-1] == eos}


@pytest.mark.parametrize("mode", ["trie", "score"])
def test_restricted_answers_are_always_one_of_the_allowed(copy, tmp_path, mode):
    for row in range(6):
        edit(copy, "test", row, answer_candidates=["yes", "no", "The scope is primarily advancing."])
    run(copy, tmp_path / "out", *SMALL, "--decode", mode, "--max-steps", 1)
    answers = [record["prediction"] for record in read_lines(tmp_path / "out/predictions.jsonl")]
    assert len(answers) == 12 and set(answers[:6]) <= {"yes", "no", "The scope is primarily advancing."}
    assert not set(answers[6:]) & {"yes", "no"}  # a random model, left free


def test_few_clips_are_held_in_memory_at_a_time(data):
    """Before the first packed row is answered, the media of about two rows have been read, not of a fixed number."""
    held = []
    read = lambda prompts: held.append(len(prompts)) or data.read_media(prompts)  # noqa: E731
    args = SimpleNamespace(**{**vars(data.args), "pack_tokens": 600})
    state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, read)
    rows = script.packed_rows(data.trees, state)
    answered = len(next(rows)["prompts"])
    assert 0 < sum(held) <= 2 * 600 // min(map(len, data.trees)) < 6
    answered += sum(len(row["prompts"]) for row in rows)
    assert sum(held) == len(data.trees) == answered


def test_logits_are_made_for_one_position_a_question(data, monkeypatch):
    """However many clips: a packed row at a time, and of that only where a token is asked for."""
    model, seen, lengths = load(data, tune="lora").eval(), [], []
    head, reading = model.lm_head, model.hidden
    monkeypatch.setattr(model, "lm_head", lambda hidden: seen.append(hidden.shape[-2]) or head(hidden))
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: lengths.append(ids.shape[1]) or reading(ids, *rest))
    args = SimpleNamespace(**{**vars(data.args), "max_answer_tokens": 2, "pack_tokens": 600})
    state = script.Run(args, None, torch.device("cpu"), runtime.StopSignal(), data.text, data.read_media)
    script.answer(model, data.trees[:20], {row.id: row for row in data.rows}, state)
    assert max(lengths) <= 600 and max(seen) <= 600 // 150
    assert sum(n for n in lengths if n > 100) > 20 * 150


# --- the graft -------------------------------------------------------------------------------------------------


def test_count_params_of_the_published_sizes(tmp_path, capsys):
    qwen = {"model_type": "qwen2_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    qwen |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "hidden_size": 3584}
    whisper = {"model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
    whisper |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128, "vocab_size": 51866}
    for name, config in {"qwen": {**qwen, "vision_config": vision}, "whisper": whisper}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path / "qwen"), "--count-params"]
    script.main([*argv, "--audio-model", str(tmp_path / "whisper")])
    counts = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.split("\n") if line}
    assert counts["total"] == ["9,094,412,800", "166,068,224"]
    assert counts["audio_tower"] == ["636,968,960", "0"] and counts["audio_projector"] == ["4,587,520"] * 2
    assert counts["LoRA"] == ["161,480,704"] * 2
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
    before, after = (
        Qwen2VLForConditionalGeneration.from_pretrained(path).state_dict()
        for path in (video_folder / "model", tmp_path / "merged")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.language_model.layers.") for name in changed)


def test_a_merged_folder_is_bf16_loads_again_without_whisper_and_answers_alike(video_folder, trained, tmp_path):
    flags = ["--resume", trained / "checkpoints/step-00000004"]
    run(video_folder, tmp_path, *flags, "--merge", tmp_path / "small")
    assert {tensor.dtype for tensor in load_file(tmp_path / "small/model.safetensors").values()} == {torch.bfloat16}
    run(video_folder, tmp_path, *flags, "--merge", tmp_path / "demo/model", "--dtype", "fp32")
    assert AutoTokenizer.from_pretrained(tmp_path / "demo/model").encode("<|AUDIO|>") == [
        json.loads((tmp_path / "demo/model/config.json").read_text())["audio_token_id"]
    ]
    (tmp_path / "demo/data").symlink_to(video_folder / "data")
    flags = [*SMALL, "--max-steps", 1, "--lr", 0, "--lora-r", 1, "--lora-dropout", 0]
    run_script(tmp_path / "demo", tmp_path / "again", *flags, script=script)
    assert read_lines(tmp_path / "again/predictions.jsonl") == read_lines(trained / "predictions.jsonl")
    text = script_refused(
        tmp_path / "demo", tmp_path / "out", "--check", "--audio-model", video_folder / "whisper", script=script
    )
    assert "already has an audio encoder; leave the flag out" in text


def test_a_folder_trained_whole_holds_the_graft(video_folder, tmp_path, capsys):
    run(video_folder, tmp_path / "run", *SMALL, "--max-steps", 2, "--tune", "full", "--lr", 1e-3)
    whole, first = (
        load_file(tmp_path / "run/model/model.safetensors"),
        load_file(video_folder / "whisper/model.safetensors"),
    )
    assert not torch.equal(whole["audio_tower.conv1.weight"], first["model.encoder.conv1.weight"])
    assert torch.equal(whole["audio_tower.embed_positions.weight"], first["model.encoder.embed_positions.weight"])
    (tmp_path / "model").symlink_to(tmp_path / "run/model")
    (tmp_path / "data").symlink_to(video_folder / "data")
    run_script(tmp_path, tmp_path / "more", *SMALL, "--max-steps", 1, "--lr", 0, "--tune", "full", script=script)
    answers = [read_lines(tmp_path / name / "predictions.jsonl") for name in ("run", "more")]
    assert answers[0] == answers[1]
    capsys.readouterr()
    run_script(tmp_path, tmp_path / "more", "--check", "--question", "both", "--frames", 4, script=script)
    text = capsys.readouterr().out
    assert "was trained with question audio; now it is both" in text
    assert "was trained with frames 8; now it is 4" in text and "audio_tokens auto; now" not in text


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
    shutil.copytree(video_folder / "whisper", tmp_path / "moved")
    (tmp_path / "moved/normalizer.json").write_text("{}")  # what the hub has besides
    flags = [*SMALL, "--eval-only", "--resume", trained / "checkpoints/step-00000004"]
    folder = ["--model", video_folder / "model", "--data", video_folder / "data", "--out", tmp_path / "out"]
    argv = [str(flag) for flag in [*folder, *flags, "--audio-model", tmp_path / "moved"]]
    script.main(argv)
    assert read_lines(tmp_path / "out/predictions.jsonl") == read_lines(trained / "predictions.jsonl")
    path = tmp_path / "moved/model.safetensors"
    save_file({k: t + 1e-3 for k, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(SystemExit, match="was trained with another encoder"):
        script.main(argv)


def test_what_a_checkpoint_needs_is_said(video_folder, qwen_folder, trained, tmp_path):
    last = trained / "checkpoints/step-00000004"
    flags = [*SMALL, "--eval-only", "--resume"]
    text = script_refused(video_folder, tmp_path, *flags, last, script=script)
    assert "hears: give the encoder that it was trained with by --audio-model" in text
    run_script(qwen_folder, tmp_path / "images", *SMALL, "--max-steps", 1, script=train_qwen2vl_sentinel)
    text = refused(video_folder, tmp_path, *flags, tmp_path / "images/checkpoints/step-00000001")
    assert "is of another script, or of an older version: it does not say its question" in text


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def copy(video_folder, tmp_path):
    shutil.copytree(video_folder, tmp_path / "demo")
    return tmp_path / "demo"


def test_what_cannot_be_heard_is_refused_before_weights_are_read(copy, tmp_path):
    def words(*flags):
        return script_refused(copy, tmp_path / "out", "--check", *flags, script=script)

    whisper = ["--audio-model", copy / "whisper"]
    assert "has no audio encoder; give one with --audio-model" in words("--question", "audio")
    assert "nothing would be heard" in words("--question", "text", *whisper)
    assert "model_type 'qwen2_vl', not whisper" in words("--audio-model", copy / "model")
    assert "no such folder" in words("--audio-model", copy / "nothing")
    change(copy / "model/config.json", audio_token_id=7)
    assert "config.json has audio_token_id 7, but the tokenizer has <|AUDIO|> as" in words(*whisper)
    tokens = AutoTokenizer.from_pretrained(copy / "model")
    change(copy / "model/config.json", vocab_size=len(tokens), audio_token_id=None)
    assert "no room for <|audio_bos|>, <|AUDIO|>, <|audio_eos|>" in words(*whisper)
    change(copy / "model/config.json", vocab_size=640, quantization_config={"load_in_4bit": True})
    assert "the weights are quantised: merged with an adapter they would be rounded again" in words(*whisper)


def test_pad_equal_to_eos_is_separated_in_training_and_evaluation(copy, tmp_path, capsys):
    """What verify_tokenizer.sh was for: found and done are printed, what is learned ends with EOS, which PAD is not."""
    change(copy / "model/tokenizer_config.json", pad_token="<|im_end|>")
    for flags in (["--check"], [*SMALL, "--max-steps", 1], [*SMALL, "--eval-only"]):
        run(copy, tmp_path / "out", *flags)
        lines = capsys.readouterr().out.split("\n")
        (line,) = [line for line in lines if "tokenizer_config.json: PAD" in line]
        assert "PAD '<|im_end|>' (" in line and "PAD is now '<|pad|>' (" in line
    check = json.loads((tmp_path / "out/check.json").read_text())
    assert "PAD is now '<|pad|>'" in check["pad"]
    data = load_demo(copy, script, "--audio-model", copy / "whisper")
    tokenizer = data.text.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(labels[-1] == tokenizer.eos_token_id for tree in data.trees for _, labels in tree.branches)


# --- rows and their faults -------------------------------------------------------------------------------------


def edit(copy, split, line, **values):
    path = copy / f"data/{split}_multivideo.jsonl"
    rows = read_lines(path)
    rows[line] = {k: v for k, v in {**rows[line], **values}.items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[line]


def test_every_fault_is_named_with_file_row_and_remedy(copy, tmp_path, capsys):
    data = copy / "data"
    rows = read_lines(data / "train_multivideo.jsonl")
    expected = []
    edit(copy, "train", 0, frames="a string")
    expected.append("train_multivideo.jsonl:1 (id qa_000000): frames must be a list of files, in the order of time")
    edit(copy, "train", 1, frame_numbers=rows[1]["frame_numbers"][::-1])
    expected.append("train_multivideo.jsonl:2 (id qa_000001): frame_numbers")
    edit(copy, "train", 2, answer=None)
    expected.append("train_multivideo.jsonl:3 (id qa_000002): no answer; give one, or choose the other --target")
    (data / "audio/train/qa_000003.wav").unlink()
    expected.append("audio/train/qa_000003.wav is missing; restore the file or leave the row out (--skip-bad)")
    soundfile.write(data / "audio/train/qa_000004.wav", tone(16_000, 1.1, 440), 16_000)
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
    expected.append("frame_numbers must be a whole number for each of the 8 frames")
    edit(copy, "eval", 4, audio="question.m4a")
    expected.append("audio must be a file ending in .wav, .flac, .mp3: 'question.m4a'")
    edit(copy, "eval", 5, id="x" * 300)
    expected.append(f"audio/eval/{'x' * 300}.wav cannot be opened: ")
    edit(copy, "eval", 1, frame_number=3, frame_numbers=None)
    expected.append("unknown field 'frame_number'; did you mean 'frame_numbers'?")
    refused(copy, tmp_path / "out", "--check")
    text = capsys.readouterr().out
    assert [fault for fault in expected if fault not in text] == []
    run(copy, tmp_path / "out", "--check", "--skip-bad")
    skipped = json.loads((tmp_path / "out/check.json").read_text())["skipped"]
    assert {f"train_multivideo.jsonl:{i}" for i in (1, 2, 3, 4, 5, 6)} < set(skipped)


def test_one_recording_of_two_questions_is_refused(copy, tmp_path, capsys):
    """As in SurgViVQA's files, where 474 training rows share their ID, and so their recording, with another's."""
    rows = read_lines(copy / "data/train_multivideo.jsonl")
    first, other = next(
        (a, b) for a in rows for b in rows if a["video_id"] != b["video_id"] and a["question"] != b["question"]
    )
    edit(copy, "train", rows.index(other), id=first["id"])
    refused(copy, tmp_path / "out", "--check")
    text = capsys.readouterr().out
    fault = f"audio/train/{first['id']}.wav is also the recording of another question"
    assert text.count(fault) == 2
    refused(copy, tmp_path / "out", "--check", "--limit", rows.index(first) + 1)  # the other is not even looked at
    assert fault in capsys.readouterr().out
    script.main(["--model", str(copy / "model"), "--data", str(copy / "data"), "--out", str(tmp_path / "o"), "--check"])


def test_two_layouts_in_one_folder_are_refused(copy, tmp_path):
    (copy / "data/train.jsonl").write_text("{}")
    assert "train.jsonl beside SurgViVQA's own files; keep one of the two" in refused(copy, tmp_path / "out", "--check")


def test_a_row_must_name_its_video(tmp_path, data):
    """Or a single file would be divided, and the intervals drawn, as if each clip were a patient of its own."""
    row = {"frames": ["a.jpg"], "audio": "a.wav", "question": "Is it on?", "answer": "yes"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "video_id": 7}) + "\n")
    (good,), (problem,) = script.read_data(tmp_path, data.args)
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
    assert f"{b['frames'][0]}.jpg of test is also in train" in text
    assert "test: 1 of " in text and ", 0 of which show nothing else" in text


def test_canonical_rows_equal_published_ones(video_folder, data, tmp_path):
    """Paths instead of names, another file name: the same tokens."""
    shutil.copytree(video_folder / "data/frames", tmp_path / "frames")
    for split, name in script.PUBLISHED.items():
        rows = read_lines(video_folder / f"data/{name}_multivideo.jsonl")
        lines = [
            {
                "id": f"{row['video_id']}/{row['id']}",
                "frames": [f"frames/{row['video_id']}/{frame}.jpg" for frame in row["frames"]],
                "audio": f"{name}_{row['id']}.wav",
                "group": row["video_id"],
                **{key: row[key] for key in ("question", "question_type", "answer", "short_answer")},
            }
            for row in rows
        ]
        for row in rows:
            shutil.copy(video_folder / f"data/audio/{name}/{row['id']}.wav", tmp_path / f"{name}_{row['id']}.wav")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, problems = script.read_data(tmp_path, data.args)
    assert problems == []
    text = replace(data.text, measured={name: script.measure(tmp_path, name) for row in rows for name in row.media})
    trees, found = script.build_prompts([row for row in rows if row.split == "train"], text, data.args)
    assert found == []
    expected = [(tree.ids, tree.prefix, tree.branches) for tree in data.trees]
    assert [(tree.ids, tree.prefix, tree.branches) for tree in trees] == expected


def test_an_answer_in_either_form_is_right_and_declared_synonyms_are_tolerated(data):
    row = replace(data.rows[0], answer="The lesion is located in the sigma.", also_right=["sigma"])
    for said, exact, tolerant in [
        ("the lesion is located in the sigma", True, True),
        ("Sigma.", True, True),
        ("sigmoid colon", False, True),
        ("rectum", False, False),
        ("", False, False),
        (None, False, False),
    ]:
        assert script.score(said, row) == {"exact": exact, "tolerant": tolerant}
    row = replace(row, answer="No, the scope is withdrawing.", also_right=["no"])
    assert script.score("No", row)["exact"] and not script.score("No, the scope is advancing.", row)["tolerant"]


def test_the_blind_floor_counts_either_form():
    """Sentences of many wordings: whoever always says "no" is right, and the floor says so."""
    rows = [
        {"question_type": "a", "answer": f"No, as in {i}.", "also_right": ["no"], "group": str(i)} for i in range(9)
    ]
    training = [("a", "Is it moving?", [row["answer"], *row["also_right"]]) for row in rows]
    assert common.blind_answers(training, [("a", "Is it?")]) == [{"type": "no", "question": "no", "nearest": "no"}]
    row = {"question_type": "yes_no", "answer": "No, it withdraws.", "candidates": ["yes", "no"]}
    assert common.answerable({**row, "also_right": ["no"]}) and not common.answerable(row)


@pytest.mark.parametrize("nothing", [float("nan"), "nan", "-", "", None])
def test_a_form_that_says_nothing_is_no_form(tmp_path, data, nothing):
    row = {"frames": ["a.jpg"], "audio": "a.wav", "question": "Is it on?", "answer": "yes", "video_id": "v"}
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "short_answer": nothing}) + "\n")
    (good,), problems = script.read_data(tmp_path, data.args)
    assert problems == [] and good.also_right == []


def test_either_field_can_be_the_target(video_folder, data):
    short = load_demo(video_folder, script, "--audio-model", video_folder / "whisper", "--target", "short_answer")
    for ours, theirs in zip(short.rows, data.rows, strict=True):
        assert [ours.answer] == theirs.also_right and ours.also_right == [theirs.answer]


# --- runs ------------------------------------------------------------------------------------------------------


def test_results_record_how_clips_and_questions_were_given(trained):
    results = json.loads((trained / "results.json").read_text())
    told = {"question": "audio", "target": "answer", "frames": 8, "eval_frames": 6, "frame_size": 384}
    assert {name: results[name] for name in told} == told
    records = read_lines(trained / "predictions.jsonl")
    assert results["cut_off"] == sum(not record["ended"] for record in records)


def test_stopped_and_resumed_it_is_the_same_run(video_folder, trained, tmp_path, monkeypatch):
    flags = [*SMALL, "--max-steps", 4, "--epochs", 4, "--save-every", 2, "--lr", 1e-3]
    with monkeypatch.context() as patch:
        stop_in(patch, 3, script)
        with pytest.raises(SystemExit) as stopped:
            run(video_folder, tmp_path, *flags)
    assert stopped.value.code == runtime.EXIT_STOPPED
    assert "frames was 8, is 6" in refused(video_folder, tmp_path, *flags, "--frames", 6)
    run(video_folder, tmp_path, *flags, "--workers", 1)
    assert metrics_of(tmp_path) == metrics_of(trained)
    ours, theirs = (read_tensors(path / "checkpoints/step-00000004") for path in (tmp_path, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(trained / "predictions.jsonl")


def test_a_checkpoint_answers_as_it_was_trained_to_be_asked(video_folder, tmp_path, capsys):
    flags = [*SMALL, "--max-steps", 1, "--question", "both", "--audio-tokens", "full", "--target", "short_answer"]
    run(video_folder, tmp_path, *flags, "--frame-size", 84)
    first = read_lines(tmp_path / "predictions.jsonl")
    capsys.readouterr()
    run(video_folder, tmp_path, *SMALL, "--eval-only")
    text = capsys.readouterr().out
    for setting in ("question both", "audio_tokens full", "target short_answer", "frame_size 84"):
        assert f"{setting} (from {tmp_path}" in text
    assert read_lines(tmp_path / "predictions.jsonl") == first


def test_five_rows_are_learned_by_heart(video_folder, tmp_path, capsys):
    flags = ["--overfit", 5, "--overfit-loss", 0.01, "--overfit-steps", 80, "--tune", "full", "--lr", 2e-3]
    run(video_folder, tmp_path, *flags, "--questions-per-step", 5, "--frames", 3)
    assert "0 answers wrong (must be none)" in capsys.readouterr().out
    assert metrics_of(tmp_path / "overfit")[-2]["loss"] < 0.01
    records = read_lines(tmp_path / "overfit/predictions.jsonl")
    assert len(records) == 5 and all(record["correct"] and record["ended"] for record in records)


# --- real annotations ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """SurgViVQA's own annotations, each frame a tiny picture of its own."""
    if not REAL.is_dir():
        pytest.skip("the published annotations are not here")
    folder = tmp_path_factory.mktemp("published")
    draw = random.Random(0)
    for name in script.PUBLISHED.values():
        shutil.copy(REAL / f"{name}_multivideo.jsonl", folder)
        for row in read_lines(folder / f"{name}_multivideo.jsonl"):
            for frame in row["frames"]:
                path = folder / f"frames/{row['video_id']}/{frame}.png"
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.frombytes("RGB", (4, 4), draw.randbytes(48)).save(path)
    return folder


def test_the_split_check_counts_what_the_published_splits_share(video_folder, published, tmp_path, capsys):
    """869 of 3,070 frames of eval are in train, too; so is every video of eval. The test split is clean."""
    argv = ["--model", str(video_folder / "model"), "--data", str(published), "--out", str(tmp_path), "--check"]
    script.main([*argv, "--skip-bad"])
    text = capsys.readouterr().out
    assert (
        "val: 869 of 3070 files shown are in earlier splits too, in 169 of 398 questions, 45 of which show nothing"
        in text
    )
    assert "test: 0 of 6685 files shown are in earlier splits too, in 0 of 1000 questions" in text
    assert len(re.findall(r"^fault: eval_multivideo.*: group 002-00. of val is also in train", text, re.M)) == 398
    report = json.loads((tmp_path / "check.json").read_text())
    assert [report["splits"][split]["questions"] for split in ("train", "val", "test")] == [2302, 0, 1000]
    val, test = (report["shared_with_earlier_splits"][split] for split in ("val", "test"))
    assert (val["shared"], val["shown"], val["questions_touched"], val["questions_contained"]) == (869, 3070, 169, 45)
    assert (test["shared"], test["questions_touched"]) == (0, 0)


def test_the_blind_majority_of_the_published_test_is_57_3_percent(published):
    args = SimpleNamespace(question="text", target="answer", only_ids=None, limit=None)
    for target in ("answer", "short_answer"):
        rows, problems = script.read_data(published, SimpleNamespace(**{**vars(args), "target": target}))
        assert problems == []
        train, test = ([row for row in rows if row.split == split] for split in ("train", "test"))
        training = [(r.question_type, r.question, [r.answer, *r.also_right]) for r in train]
        said = common.blind_answers(training, [(row.question_type, row.question) for row in test])
        right = [script.score(blind["type"], row)["exact"] for blind, row in zip(said, test, strict=True)]
        assert (len(right), sum(right)) == (1000, 573)


def test_published_recordings_that_two_questions_share_are_all_found(published):
    args = SimpleNamespace(question="audio", target="answer", only_ids=None, limit=None)
    _, problems = script.read_data(published, args)
    assert sum("is also the recording of another question" in problem.text for problem in problems) == 474 + 18
