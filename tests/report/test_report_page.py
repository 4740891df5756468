"""The report's page: what a reader sees in a browser, and that data can neither run nor reach for anything there."""

import base64
import copy
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import wave
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from report import drawing, thumbnails
from report.page import entries
from report.page import page as html_of

TYPES = ("yes_no", "color", "count_numeric")
ROOT = Path(__file__).resolve().parents[2]
NO_FIGURES = "the page is tried without its figures: matplotlib is not installed"
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def figures(n=40, exact=0.8, best=0.5, **more):
    baselines = {"type": best - 0.1, "question": best - 0.05, "nearest": best}
    return {
        "n": n, "groups": n // 2, "exact": exact, "relaxed": exact, "interval": [exact - 0.05, exact + 0.05],
        "baselines": baselines, "best_baseline": "nearest", "gain": exact - best,
        "gain_interval": [exact - best - 0.06, exact - best + 0.06], **more,
    }  # fmt: skip


def typed(labels=("no", "yes"), **more):
    of = {label: {"n": 20, "precision": 0.8, "recall": 0.8, "f1": 0.8} for label in labels}
    table = [[16 if i == j else 4 if i == 0 else 0 for j in range(len(labels) + 1)] for i in range(len(labels))]
    bins = [
        {"low": i / 10, "high": (i + 1) / 10, "n": 4, "confidence": i / 10 + 0.05, "accuracy": 0.5} for i in range(9)
    ]
    bins.append({"low": 0.9, "high": 1.0, "n": 0, "confidence": None, "accuracy": None})
    return figures(
        labels=list(labels), confusion=table, per_label=of, precision=0.8, recall=0.8, f1=0.8, single_class=False,
        calibration={"ece": 0.031, "n": 36, "bins": bins}, auroc=0.9, **more,
    )  # fmt: skip


def a_run(name="runs/a", types=TYPES, **more):
    baselines = {"type": 0.4, "question": 0.45, "nearest": 0.5}
    short = {"exact": 0.5, "interval": [0.45, 0.55], "difference": 0.3, "difference_interval": [0.2, 0.4]}
    return {
        "name": name, "n": 120, "split": "test", "decode": "greedy", "types": {kind: typed() for kind in types},
        "micro": figures(120), "macro": {"exact": 0.8, "relaxed": 0.8, "baselines": baselines},
        "blind": {"blank": short},
        "notes": ["Rows of a patient are drawn together."], "settings": {"lr": 0.001, "tune": "lora"},
        "argv": ["train.py", "--lr", "0.001"], "own": {"bleu": 95.04}, "versions": {"torch": "2.13"},
        "git_commit": "0123abc", **more,
    }  # fmt: skip


def without_baselines(run):
    run = copy.deepcopy(run)
    for entry in (*run["types"].values(), run["micro"]):
        entry |= {"baselines": {}, "best_baseline": None, "gain": None, "gain_interval": None}
    run["macro"]["baselines"] = {}
    return run


def a_report(*runs):
    runs = list(runs) or [a_run()]
    spread = {"mean": 0.8, "sd": 0.01, "least": 0.79, "most": 0.81}
    difference = {"n": 40, "difference": 0.02, "interval": [-0.01, 0.05]}
    kinds = list(runs[0]["types"])
    pair = {"a": runs[0]["name"], "b": runs[-1]["name"], "n": 120, "types": dict.fromkeys(kinds, difference)}
    seeds = {"runs": [r["name"] for r in runs], "seeds": [0, 1], "micro": spread, "types": dict.fromkeys(kinds, spread)}
    split = {
        "questions": 120,
        "files": 60,
        "question_types": dict.fromkeys(kinds, 40),
        "answers": {"yes": 30, "no": 20},
    }
    audit = {"answers": 9, "pairs": 36, "same": [["2", "two"]], "declared": 0, "probes": {"empty": 9}, "failures": []}
    finding = {"kind": "twice", "where": "test.jsonl:3", "text": "the same question twice"}
    return {
        "title": "A report", "runs": runs,
        "comparisons": [pair | {"micro": difference}] if len(runs) > 1 else [],
        "seeds": [seeds] if len(runs) > 1 else [],
        "audit": audit,
        "leakage": {"findings": [finding], "splits": {"train": split, "test": split}},
    }  # fmt: skip


def a_gallery(n=60, runs=1):
    """Of every ten one is unanswered, one wrong, one right by the relaxed match alone, seven right; types in turn."""
    rows = []
    for run, i in itertools.product(range(runs), range(n)):
        said = [None, "green", "two mm"][i % 10] if i % 10 < 3 else "yes"
        rows.append({
            "run": run, "id": f"row_{i:05}", "type": TYPES[i % 3], "question": f"Is number {i} shown?", "answer": "yes",
            "prediction": said, "correct": i % 10 > 2, "relaxed": i % 10 > 1, "p": (i % 100) / 100, "media": [],
            "seen": run * n + i, "cell": None,
        })  # fmt: skip
    return rows


def an_example(run="runs/a"):
    tokens = [
        ["images/1.jpg", "media", 64],
        ["Is it?", "masked", 1],
        [" yes", "supervised", 1],
        ["</s>", "supervised", 1],
    ]
    return {"run": run, "id": "row_00000", "tokens": tokens}


def curves_of(*names, steps=3000):
    lines = [{"step": i, "loss": 5 / i, "grad_norm": 1.0, "lr": 1e-4} for i in range(1, steps)]
    return {name: [*lines, {"step": steps, "val_loss": 0.5}] for name in names}


# ------------------------------------------------------------------------------------------------------------
# Thumbnails
# ------------------------------------------------------------------------------------------------------------


def record(*media, correct=True):
    return {"media": list(media), "correct": correct}


def picture(seed=0, size=(160, 120)):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 40, size[0] // 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def decoded(entry):
    start, content = entry["src"].split(",")
    assert start == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def write_wav(path, seconds=0.1):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * int(16000 * seconds))


@pytest.fixture
def media_folder(tmp_path):
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.jpg")
    return tmp_path


