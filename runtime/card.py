"""What a trained folder holds beside its weights, so that whoever has it alone gets the answers that were evaluated.

card.md beside this module is the model card, README.md, as a template.
"""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import jinja2
from transformers import GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from runtime import original_llava
from runtime.files import write_json, write_text
from runtime.folders import read_json

RESULTS = "\n## Results\n"  # where they begin in a card
ANSWERING = "--eval-only", "--resume", "auto"  # also where it was trained with another --resume


def complete(target: Path, folder: Path, task, run) -> None:
    """Tokenizer, processor, settings of generate() and model card of what run.checkpoint has trained on `folder`."""
    task.tokenizer.save_pretrained(target)
    if task.processor is not None:  # volumes have none
        save_processor(task, folder, target)
    ids = {name: getattr(task.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    longest = settings_of(run)["max_answer_tokens"]
    GenerationConfig(do_sample=False, max_new_tokens=longest, **ids).save_pretrained(target)
    path = target / "adapter_config.json"
    if path.is_file():  # the name that was given, not a folder of this machine's cache
        base = {"base_model_name_or_path": run.args.model, "revision": revision(folder)}
        write_json(path, read_json(path) | base)
    write_text(target / "README.md", text(target, folder, task, run))


def save_processor(task, folder: Path, target: Path) -> None:
    """The image processor as the model was trained with it, also where AutoProcessor looks for all of the model's."""
    task.processor.save_pretrained(target)
    model_type = read_json(folder / "config.json")["model_type"]
    saved = {"processor_class": PROCESSOR_MAPPING_NAMES.get(model_type)}
    saved |= if_there(folder / "processor_config.json") | task.processor_settings
    if saved["processor_class"]:  # transformers has one for such a model
        saved.pop("chat_template", None)  # which the tokenizer has saved
        saved["image_processor"] = read_json(target / "preprocessor_config.json")
        write_json(target / "processor_config.json", saved)


def update(task, run) -> None:
    """Results in the card of RUN/adapter or RUN/model once what it holds has answered; what stands above them stays."""
    for path in (run.folder / "adapter/README.md", run.folder / "model/README.md"):
        old = path.read_text("utf-8", "replace") if path.is_file() else ""
        if run.checkpoint.name in old and home(run) == run.folder.resolve():
            new = text(path.parent, Path(task.tokenizer.name_or_path), task, run)
            write_text(path, old.partition(RESULTS)[0] + "".join(new.partition(RESULTS)[1:]))


def text(target: Path, folder: Path, task, run) -> str:
    """README.md, from the files of the run folder that run.checkpoint lies in."""
    state, found = run.checkpoint / "state.json", home(run) / "results.json"
    config, results = if_there(home(run) / "config.json"), if_there(found)
    answered = Path(results.get("checkpoint") or "")  # it may have moved since, but if it is there it is this one
    of_it = answered.name == run.checkpoint.name and (not answered.exists() or answered.samefile(run.checkpoint))
    of_it = of_it and found.stat().st_mtime > state.stat().st_mtime  # not of one that it replaced
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    adapter = (target / "adapter_config.json").is_file()
    published = adapter and original_llava.is_one(folder)
    of_base = "its base as it is published, but what --merge writes" if published else None
    asking = None if task.unreadable else messages(task)
    return environment.from_string(Path(__file__).with_name("card.md").read_text("utf-8")).render(
        adapter=adapter,
        base=run.args.model,
        base_name=Path(run.args.model).absolute().name,
        revision=revision(folder),
        license=license_of(folder),
        data=Path(settings_of(run)["data"] or "unknown data").absolute().name,
        examples=config.get("trained_on"),
        step=read_json(state)["step"],
        steps=read_json(state)["same"]["steps"],
        dtype=read_json(state)["same"]["dtype"],
        checkpoint=run.checkpoint.name,
        script=config.get("script", "a script"),
        command=shlex.join(["python", config.get("script", "SCRIPT"), *config.get("argv", []), *ANSWERING]),
        unreadable=task.unreadable or of_base or (asking is None and "prompts as this script writes them"),
        messages=asking,
        results=results if of_it else None,
        answered=Path(results.get("data") or "unknown data").absolute().name,
    )


def messages(task) -> str | None:
    """Python code of the conversation that asks `question` (of `question_type`) about `image`."""
    asked = {"question": "{question}", "question_type": "{question_type}", "history": [], "system": ""}
    asked["media"] = ["image"]
    try:
        turns = task.messages(SimpleNamespace(**asked))
    except AttributeError:  # it asks with fields that only the script's own examples have
        return None
    if turns is None:  # it uses no chat template
        return None
    code = ""
    for turn in turns:
        line = json.dumps(turn, ensure_ascii=False)  # JSON's \ud83d\ude00 are no character to Python
        if turn["role"] != "system":  # a text that names one of them; {question} of a system text is no field
            line = re.sub(r'(?<!\\)"(?=(\\.|[^"\\])*\{question)', 'f"', line)
        code += f"    {line},\n"
    return "[\n" + code.replace('{"type": "image"}', '{"type": "image", "image": image}') + "]"


def home(run) -> Path:
    """The run folder that run.checkpoint lies in, which need not be run.folder."""
    return run.checkpoint.resolve().parents[1]


def settings_of(run) -> dict:
    """The settings that it was trained with."""
    return vars(run.args) | if_there(home(run) / "config.json").get("settings", {})


def revision(folder: Path) -> str | None:
    """The commit of a downloaded model: its folder is snapshots/COMMIT."""
    return folder.name if folder.parent.name == "snapshots" else None


def license_of(folder: Path) -> str | None:
    """The license that the base's own card names."""
    path = folder / "README.md"
    card = path.read_text("utf-8", "replace") if path.is_file() else ""
    return next(iter(re.findall(r"^license: *(?!unknown)(\S+)", card, re.M)), None)


def if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
