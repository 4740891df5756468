"""Question types and allowed answers, inferred from a question's own words and from what training answers."""

import functools
import json
import re
import unicodedata
from collections import Counter, defaultdict

from inputs.task import MARK, Example, as_text, named
from report.scoring import ONE_NUMBER, is_number, normalise, number_said, says_nothing

ARTICLE = r"(?:an?|the)"
OPTION_LABEL = r"(?<!\w)\(?([A-Ha-h])(?:\)|\.(?=\s))"  # "(a)", "a)", "A. "
WH_WORD = r"\b(?:what|which|who|whose|where|why|how)\b"
AUXILIARY = (
    r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must)"
    r"(?:n?['’]t)?\b"
)
# "Is …?" or "When motion occurs, is …?"; group 1 starts at the auxiliary. No wh-word may stand before it:
# "In which quadrant, if present, is the polyp?" is no yes/no question.
YES_NO = rf"^(?:(?:(?!{WH_WORD}).)*,\s*)??({AUXILIARY}.*)"

TYPE_PATTERNS = [  # the first that matches decides
    ("color", r"\b(?:what|which)(?: \w+){0,3} colou?rs?\b"),
    ("size_numeric", r"\bwhat(?: \w+){0,3} size\b|\bwhich size\b|\bhow (?:big|large|small|wide)\b"),
    ("count_numeric", r"\bhow many\b"),
    ("yes_no", rf"{YES_NO}|\byes (?:or|/) no\b"),  # before the next: "Is the number of polyps above 2?"
    ("size_numeric", r"\bdiameter\b|\bmillimet(?:er|re)s?\b"),
    ("count_numeric", r"\bnumber of\b"),
]
TYPES = {"open_ended", "mcq", "number", *(name for name, _ in TYPE_PATTERNS)}

# ---- From a question's words ----


@functools.lru_cache(2**12)  # the same questions are asked about many images
def question_type(question: str) -> str:
    """yes_no, color, size_numeric, count_numeric, mcq or open_ended, inferred from the text of `question` alone.

    Raises ValueError for an empty question.
    """
    if not question or not question.strip():
        raise ValueError("empty question: its type cannot be inferred")
    if re.search(r"\b(?:check|select|choose|mark) all\b", question, re.I):
        return "open_ended"  # Kvasir's "Are there any …? Check all that are present." is answered by a list
    sentence = sentence_asked(question)
    if labelled_options(question) or asks_which(sentence):
        return "mcq"
    return next((kind for kind, text in TYPE_PATTERNS if re.search(text, sentence, re.I)), "open_ended")


@functools.lru_cache(2**12)
def answer_candidates(question: str, type: str) -> list[str] | None:
    """All allowed answers to a `question` of this `type`: ["yes", "no"], an mcq's options in order, or None.

    An mcq has None, too, where its options cannot be inferred with certainty. Raises nothing.
    """
    if type == "yes_no":
        return ["yes", "no"]
    if type == "mcq":
        return labelled_options(question) or listed_options(sentence_asked(question))
    return None


def sentence_asked(question):
    """The last sentence that ends in "?", else all: "What color is it? If more than one separate with ;"."""
    sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(question.replace(MARK, " ").split()))
    asked = [sentence for sentence in sentences if sentence.endswith("?")]
    sentence = asked[-1] if asked else " ".join(sentences)
    return re.sub(rf"^[^:]*:\s*(?={AUXILIARY}|{WH_WORD})", "", sentence, flags=re.I)  # "Question: Is …?"


def labelled_options(question):
    """["x", "y"] of "… (a) x (b) y", or None. Labels must run a, b, c…: the "E." of "E. coli" is none."""
    question = question.replace(MARK, " ")  # an option that is an image is none to be written
    labels = list(re.finditer(OPTION_LABEL, question))
    letters = "".join(label[1].lower() for label in labels)
    if len(labels) < 2 or not "abcdefgh".startswith(letters):
        return None
    ends = [label.start() for label in labels[1:]] + [len(question)]
    texts = [question[label.end() : end].strip() for label, end in zip(labels, ends, strict=True)]
    texts[-1] = texts[-1].split("\n")[0]  # an instruction on the next line is no part of the option
    options = [re.sub(r"[\s;,.?]*(?:\bor)?\s*$", "", text) for text in texts]
    return options if all(options) else None


def asks_which(sentence):
    """Does it close with a choice, "… pink, red, or white?"; "Is there a polyp or an ulcer?" asks whether."""
    whether = r"\b(?:there|any|yes or no|or (?:not|no|more|less|larger|smaller))\b"
    if not re.search(r"\bor\b[^,]*\?$", sentence, re.I) or re.search(whether, sentence, re.I):
        return False
    opening = re.match(YES_NO, sentence, re.I)
    clause = opening[1] if opening else sentence
    # "Does it show a polyp or an ulcer?" asks whether, so other verbs than "be" need a colon or a comma.
    return bool(re.match(r"(?:is|are|was|were)\b", clause, re.I) or re.search(r"[:,].*\bor\b", clause, re.I))


