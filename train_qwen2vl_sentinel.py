"""Fine-tune Qwen2-VL on typed questions about medical images: answers located by sentinels, constrained when decoded.

An example, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; image paths are relative to DATA):

    {"image": "images/cl8k2u.jpg", "question": "What color is the polyp?", "answer": "pink", "question_type": "color"}

The type and the allowed answers are inferred where an example does not give them. The model reads, in its own template:

    system      Answer the question about the medical image with the answer alone.
    user        [image] Question type: color
                Question: What color is the polyp?
    assistant   <ANS>pink</ANS>       supervised: "pink" and the end of the turn; the sentinels never reach the model

    make demo SCRIPT=qwen2vl_sentinel                                                         # on a CPU, from nothing
    python train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN --check   # the data check
    python train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN           # one GPU
    torchrun --standalone --nproc-per-node 4 train_qwen2vl_sentinel.py --model FOLDER_OR_HUB_ID --data DATA --out RUN
    bash slurm/qwen2vl_pipeline.sh                                   # a cluster: check, overfit, train, evaluate

To read: this file, then common.py (masking, packing, LoRA, answering), report/scoring.py (when an answer is right) and
inputs/questions.py (question types and allowed answers). Whatever else is imported may be trusted unread.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

import common
from common import Prompt
from inputs import data_check, images, layouts, predict, prompts, questions
from inputs.task import Example, Problem, Task, choose, collect, named, split_of
from report import blind, results
from runtime import EXIT_NOT_FINITE, EXIT_STOPPED, Run, checkpoints, flags, models, optimizers, program, ranks, shards
from runtime.batches import Unreadable
from runtime.metrics import Metrics

# ---- Arguments ------------------------------------------------------------------------------------------------------

MODELS = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SYSTEM = "Answer the question about the medical image with the answer alone."
# every projection of the language model
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# with --lora-vision also those of the vision tower and of the merger, which projects to the language model's width
VISION_PATTERN = r"model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+)|merger\.mlp\.[02])"
# of --lr-projector, --lr-vision
PARTS = {"projector": r"model\.visual\.merger\..*", "vision": r"model\.visual\.(?!merger\.).*"}
# own flags that a checkpoint is bound to
OWN_SETTINGS = ["lora_vision", "min_pixels", "max_pixels", "sentinels", "system"]


def parse_arguments(argv):
    parser = flags.shared(__doc__, parts=PARTS, decode="constrained")
    add = parser.add_argument_group("Qwen2-VL").add_argument
    own = "(default: the checkpoint's own)"
    add("--min-pixels", type=flags.positive, metavar="N", help=f"smaller images are enlarged to N pixels {own}")
    add("--max-pixels", type=flags.positive, metavar="N", help=f"larger images are reduced to N pixels {own}")
    add("--lora-vision", action="store_true", help="adapters in the vision tower and its merger, too (default: no)")
    keep = "keep: <ANS> stays in the model's input, as in the original recipe (default: strip)"
    add("--sentinels", choices=["strip", "keep"], default="strip", help=keep)
    prompts.add_flag(parser, SYSTEM)
    args = flags.parse(parser, argv)
    if args.lora_vision and args.tune == "full":
        parser.error("--lora-vision: with --tune full the vision tower is trained anyway")
    return args


# ---- Data: files -> examples ----------------------------------------------------------------------------------------

FIELDS = {*images.FIELDS, "images", "system", *layouts.FIELDS}


def read_examples(data: Path, args) -> tuple[list[Example], list[Problem]]:
    """All examples of the folder with their allowed answers, and those that cannot be used."""
    media = Path(args.media_root)
    entries = layouts.conversations(layouts.files(data, media, FIELDS), "<image>")
    examples, problems = collect(entries, partial(make_example, media))
    questions.allow_training_answers(examples)  # from all of training, before --limit chooses
    return choose(examples, problems, args)


def make_example(data: Path, where: str, split: str | None, entry: dict) -> Example:
    """The example of an entry. Raises ValueError saying what is wrong with it, and what to do."""
    entry = images.placed(data, entry)  # where each of its images is shown
    group = named(entry, "group", where)  # patient, video or procedure; the image where nothing else is known
    return Example(
        where=where,
        split=split or split_of(group),
        id=named(entry, "id", where),
        group=group,
        media=entry["images"],
        system=named(entry, "system", ""),
        history=entry["history"],
        **questions.fields(questions.composed(entry)),  # question, answer, question_type, candidates
    )


# ---- Data: examples -> tokens and pixels ----------------------------------------------------------------------------


class QwenTask(Task):
    """How an example becomes tokens and pixels: read from the checkpoint's folder, no weights needed."""

    remedy = "lower --max-pixels"  # where an example is longer than --pack-tokens

    def __init__(self, folder: Path, args):
        super().__init__(args, models.tokenizer(folder))
        if args.sentinels == "keep" and args.decode != "greedy" and not args.merge:  # or the checkpoint says so
            raise SystemExit("--sentinels keep: the end of an answer is not supervised there; give --decode greedy")
        if args.sentinels == "keep":
            self.unreadable = "prompts that go on with <ANS> (--sentinels keep)"
        config, self.image_id = models.config(folder, MODELS), None
        try:  # read from config.json, never computed
            self.image_id = common.image_token_id(config)
        except ValueError as error:
            self.fault("config.json", f"{error}; copy image_token_id from the original config.json")
        self.separate_pad()
        models.refuse_template(self, folder, self.image_id)
        with torch.device("meta"):  # without weights, for its own rule of positions
            vlm = MODELS[config.model_type](config)
        self.images = images.QwenImages(folder, vlm, args.min_pixels, args.max_pixels)
        self.processor = self.images.processor
        args.min_pixels, args.max_pixels = self.images.pixels
        self.report |= {"image_token": self.image_id, "pixels": self.images.pixels}

    def encode(self, example: Example, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(prefix, input_ids, labels): all up to the last image's last placeholder, then the question and an answer.

        The tokenizer splits at the placeholder anyway, so the prefix is the same for every question of the image.
        """
        text = prompts.conversation(self.tokenizer, self.messages(example), answer, self.image_id)
        input_ids, labels = common.encode_supervised(self.tokenizer, text, self.args.sentinels == "keep")
        cut = len(input_ids) - input_ids[::-1].index(self.image_id) if example.media else 0
        prefix = common.expand_placeholder(input_ids[:cut], self.image_id, self.image_tokens(example))
        return prefix, input_ids[cut:], labels[cut:]

    def messages(self, example: Example) -> list[dict]:
        """The conversation up to its question, as the checkpoint's chat template reads it; each turn with its type."""
        types = [*(questions.question_type(question) for question, _ in example.history), example.question_type]
        turns = []
        for kind, (question, reply) in zip(types, [*example.history, (example.question, "")], strict=True):
            marks, asked = images.lead(question)  # images that come first do so before the type
            turns.append((f"{marks}Question type: {kind}\nQuestion: {asked}", reply))
        return images.messages(turns, len(example.media), self.system(example))

    def image_tokens(self, example: Example) -> list[int]:
        """Of each image one for every 28 x 28 pixels, once its size lies between --min-pixels and --max-pixels."""
        return [self.images.tokens(self.measured[name]["size"]) for name in example.media]

    def placeholders(self, example: Example) -> dict[int, int]:
        """{placeholder's ID: how many the prefix must hold}: as many as the model makes features, or it is refused."""
        return {self.image_id: sum(self.image_tokens(example))}

    def positions(self, example: Example, prefix: list[int]) -> torch.Tensor:
        """M-RoPE positions (3, P) of a prefix: text counts on in all three, an image in time, height and width."""
        return self.images.positions(prefix, self.image_id, [self.measured[name]["size"] for name in example.media])

    def texts(self, example: Example) -> list[str]:
        """What must hold no special token: all that is written into the conversation."""
        return [*super().texts(example), example.question_type]

    def kind(self, example: Example) -> tuple:
        """Examples that agree in this can be asked about each other's images: they show as many."""
        return (len(example.media),)

    def measure(self, data: Path, name: str) -> tuple[dict, str]:
        """The size of an image, decoded completely, and its content."""
        return images.measure(data, name)

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        """pixel_values and image_grid_thw of the trees' images, of any sizes, in the order of the packed sequence."""
        names = [name for tree in trees for name in tree.media]
        changes = [self.change(tree) for tree in trees for _ in tree.media]
        return self.images.read(data, names, [self.measured[name]["size"] for name in names], changes)


# ---- Model ----------------------------------------------------------------------------------------------------------


class Qwen2VL(nn.Module):
    """Qwen2-VL whose forward takes a packed sequence and returns (loss sum, supervised tokens)."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration):
        super().__init__()
        self.vlm = vlm
        self.image_id = common.image_token_id(vlm.config)
        self.tower_trains = any(p.requires_grad for p in vlm.model.visual.parameters())  # all of it, or its adapters

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vlm.lm_head(hidden)

    def image_features(self, media: dict) -> torch.Tensor:
        """All images of a packed sequence -> (tokens, width of the language model)."""
        found = self.vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"])
        return torch.cat(found.pooler_output)

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) at positions (3, 1, T) under a mask (1, 1, T, keys)."""
        embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
        if media is not None:  # raises unless placeholders and features are equally many
            features = self.image_features(media) if "pixel_values" in media else embeds[0, :0]
            embeds = common.put_features(embeds, input_ids, self.image_id, features)
        return common.last_hidden(self.decoder, embeds, position_ids, mask, cache)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(batch["document"], batch["branch"])  # a question sees its image and itself, no other
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
        return common.supervised_loss(hidden, self.lm_head, batch["labels"])

    def train(self, mode: bool = True):
        super().train(mode)
        self.vlm.model.visual.train(mode and self.tower_trains)  # no dropout in a frozen tower
        return self


def choose_trained(vlm: Qwen2VLForConditionalGeneration, args) -> None:
    """What is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r".*")
    else:
        vlm.requires_grad_(False)
        for pattern in [LORA_PATTERN, VISION_PATTERN] if args.lora_vision else [LORA_PATTERN]:  # each must match
            common.add_lora(vlm, pattern, args.lora_r, args.lora_alpha, args.lora_dropout)


def load_model(folder: Path, task: QwenTask, dtype: torch.dtype) -> Qwen2VL:
    """The model with what is trained chosen, still on the CPU: shards.place puts it on the device."""
    config = models.config(folder, MODELS)
    vlm = models.open_model(MODELS[config.model_type], folder, config, dtype)  # a missing weight is refused
    common.separate_pad_from_eos(task.tokenizer, vlm)
    models.prepare_training(choose_trained, vlm, folder, task.args)  # refused where it does not fit
    return Qwen2VL(vlm)


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
        task = QwenTask(folder, args)
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
        torch.manual_seed(args.seed)  # new adapters are drawn
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
        if args.blind:  # with nothing to see, or another group's images: into RUN/blind
            asked, asked_trees, task, run = blind.prepare(asked, asked_trees, task, run)
        records = common.evaluate(model, asked_trees, asked, task, run)  # one for each example, answered or not
        figures = results.finish(records, asked, examples["train"], task, run)  # baselines, intervals, the page
        if args.overfit:
            data_check.overfit(loss, figures)  # exit code 1 unless every answer is right


if __name__ == "__main__":
    main()
