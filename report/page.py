"""The report's page: one HTML file that needs no other and reaches for nothing, put together from its sections.

page.html, page.css and page.js beside this module are its frame, its style, and what filters the predictions.
"""

import base64
import hashlib
from pathlib import Path
from string import Template

from report import accuracy, drawing, gallery, sections
from report.markup import escape, figure

CALIBRATION = (
    "All is of the most probable candidate, which need not be the answer given. Bars: the share of right ones among "
    "those of about this probability; dots: their mean probability. On the dashed line a model is right as often as it "
    "says. Below: how many answers. ECE is the mean distance from the line, each answer counting the same."
)
MORE_CALIBRATION = (
    f" Only {drawing.MOST_PANELS} diagrams are drawn, of all questions and of the types with most answers; the table "
    "of accuracy has the ECE of the others."
)


def page(result: dict, records: list, media: list, examples: list, figures: dict, faults: list = ()) -> str:
    """The page as text, from `result`, what write.write puts into results.json.

    records and media are those of gallery.entries, with the faults that it found; examples are the first example of
    each run, token by token; figures are those of drawing.draw_figures. Whatever comes from the data is escaped here,
    and in the browser set as text, never as HTML.
    """
    runs = result["runs"]
    drawn = {name: drawing.figure_svg(one) for name, one in figures.items()}
    calibration = CALIBRATION
    calibration += MORE_CALIBRATION if len(drawing.calibration_panels(runs)) > drawing.MOST_PANELS else ""
    found = [
        ("accuracy", "Accuracy", accuracy.section(runs) + accuracy.bars(drawn)),
        ("blind", "Without the images", sections.blind(runs)),
        ("comparisons", "Comparisons", sections.comparisons(result["comparisons"]) + sections.seeds(result["seeds"])),
        ("answers", "Answers given", sections.confusions(runs)),
        ("calibration", "Calibration", figure(drawn.get("calibration"), calibration)),
        ("curves", "Training", figure(drawn.get("curves"), f"At most {drawing.MOST_POINTS:,} points a curve.")),
        ("gallery", "Predictions", gallery.section(runs, records, media, faults)),
        ("supervised", "Supervised tokens", sections.supervised(examples)),
        ("audit", "Scorer audit", sections.audit(result["audit"])),
        ("leakage", "Leakage check", sections.leakage(result["leakage"])),
        ("settings", "Settings", sections.settings(runs)),
    ]
    found = [(name, title, content) for name, title, content in found if content]
    frame, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    script = f"\n{script}"  # all between the tags counts for its digest
    text = Template(frame).substitute(
        title=escape(result["title"]),
        links="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in found),
        body="".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in found),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script runs
    )
    return text.encode("utf-8", "replace").decode()  # half a character, which JSON may hold, is none that UTF-8 has
