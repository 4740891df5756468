"""Fine-tune Qwen2-VL, with a Whisper encoder grafted on, on spoken questions about surgical clips.

An example, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; paths are relative to DATA), or SurgViVQA's own
files ({train,eval,test}_multivideo.jsonl with frames/VIDEO/NAME.jpg and audio/out_VIDEO/ID.mp3, …; see docs/data.md):

    {"frames": ["frames/v1/v1_10.jpg", "frames/v1/v1_14.jpg"], "audio": "audio/q7.wav", "question": "Is the scope
     pushing forward?", "answer": "No, the scope is withdrawing.", "short_answer": "no", "video_id": "v1"}
    {"video": "v1.mp4", "start": 12.5, "end": 16, …}                # instead of frames, all of it or a part, in seconds

The model reads, in its own chat template:

    system      Answer the question about the surgical clip with the answer alone.
    user        [recording: a token every 20 ms] [frame] [frame] … Answer the spoken question.
    assistant   No, the scope is withdrawing.   supervised: this and the end of the turn (--target short_answer: "no")

    make demo SCRIPT=surg_video_vqa                                                             # on a CPU, from nothing
    python train_surg_video_vqa.py --model QWEN2_VL --audio-model WHISPER --data DATA --out RUN --check # the data check
    python train_surg_video_vqa.py --model QWEN2_VL --audio-model WHISPER --data DATA --out RUN         # one GPU
    python train_surg_video_vqa.py --model QWEN2_VL --data DATA --out RUN           # without Whisper: frames and text
    torchrun --standalone --nproc-per-node 4 train_surg_video_vqa.py --model QWEN2_VL …               # several

To read: this file, then common.py (masking, packing, LoRA, answering), then report/scoring.py (when an answer is
right). Whatever else is imported keeps the run alive or looks at it, and may be trusted unread.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import common
from common import Prompt
from inputs import data_check, images, layouts, predict, prompts, questions, sound, videos
from inputs.task import Example, Problem, Task, choose, collect, named, split_of
from report import blind, results, scoring
from runtime import EXIT_NOT_FINITE, EXIT_STOPPED, Run, checkpoints, flags, models, optimizers, program, ranks, shards
from runtime.batches import Unreadable
from runtime.metrics import Metrics

# ---- Arguments ------------------------------------------------------------------------------------------------------

SYSTEM = "Answer the question about the surgical clip with the answer alone."
SPOKEN = "Answer the spoken question."  # what is written where the question is heard alone
AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")  # Qwen2-Audio's; the middle one stands for 20 ms
SAMPLES = 320  # of one audio position: a spectrum every 160 samples, of which the second convolution keeps every other
# every projection of the language model
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# of --lr-projector, --lr-vision
PARTS = {"projector": r"audio_projector\..*|model\.visual\.merger\..*", "vision": r"model\.visual\.(?!merger\.).*"}
# flags of this script alone that a checkpoint is bound to, and a fingerprint of the encoder
OWN_SETTINGS = ["question", "target", "frames", "frame_size", "system", "audio_weights"]
# declared here, so that anybody can object: in a relaxed match a member counts as any other of its line
SYNONYMS = [
    {"sigma", "sigmoid", "sigmoid colon"},
    {"NBI", "narrow band imaging", "narrow-band imaging"},
    {"WL", "white light"},
    {"<5", "<5mm", "less than 5 mm", "under 5 mm"},
    {"advancing", "forward", "pushing forward"},
    {"withdrawing", "backward", "pulling back"},
]


def parse_arguments(argv):
    parser = flags.shared(__doc__, parts=PARTS, lora_r=64, lora_alpha=16, questions_per_step=4)
    add = parser.add_argument_group("clips and recordings").add_argument
    what = "Whisper folder or hub ID, whose encoder is grafted on (default: none, or --model's own)"
    add("--audio-model", metavar="MODEL", help=what)
    what = "text, audio or both: how it is asked (default: audio; text without Whisper)"
    add("--question", choices=["text", "audio", "both"], metavar="HOW", help=what)
    what = "answer or short_answer: the field that is supervised (default: answer)"
    add("--target", choices=["answer", "short_answer"], default="answer", metavar="FIELD", help=what)
    add("--frames", type=flags.positive, default=8, metavar="N", help="most frames of a training clip (default: 8)")
    add("--eval-frames", type=flags.positive, default=6, metavar="N", help="of a clip of val and test (default: 6)")
    what = "longer side of a frame, in pixels; larger ones are reduced (default: 384)"
    add("--frame-size", type=flags.positive, default=384, metavar="PX", help=what)
    prompts.add_flag(parser, SYSTEM)
    parser.set_defaults(audio_weights=None)  # a checkpoint's fingerprint of the encoder that it was trained with
    return flags.parse(parser, argv)


# ---- Data: files -> examples ----------------------------------------------------------------------------------------

FIELDS = {"id", "frames", "audio", "question", "answer", "short_answer", "question_type", "answer_candidates"}
FIELDS |= {"group", "video_id", "frame_numbers", "total_frames", "system", "video", "start", "end"}


@dataclass(kw_only=True)
class Clip(Example):
    """A question about a clip; `media` are its frames in the order of time and, where it is spoken, its recording."""

    audio: list[str]  # the recording, or none

    @property
    def shown(self) -> list[str]:
        """What may not be in two splits: the frames. The same question may be asked, and recorded, in several."""
        return [name for name in self.media if name not in self.audio]


def read_examples(data: Path, args) -> tuple[list[Clip], list[Problem]]:
    """All examples of the folder, in whichever layout it has, and those that cannot be used."""
    read = layouts.surgvivqa if layouts.is_surgvivqa(data) else layouts.files
    clips, problems = collect(read(data, Path(args.media_root), FIELDS), partial(make_example, args))
    return choose(clips, problems, args)


def make_example(args, where: str, split: str | None, entry: dict) -> Clip:
    """The example of an entry. Raises ValueError saying what is wrong with it, and what to do."""
    group = named(entry, "group", named(entry, "video_id", None))
    if group is None:
        raise ValueError("no video_id and no group: the clips of one video must not be in two splits, so name it")
    composed = questions.composed(entry)
    forms = [named(composed, key, "").strip() for key in ("answer", "short_answer")]
    forms = [form for form in forms if not scoring.says_nothing(form)]
    if args.target not in composed and forms:
        raise ValueError(f"no {args.target}; give one, or choose the other --target")
    fields = questions.fields({**composed, "answer": composed.get(args.target)})
    audio = [] if args.question == "text" else sound.recording(entry, required=args.question == "audio")
    split = split or split_of(group)
    frames, notice = videos.clip(Path(args.media_root), entry, most_frames(args, split))
    return Clip(
        where=where,
        split=split,
        id=named(entry, "id", where),
        group=group,
        groups=videos.groups(entry, group),
        media=[*frames, *audio],
        system=named(entry, "system", ""),
        notice=notice,
        audio=audio,
        also_right=[form for form in forms if form != fields["answer"]],  # the same answer in its other form
        **fields,  # question, answer, question_type, candidates
    )


def most_frames(args, split: str) -> int:
    """So many of a clip are seen: fewer of val and test, by default."""
    return args.frames if split == "train" else args.eval_frames


# ---- Data: examples -> tokens, pixels and sound ---------------------------------------------------------------------


class SurgTask(Task):
    """How an example becomes tokens, pixels and spectra: read from the checkpoint's folder, no weights needed."""

    remedy = "lower --frames or --frame-size"  # where an example is longer than --pack-tokens
    synonyms = SYNONYMS

    def __init__(self, folder: Path, args):
        models.find_part(args, "audio")  # refused if a checkpoint was trained with another
        super().__init__(args, models.tokenizer(folder))
        vlm = meta_model(folder, args)
        config, self.image_id, self.audio_id = vlm.config, None, None
        try:  # read from config.json, never computed
            if config.audio_config:  # which names the placeholder once a graft was saved
                known = getattr(config, "audio_token_id", None)
                self.audio_id = common.reserve_placeholder(self.tokenizer, AUDIO_TOKENS, config, known)
            self.image_id = common.image_token_id(config)
        except ValueError as error:
            self.fault("config.json", f"{error}; copy its token IDs from the original config.json")
        self.separate_pad()  # only now: a new PAD would take the ID that belongs to a placeholder
        models.refuse_template(self, folder, self.image_id)
        if config.audio_config:
            window = config.audio_config["max_source_positions"] * SAMPLES // sound.RATE  # 1,500 positions are 30 s
            self.unreadable = "audio_tower and audio_projector"
            self.extractor = WhisperFeatureExtractor(config.audio_config["num_mel_bins"], chunk_length=window)
        self.images = images.QwenImages(folder, vlm, longest=args.frame_size)
        self.processor = self.images.processor
        self.report |= {"image_token": self.image_id, "audio_token": self.audio_id}
        self.report |= {name: getattr(args, name) for name in (*OWN_SETTINGS[:-1], "eval_frames")}
        seen = f"{args.frames} of a training clip, {args.eval_frames} of one of val and test"
        print(f"question: {args.question}; supervised: {args.target}; frames: {seen}")

    def encode(self, example: Clip, answer: str) -> tuple[list[int], list[int], list[int]]:
        """(prefix, input_ids, labels): all up to the last frame's last placeholder, then the question and an answer.

        The recording stands before the frames, as the checkpoints of this recipe were trained: a spoken question is in
        the prefix, a written one in the branch.
        """
        text = prompts.conversation(self.tokenizer, self.messages(example), answer, self.image_id)
        input_ids, labels = common.encode_supervised(self.tokenizer, text)
        cut = len(input_ids) - input_ids[::-1].index(self.image_id)
        counts = [self.images.tokens(size) for size in self.sizes(example)]
        prefix = common.expand_placeholder(input_ids[:cut], self.image_id, counts)
        if example.audio:
            prefix = common.expand_placeholder(prefix, self.audio_id, list(map(self.audio_positions, example.audio)))
        return prefix, input_ids[cut:], labels[cut:]

    def messages(self, example: Clip) -> list[dict]:
        """The conversation up to its question, as the checkpoint's chat template reads it."""
        heard = [{"type": "text", "text": "".join(AUDIO_TOKENS)}] if example.audio else []
        frames = [{"type": "image"}] * len(self.frames(example))
        asked = SPOKEN if example.audio and self.args.question == "audio" else f"Question: {example.question}"
        found = [{"role": "user", "content": [*heard, *frames, {"type": "text", "text": asked}]}]
        system = self.system(example)
        return [{"role": "system", "content": [{"type": "text", "text": system}]}, *found] if system else found

    def frames(self, example: Clip) -> list[str]:
        """The frames of an example that the model sees."""
        most = most_frames(self.args, example.split)
        return [example.shown[i] for i in videos.evenly(len(example.shown), most)]

    def media(self, example: Clip) -> list[str]:
        """What the model sees and hears of an example; those that agree in it share a prefix."""
        return [*self.frames(example), *example.audio]

    def sizes(self, example: Clip) -> list[tuple[int, int]]:
        """(width, height) of each frame that the model sees."""
        return [self.measured[name]["size"] for name in self.frames(example)]

    def audio_positions(self, audio: str) -> int:
        """Tokens of a recording: one for each 20 ms that it covers."""
        samples, window = self.measured[audio][0], self.extractor.n_samples
        if samples > window:
            text = f"{audio} lasts {samples / sound.RATE:.1f} s, longer than the encoder's window of"
            raise ValueError(f"{text} {window / sound.RATE:.0f} s; shorten it")
        return math.ceil(samples / SAMPLES)

    def placeholders(self, example: Clip) -> dict[int, int]:
        """{placeholder's ID: how many the prefix must hold}: as many as the model makes features, or it is refused."""
        counts = {self.image_id: sum(map(self.images.tokens, self.sizes(example)))}
        if self.audio_id is not None:
            counts[self.audio_id] = sum(map(self.audio_positions, example.audio))
        return counts

    def positions(self, example: Clip, prefix: list[int]) -> torch.Tensor:
        """M-RoPE positions (3, P) of a prefix: text and sound count on in all three, a frame in height and width."""
        return self.images.positions(prefix, self.image_id, self.sizes(example))

    def measure(self, data: Path, name: str) -> tuple[dict | tuple, str]:
        """(width, height) of a frame, or (samples, dBFS) of a recording; each decoded completely, and its content."""
        return sound.measure(data, name) if sound.is_recording(name) else images.measure(data, name)

    def read_media(self, data: Path, trees: list[Prompt]) -> dict:
        """pixel_values and image_grid_thw of the trees' frames in the order of the packed sequence.

        Where something is heard also input_features (recordings, mel bins, 3000) and audio_positions (recordings,).
        """
        names = [name for tree in trees for name in tree.media]
        frames = [name for name in names if not sound.is_recording(name)]
        changes = [self.change(tree) for tree in trees for name in tree.media if not sound.is_recording(name)]
        media = self.images.read(data, frames, [self.measured[name]["size"] for name in frames], changes)
        recordings = [name for name in names if sound.is_recording(name)]
        if recordings:
            sounds = [sound.read(data, name, samples=self.measured[name][0]) for name in recordings]
            spectra = self.extractor(sounds, sampling_rate=sound.RATE, return_tensors="pt").input_features
            positions = torch.tensor([self.audio_positions(name) for name in recordings])
            media |= {"input_features": spectra, "audio_positions": positions}
        return media

    def show(self, example: Clip, other: Clip) -> Clip:
        """The example, asked about the other's frames; a question that is heard stays its own."""
        return replace(example, media=[*other.shown, *example.audio])


