"""The leakage check: planted faults are found and named; clean data, and pictures that only look alike, pass."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import load_demo, read_lines
from PIL import Image, ImageEnhance, ImageOps

from report import leakage
from report.examples import read

# the published annotations of SurgViVQA-Audio, where they lie beside the project
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "surgvivqa_audio"


def picture(seed: int, size=(320, 256), own: float = 0.7) -> Image.Image:
    """Pinkish clouds that darken towards the corners; `own` is the share that other seeds do not have."""
    width, height = size
    slow = np.maximum(np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width), 1)
    clouds = []
    for s in (seed, 10**6):
        noise = np.fft.ifft2(np.fft.fft2(np.random.default_rng(s).standard_normal((height, width))) / slow).real
        clouds.append(noise / noise.std())
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    both = own**0.5 * clouds[0] + (1 - own) ** 0.5 * clouds[1]
    pixels = np.stack([170 + 35 * both, 95 + 28 * both, 85 + 25 * both], axis=-1)
    return Image.fromarray(np.clip(pixels * np.clip(1.25 - x**2 - y**2, 0, 1)[..., None], 0, 255).astype(np.uint8))


def write(folder: Path, **splits) -> Path:
    """A data folder: each split a list of lines, of which only what matters is given; pictures are saved by name."""
    for split, given in splits.items():
        lines = []
        for i, line in enumerate(given):
            asked = {} if "conversations" in line else {"question": f"Is {split} {i} red?", "answer": "yes"}
            line = {"id": f"{split}{i}", "group": f"{split} {i}", **asked, **line}
            for name, image in line.pop("files", {}).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name, quality=95)
            lines.append(json.dumps(line))
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def shows(name: str, image: Image.Image, **fields) -> dict:
    return {"image": name, "files": {name: image}, **fields}


def asks(name: str, **fields) -> dict:
    """The same picture and, unless it says otherwise, the same question."""
    return shows(name, picture(1), **{"question": "Is it red?"} | fields)


def checked(folder: Path) -> dict:
    examples, problems = read(folder)
    assert problems == []
    return leakage.check(folder, examples)


def found(folder: Path) -> list[tuple[str, str, str]]:
    return [(f["kind"], f["where"], f["text"]) for f in checked(folder)["findings"]]


def only(folder: Path, kind: str, where: str) -> str:
    """The text of the only finding, which must be of this kind and at this line."""
    (finding,) = found(folder)
    assert finding[:2] == (kind, where)
    return finding[2]


@pytest.fixture
def pair(tmp_path):
    """Writes a picture into training and what `change` makes of it into the test, among others that differ."""

    def build(change, ending="jpg", **settings):
        original = picture(1)
        write(tmp_path, train=[shows(f"images/a{s}.jpg", picture(s)) for s in range(6)])
        write(tmp_path, test=[shows(f"images/b{s}.jpg", picture(s)) for s in range(10, 13)])
        changed = change(original)
        changed.save(tmp_path / f"images/copy.{ending}", **{"quality": 90} | settings)
        with (tmp_path / "test.jsonl").open("a") as file:
            line = {"id": "c", "group": "c", "image": f"images/copy.{ending}", "question": "Is it big?", "answer": "no"}
            file.write(json.dumps(line) + "\n")
        return tmp_path

    return build


# ------------------------------------------------------------------------------------------------------------
# Nothing is wrong
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demo", ["demo_folder", "qwen_folder", "video_folder", "mri_folder", "plain_folder"])
def test_a_clean_demo_has_no_findings(demo, request, capsys):
    result = checked(request.getfixturevalue(demo) / "data")
    leakage.print_result(result)
    assert result["findings"] == [] and result["counts"]["not looked at"] == 0
    assert set(result["splits"]) == {"train", "val", "test"}
    assert capsys.readouterr().out.endswith("leakage check: no findings\n")


def test_the_examples_of_the_scripts_have_no_findings(demo):
    folder, script, flags = demo
    result = leakage.check(folder / "data", load_demo(folder, script, *flags).examples)
    assert result["findings"] == [] and result["counts"]["not looked at"] == 0


def test_different_pictures_of_one_kind_are_not_near(tmp_path):
    write(tmp_path, train=[shows(f"images/{s}.jpg", picture(s, own=0.3)) for s in range(60)])
    write(tmp_path, test=[shows(f"images/{s}.jpg", picture(s, own=0.3)) for s in range(100, 140)])
    assert found(tmp_path) == []


def test_a_small_part_in_another_colour_is_another_picture(tmp_path):
    spots = {"train": (190, 80, 80), "test": (160, 96, 80)}  # of about the same grey
    for split, colour in spots.items():
        image = picture(1)
        image.paste(colour, (150, 120, 190, 152))
        write(tmp_path, **{split: [shows(f"images/{split}.jpg", image)]})
    assert found(tmp_path) == []


def test_pictures_without_structure_are_compared_by_their_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 3, (64, 64, 3), dtype=np.uint8)  # black, as a camera sees it
    write(
        tmp_path,
        train=[shows("black.png", Image.fromarray(noise)), shows("white.png", Image.new("RGB", (64, 64), "white"))],
    )
    write(tmp_path, test=[shows("dark.png", Image.fromarray(noise[::-1])), shows("same.png", Image.fromarray(noise))])
    assert "same.png of test shows the same as black.png" in only(tmp_path, "same content", "test.jsonl:2")
    assert checked(tmp_path)["counts"]["flat"] == 3  # of four files one is the same as another


# ------------------------------------------------------------------------------------------------------------
# The same picture
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: image, id="re-encoded"),
        pytest.param(lambda image: image.resize((image.width // 2, image.height // 2)), id="half the size"),
        pytest.param(lambda image: image.resize((224, 224)), id="squeezed"),
        pytest.param(lambda image: ImageEnhance.Brightness(image).enhance(1.15), id="brighter"),
    ],
)
def test_a_copy_of_a_training_picture_is_found(pair, change):
    text = only(pair(change, quality=70), "near duplicate", "test.jsonl:4")
    assert text.startswith("images/copy.jpg of test looks like images/a1.jpg of train (train.jsonl:2): ")


def test_a_copy_in_another_format_is_found(pair):
    only(pair(lambda image: image, ending="png"), "near duplicate", "test.jsonl:4")


@pytest.mark.parametrize(
    ("change", "turned"),
    [
        (ImageOps.mirror, "mirrored left to right"),
        (ImageOps.flip, "mirrored top to bottom"),
        (lambda image: image.rotate(180), "turned upside down"),
    ],
)
def test_a_mirrored_copy_is_found_and_called_so(pair, change, turned):
    assert f", {turned}: " in only(pair(change), "near duplicate", "test.jsonl:4")


def test_an_exif_rotation_does_not_hide_a_copy(pair):
    exif = Image.Exif()
    exif[0x0112] = 3  # shown turned by 180°
    text = only(pair(lambda image: image.rotate(180), exif=exif), "near duplicate", "test.jsonl:4")
    assert "turned" not in text


def test_copies_of_the_drawn_frames_are_found_with_their_own_original(demo_folder, tmp_path):
    data = shutil.copytree(demo_folder / "data", tmp_path / "data")
    shown = list(dict.fromkeys(line["image"] for line in read_lines(data / "train.jsonl")))[:20]
    lines = []
    for i, name in enumerate(shown):
        Image.open(data / name).save(data / f"images/copy{i}.jpg", quality=50)
        lines.append({"id": f"copy{i}", "group": "new", "image": f"images/copy{i}.jpg", "question": "?", "answer": "a"})
    with (data / "test.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    texts = [text for kind, _, text in found(data) if kind == "near duplicate"]
    assert len(texts) == 20
    assert all(
        f"copy{i}.jpg of test looks like {name} of" in text
        for i, (name, text) in enumerate(zip(shown, texts, strict=True))
    )


def test_the_same_pixels_are_one_finding_whatever_the_name_and_format(tmp_path):
    write(tmp_path, train=[shows("images/a.png", picture(1))])
    write(tmp_path, val=[shows("images/b.png", Image.open(tmp_path / "images/a.png").convert("RGBA"))])
    text = "images/b.png of val shows the same as images/a.png of train (train.jsonl:1)"
    assert only(tmp_path, "same content", "val.jsonl:1") == text


@pytest.mark.parametrize(("name", "copy"), [("a.npy", "b.npz"), ("a.npy", "mirrored.npy"), ("a.wav", "b.flac")])
def test_scans_and_recordings_are_compared_by_what_is_in_them(tmp_path, name, copy):
    values = np.random.default_rng(0).integers(1, 1000, (6, 5, 4)).astype(np.int16)
    if name == "a.wav":
        soundfile = pytest.importorskip("soundfile")
        for file in (name, copy):
            soundfile.write(tmp_path / file, np.tile(values.flatten() * 30, 20), 16_000)
    else:
        np.save(tmp_path / name, values)
        np.savez(tmp_path / copy, values) if copy == "b.npz" else np.save(tmp_path / copy, values[::-1].astype(float))
    field = {"a.npy": "volume", "a.wav": "audio"}[name]
    write(tmp_path, train=[{field: name, "modality": "T1"}], test=[{field: copy, "modality": "T1"}])
    assert f"{copy} of test shows the same as {name} of train" in only(tmp_path, "same content", "test.jsonl:1")


def test_contents_that_the_caller_knows_are_believed(tmp_path):
    write(tmp_path, train=[shows("images/a.jpg", picture(1))], test=[shows("images/b.jpg", picture(2))])
    examples, _ = read(tmp_path)
    result = leakage.check(tmp_path, examples, {"images/a.jpg": "5e1f", "images/b.jpg": "5e1f"})
    assert [finding["kind"] for finding in result["findings"]] == ["same content"]


def test_files_that_cannot_be_opened_are_counted_and_compared_by_name(tmp_path):
    write(tmp_path, train=[{"image": "gone.jpg", "group": None}, shows("torn.jpg", picture(1))])
    write(tmp_path, test=[{"image": "gone.jpg", "group": None}])  # its group is the file: no second finding
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:500])
    assert "by its name" in only(tmp_path, "same content", "test.jsonl:1")
    assert checked(tmp_path)["counts"]["not looked at"] == 2


# ------------------------------------------------------------------------------------------------------------
# Clips and groups
# ------------------------------------------------------------------------------------------------------------


def test_clips_that_share_frames_are_counted(video_folder, tmp_path):
    data = shutil.copytree(video_folder / "data", tmp_path / "data")
    train, lines = read_lines(data / "train_multivideo.jsonl"), read_lines(data / "test_multivideo.jsonl")
    one, all_eight = lines[0], lines[-1]
    for clip, count in ((one, 1), (all_eight, 8)):
        for name, frame in list(zip(clip["frames"], train[0]["frames"], strict=True))[:count]:
            source = data / "frames" / train[0]["video_id"] / f"{frame}.jpg"
            shutil.copy(source, data / "frames" / clip["video_id"] / f"{name}.jpg")
    touched = sum(one["frames"][0] in clip["frames"] or clip["frames"] == all_eight["frames"] for clip in lines)
    contained = sum(clip["frames"] == all_eight["frames"] for clip in lines)
    texts = {kind: text for kind, _, text in found(data)}
    assert f"8 of {len({n for clip in lines for n in clip['frames']}) - 1} frames of test" in texts["shared frames"]
    assert f"in {touched} of {len(lines)} questions, {contained} of which show nothing else" in texts["shared frames"]
    assert "same content" in texts


def test_a_patient_in_two_splits_is_found(tmp_path):
    write(tmp_path, train=[shows("a.jpg", picture(1), group="patient 7")], val=[shows("b.jpg", picture(2))])
    write(tmp_path, test=[shows("c.jpg", picture(3)), shows("d.jpg", picture(4), group="patient 7")])
    text = only(tmp_path, "shared group", "test.jsonl:2")
    assert text == "group patient 7 of test is also in train (train.jsonl:1)"


def test_every_subject_of_an_example_counts(tmp_path):
    examples = []
    for split, groups in (("train", ["s1", "s2"]), ("test", ["s3", "s2"])):
        known = {"where": f"{split}:1", "split": split, "id": split, "groups": groups, "media": [], "shown": []}
        examples.append(SimpleNamespace(**known, question="", answer="yes", question_type="yes_no"))
    texts = [finding["text"] for finding in leakage.check(tmp_path, examples)["findings"]]
    assert texts == ["group s2 of test is also in train (train:1)"]


# ------------------------------------------------------------------------------------------------------------
# Questions and answers
# ------------------------------------------------------------------------------------------------------------


def test_contradicting_answers_are_found_also_under_another_file_name(tmp_path):
    write(tmp_path, train=[asks("a.jpg", answer="yes"), asks("b.jpg", question="is it red", answer="No.")])
    text = only(tmp_path, "conflict", "train.jsonl:2")
    assert text == "'is it red' of b.jpg is answered 'No.', but 'yes' at train.jsonl:1"


def test_the_same_question_asked_twice_is_found(tmp_path):
    write(tmp_path, train=[asks("a.jpg", answer="yes"), asks("a.jpg", answer="Yes.")])
    assert "asked at train.jsonl:1, too, with the same answer 'Yes.'" in only(
        tmp_path, "same question", "train.jsonl:2"
    )


def test_forms_of_one_answer_are_no_contradiction(tmp_path):
    same = [("pink; red", "red;pink", "color"), ("(a) oval", "oval", "mcq"), ("two", "2", "count_numeric")]
    for one, other, kind in same:
        twice = [asks("a.jpg", answer=answer, question_type=kind) for answer in (one, other)]
        only(write(tmp_path, train=twice), "same question", "train.jsonl:2")
    twice = [asks("a.jpg", answer="No, it is not.", short_answer="no"), asks("a.jpg", answer="no, it is not")]
    only(write(tmp_path, train=twice), "same question", "train.jsonl:2")


def test_what_was_said_before_is_part_of_the_question(tmp_path):
    picture(1).save(tmp_path / "a.jpg")

    def talk(*texts):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": texts[0], "image": "a.jpg", "conversations": turns}

    write(tmp_path, train=[talk("<image>Left?", "yes", "Sure?", "yes"), talk("<image>Right?", "no", "Sure?", "no")])
    assert found(tmp_path) == []
    write(tmp_path, train=[talk("<image>Left?", "yes", "Sure?", "yes"), talk("Left?\n<image>", "yes", "Sure?", "no")])
    kinds = [(kind, where) for kind, where, _ in found(tmp_path)]
    assert kinds == [("conflict", "train.jsonl:2 turn 1"), ("same question", "train.jsonl:2 turn 0")]


def test_a_contradiction_is_found_also_between_a_scan_of_umbrella_and_one_in_a_list(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((8, 8, 8), np.float32))
    shown = {"volume": "a.npy", "modality": "T1"}, {"images": ["a.npy"], "answer": "no"}
    write(tmp_path, train=[{"question": "Is it red?", "group": "a"} | line for line in shown])
    only(tmp_path, "conflict", "train.jsonl:2")


def test_captions_may_differ_and_texts_alone_may_repeat(tmp_path):
    captions = [shows("a.jpg", picture(1), question="", answer=answer) for answer in ("a polyp", "a red polyp")]
    write(tmp_path, train=[*captions, {"question": "Hello", "answer": "Hi"}, {"question": "Hello", "answer": "Hi"}])
    assert found(tmp_path) == []


@pytest.mark.parametrize("answer", [None, "", " .", "nan", float("nan")])
def test_an_answer_that_says_nothing_is_found(tmp_path, answer):
    write(tmp_path, train=[shows("a.jpg", picture(1), answer=answer), shows("b.jpg", picture(2))])
    only(tmp_path, "empty answer", "train.jsonl:1")


def test_a_type_with_one_answer_is_noted(tmp_path, capsys):
    asked = [("Is it red?", "yes"), ("Is it big?", "Yes"), ("How many?", "1"), ("How many are red?", "2")]
    asked.append(("What color is it?", "red"))
    write(tmp_path, train=[shows("a.jpg", picture(1), question=q, answer=a, group="x") for q, a in asked])
    result = checked(tmp_path)
    assert result["findings"] == [] and result["splits"]["train"]["single_class"] == ["yes_no"]
    leakage.print_result(result)
    assert "always the same answer to yes_no" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Reading and printing
# ------------------------------------------------------------------------------------------------------------


def test_ten_findings_of_a_kind_are_printed_and_all_are_kept(tmp_path, capsys):
    write(tmp_path, train=[{"image": f"{i}.jpg", "answer": ""} for i in range(47)])
    result = checked(tmp_path)
    leakage.print_result(result)
    printed = capsys.readouterr().out
    assert len(result["findings"]) == 47 and printed.count("empty answer: train.jsonl") == 10
    assert "empty answer: … and 37 more" in printed and printed.endswith(
        "leakage check: 47 findings (47 empty answer)\n"
    )
    json.dumps(result)


def test_no_printed_line_is_longer_than_200_characters(tmp_path, capsys):
    long = [{"question": f"{'Is it ' * 40}{i}?", "answer": f"{i}: {'yes, it is ' * 40}"} for i in range(3)]
    kinds = [{"question": f"Is it {i}?", "question_type": f"a_type_of_the_data_{i // 2}"} for i in range(60)]
    same = [asks("a.jpg", question="Is it " * 40, answer=f"{'yes, it is ' * 20}{i}") for i in range(2)]
    write(tmp_path, train=[shows("b.jpg", picture(2), **line) for line in [*long, *kinds]] + same)
    result = checked(tmp_path)
    leakage.print_result(result)
    printed = capsys.readouterr().out
    assert "conflict: " in printed and "always the same answer to a_type" in printed
    assert max(map(len, printed.split("\n"))) <= 200
    assert any(len(finding["text"]) > 200 for finding in result["findings"])  # complete in check.json


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the annotations of SurgViVQA are not here")
def test_the_published_surgical_clips_share_the_frames_that_are_known():
    result = checked(PUBLISHED)
    texts = {finding["kind"]: finding["text"] for finding in result["findings"]}
    assert texts["shared frames"] == (
        "869 of 3070 frames of val are in earlier splits too, in 169 of 398 questions, 45 of which show nothing else"
    )
    assert result["counts"]["same content"] == 869 and result["counts"]["shared group"] == 3
    assert not any(f["where"].startswith("test_") for f in result["findings"])  # its video is in no other split
    assert [result["splits"][split]["questions"] for split in ("train", "val", "test")] == [2302, 398, 1000]
