"""Fine-tune a LLaVA on conversations about brain MRI: its vision embeddings are replaced by 3D and 4D patch embeddings.

A conversation, one file DATA/{train,validation,test}/NAME.json in UMBRELLA's layout (paths are relative to DATA):

    {"task_type": "sex", "subject_ids": ["sub-07"], "images": [{"path": "sub-07_T1w.nii.gz", "modality": "T1"}],
     "conversations": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Male or female?"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "The subject is female."}]}]}

or a question a line in DATA/train.jsonl (also val.jsonl, test.jsonl):

    {"volume": "sub-07_T1w.nii.gz", "modality": "T1", "question": "Male or female?", "answer": "It is female.",
     "question_type": "sex", "answer_candidates": ["male", "female"], "group": "sub-07"}

The model reads it in its own chat template, with a token for each patch of a volume; supervised is the last answer.
By default only the patch embeddings are trained.

    make demo SCRIPT=umbrella_mri                                                                 # on a CPU
    python train_umbrella_mri.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --lr 1e-3   # first with --check
    torchrun --standalone --nproc-per-node 4 train_umbrella_mri.py --model LLAVA --data DATA --out RUN --lr 1e-3
    sbatch slurm/umbrella_mri.sh                                                                  # a cluster

To read: this file, then common.py (masking, packing, LoRA, answering), inputs/labels.py (which label an answer names)
and report/scoring.py (when an answer is right). Whatever else is imported keeps the run alive or looks at it.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

import common
from common import Prompt
from inputs import data_check, labels, layouts, predict, questions, volumes
from inputs.task import Example, Problem, Task, choose, collect
from inputs.volumes import Modality, Volume
from report import blind, results
from runtime import EXIT_NOT_FINITE, EXIT_STOPPED, Run, checkpoints, flags, models, optimizers, program, ranks, shards
from runtime.batches import Unreadable
from runtime.metrics import Metrics

# ---- Arguments ------------------------------------------------------------------------------------------------------

IMAGE = "<image>"
EMBEDDING_PATTERN = r"patch_embed\..*"
# of --lr-projector, --lr-vision
PARTS = {"projector": r"model\.multi_modal_projector\..*", "vision": rf"{EMBEDDING_PATTERN}|model\.vision_tower\..*"}
# every projection of the language model and none of the vision tower, whose layers have q_proj and v_proj too
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# what a checkpoint is bound to: how volumes are read, which were shown, and in which words labels are ranked
OWN_SETTINGS = [*volumes.SETTINGS, "supervise", "embedded", "worded"]


def parse_arguments(argv):
    tunings = {"embedding": "the patch embeddings alone", "embedding+lora": "and adapters in the language model"}
    parser = flags.shared(__doc__, tunings | {"full": "every parameter"}, PARTS, decode="ranked")
    add, yes_no = parser.add_argument_group("volumes and conversations").add_argument, argparse.BooleanOptionalAction
    what = f"a kind of volume, in voxels, also with :CHANNELS; repeatable (default: {' '.join(volumes.DEFAULT)})"
    add("--modality", action="append", metavar="NAME:SIZE:PATCH", help=what)
    what = "where patches do not fill a size: zeros around it, or its rim left out (default: pad)"
    add("--ragged", choices=["pad", "crop"], default="pad", help=what)
    what = "bring other sizes to the declared one: averaged, or trilinear where it is larger (default: no)"
    add("--resample", action=yes_no, default=False, help=what)
    what = "of longer series the first frames, shorter ones end in zeros (default: no)"
    add("--fit-time", action=yes_no, default=False, help=what)
    what = "z-score over the voxels that are not zero, which stay zero (default: yes)"
    add("--normalise", action=yes_no, default=True, help=what)
    what = "answers of a training conversation that are supervised (default: last)"
    add("--supervise", choices=["last", "all"], default="last", help=what)
    what = "a task's labels: every answer names one; repeatable (default: as in the data)"
    add("--labels", action="append", default=[], metavar="TASK=A,B,…", help=what)
    parser.set_defaults(embedded=[], worded={})
    args = flags.parse(parser, argv)
    args.modality = args.modality or list(volumes.DEFAULT)
    try:
        volumes.modalities(args)
        args.task_labels = dict(map(labels.read_flag, args.labels))
    except ValueError as error:
        parser.error(str(error))
    return args


# ---- Data: files -> examples ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Turn(Example):
    """An assistant's turn: the turns before it are its prompt."""

    volumes: list[Volume]  # in the order in which they are shown
    turns: list[dict]  # what comes before the answer, as the chat template reads it
    labels: list[str]  # one of them the answer names; none where it is any text
    label: str | None  # which


