"""Learning rates by part: each learns at its own rate, as with torch's own groups, and a vain one is refused."""

import pytest
import torch
from helpers import read_lines, read_tensors, refused, run

import train_llava_med
import train_qwen2vl_sentinel
from runtime import optimizers

SMALL = ["--limit", 28, "--questions-per-step", 14, "--epochs", 1, "--weight-decay", 0.1, "--max-answer-tokens", 1]
SMALL += ["--lr", 1e-3]
RATES = {"multi_modal_projector": 5e-3, "vision_tower": 2e-4}


def test_the_parts_move_as_with_torch_s_own_groups_and_schedule(demo_folder, tmp_path, monkeypatch, capsys):
    """The gradients of the run, taken once more by an AdamW that has a rate a group and torch's LambdaLR."""
    groups, step, taken, begun = optimizers.parameter_groups, torch.optim.AdamW.step, [], {}

    def noted(trained, args):
        begun.update({name: p.detach().clone() for name, p in trained.items()})
        begun["now"] = trained
        return groups(trained, args)

    def recorded(self, closure=None):
        taken.append({name: p.grad.clone() for name, p in begun["now"].items() if p.grad is not None})
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "parameter_groups", noted)
        patch.setattr(torch.optim.AdamW, "step", recorded)
        rates = ["--lr-projector", 5e-3, "--lr-vision", 2e-4]
        run(demo_folder, tmp_path / "run", *SMALL, "--tune", "full", *rates)
    trained, begun = begun.pop("now"), {name: p.requires_grad_() for name, p in begun.items() if name != "now"}
    parts = [[], [], []]
    for name in begun:
        parts[next((i for i, part in enumerate(RATES) if f".{part}." in f".{name}"), 2)].append(name)
    assert all(parts)
    groups = []
    for names, rate in zip(parts, [*RATES.values(), 1e-3], strict=True):
        for matrices, decay in ((True, 0.1), (False, 0.0)):
            params = [begun[name] for name in names if (begun[name].ndim > 1) == matrices]
            groups.append({"params": params, "lr": rate, "weight_decay": decay})
    theirs = torch.optim.AdamW(groups)
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda i: ([*lines, lines[-1]])[i]["lr"] / 1e-3)
    assert len(taken) == len(lines) == 3
    for gradients in taken:
        for name, parameter in begun.items():
            parameter.grad = gradients.get(name)
        theirs.step()
        schedule.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach(), begun[name].detach(), rtol=1e-6, atol=1e-8)
    counts = [sum(begun[name].numel() for name in names) for names in parts]
    text = capsys.readouterr().out
    assert f"projector 0.005 ({counts[0]:,} parameters)" in text and f"vision 0.0002 ({counts[1]:,} " in text
    assert f"all others 0.001 ({counts[2]:,} parameters)" in text


def test_rates_that_are_the_common_one_change_nothing(demo_folder, tmp_path):
    run(demo_folder, tmp_path / "without", *SMALL)
    run(demo_folder, tmp_path / "with", *SMALL, "--lr-projector", 1e-3)
    one, other = (read_tensors(tmp_path / name / "adapter") for name in ("without", "with"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_adapters_within_a_part_learn_at_its_rate_and_the_merger_is_no_part_of_the_tower(qwen_folder, tmp_path, capsys):
    rates = ["--lora-vision", "--lora-r", 16, "--lr-vision", 1e-4, "--lr-projector", 1e-5]
    run(qwen_folder, tmp_path, "--check", *rates, script=train_qwen2vl_sentinel)
    layer = (64 + 192) + (64 + 64) + (64 + 128) + (128 + 64)  # in and out of qkv, proj and the MLP, of three layers
    merger = (256 + 256) + (256 + 128)
    text = f"vision 0.0001 ({16 * 3 * layer:,} parameters), projector 1e-05 ({16 * merger:,} parameters), all others"
    assert f"learning rates: {text} 0.0002 (" in capsys.readouterr().out


def test_a_rate_of_what_is_not_trained_is_refused(demo_folder, tmp_path, capsys):
    for mode in ([], ["--check"]):
        text = refused(demo_folder, tmp_path / "run", *SMALL, "--lr-vision", 1e-4, *mode)
        assert text == "--lr-vision: nothing of the vision part is trained (--tune lora); leave it out"
    with pytest.raises(SystemExit, match="2"):
        train_llava_med.parse_arguments(["--model", "M", "--data", "D", "--out", "R", "--lr", "0", "--lr-vision", "0"])
    assert "--lr 0: other rates are multiples of it; give it above 0" in capsys.readouterr().err
