"""What holds for the five scripts alike: one loop, one contract, no knowledge of each other, honest checkpoints."""

import ast
import contextlib
import copy
import importlib
import inspect
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import load_demo, read_lines, refused, run, task_class
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from inputs.contract import MUST_GIVE
from inputs.task import Task

HERE = Path(__file__).resolve().parents[2]
FOLDERS = {  # fixture of each script's demo
    "llava_med": "demo_folder",
    "qwen2vl_sentinel": "qwen_folder",
    "surg_video_vqa": "video_folder",
    "umbrella_mri": "mri_folder",
    "video_plain_lm": "plain_folder",
}
FLAGS = {
    "llava_med": "--pack-tokens 512",
    "qwen2vl_sentinel": "--pack-tokens 1024",
    "surg_video_vqa": "--pack-tokens 1280 --frames 4 --eval-frames 4 --target short_answer --audio-model DEMO/whisper",
    "umbrella_mri": "--pack-tokens 512 --modality T1:32x32x32:8x8x8 --modality rsfMRI:24x24x24x4:8x8x8x2",
    "video_plain_lm": "--pack-tokens 512 --vision-model DEMO/vision --fast-frames 2 --slow-frames 2 --slow-grid 6 "
    "--from-scratch",
}
SMALL = ["--limit", 8, "--questions-per-step", 8, "--epochs", 1, "--max-steps", 1, "--max-answer-tokens", 4]
SHARED = [
    HERE / "common.py",
    *(path for room in ("inputs", "runtime", "report") for path in (HERE / room).glob("*.py")),
]


def load(name: str):
    return importlib.import_module(f"train_{name}")


@pytest.fixture(params=FOLDERS, scope="module")
def each(request):
    """Every script in turn: its module, its demo's folder, the flags that it needs."""
    folder = request.getfixturevalue(FOLDERS[request.param])
    flags = FLAGS[request.param].replace("DEMO", str(folder)).split()
    return SimpleNamespace(name=request.param, script=load(request.param), folder=folder, flags=flags)


@pytest.fixture(scope="module")
def data(each):
    return load_demo(each.folder, each.script, *each.flags)


@pytest.fixture(params=["llava_med", "qwen2vl_sentinel"])
def images(request, tmp_path):
    """The two scripts for images, each with a copy of its demo that a test may change."""
    folder = shutil.copytree(request.getfixturevalue(FOLDERS[request.param]), tmp_path / "demo")
    return SimpleNamespace(name=request.param, script=load(request.param), folder=folder, out=tmp_path / "out")


def tree(name: str) -> ast.Module:
    return ast.parse((HERE / f"train_{name}.py").read_text())


def check_of(out: Path) -> dict:
    return json.loads((out / "check.json").read_text())


# --- one text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["learning_rate", "train"])
def test_the_training_loop_is_one_text_in_the_five_scripts(function):
    """In these five by name: a script that is copied may change its loop."""
    texts = {inspect.getsource(getattr(load(name), function)) for name in FOLDERS}
    assert len(texts) == 1
    assert len(texts.pop().splitlines()) <= 60  # on one screen


def test_scripts_name_no_private_thing_of_a_shared_module():
    for name in FOLDERS:
        private = [n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute) and n.attr.startswith("_")]
        assert all(attribute.endswith("__") for attribute in private), private


# --- the contract ----------------------------------------------------------------------------------------------


def contract() -> set[str]:
    """All that Task declares: what must be given, methods, and attributes of the class and of an instance."""
    task = Task(SimpleNamespace(model="never read"), None)
    return {name for name in (*MUST_GIVE, *dir(Task), *vars(task)) if not name.startswith("_")}


