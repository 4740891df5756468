"""When is an answer right? Complete answers only are compared; a missing answer is wrong and stays in the denominator.

An answer is never searched for in a text: "no" stands inside "normal", "male" inside "female". Only where a type is of
numbers, the one that a text holds is read (`number_said`). `normalise` says what makes no difference, `score_answer`
compares a prediction with one true answer, `score` with all forms of it. Every match in this project is decided here.
"""

import functools
import re
import unicodedata

LONGEST = 2_000  # characters; a longer text, such as a prediction that never ended, is compared as it is written
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = [*UNITS, *(f"{ten} {unit}".strip() for ten in TENS for unit in ["", *UNITS[1:10]]), "one hundred"]  # 0 to 100
NUMBER_WORDS = "|".join(sorted(NUMBERS, key=len, reverse=True)).replace(" ", "[ -]")  # "sixty-one" before "sixty"
OTHERWISE = "minus|negative|no|not|than|under|over|above|below|at (?:least|most)|up to|plus"  # with these it is another
OTHERWISE += r"|(?:and|or) (?:up|more|less|older)|point \d+|half|thirds?|quarters?|dozen|hundred|thousand|million"
SAME_SIGN = str.maketrans({**dict.fromkeys("‐‑‒–—―−", "-"), **dict.fromkeys("'‘’"), "≥": ">=", "≤": "<="})

# ---- what makes no difference ------------------------------------------------------------------------------


@functools.lru_cache(2**16, typed=True)  # the same few answers are compared again and again
def normalise(text: str | int | float | None) -> str:
    """`text` (None is "") in the form in which answers are compared. "The Z-Line." → "z line".

    Lower case, NFKC, no punctuation, no "the", no "a" or "an" at the beginning, number words as digits, spaces folded.
    What keeps numbers apart stays: "5-10mm", ">20mm", "2.5". "11 – 20 mm" is "11-20mm": its spaces say nothing.
    """
    text = unicodedata.normalize("NFKC", "" if text is None else str(text)).lower().translate(SAME_SIGN)
    text = re.sub(r"(?<!\S)the (?=\S)", "", " ".join(text.split()))
    text = re.sub(r"^(?:an? )+(?=\S)", "", text)  # no other "a": "hepatitis A virus", "LA grade A" and "(a)" are names
    text = re.sub(rf"\b(?:{NUMBER_WORDS})\b", lambda word: str(NUMBERS.index(word[0].replace("-", " "))), text)
    text = re.sub(r"(?<=[\dm]) ?- ?(?=\d)", "-", text)
    text = re.sub(r"(?<=[^\W\d_])(?<![mc]m)[-./](?=\d)", " ", text)  # "COVID-19" is "covid 19", not so "5mm-1cm"
    text = "".join(char if is_kept(char, text[i + 1 : i + 2]) else " " for i, char in enumerate(text))
    return re.sub(r"(?<=[<>=]) (?=\d)|(?<=\d) (?=[mc]m\b|%)", "", " ".join(text.split()))


def is_kept(char: str, following: str) -> bool:
    """Does `char` carry meaning in an answer? Letters, digits and spaces do, most punctuation does not."""
    if char == "%" or (char in "-./" and following.isdigit()):  # 5-10, 2.5, 1/2
        return True
    category = unicodedata.category(char)
    return category == "Sm" or category[0] not in "PSC"  # Sm, mathematical: "<5", "≠ 5" and "~5" are not "5"


def members(text) -> set[str]:
    """The answers that ";" separates, normalised: "Red; pink;red" → {"red", "pink"}."""
    text = str("" if text is None else text)
    return {text} if len(text) > LONGEST else {normalise(part) for part in text.split(";")} - {""}


def answer_label(answer) -> str:
    """An answer (None is "") in the form in which it is counted: normalised, the members of a set in order."""
    return "; ".join(sorted(members(answer)))


def says_nothing(answer) -> bool:
    """Is it "nan", or without letters and digits? Such an answer can be neither supervised nor scored."""
    found = members(answer)
    return found == {"nan"} or not re.search(r"\w", "".join(found))


# ---- right or wrong ----------------------------------------------------------------------------------------


