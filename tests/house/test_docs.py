"""Documents name only flags that exist; the files keep to the limits of the design."""

import ast
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("inputs", "runtime", "report", "demo")
FIVE = ("llava_med", "qwen2vl_sentinel", "surg_video_vqa", "umbrella_mri", "video_plain_lm")
SCRIPTS = [ROOT / f"train_{name}.py" for name in FIVE]  # by name: a copy of one may be what it likes
MODULES = sorted([ROOT / "common.py", *SCRIPTS, *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path for path in [*DOCUMENTS, *sorted((ROOT / "slurm").glob("*"))] if path.is_file()]

# a word that a command line begins with; flags after any other than our programs are not ours to check
COMMAND = r"(?P<script>\w+\.py|-m (?:report|demo|inputs\.\w+)\b|train_\$\(\w+\)\.py|\b\w+_flags(?= =))"
COMMAND += r"|(?P<other>\b(?:pip|uv|ruff|pytest|sbatch|srun|"
COMMAND += r"scontrol|torchrun|git|make|docker|rm|mkdir|nvidia-smi|apptainer|curl|hf|huggingface-cli|SBATCH)\b)"
FLAG = r"(?<![\w-])(?P<flag>--[a-z][a-z0-9-]*)"


def name_of(path: Path) -> str:
    """ "runtime.files" of runtime/files.py"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def help_of(program: str) -> str:
    """--help of a script or of a package that is run with -m."""
    main, text = importlib.import_module(program).main, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [program, "--help"])
        main()
    return text.getvalue()


@pytest.fixture(scope="module")
def flags():
    """{program: its flags}."""
    programs = {path.stem: path.stem for path in SCRIPTS} | {room: f"{room}.__main__" for room in ("demo", "report")}
    programs |= {path.stem: f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")}
    found = {name: set(re.findall(r"--[a-z][a-z0-9-]*", help_of(module))) for name, module in programs.items()}
    quote = set(re.findall(r'"(--[a-z]+)"', (ROOT / "docs/quote.py").read_text()))
    return found | {"slurm/job.sh": {"--dry-run"}, "quote": quote}


def used_flags(text: str, default: str | None = None):
    """(program or None, flag) for every flag in a text; None where prose names it without a command."""
    for line in re.sub(r"\\\n", " ", text).split("\n"):
        script, ours = default, True
        for found in re.finditer(f"{COMMAND}|{FLAG}", line):
            if found["script"]:
                name = found["script"].removesuffix(".py").removeprefix("-m ")
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
    """Its own text, messages included; what common.py and runtime/ say of flags is said by every script."""
    assert unknown_flags(path.read_text(), flags, default=path.stem) == []
    for shared in [ROOT / "common.py", *(ROOT / "runtime").glob("*.py")]:
        if shared.name != "foreign_flags.py":  # names other trainers' flags, to say what they are called here
            assert unknown_flags(shared.read_text(), flags, default=path.stem) == [], shared


def test_a_flag_that_does_not_exist_is_found(flags):
    text = "`--learning-rate` python train_llava_med.py \\\n  --lora-rank 8\npip install --quiet; sbatch --array=1"
    assert unknown_flags(text, flags) == [(None, "--learning-rate"), ("train_llava_med", "--lora-rank")]
    assert unknown_flags("llava_med_flags = --tune full --count 3", flags) == [("train_llava_med", "--count")]
    assert unknown_flags("python -m demo llava_med --count 3 --lr 1", flags) == [("demo", "--lr")]


def test_scripts_named_in_documents_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"(?<![\w/$)-])([a-z]\w*\.py)\b", path.read_text()):
            assert name in ("train_mine.py", "train_smolvlm.py") or list(ROOT.rglob(name)), f"{path.name} names {name}"


def anchors(text: str) -> set[str]:
    """The names by which GitHub reaches the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [path for path in DOCUMENTS if path.suffix == ".md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not heading or heading in anchors(file.read_text()), f"{path.name} links to {target}#{heading}"


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    reached = text + "".join(path.read_text() for path in PAGES if f"docs/{path.name}" in text)
    assert [path.name for path in PAGES if f"{path.name})" not in reached and path.name != "README.md"] == []


def test_what_prevents_a_failure_is_there():
    """The functions and classes that the table of failures names, with or without their module."""
    code = "".join(path.read_text() for path in MODULES)
    text = (ROOT / "docs/failures.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "::" in line]
    first = re.findall(r"^Prevented by (.*?)\. Tests?:\s+tests/", text, flags=re.M | re.S)
    named = {name for by in [row[1] for row in rows] + first for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w*)`", by)}
    assert len(rows) >= 50 and all("::test_" in row[2] for row in rows) and len(first) == 12
    missing = [name for name in sorted(named) if not re.search(rf"^ *(?:def|class) {name}\b", code, flags=re.M)]
    assert missing == ["get_rope_index"]  # transformers'


# ------------------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported, wherever: "a.b" of `import a.b`, of `from a.b import c` also "a.b.c"."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"from {'.' * node.level}{node.module} import …: write the module's full name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_trainer_no_pickle_and_no_foreign_code(path):
    tree = ast.parse(path.read_text())
    unwanted = {"peft", "accelerate", "datasets", "torchvision", "pickle", "cPickle", "dill", "joblib"}
    assert {name.split(".")[0] for name in imported(tree)} & unwanted == set()
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    assert [name for name in names if name in ("torch.load", "torch.save") or name.split(".")[-1] == "Trainer"] == []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [(call, k.value) for call in calls for k in call.keywords if k.arg == "trust_remote_code"]
    assert all(ast.unparse(value) == "False" for _, value in given)
    auto = [call for call in calls if re.fullmatch(r"(.+\.)?Auto\w+\.from_(pretrained|config)", dotted(call.func))]
    assert all(call in [one for one, _ in given] for call in auto)  # left out, transformers asks on the terminal
    assert {"eval", "exec"} & {dotted(node.func) for node in calls} == set()


# what each room may import; the last four look at everything before a run, or at a script: nothing else imports them
ALLOWED = {
    "common": set(),
    "inputs": {"common", "inputs", "report.scoring"},
    "runtime": {"common", "runtime"},
    "report": {"common", "inputs", "runtime", "report"},
    "inputs.check_cache": {"inputs", "runtime"},
    "inputs.data_check": {"common", "inputs", "runtime", "report"},
    "inputs.contract": {"common", "inputs", "runtime", "report"},
    "inputs.predict": {"common", "inputs", "runtime"},
}
ABOVE = {"inputs.check_cache", "inputs.data_check", "inputs.contract", "inputs.predict"}
EACH_OTHER = {"inputs.data_check": {"inputs.check_cache"}}
EACH_OTHER |= {name: {"inputs.data_check"} for name in ("inputs.contract", "inputs.predict")}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "demo"], ids=name_of)
def test_imports_run_one_way(path):
    name = name_of(path)
    allowed = ALLOWED.get(name) or ALLOWED.get(name.split(".")[0]) or {"common", "inputs", "runtime", "report"}
    ours = {m for m in imported(ast.parse(path.read_text())) if m.split(".")[0] in ("common", *ROOMS) or "train_" in m}
    wrong = {m for m in ours if not any(m == ok or m.startswith(f"{ok}.") for ok in allowed) and m != "report"}
    assert wrong == set()
    if name.split(".")[0] in ("common", *ROOMS):
        assert ours & ABOVE <= EACH_OTHER.get(name, set())


@pytest.mark.parametrize("path", [path for path in MODULES if not path.name.startswith("train_")], ids=name_of)
def test_what_is_shared_knows_no_model_and_no_script(path):
    text = path.read_text()
    if path.parent.name not in ("demo",) and path.name != "contract.py":
        assert [script.stem for script in SCRIPTS if script.stem in text] == []
    assert not re.search(r"\bif .*model_type\s*==", text)


LONGEST = {"common.py": 700, "train_llava_med.py": 400, "train_qwen2vl_sentinel.py": 400}
LONGEST |= {f"train_{name}.py": 500 for name in ("surg_video_vqa", "umbrella_mri", "video_plain_lm")}


@pytest.mark.parametrize("path", [path for path in MODULES if path.name in LONGEST or path.parent != ROOT], ids=name_of)
def test_files_and_functions_are_short(path):
    """Moving, sharing and deleting is how a file gets shorter, not denser lines: these are at most 120 long."""
    text = path.read_text()
    assert text.count("\n") <= LONGEST.get(path.name, 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert node.end_lineno - node.lineno < 60, node.name
    assert ast.get_docstring(ast.parse(text))


def test_the_house_is_small():
    """All that runs, without tests, benchmarks and the demos. Of it 1,000 lines are what real files do to a reader, and
    400 what hostile folders, kills and other people's software do to a run and to what it has trained;
    800 what users ask for first: published weights, answers without labels, several images, video files, numbers, the
    best checkpoint.

    The aim is 8,000: who adds takes something out.
    """
    assert sum(path.read_text().count("\n") for path in MODULES if path.parent.name != "demo") <= 12_000


def function(path: Path, name: str) -> str:
    """The text of a script's function."""
    text = path.read_text()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.get_source_segment(text, node)


def test_saving_comes_before_evaluating_in_the_loop():
    loop = function(ROOT / "train_llava_med.py", "train")
    assert loop.index("optimizer.step()") < loop.index("if stopped or due:\n            save(step)")
    due = next(line for line in loop.split("\n") if line.strip().startswith("due = "))
    assert "step % args.eval_every == 0" in due and loop.index("common.mean_loss") < loop.index("optimizer.step()")


def test_every_test_that_the_documents_name_is_there():
    named = [pair for path in DOCUMENTS for pair in re.findall(r"(tests/[\w/]+\.py)::(\w+)", path.read_text())]
    assert len(named) > 15
    assert [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []
