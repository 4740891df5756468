"""The contract put to the test on any script: python -m inputs.contract SCRIPT.py --model … --data … [its flags]

The script runs as a user starts it, three steps on a few examples in float32, in a folder that is removed afterwards;
the contract looks on where its main() calls shared code (data_check.check, shards.place, models.write_final), and
reads nothing of the script but its Task and its model. It says of each point whether it holds:

    task        every method that a script must give is there
    data        the data check passes
    loss        the loss of an example alone is that of the model's own forward in transformers
    packing     loss and gradients of packed sequences are those of single examples
    training    a step changes what is declared as trained, all of it and nothing else
    adapter     what was saved opens again, with the same logits
    merged      --merge writes a folder that opens again, with the same logits
"""

import io
import runpy
import sys
import tempfile
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from inputs import data_check, own_forward, show
from inputs.features import digest_of
from inputs.task import Task
from runtime import models, shards

MUST_GIVE = ("encode", "placeholders", "measure", "read_media")
FEW = 8  # examples that are trained on
CLOSE = 1e-5  # relative difference of losses and logits in float32
GRADIENTS = 1e-3  # and of gradients, which sum up more rounding
PLACES = {"check": data_check, "place": shards, "write_final": models, "count": models}  # where calls are watched
FLAGS = f"--limit {FEW} --questions-per-step {FEW} --epochs 3 --max-steps 3 --dtype fp32 --workers 0".split()


class Broken(Exception):
    """A point of the contract that does not hold: (point, what is wrong and where to look)."""


class Contract:
    """What has been seen of a script so far: its task, run, examples, trees and model, and the points that hold."""

    def __init__(self, script: Path, flags: list[str], folder: Path):
        self.script, self.flags, self.folder, self.seen = script, flags, folder, SimpleNamespace()
        self.out = sys.stdout  # what the script prints goes elsewhere
        self.before, self.logits = {}, None  # digests of all tensors, and logits, before and after training

    def holds(self) -> bool:
        """Test all points in order, each with a line; the first that is broken ends it."""
        try:
            self.task_and_data()
            self.training()
            self.adapter()
            self.merged()
        except Broken as broken:
            point, text = broken.args
            self.say(point, f"BROKEN: {text}")
            return False
        return True

    def say(self, point: str, text: str) -> None:
        print(f"  {point:<10} {text}", file=self.out, flush=True)

    # ---- the phases: each starts the script once ----

    def task_and_data(self) -> None:
        def check(original, examples, problems, task, run):
            kind = type(task).__name__
            missing = [name for name in MUST_GIVE if not hasattr(task, name)]
            if not isinstance(task, Task) or missing:
                raise Broken("task", f"{kind} does not give {', '.join(missing) or 'a Task'}; see inputs/task.py")
            self.say("task", f"{kind} gives {', '.join(MUST_GIVE)}")
            return self.keep_data(original, examples, problems, task, run)

        self.start("data", ["--check", "--out", self.folder / "check"], check=check)
        number = sum(map(len, self.seen.examples.values()))
        self.say("data", f"the data check passes: {number} examples")
        splits = [split for split in ("test", "val", "train") if self.seen.examples[split]]
        # of each kind one (such as the same modalities), then two of each tree
        kinds = {self.seen.task.kind(e): e.id for e in reversed(self.seen.examples["train"])}
        pairs = [name for tree in self.seen.trees["train"][:FEW] for name in tree.ids[:2]]
        (self.folder / "ids").write_text("\n".join(list(dict.fromkeys([*kinds.values(), *pairs]))[:FEW]) + "\n")
        self.run_flags = [*FLAGS, "--no-report", "--only-ids", self.folder / "ids", "--eval-split", splits[0]]
        self.run_flags += ["--out", self.folder / "run"]

    def training(self) -> None:
        def place(original, model, run):
            original(model, run)
            self.seen.model, self.seen.run = model, run
            self.compare_loss()
            self.compare_packing()
            self.before = digests(model.vlm)

        def write_final(original, load_model, folder, task, run):
            if self.before:  # else main() has called no `place`, which `start` says
                self.compare_training()
                self.logits = self.read_logits(self.seen.model)
            return original(load_model, folder, task, run)

        self.start("training", self.run_flags, check=self.keep_data, place=place, write_final=write_final)

    def adapter(self) -> None:
        def place(original, model, run):
            original(model, run)
            self.same_logits("adapter", self.read_logits(model), f"opens again from {run.checkpoint.name}")
            raise SystemExit(0)  # answering has been seen already

        self.start("adapter", [*self.run_flags, "--eval-only"], place=place)

    def merged(self) -> None:
        def count(original, load_model, folder, task, run):
            model = load_model(folder, task, torch.float32)
            model.to(self.seen.run.device)
            self.same_logits("merged", self.read_logits(model), "the merged folder opens again")

        target = self.folder / "merged"
        self.start("merged", [*self.run_flags, "--merge", target])
        again = ["--model", target, "--check", "--out", self.folder / "again"]
        self.start("merged", again, own_flags=[], count=count)

    def compare_loss(self) -> None:
        seen, by_id = self.seen, {example.id: example for example in self.seen.examples["train"]}
        name, kinds = type(seen.model.vlm).__name__, {}  # of each kind one, texts alone first
        for tree in sorted(seen.trees["train"], key=lambda tree: bool(tree.media)):
            kinds.setdefault((bool(tree.media), seen.task.kind(by_id[tree.ids[0]])), tree)
        for tree in kinds.values():
            ours, own, grafted = own_forward.losses(seen.model, tree, seen.task, by_id[tree.ids[0]], seen.run)
            if not abs(ours - own) <= CLOSE * max(1.0, abs(own)):
                text = "loss differs from the model's own forward"
                text += f": {ours:.6f}, {name}.forward of transformers {own:.6f}"
                advice = "Compare `hidden` with it: positions, masks, features, or what else"
                raise Broken("loss", f"{text} (example {tree.ids[0]}). {advice}")
        text = f"{ours:.6f}, that of {name}.forward ({own:.6f})"
        self.say("loss", text + (f", the features at {', '.join(grafted)} being the script's own" if grafted else ""))

    def compare_packing(self) -> None:
        seen = self.seen
        loss, gradients = own_forward.packing(seen.model, seen.trees["train"][:3], seen.task, seen.run)
        if not (loss <= CLOSE and gradients <= GRADIENTS):
            text = f"packed sequences differ from single examples: loss by {loss:.1e}, gradients by {gradients:.1e}. "
            raise Broken("packing", f"{text}The order of media, positions and mask must be those of `batch`")
        self.say("packing", f"packed equals unpacked: loss to {loss:.0e}, gradients to {gradients:.0e}")

    def compare_training(self) -> None:
        vlm, after = self.seen.model.vlm, digests(self.seen.model.vlm)
        trained = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
        changed = {name for name in after if after[name] != self.before[name]}
        if changed - trained:
            text = f"a step changes what is frozen: {show.shorten(', '.join(sorted(changed - trained)))}"
            raise Broken("training", text)
        if trained - changed:
            text = f"trained, but three steps do not change it: {show.shorten(', '.join(sorted(trained - changed)))}"
            raise Broken("training", f"{text}. The model does not read it, or it is cut off from the loss")
        frozen = len(after) - len(trained)
        self.say("training", f"steps change all {len(trained)} trained tensors, and none of {frozen} others")

    def same_logits(self, point: str, found: torch.Tensor, text: str) -> None:
        difference = float((found - self.logits).abs().max() / self.logits.abs().max().clamp(min=1.0))
        if not difference <= CLOSE:
            raise Broken(point, f"{text}, but its logits differ from those of the trained model by {difference:.1e}")
        self.say(point, f"{text} with the same logits (to {difference:.0e})")

    def keep_data(self, original, examples, problems, task, run) -> tuple[dict, dict]:
        self.seen.task = task
        self.seen.examples, self.seen.trees = original(examples, problems, task, run)
        return self.seen.examples, self.seen.trees

    def read_logits(self, model) -> torch.Tensor:
        return own_forward.logits(model, self.seen.trees["train"][:3], self.seen.task, self.seen.run)

    def start(self, point: str, flags: list, own_flags: list[str] | None = None, **watched) -> None:
        """The script as a user starts it; `watched` see calls of shared functions, and are given the original."""
        argv = [str(flag) for flag in [*(self.flags if own_flags is None else own_flags), *flags]]
        log, calls = io.StringIO(), {}
        with ExitStack() as stack:
            for name, function in watched.items():
                instead = partial(function, getattr(PLACES[name], name))
                calls[name] = stack.enter_context(patch.object(PLACES[name], name, side_effect=instead))
            stack.enter_context(patch.object(sys, "argv", [str(self.script), *argv]))
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(redirect_stderr(log))
            try:
                runpy.run_path(str(self.script), run_name="__main__")
            except Broken:
                raise
            except SystemExit as end:
                if end.code:
                    raise Broken(point, f"{' '.join(argv)}\n{log.getvalue()[-3000:]}\n{end.code}") from None
            except Exception:
                raise Broken(point, f"{' '.join(argv)}\n{traceback.format_exc()}") from None
        for name in [name for name, seen in calls.items() if not seen.called]:
            raise Broken(point, f"main() does not call {PLACES[name].__name__}.{name}, as every script does")


def digests(module: torch.nn.Module) -> dict[str, str]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: digest_of(name, {"": tensor.detach()}) for name, tensor in tensors}


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-") or not Path(argv[0]).is_file():
        raise SystemExit(__doc__)
    print(f"the contract of {argv[0]}:")
    with tempfile.TemporaryDirectory(prefix="contract-", ignore_cleanup_errors=True) as folder:
        if not Contract(Path(argv[0]), argv[1:], Path(folder)).holds():
            raise SystemExit(1)
    print("the contract holds")


if __name__ == "__main__":
    main(sys.argv[1:])