def test_every_kind_of_media_has_its_thumbnail(media_folder):
    frames = [picture(i) for i in range(9)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(media_folder / name, save_all=True, append_images=frames[1:])
    np.save(media_folder / "clip.npy", np.stack([np.asarray(f) for f in frames]))
    np.save(media_folder / "volume.npy", np.random.default_rng(0).random((20, 24, 16), dtype=np.float32))
    np.savez(media_folder / "series.npz", np.random.default_rng(0).random((20, 24, 16, 5)))
    write_wav(media_folder / "say.wav")
    records = [
        record("0.jpg"), record("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "say.wav"), record("a.gif"),
        record("a.webp"), record("a.png"), record("clip.npy"), record("volume.npy"), record("series.npz"),
    ]  # fmt: skip
    media, of, faults = thumbnails.thumbnails(media_folder, records, 10**6)
    assert not faults
    kinds = [[media[i]["kind"] for i in shown] for shown in of]
    assert kinds == [["image"], ["strip", "sound"], ["strip"], ["strip"], ["strip"], ["strip"], ["slices"], ["slices"]]
    assert decoded(media[of[0][0]]).size == (448, 336)
    assert decoded(media[of[1][0]]).size == (4 * 224 + 6, 168), "four frames and three gaps"
    assert media[of[1][0]]["name"] == "0.jpg, 2.jpg, 3.jpg, 5.jpg"
    assert media[of[1][1]]["src"].startswith("data:audio/wav;base64,UklGR")
    assert decoded(media[of[6][0]]).height == 112


def test_a_nifti_volume_is_shown_as_radiologists_see_it_the_patients_right_on_the_left(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    voxels = np.zeros((40, 40, 40, 3), np.float32)
    voxels[2:8, 17:23, 30:38, 0] = 1  # the file's x runs to the left: this is far right, and high up
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1, 1, 1, 1])), tmp_path / "scan.nii.gz")
    media, of, faults = thumbnails.thumbnails(tmp_path, [record("scan.nii.gz")], 10**6)
    assert not faults
    shown = np.asarray(decoded(media[of[0][0]]).convert("L"))[:, 114:226]  # the slice from the front
    rows, columns = np.nonzero(shown > 128)
    assert rows.mean() < 40 and columns.mean() < 30


