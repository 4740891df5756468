"""Fill the marked blocks of README.md and docs/, so that no code and no output in them is typed from memory.

    python docs/quote.py                     # code: after every change of a quoted line
    python docs/quote.py --logs DIR          # also output, saved by `make demo SCRIPT=NAME | tee DIR/NAME.log`

A mark is an HTML comment on a line of its own, directly before a fenced block; what stands in the block is replaced:

    <!-- quote FILE NAME -->                 the function, class or method, such as LlavaTask.encode, of the file
    <!-- quote FILE section "TEXT" -->       the section of the file or function that begins with `# ---- TEXT`
    <!-- quote FILE "FIRST" ... "LAST" -->   from the first line that contains FIRST to the next one that contains LAST
    <!-- quote FILE "TEXT" -->               the first line that contains TEXT
    <!-- output llava_med "FIRST" ... "LAST" "TEXT" -->   lines of a saved output

FILE starts from the root. Several selections in one mark are put one after the other.

The diffs of new_model.md have no marks. They are applied to the present train_llava_med.py, or else to that of
--since COMMIT with the changes since then merged in, and written again; where that leaves a conflict, resolve it in
the file that is named, and give this file as --copy.
"""

import argparse
import ast
import difflib
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"^(<!-- (quote|output) (\S+) ([^\n]+) -->\n```\w*\n).*?^```$", re.M | re.S)
PART = re.compile(r'section "([^"]+)"|"([^"]+)"(?: \.\.\. "([^"]+)")?|([\w.]+)')
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.M | re.S)


def selected(text: str, wanted: str) -> str:
    """The parts of a text that a mark names. Raises ValueError where there is no such part."""
    if PART.sub("", wanted).strip():
        raise ValueError(f"cannot read {wanted!r}")
    found = [part(text.split("\n"), *match.groups()) for match in PART.finditer(wanted)]
    return "".join("\n".join(lines).rstrip() + "\n" for lines in found)


def part(lines: list[str], section: str | None, first: str | None, last: str | None, name: str | None) -> list[str]:
    if name:
        return definition(lines, name)
    start = place(lines, f"# ---- {section}" if section else first)
    if not section:
        return lines[start : place(lines, last, start) + 1] if last else [lines[start]]
    indent = re.match(" *", lines[start])[0]
    ends = re.compile(rf"{indent}# ----|(?!{indent})\s*\S")  # the next section, or a line that is less indented
    return lines[start : next((i for i in range(start + 1, len(lines)) if ends.match(lines[i])), len(lines))]


def place(lines: list[str], text: str, start: int = 0) -> int:
    found = next((i for i in range(start, len(lines)) if text in lines[i]), None)
    if found is None:
        raise ValueError(f"no line contains {text!r}")
    return found


def definition(lines: list[str], name: str) -> list[str]:
    """The lines of a function, class or method, its decorators included."""
    node = ast.parse("\n".join(lines))
    for word in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == word), None)
        if node is None:
            raise ValueError(f"no function or class {name}")
    return lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]


def fill(text: str, root: Path, logs: Path | None) -> str:
    """A document with its marked blocks filled; those of outputs stay without `logs`, and where no log is there."""

    def block(found: re.Match) -> str:
        head, kind, file, wanted = found.groups()
        source = root / file if kind == "quote" else logs and logs / f"{file}.log"
        if not source or (kind == "output" and not source.exists()):
            return found[0]
        try:
            new = selected(source.read_text(), wanted)
        except ValueError as error:
            raise SystemExit(f"<!-- {kind} {file} {wanted} -->: {error}") from None
        assert "```" not in new, f"{file}: a fence inside a fenced block"
        return f"{head}{textwrap.dedent(new) if kind == 'quote' else new}```"

    return MARKED.sub(block, text)


def copied(blocks: list[str], script: Path, since: str) -> str:
    """What the diffs make of the script; where they no longer apply, of that of `since`, with its changes merged in."""
    with tempfile.TemporaryDirectory() as name:
        copy, was = Path(name, "train_smolvlm.py"), Path(name, "was.py")
        commit = ["git", "show", f"{since}:./{script.name}"]
        for old in (script.read_text, lambda: subprocess.check_output(commit, cwd=script.parent, text=True)):
            was.write_text(old())
            copy.write_text(was.read_text())
            command = ["git", "apply", "--unidiff-zero", "-C0", "-"]  # also where a line around has changed
            if not subprocess.run(command, cwd=name, input="".join(blocks), text=True, capture_output=True).returncode:
                break
        else:
            raise SystemExit(f"new_model.md: its diffs fit neither {script.name} nor that of {since}; give --since")
        merged = subprocess.run(["git", "merge-file", "-p", copy, was, script], capture_output=True, text=True)
    if merged.returncode:
        conflict = Path(tempfile.mkdtemp()) / "train_smolvlm.py"
        conflict.write_text(merged.stdout)
        raise SystemExit(f"new_model.md: conflicts; resolve them in {conflict}, and give it as --copy")
    return merged.stdout


def write_diffs(text: str, script: Path, since: str, copy: Path | None) -> str:
    """new_model.md with its diffs written again: a hunk goes to the block with which it shares most changed lines."""
    blocks = DIFF.findall(text)
    new = copy.read_text() if copy else copied(blocks, script, since)
    known = [set(re.findall(r"^[+-].*\S.*$", block, re.M)) for block in blocks]
    parts, last = [""] * len(blocks), 0
    diff = difflib.unified_diff(script.read_text().splitlines(True), new.splitlines(True), n=1)
    for hunk in re.split(r"^(?=@@)", "".join(diff), flags=re.M)[1:]:
        shared = [len(lines & set(hunk.splitlines())) for lines in known]
        last = shared.index(max(shared)) if max(shared) else last
        parts[last] += hunk
    parts[0] = f"--- a/train_smolvlm.py\n+++ b/train_smolvlm.py\n{parts[0]}"
    return DIFF.sub(lambda _: f"```diff\n{parts.pop(0)}```", text)


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the repository (default: this one)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="saved outputs (default: none; they stay as shown)")
    parser.add_argument("--since", default="HEAD", metavar="COMMIT", help="of new_model.md's diffs (default: HEAD)")
    parser.add_argument("--copy", type=Path, metavar="FILE", help="train_smolvlm.py with all conflicts resolved")
    args = parser.parse_args(argv)
    for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
        old = path.read_text()
        text = fill(old, args.root, args.logs)
        if path.name == "new_model.md":
            text = write_diffs(text, args.root / "train_llava_med.py", args.since, args.copy)
        if text != old:
            path.write_text(text)
            print(f"{path.relative_to(args.root)} is written again")


if __name__ == "__main__":
    main()