def attributes(tree: ast.AST, name: str) -> set[str]:
    """What is read of `name`, or of an attribute of that name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {n.attr for n in found if name in (getattr(n.value, "id", None), getattr(n.value, "attr", None))}


def test_shared_code_asks_a_script_for_nothing_but_its_task_and_model():
    """A name of one script that shared code knows would make it a framework, and a copy fail far from its cause."""
    of_model = {"vlm", "decoder", "hidden", "lm_head", *dir(torch.nn.Module())}
    for path in SHARED:
        module = ast.parse(path.read_text())
        asked = attributes(module, "task") - set(dir(str))  # of UMBRELLA's data a task is a text
        assert asked <= contract(), f"{path.name} asks a task for {asked - contract()}"
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        of_script = [f for f in functions if {"model", "run"} <= {argument.arg for argument in f.args.args}]
        asked = set().union(*(attributes(function, "model") for function in of_script))
        assert asked <= of_model, f"{path.name} asks a model for {asked - of_model}"


def test_a_task_gives_what_it_must_and_changes_only_what_it_may(each):
    task = task_class(each.script)
    for name in ("encode", "placeholders", "measure", "read_media"):
        assert name in vars(task), f"{task.__name__} has no {name}"
    for name, method in inspect.getmembers(Task, inspect.isfunction):
        found = inspect.signature(getattr(task, name)).parameters
        alike = name.startswith("_") or len(found) == len(inspect.signature(method).parameters)
        assert alike, f"{task.__name__}.{name} takes {', '.join(found)}"
    assert task.__doc__ and all(inspect.getdoc(value) for value in (task.encode, task.placeholders, task.read_media))


def test_a_task_counts_what_it_encodes(data):
    """The prefix holds every placeholder, as many as are declared, and no branch holds one."""
    for example in data.examples[:20]:
        prefix, input_ids, labels = data.task.encode(example, example.answer)
        assert len(input_ids) == len(labels)
        for token, count in data.task.placeholders(example).items():
            assert prefix.count(token) == count and token not in input_ids


def test_a_rate_of_a_part_is_that_of_all_its_parameters_and_no_others(each, tmp_path, capsys):
    words = {"projector": "projector|merger|packer", "vision": "visual|vision_tower|patch_embed"}
    data = load_demo(each.folder, each.script, *each.flags, "--tune", "full")
    model = each.script.load_model(each.folder / "model", data.task, torch.float32)
    found = dict.fromkeys([*data.args.parts, "all others"], 0)
    for name, p in model.vlm.named_parameters():
        part = next((part for part in data.args.parts if re.search(words[part], name)), "all others")
        found[part] += p.numel() * p.requires_grad
    rates = [word for part in data.args.parts for word in (f"--lr-{part}", 1e-5)]
    run(each.folder, tmp_path, *each.flags, *rates, "--tune", "full", "--check", script=each.script)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("learning rates: "))
    assert all(found.values())
    for part, n in found.items():
        assert f"{part} {data.args.lr if part == 'all others' else 1e-5:g} ({n:,} parameters)" in line


def test_nothing_is_dropped_in_a_frozen_tower(each, data):
    """That would only be noise; the demos' towers have no dropout, so that no figure shows it."""
    model = each.script.load_model(each.folder / "model", data.task, torch.float32).train()
    towers = {name: module for name, module in model.named_modules() if re.search(r"(visual|_tower)$", name)}
    assert towers and model.training and model.decoder.training
    for name, tower in towers.items():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            assert [n for n, module in tower.named_modules() if drops(module)] == [], f"dropout in {name}"
    assert not any(module.training for module in model.eval().modules())


def drops(module) -> bool:
    """A dropout, or an attention, whose dropout is a number and not a module of its own."""
    shares = getattr(module, "p", 0), getattr(module, "dropout", 0)
    return module.training and any(isinstance(share, float) and share > 0 for share in shares)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("each", ["llava_med", "qwen2vl_sentinel"], indirect=True)
def test_a_tower_of_images_is_in_training_mode_where_it_is_trained(each, data, tune):
    tower = {"llava_med": "model.vision_tower", "qwen2vl_sentinel": "model.visual"}[each.name]
    task = copy.copy(data.task)
    task.args = SimpleNamespace(**{**vars(data.args), "tune": tune})
    model = each.script.load_model(each.folder / "model", task, torch.float32)
    assert {module.training for module in model.train().vlm.get_submodule(tower).modules()} == {tune == "full"}
    assert not any(module.training for module in model.eval().modules())


