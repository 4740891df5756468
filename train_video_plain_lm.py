"""Train the smallest complete video-language model: a causal language model that reads DINOv2's features.

An example, one entry of DATA/train.json in LLaVA's layout (also val.json, test.json; paths are relative to DATA), or a
line of DATA/train.jsonl. A video is an mp4, avi, mov, webm or mkv, a folder of JPEG or PNG frames, an animated GIF,
WebP or PNG, or a .npy array:

    {"id": "v7", "video": "videos/v7", "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", …}]}
    {"id": "v7", "video": "videos/v7.gif", "answer": "Un'ellisse gialla va all'insù."}    # "question": optional
    {"id": "v8", "video": "videos/v8.mp4", "start": 2, "end": 4.5, "answer": "…"}         # a part of it, in seconds
    {"id": "t3", "answer": "Il contrario di destra è sinistra."}                          # a text without a video

There is no chat format. The model reads all of this; supervised are the text and the end token alone:

    <vid_start> 34 x <vid_patch> <vid_end>               fast path: 4 frames x 3 x 3 =  36 positions
    <slow_vid_start> 322 x <vid_patch> <slow_vid_end>    slow path: 4 frames x 9 x 9 = 324 positions
    <|endoftext|> Un'ellisse gialla va all'insù. <|endoftext|>
    frames -> DINOv2 (frozen) -> projector -> token packer, 9 x 9 and 3 x 3 a frame -> in the place of these 360 tokens

    make demo SCRIPT=video_plain_lm                                            # on a CPU, from nothing
    python train_video_plain_lm.py --data DATA --out RUN --check               # the data check
    python train_video_plain_lm.py --data DATA --out RUN --cache-features DIR  # one GPU: GPT-2, DINOv2-large
    torchrun --standalone --nproc-per-node 4 train_video_plain_lm.py --data DATA --out RUN --cache-features DIR

To read: this file, then common.py (masking, packing, LoRA, answering), then report/scoring.py (when an answer is
right). Whatever else is imported keeps the run alive or looks at it, and may be trusted unread.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import common
from common import Prompt
from inputs import data_check, layouts, predict, processors, questions, videos
from inputs.features import Cache, Video
from inputs.task import Example, Problem, Task, choose, collect, named, split_of
from report import blind, captions, results, scoring
from runtime import EXIT_NOT_FINITE, EXIT_STOPPED, Run, checkpoints, flags, models, optimizers, program, ranks, shards
from runtime.attention import heeds_mask
from runtime.batches import Unreadable
from runtime.metrics import Metrics

# ---- Arguments ------------------------------------------------------------------------------------------------------

VIDEO = "<video>"  # in the data: where the video's tokens go
VID_START, VID_PATCH, VID_END = "<vid_start>", "<vid_patch>", "<vid_end>"
SLOW_START, SLOW_END = "<slow_vid_start>", "<slow_vid_end>"
VIDEO_TOKENS = (VID_START, VID_PATCH, VID_END, SLOW_START, SLOW_END)
GRAFTED = ("vision_tower.", "projector.", "fast_packer.", "slow_packer.")  # what the language model is given
NEW_PATTERN = r"(projector|fast_packer|slow_packer)\..*"
PARTS = {"projector": NEW_PATTERN}  # of --lr-projector
# the projections as Llama, Mistral and Qwen name them; what is adapted is printed. GPT-2's are no nn.Linear
LORA_PATTERN = r"(?!vision_tower\.).*\.([qkvo]_proj|(gate|up|down)_proj)"
LAYOUT = ["fast_frames", "slow_frames", "fast_grid", "slow_grid", "packer", "image_fit"]  # a model is bound to it
OWN_SETTINGS = [*LAYOUT, "from_scratch", "vision_weights"]  # what a checkpoint is bound to: also to the tower's weights


def parse_arguments(argv):
    tunings = {
        "full": "all but the tower",
        "lora": "adapters in the language model (not GPT-2), projector, packers",
        "projector": "projector, packers",
    }
    parser = flags.shared(__doc__, tunings, PARTS, model="openai-community/gpt2")
    add = parser.add_argument_group("language model, tower and videos").add_argument
    what = "DINOv2 folder or hub ID (default: facebook/dinov2-large; a trained --model has one)"
    add("--vision-model", metavar="MODEL", help=what)
    add("--from-scratch", action="store_true", help="draw the language model at random (default: no)")
    for path, frames, grid in (("fast", 4, 3), ("slow", 4, 9)):
        frames_help = f"frames of the {path} path (default: {frames})"
        grid_help = f"side of its grid in positions (default: {grid}, {grid} x {grid} a frame)"
        add(f"--{path}-frames", type=flags.positive, default=frames, metavar="N", help=frames_help)
        add(f"--{path}-grid", type=flags.positive, default=grid, metavar="N", help=grid_help)
    what = "a position looks at its window of patches, or is its mean (default: attention)"
    add("--packer", choices=["attention", "pool"], default="attention", help=what)
    what = "keep the tower's features there, so that it reads each video once (default: nowhere)"
    add("--cache-features", metavar="DIR", help=what)
    processors.add_flag(parser)
    parser.set_defaults(vision_weights=None)
    args = flags.parse(parser, argv)
    if args.augment and args.cache_features:
        parser.error("--augment with --cache-features: what is kept is of unchanged videos; give one of the two")
    if args.from_scratch and args.tune != "full":
        parser.error(f"--from-scratch with --tune {args.tune}: a random language model would stay random")
    return args


# ---- Data: files -> examples ----------------------------------------------------------------------------------------

FIELDS = {"video", "start", "end", "image", *layouts.FIELDS}


@dataclass(kw_only=True)
class Clip(Example):
    """A text, and the video that it is about, if any."""

    frames: int | None  # how many it has, of which `media` are those chosen; of GIF and the like counted later


def read_examples(data: Path, args) -> tuple[list[Clip], list[Problem]]:
    """All examples of the folder, LLaVA's conversations or plain lines, and the ones that cannot be used."""
    entries = layouts.conversations(layouts.files(data, Path(args.media_root), FIELDS), VIDEO, "video")
    return choose(*collect(entries, partial(make_example, args)), args)


