"""Question types and the answers that are allowed; `python -m inputs.questions IN OUT` writes them into a file."""
import sys
import unicodedata
from pathlib import Path

from _old import common as _old
from _old import qwen as _qwen

says_nothing = _old.says_nothing
allow_training_answers = _qwen.allow_training_answers  # of examples with `inferred`


def composed(entry):
    """é is one character or two: composed, so that a word has one spelling. Raises ValueError for half a character."""
    import json
    import unicodedata

    entry = json.loads(unicodedata.normalize("NFC", json.dumps(entry, ensure_ascii=False)))
    json.dumps(entry, ensure_ascii=False).encode()
    return entry


def fields(entry, unasked=None):
    """question, answer, question_type and candidates of an entry. With `unasked`, the question may be empty: that is
    then its type. Raises ValueError."""
    if unasked is None or entry["question"]:
        return _old.question_fields(entry)
    kind = entry.get("question_type") or unasked
    return _old.question_fields({**entry, "question": "none", "question_type": kind}) | {"question": ""}


if __name__ == "__main__":
    _qwen.enrich(*map(Path, sys.argv[1:3]))