# --- augmentation ----------------------------------------------------------------------------------------------


def test_augmented_media_depend_on_the_step_and_what_is_heard_stays(each):
    data = load_demo(each.folder, each.script, *each.flags, "--augment")
    trees = [tree for tree in data.trees if tree.media][:2]

    def read(step: int | None) -> dict:
        data.task.step = step
        media = data.read_media(trees)
        return media | {"videos": torch.cat([video.pixels for video in media.get("videos", [])] or [torch.zeros(0)])}

    plain, first, again, second = (read(step) for step in (None, 1, 1, 2))
    tensors = [name for name, value in plain.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[name], again[name]) and first[name].shape == plain[name].shape for name in tensors)
    changed = {name for name in tensors if not torch.equal(first[name], plain[name])}
    assert changed == {name for name in tensors if not torch.equal(first[name], second[name])}
    shown = {"umbrella_mri": {"volumes of T1"}, "video_plain_lm": {"videos"}}.get(each.name, {"pixel_values"})
    assert shown <= changed and not changed & {"input_features", "audio_positions", "image_grid_thw"}


def test_augmentation_changes_what_is_trained_on_and_nothing_that_is_measured(each, tmp_path):
    """With a learning rate of 0 the model stays as it is: validation and answers must, too."""
    flags = [*each.flags, "--limit", 8, "--questions-per-step", 4, "--max-steps", 2, "--max-answer-tokens", 4]
    lines = {}
    for out, given in ((tmp_path / "plain", []), (tmp_path / "augmented", ["--augment"])):
        run(each.folder, out, *flags, "--lr", 0, "--eval-every", 1, *given, script=each.script)
        lines[out.name] = read_lines(out / "metrics.jsonl")
    plain, augmented = lines.values()
    assert [x.get("val_loss") for x in plain] == [x.get("val_loss") for x in augmented]
    assert sum("val_loss" in x for x in plain) == 2
    assert all(x["loss"] != y["loss"] for x, y in zip(plain, augmented, strict=True) if "loss" in x)
    answers = [(tmp_path / name / "predictions.jsonl").read_text() for name in lines]
    assert answers[0] == answers[1]


# --- the loop --------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_as_half_a_cosine():
    args = SimpleNamespace(lr=2e-4, warmup=0.09)
    rates = [load("llava_med").learning_rate(step, 100, args) for step in range(1, 101)]
    assert rates[:9] == pytest.approx([2e-4 * step / 9 for step in range(1, 10)])  # linear, up to the peak
    assert rates[54] == pytest.approx(1e-4)  # half way down
    assert rates[8:] == sorted(rates[8:], reverse=True) and 0 < rates[-1] < 2e-7


# --- the docstring ---------------------------------------------------------------------------------------------


def test_a_docstring_s_flags_and_files_are_there(each):
    """Commands that are copied from the first lines of a file must run."""
    doc = each.script.__doc__
    parser = help_of(each.script)
    for command in re.findall(rf"train_{each.name}\.py (.*)", doc):
        for flag in re.findall(r"--[a-z][a-z-]*", command):
            assert re.search(rf"(?m)^ +{flag}\b", parser), f"{flag} is no flag of train_{each.name}.py"
    for path in re.findall(r"[\w/]+\.(?:py|sh)\b", doc):
        assert (HERE / path).is_file(), f"{path}, named in the docstring, is missing"


def help_of(script) -> str:
    """What --help prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        script.parse_arguments(["--help"])
    return printed.getvalue()


# --- checkpoints: every weight is the folder's own, and so is the template -------------------------------------

PROJECTORS = {"llava_med": "multi_modal_projector.linear_2.weight", "qwen2vl_sentinel": "visual.merger.mlp.2.weight"}
OF_LANGUAGE_MODEL = r"(?<!encoder\.)layers\.1\.self_attn\.v_proj\.weight"


def lose(folder: Path, pattern: str) -> None:
    """Take the one weight whose name matches out of a checkpoint."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if re.search(pattern, name)]
    save_file({key: weight for key, weight in weights.items() if key != name}, path, {"format": "pt"})


