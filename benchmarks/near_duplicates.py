"""Which copies of a training picture the leakage check finds in the test split, and whether it takes others for copies.

    make demo && python benchmarks/near_duplicates.py --demo runs/demo/llava_med

Some pictures of the demo's training split are changed in one way each and put into a test split of their own. Found is
a copy that it names with its own original; wrong is a picture that it calls a copy of another one. The demo's
frames share their background, so that different ones look much alike.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import examples, leakage


def crop(share: float):
    """Cut that share of the width and of the height off, half of it at each side."""

    def change(image: Image.Image) -> Image.Image:
        x, y = round(image.width * share / 2), round(image.height * share / 2)
        return image.crop((x, y, image.width - x, image.height - y))

    return change


CHANGES = {  # name -> (the changed picture, JPEG quality)
    "quality 70": (lambda i: i, 70),
    "quality 50": (lambda i: i, 50),
    "quality 30": (lambda i: i, 30),
    "half the size": (lambda i: i.resize((i.width // 2, i.height // 2)), 90),
    "twice the size": (lambda i: i.resize((i.width * 2, i.height * 2)), 90),
    "mirrored left to right": (ImageOps.mirror, 90),
    "mirrored top to bottom": (ImageOps.flip, 90),
    "turned upside down": (lambda i: i.rotate(180), 90),
    "10 % brighter": (lambda i: ImageEnhance.Brightness(i).enhance(1.1), 90),
    "15 % darker": (lambda i: ImageEnhance.Brightness(i).enhance(0.85), 90),
    "turned by a quarter": (lambda i: i.rotate(90), 90),
    "2 % cropped": (crop(0.02), 90),
    "5 % cropped": (crop(0.05), 90),
    "20 % more colour": (lambda i: ImageEnhance.Color(i).enhance(1.2), 90),
    "grey": (lambda i: ImageOps.grayscale(i).convert("RGB"), 90),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/llava_med"))
    parser.add_argument("--copies", type=int, default=100, help="of each kind (default: 100)")
    args = parser.parse_args()
    found, _ = examples.read(args.demo / "data")
    clean = leakage.check(args.demo / "data", found)["counts"]["near duplicate"]
    files = {split: {name for e in found if e.split == split for name in e.media} for split in leakage.SPLITS}
    count = {split: len(names) for split, names in files.items()}
    pairs = count["train"] * count["val"] + (count["train"] + count["val"]) * count["test"]
    print(f"{sum(count.values())} pictures as they are: {clean} of {pairs:,} pairs across splits are called copies")
    train = sorted(files["train"])
    print(f"{args.copies} copies each, beside {len(train)} training pictures\n{'':<24}{'found':>8}{'wrong':>8}")
    for kind, (change, quality) in CHANGES.items():
        with tempfile.TemporaryDirectory(dir=args.demo) as temporary:  # hard links need the same disk
            folder = Path(temporary)
            lines = {"train": [], "test": []}
            for i, name in enumerate(train):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(args.demo / "data" / name, folder / name)
                lines["train"].append({"id": name, "image": name, "question": f"{i}?", "answer": "yes"})
            for i, name in enumerate(train[: args.copies]):
                change(Image.open(folder / name).convert("RGB")).save(folder / f"{i}.jpg", quality=quality)
                lines["test"].append({"id": f"{i}", "image": f"{i}.jpg", "question": f"{i}??", "answer": "yes"})
            for split, entries in lines.items():
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            texts = [f["text"] for f in leakage.check(folder, examples.read(folder)[0])["findings"]]
        own = sum(any(text.startswith(f"{i}.jpg of test looks like {name} of") for text in texts)
                  for i, name in enumerate(train[: args.copies]))  # fmt: skip
        print(f"{kind:<24}{own / args.copies:>8.1%}{len(texts) - own:>8}")


if __name__ == "__main__":
    main()
