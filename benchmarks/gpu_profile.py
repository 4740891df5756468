"""Where a step's time goes on a GPU, and what each change would save: numbers to decide by, in five minutes.

    python benchmarks/gpu_profile.py --json runs/gpu_profile.json     # exit 0 without a GPU
    python benchmarks/gpu_profile.py --rehearse                       # the same code on a CPU, with tiny shapes

train_llava_med.py's model in LLaVA-Med-7B's shape, random bf16 weights made on the device, LoRA r = 16; a step is
forward and backward over one sequence of four images with nine questions each. One that fails leaves its error in the
JSON. Parts: milliseconds by operation and shapes; matrix products alone (the ceiling), and with their adapters; each
change alone and together: speed, memory, gradients against those of the step as it is; a token step of answering;
images a sequence; the first steps of lengths that were not seen before; what the trainer does around the model.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu

import common
import train_llava_med
from runtime import ranks
from runtime.batches import to_device

VISIBLE, FLEX = common.visible, torch.compile(flex_attention)


def blocks(document, branch, last=None):
    d, b, tokens = document[0], branch[0], document.shape[1]

    def rule(_batch, _head, q, k):
        return (d[q] == d[k]) & (q >= k) & ((b[k] == 0) | (b[k] == b[q]))

    return create_block_mask(rule, None, None, tokens, tokens, device=document.device)


def by_flex(module, query, key, value, mask, scaling=None, **_):
    attend = FLEX if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    if not query.is_cuda:  # where it has no backward
        query, key, value = query.detach(), key.detach(), value.detach()
    return attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2), None


transformers.AttentionInterface.register("flex", by_flex)
# what common.visible becomes, and the attention function
ATTENTION = {"sdpa": (VISIBLE, "sdpa"), "flex": (blocks, "flex")}
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"
NORM = transformers.models.mistral.modeling_mistral.MistralRMSNorm
REPLACED = {  # name: (owner, attribute, function)
    "no adapter": (common.LoRALinear, "forward", lambda layer, x: layer.base_layer(x)),
    "compiled norm": (NORM, "forward", torch.compile(NORM.forward, backend=BACKEND, dynamic=True)),
}
AS_NOW, FASTEST = ((), {}), ((), {"attention": "flex", "compiled": True})  # (names, what else `changed` takes)
VARIANTS = [AS_NOW, ((), {"cudnn": False}), ((), {"attention": "flex"}), (("compiled norm",), {})]
VARIANTS += [(("no autocast",), {}), (("no adapter",), {}), FASTEST]
VARIANTS += [(("compiled norm", "no autocast"), {"attention": "flex"})]


@contextmanager
def changed(bench, *names, attention="sdpa", cudnn=True, compiled=None, layers=None):
    """The model with some of its code replaced; yields whether a step runs under autocast."""
    model, decoder = bench.model, bench.model.decoder
    with ExitStack() as stack:
        stack.callback(model.zero_grad)
        places = [REPLACED[name] for name in names if name in REPLACED]
        places += [(common, "visible", ATTENTION[attention][0])]
        places += [(decoder.config, "_attn_implementation_internal", ATTENTION[attention][1])]
        places += [(decoder.config, "num_hidden_layers", layers or len(decoder.layers))]
        if "no autocast" in names:  # but for the projector, whose weights are float32
            inner = torch.autocast(bench.device.type, torch.bfloat16)(model.image_features)
            places.append((model, "image_features", inner))
        for place in places:
            stack.enter_context(mock.patch.object(*place))
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if compiled is not None:
            torch._dynamo.reset()  # replaced methods are not noticed
        for layer in decoder.layers if compiled is not None else []:  # compiled for any length, or for one
            layer.compile(dynamic=compiled, backend=BACKEND)
            stack.callback(setattr, layer, "_compiled_call_impl", None)
        yield "no autocast" not in names


class Bench:
    def __init__(self, args, device):
        self.device, self.file, self.ends = device, args.json, time.perf_counter() + 60 * args.minutes
        self.found, self.failed, self.large = [], False, device.type == "cuda"
        self.edge, self.images, self.questions, self.rounds = (336, 4, 9, 2) if self.large else (56, 2, 3, 1)
        config = gpu.llava_config(device)
        config.vision_config.image_size = self.edge
        vlm = gpu.drawn(transformers.LlavaForConditionalGeneration, config, device)
        train_llava_med.choose_trained(vlm, gpu.settings(train_llava_med))
        self.model, self.adapters = train_llava_med.LlavaMed(vlm).train(), list(common.lora_layers(vlm).values())
        for layer in self.adapters:  # at zero, A would have no gradient to compare
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        self.trained = [p for p in vlm.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.model.decoder.parameters())
        self.first = self.batch(self.questions, self.images)
        self.reference = self.gradients(self.first, True)  # of the step as it is
        torch._dynamo.config.recompile_limit = 64

    def batch(self, questions: int, images: int) -> dict:
        trees = gpu.trees_of(images, questions, 32000, (self.edge // 14) ** 2, 32000)
        [batch] = common.pack(trees, sum(map(len, trees)))
        batch["pixel_values"] = torch.randn(images, 3, self.edge, self.edge, dtype=torch.bfloat16)
        return to_device(batch, self.device)

    def step(self, batch: dict, autocast: bool = True) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            loss, _ = self.model(batch)
        (loss / sum(tree.supervised() for tree in batch["prompts"])).backward()

    def clock(self, function, rounds: int | None = None, warm: int = 2) -> float:
        """Median milliseconds."""
        times = []
        for _ in range(warm + (rounds or self.rounds)):
            torch.cuda.synchronize() if self.large else None
            begun = time.perf_counter()
            function()
            torch.cuda.synchronize() if self.large else None
            times.append(1000 * (time.perf_counter() - begun))
        return round(statistics.median(times[warm:]), 4)

    def gradients(self, batch: dict, autocast: bool) -> torch.Tensor:
        self.model.zero_grad()
        self.step(batch, autocast)
        return torch.cat([p.grad.flatten().float().cpu() for p in self.trained if p.grad is not None])

    def measure(self, batch: dict, *names, **switches) -> dict:
        """Seconds, peak and utilisation of a step; its gradients against the first ones, and whether equal twice."""
        tokens, questions, found = batch["input_ids"].shape[1], sum(len(tree.ids) for tree in batch["prompts"]), {}
        with changed(self, *names, **switches) as autocast:
            grads = self.gradients(batch, autocast)
            if batch is self.first and len(grads) == len(self.reference):  # without adapters there are fewer
                found["gradients_differ_by"] = float((grads - self.reference).norm() / self.reference.norm())
                found["same_twice"] = torch.equal(grads, self.gradients(batch, autocast))
            found |= gpu.timed(lambda: self.step(batch, autocast), self.device, self.rounds)
        found["utilisation"] = 4 * self.size * tokens / found["seconds"] / gpu.PEAK_FLOPS["H100"]
        return {**found, "tokens": tokens, "questions_per_s": questions / found["seconds"]}

    def tried(self, part: str, name: str, function, *args, **kwargs) -> None:
        """What the function returns is kept in the JSON; or its error."""
        begun = time.perf_counter()
        try:
            if begun > self.ends:
                raise TimeoutError("no time left")
            entry = function(*args, **kwargs)
        except Exception as error:
            entry, self.failed = {"error": repr(error)[:600], "where": traceback.format_exc()[-1500:]}, True
        self.model.train()
        gc.collect()
        torch.cuda.empty_cache() if self.large else None
        self.found.append({"part": part, "name": name, "took_s": round(time.perf_counter() - begun, 2), **entry})
        print(json.dumps({k: v for k, v in self.found[-1].items() if k != "operations"}), flush=True)
        if self.file:
            device = torch.cuda.get_device_name() if self.large else "CPU, rehearsal"
            about = {"device": device, "torch": torch.__version__, "results": self.found}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(about, indent=1) + "\n")


# ---- parts: each takes the bench, tries what it is about, and returns nothing ----------------------------------------


def profile(bench: Bench) -> None:
    def once() -> dict:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * bench.large
        wall = bench.clock(lambda: bench.step(bench.first))
        with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
            bench.step(bench.first)
            torch.cuda.synchronize() if bench.large else None
        rows, field = [], "self_device_time_total" if bench.large else "self_cpu_time_total"
        for row in seen.key_averages(group_by_input_shape=True):
            if getattr(row, field) and row.device_type == torch.autograd.DeviceType.CPU:
                rows.append((getattr(row, field) / 1000, row.count, row.key[:80], str(row.input_shapes)[:160]))
        return {"wall_ms": wall, "busy_ms": sum(ms for ms, *_ in rows), "operations": sorted(rows, reverse=True)[:100]}

    bench.tried("profile", "as now", once)


def roofline(bench: Bench) -> None:
    """TFLOP/s of the seven projections of all layers, forward and the input's gradient, without and with adapters."""
    weights = [layer.base_layer.weight for layer in bench.adapters]

    def at(rows: int) -> dict:
        xs = {n: torch.randn(rows, n, device=bench.device, dtype=torch.bfloat16) for w in weights for n in w.shape}

        def bare():
            for weight in weights:
                (xs[weight.shape[1]] @ weight.T, xs[weight.shape[0]] @ weight)

        def adapted():
            for layer, weight in zip(bench.adapters, weights, strict=True):
                layer(xs[weight.shape[1]].detach().requires_grad_()).backward(xs[weight.shape[0]])

        flops = 4 * rows * sum(weight.numel() for weight in weights)
        return {f.__name__: round(flops / bench.clock(f) / 1e9, 1) for f in (bare, adapted)}

    for rows in (1024, 3864, 8192) if bench.large else (64,):
        bench.tried("roofline", f"{rows} rows", at, rows)