def score_answer(prediction, answer, type: str, candidates=None) -> dict[str, bool]:
    """{"exact", "relaxed"} for a `prediction` (None is wrong), the true `answer` and the question's `type`.

    exact, the strict figure: equal after `normalise`, from the first word to the last. ";" separates a set: order,
    spaces and duplicates do not matter, every member is needed, none may be extra. For an mcq "text" is enough where
    the answer is "(a) text", see `option_text`; a label that the answer does not have is wrong.

    relaxed: exact, or
      size_numeric   a value inside the true range; two ranges within 1 mm at each end; two values within 1 mm
                     or 10 % of the true one. A missing unit means mm.
      count_numeric  the true number, alone or in a sentence that does not change it ("there are 2 polyps" for "2"),
                     and of nothing else where both say of what ("2 ulcers" is wrong for "2 polyps").
    Of a set each member needs a match of its own. For every other type, also a data set's own, relaxed = exact.

    A "number" (see `is_number`) without candidates is also exact where it is the same: "about 63 years" for "63.0".

    Raises ValueError for an answer that is None, "nan" or without letters and digits: never score such an example.
    """
    true, predicted = members(answer), members(prediction)
    if says_nothing(answer):
        raise ValueError(f"the true answer is empty ({answer!r}): correct this example or leave it out by name")
    exact = predicted == true
    if type == "mcq" and predicted and not exact:
        exact = predicted == members(option_text(answer, candidates))
    if is_number(type) and not candidates and (pair := number_pair(prediction, answer)):
        exact = pair[0] == pair[1]
    relaxed = exact
    if type == "size_numeric":
        relaxed = exact or pair_up([*map(size_mm, predicted)], [*map(size_mm, true)], same_size)
    if type == "count_numeric":
        relaxed = exact or pair_up([*map(count_said, predicted)], [*map(count_said, true)], same_count)
    return {"exact": exact, "relaxed": relaxed}


def option_text(answer, candidates=None) -> str:
    """The "left" of "(a) left", and of "A. left" where "left" is a candidate: "E. coli" is no option E."""
    text = re.sub(r"^\s*\(?[A-Ha-h]\)\s*", "", str(answer))
    behind_point = re.sub(r"^\s*[A-Ha-h]\.\s+", "", text)
    return behind_point if normalise(behind_point) in map(normalise, candidates or []) else text


def score(prediction: str | None, example, synonyms=()) -> dict[str, bool]:
    """{"exact", "relaxed"} for what was answered to an example: right is its answer in any of its forms.

    `synonyms` are sets of texts: in a relaxed match a member of one counts as any other of it. Raises ValueError.
    """
    scores = [score_answer(prediction, form, example.question_type, example.candidates) for form in forms(example)]
    prediction, right = answer_label(prediction), {answer_label(form) for form in forms(example)}
    lines = [{answer_label(word) for word in line} for line in synonyms]
    same = any(prediction in line and line & right for line in lines)
    return {"exact": any(s["exact"] for s in scores), "relaxed": same or any(s["relaxed"] for s in scores)}


def forms(example) -> list[str]:
    """All right answers of an example: its answer first, then the same in other words."""
    return [example.answer, *example.also_right]


def true_candidate(record: dict) -> str | None:
    """Of a record's `candidates` the first that is right for its answer, or another form of it; None where none is."""
    right, known = [record["answer"], *record.get("also_right", [])], record["candidates"]
    type = record["question_type"]
    return next((c for c in known if any(score_answer(c, form, type, known)["exact"] for form in right)), None)


def answerable(example) -> bool:
    """Can an answer be right that is restricted to the example's candidates?"""
    known = {name: getattr(example, name) for name in ("answer", "also_right", "candidates", "question_type")}
    return not known["candidates"] or example.answer in example.candidates or true_candidate(known) is not None


def caption(prediction: str | None, true: str) -> dict[str, bool]:
    """exact: the same words as they are written. relaxed: as answers are compared, case and punctuation aside."""
    words = unicodedata.normalize("NFC", prediction or "").split()
    return {"exact": words == true.split(), "relaxed": score_answer(prediction, true, "caption")["exact"]}


# ---- numbers -----------------------------------------------------------------------------------------------