def test_files_that_are_missing_damaged_too_large_or_outside_are_left_out(media_folder, monkeypatch):
    outside = media_folder.parent / "secret.jpg"
    picture().save(outside)
    (media_folder / "link.jpg").symlink_to(outside)
    (media_folder / "half.jpg").write_bytes((media_folder / "0.jpg").read_bytes()[:900])
    picture(size=(800, 800)).save(media_folder / "large.png")
    np.save(media_folder / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(media_folder / "flat.npy", np.zeros((4, 4)))
    for name in ("text.png", "scan.nii.gz", "say.wav", "broken.gif", "broken.npz"):
        (media_folder / name).write_text("not what its name says")
    write_wav(media_folder / "long.wav", seconds=30)
    monkeypatch.setattr(thumbnails, "MOST_PIXELS", 800 * 799)
    bad = [
        "../secret.jpg", str(outside), "missing.jpg", "half.jpg", "large.png", "object.npy", "flat.npy",
        "text.png", "scan.nii.gz", "say.wav", "broken.gif", "broken.npz", "long.wav", "a\0b.jpg", "x" * 5000 + ".jpg",
    ]  # fmt: skip
    media, of, faults = thumbnails.thumbnails(
        media_folder, [record("1.jpg", "link.jpg"), *map(record, bad), record("2.txt")], 10**6
    )
    assert of == [[0], *([[]] * 16)] and media[0]["name"] == "1.jpg, link.jpg"  # a link may lead anywhere
    assert len(faults) == len(bad) + 1 and "1 file of no known kind" in faults
    assert "missing.jpg is missing" in faults, "the advice for training is of no use here"
    for name in bad:
        assert any(name in fault for fault in faults), name
    assert not any(f"{media_folder}/" in fault for fault in faults), "where the data lie is nobody else's business"


def test_without_a_data_folder_there_is_nothing_to_show(tmp_path, monkeypatch):
    assert thumbnails.thumbnails(None, [record()], 10**6) == ([], [[]], [])
    advice = "give --media-root, the folder of the media"
    fault = f"no path that a run folder names is opened; {advice}"
    assert thumbnails.thumbnails(None, [record("1.jpg")], 10**6) == ([], [[]], [fault])
    monkeypatch.chdir(tmp_path)
    media, of, faults = thumbnails.thumbnails(Path("data/mine"), [record("1.jpg")] * 3, 10**6)
    assert (media, of, faults) == ([], [[]] * 3, [f"the data folder data/mine is not here; {advice}"])
    html = html_of(a_report(), a_gallery(3), [], [], {}, faults)
    assert "<p>No pictures: the data folder data/mine is not here" in html and "What is not shown" not in html


def test_of_many_faults_the_first_are_listed_the_others_counted(media_folder, monkeypatch):
    records = [record(f"gone{i}.jpg", f"video{i}.mp4", f"plain{i}") for i in range(1000)]
    media, _, faults = thumbnails.thumbnails(media_folder, [record("0.jpg"), *records], 10**6)
    assert faults[0] == "2,000 files of no known kind" and len(faults) == 1001
    assert all(re.fullmatch(r"gone\d+\.jpg is missing", fault) for fault in faults[1:])
    text = plain(html_of(a_report(), a_gallery(1), media, [], {}, faults))
    assert "2,000 files of no known kind" in text and text.count(".jpg is missing") == 199
    assert "… and 801 more lines" in text
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for i in range(29):
        (media_folder / f"{i}.nii.gz").write_text("never looked at")
    _, _, faults = thumbnails.thumbnails(media_folder, [record(f"{i}.nii.gz") for i in range(29)], 10**6)
    assert all(fault.endswith("nii.gz: NIfTI needs nibabel: pip install nibabel") for fault in faults)
    assert len(faults) == 29


def test_a_nifti_file_that_does_not_say_how_it_lies_is_not_shown(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for codes in ((0, 0), (1, 0), (0, 1)):
            image = kind(np.random.default_rng(0).random((12, 12, 12), np.float32), None)  # with eye(4): a code
            image.header.set_qform(np.eye(4), codes[0])
            image.header.set_sform(np.eye(4), codes[1])
            nibabel.save(image, tmp_path / "scan.nii.gz")
            media, _, faults = thumbnails.thumbnails(tmp_path, [record("scan.nii.gz")], 10**6)
            assert bool(media) == any(codes)
            assert faults == ([] if any(codes) else ["scan.nii.gz: no orientation: left and right are not known"])


def test_which_side_is_the_patients_right_is_said_of_volumes():
    rows = [a_gallery(1)[0] | {"media": [0]}]
    said = {}
    for name in ("a.nii.gz", "a.npy", "a.jpg"):
        kind = "image" if name == "a.jpg" else "slices"
        html = html_of(a_report(), rows, [{"kind": kind, "src": DOT, "name": name}], [], {})
        said[name] = ["the patient’s\nright on the left" in html, "only the middle slices" in html]
        assert "share it only as you may share these" in html
    assert list(said.values()) == [[True, True], [True, True], [False, False]]
    assert "share it only" not in html_of(a_report(), rows, [], [], {})


def test_when_the_budget_is_full_wrong_ones_are_shown_right_ones_evenly_and_no_file_is_opened_any_more(
    media_folder, monkeypatch
):
    for i in range(400):
        os.link(media_folder / f"{i % 6}.jpg", media_folder / f"n{i}.jpg")
    records = [record(f"n{i}.jpg", correct=i % 40 != 39) for i in range(400)]
    opened = []
    inside = thumbnails.inside
    monkeypatch.setattr(thumbnails, "inside", lambda folder, name: opened.append(name) or inside(folder, name))
    media, of, faults = thumbnails.thumbnails(media_folder, records, 500_000)
    used = sum(len(entry["src"]) for entry in media)
    assert 480_000 < used <= 500_000
    assert all(of[i] for i in range(39, 400, 40)), "wrong ones first"
    shown = [i for i in range(400) if of[i]]
    assert 20 < len(shown) < 200
    widest = max(b - a for a, b in itertools.pairwise([0, *shown, 400]))
    assert widest <= 4 * 400 / len(shown), "right ones are spread evenly"
    assert len(opened) == len(media) + 1, "one did not fit; after it nothing is opened"
    assert faults == [f"no room left: {400 - len(media)} × pictures"]


def test_the_same_media_are_made_once(media_folder):
    media, of, _ = thumbnails.thumbnails(media_folder, [record("1.jpg", "2.jpg")] * 50, 10**6)
    assert len(media) == 1 and of == [[0]] * 50


def test_neither_sound_nor_pictures_take_all_the_room(media_folder):
    for i in range(60):
        os.link(media_folder / f"{i % 6}.jpg", media_folder / f"n{i}.jpg")
        write_wav(media_folder / f"n{i}.wav", seconds=0.5)
    records = [record(f"n{i}.jpg", f"n{i}.wav", correct=False) for i in range(60)]
    pictures, _, _ = thumbnails.thumbnails(media_folder, [record(*r["media"][:1]) for r in records], 10**6)
    room = sum(len(entry["src"]) for entry in pictures)
    for budget, all_pictures in ((room, False), (2 * room, True)):
        media, _, _ = thumbnails.thumbnails(media_folder, records, budget)
        kinds = [entry["kind"] for entry in media]
        assert (kinds.count("image") == 60) == all_pictures and kinds.count("image") > 30
        assert 0 < kinds.count("sound") < 60


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def drawn(*arguments):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return drawing.draw_figures(*arguments)


def test_the_baseline_that_is_drawn_and_named_is_the_highest():
    baselines = {"type": 0.31, "question": 0.62, "nearest": 0.47}
    one = figures() | {"baselines": baselines, "best_baseline": "question"}
    runs = [a_run(name, micro=one, types=()) for name in "ab"]
    html = html_of(a_report(*runs), [], [], [], {})
    table = re.search(r"best baseline</th>.*?</table>", html, re.DOTALL)[0]
    assert table.count("<td>62.0</td>") == 2 and "31.0" not in table and "47.0" not in table
    assert html.count("<u>62.0</u>") == 2, "it is underlined in the table of each run"
    axes = drawn(a_report(*runs), {})["accuracy"].axes[0]
    ticks = [list(line.get_xdata()) for line in axes.lines if line.get_label() == "best blind baseline"]
    assert ticks == [[0.62]] * 2


def test_at_most_twelve_reliability_diagrams_are_drawn_that_of_all_questions_first():
    run = a_run() | {"types": {f"type{i}": typed() for i in range(30)}, "micro": typed()}
    found = drawn(a_report(run), {})
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in found["calibration"].axes]
    assert titles == ["all questions", *(f"type{i}" for i in range(11))]
    assert "At most 12 diagrams are drawn" in plain(html_of(a_report(run), [], [], [], found))
    several = drawn(a_report(run, run | {"name": "runs/b"}), {})["calibration"]
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in several.axes]
    assert [title for title in titles if title] == ["runs/a", "runs/b"]


def test_without_baselines_nothing_is_said_of_them():
    run = without_baselines(a_run())
    svgs = [drawing.figure_svg(drawn(a_report(of), {})["accuracy"]) for of in (run, a_run())]
    assert ["best blind baseline" in svg for svg in svgs] == [False, True]


def test_figures_are_written_for_papers_as_svg_and_png_on_white(tmp_path):
    found = drawn(
        a_report(*(a_run(name, micro=typed()) for name in ("runs/a", "runs/b"))), curves_of("runs/a", "runs/b")
    )
    assert list(found) == ["accuracy", "calibration", "curves"]
    drawing.write_figures(tmp_path / "figures", found)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in found for kind in ("svg", "png")
    )
    with Image.open(tmp_path / "figures" / "accuracy.png") as image:
        assert image.getpixel((2, 2))[:3] == (255, 255, 255) and image.info["dpi"][0] >= 150
    assert ">yes_no</text>" in (tmp_path / "figures" / "accuracy.svg").read_text(), "text stays text"


