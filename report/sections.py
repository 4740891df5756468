"""The page's other sections: blind runs, comparisons, answers by label, supervised tokens, audit, leakage, settings."""

import json
import shlex

from report.markup import (
    MOST_LINES,
    TEXT,
    bullets,
    count,
    escape,
    more,
    percent,
    percent_range,
    signed,
    signed_range,
    table,
    type_name,
)

MOST_LABELS = 40  # of a table without confusions
NO_INTERVAL = "one group: not shown"  # nothing is known of another group


def blind(runs: list[dict]) -> str:
    """What each run's model answered without its images, and how much these add."""
    columns = [("run", TEXT), ("images", TEXT), ("n", ""), ("exact", ""), ("95 %", "range")]
    columns += [("its own images add", "first"), ("95 %", "range")]
    names = {"blank": "blank", "shuffled": "those of another group"}
    rows = []
    for run in runs:
        if run["blind"]:
            own = [escape(run["name"]), "its own", count(run["n"]), f"<b>{percent(run['micro']['exact'])}</b>"]
            rows.append([*own, percent_range(run["micro"]["interval"]), "", ""])
        for how, entry in run["blind"].items():
            interval = entry["difference_interval"]
            lost = entry["difference"] <= 0 or (interval and interval[0] <= 0)
            mark = '<span class="badge bad">no better than blind</span>' if lost else ""
            cells = ["", escape(names.get(how, how)), count(entry.get("n")), percent(entry["exact"])]
            cells += [percent_range(entry["interval"]), signed(entry["difference"])]
            rows.append([*cells, f"{signed_range(interval)} {mark}"])
    if not rows:
        return ""
    return "<p>The same model, asked the same questions with other images.</p>" + table(columns, rows)


def comparisons(pairs: list[dict]) -> str:
    """A table for every two runs: the difference of each question type, and whether it is shown."""
    columns = [("question type", TEXT), ("n", ""), ("points", ""), ("95 %", "range"), ("", TEXT)]
    parts = []
    for pair in pairs:
        entries = [(type_name(kind), entry) for kind, entry in pair["types"].items()]
        entries.append(("all questions", pair["micro"]))
        rows = [
            [name, count(e["n"]), signed(e["difference"]), signed_range(e["interval"]), better(pair, e["interval"])]
            for name, e in entries
        ]
        parts.append(f"<h3>{escape(pair['a'])} minus {escape(pair['b'])}</h3>")
        parts.append(f'<p class="quiet">Paired over the {pair["n"]:,} questions that both answer.</p>')
        parts.append(table(columns, rows[:-1], rows[-1:]))
    chance = "<p>Of 20 such lines one is expected to exclude zero by chance alone.</p>"
    return chance + "".join(parts) if parts else ""


def better(pair: dict, interval: list | None) -> str:
    """Which of the two runs is higher, in words; only where the interval of their difference excludes zero."""
    if interval is None:
        return NO_INTERVAL
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return f"{escape(pair['a'] if interval[0] > 0 else pair['b'])} is higher here"


def seeds(groups: list[dict]) -> str:
    """Mean and spread of runs that differ in their seed alone."""
    parts = []
    columns = [("question type", TEXT), ("mean", ""), ("standard deviation", ""), ("least", ""), ("most", "")]
    for group in groups:
        rows = [
            [type_name(kind), *(percent(entry[field]) for field in ("mean", "sd", "least", "most"))]
            for kind, entry in [*group["types"].items(), ("all questions", group["micro"])]
        ]
        names = f"{', '.join(map(escape, group['runs']))}; seeds {', '.join(map(escape, group['seeds']))}"
        parts += [f"<h3>Over {len(group['runs'])} seeds</h3>", f'<p class="quiet">{names}</p>']
        parts.append(table(columns, rows[:-1], rows[-1:]))
    return "".join(parts)


