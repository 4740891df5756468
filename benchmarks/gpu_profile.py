"""Where a step's time goes on a GPU, and what each change would save: numbers to decide by, in five minutes.

    python benchmarks/gpu_profile.py --json runs/gpu_profile.json     # exit 0 without a GPU
    python benchmarks/gpu_profile.py --rehearse                       # the same code on a CPU, with tiny shapes

train_llava_med.py's model in LLaVA-Med-7B's shape, random bf16 weights made on the device, LoRA r = 16; a step is
forward and backward over one sequence of four images. Every experiment has a time limit; one that fails leaves its
error in the JSON. Parts, by value: milliseconds by kind of operation, and time without work; matrix products alone (the
ceiling); each change alone and together; the fastest in detail; a token step of answering; images a sequence; further
changes; lengths not seen before; the trainer's step around the model; four questions and one.
"""

import argparse
import gc
import itertools
import json
import re
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu

import common
import train_llava_med
from runtime import ranks

CUDA, HELD = torch.cuda.is_available(), {}  # held: what an attention function needs and a mask cannot hold
VISIBLE, FLEX = common.visible, torch.compile(flex_attention)
PARTS = ["profile", "roofline", "variants", "best", "decode", "packs", "more", "lengths", "around", "few"]

# ---- changes: what common.visible becomes, and the attention function ------------------------------------------------


def additive(document, branch, last=None):
    seen = VISIBLE(document, branch, last)
    return torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)


def runs(document, branch) -> list[tuple[int, int, int, int]]:
    """(document, branch, first token, the one after the last) of every prefix and branch."""
    names, counts = torch.unique_consecutive(torch.cat([document, branch]), dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return list(zip(*names.tolist(), [0, *ends[:-1]], ends, strict=True))


def cuts(document, branch, last=None, parts=False):
    """(queries, keys, mask) of each document; with parts its prefix, causal without a mask, then its branches."""
    HELD["cuts"] = []
    for _, of_one in itertools.groupby(runs(document, branch), lambda run: run[0]):
        (_, _, start, begin), *_, (_, _, _, end) = of_one
        seen = additive(document[:, start:end], branch[:, start:end])
        HELD["cuts"] += [(slice(start, begin), slice(start, begin), None)] * parts
        begin = begin if parts else start
        HELD["cuts"].append((slice(begin, end), slice(start, end), seen[:, :, begin - start :].contiguous()))
    return document.new_zeros(1, 1, 1, 1)


@torch.compiler.disable
def by_cuts(module, query, key, value, mask, **kwargs):
    each = [(query[:, :, q], key[:, :, k], value[:, :, k], seen) for q, k, seen in HELD["cuts"]]
    return torch.cat([sdpa_attention_forward(module, *one, **kwargs)[0] for one in each], dim=1), None


def gathered(document, branch, last=None):
    """Every prefix and branch a sequence of its own; a branch's keys are its prefix's and its own."""
    prefix, keys, lengths = {}, [], [(0, 0)]
    for d, b, start, end in runs(document, branch):
        own = list(range(start, end))
        keys += (seen := [*prefix.get(d, []), *own])
        lengths.append((len(own), len(seen)))
        prefix |= {d: own} if b == 0 else {}
    ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32).T.contiguous().to(document.device)
    HELD["gathered"] = torch.tensor(keys, device=document.device), *ends, *map(max, zip(*lengths, strict=True))
    return document.new_zeros(1, 1, 1, 1)


@torch.compiler.disable
def by_flash(module, query, key, value, mask, scaling=None, **_):
    index, ends_q, ends_k, longest_q, longest_k = HELD["gathered"]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, width)
    k, v = k.index_select(0, index), v.index_select(0, index)
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scaling, window_size=(-1, 0))
        return out.unsqueeze(0), None
    found = []
    for (a, c), (b, d) in itertools.pairwise(zip(ends_q.tolist(), ends_k.tolist(), strict=True)):
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))[None, None]
        one = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        found.append(sdpa_attention_forward(module, *one, seen, scaling=scaling)[0])
    return torch.cat(found, dim=1), None


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


