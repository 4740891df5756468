"""Fine-tune LLaVA-Med on questions about medical images: vision tower frozen, projector trained, LoRA on the LM.

An example, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; image paths are relative to DATA):

    {"id": "kv_00017", "image": "images/cl8k2u.jpg", "question": "How many polyps are in the image?", "answer": "1"}

    make demo                                                                                 # on a CPU, from nothing
    python train_llava_med.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --check    # the data check
    python train_llava_med.py --model LLAVA_FOLDER_OR_HUB_ID --data DATA --out RUN --epochs 3 # one GPU
    torchrun --standalone --nproc-per-node 4 train_llava_med.py --model LLAVA --data DATA --out RUN
    sbatch slurm/llava_med.sh                                                                 # a cluster

The demo's loss falls from 7.0 to 0.02; then some 95 % of its test answers are right, where the best baseline that sees
no image has 47 %.

To read: this file, then common.py (masking, packing, LoRA, answering), then report/scoring.py (when an answer is
right). Whatever else is imported keeps the run alive or looks at it, and may be trusted unread.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import common
from common import Prompt
from inputs import data_check, images, layouts, predict, processors, prompts, questions
from inputs.task import Example, Problem, Task, choose, collect, named, split_of
from report import blind, results
from runtime import EXIT_NOT_FINITE, EXIT_STOPPED, Run, checkpoints, flags, models, optimizers, program, ranks, shards
from runtime.batches import Unreadable
from runtime.metrics import Metrics

# ---- Arguments ------------------------------------------------------------------------------------------------------

IMAGE = "<image>"
# every projection of the language model and none of the vision tower, whose layers have q_proj and v_proj too
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR_PATTERN = r"model\.multi_modal_projector\..*"
PARTS = {"projector": PROJECTOR_PATTERN, "vision": r"model\.vision_tower\..*"}  # of --lr-projector, --lr-vision
OWN_SETTINGS = ["image_fit", "system"]  # flags of this script alone that a checkpoint is bound to
# for checkpoints that come without a chat template: Mistral's, as LLaVA-Med v1.5 was trained; a system text stands
# before the first question
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '[INST] ' if loop.first or loop.previtem.role == 'assistant' }}{% for part in m.content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '\n\n' if m.role == 'system' else ' [/INST]' }}"
    "{% else %} {{ m.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"
)


def parse_arguments(argv):
    parser = flags.shared(__doc__, parts=PARTS)
    add = parser.add_argument_group("EndoVis-18-VQA").add_argument
    text = "published split: paper or sequence; with :Sentence answers are sentences (default: none)"
    add("--endovis", choices=layouts.ENDOVIS, metavar="SPLIT", help=text)
    processors.add_flag(parser)
    prompts.add_flag(parser)
    return flags.parse(parser, argv)


# ---- Data: files -> examples ----------------------------------------------------------------------------------------

FIELDS = {*images.FIELDS, "images", "system", *layouts.FIELDS}


def read_examples(data: Path, args) -> tuple[list[Example], list[Problem]]:
    """All examples of the folder in whichever published layout it has, and those that cannot be used."""
    media = Path(args.media_root)
    if layouts.is_endovis(data):
        entries = layouts.endovis(data, media, args.endovis)
    else:  # JSON lines as they are; of LLaVA's conversations one entry for each answer, with its history
        entries = layouts.conversations(layouts.files(data, media, FIELDS), IMAGE)
    return choose(*collect(entries, partial(make_example, media)), args)


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
        **questions.fields(entry),  # question, answer, question_type, candidates
    )


# ---- Data: examples -> tokens and pixels ----------------------------------------------------------------------------


class LlavaTask(Task):
    """How an example becomes tokens and pixels: read from the checkpoint's folder, no weights needed."""

    remedy = "show fewer images, or less text"

    def __init__(self, folder: Path, args):
        config = read_config(folder)
        super().__init__(args, models.tokenizer(folder))
        if not self.tokenizer.chat_template:
            print("chat template: none in the checkpoint; Mistral's, as LLaVA-Med v1.5 was trained")
            self.tokenizer.chat_template = CHAT_TEMPLATE
        self.processor, self.processor_settings = processors.fitted(folder, args), processors.counting(config)
        self.per_image, self.image_id = tokens_per_image(config), None
        try:
            named_id = common.image_token_id(config)  # read from config.json, never computed
            self.image_id = common.register_placeholder(self.tokenizer, IMAGE, named_id)
        except ValueError as error:
            self.fault("config.json", f"{error}; copy image_token_index from the original config.json")
        self.separate_pad()  # only now: a new PAD would take the ID that belongs to the placeholder
        models.refuse_template(self, folder, self.image_id)
        seen, size = processors.size_of(self.processor), config.vision_config.image_size
        if seen != (size, size):
            self.fault("preprocessor_config.json", f"{seen[0]} x {seen[1]} pixels, the vision tower takes {size}")
        self.report |= {"image_token": {"id": self.image_id, "per_image": self.per_image}, "image_fit": args.image_fit}

    def encode(self, example: Example, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(prefix, input_ids, labels): all up to the last image's last placeholder, then the question and an answer.

        The tokenizer splits at the placeholder anyway, so the prefix is the same for every question of the image:
        with nine of 40 tokens each, 30 + 576 + 9 * 40 = 966 tokens instead of 9 * 646 = 5,814.
        """
        text = prompts.conversation(self.tokenizer, self.messages(example), answer, self.image_id)
        input_ids, labels = common.encode_supervised(self.tokenizer, text)
        cut = len(input_ids) - input_ids[::-1].index(self.image_id) if example.media else 0
        prefix = common.expand_placeholder(input_ids[:cut], self.image_id, [self.per_image] * len(example.media))
        return prefix, input_ids[cut:], labels[cut:]

    def messages(self, example: Example) -> list[dict]:
        """The conversation up to its question, as the checkpoint's chat template reads it."""
        turns = [*example.history, (example.question, "")]
        return images.messages(turns, len(example.media), self.system(example))

    def placeholders(self, example: Example) -> dict[int, int]:
        """{placeholder's ID: how many the prefix must hold}: as many as the model makes features, or it is refused."""
        return {self.image_id: self.per_image * len(example.media)}

    def kind(self, example: Example) -> tuple:
        """Examples that agree in this can be asked about each other's images: they show as many."""
        return (len(example.media),)

    def measure(self, data: Path, name: str) -> tuple[dict, str]:
        """The size of an image, decoded completely, and its content."""
        return images.measure(data, name)

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        """The pixel_values (images, 3, height, width) of prompt trees, in the order of the packed sequence, if any."""
        pictures = [images.open_image(data, name, self.change(tree)) for tree in trees for name in tree.media]
        return {"pixel_values": self.processor(pictures, return_tensors="pt")["pixel_values"]} if pictures else {}


def read_config(folder: Path):
    """The checkpoint's configuration, which must be a LLaVA's."""
    return models.config(folder, "llava")  # also of LLaVA-Med as it is published: models.find has translated it


def tokens_per_image(config) -> int:
    """CLIP-L/14 at 336 px, "default": (336 / 14)^2 + 1 - 1 = 576; SigLIP at 384 px, "full": 27^2 = 729."""
    vision = config.vision_config
    class_token = vision.model_type == "clip_vision_model"
    dropped = config.vision_feature_select_strategy == "default"
    return (vision.image_size // vision.patch_size) ** 2 + class_token - dropped


# ---- Model ----------------------------------------------------------------------------------------------------------


class LlavaMed(nn.Module):
    """LLaVA whose forward takes a packed sequence and returns (loss sum, supervised tokens)."""

    def __init__(self, vlm: LlavaForConditionalGeneration):
        super().__init__()
        self.vlm = vlm
        self.image_id = common.image_token_id(vlm.config)
        self.tower_trains = any(p.requires_grad for p in vlm.model.vision_tower.parameters())

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vlm.lm_head(hidden)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (tokens of all images, width of the language model)."""
        inner, config = self.vlm.model, self.vlm.config
        layers = config.vision_feature_layer
        states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]  # (images, 1 + patches, width)
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]  # drop the class token
        return inner.multi_modal_projector(torch.cat(chosen, dim=-1)).flatten(0, 1)

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_media."""
        embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
        if media is not None:  # raises unless placeholders and features are equally many
            features = self.image_features(media["pixel_values"]) if "pixel_values" in media else embeds[0, :0]
            embeds = common.put_features(embeds, input_ids, self.image_id, features)
        return common.last_hidden(self.decoder, embeds, position_ids, mask, cache)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(batch["document"], batch["branch"])  # a question sees its image and itself, no other
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
        return common.supervised_loss(hidden, self.lm_head, batch["labels"])

    def train(self, mode: bool = True):
        super().train(mode)
        self.vlm.model.vision_tower.train(mode and self.tower_trains)  # no dropout in a frozen tower
        return self


def choose_trained(vlm: LlavaForConditionalGeneration, args) -> None:
    """What is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r".*")
    else:
        common.train_only(vlm, PROJECTOR_PATTERN)
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout)


def load_model(folder: Path, task: LlavaTask, dtype: torch.dtype) -> LlavaMed:
    """The model with what is trained chosen, still on the CPU: shards.place puts it on the device."""
    config = read_config(folder)
    vlm = models.open_model(LlavaForConditionalGeneration, folder, config, dtype)  # a missing weight is refused
    common.separate_pad_from_eos(task.tokenizer, vlm)
    models.prepare_training(choose_trained, vlm, folder, task.args)  # refused where it does not fit
    return LlavaMed(vlm)


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
        task = LlavaTask(folder, args)
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