def test_the_page_shows_each_figure_as_an_image_of_the_same_bytes_each_time():
    found = drawn(a_report(), curves_of("runs/a"))
    html = html_of(a_report(), [], [], [], found)
    shown = [unquote(text) for text in re.findall(r'src="data:image/svg\+xml,([^"]*)"', html)]
    assert shown == [drawing.figure_svg(figure) for figure in drawn(a_report(), curves_of("runs/a")).values()]
    assert "<svg" not in html, "what stands in a figure is no part of the page"


def test_curves_are_thinned_and_a_loss_that_is_not_finite_leaves_a_gap():
    curves = curves_of("runs/a", steps=50_000)
    curves["runs/a"][49_990:49_999] = [{"step": 49_999, "loss": float("nan"), "lr": 1e-4, "grad_norm": float("inf")}]
    steps, values = drawing.series(curves["runs/a"], "loss")
    assert steps[0] == 1 and steps[-1] == 49_999 and np.isnan(values[-1])
    noise = np.random.default_rng(0).normal(size=(2, 49_990))
    for i in range(49_990):
        curves["runs/a"][i] |= {"loss": float(np.exp(noise[0, i])), "grad_norm": float(np.exp(noise[1, i]))}
    curves["runs/a"][31_234]["loss"] = 777.0
    svg = drawing.figure_svg(drawn(a_report(), curves)["curves"])
    assert len(svg) < 400_000
    paths = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in re.findall(r'<path d="([^"]*)"', svg)]
    points = [(float(x), float(y)) for x, y in next(path for path in paths if len(path) > 500)]  # of the loss
    left, right = min(points)[0], max(points)[0]
    x, _ = min(points, key=lambda point: point[1])
    assert (x - left) / (right - left) == pytest.approx(31_234 / 49_990, abs=0.01), "one looks for a spike of one step"


def test_curves_are_smoothed_and_mark_the_lowest_validation_loss_and_the_planned_end():
    curves = curves_of("runs/a", steps=400)
    curves["runs/a"] += [{"step": 100, "val_loss": float("nan")}, {"step": 200, "val_loss": 0.4}]
    panels = drawn(a_report(a_run(steps=900)), curves)["curves"].axes
    lines = {line.get_label(): line for line in panels[0].lines}
    star = next(line for line in panels[0].lines if line.get_marker() == "*")
    assert [list(xy) for xy in star.get_data()] == [[200], [0.4]]
    assert list(lines["planned end"].get_xdata()) == [900, 900]
    assert ["log scale" in axes.get_ylabel() for axes in panels] == [True, True, False]
    assert panels[2].get_window_extent().height < panels[0].get_window_extent().height / 3
    none = {"runs/a": [{"step": 1, "loss": 1.0}]}
    assert drawn(a_report(), none)["curves"] is not None, "neither a plan nor a validation"
    noise = np.random.default_rng(0).normal(5, 1, 1000).tolist()
    smooth = drawing.smoothed(noise)
    assert len(smooth) == 1000 and np.std(smooth) < 0.4 and abs(np.mean(smooth) - 5) < 0.1
    assert drawing.smoothed([5.0] * 70) == pytest.approx([5.0] * 70), "also at both ends"
    assert drawing.smoothed([]).tolist() == []


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is():
    odd = ("$x^2$", r"$\nonsense$", "a\x00\nb", "#000000", "<b>")
    svg = drawing.figure_svg(drawn(a_report(a_run(types=odd)), {})["accuracy"])
    for text in ("$x^2$", r"$\nonsense$", "a b", "#000000", "&lt;b&gt;"):
        assert f">{text}</text>" in svg


def test_without_matplotlib_the_page_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawing.draw_figures(a_report(), curves_of("runs/a")) == {}
    drawing.write_figures(tmp_path / "figures", {})
    html = html_of(a_report(), a_gallery(), [], [an_example()], {})
    assert "pip install matplotlib" in html and "<figure" not in html and "row_00059" in html


# ------------------------------------------------------------------------------------------------------------
# What the page says
# ------------------------------------------------------------------------------------------------------------


def plain(html):
    html = html.replace("<wbr>", "")
    return re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL))


def test_a_run_without_a_gain_over_its_best_baseline_is_marked_in_words():
    level = figures(exact=0.52, best=0.5)  # the interval of the difference includes zero
    html = html_of(a_report(a_run(micro=level)), [], [], [], {})
    assert html.count("not significantly above</span>") == 2, "beside the gain and in the row of all questions"
    assert "above</span>" not in html_of(a_report(), [], [], [], {})
    assert html_of(a_report(a_run(micro=figures(exact=0.4))), [], [], [], {}).count(">not above</span>") == 2
    alone = figures() | {"interval": None, "gain_interval": None, "groups": 1}
    assert "one group: not shown" in html_of(a_report(a_run(micro=alone)), [], [], [], {})


def test_blind_runs_that_do_as_well_and_types_with_one_answer_are_marked():
    run = a_run()
    assert "no better than blind" not in html_of(a_report(run), [], [], [], {})
    run["blind"]["blank"] = run["blind"]["blank"] | {"difference": 0.01, "difference_interval": [-0.02, 0.04]}
    run["types"]["color"]["single_class"] = True
    text = plain(html_of(a_report(run), [], [], [], {}))
    assert "no better than blind" in text and "color one answer only" in text


def test_a_run_without_baselines_has_no_columns_for_them_and_its_notes_come_first():
    known = html_of(a_report(), [], [], [], {})
    assert "<b>baselines</b>" in known and "best baseline</th>" in known and "60 groups" in known
    run = without_baselines(a_run(notes=["what can be answered blindly is not known: give --train"]))
    html = html_of(a_report(run, run | {"name": "b"}), [], [], [], {})
    assert (
        "<b>baselines</b>" not in html
        and "type baseline</th>" not in html
        and "best baseline</th>" not in html
        and "best blind baseline" not in html
    )
    order = ("exact match on test", "what can be answered blindly is not known", "question type", "How to read this")
    assert [plain(html).index(text) for text in order] == sorted(plain(html).index(text) for text in order)


