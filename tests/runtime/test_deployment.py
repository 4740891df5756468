"""What is trained here answers elsewhere: the model card's own snippet, in a process that has none of this project."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import load_demo, read_lines, run, task_class
from transformers import AutoProcessor, SiglipImageProcessorPil

import common
import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from demo.umbrella_mri import SIGLIP
from inputs.building import build_trees
from runtime import card

SMALL = ["--max-steps", 12, "--questions-per-step", 32, "--lr", 3e-3, "--decode", "greedy", "--lora-dropout", 0]
SMALL += ["--eval-split", "test", "--max-answer-tokens", 8]

# run as a program: argv is a file of questions, then the folders to ask them of, each by its card's snippet
ASKER = """
import importlib, json, os, re, sys
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
if sys.argv[1] == "stub":  # instead of torchvision, which AutoProcessor wants of a model that could also read videos
    videos = importlib.import_module("transformers.models.auto.video_processing_auto")
    videos.AutoVideoProcessor.from_pretrained = lambda *args, **kwargs: None
    transformers.ProcessorMixin.check_argument_for_proper_class = lambda *args: None
rows, found = json.loads(Path(sys.argv[2]).read_text()), {}
for folder in sys.argv[3:]:
    os.chdir(folder)
    snippet = re.search("```python\\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    names = {"print": lambda text: None}
    exec(snippet.replace('"image.jpg"', repr(rows[0]["image"])), names)
    prompts, generate = [], names["model"].generate
    def recorded(**asked):
        prompts.append(asked["input_ids"][0].tolist())
        return generate(**asked)
    names["model"].generate = recorded
    kind = ["question_type"] * ("question_type" in names["ask"].__code__.co_varnames)
    answers = [names["ask"](*[row[name] for name in ("image", "question", *kind)]) for row in rows]
    found[folder] = {"prompts": prompts, "answers": answers, "longest": names["model"].generation_config.max_new_tokens}
    assert not any(name.split(".")[0] in ("common", "runtime", "inputs", "report") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interleave_folder(demo_folder, mri_folder, tmp_path_factory):
    """The endoscopy questions for llava-interleave-qwen's architecture and template: "assistant" and a new line."""
    folder = tmp_path_factory.mktemp("interleave")
    shutil.copytree(mri_folder / "model", folder / "model")
    side = SIGLIP["image_size"]
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / "model")
    drawn = {"do_sample": True, "temperature": 0.9, "repetition_penalty": 1.5}  # the base's own settings, not ours
    (folder / "model/generation_config.json").write_text(json.dumps(drawn))
    (folder / "data").symlink_to(demo_folder / "data")
    return folder


def ask(rows: list[dict], folders: list[Path], scratch: Path) -> dict:
    """{folder: {"prompts": token IDs of each row, "answers": …}}, of plain transformers and peft."""
    (scratch / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", ASKER, "real" if find_spec("torchvision") else "stub", scratch / "rows.json"]
    done = subprocess.run([*map(str, command), *map(str, folders)], cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "script", "flags"),
    [
        ("demo_folder", train_llava_med, ["--image-fit", "squash", "--system", "Be brief."]),  # Mistral's template
        ("interleave_folder", train_llava_med, ["--max-steps", 36, "--lr", 1e-2]),  # a new line before the answer
        ("qwen_folder", train_qwen2vl_sentinel, ["--max-pixels", 6272]),
    ],
)
def test_the_card_s_snippet_asks_what_was_trained_and_gives_the_answers_evaluated(
    request, tmp_path, name, script, flags
):
    folder, out, merged = request.getfixturevalue(name), tmp_path / "run", tmp_path / "merged"
    run(folder, out, *SMALL, *flags, script=script)
    run(folder, out, "--merge", merged, script=script)
    records = read_lines(out / "predictions.jsonl")[:40]
    rows = [record | {"image": str(folder / "data" / record["media"][0])} for record in records]
    demo = load_demo(folder, script, *flags)
    asked = [example for example in demo.examples if example.id in {record["id"] for record in records}]
    trees, _ = build_trees(asked, demo.task)
    prompts = {
        name: tree.prefix + branch
        for tree in map(common.answering_prompt, trees)
        for name, (branch, _) in zip(tree.ids, tree.branches, strict=True)
    }
    assert len(rows) == 40 and len({record["prediction"] for record in records}) > 1
    for found in ask(rows, [out / "adapter", merged], tmp_path).values():
        assert found["prompts"] == [prompts[record["id"]] for record in records]
        assert found["answers"] == [record["prediction"] for record in records]
        assert found["longest"] == 8
    for complete in (out / "adapter", merged):
        settings = json.loads((complete / "generation_config.json").read_text())
        ids = {"eos_token_id": demo.task.tokenizer.eos_token_id, "pad_token_id": demo.task.tokenizer.pad_token_id}
        assert settings.items() >= {"do_sample": False, "max_new_tokens": 8, **ids}.items()
        text = (complete / "README.md").read_text()
        assert "| all | " in text and f"base_model: {json.dumps(str(folder / 'model'))}" in text and "license:" in text


@pytest.fixture
def trained(tmp_path):
    """What a card is written from: a run of org/base with a checkpoint, before anything is answered."""
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 3, "same": {"steps": 4, "dtype": "torch.bfloat16"}}')
    settings = {"max_answer_tokens": 16, "data": "data/kvasir"}
    config = {"script": "train_mine.py", "argv": ["--model", "org/base", "--out", "a run"], "settings": settings}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    args = SimpleNamespace(model="org/base", max_answer_tokens=64, data=None)
    return SimpleNamespace(args=args, folder=tmp_path / "run", checkpoint=checkpoint)