def listed_options(sentence):
    """The options of a sentence that asks which, or None where prose does not tell where they start and end.

    Free text costs less than a wrong candidate. So without a colon every option must be a single word.
    """
    if not asks_which(sentence):
        return None
    opening = re.match(YES_NO, sentence, re.I)
    clause = sentence.rpartition(":")[2] if ":" in sentence else opening[1] if opening else sentence
    parts = re.split(r"\s*,\s*(?:or\s+)?|\s+or\s+", clause.strip("? "))
    parts[-1] = re.sub(r"\s(?:in|on|at|to|of|within|during|over|here)\b.*", "", parts[-1])
    has_article = [bool(re.search(rf"\b{ARTICLE}\s\S+$", part, re.I)) for part in parts]
    if ":" not in sentence and opening:
        parts[0] = parts[0].split()[-1]  # "Is the polyp pink" → "pink"
        if has_article[-1] and not has_article[0]:
            return None  # "Is it a flat polyp or an ulcer?": the first option is more than its last word
    elif ":" not in sentence and re.match(WH_WORD, sentence, re.I):
        parts = parts[1:]  # "What is it, a polyp or an ulcer?"
    options = [re.sub(rf"^{ARTICLE}\s", "", part, flags=re.I) for part in parts]
    allowed = r".+" if ":" in sentence else r"[\w-]+"
    certain = len(options) > 1 and all(re.fullmatch(allowed, option) for option in options)
    return options if certain else None


# ---- Of an entry, and of all examples ----


def fields(entry: dict, unasked: str | None = None) -> dict:
    """question, answer, question_type and candidates of an entry, the last two `inferred` where it does not say.

    With `unasked` the question may be empty: that is then its type, unless the entry names one. Raises ValueError
    where question or answer is empty or no text, or a type or candidates are given that are none. An answer that is
    none of the candidates is no fault (see scoring.answerable): left out, such examples would raise the accuracy.
    """
    question, answer, kind = (named(entry, key, "").strip() for key in ("question", "answer", "question_type"))
    if not question.replace(MARK, "").strip() and (unasked is None or entry.get("question")):
        raise ValueError("the question is empty")
    if says_nothing(answer):
        raise ValueError(f"the answer is empty ({entry.get('answer')!r}); leave the example out (--skip-bad)")
    kind = kind or (question_type(question) if question else unasked)
    usual = re.sub(r"\W+", "_", kind.lower())  # "Yes/No" would be a type of its own, without candidates
    if kind != usual and usual in TYPES:
        raise ValueError(f"question_type {kind!r}: spell it {usual!r}")
    given = entry.get("answer_candidates") or []
    texts = [as_text(text, "each of answer_candidates").strip() for text in given] if isinstance(given, list) else [""]
    if not all(texts):
        raise ValueError(f"answer_candidates must be a list of texts, none empty: {given!r}")
    if is_number(kind) and not texts and number_said(answer) is None:
        raise ValueError(f"the answer {answer!r} of the type {kind!r} {ONE_NUMBER}; fix it, or name another type")
    found = {"question": question, "answer": answer, "question_type": kind, "inferred": not texts}
    return found | {"candidates": texts or answer_candidates(question, kind)}


def composed(entry: dict) -> dict:
    """The entry with accents composed (NFC), so that a word has one spelling. Not for the names of files.

    Qwen2's tokenizer composes them itself: what is supervised must equal what is asked for.
    """
    text = json.dumps(entry, ensure_ascii=False)
    return entry if text.isascii() else json.loads(unicodedata.normalize("NFC", text))


def allow_training_answers(examples: list[Example]) -> None:
    """Complete inferred candidates from the training examples, in place.

    A color may be any that training answers. A yes_no question or an mcq may also have any training answer to the same
    words: to "Have all polyps been removed?" perhaps "not relevant". Answers take the spelling of training ("Yes"), and
    labelled options the form that it mostly uses, such as letters: this is what the model was trained on.
    """
    short = functools.cache(normalise)  # the same few answers over and over
    training = [example for example in examples if example.split == "train"]
    colors = dict.fromkeys(example.answer for example in training if example.question_type == "color")
    answers, spellings = defaultdict(dict), defaultdict(Counter)
    for example in training:
        answers[example.question.lower()][example.answer] = None
        spellings[example.question_type, short(example.answer)][example.answer] += 1
    usual = Counter()
    for example in training:
        forms = option_forms(example).items()
        usual.update(form for form, texts in forms if short(example.answer) in map(short, texts))
    form = usual.most_common(1)[0][0] if usual else "text"
    for example in examples:
        if example.inferred and example.question_type in ("yes_no", "color", "mcq"):
            known = colors if example.question_type == "color" else answers[example.question.lower()]
            allowed = {}  # normalised -> as training spells it most often, or as it is
            for answer in [*(option_forms(example)[form] or example.candidates or []), *known]:
                spelled = spellings.get((example.question_type, short(answer)), Counter([answer]))
                allowed.setdefault(short(answer), spelled.most_common(1)[0][0])
            if example.candidates or example.question_type == "color":  # an mcq of unknown options stays free
                example.candidates = list(allowed.values()) or None
    if not training:
        print("no training examples: color questions are answered freely, others by yes, no or their options alone")


def option_forms(example: Example) -> dict[str, list[str]]:
    """The labelled options of an mcq in each form: {"text": ["red", …], "letter": ["A", …], "both": ["A) red", …]}."""
    options = (labelled_options(example.question) if example.question_type == "mcq" else None) or []
    letters = list("ABCDEFGH"[: len(options)])
    both = [f"{letter}) {text}" for letter, text in zip(letters, options, strict=True)]
    return {"text": options, "letter": letters, "both": both}