def test_the_audit_gives_totals_of_lists_that_are_cut_and_whose_it_is():
    told = a_report()
    told["audit"] |= {"declared": 450, "failures": ["x"] * 200, "failed": 1234, "run": "runs/a"}
    told["leakage"]["run"] = "runs/b"
    text = plain(html_of(told, [], [], [], {}))
    assert "failed 36 pairs of 9 different answers and 1 kind of non-answers" in text
    assert "1,234 wrong ones were called right, 450 pairs" in text and "and 1,034 more lines" in text
    assert "Of the run" not in text, "there is one"
    text = plain(html_of(told | {"runs": [a_run(), a_run("runs/b")]}, [], [], [], {}))
    assert "Of the run runs/a." in text and "Of the run runs/b." in text


def test_supervised_tokens_show_counts_and_readable_marks_of_tokenizers():
    tokens = [["Ġa▁b", "supervised", 1], ["Ċ", "masked", 1], ["<0x0A>", "masked", 1], ["images/1.jpg", "masked", 64]]
    html = html_of(a_report(), [], [], [{"run": "a", "id": "1", "tokens": tokens}], {})
    shown = re.findall(r'<span class="token \w+">([^<]*)</span>', html)[3:]
    assert shown == ["·a·b", "↵\n", "↵\n", "images/1.jpg × 64"]


def test_what_else_the_page_says():
    run = a_run(script="train_x.py", types=("one_type",))
    run["blind"] = {"shuffled": run["blind"]["blank"] | {"n": 77}}
    html = html_of(a_report(run, a_run("b", script=None)), [], [], [], {})
    assert "<pre>python train_x.py train.py --lr 0.001</pre><pre>train.py --lr 0.001</pre>" in html
    assert "those of another group" in html and "<td>77</td>" in html and "(none of these)" in html
    assert "one is expected to exclude zero by chance" in html and "one_<wbr>type" in html


def test_sections_without_content_are_left_out_of_page_and_navigation():
    bare = a_run(blind={}, notes=[], settings={}, argv=[], versions={}, git_commit=None)
    for entry in bare["types"].values():
        for field in ("confusion", "per_label", "labels", "calibration", "auroc"):
            del entry[field]
    html = html_of(a_report(bare) | {"audit": None, "leakage": None}, [], [], [], {})
    assert re.findall(r'<section id="(\w+)"', html) == ["accuracy"] and html.count('<a href="#') == 1
    full = html_of(a_report(a_run("a"), a_run("b")), a_gallery(), [], [an_example()], {})
    sections = re.findall(r'<section id="(\w+)"', full)
    expected = ["accuracy", "gallery", "blind", "comparisons", "answers", "supervised", "audit", "leakage"]
    assert sections == [*expected, "settings"]


def test_a_type_without_a_prediction_on_the_page_leads_to_none():
    html = html_of(a_report(), a_gallery(2), [], [], {})  # of a type that only cut answers have, there is no option
    assert set(re.findall(r'data-type="(\w+)"', html)) == {"yes_no", "color"}


def test_what_is_said_in_settings_is_shown_as_it_is():
    html = html_of(a_report(a_run(settings={"worded": ["it's <b>", None]})), [], [], [], {})
    assert "<code>[&#34;it&#39;s &lt;b&gt;&#34;, null]</code>" in html


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac"])
def test_a_clip_is_one_card_whatever_its_questions_are_recorded_as(suffix):
    rows = [record("v/0.jpg", "v/1.jpg", f"{i}.{suffix}") | {"id": i} for i in range(3)]
    rows += [record(f"{i}.{suffix}") | {"id": i} for i in (3, 4)]  # a sound alone
    rows = [row | {"question_type": "color", "answer": "red", "prediction": "red"} for row in rows]
    shown, _, _ = entries([{"name": "a", "records": rows}])
    assert [row["seen"] for row in shown] == [0, 0, 0, 1, 2]


def test_the_page_names_what_answered_which_split_and_marks_an_early_step_and_changed_files():
    of = {"model": "models/m", "checkpoint": "runs/a/checkpoints/step-00000200", "step": 200, "steps": 1261}
    of |= {"script": "train_x.py", "script_sha256": "ab" * 32, "git_differs": True, "left_out": {"train": 3, "val": 1}}
    of |= {"trained": 1234567, "date": "2026-01-31 12:00", "data": "data/d", "settings": {"seed": 7}}
    blind = {"before training": {"n": 120, "exact": 0.125, "interval": None, "difference": 0.6}}
    text = plain(html_of(a_report(a_run(**of, split="val", blind=blind)), [], [], [], {}))
    assert "exact match on val 80.0 % 75.0 – 85.0 best blind baseline 50.0 % by nearest gain over it, in points" in text
    assert "points +30.0 +24.0 to +36.0 before training 12.5 %" in text
    assert "model models/m data data/d evaluated on val: 120 questions, 60 groups" in text
    assert "trained parameters 1,234,567 steps 200 of 1,261 before the last step checkpoint step-00000200" in text
    assert "seed 7 date 2026-01-31 12:00 script train_x.py sha256 abababababab commit 0123abc files differ" in text
    assert "left out of train 3 left out of val 1" in text
    text = plain(html_of(a_report(a_run(**of, lowest_val_loss=True)), [], [], [], {}))
    assert "200 of 1,261 lowest validation loss" in text and "before the last step" not in text
    of |= {"step": 1261, "git_differs": False, "left_out": {}}
    text = plain(html_of(a_report(a_run(**of)), [], [], [], {}))
    assert "exact match on test" in text and "left out" not in text and "no file differs" in text
    assert "before the last step" not in text and "files differ" not in text


