"""The contract holds for the five scripts, and each of its points is broken, by name, by a script that breaks it."""

import re
import signal
from pathlib import Path

import pytest
from copies import HOUSE, changed, few_images, of_every_kind, write_qwen3vl

from inputs.contract import Contract

VOLUMES = "--modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2"
FIVE = {
    "llava_med": ("demo_folder", ""),
    "qwen2vl_sentinel": ("qwen_folder", ""),
    "surg_video_vqa": ("video_folder", "--frames 4 --eval-frames 4 --audio-model {folder}/whisper"),
    "umbrella_mri": ("mri_folder", VOLUMES),
    "video_plain_lm": (
        "plain_folder",
        "--vision-model {folder}/vision --from-scratch --fast-frames 2 --slow-frames 2 --slow-grid 6",
    ),
}


def contract(script: Path, model: Path, data: Path, folder: Path, capsys, *flags) -> tuple[bool, dict[str, str]]:
    """Whether it holds, and what was said of each point; the signal handlers of this process are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    folder.mkdir()
    try:
        flags = ["--model", str(model), "--data", str(data), "--max-answer-tokens", "2", "--lora-r", "4", *flags]
        held = Contract(script, flags, folder).holds()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    points = "task|data|loss|packing|training|adapter|merged"
    said = re.findall(rf"^  ({points}) +(.*(?:\n(?!  (?:{points}) ).*)*)", capsys.readouterr().out, re.M)
    return held, {point: text.strip() for point, text in said}


@pytest.mark.parametrize("name", FIVE)
def test_the_contract_holds(request, tmp_path, capsys, name):
    fixture, flags = FIVE[name]
    demo = request.getfixturevalue(fixture)
    flags = flags.format(folder=demo).split()
    held, said = contract(HOUSE / f"train_{name}.py", demo / "model", demo / "data", tmp_path / "c", capsys, *flags)
    assert held, said
    assert list(said) == ["task", "data", "loss", "packing", "training", "adapter", "merged"]
    grafted = {"surg_video_vqa": "<|AUDIO|>", "umbrella_mri": "<image>", "video_plain_lm": "<vid_patch>"}
    assert ("the script's own" in said["loss"]) == (name in grafted) and grafted.get(name, "") in said["loss"]


@pytest.mark.parametrize("name", ["llava_med", "qwen2vl_sentinel"])
def test_the_contract_holds_with_several_images_and_with_none(request, tmp_path, capsys, name):
    folder = of_every_kind(request.getfixturevalue(FIVE[name][0]), tmp_path)
    script = HOUSE / f"train_{name}.py"
    held, said = contract(script, folder / "model", folder / "data", tmp_path / "c", capsys)
    assert held, said


@pytest.fixture(scope="session")
def small(demo_folder, tmp_path_factory):
    return few_images(demo_folder / "data", tmp_path_factory.mktemp("small") / "data", train=3, val=1, test=1)


BREAKS = {
    "a method is missing": (
        "task",
        "LlavaTask does not give measure",
        ("def measure(self", "def size(self"),
    ),
    "a file whose content is not given": (
        "data",
        "Task.measure must return, JSON-like, what tokens are counted from and a content",
        ("images.measure(data, name)\n", "images.measure(data, name)[0]\n"),
    ),
    "one token too many is supervised": (
        "data",
        "supervised would be",
        ("return prefix, input_ids[cut:], labels[cut:]", "return prefix, input_ids[cut:], [*labels[cut:-2], 5, 2]"),
    ),
    "features of another layer": (
        "loss",
        "loss differs from the model's own forward",
        ("chosen = [states[i] for", "chosen = [states[i + 1] for"),
    ),
    "the class token in the place of the last patch": (
        "loss",
        "loss differs from the model's own forward",
        ("state[:, 1:]", "state[:, :-1]"),
    ),
    "a mask that shows a question the others": (
        "packing",
        "packed sequences differ from single examples",
        ('batch["branch"])', 'batch["branch"].clamp(max=1))'),
    ),
    "images in another order than trees": (
        "packing",
        "packed sequences differ from single examples",
        ("for tree in trees for name", "for tree in trees[::-1] for name"),
    ),
    "a projector that no gradient reaches": (
        "training",
        "trained, but three steps do not change it: model.multi_modal_projector",
        ("torch.cat(chosen, dim=-1)).flatten(0, 1)", "torch.cat(chosen, dim=-1)).flatten(0, 1).detach()"),
    ),
    "a step that changes what is frozen": (
        "training",
        "a step changes what is frozen: lm_head.weight",
        ("optimizer.step()\n", "optimizer.step()\n            model.vlm.lm_head.weight.data += 1e-4\n"),
    ),
    "weights that are not loaded": (
        "adapter",
        "its logits differ from those of the trained model",
        ("        checkpoints.load_weights(run, folder, model.vlm)", "        #"),
    ),
    "an image processor that is not saved": (
        "merged",
        "preprocessor_config.json",
        ("            return models.merge(load_model, folder, task, run)",
         "            task.processor = None\n            models.merge(load_model, folder, task, run)\n"
         "            return (Path(args.merge) / 'preprocessor_config.json').unlink()"),
    ),
    "a main() that places no model": (
        "training",
        "does not call runtime.shards.place",
        ("        shards.place(model, run)\n", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_the_contract_is_named(demo_folder, small, tmp_path, capsys, name):
    point, text, change = BREAKS[name]
    script = changed("train_llava_med", tmp_path / "train_mine.py", change)
    held, said = contract(script, demo_folder / "model", small, tmp_path / "c", capsys)
    assert not held
    assert list(said)[-1] == point and said[point].startswith("BROKEN: ") and text in said[point], said


def test_qwen3_vl_without_deepstack_is_broken_by_name(qwen_folder, tmp_path, capsys):
    """Three lines make a copy of the Qwen2-VL script train a Qwen3-VL, but not as its own forward reads images."""
    write_qwen3vl(tmp_path / "model", qwen_folder / "model")
    script = changed(
        "train_qwen2vl_sentinel",
        tmp_path / "train_qwen3vl.py",
        ("Qwen2_5_VLForConditionalGeneration,", "Qwen3VLForConditionalGeneration,"),
        ('"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration', '"qwen3_vl": Qwen3VLForConditionalGeneration'),
    )
    data = few_images(qwen_folder / "data", tmp_path / "data", train=3, val=1, test=1)
    held, said = contract(script, tmp_path / "model", data, tmp_path / "c", capsys)
    assert not held and list(said) == ["task", "data", "loss"]
    assert "loss differs from the model's own forward" in said["loss"]
    assert "Qwen3VLForConditionalGeneration" in said["loss"]


def test_a_copy_with_another_loop_holds_the_contract(demo_folder, small, tmp_path, capsys):
    """The sameness of the five loops is theirs alone."""
    script = changed(
        "train_llava_med",
        tmp_path / "train_mine.py",
        ("args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))", "args.lr"),
        ("        grad_norm = ranks.clip_gradients(trained.values(), args.clip)\n", "        grad_norm = 0.0\n"),
    )
    held, said = contract(script, demo_folder / "model", small, tmp_path / "c", capsys)
    assert held, said