ONE_NUMBER = "must hold exactly one number, in digits with a point and no separators, such as 63.5 or 1204"


def is_number(type: str) -> bool:
    """Is it "number", or a data set's own, such as "age:number"?"""
    return type.rpartition(":")[2].strip().lower() == "number"


@functools.lru_cache(2**16, typed=True)
def number_said(text) -> tuple[float, str] | None:
    """(63.5, "year") of "About 63.5 years.": the only number of a text and the word behind it, if any.

    None where it is none or several, a range or a bound ("60-65", "<63", "over 63"), or may be read as another: "63,5",
    "1,204", "1'204", "10³", ".5", "- 63". The 1 of "T1" is none.
    """
    found, signed = members(text), unicodedata.normalize("NFKC", str(text)).translate(SAME_SIGN)
    words = found.pop() if len(found) == 1 else ""
    numbers = [word for word in words.split() if re.search(r"\d", word) and not (word.isalnum() and word[0].isalpha())]
    number = r"(?<!\S)[~≈=+]?(-?\d{1,15}(?:\.\d+)?) ?([^\W\d_]*m[23]|[^\W\d_]+|%)?(?!\S)"
    number = re.search(number, words) if len(numbers) == 1 and len(words) <= LONGEST else None
    doubtful = re.search(r"\d['‘’¹²³⁰⁴-⁹]", str(text)) or re.search(rf"[<>≠±]|\d ?\+|\b(?:{OTHERWISE})\b", words)
    if not number or doubtful or number[1].startswith("-") != bool(re.search(r"-\s*[.\d]", signed)):  # a lost sign
        return None
    return float(number[1]), re.sub(r"(?<=\w\w)s$", "", number[2] or "")


def number_pair(prediction, answer) -> tuple[float, float] | None:
    """The predicted number and the true one; None also where the words behind them are two: months, years."""
    said, true = number_said(prediction), number_said(answer)
    same = said and true and (said[1] == true[1] or "" in (said[1], true[1]))
    return (said[0], true[0]) if same else None


def size_mm(text: str) -> tuple[float, float, bool] | None:
    """(low, high, ends excluded?) in mm of a normalised size, or None: "<5mm" → (0, 5, True)."""
    value = r"(\d+(?:\.\d+)?|\.\d+) ?(mm|cm|millimet\w+|centimet\w+)?"
    size = re.fullmatch(rf"([<>]=?)?{value}(?: ?(?:-|to) ?{value})?", text)
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


# A count may be said with these words. Any other may change it or mean something else: "below 2", "2 dozen", "type 2".
BEFORE_A_COUNT = "there|is|are|i|see|exactly|only|a|total|of"
COUNTED = "polyp|lesion|finding|ulcer|instrument"
AFTER_A_COUNT = "is|are|seen|visible|present|in|this|image|frame|video"


def count_said(text: str) -> tuple[str, str | None] | None:
    """("2", "polyp") of a normalised "there are 2 polyps", ("2", None) of "2"; None where it says anything else."""
    found = re.fullmatch(rf"(?:(?:{BEFORE_A_COUNT}) )*(\d+)(?: ({COUNTED})s?)?(?: (?:{AFTER_A_COUNT}))*", text)
    return found.groups() if found else None


def same_count(predicted: tuple, true: tuple) -> bool:
    """The relaxed rule of `score_answer`, for two of `count_said`."""
    (number, thing), (true_number, true_thing) = predicted, true
    return number == true_number and (None in (thing, true_thing) or thing == true_thing)


def pair_up(predicted: list, true: list, same) -> bool:
    """Has each predicted value a true one of its own that is the `same`? Not where one is None, or more than 50 are."""
    if not len(predicted) == len(true) <= 50 or None in predicted + true:
        return False
    owner = {}  # place of a true value -> place of the predicted one that has it

    def find(i: int, tried: set[int]) -> bool:  # Kuhn's algorithm: trying every order takes seconds for ten values
        for j in range(len(true)):
            if j not in tried and same(predicted[i], true[j]):
                tried.add(j)
                if j not in owner or find(owner[j], tried):  # free, or its owner finds another
                    owner[j] = i
                    return True
        return False

    return all(find(i, set()) for i in range(len(predicted)))