def test_settings_that_differ_between_runs_are_marked():
    html = html_of(a_report(a_run("a"), a_run("b", settings={"lr": 0.002, "tune": "lora"})), [], [], [], {})
    rows = re.findall(r'<th scope="row">(lr|tune)(.*?)</th>', html)
    assert [(name, "differs" in mark) for name, mark in rows] == [("lr", True), ("tune", False)]


def test_a_page_can_always_be_written_even_with_half_characters_and_probabilities_that_are_no_numbers(tmp_path):
    rows = a_gallery(3)
    rows[0] |= {"question": "half \ud83d", "p": float("nan"), "prediction": "x" * 5000}
    html = html_of(a_report() | {"title": "\udc80"}, rows, [], [], {})
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    data = json.loads(re.search(r'id="gallery-data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["rows"][0][7] is None and data["rows"][0][5].endswith("… (5,000 characters)")


# ------------------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    needed = {
        "selenium (pip install selenium)": importlib.util.find_spec("selenium"),
        "chromium (apt install chromium)": browser,
        "chromedriver (apt install chromium-driver)": shutil.which("chromedriver"),
    }
    missing = [name for name, found in needed.items() if not found]
    if missing:
        pytest.skip(f"the page is not tried in a browser: no {', no '.join(missing)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def requests_of(driver):
    """The addresses the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


class Page:
    """A page in the browser; `check` wants an empty console and no request to anything but this one file."""

    def __init__(self, driver, folder, html):
        path = folder / "report.html"
        path.write_text(html, encoding="utf-8")
        driver.get("about:blank")
        requests_of(driver), driver.get_log("browser")
        self.uri = path.as_uri()
        driver.get(self.uri)
        self.driver, self.run = driver, driver.execute_script

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def texts(self, css):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)

    def choose(self, name, start):
        """The option that begins with a text, picked with the keyboard."""
        from selenium.webdriver.common.keys import Keys

        field = self.all(f"#{name}")[0]
        options = self.texts(f"#{name} option")
        steps = next(i for i, text in enumerate(options) if text.startswith(start))
        field.send_keys(Keys.HOME, *[Keys.ARROW_DOWN] * steps)
        return self.count()

    def search(self, text):
        field = self.all("#search")[0]
        field.clear()
        field.send_keys(text)
        return self.count()

    def count(self):
        return self.texts("#count")[0]

    def wait(self, until):
        """For what the browser does in a task of its own, as the `close` event of a dialog."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 30).until(lambda _: until())

    def check(self):
        assert self.driver.get_log("browser") == []
        asked = requests_of(self.driver)
        assert asked, "the log has the file itself"
        assert [url for url in asked if url != self.uri and not url.startswith("data:")] == []


def test_filters_and_search_leave_what_they_say(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(a_run("a"), a_run("b")), a_gallery(60, 2), [], [], {}))
    assert page.count() == "24 of 120", "wrong ones first"
    assert page.choose("result", "all") == "120 of 120"
    assert page.choose("run", "b") == "60 of 120"
    assert page.choose("result", "exact") == "42 of 120"
    assert page.choose("result", "relaxed match") == "6 of 120"
    assert page.choose("result", "unanswered") == "6 of 120"
    assert page.choose("result", "wrong or") == "12 of 120"
    assert page.choose("type", "color") == "4 of 120"
    assert {text.split()[1:][-1] for text in page.texts(".card .badge")} <= {"wrong", "answer"}
    for name in ("run", "type", "result"):
        page.choose(name, "all")
    assert page.search("is NUMBER 17 ") == "2 of 120"
    assert page.search("green") == "12 of 120", "predictions are searched"
    assert page.search("row_00059") == "2 of 120", "IDs are searched"
    assert page.search("nothing like it") == "0 of 120" and page.all(".card") == []
    assert page.texts(".pager span") == ["page 1 of 1"] * 2
    page.check()


def test_options_say_how_many_they_leave_and_keep_their_word(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(60), [], [], {}))
    for name in ("type", "result"):
        for option in page.texts(f"#{name} option"):
            promised = re.search(r"\((\d+)\)$", option)[1]
            page.choose("result", "all")
            assert page.choose(name, option) == f"{promised} of 60"
        page.choose(name, "all")
    page.check()


def test_paging_goes_through_all_and_stops_at_both_ends(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(60), [], [], {}))
    page.choose("result", "all")
    seen = []
    for number in (1, 2, 3, 4, 5):
        assert page.texts(".pager span") == [f"page {number} of 5"] * 2
        previous, following = page.all(".pager button")[:2]
        assert previous.is_enabled() == (number > 1) and following.is_enabled() == (number < 5)
        seen += page.texts(".card footer span:nth-child(4)")
        if number < 5:
            following.click()
    assert seen == [f"row_{i:05}" for i in range(60)]
    page.choose("result", "exact")
    assert page.texts(".pager span") == ["page 1 of 4"] * 2, "another choice begins at its first page"
    page.choose("result", "all")
    page.choose("type", "color")
    page.choose("order", "most probable")
    shown = [float(text[2:]) for text in page.texts(".card footer span:nth-child(2)")]
    page.all(".pager button")[1].click()
    shown += [float(text[2:]) for text in page.texts(".card footer span:nth-child(2)")]
    assert shown == sorted(shown, reverse=True) and len(shown) == 20
    page.check()


def test_only_the_media_of_the_page_shown_are_in_the_document(chromium, tmp_path):
    media = [{"kind": "image", "src": DOT, "name": f"{i}.jpg"} for i in range(60)]
    media.append({"kind": "sound", "src": "data:audio/wav;base64,UklGRg==", "name": "say.wav"})
    rows = [row | {"media": [i, 60]} for i, row in enumerate(a_gallery(60))]
    page = Page(chromium, tmp_path, html_of(a_report(), rows, media, [], {}))
    page.choose("result", "all")
    assert len(page.all("img")) == len(page.all("audio")) == 12
    assert page.all("audio")[0].get_attribute("preload") == "none"
    page.all(".pager button")[1].click()
    alts = page.run("return [...document.images].map(i => i.alt)")
    assert alts == [f"{i}.jpg" for i in range(12, 24)]
    page.check()


