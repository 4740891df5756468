"""Text files of every kind: UTF-8, JSON and JSON lines, CSV; and the values of an entry as they are taken."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from inputs.task import Problem


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises ValueError where it cannot be read, or is not UTF-8."""
    try:
        str(path).encode()  # a name of other bytes could be written nowhere
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is a folder, a pipe, or a link that leads nowhere; put a file in its place")
        text = path.read_text("utf-8").removeprefix("\ufeff")
    except UnicodeEncodeError:
        raise ValueError("the name of the file is not UTF-8; rename it") from None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise ValueError("the file ends within a character: cut off; copy it again") from None
        place = f"byte {error.start}, in line {error.object.count(10, 0, error.start) + 1}"
        kind = "UTF-16" if 0 in error.object[:8] else "LATIN1"
        text = f"not UTF-8 ({place}); convert it from the encoding it has, as iconv -f {kind} -t UTF-8 does"
        raise ValueError(text) from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}); make it readable") from None
    if "\0" in text:
        place = f"byte {len(text.partition(chr(0))[0].encode())}"
        raise ValueError(f"not UTF-8 but a NUL ({place}); copy it again, or convert it: iconv -f UTF-16 -t UTF-8")
    return text


def once(fields: list[tuple]) -> dict:
    """The object of these fields. Raises ValueError where one is there twice, with different values."""
    found = dict(fields)
    for name, value in fields if len(found) < len(fields) else []:
        if found[name] != value:
            raise ValueError(f"the field {name!r} twice, with different values")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=once)


def loads(text: str):
    """What a text says as JSON. Raises ValueError, also where it says a thing twice."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path):
    """What a JSON file holds. Raises ValueError where it is none, or cannot be read."""
    text = read_text(path)
    try:
        return loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); fix the file, or copy it again") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("file:line", its object) of a JSON-lines file, a line at a time; a Problem for each line that holds none."""
    where = None
    try:
        read_text(path)
    except ValueError as error:
        yield path.name, Problem(path.name, None, str(error), fatal=True)
        return
    with path.open(encoding="utf-8-sig") as file:  # splitlines would also cut at U+2028 inside a text
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                entry = loads(line.lstrip("\ufeff").rstrip("\n"))  # it stands between files that were joined
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                cut = isinstance(error, json.JSONDecodeError) and not line.endswith("\n")
                text = f"not a JSON object ({error}); fix the line"
                text = "the file ends within this line: cut off; copy it again" if cut else text
                entry = Problem(where, None, text, fatal=cut)
            yield where, entry
    if where is None:
        yield path.name, Problem(path.name, None, "the file holds no examples; write it again", fatal=True)


def read_csv(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("file:line", its fields) of each row of a CSV file with a header; an empty cell is a field that is not there."""
    where = None
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        names = reader.fieldnames or []
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"no header of different names, with commas between them: {names}; write one")
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                text = f"not the {len(names)} cells of the header; put quotes around a text with commas"
                yield where, Problem(where, None, text)
            else:  # pandas writes its index under no name
                yield where, {name or "index": cell for name, cell in row.items() if cell}
        if where is None:
            raise ValueError("a header without rows below it; write the file again")
    except (ValueError, csv.Error) as error:
        yield path.name, Problem(path.name, None, str(error), fatal=True)


def read_list(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("file[place]", the object) of each place of a JSON list; a Problem where it holds none."""
    try:
        values = read_json(path)
        if not isinstance(values, list) or not values:
            raise ValueError("not a JSON list of examples; fix the file")
    except ValueError as error:
        values = [Problem(path.name, None, str(error), fatal=True)]
    for i, value in enumerate(values):
        where = f"{path.name}[{i}]"
        good = isinstance(value, dict | Problem)
        yield where, value if good else Problem(where, None, "not a JSON object; fix the file")


def tidy(media: Path, value):
    """A value of an entry; NaN (as pandas writes what is missing) is None, an absolute path in media/ relative."""
    if type(value) is str and value.isascii() and value[:1] != "/":  # nearly all
        return value
    if isinstance(value, dict):
        return {tidy(media, name): tidy(media, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [tidy(media, inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    if re.search("[\ud800-\udfff]", value):  # JSON may hold it, UTF-8 cannot
        raise ValueError("half a character, \\ud800 to \\udfff without its other half; write it in full, or remove it")
    if not value.startswith("/"):
        return value
    root, path = os.path.abspath(media), Path(os.path.normpath(value))
    return str(path.relative_to(root)) if path.is_relative_to(root) else value