def read_examples(data: Path, args) -> tuple[list[Turn], list[Problem]]:
    """All examples of the folder, UMBRELLA's or plain questions, and the ones that cannot be used."""
    entries = layouts.umbrella(data, Path(args.media_root), args.supervise)
    examples, problems = collect(entries, partial(make_example, args))
    if not args.predict:  # whose lines may be about one task of several
        labels.refuse_unused(args.task_labels, examples)
    # which label each answer names, and each label's candidate: from all examples, so before --limit chooses
    unnamed, args.worded = labels.settle(examples, args.worded)
    examples, problems = choose(examples, problems + unnamed, args)
    if not args.eval_only:
        shown = {volume.modality for example in examples if example.split == "train" for volume in example.volumes}
        args.embedded = sorted(shown.union(args.embedded))
    return examples, problems


def make_example(args, where: str, split: str, entry: dict) -> Turn:
    """The example of an assistant's turn. Raises ValueError saying what is wrong with it, and what to do."""
    shown = volumes.declared(entry["volumes"], args)
    fields = questions.fields(entry)
    allowed = labels.declared(fields, args.task_labels)
    return Turn(
        where=where,
        split=split,
        id=entry["id"],
        group=entry["groups"][0],
        groups=entry["groups"],
        volumes=shown,
        media=[name for volume in shown for name in volume.files],
        turns=entry["turns"],
        history=entry["turns"][:-1],
        labels=allowed,
        label=labels.of_metadata(entry["metadata"], allowed) if allowed else None,
        **fields | {"candidates": None},  # an answer for each label, once all examples are read: labels.settle
    )


# ---- Data: examples -> tokens and volumes ---------------------------------------------------------------------------