def make_example(args, where: str, split: str | None, entry: dict) -> Clip:
    """The example of an entry. Raises ValueError saying what is wrong with it, and what to do."""
    video, name = named(entry, "video", None), named(entry, "id", where)
    data, part = Path(args.media_root), videos.part(entry)
    shown = videos.find(data, video, args.fast_frames, args.slow_frames, part) if video else ([], None, None)
    group = named(entry, "group", video or where)  # videos of one procedure or patient; else the video
    entry = questions.composed(entry)  # é is one character or two: one, so that a word has one spelling
    before = [text for turn in entry.get("history") or [] for text in turn]  # earlier turns are read, too
    question = "\n".join(filter(None, [*before, named(entry, "question", "").strip()]))
    return Clip(
        where=where,
        split=split or split_of(group),
        id=name,
        group=group,
        groups=videos.groups(entry, group),
        media=shown[0],  # of a folder or a video file the frames that are read
        frames=shown[1],
        notice=shown[2],
        **questions.fields({**entry, "question": question}, unasked="caption" if video else "text"),
    )


# ---- Data: examples -> tokens and frames ----------------------------------------------------------------------------


class VideoTask(Task):
    """How an example becomes tokens and frames: read from the checkpoint's folder, no weights needed."""

    remedy = "lower --slow-frames or --slow-grid"  # where an example is longer than --pack-tokens
    unreadable = "vision_tower, projector, fast_packer and slow_packer"

    def __init__(self, folder: Path, args):
        if not hasattr(models.config(folder, grafted=True), "vision_config"):  # saved by this script it has its tower
            models.find_part(args, "vision", "facebook/dinov2-large")  # args.vision_model: a folder now
        config = read_config(folder, args)
        super().__init__(args, models.tokenizer(folder))
        self.separate_pad()
        self.tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in (VIDEO, *VIDEO_TOKENS)])
        self.ids = {token: common.single_token_id(self.tokenizer, token) for token in (VIDEO, *VIDEO_TOKENS)}
        self.bos = self.tokenizer.bos_token or self.tokenizer.eos_token  # what every text begins with
        self.processor = processors.fitted(Path(args.vision_model or folder), args)
        self.cache = Cache(args.cache_features if args.blind != "blank" else None, self.processor)
        self.patches = processors.patches(self.processor, config.vision_config["patch_size"])  # rows, columns; printed
        self.max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        fast, slow = args.fast_frames * args.fast_grid**2, args.slow_frames * args.slow_grid**2
        print(f"video tokens: {fast} on the fast path, {slow} on the slow one, {fast + slow} positions a video")
        self.report |= {"video_tokens": self.ids, "positions": {"fast": fast, "slow": slow}}
        self.report |= {name: getattr(args, name) for name in (*LAYOUT, "from_scratch")}

    def encode(self, example: Clip, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(prefix, input_ids, labels): the video's tokens; then the text, from BOS on. Of a text alone prefix is []."""
        opening, closing = common.SENTINELS
        video, asked = VIDEO if example.media else "", f"{example.question}\n" if example.question else ""
        text = f"{video}{self.bos}{asked}{opening}{answer}{closing}{self.tokenizer.eos_token}"
        input_ids, labels = common.encode_supervised(self.tokenizer, text)
        cut = input_ids.index(self.ids[VIDEO]) + 1 if example.media else 0
        return self.layout(example), input_ids[cut:], labels[cut:]

    def layout(self, example: Clip) -> list[int]:
        """The tokens that its video stands for, the fast path's first; all carry features, also start and end."""
        shown, found = self.media(example), []
        if shown is None:
            return found
        grids = self.args.fast_grid, self.args.slow_grid
        names = (VID_START, VID_END), (SLOW_START, SLOW_END)
        for frames, grid, (start, end) in zip((shown.fast, shown.slow), grids, names, strict=True):
            count = len(frames) * grid**2
            if count < 2:
                raise ValueError(f"a path of {count} position has no room for {start} and {end}; raise frames or grid")
            found += [self.ids[start], *[self.ids[VID_PATCH]] * (count - 2), self.ids[end]]
        return found

    def placeholders(self, example: Clip) -> dict[int, int]:
        """{placeholder's ID: how many the prefix must hold}; none of them may stand among the text."""
        layout = self.layout(example)
        return {token_id: layout.count(token_id) for token_id in self.ids.values()}

    def measure(self, data: Path, name: str) -> tuple[dict, str]:
        """The size and number of a file's frames, each decoded, its sha256, and its content."""
        return videos.measure(data, name)

    def media(self, example: Clip) -> videos.Media | None:
        """What it shows: files, which frames of them are read, and which of these are on either path."""
        if not example.media:
            return None
        count = videos.count(example.media, example.frames, self.measured)
        return videos.Media(example.media, *videos.choose(count, self.args.fast_frames, self.args.slow_frames))

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        """{"videos": of each prompt tree that shows one its pixels, or its features from the cache, in this order}"""
        shown = [(tree.media, self.change(tree)) for tree in trees if tree.media]
        return {"videos": [self.cache.read(data, media, self.measured, change) for media, change in shown]}

    def score(self, prediction: str | None, example: Clip) -> dict[str, bool]:
        """A caption is compared word for word, an answer to a question as any other."""
        if example.question or example.candidates:
            return super().score(prediction, example)
        return scoring.caption(prediction, example.answer)

    def show(self, example: Clip, other: Clip) -> Clip:
        return replace(example, media=other.media, frames=other.frames)

    def blank(self, media: dict) -> dict:
        """All pixels 0, which is the processor's mean colour."""
        return {"videos": [replace(video, pixels=torch.zeros_like(video.pixels)) for video in media["videos"]]}


# ---- Model ----------------------------------------------------------------------------------------------------------


class TokenPacker(nn.Module):
    """A frame's patches -> grid x grid positions.

    "pool" takes the mean of each window of patches. "attention" begins with the frame resized to grid x grid; each of
    these points then looks at its window of patches, and what it finds there is added. From 16 x 16 patches to 9 x 9
    windows are 2 or 3 patches wide, to 3 x 3 they are 6, and neighbours overlap where the division has a rest.
    """

    def __init__(self, width: int, patches: tuple[int, int], grid: int, kind: str):
        super().__init__()
        self.grid, self.kind = grid, kind
        if kind == "attention":
            self.heads = math.gcd(width, max(1, width // 64))  # of about 64 numbers each
            self.norm = nn.LayerNorm(width)
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
            nn.init.zeros_(self.out.weight)  # training starts from the resized frame
            nn.init.zeros_(self.out.bias)
            each = torch.eye(math.prod(patches)).view(-1, 1, *patches)  # a frame for each patch, 1 where it is
            window = F.adaptive_avg_pool2d(each, grid).flatten(1).T > 0  # (grid * grid, patches): adaptive pooling's
            self.register_buffer("window", window.contiguous(), persistent=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(frames, rows, columns, width) -> (frames, grid * grid, width)"""
        image = patches.movedim(-1, 1)  # (frames, width, rows, columns)
        if self.kind == "pool":
            return F.adaptive_avg_pool2d(image, self.grid).flatten(2).transpose(1, 2)
        points = F.interpolate(image, size=(self.grid, self.grid), mode="bilinear").flatten(2).transpose(1, 2)
        region = self.norm(patches.flatten(1, 2))  # (frames, patches, width)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (frames, heads, …, width / heads)
            for x in (self.query(self.norm(points)), self.key(region), self.value(region))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=self.window)
        return points + self.out(found.transpose(1, 2).flatten(2))


class VideoPlainLM(nn.Module):
    """A language model with a video tower, whose forward takes a packed sequence: (loss sum, supervised tokens)."""

    def __init__(self, vlm: nn.Module, task: VideoTask, dtype: torch.dtype):
        super().__init__()
        self.vlm, self.dtype, self.patches, self.cache = vlm, dtype, task.patches, task.cache
        ids = torch.tensor([task.ids[token] for token in VIDEO_TOKENS])
        self.register_buffer("video_ids", ids, persistent=False)

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.base_model

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vlm.get_output_embeddings()(hidden)

    @torch.no_grad()
    def patch_features(self, video: Video) -> torch.Tensor:
        """(frames, patches, width of the tower), from the cache, or by the tower, which then fills it.

        A video at a time: then the values do not depend on what else is in the sequence, and the cache changes nothing.
        """
        if video.features is not None:
            return video.features.to(self.video_ids.device)
        weights = next(self.vlm.vision_tower.parameters())
        states = self.vlm.vision_tower(video.pixels.to(weights.device, weights.dtype)).last_hidden_state
        # without the class token (and registers) in front; autocast leaves a norm's result in float32
        return self.cache.keep(video, states[:, -math.prod(self.patches) :].to(self.dtype))

    def video_features(self, shown: list[Video]) -> torch.Tensor:
        """All videos of a sequence -> (positions, width of the LM): of each the fast path, then the slow one."""
        features = torch.cat([self.patch_features(video) for video in shown])  # (frames of all videos, patches, …)
        patches = self.vlm.projector(features).unflatten(1, self.patches)  # (frames, rows, columns, width of the LM)
        fast, slow, before = [], [], 0
        for video in shown:
            fast += [before + i for i in video.fast]
            slow += [before + i for i in video.slow]
            before += video.frames
        fast = self.vlm.fast_packer(patches[fast]).split([len(video.fast) for video in shown])
        slow = self.vlm.slow_packer(patches[slow]).split([len(video.slow) for video in shown])
        return torch.cat([part.flatten(0, 1) for both in zip(fast, slow, strict=True) for part in both])

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) under a mask (1, 1, T, keys); `media` of read_media."""
        embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
        if media is not None:  # raises unless video tokens and features are equally many
            features = self.video_features(media["videos"]) if media["videos"] else embeds[0, :0]
            embeds = common.put_features(embeds, input_ids, self.video_ids, features, "video")
        return common.last_hidden(self.decoder, embeds, position_ids, mask, cache)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(batch["document"], batch["branch"])  # a text sees its video and itself, no other text
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
        loss, supervised = common.supervised_loss(hidden, self.lm_head, batch["labels"])
        if torch.is_grad_enabled() and not loss.requires_grad:  # a text alone with --tune projector
            loss = loss + 0 * self.vlm.projector[0].bias.sum()  # for backward to end at
        return loss, supervised

    def train(self, mode: bool = True):
        super().train(mode)
        self.vlm.vision_tower.eval()  # frozen: no dropout in it
        return self


def read_config(folder: Path, args):
    """The language model's configuration, with the tower's as vision_config; a saved model's layout is adopted."""
    config = models.config(folder, grafted=True)
    if hasattr(config, "video_layout"):  # saved by this script: it has its tower
        if args.from_scratch or args.vision_model or args.vision_weights:
            raise SystemExit(f"--model {folder} was trained by this script: no --from-scratch, no other tower for it")
        flags.adopt(args, config.video_layout, folder)
        return config
    if hasattr(config, "vision_config"):
        raise SystemExit(f"--model {folder}: {config.model_type!r} is a vision-language model already")
    program.refuse_drawn(args, "projector and packers")
    kinds = "dinov2", "dinov2_with_registers"
    config.vision_config = models.config(Path(args.vision_model), kinds, "give it as --vision-model").to_dict()
    return config


def graft(lm: nn.Module, config, tower: nn.Module, task: VideoTask) -> None:
    """Give the language model the tower, a projector to its width, and a packer for each path."""
    args, vision, width = task.args, config.vision_config, lm.get_input_embeddings().weight.shape[1]
    lm.vision_tower = tower
    lm.projector = nn.Sequential(nn.Linear(vision["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
    lm.fast_packer = TokenPacker(width, task.patches, args.fast_grid, args.packer)
    lm.slow_packer = TokenPacker(width, task.patches, args.slow_grid, args.packer)
    lm.grafted = task.unreadable
    lm.config.vision_config = vision
    lm.config.video_layout = {name: getattr(args, name) for name in LAYOUT}


def choose_trained(vlm: nn.Module, args) -> None:
    """What is trained; whatever is, is float32, because bfloat16 loses small updates."""
    common.train_only(vlm, r"(?!vision_tower\.).*" if args.tune == "full" else NEW_PATTERN)
    if args.tune == "lora":
        try:
            common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout)
        except ValueError as error:  # GPT-2
            raise SystemExit(f"--tune lora: {error}; choose --tune full or projector") from None


def load_model(folder: Path, task: VideoTask, dtype: torch.dtype) -> VideoPlainLM:
    """The model with what is trained chosen, still on the CPU: shards.place puts it on the device."""
    args, config = task.args, read_config(folder, task.args)
    ours = GRAFTED if hasattr(config, "video_layout") else ()  # saved by this script: with all that was grafted
    form = torch.float32 if args.tune == "full" else dtype  # what is trained is drawn, and loaded, in float32
    vlm = models.open_model(AutoModelForCausalLM, folder, config, form, ours, from_scratch=args.from_scratch)
    common.grow_embeddings(vlm, len(task.tokenizer))  # new rows are the mean of the others, not drawn
    common.separate_pad_from_eos(task.tokenizer, vlm)
    vision, part = AutoConfig.for_model(**config.vision_config), "vision_tower." if ours else ""
    tower = models.open_model(AutoModel, folder if ours else Path(args.vision_model), vision, dtype, part=part)
    graft(vlm, config, tower, task)
    models.load_parts(folder, vlm, ours[1:])
    models.prepare_training(choose_trained, vlm, folder, args)  # refused where it does not fit
    task.cache.belongs_to(tower)
    return VideoPlainLM(vlm, task, dtype)


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
        folder = models.find(args.model, weights=not (args.check or args.from_scratch))
        task = VideoTask(folder, args)
        run.closing.callback(task.cache.close)  # says how many of its entries were damaged
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
        torch.manual_seed(args.seed)  # whatever is new is drawn
        model = load_model(folder, task, run.dtype)
        checkpoints.load_weights(run, folder, model.vlm)  # refused if they were trained on another model
        shards.place(model, run)
        models.print_trained(model.vlm)
        if not args.eval_only:
            heeds_mask(model, plan[0], task, run)  # any language model may be given: it is put to the test
            if start == 0 and trees["val"]:  # a broken evaluation fails now, not after an epoch
                print(f"loss before training: {common.mean_loss(model, trees['val'][:2], task, run):.4f}")
            loss = train(model, plan, start, trees["val"], task, run)
            checkpoints.choose_answering(run, model.vlm)  # that of the lowest validation loss: --answer-with
            models.write_final(load_model, folder, task, run)
        # ---- answer ----
        asked, asked_trees = examples[args.eval_split], trees[args.eval_split]
        if not asked:
            return print(f"--eval-split {args.eval_split}: no examples, so nothing was answered")
        if args.blind:  # with nothing to see, or another group's videos: into RUN/blind
            asked, asked_trees, task, run = blind.prepare(asked, asked_trees, task, run)
        records = common.evaluate(model, asked_trees, asked, task, run)  # one for each example, answered or not
        own = partial(captions.figures, model, asked_trees, records, task, run)  # perplexity, retrieval, BLEU, ROUGE-L
        figures = results.finish(records, asked, examples["train"], task, run, own)  # baselines, intervals, the page
        if args.overfit:
            data_check.overfit(loss, figures)  # exit code 1 unless every answer is right


if __name__ == "__main__":
    main()