# ---- Model ----------------------------------------------------------------------------------------------------------


class SurgVideo(nn.Module):
    """Qwen2-VL with Whisper's encoder; its forward takes a packed sequence, returns (loss sum, supervised tokens)."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration):
        super().__init__()
        self.vlm = vlm
        self.image_id, self.audio_id = common.image_token_id(vlm.config), vlm.config.audio_token_id
        towers = [vlm.model.visual, vlm.audio_tower] if vlm.config.audio_config else [vlm.model.visual]
        self.frozen = [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vlm.lm_head(hidden)

    def image_features(self, media: dict) -> torch.Tensor:
        """All frames of a packed sequence -> (tokens, width of the language model)."""
        found = self.vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"])
        return torch.cat(found.pooler_output)

    def audio_features(self, media: dict) -> torch.Tensor:
        """All recordings of a packed sequence -> (audio positions, width of the language model)."""
        tower, spectra = self.vlm.audio_tower, media["input_features"]  # (recordings, mel bins, 3000)
        encoded = tower(spectra.to(tower.conv1.weight.dtype)).last_hidden_state  # (recordings, 1500, width)
        heard = [one[:n] for one, n in zip(encoded, media["audio_positions"].tolist(), strict=True)]
        return self.vlm.audio_projector(torch.cat(heard))

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) at positions (3, 1, T) under a mask (1, 1, T, keys)."""
        embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
        if media is not None:  # raises unless placeholders and features are equally many
            embeds = common.put_features(embeds, input_ids, self.image_id, self.image_features(media))
            if "input_features" in media:  # a packed sequence may hold written questions alone
                embeds = common.put_features(embeds, input_ids, self.audio_id, self.audio_features(media), "audio")
        return common.last_hidden(self.decoder, embeds, position_ids, mask, cache)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(batch["document"], batch["branch"])  # a question sees its clip and itself, no other
        hidden = self.hidden(batch["input_ids"], batch["position_ids"], mask, media=batch)
        return common.supervised_loss(hidden, self.lm_head, batch["labels"])

    def train(self, mode: bool = True):
        super().train(mode)
        for tower in self.frozen:
            tower.eval()  # no dropout where nothing is trained
        return self