def test_failures_come_first_a_card_an_image_with_all_its_questions_and_a_click_enlarges_it(chromium, tmp_path):
    media = [{"kind": "image", "src": DOT, "name": f"{i}.jpg"} for i in range(6)]
    media.append({"kind": "sound", "src": "data:audio/wav;base64,UklGRg==", "name": "say.wav"})
    rows = [row | {"seen": i // 10, "media": [i // 10, 6]} for i, row in enumerate(a_gallery(60))]
    page = Page(chromium, tmp_path, html_of(a_report(), rows, media, [], {}))
    assert page.count() == "12 of 60" and len(page.all(".card")) == len(page.all(".card img")) == 6
    assert {text.split()[0] for text in page.texts(".card > .asked .badge")} == {"✗"}, "errors are expanded"
    assert page.texts(".card summary") == ["other answers: 8 (7 right)"] * 6
    assert len(page.all(".card")[0].find_elements("css selector", "details .asked")) == 8
    assert len(page.all(".card")[0].find_elements("css selector", "audio")) == 10, "a sound is of its question"
    page.all(".picture")[1].click()
    assert page.run("return document.querySelector('dialog').open") and len(page.all("dialog img")) == 1
    page.all("dialog")[0].click()
    page.wait(lambda: page.all("dialog") == [])
    page.check()


def test_rows_and_cells_lead_to_their_predictions(chromium, tmp_path):
    rows = a_gallery(60)
    for row in rows:  # of two labels, no and yes: cells 0 to 2, and 3 to 5
        row["cell"] = 4 if row["correct"] else 3 if row["prediction"] == "two mm" else 5
    page = Page(chromium, tmp_path, html_of(a_report(), rows, [], [], {}))
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.all("tbody th a[data-type=color]")[0].click()
    assert page.count() == "4 of 60" and page.run("return location.hash") == "#gallery"
    page.run("document.querySelector('a[data-type=color][data-cell=\"4\"]').click()")
    assert page.count() == "14 of 60" and page.texts("#cell") == ["true answer: yes, answered: yes ×"]
    page.all("#cell")[0].click()
    assert page.count() == "20 of 60" and not page.all("#cell")[0].is_displayed()
    page.run("document.querySelector('a[data-type=color][data-cell=\"4\"]').click()")
    assert page.choose("type", "all") == "60 of 60", "another choice ends that of a cell"
    page.check()


HOSTILE = (
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror=\"window.ran = 1\">",
    "\"><svg onload='window.ran = 1'>",
    "' autofocus onfocus=window.ran=1 x='",
    "</title></style></pre><iframe src=https://example.org></iframe>",
    "\u2028{{window.ran=1}}${window.ran=1}<!--",
)  # fmt: skip


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_data_are_shown_as_text_and_run_nothing(chromium, tmp_path, bad):
    run = a_run(bad, types=(bad,), notes=[bad], settings={bad: bad}, versions={bad: bad}, argv=[bad], git_commit=bad)
    run |= {"split": bad, "decode": bad, "step": 1, "steps": 2, "git_differs": bad, "left_out": {bad: 1}}
    run |= dict.fromkeys(("model", "checkpoint", "script_sha256"), bad)
    run["types"][bad] = typed(labels=(bad, "yes"))
    run["blind"] = {bad: run["blind"]["blank"]}
    second = copy.deepcopy(run) | {"name": f"{bad}2"}
    told = a_report(run, second) | {"title": bad}
    told["audit"] |= {"same": [[bad, bad]], "probes": {bad: 1}, "failures": [bad]}
    split = told["leakage"]["splits"]["test"] | {"answers": {bad: 1}}
    told["leakage"] = {"findings": [{"kind": bad, "where": bad, "text": bad}], "splits": {bad: split}}
    row = a_gallery(4)[3] | {"id": bad, "type": bad, "question": bad, "answer": bad, "prediction": bad, "media": [0, 1]}
    row |= {"also_right": [bad], "correct": False, "relaxed": True, "cell": 1}
    media = [{"kind": "image", "src": DOT, "name": bad}, {"kind": "sound", "src": "data:audio/wav,", "name": bad}]
    tokens = {"run": bad, "id": bad, "tokens": [[bad, kind, 1] for kind in ("media", "masked", "supervised", bad)]}
    found = drawing.draw_figures(told, curves_of(bad, f"{bad}2", steps=10))
    page = Page(chromium, tmp_path, html_of(told, [row], media, [tokens], found, [bad]))
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.run("document.querySelector('a[data-cell=\"1\"]').click()")
    assert page.count() == "1 of 1" and bad in page.texts("#cell")[0]
    assert page.search(bad.replace("\u2028", "")[:8]) == "1 of 1"
    assert page.run("return window.ran") is None
    assert len(page.all("script")) == 3 and page.all("iframe") == [] and page.all("svg[onload], [onfocus]") == []
    cards = "return [...document.querySelectorAll('.card img')].map(i => [i.alt, i.getAttribute('src')])"
    assert page.run(cards) == [[bad, DOT]]
    assert page.texts(".card dd") == [bad] * 4
    assert page.run("return document.title") == bad
    places = ("h1", ".strip dd", ".lead dt", "h3", "#type option", "#run option", ".token.media", "td", "tbody th")
    for css in (*places, "code", "li"):
        assert any(bad in text for text in page.texts(css)), css
    assert page.texts("pre") == [shlex.quote(bad)] * 2
    page.check()
    if not found:
        pytest.skip(NO_FIGURES)
    assert page.run("return [...document.querySelectorAll('figure img')].every(i => i.complete && i.naturalWidth)")


def test_what_would_reach_the_network_is_seen_and_refused(chromium, tmp_path):
    (tmp_path / "other.html").write_text('<img src="http://127.0.0.1:9/x.png">')
    requests_of(chromium)
    chromium.get((tmp_path / "other.html").as_uri())
    assert "http://127.0.0.1:9/x.png" in requests_of(chromium), "the log has requests, even those that fail"
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(), [], [], {}))
    page.check()
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.driver.execute_async_script("fetch('http://127.0.0.1:9/').catch(() => 0).then(arguments[0])")
    refused = [entry["message"] for entry in chromium.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 2


def test_ten_thousand_predictions_with_pictures_stay_under_20_mb_and_are_filtered(chromium, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(40):
        picture(i, (720, 576)).save(folder / f"source{i}.jpg")
    rows = []
    for i, row in enumerate(a_gallery(10_000)):
        os.link(folder / f"source{i % 40}.jpg", folder / f"{i}.jpg")
        question = (
            f"Is there, in the lower half of the image shown, any instrument of kind {i} that touches the tissue?"
        )
        rows.append(row | {"question": question, "media": [f"{i}.jpg"]})
    media, of, _ = thumbnails.thumbnails(folder, rows, 8_000_000)
    assert len(media) > 300
    rows = [row | {"media": shown} for row, shown in zip(rows, of, strict=True)]
    html = html_of(a_report(), rows, media, [], {})
    assert 8_000_000 < len(html.encode()) < 20_000_000
    page = Page(chromium, tmp_path, html)
    assert page.count() == "2,000 of 10,000"
    assert page.choose("result", "unanswered") == "1,000 of 10,000"
    assert page.search("kind 77") == "11 of 10,000"
    assert page.search("tissue") == "1,000 of 10,000"
    page.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_texts_stand_out_in_both_themes(chromium, tmp_path, width, theme):
    long = "a_name_without_any_space_" * 12
    told = a_report(a_run("runs/a", types=(*TYPES, long), settings={long: long}), a_run(long))
    told["title"] = long
    told["leakage"]["findings"][0] |= {"where": long, "text": long}
    media = [{"kind": "strip", "src": DOT, "name": long}, {"kind": "sound", "src": "data:audio/wav,", "name": long}]
    rows = [row | {"id": long, "prediction": long, "media": [0, 1]} for row in a_gallery(30, 2)]
    found = drawing.draw_figures(told, curves_of("runs/a", long, steps=100))
    html = html_of(told, rows, media, [{"run": long, "id": long, "tokens": [[long, "media", 64]]}], found)
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": theme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        page = Page(chromium, tmp_path, html)
        page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.run("return document.documentElement.scrollWidth") <= width
        paper, ink = (
            [int(x) for x in re.findall(r"\d+", page.run(f"return getComputedStyle(document.body).{what}"))[:3]]
            for what in ("backgroundColor", "color")
        )
        assert (sum(paper) > 3 * 200) == (theme == "light") and abs(sum(paper) - sum(ink)) > 3 * 150
        page.check()
        if found:
            changed = page.run("return getComputedStyle(document.querySelector('figure img')).filter") != "none"
            assert changed == (theme == "dark"), "a figure is drawn on white"
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_script_runs_but_the_pages_own(chromium, tmp_path):
    html = html_of(a_report(), a_gallery(), [], [], {})
    page = Page(chromium, tmp_path, html.replace("</main>", "</main><script>window.ran = 1</script>"))
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert page.run("return window.ran") is None
    assert sum("Content Security Policy" in entry["message"] for entry in chromium.get_log("browser")) == 2
    assert page.count() == "12 of 60", "its own script runs"


def test_going_back_shows_what_the_form_says(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(), [], [], {}))
    assert page.search("row_00010") == "1 of 60"
    chromium.get("about:blank")
    chromium.back()
    left = page.run("return document.getElementById('search').value")
    assert page.count() == ("1 of 60" if left else "12 of 60")
    page.run("document.getElementById('search').value = 'row_00011'; dispatchEvent(new Event('pageshow'))")
    assert page.count() == "1 of 60", "what the browser fills in is applied"


def test_a_printed_page_says_that_it_is_one_of_several(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(60), [], [], {}))
    shown = "return ['count', 'printed'].map(n => getComputedStyle(document.getElementById(n)).display != 'none')"
    page.choose("result", "all")
    assert page.texts("#printed") == ["page 1 of 5: 12 of 60 cards"] and page.run(shown) == [True, False]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.run(shown) == [False, True]
    finally:
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_printing_unfolds_what_is_folded_and_folds_it_again(chromium, tmp_path):
    page = Page(chromium, tmp_path, html_of(a_report(), a_gallery(), [], [], {}))
    folded = len(page.all("details:not([open])"))
    assert folded
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.all("details:not([open])") == []
    page.run("dispatchEvent(new Event('afterprint'))")
    assert len(page.all("details:not([open])")) == folded
    page.check()


