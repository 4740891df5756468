"""Scaffold, to be deleted: the modules of the first version under names of their own, while rooms are rebuilt."""
import sys
from pathlib import Path

PROJ = str(Path(__file__).resolve().parents[1] / "base")
HERE = str(Path(__file__).resolve().parent)
NAMES = ["common", "runtime", "report", "report_page", "train_llava_med", "train_qwen2vl_sentinel"]
NAMES += ["train_surg_video_vqa", "train_umbrella_mri", "train_video_plain_lm"]
ours = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] in (*NAMES, "inputs")}
path, sys.path[:] = sys.path[:], [PROJ, *[p for p in sys.path if str(Path(p).resolve()) != HERE]]
import common  # noqa
import report  # noqa
import runtime  # noqa
import train_llava_med as llava  # noqa
import train_qwen2vl_sentinel as qwen  # noqa
import train_surg_video_vqa as surg  # noqa
import train_umbrella_mri as mri  # noqa
import train_video_plain_lm as plain  # noqa

for name in NAMES:
    sys.modules["old_" + name] = sys.modules.pop(name)
sys.modules.update(ours)
sys.path[:] = path
