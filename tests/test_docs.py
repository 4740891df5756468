"""Documents name only flags that exist; the files keep to the limits of the design."""

import ast
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("*.py"))
SCRIPTS = [path for path in MODULES if path.stem.startswith("train_")]
OURS = {path.stem for path in MODULES}
DOCUMENTS = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path for path in [*DOCUMENTS, *sorted((ROOT / "slurm").glob("*"))] if path.is_file()]

# a word that a command line begins with; flags after any other than our scripts are not ours to check
COMMAND = r"(?P<script>\w+\.py|train_\$\(\w+\)\.py|\b\w+_flags(?= =))|(?P<other>\b(?:pip|ruff|pytest|sbatch|srun|"
COMMAND += r"scontrol|torchrun|git|make|docker|rm|mkdir|nvidia-smi|apptainer|curl|hf|huggingface-cli|SBATCH)\b)"
FLAG = r"(?<![\w-])(?P<flag>--[a-z][a-z0-9-]*)"


def help_of(script: str) -> str:
    """--help of a script and of its subcommands."""
    main = importlib.import_module(script).main

    def shown(*argv):
        text = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            patch.setattr(sys, "argv", [f"{script}.py", *argv, "--help"])
            main()
        return text.getvalue()

    text = shown()
    commands = re.search(r"^usage:[^{]*\{([\w,]+)\}\s+\.\.\.", text)
    return text + "".join(shown(command) for command in (commands[1].split(",") if commands else []))


@pytest.fixture(scope="module")
def flags():
    """{script: its flags}."""
    names = [path.stem for path in SCRIPTS] + [name for name in ("demo", "report") if name in OURS]
    names += [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
    return {name.split(".")[-1]: set(re.findall(r"--[a-z][a-z0-9-]*", help_of(name))) for name in names}


def used_flags(text: str, default: str | None = None):
    """(script or None, flag) for every flag in a text; None where prose names it without a command."""
    for line in re.sub(r"\\\n", " ", text).split("\n"):
        script, ours = default, True
        for found in re.finditer(f"{COMMAND}|{FLAG}", line):
            if found["script"]:
                name = found["script"].removesuffix(".py")
                ours, script = True, None if "$" in name else f"train_{name[:-6]}" if name[-6:] == "_flags" else name
            elif found["other"]:
                ours = False
            elif ours:
                yield script, found["flag"]


def unknown_flags(text: str, flags: dict, default: str | None = None) -> list:
    everything = set().union(*flags.values())
    return [(script, flag) for script, flag in used_flags(text, default) if flag not in flags.get(script, everything)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_a_document_exists(flags, path):
    assert unknown_flags(path.read_text(), flags) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_in_a_script_exists(flags, path):
    """Its own text, messages included; what runtime.py says of flags is said by every script."""
    assert unknown_flags(path.read_text(), flags, default=path.stem) == []
    assert unknown_flags((ROOT / "runtime.py").read_text(), flags, default=path.stem) == []
    assert unknown_flags((ROOT / "common.py").read_text(), flags, default=path.stem) == []


def test_a_flag_that_does_not_exist_is_found(flags):
    text = "`--learning-rate` python train_llava_med.py \\\n  --lora-rank 8\npip install --quiet; sbatch --array=1"
    assert unknown_flags(text, flags) == [(None, "--learning-rate"), ("train_llava_med", "--lora-rank")]
    assert unknown_flags("llava_med_flags = --tune full --images 3", flags) == [("train_llava_med", "--images")]
    assert unknown_flags("python demo.py llava_med --images 3 --lr 1", flags) == [("demo", "--lr")]


def test_scripts_named_in_documents_exist():
    for path in DOCUMENTS:
        lines = [line for line in path.read_text().split("\n") if "coming" not in line]
        for name in re.findall(r"(?<![\w/$)-])([a-z]\w*\.py)\b", "\n".join(lines)):
            assert list(ROOT.rglob(name)), f"{path.name} names {name}"


# ------------------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------------------


def imports_of(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_trainer_no_pickle_and_no_foreign_code(path):
    tree = ast.parse(path.read_text())
    unwanted = {"peft", "accelerate", "datasets", "torchvision", "pickle", "cPickle", "dill", "joblib"}
    assert imports_of(tree) & unwanted == set()
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    assert [name for name in names if name in ("torch.load", "torch.save") or name.split(".")[-1] == "Trainer"] == []
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert "trust_remote_code" not in keywords
    assert {"eval", "exec"} & {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    allowed = {"common": set(), "runtime": set(), "report": {"common", "runtime", "report_page"}}
    allowed |= {script.stem: {"common", "runtime", "report"} for script in SCRIPTS}
    allowed = allowed.get(path.stem, {"common", "runtime"})
    assert imports_of(ast.parse(path.read_text())) & OURS <= allowed


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem in ("common", "runtime")], ids=lambda p: p.stem)
def test_what_is_shared_knows_no_model_and_no_script(path):
    text = path.read_text()
    assert [name for name in OURS if name.startswith("train_") and name in text] == []
    assert not re.search(r"\bif .*model_type\s*==", text)


FENCES = ("Training loop", "Checking, answering and scoring")


def fenced(path: Path, name: str) -> str:
    """The text between two fence lines, each of which stands there once."""
    begin, end = (f"# {name}: the same text in every script ({word})\n" for word in ("BEGIN", "END"))
    text = path.read_text()
    assert (text.count(begin), text.count(end)) == (1, 1)
    assert text.index(begin) < text.index(end)
    return text[text.index(begin) : text.index(end)]


@pytest.mark.parametrize("name", FENCES)
def test_what_is_fenced_is_the_same_text_in_every_script(name):
    assert SCRIPTS
    assert {fenced(path, name) for path in SCRIPTS} == {fenced(SCRIPTS[0], name)}


def test_the_loop_and_the_scoring_stand_inside_the_fences():
    loop, rest = (fenced(SCRIPTS[0], name) for name in FENCES)
    assert "optimizer.step()" in loop and "save(step)" in loop
    assert "def evaluate(" in rest and "def check_data(" in rest


def test_saving_comes_before_evaluating_in_the_loop():
    loop = fenced(SCRIPTS[0], "Training loop").partition("for step, rows in enumerate(")[2]
    assert loop.index("optimizer.step()") < loop.index("save(step)") < loop.index("val_loss=validate()")


def test_every_proof_that_the_readme_names_is_a_test():
    named = re.findall(r"(tests/\w+\.py)::(\w+)", (ROOT / "README.md").read_text())
    assert len(named) > 15
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []
