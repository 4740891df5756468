"""Pieces of HTML: tables, lists and numbers. Whatever comes from the data passes `escape` or `embedded_json`."""

import html
import json

TEXT = "text"  # the class of a column that holds no numbers
MOST_LINES = 200  # of a list of findings


def escape(value) -> str:
    """A value as the text of an element or of a quoted attribute."""
    return html.escape(str(value))


def type_name(kind: str) -> str:
    """A question type, in which a line may be broken after each underscore."""
    return escape(kind).replace("_", "_<wbr>")


def embedded_json(value) -> str:
    """JSON that may stand in a script element: nothing in it can end that element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def table(columns: list[tuple], rows: list[list[str]], totals: list[list[str]] = (), groups: list | None = None) -> str:
    """A table in a box of its own, which scrolls where it is too wide.

    Cells are HTML, or a complete <td>; the first of a row names it. columns: (heading, class); groups: (heading, how
    many columns it spans), a line above the headings; totals: rows that are set off below the others.
    """
    head = ""
    if groups:
        spans = (f'<th colspan="{n}" scope="colgroup" class="group">{text}</th>' for text, n in groups if n)
        head = f"<tr>{''.join(spans)}</tr>"
    head += "<tr>" + "".join(f'<th scope="col"{class_of(kind)}>{text}</th>' for text, kind in columns) + "</tr>"

    def lines(rows) -> str:
        found = []
        for first, *others in rows:
            cells = (
                cell if cell.startswith("<td") else f"<td{class_of(kind)}>{cell}</td>"
                for cell, (_, kind) in zip(others, columns[1:], strict=True)
            )
            found.append(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>')
        return "".join(found)

    foot = f'<tbody class="totals">{lines(totals)}</tbody>' if totals else ""
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{lines(rows)}</tbody>{foot}</table></div>'


def class_of(name: str) -> str:
    return f' class="{name}"' if name else ""


def figure(svg: str | None, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{caption}</figcaption></figure>' if svg else ""


def bullets(lines: list[str], total: int = 0) -> str:
    """The lines as a list, and how many there are beside them: `total` in all, where the lines are already cut."""
    shown = [f"<li>{escape(line)}</li>" for line in lines[:MOST_LINES]]
    return f"<ul>{''.join(shown)}</ul>{more(max(total, len(lines)) - len(shown), 'lines')}"


def more(n: int, what: str) -> str:
    return f'<p class="quiet">… and {n:,} more {what}.</p>' if n > 0 else ""


# ------------------------------------------------------------------------------------------------------------
# Numbers; None, what is not known, is a dash or nothing
# ------------------------------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def percent_range(interval: list | None) -> str:
    return "" if interval is None else f"{percent(interval[0])} – {percent(interval[1])}"


def signed_range(interval: list | None) -> str:
    return "" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"
