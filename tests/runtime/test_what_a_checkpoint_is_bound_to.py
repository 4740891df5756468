"""A checkpoint belongs to its model and to the prompts that it was trained on; what answered is in results.json."""

import json
import math
import os
import shutil
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refused, run
from safetensors.torch import load_file, save_file

import train_llava_med
import train_qwen2vl_sentinel
import train_surg_video_vqa
import train_umbrella_mri
import train_video_plain_lm
from runtime import folders, metrics, models
from runtime.files import sha256
from runtime.metrics import Metrics

SMALL = ["--limit", 16, "--questions-per-step", 8, "--max-steps", 2, "--lr", 1e-3, "--max-answer-tokens", 2]


@pytest.fixture(scope="module")
def trained(demo_folder, tmp_path_factory):
    """A short run. Tests must not write here."""
    out = tmp_path_factory.mktemp("bound") / "run"
    run(demo_folder, out, *SMALL, "--save-every", 1)
    return out


@pytest.mark.parametrize("mode", ["--eval-only", "--merge"])
def test_a_checkpoint_of_another_model_is_refused(demo_folder, trained, tmp_path, mode):
    """Of the same shape it would load, answer nonsense, and exit 0."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    path = tmp_path / "demo" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    out = shutil.copytree(trained, tmp_path / "run")
    flags = [mode, tmp_path / "merged"] if mode == "--merge" else [mode]
    assert "was trained on another model than --model" in refused(tmp_path / "demo", out, *SMALL, *flags)
    run(tmp_path / "demo", out, *SMALL, *flags, "--resume-anyway")


def test_what_a_checkpoint_does_not_know_was_off(demo_folder, trained, tmp_path):
    """A flag that is newer than a run stops neither its end nor its answers, unless it is given."""
    out = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-00000002")
    folder = out / "checkpoints/step-00000001"
    state = json.loads((folder / "state.json").read_text())
    for name in ("augment", "lr_projector", "lr_vision", "system"):
        assert not state["same"].pop(name)
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = sha256(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = [*SMALL, "--save-every", 1]
    assert "augment was None, is True" in refused(demo_folder, out, *flags, "--augment")
    assert "lr_projector was None, is 0.0" in refused(demo_folder, out, *flags, "--lr-projector", 0)
    text = refused(demo_folder, out, *flags, "--eval-only", "--resume", folder, "--system", "You are a student.")
    assert "does not say its system: it is of another script, or of a time before that flag, so leave it out" in text
    run(demo_folder, out, *flags, "--eval-only", "--resume", folder)
    run(demo_folder, out, *flags)
    assert (out / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()


def test_generation_settings_are_not_the_model(demo_folder, trained, tmp_path):
    """Answers are greedy whatever stands there, and tools that serve models write it."""
    shutil.copytree(demo_folder, tmp_path / "demo")
    known = models.part_fingerprint(demo_folder / "model")
    (tmp_path / "demo" / "model" / "generation_config.json").write_text('{"temperature": 0.7}')
    assert models.part_fingerprint(tmp_path / "demo" / "model") == known
    out = shutil.copytree(trained, tmp_path / "run")
    run(tmp_path / "demo", out, *SMALL, "--eval-only")
    assert (out / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()


def copied(trained: Path, folder: Path, out: Path) -> Path:
    """A run in `out` on folder/model and folder/data, which may be changed."""
    shutil.copytree(trained / "demo", folder)
    return shutil.copytree(trained / "run", out)


@pytest.fixture(scope="module")
def trained_on_large(demo_folder, tmp_path_factory):
    """run/ on demo/, where each question has a history, and all but a few bytes of a file are its middle."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(demo_folder, folder / "demo")
    for path in (folder / "demo/data").glob("*.jsonl"):
        lines = [json.loads(line) | {"history": [["Is it clear?", "yes"]]} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "ENDS", 64)
        run(folder / "demo", folder / "run", *LARGE)
    return folder


@pytest.fixture
def large(trained_on_large, monkeypatch):
    monkeypatch.setattr(folders, "ENDS", 64)
    return trained_on_large


LARGE = [*SMALL, "--eval-split", "val"]


def zeroed(path: Path) -> None:
    """A quarter of the file, in its middle, and neither size nor time differ."""
    content, before = bytearray(path.read_bytes()), path.stat()
    middle, quarter = len(content) // 2, len(content) // 4
    content[middle : middle + quarter] = bytes(quarter)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("mode", ["train", "--eval-only", "--merge"])
