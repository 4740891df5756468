"""What a run says before its first step: little, in short lines, without colours where nobody would see them."""

import importlib
import json
import os
import re
import shutil
from threading import Event

import pytest
import transformers
from helpers import run

from runtime import files

CASES = {  # script: (fixture of its demo, flags)
    "llava_med": ("demo_folder", "--pack-tokens 512"),
    "qwen2vl_sentinel": ("qwen_folder", "--pack-tokens 1024"),
    "surg_video_vqa": ("video_folder", "--pack-tokens 1280 --target short_answer --audio-model DEMO/whisper"),
    "umbrella_mri": ("mri_folder", "--modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2"),
    "video_plain_lm": ("plain_folder", "--vision-model DEMO/vision --from-scratch --slow-grid 6"),
}


@pytest.mark.parametrize("name", CASES)
def test_at_most_25_lines_before_the_first_step(name, request, tmp_path, capsys):
    fixture, flags = CASES[name]
    folder = request.getfixturevalue(fixture)
    flags = [*flags.replace("DEMO", str(folder)).split(), "--max-steps", 1, "--max-answer-tokens", 1]
    capsys.readouterr()  # what writing the demo has said
    run(folder, tmp_path, *flags, script=importlib.import_module(f"train_{name}"))
    text = capsys.readouterr().out
    before = text[: text.index("step 00001")].splitlines()
    assert len(before) <= 25, "\n".join(before)
    assert max(map(len, before)) <= 200, "\n".join(line for line in before if len(line) > 200)
    assert "\033[" not in text
    settings, device = before[0], next(line for line in before if line.startswith("device "))
    assert settings.startswith("settings: ") and device == "device cpu, dtype torch.float32"
    assert any(re.fullmatch(r"1 steps of at most \d+ questions, from step 0", line) for line in before)
    assert sum(line.startswith("trained: ") for line in before) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_restart_of_any_script_checks_no_file_again(name, request, tmp_path, capsys):
    fixture, flags = CASES[name]
    folder, script = request.getfixturevalue(fixture), importlib.import_module(f"train_{name}")
    flags = flags.replace("DEMO", str(folder)).split()
    for known, more in ((False, ["--check"]), (True, ["--max-steps", 1, "--max-answer-tokens", 1, "--limit", 9])):
        capsys.readouterr()
        run(folder, tmp_path, *flags, "--limit", 9, *more, script=script)
        assert ("as checked before" in capsys.readouterr().out) == known


def planted(folder, out, kind, marker):
    """A copy of a demo whose model folders all name Python code of their own, which would write `marker`."""
    shutil.copytree(folder, out)
    for model in (path.parent for path in list(out.rglob("config.json"))):
        (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
        names = ["Config", "Tokenizer", "Processor", "ImageProcessor", "FeatureExtractor", "VideoProcessor"]
        names += ["Model", "ModelForCausalLM", "ModelForImageTextToText"]
        code = {"auto_map": {f"Auto{name}": "evil.Evil" for name in names}}
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
            path = model / name
            found = json.loads(path.read_text()) if path.is_file() else {}
            if name == "tokenizer_config.json":
                code = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
            if kind == "unknown" and name == "config.json":
                found["model_type"] = "evil"
            if kind == "nested" and "text_config" in found:  # a type whose configuration alone transformers has
                found["text_config"] |= {"model_type": "emu3_text_model", "pad_token_id": 0, "name_or_path": str(model)}
                found["text_config"] |= code
            if kind == "tokenizer" and name == "tokenizer_config.json":
                found["tokenizer_class"] = "EvilTokenizer"
            path.write_text(json.dumps(found | code))
    return out


AUTO_PARTS = ["llava_med", "umbrella_mri"]  # their models ask AutoModel for their parts
KINDS = [(name, kind) for name in CASES for kind in ("known", "unknown", "tokenizer")]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, *((name, "nested") for name in AUTO_PARTS)])
def test_code_in_a_model_folder_never_runs_and_is_never_asked_about(name, kind, request, tmp_path, monkeypatch):
    """transformers would ask on the terminal: `yes | python train_….py --model evil` answered for the user."""
    fixture, flags = CASES[name]
    asked, marker = [], tmp_path / "ran"
    folder = planted(request.getfixturevalue(fixture), tmp_path / "demo", kind, marker)
    if kind != "nested":  # there alone code is not forbidden by name
        monkeypatch.setattr(transformers.dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "yes")
    flags = [*flags.replace("DEMO", str(folder)).split(), "--max-steps", 1, "--limit", 4, "--max-answer-tokens", 1]
    try:
        run(folder, tmp_path / "run", *flags, script=importlib.import_module(f"train_{name}"))
    except SystemExit as ended:
        assert kind != "known" and isinstance(ended.code, str) and "trust_remote_code" not in ended.code
        assert str(folder) in ended.code
    assert asked == [] and not marker.exists()


def test_what_ends_the_reading_of_files_waits_for_a_few_of_them_alone(monkeypatch):
    """A fault of the script, or a signal: of 20,000 videos each thread had 64 to finish first."""
    ended, opened = Event(), []

    def bar(found, **_):
        try:
            yield from found
        finally:  # what has not begun is cancelled by now
            ended.set()

    def look(name):
        opened.append(name)
        if name == 0:
            raise SystemExit("a fault of the script")
        ended.wait()

    monkeypatch.setattr(files, "progress", bar)
    with pytest.raises(SystemExit, match="a fault of the script"):
        files.in_threads(look, list(range(20_000)))
    assert len(opened) <= 8 * min(16, os.cpu_count() or 1)
    assert files.in_threads(str, [3, 1, 2]) == {3: "3", 1: "1", 2: "2"} and files.in_threads(str, []) == {}
