"""Blind runs: every script answers with nothing to see, or with the media of another group."""

import pickle
from types import SimpleNamespace

import pytest
from helpers import read_lines, run, task_class

from report.blind import exchange
from runtime import batches


def test_every_script_answers_without_seeing(demo, tmp_path):
    """blank: no pixel or voxel that the model is given is other than 0. shuffled: each example has another's media."""
    folder, script, flags = demo
    flags = [*flags, "--limit", 12, "--max-answer-tokens", 2, "--decode", "greedy"]
    run(folder, tmp_path, *flags, "--max-steps", 1, script=script)
    own, given = read_lines(tmp_path / "predictions.jsonl"), []
    with pytest.MonkeyPatch.context() as patch:
        task, blank = task_class(script), task_class(script).blank
        patch.setattr(task, "blank", lambda self, media: given.append(blank(self, media)) or given[-1])
        load = batches.load  # what is read in workers is sent to them pickled, where they are not forked
        patch.setattr(batches, "load", lambda items, run: load(pickle.loads(pickle.dumps(items)), run))
        run(folder, tmp_path, *flags, "--eval-only", "--blind", "blank", script=script)
    pixels = [media.get("pixel_values") for media in given]
    pixels += [video.pixels for media in given for video in media.get("videos", [])]
    pixels += [value for media in given for name, value in media.items() if name.startswith("volumes of")]
    pixels = [tensor for tensor in pixels if tensor is not None]
    assert pixels and all(tensor.numel() and not tensor.any() for tensor in pixels)
    run(folder, tmp_path, *flags, "--eval-only", "--blind", "shuffled", script=script)
    for mode in ("blank", "shuffled"):
        blind = read_lines(tmp_path / "blind" / mode / "predictions.jsonl")
        # of the drawn scans a single series is among these: it can show nobody else's
        left = [r for r in own if mode == "blank" or "hemisphere" not in r["question_type"]]
        assert [(r["id"], r["group"], r["question"], r["answer"]) for r in blind] == [
            (r["id"], r["group"], r["question"], r["answer"]) for r in left
        ]
        seen = [[name for name in r["media"] if not name.startswith("audio/")] for r in left]
        shown = [[name for name in r["media"] if not name.startswith("audio/")] for r in blind]
        assert all((a == b) == (mode == "blank") for a, b in zip(seen, shown, strict=True))
        heard = [[name for name in r["media"] if name.startswith("audio/")] for r in blind]
        assert heard == [[name for name in r["media"] if name.startswith("audio/")] for r in left]
    assert read_lines(tmp_path / "predictions.jsonl") == own


def test_shuffled_media_come_from_another_group_where_they_can():
    def example(i, group, image):
        return SimpleNamespace(id=str(i), where=str(i), group=group, media=[image], shown=[image])

    def shown(examples):
        return exchange(examples, SimpleNamespace(kind=lambda example: (), show=lambda example, other: other))

    examples = [example(i, f"patient {i // 6}", f"{i // 2}.png") for i in range(30)]  # 15 images, three a patient
    others = shown(examples)
    assert all(a.group != b.group for a, b in zip(examples, others, strict=True))
    assert sorted({b.media[0] for b in others}) == sorted({a.media[0] for a in examples})  # each is shown once
    assert all(others[i].media == others[i + 1].media for i in range(0, 30, 2))  # and read once for its questions
    alone = [example(i, "one", f"{i}.png") for i in range(3)]
    assert all(a.media != b.media for a, b in zip(alone, shown(alone), strict=True))
    with pytest.raises(SystemExit, match="no two media to exchange"):
        shown(alone[:1])


def test_blind_is_for_answering_alone(demo_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(demo_folder, tmp_path, "--blind", "blank")
    assert "--blind is for --eval-only" in capsys.readouterr().err