def choose_trained(vlm: Qwen2VLForConditionalGeneration, args) -> None:
    """What is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r"(?!audio_tower\.embed_positions).*")  # Whisper's positions are a fixed sine
    else:
        if args.question == "text":
            vlm.requires_grad_(False)
        else:
            common.train_only(vlm, r"audio_projector\.weight")
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout)


def read_config(folder: Path, args):
    """The configuration, with that of --audio-model's encoder as audio_config; settles how questions are asked."""
    config = models.config(folder, "qwen2_vl", grafted=True)
    config.audio_config = getattr(config, "audio_config", None)  # a dictionary, where a graft was saved
    if args.audio_model and config.audio_config:
        raise SystemExit(f"--audio-model {args.audio_model}: {folder} already has an audio encoder; leave the flag out")
    if args.audio_model:
        program.refuse_drawn(args, "the audio projector")
        config.audio_config = models.config(Path(args.audio_model), "whisper", flag="--audio-model").to_dict()
    args.question = args.question or ("audio" if config.audio_config else "text")
    if args.question != "text" and not config.audio_config:
        raise SystemExit(f"--question {args.question}: the model has no audio encoder; give one with --audio-model")
    if args.question == "text" and args.audio_model:
        raise SystemExit("--audio-model with --question text: nothing would be heard; leave one of them out")
    return config