ATTENTION = {"sdpa": (VISIBLE, "sdpa"), "additive": (additive, "sdpa"), "documents": (cuts, "cuts")}
ATTENTION |= {"parts": (partial(cuts, parts=True), "cuts"), "flash": (gathered, "flash"), "flex": (blocks, "flex")}
for kind, function in {"cuts": by_cuts, "flash": by_flash, "flex": by_flex}.items():
    transformers.AttentionInterface.register(kind, function)

# ---- changes: everything else ----------------------------------------------------------------------------------------


class Adapter(torch.autograd.Function):
    """W x + scaling B A x and its gradients, the adapter's share added within its matrix product."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        flat, a, b = x.flatten(0, -2), a.to(x.dtype), (b * scaling).to(x.dtype)
        ctx.save_for_backward(flat, weight, a, b, inner := flat @ a.T)
        ctx.scaling = scaling
        return (flat @ weight.T).addmm_(inner, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        (flat, weight, a, b, inner), rows = ctx.saved_tensors, grad.flatten(0, -2)
        d_inner = rows @ b
        d_x = (rows @ weight).addmm_(d_inner, a).view(*grad.shape[:-1], -1)
        return d_x, None, (d_inner.T @ flat).float(), (rows.T @ inner).float() * ctx.scaling, None


def fused(layer, x):
    return Adapter.apply(x, layer.base_layer.weight, layer.lora_A, layer.lora_B, layer.scaling)


def addmm(layer, x):
    y, inner = layer.base_layer(x), x.flatten(0, -2) @ layer.lora_A.to(x.dtype).T
    return y.flatten(0, -2).addmm(inner, layer.lora_B.to(x.dtype).T, alpha=layer.scaling).view(y.shape)


def loss_at(hidden, lm_head, labels):
    """supervised_loss without waiting for the GPU: the places of a length are looked up once."""
    if labels.shape not in HELD:
        HELD[labels.shape] = (labels[0, 1:] != common.IGNORE).nonzero()[:, 0]
    at = HELD[labels.shape]
    return F.cross_entropy(lm_head(hidden[0, at]).float(), labels[0, at + 1], reduction="sum"), len(at)


REPLACED = {  # name: (owner, attribute, function)
    "fused adapter": (common.LoRALinear, "forward", fused),
    "addmm adapter": (common.LoRALinear, "forward", addmm),
    "no adapter": (common.LoRALinear, "forward", lambda layer, x: layer.base_layer(x)),
    "fused norm": (transformers.models.mistral.modeling_mistral.MistralRMSNorm, "forward",
                   lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon).to(x.dtype)),
    "no waits": (common, "supervised_loss", loss_at),
    "no count": (common, "put_features", lambda embeds, ids, token, features, what="":
                           embeds.masked_scatter((ids == token).unsqueeze(-1), features.to(embeds.dtype))),
}  # fmt: skip


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
        torch.backends.cuda.matmul.allow_tf32 = "TF32" in names
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms("deterministic" in names, warn_only=True)
        if "bf16 adapters" in names:
            for p in [p for layer in bench.adapters for p in (layer.lora_A, layer.lora_B)]:
                stack.callback(setattr, p, "data", p.data)
                p.data = p.data.bfloat16()
        if "recomputed" in names:
            model.vlm.gradient_checkpointing_enable({"use_reentrant": False})
            stack.callback(model.vlm.gradient_checkpointing_disable)
        if compiled is not None and HELD.get("compiled") != (way := ({*names} - {"recomputed"}, attention, compiled)):
            torch._dynamo.reset()  # replaced methods are not noticed
            HELD["compiled"] = way
        for layer in decoder.layers if compiled is not None else []:  # compiled for any length, or for one
            layer.compile(dynamic=compiled, backend="inductor" if bench.large else "aot_eager")
            stack.callback(setattr, layer, "_compiled_call_impl", None)
        yield "no autocast" not in names


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, args, device):
        self.device, self.file, self.ends = device, args.json, time.perf_counter() + 60 * args.minutes
        self.found, self.failed, self.large = [], 0, device.type == "cuda"
        self.edge, self.images, self.rounds = (336, 4, 2) if self.large else (56, 2, 1)
        config = gpu.llava_config(device)
        config.vision_config.image_size = self.edge
        vlm = gpu.drawn(transformers.LlavaForConditionalGeneration, config, device)
        train_llava_med.choose_trained(vlm, gpu.settings(train_llava_med))
        self.model, self.adapters = train_llava_med.LlavaMed(vlm), list(common.lora_layers(vlm).values())
        for layer in self.adapters:  # at zero, A would have no gradient to compare
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        self.trained = [p for p in vlm.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.model.decoder.parameters())
        self.reference, self.best, self.eager, self.way = None, (float("inf"), (), {}), ((), {}), {}
        self.first = self.batch(9 if self.large else 3, self.images)
        self.shape = self.first["input_ids"].shape
        torch._dynamo.config.recompile_limit = 64
        self.model.train()
        signal.signal(signal.SIGALRM, self.late)

    def late(self, *_):
        raise TimeoutError("took longer than its limit")

    def batch(self, questions: int, images: int) -> dict:
        trees = gpu.trees_of(images, questions, 32000, (self.edge // 14) ** 2, 32000)
        [batch] = common.pack(trees, sum(map(len, trees)))
        batch["pixel_values"] = torch.randn(images, 3, self.edge, self.edge, dtype=torch.bfloat16)
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def step(self, batch: dict, autocast: bool = True) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            loss, _ = self.model(batch)
        (loss / sum(tree.supervised() for tree in batch["prompts"])).backward()
        return loss.detach()

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

    def gradients(self, batch, autocast) -> tuple[float, torch.Tensor]:
        for p in self.trained:
            p.grad = None
        loss = self.step(batch, autocast)
        return float(loss), torch.cat([p.grad.flatten().float() for p in self.trained if p.grad is not None])

    def measure(self, batch: dict, *names, **switches) -> dict:
        """Seconds, peak, utilisation of a step; its loss; gradients against the first ones, and equal twice?"""
        begun = time.perf_counter()
        with changed(self, *names, **switches) as autocast:
            loss, grads = self.gradients(batch, autocast)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found = {"loss": loss, "first_s": round(time.perf_counter() - begun, 3), "graphs_so_far": graphs}
            self.reference = grads.cpu() if self.reference is None else self.reference
            if len(grads) == len(self.reference) and batch["input_ids"].shape == self.shape:
                there = self.reference.to(self.device)
                found["gradients_differ_by"] = float((grads - there).norm() / there.norm())
                found["same_twice"] = torch.equal(grads, self.gradients(batch, autocast)[1])
                del there
            del grads
            found |= gpu.timed(lambda: self.step(batch, autocast), self.device, self.rounds)
        questions = sum(len(tree.ids) for tree in batch["prompts"])
        found["utilisation"] = 4 * self.size * batch["input_ids"].shape[1] / found["seconds"] / 989e12
        return {**found, "tokens": batch["input_ids"].shape[1], "questions_per_s": questions / found["seconds"]}

    def tried(self, part: str, name: str, function, *args, limit: float = 30, **kwargs) -> dict:
        """What the function returns, kept in the JSON; or its error."""
        begun, left = time.perf_counter(), self.ends - time.perf_counter()
        try:
            if left < 2:
                raise TimeoutError("no time left")
            signal.setitimer(signal.ITIMER_REAL, min(limit if self.large else 4 * limit, left))  # a CPU may be busy
            entry = function(*args, **kwargs)
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc()[-1500:]}
            self.failed = 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.model.train()
        gc.collect()
        torch.cuda.empty_cache() if self.large else None
        self.found.append({"part": part, "name": name, "took_s": round(time.perf_counter() - begun, 2), **entry})
        shown = {k: v for k, v in self.found[-1].items() if k not in ("operations", "kernels", "where")}
        print(json.dumps(shown), flush=True)
        if self.file:
            about = {"device": torch.cuda.get_device_name() if self.large else "CPU, rehearsal"}
            about |= {"torch": torch.__version__, "transformers": transformers.__version__, "results": self.found}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(about, indent=1) + "\n")
        return entry


# ---- parts -----------------------------------------------------------------------------------------------------------


def kind_of(op: str, shapes: str, tokens: int, patches: int) -> str:
    """The kind of an operation, by its name and its inputs' shapes."""
    sizes = set(re.findall(r"\d+", shapes))
    if sizes & {str(n * m) for n in (1, 4) for m in (patches, patches + 1)}:
        return "vision tower and projector"
    if re.search("attention|flash|flex|fmha|cudnn", op):
        return "attention"
    if f"{tokens}, {tokens}" in shapes:
        return "masks"
    if re.search(r"mm_?$|linear|Adapter", op):
        return "logits" if "32064" in sizes else "adapters' products" if "16" in sizes else "linear"
    kinds = {"softmax|nll|cross_entropy": "loss", "copy|clone|cat|index|Memcpy|scatter": "copies, casts",
             "zero|fill|Memset": "fills", "ompiled|triton|graph": "compiled"}  # fmt: skip
    return next((kind for names, kind in kinds.items() if re.search(names, op)), "norms, elementwise, sums")