def test_zeroes_within_the_weights_are_another_model(large, tmp_path, mode):
    out = copied(large, tmp_path / "demo", tmp_path / "run")
    zeroed(tmp_path / "demo/model/model.safetensors")
    flags = {"train": [], "--merge": [mode, tmp_path / "merged"]}.get(mode, [mode])
    text = refused(tmp_path / "demo", out, *LARGE, *flags)
    assert "was trained on other weights than are now in --model model.safetensors; " in text
    assert not (tmp_path / "merged").exists()
    run(tmp_path / "demo", out, *LARGE, *flags, "--resume-anyway")


def test_weights_are_read_again_only_where_their_file_is_another(large, tmp_path, monkeypatch):
    out = copied(large, tmp_path / "demo", tmp_path / "run")
    hashed = []
    monkeypatch.setattr(folders, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    run(tmp_path / "demo", out, *LARGE, "--epochs", 2, "--max-steps", 3, "--resume-anyway")  # a copy
    assert hashed == ["model.safetensors"]
    run(tmp_path / "demo", out, *LARGE, "--epochs", 2, "--max-steps", 3)
    run(tmp_path / "demo", out, *LARGE, "--eval-only")
    run(tmp_path / "demo", out, *LARGE, "--merge", tmp_path / "merged")
    assert hashed == ["model.safetensors"]
    os.utime(tmp_path / "demo/model/model.safetensors")
    run(tmp_path / "demo", out, *LARGE, "--eval-only")
    assert hashed == ["model.safetensors"] * 2


def test_weights_of_a_part_of_another_model_are_compared_too(plain_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ENDS", 64)
    tower = shutil.copytree(plain_folder / "vision", tmp_path / "vision")
    flags = [*SMALL, "--vision-model", tower, "--from-scratch", "--fast-frames", 2, "--slow-frames", 2]
    run(plain_folder, tmp_path / "run", *flags, script=train_video_plain_lm)
    zeroed(tower / "model.safetensors")
    text = refused(plain_folder, tmp_path / "run", *flags, script=train_video_plain_lm)
    assert "was trained on other weights than are now in --vision-model model.safetensors; " in text


def swapped(data: Path) -> None:
    """Two images that are trained on, each under the other's name."""
    names = sorted({json.loads(line)["image"] for line in (data / "train.jsonl").read_text().splitlines()[:16]})
    contents = [(data / name).read_bytes() for name in names[:2]]
    for name, content in zip(names, contents[::-1], strict=False):
        (data / name).write_bytes(content)


def asked_otherwise(data: Path) -> None:
    path = data / "train.jsonl"
    path.write_text(path.read_text().replace("Is it clear?", "Is it dark?", 1))


@pytest.mark.parametrize(("change", "named"), [(swapped, "media"), (asked_otherwise, "examples")])
def test_other_images_and_first_turns_are_another_run(large, tmp_path, change, named):
    out = copied(large, tmp_path / "demo", tmp_path / "run")
    change(tmp_path / "demo/data")
    text = refused(tmp_path / "demo", out, *LARGE)
    assert f"step-00000002 is of another run: {named} was " in text and text.count(" was ") == 1
    run(tmp_path / "demo", out, *LARGE, "--eval-only")  # what answers is bound to none of them
    run(tmp_path / "demo", out, *LARGE, "--resume-anyway")


def test_weights_that_go_while_they_are_trained_on_cost_no_step(demo_folder, trained, tmp_path, monkeypatch, capsys):
    """They are read a second time, for their digest, and what was trained would be lost with the error."""

    def gone(path):
        raise OSError(f"stale file handle: {path}")

    monkeypatch.setattr(folders, "sha256", gone)
    run(demo_folder, tmp_path / "run", *SMALL)
    assert "warning: stale file handle: " in capsys.readouterr().out
    assert (tmp_path / "run/predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()
    text = refused(demo_folder, trained, *SMALL, "--merge", tmp_path / "merged", "--resume", tmp_path / "run" / LAST)
    assert text.startswith(f"--model {demo_folder / 'model'}: weights cannot be read: stale file handle: ")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and model folders that somebody else has made: a sentence each
# ------------------------------------------------------------------------------------------------------------


def sparse(path: Path, head: bytes = b"{") -> None:
    """60 GB that take no room."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(60 * 10**9)


def change(path: Path, edit) -> None:
    tensors = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def sealed(file: str, write):
    """The fault written into a file of a checkpoint, whose manifest then is of the changed file."""

    def fault(folder: Path) -> None:
        write(folder / file)
        names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
        (folder / "manifest.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))

    return fault


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def settings(**values):
    return sealed(SETTINGS, lambda path: edit(path, **values))


LAST = "checkpoints/step-00000002"
OPTIMIZER, ADAPTER, SETTINGS = "optimizer.safetensors", "adapter_model.safetensors", "adapter_config.json"
STATE, NO_STATE = "state.json", "state.json: JSON, but not as in a checkpoint"
NO_MANIFEST = "its manifest.json does not name state.json and optimizer.safetensors"
HOSTILE = {
    "empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), NO_MANIFEST),
    "manifest of a list": (lambda c: (c / "manifest.json").write_text("[]"), NO_MANIFEST),
    "manifest of brackets": (lambda c: (c / "manifest.json").write_text("[" * 10**5), "no readable manifest"),
    "manifest of a long name": (
        lambda c: edit(c / "manifest.json", **{"x" * 300: ""}),
        "it cannot be read ([Errno 36] File name too long",
    ),
    "manifest of 60 GB": (lambda c: sparse(c / "manifest.json"), "no readable manifest (60000000000 bytes)"),
    "optimizer of no bytes": (sealed(OPTIMIZER, lambda p: p.write_bytes(b"")), "cannot be used: "),
    "optimizer of no tensors": (sealed(OPTIMIZER, lambda p: save_file({}, p)), "are not those trained now"),
    "optimizer without steps": (
        sealed(OPTIMIZER, lambda p: change(p, lambda name, t: None if name.endswith(" step") else t)),
        "are not those trained now",
    ),
    "optimizer of bytes": (sealed(OPTIMIZER, lambda p: change(p, lambda _, t: t.to(torch.int8))), "is torch.int8, not"),
    "optimizer of other shapes": (
        sealed(OPTIMIZER, lambda p: change(p, lambda name, t: t if name.endswith(" step") else t[:1])),
        "are not those trained now",
    ),
    "adapter of bytes": (sealed(ADAPTER, lambda p: change(p, lambda _, t: t.to(torch.uint8))), "is torch.uint8, not"),
    "adapter of another shape": (
        sealed(ADAPTER, lambda p: change(p, lambda _, t: t[:1])),
        "but the matrices have 1 rows",
    ),
    "rank of a billion": (settings(r=10**9), "says r 1000000000, lora_alpha 32"),
    "rank of truth": (settings(r=True), "says r True, "),
    "alpha of no number": (settings(lora_alpha=math.nan), ", lora_alpha nan, "),
    "alpha of words": (settings(lora_alpha="much"), ", lora_alpha 'much', "),
    "dropout of all": (settings(lora_dropout=1), ", lora_dropout 1, "),
    "scaling of words": (settings(use_rslora="no"), ", use_rslora 'no', but the matrices have 16 rows"),
    "settings of a list": (sealed(SETTINGS, lambda p: p.write_text("[]")), "holds no settings"),
    "settings of brackets": (sealed(SETTINGS, lambda p: p.write_text("[" * 10**5)), "lists within lists"),
    "state of a list": (sealed(STATE, lambda p: p.write_text("[]")), NO_STATE),
    "state of brackets": (sealed(STATE, lambda p: p.write_text("[" * 10**5)), "lists within lists"),
    "state of no settings": (sealed(STATE, lambda p: edit(p, same=[])), NO_STATE),
    "step below zero": (sealed(STATE, lambda p: edit(p, step=-1)), NO_STATE),
    "step in words": (sealed(STATE, lambda p: edit(p, step="2")), NO_STATE),
    "step without end": (sealed(STATE, lambda p: edit(p, step=10**30)), "but the run has only 2 steps"),
    "weights of numbers": (sealed(STATE, lambda p: edit(p, weights={"--model model.safetensors": 1})), NO_STATE),
    "adapter of half a byte": (sealed(ADAPTER, lambda p: p.write_bytes(weights("F4", 4, 2))), "cannot be used: "),
}


def weights(dtype: str = "F32", shape: int = 2, size: int = 8) -> bytes:
    """A file of safetensors with one tensor."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [shape], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_checkpoint_that_is_complete_but_none_of_ours_is_refused(demo_folder, trained, tmp_path, what):
    out = shutil.copytree(trained, tmp_path / "run")
    fault, said = HOSTILE[what]
    checkpoint = out / "checkpoints" / "step-00000002"
    fault(checkpoint)
    text = refused(demo_folder, out, *SMALL, "--resume", checkpoint)
    assert str(checkpoint) in text and said in text


def test_another_size_in_the_configuration_than_in_the_weights_is_refused(demo_folder, tmp_path):
    folder = shutil.copytree(demo_folder, tmp_path / "demo")
    edit_text(folder / "model/config.json", intermediate_size=321)
    text = refused(folder, tmp_path / "run", *SMALL)
    assert text.endswith("/demo/model: config.json gives other shapes than the weights have; download both again")


def test_a_rank_in_state_json_reserves_no_memory(demo_folder, trained, tmp_path):
    """The adapter's own header says how many rows there are, before they are made."""
    out = shutil.copytree(trained, tmp_path / "run")
    checkpoint = out / "checkpoints" / "step-00000002"
    same = json.loads((checkpoint / STATE).read_text())["same"]
    sealed(STATE, lambda p: edit(p, same=same | {"lora_r": 10**12}))(checkpoint)
    run(demo_folder, out, *SMALL, "--eval-only")
    assert (out / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()
    sealed(STATE, lambda p: edit(p, same=same | {"lora_alpha": "much"}))(checkpoint)
    text = refused(demo_folder, out, *SMALL, "--eval-only")
    assert text == f"{checkpoint} cannot be used: lora_alpha 'much' is no setting of this script"


def test_a_template_is_tried_out_where_limits_cannot_be_set(monkeypatch):
    """`ulimit` may allow less memory than is asked for."""

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(folders.resource, "setrlimit", refuse)
    assert folders.endless(lambda text: text * 2 * folders.LONGEST, ["a"])
    assert not folders.endless(lambda text: text, ["a"])


def test_a_template_that_waits_for_a_thread_is_not_waited_for(monkeypatch):
    """A lock that a thread held when the process was forked is never given back there."""
    monkeypatch.setattr(folders, "WAITED", 1)
    lock = threading.Lock()
    lock.acquire()
    assert folders.endless(lambda text: lock.acquire(), ["a"])


LOOP = "{% for i in range(99999) %}"
TEMPLATES = {
    "computes without end": LOOP * 4 + "{% endfor %}" * 4,
    "writes without end": LOOP * 2 + "aaaaaaaaaa" * 100 + "{% endfor %}" * 2,
    "fills the memory": "{{ 'a' * 10 ** 10 }}",
    "writes 2 MB": "{{ 'a' * 2 * 10 ** 6 }}",
    "only in long conversations": "{% if messages | length > 2 %}{{ 'a' * 10 ** 10 }}{% endif %}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_chat_template_that_would_not_end_is_refused(demo_folder, tmp_path, monkeypatch, what):
    """It is a program, which runs wherever a conversation is written."""
    monkeypatch.setattr(folders, "SECONDS", 1)
    folder = shutil.copytree(demo_folder, tmp_path / "demo")
    (folder / "model/chat_template.jinja").write_text(TEMPLATES[what])
    text = refused(folder, tmp_path / "run", "--check")
    assert text.startswith(f"--model {folder / 'model'}: its chat template computes without end, or writes without end")


@pytest.mark.parametrize(
    ("fixture", "script"),
    [
        ("qwen_folder", train_qwen2vl_sentinel),
        ("video_folder", train_surg_video_vqa),
        ("mri_folder", train_umbrella_mri),
    ],
)
def test_every_script_that_has_a_chat_template_limits_it(fixture, script, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "demo")
    (folder / "model/chat_template.jinja").write_text(TEMPLATES["fills the memory"])
    modality = ["--modality", "T1:32x32x32:8x8x8"] if script is train_umbrella_mri else []
    assert "its chat template computes without end" in refused(folder, tmp_path / "run", *modality, script=script)


def edit_text(path: Path, **values) -> None:
    edit(path, text_config=json.loads(path.read_text())["text_config"] | values)


WEIGHTS = "model.safetensors"
FOLDERS = {
    "an adapter": ("adapter_config.json", lambda p: p.write_text("{}"), "an adapter is no model: merge it first"),
    "a list": ("config.json", lambda p: p.write_text("[]"), "JSON, but not as in a model's file of that name"),
    "brackets": ("config.json", lambda p: p.write_text("[" * 10**5), "lists within lists"),
    "60 GB of JSON": ("tokenizer.json", sparse, "60000000000 bytes"),
    "60 GB of header": (WEIGHTS, lambda p: sparse(p, struct.pack("<Q", 60 * 10**9 - 8)), "header too large"),
    "60 GB of weights": (WEIGHTS, sparse, "truncated or not safetensors (60000000000 bytes: "),
    "brackets for a header": (WEIGHTS, lambda p: p.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), "invalid"),
    "a shape of 2^62": (WEIGHTS, lambda p: p.write_bytes(weights(shape=2**62)), "overflow"),
    "weights of bytes": (WEIGHTS, lambda p: change(p, lambda _, t: t.to(torch.int8)), ".weight is I8, not floating"),
    "a vocabulary of 10^9": (
        "config.json",
        lambda p: edit_text(p, vocab_size=10**9),
        "vocab_size cannot be as it stands there",
    ),
    "layers without end": (
        "config.json",
        lambda p: edit_text(p, num_hidden_layers=10**6),
        "num_hidden_layers cannot be",
    ),
    "images without end": (
        "config.json",
        lambda p: edit(p, vision_config=json.loads(p.read_text())["vision_config"] | {"image_size": 10**6}),
        "image_size cannot be as it stands there: the weights are 89 tensors",
    ),
    "no such dtype": (WEIGHTS, lambda p: p.write_bytes(weights("F99")), "unknown variant"),
    "an index of nothing": (f"{WEIGHTS}.index.json", lambda p: p.write_text("{}"), "JSON, but not as in"),
    "an index of numbers": (
        f"{WEIGHTS}.index.json",
        lambda p: p.write_text('{"weight_map": {"a": 1}}'),
        "but not as in",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_model_folder_with_a_file_that_is_none_is_refused_by_name(demo_folder, tmp_path, what):
    name, write, said = FOLDERS[what]
    folder = shutil.copytree(demo_folder / "model", tmp_path / "model")
    write(folder / name)
    with pytest.raises(SystemExit) as ended:
        folders.find(str(folder))
    first, *lines = str(ended.value.code).split("\n")
    assert first == f"--model {folder} cannot be used:" and len(lines) == 1
    assert lines[0].startswith(f"  {folder / name}: ") and said in lines[0]


def test_results_name_what_answered_and_what_was_asked(demo_folder, trained):
    results, config = (json.loads((trained / f"{name}.json").read_text()) for name in ("results", "config"))
    assert results["model"] == str(demo_folder / "model")
    assert results["checkpoint"] == str(trained / "checkpoints" / "step-00000002")
    assert (results["step"], results["steps"], results["split"], results["left_out"]) == (2, 2, "test", {})
    for name in ("script", "script_sha256", "git_commit", "git_differs"):
        assert results[name] == config[name]


def test_another_prompt_is_another_run(qwen_folder, tmp_path, monkeypatch):
    """Also where it stands in the prefix, not in the branches: whoever edits it would mix two runs."""
    script = train_qwen2vl_sentinel
    run(qwen_folder, tmp_path / "run", *SMALL, script=script)
    monkeypatch.setattr(script.QwenTask, "system", lambda *_: "Answer at length.")
    assert "is of another run: examples was" in refused(qwen_folder, tmp_path / "run", *SMALL, script=script)


def test_answers_are_kept_where_the_figures_of_captions_fail(plain_folder, tmp_path, monkeypatch):
    script = train_video_plain_lm

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script.captions, "figures", fail)
    flags = ["--vision-model", plain_folder / "vision", "--from-scratch", "--fast-frames", 2, "--slow-frames", 2]
    with pytest.raises(RuntimeError, match="out of memory"):
        run(plain_folder, tmp_path / "run", *SMALL, *flags, script=script)
    assert (tmp_path / "run" / "predictions.jsonl").read_text().count("\n") > 0


def test_the_time_that_saving_takes_is_no_step_s(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    args = SimpleNamespace(log_to=[], overfit=None, patience=None)
    closing = SimpleNamespace(callback=lambda close: None)
    device = metrics.torch.device("cpu")
    found = Metrics(SimpleNamespace(args=args, folder=tmp_path, device=device, closing=closing, epochs=[0.5, 1]), 0, 9)
    for step in (1, 2):
        now[0] += 2.0
        found.step(step, [train_llava_med.Prompt([1], [([2], [2])], ["q"])], 1.0, 1.0, 1e-3)
        now[0] += 100.0  # a checkpoint
        found.restart_clock()
    found.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["questions_per_s"] for line in lines] == [0.5, 0.5]