def confusions(runs: list[dict]) -> str:
    """A table a type, folded: a row each true label, how often each label was answered, and the label's figures."""
    parts = []
    for run in runs:
        found = [(kind, entry) for kind, entry in run["types"].items() if entry.get("per_label")]
        parts += [f"<h3>{escape(run['name'])}</h3>"] if found and len(runs) > 1 else []
        for kind, entry in found:
            text = f"{entry['n']:,} questions, {percent(entry['exact'])} % exact match"
            summary = f'<summary><b>{type_name(kind)}</b> <span class="quiet">{text}</span></summary>'
            parts.append(f"<details>{summary}{confusion(entry)}</details>")
    note = (
        "<p>Rows are true answers. Cells are shaded by their share of the row, right ones blue, wrong ones orange.</p>"
    )
    return note + "".join(parts) if parts else ""


def confusion(entry: dict) -> str:
    """Of one type; who is taken for whom only where there are few labels."""
    labels, per_label = list(entry["labels"]), entry["per_label"]
    counts = entry.get("confusion")
    columns = [("true answer", TEXT), ("n", "")]
    if counts:
        columns += [*((escape(label), "label") for label in labels), ("<i>(none of these)</i>", "label")]
    columns += [("precision", "first"), ("recall", ""), ("F1", "")]
    groups = [("", 2), ("answered", len(labels) + 1), ("", 3)] if counts else None
    most = len(labels) if counts else MOST_LABELS
    rows = []
    for i, label in enumerate(labels[:most]):
        figures = per_label.get(label, {})
        cells = [escape(label), count(figures.get("n", 0))]
        if counts:
            total = max(1, sum(counts[i]))
            cells += [shaded(n, n / total, right=i == j) for j, n in enumerate(counts[i])]
        rows.append(cells + [percent(figures.get(field)) for field in ("precision", "recall", "f1")])
    return table(columns, rows, groups=groups) + more(len(labels) - most, "answers")


def shaded(n: int, share: float, right: bool) -> str:
    """A cell as dark as its share of the line."""
    kind = "right" if right else "wrong"
    return f'<td class="{kind}" style="--share:{share:.2f}">{n:,}</td>' if n else '<td class="quiet">0</td>'


def supervised(examples: list[dict]) -> str:
    """Each run's first example, token by token: what is media, what is only read, and what is supervised."""
    kinds = {"media": "media", "masked": "read, not supervised", "supervised": "supervised"}
    parts = []
    for example in examples:
        tokens = []
        for text, kind, n in example["tokens"]:
            kind = kind if kind in kinds else "masked"
            shown = escape(text if kind == "media" else readable(text)) + (f" × {n:,}" if n > 1 else "")
            tokens.append(f'<span class="token {kind}">{shown}</span>')
        parts += [f"<h3>{escape(example['run'])}</h3>"] if len(examples) > 1 else []
        parts.append(f'<p class="quiet">Example {escape(example["id"])}</p><div class="tokens">{"".join(tokens)}</div>')
    legend = "".join(f'<span class="token {kind}">{text}</span> ' for kind, text in kinds.items())
    return f"<p>Boxes are tokens; × says how many: {legend}</p>" + "".join(parts) if parts else ""


def readable(token: str) -> str:
    """A token with its tokenizer's marks for a space and the end of a line as signs that readers know."""
    for mark in ("▁", "Ġ"):
        token = token.replace(mark, "·")
    for mark in ("Ċ", "<0x0A>"):
        token = token.replace(mark, "\n")
    return token.replace("\n", "↵\n")


