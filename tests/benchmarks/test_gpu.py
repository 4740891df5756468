"""benchmarks/gpu.py on a CPU: its first minute on a real card is not spent on a typo."""

import json

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WARM", 0)
    monkeypatch.setattr(gpu, "TIMED", 2)
    return gpu.Bench(False, tmp_path / "lines")


def lines(bench) -> dict:
    found = [json.loads(line) for line in bench.lines.read_text().splitlines()]
    assert [line for line in found if "error" in line] == [] and not bench.failed
    return {line.pop("name"): line for line in found}


@pytest.mark.parametrize("part", ["llava_med_7b", "qwen2vl_2b", "surgical_9b", "answering", "profile"])
def test_every_part_runs_and_both_sides_lose_the_same(bench, part):
    gpu.PARTS[part][0](bench)
    found = lines(bench)
    compared = [line["losses_differ_by"] for line in found.values() if "losses_differ_by" in line]
    assert compared if "_" in part else found
    assert max(compared, default=0) < 2e-4  # bf16
    assert all("Trainer and peft" in line["contestant"] for line in found.values() if "contestant" in line)


def test_without_peft_transformers_forward_is_the_contestant(bench, monkeypatch):
    monkeypatch.setattr(gpu, "PEFT", False)
    gpu.compared(gpu.Case(bench, "qwen2vl_2b"), 2, 3, 3)
    found = lines(bench)
    assert "no peft" in found["3 questions, transformers"]["contestant"]
    assert found["3 questions, compared"]["losses_differ_by"] < 2e-4


def test_a_demo_is_stopped_resumed_answered_and_compiled(bench, monkeypatch):
    script = gpu.train_qwen2vl_sentinel
    monkeypatch.setattr(gpu, "DEMOS", {script: gpu.DEMOS[script]})
    gpu.demos(bench)
    first, predicted, compiled = lines(bench).values()
    assert first["resumed_differs_by"] == first["fp32_differs_by"] == 0 < first["bf16_differs_by"] < 0.1
    assert predicted["prediction"] is not None and compiled["bf16_differs_by"] < 0.1


def test_sides_that_do_not_compute_the_same_are_not_compared():
    one, other = {"losses": [2.0, 2.0], "questions_per_s": 2.0}, {"losses": [2.0, 2.1], "questions_per_s": 1.0}
    with pytest.raises(ValueError, match="nothing is compared"):
        gpu.compare(one, other)
    assert gpu.compare(one, {**other, "losses": [2.0, 2.0]}) == {"losses_differ_by": 0.0, "times_as_fast": 2.0}


STUB = """
import sys, time
open(sys.argv[sys.argv.index("--lines") + 1], "w").write('{"name": "measured"}\\n{"name": "cut o')
%s
"""


@pytest.mark.parametrize(
    ("after", "ended"), [("time.sleep(100)", "its time was over"), ("sys.exit('no card')", "1"), ("", None)]
)
def test_a_part_that_ends_early_keeps_what_it_has_measured(tmp_path, monkeypatch, after, ended):
    (tmp_path / "stub.py").write_text(STUB % after)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "stub.py"))
    found = gpu.alone("demos", 2 if ended else 60, rehearse=True)
    assert found["results"] == [{"name": "measured"}] and found.get("ended") == ended
    assert "no card" in found["log"] if ended == "1" else True


def test_parts_have_their_time_and_the_file_is_written_after_each(tmp_path, monkeypatch):
    """A part's share is what is left of its own and those before it, all of them in less than eight minutes."""
    given, file = [], tmp_path / "runs" / "gpu.json"

    def part(name, seconds, rehearse):
        given.append((name, round(seconds), file.exists()))
        return {"seconds": 0.0, "results": []}

    monkeypatch.setattr(gpu, "alone", part)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", "--json", str(file)])
    assert ended.value.code == 0 and given[0] == ("demos", gpu.PARTS["demos"][1], False)
    assert [name for name, *_ in given] == list(gpu.PARTS) == list(json.loads(file.read_text()))[4:]
    assert given[-1][1] == sum(seconds for _, seconds in gpu.PARTS.values()) <= 470 and given[-1][2]


def test_without_a_gpu_nothing_is_measured(capsys):
    assert not torch.cuda.is_available()
    assert gpu.main([]) is None and "nothing measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", gpu.CASES)
def test_the_published_shapes_are_those_that_are_published(name):
    """Counted without weights: LLaVA-Med with CLIP-L, Qwen2-VL, the surgical model with Whisper's encoder."""
    sizes = {"llava_med_7b": 7_566_743_552, "qwen2vl_2b": 2_208_985_600, "qwen2vl_7b": 8_291_375_616}
    bench = gpu.Bench.__new__(gpu.Bench)
    bench.large, bench.device = True, torch.device("meta")
    vlm = gpu.Case(bench, name).build()
    found = sum(p.numel() for p in vlm.parameters())
    assert found == sizes.get(name, found)
    if name == "surgical_9b":
        assert found == 8_291_375_616 + 636_968_960 + 4_587_520