def test_the_base_is_named_as_it_was_given_with_commit_and_license(demo_folder, trained, tmp_path):
    folder = tmp_path / "cache/models--org--base/snapshots/0123abc"
    shutil.copytree(demo_folder / "model", folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (target := tmp_path / "adapter").mkdir()
    (target / "adapter_config.json").write_text('{"r": 4}')
    card.complete(target, folder, load_demo(demo_folder).task, trained)
    config = json.loads((target / "adapter_config.json").read_text())
    assert config == {"r": 4, "base_model_name_or_path": "org/base", "revision": "0123abc"}
    text = (target / "README.md").read_text()
    assert 'base_model: "org/base"\n' in text and "\nlicense: apache-2.0\n" in text and str(tmp_path) not in text
    assert 'from_pretrained("org/base", revision="0123abc", dtype=torch.bfloat16)' in text
    assert json.loads((target / "generation_config.json").read_text())["max_new_tokens"] == 16  # as evaluated
    processor = AutoProcessor.from_pretrained(target)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (9, 1)


ENTRY = {"n": 7, "groups": 2, "exact": 0.5, "interval": None, "best_baseline": None, "gain": None}
ENTRY |= {"gain_interval": None}


def test_a_card_has_the_results_of_its_own_checkpoint_alone(demo_folder, trained, tmp_path):
    task = load_demo(demo_folder).task
    results = {"types": {}, "micro": ENTRY, "split": "val", "decode": "ranked"}
    for name, shown in [("step-00000003", True), ("step-00000002", False)]:
        (trained.folder / "results.json").write_text(json.dumps(results | {"checkpoint": f"elsewhere/{name}"}))
        text = card.text(tmp_path, demo_folder / "model", task, trained)
        assert ("| all | 7 | 50.0% | one group | – | – | one group |" in text) is shown
        assert ("The snippet answers greedily" in text) is shown


def test_answering_adds_results_to_a_card_and_changes_nothing_else(demo_folder, trained, tmp_path):
    """The base may be a folder by now, and who wrote a license into the card did so on purpose."""
    task, path = load_demo(demo_folder).task, trained.folder / "adapter/README.md"
    path.parent.mkdir()
    path.write_text(card.text(path.parent, demo_folder / "model", task, trained).replace("unknown", "mit"))
    before = path.read_text()
    trained.args.model = str(demo_folder / "model")
    results = {"types": {}, "micro": ENTRY, "split": "val", "decode": "greedy", "data": "data/other"}
    for exact in (0.5, 0.25):
        results |= {"checkpoint": str(trained.checkpoint), "micro": ENTRY | {"exact": exact}}
        (trained.folder / "results.json").write_text(json.dumps(results))
        card.update(task, trained)
        above, _, below = path.read_text().partition(card.RESULTS)
        assert above == before and f"| all | 7 | {exact:.1%} |" in below and "of val (`other`)" in below
    shutil.copytree(trained.folder, tmp_path / "other")  # the same step of another run has answered into this one
    stands = path.read_text()
    trained.checkpoint = tmp_path / "other/checkpoints/step-00000003"
    card.update(task, trained)
    assert path.read_text() == stands
    (tmp_path / "run/results.json").write_text(json.dumps(results | {"checkpoint": str(trained.checkpoint)}))
    trained.checkpoint = tmp_path / "run/checkpoints/step-00000003"
    assert "## Results" not in card.text(path.parent, demo_folder / "model", task, trained)


def test_a_card_says_what_was_trained_on_not_what_was_looked_at_since(demo_folder, tmp_path, monkeypatch):
    """--eval-only writes check.json anew, of other data perhaps; the checkpoint is named from where it lies."""
    run(demo_folder, tmp_path / "run", *SMALL, "--max-steps", 1)
    trained_on = json.loads((tmp_path / "run/check.json").read_text())["splits"]["train"]["questions"]
    run(demo_folder, tmp_path / "run", *SMALL, "--eval-only", "--limit", 8)
    monkeypatch.chdir(tmp_path / "run/checkpoints")
    argv = ["--model", demo_folder / "model", "--merge", tmp_path / "merged", "--resume", "step-00000001"]
    train_llava_med.main(list(map(str, argv)))
    for folder in ("run/adapter", "merged"):
        text = (tmp_path / folder / "README.md").read_text()
        assert f" on {trained_on} questions about " in text and "of the data folder `data`" in text


@pytest.mark.parametrize("script", [train_surg_video_vqa, train_umbrella_mri, train_video_plain_lm])
def test_a_card_says_what_transformers_does_not_read_and_what_answers_instead(demo_folder, trained, tmp_path, script):
    parts = task_class(script).unreadable or "audio_tower and audio_projector"  # where there are recordings
    text = card.text(tmp_path, demo_folder / "model", SimpleNamespace(unreadable=parts), trained)
    assert f"Plain transformers does not know {parts}." in text
    assert (
        "python train_mine.py --model org/base --out 'a run' --eval-only --resume auto" in text
        and "```python" not in text
    )


@pytest.mark.parametrize("messages", [lambda example: None, lambda example: example.recording])
def test_a_script_that_asks_in_ways_of_its_own_gets_a_card_all_the_same(demo_folder, trained, tmp_path, messages):
    task = SimpleNamespace(unreadable="", messages=messages)
    text = card.text(tmp_path, demo_folder / "model", task, trained)
    assert "Plain transformers does not know prompts as this script writes them." in text and "```python" not in text