def audit(found: dict | None) -> str:
    """Whether the scorer takes a wrong answer for right, what it was asked, and what counts as the same answer."""
    if not found:
        return ""
    listed = found["failures"]
    failed = max(found.get("failed") or 0, len(listed))  # the lists are cut, the totals are not
    declared = max(found.get("declared") or 0, len(found["same"]))
    badge = '<span class="badge bad">failed</span>' if failed else '<span class="badge good">passed</span>'
    text = f"{found['answers']:,} different answers, {found['pairs']:,} pairs of them scored against each other. "
    text += f"{declared:,} are right for each other: the same after normalising, or declared to be."
    why = "The scorer is asked what must be wrong: one that calls wrong answers right makes every figure here too high."
    parts = [of_run(found), f"<p>{why}</p><p>{badge} {text}</p>"]
    if failed:
        parts.append(f"<p>{failed:,} wrong answers were called right or left out:</p>{bullets(listed, failed)}")
    if found["probes"]:
        parts.append("<p>Each of these was given as the answer to every example; none may count as right.</p>")
        rows = [[escape(name), count(n)] for name, n in found["probes"].items()]
        parts.append(table([("probe", TEXT), ("examples tested", "")], rows))
    if found["same"]:
        rows = [[escape(a), escape(b)] for a, b in found["same"][:MOST_LINES]]
        pairs = table([("answer", TEXT), ("is right for", TEXT)], rows) + more(declared - len(rows), "pairs")
        parts.append(f"<details><summary>{declared:,} pairs that are right for each other</summary>{pairs}</details>")
    return "".join(parts)


def of_run(found: dict) -> str:
    """Which run an audit or a leakage check is of, where there are several."""
    return f'<p class="quiet">Of the run {escape(found["run"])}.</p>' if found.get("run") else ""


def leakage(found: dict | None) -> str:
    """What training and test share, and what the splits hold."""
    if not found:
        return ""
    parts = [of_run(found)]
    if found["findings"]:
        rows = [[escape(f["kind"]), escape(f["where"]), escape(f["text"])] for f in found["findings"][:MOST_LINES]]
        parts.append(table([("finding", TEXT), ("where", TEXT), ("", TEXT)], rows))
        parts.append(more(len(found["findings"]) - MOST_LINES, "findings"))
    else:
        parts.append('<p><span class="badge good">passed</span> Nothing was found.</p>')
    splits = found["splits"]
    if splits:
        kinds = list(dict.fromkeys(kind for split in splits.values() for kind in split["question_types"]))
        rows = [[type_name(kind), *(count(s["question_types"].get(kind)) for s in splits.values())] for kind in kinds]
        totals = [[what, *(count(split[what]) for split in splits.values())] for what in ("questions", "files")]
        columns = [("question type", TEXT), *((escape(name), "") for name in splits)]
        parts += ["<h3>Splits</h3>", table(columns, rows, totals), "<h3>Most frequent answers</h3>"]
        lists = []
        for name, split in splits.items():
            n = max(1, split["questions"])
            rows = [[escape(answer), count(times), percent(times / n)] for answer, times in split["answers"].items()]
            lists.append(f"<div>{table([(escape(name), TEXT), ('n', ''), ('%', '')], rows)}</div>")
        parts.append(f'<div class="beside">{"".join(lists)}</div>')
    return "".join(parts)


def settings(runs: list[dict]) -> str:
    """Settings and versions, a column each run, what differs between them marked; then the commands. All folded."""
    columns = [("", TEXT), *((escape(run["name"]) if len(runs) > 1 else "value", TEXT) for run in runs)]
    commits = [{"git commit": run["git_commit"]} if run["git_commit"] else {} for run in runs]
    tables = {
        "Settings": [run["settings"] for run in runs],
        "Versions": [run["versions"] | commit for run, commit in zip(runs, commits, strict=True)],
    }
    parts = []
    for title, of in tables.items():
        rows = []
        for name in dict.fromkeys(name for values in of for name in values):
            values = [setting(values[name]) if name in values else "–" for values in of]
            differs = ' <span class="badge">differs</span>' if len(set(values)) > 1 else ""
            rows.append([escape(name) + differs, *(f"<code>{value}</code>" for value in values)])
        if rows:
            parts.append(f"<details><summary>{title}</summary>{table(columns, rows)}</details>")
    started = [[*(["python", run["script"]] if run.get("script") else []), *run["argv"]] for run in runs]
    commands = "".join(f"<pre>{escape(shlex.join(map(str, words)))}</pre>" for words in started if words)
    if commands:
        parts.append(f"<details><summary>Commands</summary>{commands}</details>")
    return "".join(parts)


def setting(value) -> str:
    """A text as it is, anything else as JSON."""
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
