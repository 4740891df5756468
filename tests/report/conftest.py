"""The five demos, each with its script and the flags that it needs."""

from pathlib import Path

import pytest

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm

VOLUMES = ["--modality", "T1:32x32x32:8x8x8", "--modality", "rsfMRI:24x24x24x4:8x8x8x2"]
LITTLE = ["--fast-frames", 2, "--fast-grid", 1, "--slow-frames", 2, "--slow-grid", 2]
DEMOS = [  # flags that name a folder of the demo are paths
    ("demo_folder", train_llava_med, []),
    ("qwen_folder", train_qwen2vl_sentinel, []),
    ("video_folder", train_surg_video_vqa, ["--audio-model", Path("whisper")]),
    ("mri_folder", train_umbrella_mri, VOLUMES),
    ("plain_folder", train_video_plain_lm, ["--vision-model", Path("vision"), "--from-scratch", *LITTLE]),
]


@pytest.fixture(params=DEMOS, ids=lambda demo: demo[1].__name__)
def demo(request):
    """(folder, script, its flags)"""
    name, script, flags = request.param
    folder = request.getfixturevalue(name)
    return folder, script, [folder / flag if isinstance(flag, Path) else flag for flag in flags]