def variants(bench: Bench) -> None:
    for names, switches in VARIANTS:
        bench.tried("variants", f"{names} {switches}", bench.measure, bench.first, *names, **switches)


def decode(bench: Bench) -> None:
    trees = [common.answering_prompt(tree) for tree in bench.first["prompts"]]
    batch = to_device(common.pack(trees, sum(map(len, trees)))[0], bench.device)
    batch["pixel_values"], steps = bench.first["pixel_values"], 9 if bench.large else 4

    def read(input_ids, position_ids, mask, cache):
        return bench.model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else batch)

    @torch.no_grad()
    def answering(*names) -> dict:
        bench.model.eval()
        ours = partial(common.decode, read, bench.model.lm_head, batch, -1)
        with changed(bench, *names), torch.autocast(bench.device.type, torch.bfloat16):
            reading = bench.clock(lambda: ours(1), 1, 1)
            step = (bench.clock(lambda: ours(steps), 1, 0) - reading) / (steps - 1)
        return {"reading_ms": reading, "step_ms": step, "questions": len(batch["ends"])}

    for names in ((), ("no adapter",), ("compiled norm",)):  # without adapters as fast as with merged ones
        bench.tried("decode", "".join(names) or "as now", answering, *names)


def packs(bench: Bench) -> None:
    for names, switches in (AS_NOW, FASTEST):
        for images in (1, 2, 8) if bench.large else (1,):
            name, batch = f"{images} images {names} {switches}", bench.batch(bench.questions, images)
            bench.tried("packs", name, bench.measure, batch, *names, **switches)


