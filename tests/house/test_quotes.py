"""What documents quote of the code is as the code is; what pages say of a line of it is said of one that exists."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
spec = importlib.util.spec_from_file_location("quote", ROOT / "docs" / "quote.py")
quote = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quote)


@pytest.fixture
def copy(tmp_path):
    """The documents and all that they may quote."""
    for path in [
        *PAGES,
        *ROOT.glob("*.py"),
        *(p for room in ("inputs", "runtime", "report") for p in ROOT.glob(f"{room}/*.py")),
    ]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def changed(copy: Path) -> list[str]:
    return [p.name for p in PAGES if (copy / p.relative_to(ROOT)).read_text() != p.read_text()]


def test_every_quote_is_as_its_source_is(copy):
    quote.main(["--root", str(copy)])
    assert changed(copy) == [], "python docs/quote.py writes them again"


def test_every_mark_is_read():
    for path in PAGES:
        text = path.read_text()
        assert len(re.findall(r"<!-- (?:quote|output) ", text)) == len(quote.MARKED.findall(text)), path.name


def test_a_stale_quote_is_written_again(copy, capsys):
    page = copy / "docs" / "glossary.md"
    marks = ["common.py supervised_tokens", 'train_llava_med.py section "save"', 'common.py "IGNORE =" ... "LAYER ="']
    old = page.read_text() + "".join(f"\n<!-- quote {mark} -->\n```python\nstale\n```\n" for mark in marks)
    page.write_text(old + '\n<!-- output demo "n" ... "micro" "loss" -->\n```\nof another run\n```\n')
    quote.main(["--root", str(copy)])
    assert changed(copy) == ["glossary.md"] and "glossary.md" in capsys.readouterr().out
    text = page.read_text()
    assert "stale" not in text and "of another run" in text
    assert "```python\ndef supervised_tokens(labels" in text and "\nif stopped or due:\n    save(step)\n" in text
    (copy / "demo.log").write_text("start\n  type  n\nmicro 90.0%\nnothing\nloss 1\n")
    quote.main(["--root", str(copy), "--logs", str(copy)])
    assert "```\n  type  n\nmicro 90.0%\nloss 1\n```" in page.read_text()


@pytest.mark.parametrize(
    "wanted", ["nothing_of_this_name", "Prompt.nothing", '"no such text"', '"IGNORE" ..., "LAYER"']
)
def test_what_is_not_there_cannot_be_quoted(copy, wanted):
    (copy / "docs" / "glossary.md").write_text(f"<!-- quote common.py {wanted} -->\n```\n```\n")
    with pytest.raises(SystemExit, match=re.escape(wanted)):
        quote.main(["--root", str(copy)])


def test_the_diffs_follow_a_change_of_the_script(copy):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=copy, check=True)

    git("init", "-q")
    git("add", "train_llava_med.py")
    git("commit", "-q", "-m", "before")
    script, page = copy / "train_llava_med.py", copy / "docs" / "new_model.md"
    script.write_text(script.read_text().replace('IMAGE = "<image>"\n', 'IMAGE = "<image>"  # as LLaVA writes it\n'))
    before = quote.DIFF.findall(page.read_text())
    quote.main(["--root", str(copy)])
    after = quote.DIFF.findall(page.read_text())
    assert ' IMAGE = "<image>"  # as LLaVA writes it\n+AROUND' in after[0]
    assert after[1:] == before[1:] and len(before) == 3
    script.write_text(script.read_text().replace("LlavaForConditionalGeneration", "OtherForConditionalGeneration"))
    with pytest.raises(SystemExit, match="conflicts; resolve them in"):
        quote.main(["--root", str(copy)])


# ------------------------------------------------------------------------------------------------------------
# The pages of the five scripts
# ------------------------------------------------------------------------------------------------------------

SCRIPTS = ("llava_med", "qwen2vl_sentinel", "surg_video_vqa", "umbrella_mri", "video_plain_lm")
HEADINGS = ["Data", "Commands", "Flags", "Output", "Logged values", "Implementation details", "Results", "Limits"]
HEADINGS += ["Differences from the original recipe"]
PLACE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")  # `common.py: visible`


def place_of(file: str, name: str) -> list[str]:
    """The lines of a function, class, method or constant. Raises ValueError where there is none."""
    lines = (ROOT / file).read_text().split("\n")
    return [line for line in lines if line.startswith(f"{name} = ")] or quote.definition(lines, name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_s_page_has_every_part_in_its_place(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / f"{name}.md").read_text(), flags=re.M | re.S)
    assert [heading for heading in re.findall(r"^## (.*)$", text, re.M) if heading in HEADINGS] == HEADINGS
    _, details, _ = re.split(r"^## Implementation details\n|^## Results\n", text, flags=re.M)
    items = re.split(r"^\d+\. ", details, flags=re.M)[1:]
    assert len(items) >= 5 and [item for item in items if not PLACE.search(item)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_lines_that_a_page_points_at_are_there(path):
    for file, name in PLACE.findall(path.read_text()):
        assert place_of(file, name), f"{path.name}: {file} has no {name}"


def test_a_line_that_is_gone_is_found():
    assert place_of("train_surg_video_vqa.py", "LORA_PATTERN") and place_of("train_llava_med.py", "LlavaTask.encode")
    with pytest.raises(ValueError, match=r"no function or class LlavaTask\.decode"):
        place_of("train_llava_med.py", "LlavaTask.decode")
