"""When is an answer right?"""
import unicodedata

from _old import common as _common


def score(said, example, synonyms=()):
    """{"exact", "tolerant"}: exact where it is the answer in one of its forms, tolerant also where `synonyms` say so.

    `synonyms` are sets of texts: a member of one counts as any other of it.
    """
    forms = [example.answer, *example.also_right]
    scores = [_common.score_answer(said, form, example.question_type) for form in forms]
    said, right = _common.normalise(said), {_common.normalise(form) for form in forms}
    lines = [{_common.normalise(word) for word in line} for line in synonyms]
    same = any(said in line and line & right for line in lines)
    return {"exact": any(s["exact"] for s in scores), "tolerant": same or any(s["tolerant"] for s in scores)}


def caption(said, true):
    """exact: the same words, as they are written. tolerant: as answers are compared, which drops "a", in Italian a word."""
    words = unicodedata.normalize("NFC", said or "").split()
    return {"exact": words == true.split(), "tolerant": _common.score_answer(said, true, "caption")["exact"]}
