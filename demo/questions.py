"""Questions about single frames, worded after Kvasir-VQA."""

import json

import numpy as np

from demo.scenes import COLORS, MUCOSA, PLACES, SIDES, SIZE_WORDS, SIZES, random_patient, random_scene

QUESTIONS = {
    "polyp": ("yes_no", ["Are there any polyps in the image?", "Does this image contain a polyp?"]),
    "instrument": ("yes_no", ["Are there any instruments in the image?", "Is an instrument visible?"]),
    "text": ("yes_no", ["Is there text in the image?", "Is there any text?"]),
    "fold": ("yes_no", ["Does the image show a fold?", "Are there any folds in the image?"]),
    "box": ("yes_no", ["Is there a green box artefact?", "Does the image show a green box?"]),
    "color": ("color", ["What color is the polyp?", "What color is the abnormality?"]),
    "size": ("size_numeric", ["What is the size of the polyp?", "How large is the largest polyp?"]),
    "polyps": ("count_numeric", ["How many polyps are in the image?", "How many findings are present?"]),
    "instruments": ("count_numeric", ["How many instruments are in the image?"]),
    "place": ("mcq", ["Where is the polyp? (a) upper-left (b) upper-right (c) lower-left (d) lower-right"]),
    "side": ("mcq", ["From which side does the instrument enter? (a) left (b) right (c) top (d) bottom"]),
    "procedure": ("open_ended", ["What type of procedure is the image taken from?"]),
    "finding": ("open_ended", ["Describe the main finding.", "What is the main finding in the image?"]),
    "kind": ("open_ended", ["Which instrument is visible?", "What instrument is used?"]),
}
CANDIDATES = {"color": list(COLORS), "place": list(PLACES), "side": list(SIDES)}


def answers(scene):
    """Every answer that the frame decides; colour, size, place and side only where there is one to tell."""
    polyps, instruments = scene["polyps"], scene["instruments"]
    seen = {
        "polyp": polyps,
        "instrument": instruments,
        "text": scene["text"],
        "fold": scene["folds"],
        "box": scene["box"],
    }
    found = {key: "yes" if what else "no" for key, what in seen.items()}
    found["polyps"] = str(len(polyps))
    found["instruments"] = str(len(instruments))
    found["procedure"] = scene["procedure"]
    found["finding"] = "normal mucosa"
    found["kind"] = " and ".join(sorted(tool["kind"] for tool in instruments)) or "none"
    if polyps:
        found["color"] = polyps[0]["color"]
        found["size"] = polyps[0]["size"]  # the first is the largest
        found["finding"] = f"several {found['color']} polyps"
    if len(polyps) == 1:
        found["place"] = polyps[0]["place"]
        found["finding"] = f"a {SIZE_WORDS[found['size']]} {found['color']} polyp"
    if len(instruments) == 1:
        found["side"] = instruments[0]["side"]
    return found


def question_rows(rng, scene, index):
    found = answers(scene)
    keys = [key for key in QUESTIONS if key in found]
    count = rng.integers(7, 12)  # 7 to 11; Kvasir-VQA has 9.05 an image
    rows = []
    for number, key in enumerate(rng.permutation(keys)[:count].tolist()):
        question_type, wordings = QUESTIONS[key]
        row = {
            "id": f"demo_{index:05d}_q{number}",
            "image": f"images/{index:05d}.jpg",
            "question": str(rng.choice(wordings)),
            "question_type": question_type,
            "answer": found[key],
            "group": scene["group"],
        }
        if key in CANDIDATES:
            row["answer_candidates"] = CANDIDATES[key]
        rows.append(row)
    return rows


def write_questions(folder, images, seed, draw, rows_of):
    """Patients have one to five images, all in the same split. The scenes and questions depend on the seed alone.

    draw(scene) gives the image, rows_of(rng, scene, index) its rows in the columns of the data set imitated.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    index = patients = 0
    for split, end in [("train", round(0.7 * images)), ("val", round(0.85 * images)), ("test", images)]:
        rows = []
        while index < end:
            patient = random_patient(rng, patients)
            patients += 1
            for _ in range(min(end - index, rng.integers(1, 6))):
                scene = random_scene(rng, patient)
                draw(scene).save(folder / "images" / f"{index:05d}.jpg", quality=90)
                rows += rows_of(rng, scene, index)
                index += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / split}.jsonl: {len(rows)} questions")


def texts_asked_and_answered():
    """What the tokenizers learn their word pieces from."""
    texts = [wording for _, wordings in QUESTIONS.values() for wording in wordings]
    texts += [*COLORS, *SIZES, *SIZE_WORDS.values(), *PLACES, *SIDES, *MUCOSA, "yes", "no", "none"]
    return [*texts, "a large pink polyp", "several red polyps", "normal mucosa", "biopsy forceps and snare"]
