"""When is an answer right? Complete answers only are compared; a missing answer is wrong and stays in the denominator.

An answer is never searched for in a text: "no" stands inside "normal", "male" inside "female". `normalise` says what
makes no difference, `score_answer` compares a prediction with one true answer, and `score` with all forms of an
example's. Every exact or relaxed match of this project is decided in this file.
"""

import functools
import re
import unicodedata
from itertools import permutations

ARTICLE = r"(?:an?|the)"
OPTION_LABEL = r"(?<!\w)\(?([A-Ha-h])(?:\)|\.(?=\s))"  # "(a)", "a)", "A. "
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
NUMBER_WORDS += ["twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
SAME_SIGN = str.maketrans({**dict.fromkeys("‐‑‒–—―−", "-"), "'": None, "’": None, "≥": ">=", "≤": "<="})

# ---- what makes no difference ------------------------------------------------------------------------------


@functools.lru_cache(2**16, typed=True)  # the same few answers are compared again and again
def normalise(text: str | int | float | None) -> str:
    """`text` (None is "") in the form in which answers are compared. "The Z-Line." → "z line".

    Lower case, NFKC, no punctuation, no articles, number words as digits, spaces folded. What keeps
    numbers apart stays: "5-10mm", ">20mm", "2.5". "11 – 20 mm" is "11-20mm": its spaces say nothing.
    """
    text = unicodedata.normalize("NFKC", "" if text is None else str(text)).lower().translate(SAME_SIGN)
    text = re.sub(rf"(?<!\S){ARTICLE}\s+(?=\S)", "", text)  # not "(a)" or a final "A": these are answers
    text = re.sub(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", lambda word: str(NUMBER_WORDS.index(word[0])), text)
    text = re.sub(r"(?<=[\dm])\s*-\s*(?=\d)", "-", text)
    text = "".join(char if is_kept(char, text[i + 1 : i + 2]) else " " for i, char in enumerate(text))
    return re.sub(r"(?<=[<>=]) (?=\d)|(?<=\d) (?=[mc]m\b)", "", " ".join(text.split()))


def is_kept(char: str, following: str) -> bool:
    """Does `char` carry meaning in an answer? Letters, digits and spaces do, most punctuation does not."""
    if char == "%" or (char in "-./" and following.isdigit()):  # 5-10, 2.5, 1/2
        return True
    category = unicodedata.category(char)
    return category == "Sm" or category[0] not in "PSC"  # Sm, mathematical: "<5", "≠ 5" and "~5" are not "5"


def members(text) -> set[str]:
    """The answers that ";" separates, normalised: "Red; pink;red" → {"red", "pink"}."""
    return {normalise(part) for part in str("" if text is None else text).split(";")} - {""}


def answer_label(answer) -> str:
    """An answer (None is "") in the form in which it is counted: normalised, the members of a set in order."""
    return "; ".join(sorted(members(answer)))


def says_nothing(answer) -> bool:
    """Is it "nan", or without letters and digits? Such an answer can be neither supervised nor scored."""
    found = members(answer)
    return found == {"nan"} or not re.search(r"\w", "".join(found))


# ---- right or wrong ----------------------------------------------------------------------------------------


def score_answer(prediction, answer, type: str) -> dict[str, bool]:
    """{"exact", "relaxed"} for a `prediction` (None is wrong), the true `answer` and the question's `type`.

    exact, the strict figure: equal after `normalise`, from the first word to the last. ";" separates a set: order,
    spaces and duplicates do not matter, every member is needed, none may be extra. For an mcq "text" is enough where
    the answer is "(a) text"; a label that the answer does not have is wrong.

    relaxed: exact, or
      size_numeric   a value inside the true range; two ranges within 1 mm at each end; two values within 1 mm
                     or 10 % of the true one. A missing unit means mm. Sets: one match for each member.
      count_numeric  the only number in it is the true one ("2 polyps" for "2"); off by one is wrong.
    For every other type, also a data set's own, relaxed = exact.

    Raises ValueError for an answer that is None, "nan" or without letters and digits: never score such an example.
    """
    true, predicted = members(answer), members(prediction)
    if says_nothing(answer):
        raise ValueError(f"the true answer is empty ({answer!r}): correct this example or leave it out by name")
    exact = relaxed = predicted == true
    if type == "mcq" and predicted and not exact:
        exact = relaxed = predicted == members(re.sub(rf"^\s*{OPTION_LABEL}\s*", "", str(answer)))
    if type == "size_numeric" and len(predicted) == len(true):
        sizes, true_sizes = [size_mm(text) for text in predicted], [size_mm(text) for text in true]
        if None not in sizes + true_sizes:
            relaxed = exact or any(all(map(same_size, order, true_sizes)) for order in permutations(sizes))
    if type == "count_numeric":
        count = single_count(answer)
        relaxed = exact or (count is not None and single_count(prediction) == count)
    return {"exact": exact, "relaxed": relaxed}


def score(prediction: str | None, example, synonyms=()) -> dict[str, bool]:
    """{"exact", "relaxed"} for what was answered to an example: right is its answer in any of its forms.

    `synonyms` are sets of texts: in a relaxed match a member of one counts as any other of it. Raises ValueError.
    """
    scores = [score_answer(prediction, form, example.question_type) for form in forms(example)]
    prediction, right = normalise(prediction), {normalise(form) for form in forms(example)}
    lines = [{normalise(word) for word in line} for line in synonyms]
    same = any(prediction in line and line & right for line in lines)
    return {"exact": any(s["exact"] for s in scores), "relaxed": same or any(s["relaxed"] for s in scores)}


def forms(example) -> list[str]:
    """All right answers of an example: its answer first, then the same in other words."""
    return [example.answer, *example.also_right]


def true_candidate(record: dict) -> str | None:
    """Of a record's `candidates` the first that is right for its answer, or another form of it; None where none is."""
    right, kind = [record["answer"], *record.get("also_right", [])], record["question_type"]
    found = (c for c in record["candidates"] if any(c == f or score_answer(c, f, kind)["exact"] for f in right))
    return next(found, None)


def answerable(example) -> bool:
    """Can an answer be right that is restricted to the example's candidates?"""
    return not example.candidates or true_candidate(vars(example)) is not None


def caption(prediction: str | None, true: str) -> dict[str, bool]:
    """exact: the same words as they are written. relaxed: as answers are compared, which drops the Italian word "a"."""
    words = unicodedata.normalize("NFC", prediction or "").split()
    return {"exact": words == true.split(), "relaxed": score_answer(prediction, true, "caption")["exact"]}


# ---- numbers -----------------------------------------------------------------------------------------------


def size_mm(text: str) -> tuple[float, float, bool] | None:
    """(low, high, ends excluded?) in mm of a normalised size, or None: "<5mm" → (0, 5, True)."""
    value = r"(\d*\.?\d+)\s*(mm|cm|millimet\w+|centimet\w+)?"
    size = re.fullmatch(rf"([<>]=?)?{value}(?:\s*(?:-|to)\s*{value})?", text)
    if not size:
        return None
    sign, low, low_unit, high, high_unit = size.groups()
    scale = {"m": 1, "c": 10}
    low_mm = round(float(low) * scale[(low_unit or high_unit or "mm")[0]], 6)  # "1-2 cm": both are cm
    if high:
        high_mm = round(float(high) * scale[(high_unit or low_unit or "mm")[0]], 6)
        return (low_mm, high_mm, False) if low_mm < high_mm and not sign else None
    ends = {"<": (0.0, low_mm), ">": (low_mm, float("inf"))}
    return *ends.get((sign or "=")[0], (low_mm, low_mm)), sign in ("<", ">")


def same_size(predicted: tuple, true: tuple) -> bool:
    """The relaxed rule of `score_answer`, for two of `size_mm`; a range is never right for a single value."""
    (low, high, _), (true_low, true_high, excluded) = predicted, true
    if low == high and true_low == true_high:
        return round(abs(low - true_low), 6) <= max(1.0, 0.1 * true_low)
    if low == high:
        return true_low < low < true_high if excluded else true_low <= low <= true_high
    ends = [(low, true_low), (high, true_high)]  # a == b first, because inf - inf is NaN
    return true_low < true_high and all(a == b or round(abs(a - b), 6) <= 1.0 for a, b in ends)


def single_count(text) -> str | None:
    """The "2" of "2" and "there are 2 polyps"; None for "2-3", "<2", "2mm", "not 2", "2 or 3"."""
    words = normalise(text).split()
    numbers = {word for word in words if re.search(r"\d", word)}
    hedged = {"not", "no", "or", "than", "least", "most", "over", "under"}.intersection(words)
    return numbers.pop() if len(numbers) == 1 and all(map(str.isdecimal, numbers)) and not hedged else None