def lengths(bench: Bench) -> None:
    """Milliseconds of the first three steps with lengths that were not seen before, few layers."""

    def new(*names, **switches) -> dict:
        found = {}
        with changed(bench, *names, layers=4 if bench.large else 1, **switches) as autocast:
            for questions, images in ((7, 3), (3, 4), (5, 2), (8, 3)) if bench.large else ((2, 1),):
                step = partial(bench.step, bench.batch(questions, images), autocast)
                found[f"{images} images, {questions} questions"] = [bench.clock(step, 1, 0) for _ in range(3)]
        return found

    for names, switches in (*VARIANTS[:3], FASTEST):
        bench.tried("lengths", f"{names} {switches}", new, *names, **switches)


def around(bench: Bench) -> None:
    def each() -> dict:
        found, seen = {}, (bench.first["document"], bench.first["branch"])
        bench.step(bench.first)
        for quick in (False, True):
            optimizer = torch.optim.AdamW(bench.trained, lr=1e-9, fused=quick)
            found[f"AdamW{', fused' * quick}"] = bench.clock(optimizer.step)
        found["clip"] = bench.clock(lambda: ranks.clip_gradients(bench.trained, 1.0))
        return found | {f"mask, {kind}": bench.clock(partial(make, *seen)) for kind, (make, _) in ATTENTION.items()}

    bench.tried("around", "a step", each)


PARTS = {part.__name__: part for part in (profile, roofline, variants, decode, packs, lengths, around)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there, after every experiment")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes; exit 1 after an error")
    parser.add_argument("--minutes", type=float, default=5, help="what comes later is left out (default: 5)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        print("torch sees no GPU here: nothing measured")
        return
    bench = Bench(args, torch.device("cpu" if args.rehearse else "cuda"))
    for part in args.parts:
        PARTS[part](bench)
    sys.exit(int(bench.failed and args.rehearse))


if __name__ == "__main__":
    main()