def test_the_readme_s_picture_is_small_and_is_made_by_its_script(chromium, tmp_path):
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs/screenshot.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "report.html").write_text(html_of(a_report(), a_gallery(), [], [], {}))
    script.screenshot(tmp_path / "report.html", tmp_path / "report.webp")
    kept = ROOT / "docs/report.webp"
    assert Image.open(tmp_path / "report.webp").size == Image.open(kept).size == (1280, 900)
    assert kept.stat().st_size < 150_000


def test_every_control_has_a_label_and_is_reached_by_keyboard(chromium, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = Page(chromium, tmp_path, html_of(a_report(a_run("a"), a_run("b")), a_gallery(60, 2), [], [], {}))
    page.choose("result", "all")
    fields = page.run("return [...document.querySelectorAll('select, input')].map(f => [f.id, f.labels.length])")
    assert fields == [[name, 1] for name in ("run", "type", "result", "order", "search")]
    page.all("#search")[0].click()
    reached = []
    for _ in range(2):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.driver.switch_to.active_element.text)
    assert reached[0] == "Next", "Previous is disabled on the first page"
    page.all(".pager button")[1].send_keys(Keys.ENTER)
    assert page.texts(".pager span")[0] == "page 2 of 10"
    for _ in range(8):
        page.all(".pager button")[1].send_keys(Keys.ENTER)
    assert page.texts(".pager span")[0] == "page 10 of 10"
    assert page.driver.switch_to.active_element.text == "Previous", "Next is disabled, and the focus is not lost"
    assert page.all("#count")[0].get_attribute("aria-live") == "polite"
    page.check()