class UmbrellaTask(Task):
    """How an example becomes tokens and volumes: read from the checkpoint's folder, no weights needed."""

    remedy = "enlarge the patches"  # where an example is longer than --pack-tokens
    unreadable = "patch_embed in the place of vision_tower.embeddings"

    def __init__(self, folder: Path, args):
        config = read_config(folder)
        adopt_volumes(folder, config, args)
        super().__init__(args, models.tokenizer(folder))
        self.modalities, self.image_id = volumes.modalities(args), None
        try:
            named_id = common.image_token_id(config)  # read from config.json, never computed
            self.image_id = common.register_placeholder(self.tokenizer, IMAGE, named_id)
        except ValueError as error:
            self.fault("config.json", f"{error}; copy image_token_index from the original config.json")
        self.separate_pad()  # only now: a new PAD would take the ID that belongs to the placeholder
        models.refuse_template(self, folder, self.image_id)
        for modality in self.modalities.values():
            print(modality.describe(args.ragged))
        tokens = {name: modality.tokens(args.ragged) for name, modality in self.modalities.items()}
        self.report |= {"image_token": self.image_id, "tokens": tokens}
        self.report |= {name: getattr(args, name) for name in (*volumes.SETTINGS, "supervise")}

    def encode(self, example: Turn, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(prefix, input_ids, labels): all up to the last volume's last placeholder, then question and answer."""
        for volume in example.volumes:
            if volume.modality not in self.args.embedded:
                text = f"training has not shown {volume.modality}, whose embedding is as it was drawn"
                raise ValueError(f"{text}; leave the example out (--skip-bad)")
            volumes.check_shape(volume, self.modalities[volume.modality], self.measured, self.args)
        text = common.conversation(self.tokenizer, self.messages(example), answer)
        input_ids, supervised = common.encode_supervised(self.tokenizer, text)
        cut = len(input_ids) - input_ids[::-1].index(self.image_id)
        prefix = common.expand_placeholder(input_ids[:cut], self.image_id, self.counts(example))
        return prefix, input_ids[cut:], supervised[cut:]

    def messages(self, example: Turn) -> list[dict]:
        """The conversation up to its question, as the checkpoint's chat template reads it."""
        return example.turns

    def counts(self, example: Turn) -> list[int]:
        """The tokens of each volume: one for each patch."""
        return [self.modalities[volume.modality].tokens(self.args.ragged) for volume in example.volumes]

    def placeholders(self, example: Turn) -> dict[int, int]:
        """{placeholder's ID: how many the prefix must hold}: as many as the volumes have patches, or it is refused."""
        return {self.image_id: sum(self.counts(example))}

    def texts(self, example: Turn) -> list[str]:
        """What must hold no special token."""
        parts = [part for turn in example.turns for part in turn["content"] if part["type"] == "text"]
        return [*(part["text"] for part in parts), example.answer, *example.labels]

    def measure(self, data: Path, name: str) -> tuple[list[int], str]:
        """The shape of a file along x, y, z …, read completely, and its content."""
        return volumes.measure(data, name)

    def media(self, example: Turn) -> list[Volume]:
        return example.volumes

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        """`modalities` of all volumes of prompt trees, in the order of the packed sequence.

        "volumes of T1" are those of T1, in the same order, (n, channels, x, y, z), and so on for each that is there.
        """
        listed, found = [(volume, self.change(tree)) for tree in trees for volume in tree.media], defaultdict(list)
        for volume, change in listed:
            voxels = volumes.read(data, volume, self.modalities[volume.modality], self.args)
            found[f"volumes of {volume.modality}"].append(volumes.turned(voxels, change))
        stacked = {name: torch.stack(parts) for name, parts in found.items()}
        return {"modalities": [volume.modality for volume, _ in listed], **stacked}

    # ---- for blind runs ----

    def kind(self, example: Turn) -> tuple:
        """Examples that agree in this can be asked about each other's volumes: the same modalities in this order."""
        return tuple(volume.modality for volume in example.volumes)

    def show(self, example: Turn, other: Turn) -> Turn:
        return replace(example, volumes=other.volumes, media=other.media)


def read_config(folder: Path):
    """The checkpoint's configuration, which must be a LLaVA's, with CLIP's or SigLIP's tower."""
    config = models.config(folder, "llava", "use a LLaVA in transformers' format", grafted=True)
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise SystemExit(f"--model {folder}: a {config.vision_config.model_type} tower, not CLIP's or SigLIP's")
    return config


def adopt_volumes(folder: Path, config, args) -> None:
    """Take from a model that this script saved how its volumes were read, and for answering its words for labels."""
    saved = dict(getattr(config, "volumes", None) or {})
    if not saved:
        program.refuse_drawn(args, "patch embeddings")
    args.embedded = sorted({*args.embedded, *saved.pop("embedded", [])})
    worded = saved.pop("worded", {})
    args.worded = args.worded or (worded if args.eval_only else {})
    flags.adopt(args, saved, folder)


# ---- Model ----------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Volumes of one modality -> a token for each patch: one projection of its voxels, and a learned position.

    Tokens come in the order of the grid, its last axis fastest: with 9 x 9 x 9 patches the patch (i, j, k) is token
    81 i + 9 j + k; of a series (i, j, k, t) time is the last. Within a patch voxels are in the same order, channels
    first. Where patches do not fill the size, zeros stand around it ("pad"), or its rim is left out ("crop"), the
    odd voxel at the end.
    """

    def __init__(self, modality: Modality, ragged: str, width: int):
        super().__init__()
        self.modality, self.grid = modality, modality.grid(ragged)
        self.around = modality.padding(ragged)
        self.projection = nn.Linear(modality.channels * math.prod(modality.patch), width)
        self.position = nn.Embedding(math.prod(self.grid), width)
        nn.init.trunc_normal_(self.position.weight, std=0.02)

    def patches(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, channels, x, y, z[, time]) -> (n, tokens, voxels of a patch)."""
        batch = F.pad(batch, self.around)
        split = [n for pair in zip(self.grid, self.modality.patch, strict=True) for n in pair]
        batch = batch.reshape(*batch.shape[:2], *split)  # (n, channels, 9, 10, 9, 10, 9, 10)
        last = batch.ndim
        batch = batch.permute(0, *range(2, last, 2), 1, *range(3, last, 2))  # (n, 9, 9, 9, channels, 10, 10, 10)
        return batch.reshape(len(batch), math.prod(self.grid), -1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:  # -> (n, tokens, width of the vision tower)
        return self.projection(self.patches(batch)) + self.position.weight


class Embedded(nn.Module):
    """In the place of the tower's own embeddings: what it is given are patch embeddings already."""

    def forward(self, tokens: torch.Tensor, **_) -> torch.Tensor:
        return tokens


class Umbrella(nn.Module):
    """LLaVA whose forward takes a packed sequence with volumes and returns (loss sum, supervised tokens)."""

    def __init__(self, vlm: LlavaForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        self.vlm, self.dtype = vlm, dtype
        self.image_id = common.image_token_id(vlm.config)

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vlm.lm_head(hidden)

    def volume_features(self, media: dict) -> torch.Tensor:
        """All volumes of a packed sequence -> (tokens, width of the language model), in the order shown."""
        inner, layers = self.vlm.model, self.vlm.config.vision_feature_layer
        found = {}
        for name in dict.fromkeys(media["modalities"]):  # the tower reads all volumes of a modality at once
            tokens = self.vlm.patch_embed[name](media[f"volumes of {name}"])  # (n, tokens, width of the tower)
            tokens = tokens.to(self.dtype)  # the positions, which are trained, are float32
            states = inner.vision_tower(tokens, output_hidden_states=True).hidden_states
            chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
            # all tokens, also where the configuration drops the first: CLIP's class token, which is not embedded
            found[name] = iter(inner.multi_modal_projector(torch.cat(chosen, dim=-1)))
        return torch.cat([next(found[name]) for name in media["modalities"]])

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_media."""
        embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
        if media is not None:  # raises unless placeholders and features are equally many
            features = self.volume_features(media)
            embeds = common.put_features(embeds, input_ids, self.image_id, features, "volume")
        return common.last_hidden(self.decoder, embeds, position_ids, mask, cache)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(batch["document"], batch["branch"])  # a question sees its volumes and itself, no other
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
        return common.supervised_loss(hidden, self.lm_head, batch["labels"])


def replace_embeddings(vlm: LlavaForConditionalGeneration, args) -> None:
    """Put patch embeddings of every modality, newly drawn, into the place of the tower's own."""
    vlm.model.vision_tower.embeddings = Embedded()
    width = vlm.config.vision_config.hidden_size  # 1152 for SigLIP so400m
    modalities = volumes.modalities(args)
    vlm.patch_embed = nn.ModuleDict({name: PatchEmbed(m, args.ragged, width) for name, m in modalities.items()})
    vlm.config.volumes = {name: getattr(args, name) for name in (*volumes.SETTINGS, "embedded", "worded")}


def choose_trained(vlm: LlavaForConditionalGeneration, args) -> None:
    """What is trained; whatever is, is float32, because bfloat16 loses small updates."""
    common.train_only(vlm, EMBEDDING_PATTERN if args.tune != "full" else rf"(?!{unread(vlm)}).*")
    if args.tune == "embedding+lora":
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout)


def unread(vlm: LlavaForConditionalGeneration) -> str:
    """A pattern of the tower's parts behind the last layer that features are taken from: nothing can train them."""
    layers = vlm.config.vision_feature_layer
    depth = vlm.config.vision_config.num_hidden_layers
    read = max(i % (depth + 1) for i in ([layers] if isinstance(layers, int) else layers))  # -1: all, -2: all but one
    behind = "|".join(rf"encoder\.layers\.{i}\." for i in range(read, depth))
    return rf"model\.vision_tower\.(post_layernorm|head\.{'|' + behind if behind else ''})"


def load_model(folder: Path, task: UmbrellaTask, dtype: torch.dtype) -> Umbrella:
    """The model with what is trained chosen, still on the CPU: shards.place puts it on the device."""
    args, config = task.args, read_config(folder)
    if args.tune != "full":
        config.vision_config.attention_dropout = 0.0  # in training mode, for gradient checkpointing, but frozen
    saved = hasattr(config, "volumes")  # by this script: with patch embeddings, without the tower's own
    ours, theirs = (("patch_embed.",), "vision_tower.embeddings.") if saved else ((), "")
    vlm = models.open_model(LlavaForConditionalGeneration, folder, config, dtype, ours, replaced=theirs)
    common.separate_pad_from_eos(task.tokenizer, vlm)
    replace_embeddings(vlm, args)
    vlm.grafted = task.unreadable
    models.load_parts(folder, vlm, ours)
    models.prepare_training(choose_trained, vlm, folder, args)  # refused where it does not fit
    return Umbrella(vlm, dtype)


# ---- Training -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then half a cosine towards zero; step counts from 1."""
    warmup = max(1, round(args.warmup * steps))
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def train(model: nn.Module, plan: list[list[Prompt]], start: int, val: list[Prompt], task: Task, run: Run) -> float:
    """Steps start+1 … len(plan), the same however often the run was stopped between; returns the last loss."""
    args = run.args
    trained = {name: p for name, p in model.vlm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(optimizers.parameter_groups(trained, args), lr=args.lr)
    save = checkpoints.Saver(run, start, model.vlm, optimizer, trained)  # and the optimizer's state as of `start`
    metrics = Metrics(run, start, len(plan))
    steps = run.steps(plan, start, task)  # of each step this rank's packed sequences
    run.stop.wait()  # from here on a signal is noted, and acted on once its step is saved
    step, loss = start, math.nan
    while True:
        # ---- validate: whatever is due is saved already, so here a signal may end the run at once ----
        if val and metrics.validated < step and (step == metrics.total or step % args.eval_every == 0):
            with run.interruptible():
                metrics.write(step=step, val_loss=common.mean_loss(model, val, task, run))
        if step == metrics.total:  # which --patience may just have made the last
            run.stop.act()
            metrics.close()
            return loss
        # ---- forward and backward: trees are those of all ranks, batches are this rank's ----
        trees = plan[step]
        try:
            batches = next(steps)
        except Unreadable as fault:  # a file has gone since it was checked: the steps before are kept
            save(step)
            raise SystemExit(fault.ending(step + 1)) from None
        step += 1
        model.train()
        run.seed(step)  # dropout draws from (seed, step, rank): a step that is taken again draws the same
        supervised = sum(tree.supervised() for tree in trees)
        loss_sum = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                batch_loss, _ = model(batch)
            (batch_loss / supervised).backward()  # the mean over all tokens of the step, not a mean of means
            loss_sum += batch_loss.detach()
        ranks.sum_gradients(trained.values())
        loss = float(ranks.sum_over_ranks(loss_sum)) / supervised
        grad_norm = ranks.clip_gradients(trained.values(), args.clip)
        # ---- update; where something is not finite, neither parameters nor the optimizer's moments change ----
        lr = learning_rate(step, len(plan), args)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics.step(step, trees, loss, grad_norm, lr)  # a line of metrics.jsonl, or of bad_steps.jsonl
        if metrics.bad == 3:
            run.leave(EXIT_NOT_FINITE, f"three bad steps in a row; replay them with --only-ids {metrics.bad_steps}")
        # ---- save, before anything that could fail or take long ----
        stopped = run.stopped()  # by a signal, on any rank
        due = step == metrics.total or step % args.save_every == 0 or (val and step % args.eval_every == 0)
        if stopped or due:
            save(step)
            metrics.restart_clock()  # the time that saving takes is no step's
        if stopped:
            run.leave(EXIT_STOPPED, f"stopped by {stopped} after step {step}; the same command resumes from there")


# ---- Main -----------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_arguments(argv)
    with program.start(args, OWN_SETTINGS) as run:  # ranks, signals, the run folder's lock, --resume FOLDER's settings
        # ---- the data is checked before any weights are read ----
        folder = models.find(args.model, weights=not args.check)
        task = UmbrellaTask(folder, args)
        if args.merge:
            return models.merge(load_model, folder, task, run)
        if args.predict:  # of questions without answers
            return predict.answer(read_examples, load_model, folder, task, run)
        if args.data:  # --check without it looks at the checkpoint alone
            examples, trees = data_check.check(*read_examples(Path(args.data), args), task, run)
        if args.check:
            return models.count(load_model, folder, task, run)  # what would be trained, without reading weights
        # ---- train ----
        if not args.eval_only:
            plan = common.plan_run(trees["train"], args)  # every step of the run, from the seed alone
            start = checkpoints.first_step(run, folder, trees["train"], plan)  # refused if data changed
        torch.manual_seed(args.seed)  # new embeddings and adapters are drawn
        model = load_model(folder, task, run.dtype)
        checkpoints.load_weights(run, folder, model.vlm)  # refused if they were trained on another model
        shards.place(model, run)
        models.print_trained(model.vlm)
        if not args.eval_only:
            if start == 0 and trees["val"]:  # a broken evaluation fails now, not after an epoch
                print(f"loss before training: {common.mean_loss(model, trees['val'][:2], task, run):.4f}")
            loss = train(model, plan, start, trees["val"], task, run)
            checkpoints.choose_answering(run, model.vlm)  # that of the lowest validation loss: --answer-with
            models.write_final(load_model, folder, task, run)
        # ---- answer ----
        asked, asked_trees = examples[args.eval_split], trees[args.eval_split]
        if not asked:
            return print(f"--eval-split {args.eval_split}: no examples, so nothing was answered")
        if args.blind:  # with nothing to see, or another subject's volumes: into RUN/blind
            asked, asked_trees, task, run = blind.prepare(asked, asked_trees, task, run)
        records = common.evaluate(model, asked_trees, asked, task, run)  # one for each example, answered or not
        figures = results.finish(records, asked, examples["train"], task, run)  # baselines, intervals, the page
        if args.overfit:
            data_check.overfit(loss, figures)  # exit code 1 unless every answer is right


if __name__ == "__main__":
    main()