@pytest.mark.parametrize("tune, lost", [("lora", "of the projector"), ("full", "of the language model")])
def test_a_missing_weight_is_refused_by_name_whatever_is_done(images, tune, lost):
    """Else it is drawn at random: trained with one draw, answered with another, and nothing said."""
    flags = [*SMALL, "--tune", tune]
    run(images.folder, images.out, *flags, script=images.script)
    pattern = OF_LANGUAGE_MODEL if tune == "full" else re.escape(PROJECTORS[images.name])
    lose(images.folder / "model", pattern)
    answered = read_lines(images.out / "predictions.jsonl")
    merge = ["--merge", images.out / "merged", "--resume-anyway"]  # or it is refused as another model's
    for mode in (["--out", images.out / "again"], ["--eval-only"], merge):
        text = refused(images.folder, images.out, *flags, *mode, script=images.script)
        assert re.search(rf"missing.*{pattern}", text), text
    assert not (images.out / "merged").exists() and not (images.out / "again/checkpoints").exists()
    assert read_lines(images.out / "predictions.jsonl") == answered


def test_weights_under_other_names_are_refused(images):
    """A projector under its original names is both missing and without a place."""
    path = images.folder / "model/model.safetensors"
    part = {"llava_med": "multi_modal_projector", "qwen2vl_sentinel": "merger"}[images.name]
    weights = {name.replace(part, "mm_projector"): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    text = refused(images.folder, images.out, *SMALL, script=images.script)
    assert part in text and "missing" in text


def test_a_missing_weight_of_the_language_model_is_refused_in_every_script(each, tmp_path):
    flags = [flag for flag in each.flags if flag != "--from-scratch"]
    if each.name == "video_plain_lm":  # its demo's model has no weights at all: they are drawn where that is asked for
        text = refused(each.folder, tmp_path / "out", *flags, *SMALL, script=each.script)
        assert "model.safetensors is missing" in text
        return
    folder = tmp_path / "demo"
    shutil.copytree(each.folder / "model", folder / "model")
    (folder / "data").symlink_to(each.folder / "data")
    lose(folder / "model", OF_LANGUAGE_MODEL)
    text = refused(folder, tmp_path / "out", *flags, *SMALL, script=each.script)
    assert re.search(rf"missing.*{OF_LANGUAGE_MODEL}", text), text


TEMPLATE = (
    "{% for m in messages %}{{ 'READER: ' if m.role == 'user' else ' WRITER: ' }}{% for part in m.content %}"
    "{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ ' WRITER: ' if add_generation_prompt }}"
)
MARKS = {"llava_med": "<image>\\n", "qwen2vl_sentinel": "<|vision_start|><|image_pad|><|vision_end|>"}
PLACES = ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("place", PLACES)
def test_the_checkpoint_s_chat_template_is_used_wherever_it_stands(images, capsys, place):
    """transformers itself reads two of these places with a tokenizer and passes over the others without a word."""
    model = images.folder / "model"
    assert not (model / "chat_template.json").exists()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    template = TEMPLATE.replace("IMAGE", MARKS[images.name])
    if place.endswith(".jinja"):
        (model / place).write_text(template)
    else:
        config = json.loads((model / place).read_text()) if (model / place).exists() else {}
        (model / place).write_text(json.dumps({**config, "chat_template": template}))
    run(images.folder, images.out, "--check", script=images.script)
    assert re.search(rf"chat template: .*{place}", capsys.readouterr().out)
    text = "".join(token[0] for token in check_of(images.out)["example"]["tokens"])
    assert "READER: " in text and "WRITER:" in text and "INST" not in text and "im_start" not in text
    if place != "chat_template.json":
        return
    # and it is what a merged folder holds, for transformers itself
    run(images.folder, images.out, *SMALL, script=images.script)
    run(images.folder, images.out, "--merge", images.out / "merged", script=images.script)
    assert AutoTokenizer.from_pretrained(images.out / "merged").chat_template == template