def graft(vlm: Qwen2VLForConditionalGeneration) -> Qwen2VLForConditionalGeneration:
    """Add the audio encoder and the projector from its width to the language model's, as config.audio_config says."""
    if vlm.config.audio_config:
        audio = WhisperConfig(**vlm.config.audio_config)
        vlm.audio_tower = WhisperEncoder(audio)
        vlm.audio_projector = nn.Linear(audio.d_model, vlm.config.text_config.hidden_size, bias=False)
    return vlm


def meta_model(folder: Path, args) -> Qwen2VLForConditionalGeneration:
    """The model from its configuration alone, without weights: for its M-RoPE positions."""
    with torch.device("meta"):
        return graft(Qwen2VLForConditionalGeneration(read_config(folder, args)))


def load_model(folder: Path, task: SurgTask, dtype: torch.dtype) -> SurgVideo:
    """The model with what is trained chosen, still on the CPU: shards.place puts it on the device."""
    args, config = task.args, read_config(folder, task.args)
    ours = ("audio_tower.", "audio_projector.") if config.audio_config else ()
    remedy = "a grafted encoder must be audio_tower.*, with audio_projector.weight and audio_config in config.json"
    vlm = models.open_model(Qwen2VLForConditionalGeneration, folder, config, dtype, ours, remedy=remedy)
    common.separate_pad_from_eos(task.tokenizer, vlm)
    graft(vlm).grafted = task.unreadable
    vlm.config.audio_token_id = task.audio_id
    if config.audio_config:
        nn.init.normal_(vlm.audio_projector.weight, std=config.text_config.initializer_range)
        if args.audio_model:  # the projector is trained from nothing
            models.load_part(Path(args.audio_model), ("model.encoder.", "encoder."), vlm.audio_tower)
        else:
            models.load_parts(folder, vlm, ours)
        vlm.audio_tower.to(dtype)
        vlm.audio_projector.to(dtype)
    models.prepare_training(choose_trained, vlm, folder, args)  # refused where it does not fit
    return SurgVideo(vlm)


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
        task = SurgTask(folder, args)
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