def profile(bench: Bench, batch: dict, *names, **switches) -> dict:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * bench.large
    with changed(bench, *names, **switches) as autocast:
        wall = bench.clock(lambda: bench.step(batch, autocast))
        begun = time.perf_counter()  # until all is launched; what waits for the GPU within is in it
        bench.step(batch, autocast)
        launched = 1000 * (time.perf_counter() - begun)
        with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
            bench.step(batch, autocast)
            torch.cuda.synchronize() if bench.large else None
    busy, last, kernels, counts = 0.0, 0.0, Counter(), Counter()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA
              and not getattr(e, "is_user_annotation", False)]  # fmt: skip
    for event in sorted(events, key=lambda e: e.time_range.start):
        begins, last, before = event.time_range.start, max(last, event.time_range.end), last
        busy += max(0.0, event.time_range.end - max(before, begins)) / 1000
        kernels[event.name[:110]] += (event.time_range.end - begins) / 1000
        counts[event.name[:110]] += 1
    kinds, rows = Counter(), []
    for row in seen.key_averages(group_by_input_shape=True):
        spent = (row.self_device_time_total if bench.large else row.self_cpu_time_total) / 1000
        if spent and row.device_type == torch.autograd.DeviceType.CPU:
            shapes = str(row.input_shapes)
            kinds[kind_of(row.key, shapes, batch["input_ids"].shape[1], (bench.edge // 14) ** 2)] += spent
            rows.append((round(spent, 3), row.count, row.key[:80], shapes[:160]))
    found = {"wall_ms": wall, "launched_ms": launched, "busy_ms": busy, "idle_ms": wall - busy, "launches": len(events)}
    found |= {"tokens": batch["input_ids"].shape[1], "kinds_ms": dict(kinds.most_common())}
    found["kernels"] = [(round(ms, 3), counts[name], name) for name, ms in kernels.most_common(40)]
    return {**found, "operations": sorted(rows, reverse=True)[:70]}


def roofline(bench: Bench, rows: int) -> dict:
    """TFLOP/s of the seven projections of all layers, forward and the input's gradient, without and with adapters."""
    weights, found = [layer.base_layer.weight for layer in bench.adapters], {}
    xs = {n: torch.randn(rows, n, device=bench.device, dtype=torch.bfloat16) for w in weights for n in w.shape}

    def bare():
        for weight in weights:
            (xs[weight.shape[1]] @ weight.T, xs[weight.shape[0]] @ weight)

    def adapted(forward):
        for layer, weight in zip(bench.adapters, weights, strict=True):
            forward(layer, xs[weight.shape[1]].detach().requires_grad_()).backward(xs[weight.shape[0]])

    flops = 4 * rows * sum(weight.numel() for weight in weights)
    ways = {name: partial(adapted, way) for name, way in
            {"as now": common.LoRALinear.forward, "addmm": addmm, "fused": fused}.items()}  # fmt: skip
    for name, way in {"bare": bare, **ways}.items():
        found[name] = round(flops / bench.clock(way) / 1e9, 1)
    return found


def attempt(bench: Bench, *names, limit=30, **switches) -> None:
    name = ", ".join([*names, *(f"{k} {v}" for k, v in switches.items())]) or "as now"
    found = bench.tried("variants", name, bench.measure, bench.first, *names, limit=limit, **switches)
    if found.get("gradients_differ_by", 1) < 0.15 and found["seconds"] < bench.best[0]:
        bench.best = found["seconds"], names, switches


def variants(bench: Bench) -> None:
    attempt(bench)
    for kind in [*ATTENTION][1:]:
        attempt(bench, attention=kind, limit=60)
    bench.way = way = bench.best[2]
    for names in (("fused adapter",), ("addmm adapter",), ("fused norm",), ("no autocast",), ("no waits", "no count")):
        attempt(bench, *names)
    attempt(bench, "fused adapter", "fused norm", "no autocast", **way)
    attempt(bench, "fused adapter", "fused norm", "no autocast", "no waits", "no count", **way)
    bench.eager = bench.best[1:]
    attempt(bench, **way, compiled=True, limit=90)
    attempt(bench, "fused adapter", "no autocast", **way, compiled=True, limit=90)


def more(bench: Bench) -> None:
    for names, switches in (((), {}), bench.eager):
        attempt(bench, *names, **switches, layers=len(bench.model.decoder.layers) // 2)
        attempt(bench, *names, "recomputed", **switches)
    attempt(bench, "no adapter")
    attempt(bench, "bf16 adapters")
    attempt(bench, cudnn=False)
    attempt(bench, attention="additive", cudnn=False)
    attempt(bench, "deterministic", **bench.way)
    attempt(bench, "TF32")
    attempt(bench, **bench.way, compiled=False, limit=90)
    attempt(bench, "addmm adapter", "no autocast", **bench.way, compiled=True, limit=90)


@torch.no_grad()
def decode(bench: Bench) -> dict:
    """Milliseconds a token step of all questions in one sequence; with a cache of fixed size, and as a CUDA graph."""
    model, found, steps = bench.model.eval(), {}, 9 if bench.large else 4
    trees = [common.answering_prompt(tree) for tree in bench.first["prompts"]]
    [batch] = common.pack(trees, sum(map(len, trees)))
    batch = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    batch["pixel_values"], own, tokens = bench.first["pixel_values"], batch["ends"], batch["input_ids"].shape[1]
    room = tokens + len(own) * steps

    def read(input_ids, position_ids, mask, cache):
        return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else batch)

    def ours(limit):
        with torch.autocast(bench.device.type, torch.bfloat16):
            return common.decode(read, model.lm_head, batch, -1, limit)

    @torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False)
    def fixed(graph: bool) -> tuple[float, list]:
        cache = transformers.StaticCache(config=model.decoder.config, max_cache_len=room)
        seen = F.pad(VISIBLE(batch["document"], batch["branch"]), (0, room - tokens))
        hidden = model.hidden(batch["input_ids"], batch["position_ids"], seen, cache, batch)
        fed, mask, positions = model.lm_head(hidden[:, own]).argmax(-1), seen[:, :, own], batch["position_ids"][:, own]
        row = torch.arange(len(own), device=bench.device)
        at, answers, times, yes = row + tokens, [fed[0].tolist()], [], torch.ones_like(row, dtype=torch.bool)

        def token():
            mask[0, 0].index_put_((row, at), yes)
            positions.add_(1)
            at.add_(len(own))
            fed.copy_(model.lm_head(model.hidden(fed, positions, mask, cache)).argmax(-1))

        for i in range(steps - 1):
            if i == 1 and graph:  # captured, not run
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    token()
            times.append(bench.clock(captured.replay if graph and i else token, 1, 0))
            answers.append(fed[0].tolist())
        return statistics.median(times[1:]), [list(answer) for answer in zip(*answers, strict=True)]

    for name in ((), ("no adapter",), ("fused norm",)):  # without adapters as fast as with merged ones
        with changed(bench, *name):
            key, first = "".join(name), bench.clock(lambda: ours(1), 1, 1)
            step = (bench.clock(lambda: ours(steps), 1, 0) - first) / (steps - 1)
            found |= {f"{key} reading": first, f"{key} step": step}
            answers = [token for answer in ours(steps) for token in answer]
            for graph in (False, True)[: 1 + bench.large]:
                found[f"{key} {'graph' if graph else 'fixed'}"], other = fixed(graph)
                same = sum(a == b for a, b in zip(answers, itertools.chain(*other), strict=True))
                found[f"{key} {'graph' if graph else 'fixed'}, same tokens"] = f"{same} of {len(answers)}"
    return {**found, "questions": len(own), "tokens": tokens}


def packs(bench: Bench) -> None:
    for names, switches in {str(way): way for way in (((), {}), bench.eager, bench.best[1:])}.values():
        for images, recomputed in ((2, 0), (8, 0), (1, 0), (8, 1), (16, 1)) if bench.large else ((1, 1),):
            given = (*names, *(("recomputed",) * recomputed))
            name = f"{images} images, {', '.join(map(str, [*given, *switches.items()]))}"
            bench.tried("packs", name, bench.measure, bench.batch(9, images), *given, limit=60, **switches)


def lengths(bench: Bench, names, switches) -> dict:
    """Milliseconds of the first three steps with lengths that were not seen before, few layers."""
    found = {}
    with changed(bench, *names, **{**switches, "layers": 4 if bench.large else 1}) as autocast:
        for questions, images in ((7, 3), (3, 4), (5, 2), (8, 3)) if bench.large else ((2, 1),):
            batch = bench.batch(questions, images)
            steps = [bench.clock(lambda b=batch: bench.step(b, autocast), 1, 0) for _ in range(3)]
            found[f"{batch['input_ids'].shape[1]} tokens"] = steps
    return found


def around(bench: Bench) -> dict:
    found, model, pixels = {}, bench.model, bench.first["pixel_values"]
    bench.step(bench.first)
    for quick in (False, True):
        optimizer = torch.optim.AdamW(bench.trained, lr=1e-9, fused=quick)
        found[f"AdamW{', fused' * quick}"] = bench.clock(optimizer.step)
    found["clip"] = bench.clock(lambda: ranks.clip_gradients(bench.trained, 1.0))
    found["model.train()"] = bench.clock(model.train)
    d, b = bench.first["document"], bench.first["branch"]
    found |= {f"mask, {kind}": bench.clock(partial(make, d, b)) for kind, (make, _) in ATTENTION.items()}
    with torch.autocast(bench.device.type, torch.bfloat16):
        found["tower and projector"] = bench.clock(lambda: model.image_features(pixels))
        found["forward"] = bench.clock(lambda: model(bench.first))
        with torch.no_grad():
            found["tower without gradients"] = bench.clock(lambda: model.vlm.model.vision_tower(pixels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there, after every experiment")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes; exit 1 after an error")
    parser.add_argument("--minutes", type=float, default=5, help="what comes later is left out (default: 5)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="(default: all)")
    args = parser.parse_args()
    if not (CUDA or args.rehearse):
        print("torch sees no GPU here: nothing measured")
        return
    bench = Bench(args, torch.device("cpu" if args.rehearse else "cuda"))
    for part in args.parts:
        if part in ("variants", "more", "packs"):
            globals()[part](bench)
        elif part in ("decode", "around"):
            bench.tried(part, part, globals()[part], bench)
        elif part == "roofline":
            for rows in (1024, 2048, 3864, 4096, 8192) if bench.large else (64,):
                bench.tried(part, f"{rows} rows", roofline, bench, rows)
        elif part == "lengths":
            ways = [((), {"attention": kind}) for kind in ATTENTION] + [((), {"cudnn": False}), bench.best[1:]]
            for names, switches in ways:
                bench.tried(part, f"{names} {switches}", lengths, bench, names, switches, limit=60)
        else:
            names, switches = bench.best[1:] if part == "best" else ((), {})
            for questions in (4, 1) if part == "few" else (9,):
                batch = bench.batch(questions if bench.large else 2, bench.images)
                bench.tried(part, f"{questions} questions", profile, bench, batch, *names, limit=60, **switches)
    if args.rehearse and bench.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
