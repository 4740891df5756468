"""What a run says before its first step: little, in short lines, without colours where nobody would see them."""

import importlib
import re

import pytest
from helpers import run

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
