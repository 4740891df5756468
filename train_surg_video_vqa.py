"""Fine-tune Qwen2-VL, with a Whisper encoder grafted on, on spoken questions about surgical clips.

A data row, one line of DATA/train.jsonl (also val.jsonl, test.jsonl; paths are relative to DATA), and in SurgViVQA's
files ({train,eval,test}_multivideo.jsonl, frames/VIDEO/NAME.jpg, audio/SPLIT/ID.wav, .flac or .mp3):

    {"frames": ["frames/v1/v1_10.jpg", "frames/v1/v1_14.jpg"], "audio": "audio/q7.wav", "question": "Is the scope
     pushing forward?", "answer": "No, the scope is withdrawing.", "short_answer": "no", "video_id": "v1"}

The model reads, in its own chat template:

    system      Answer the question about the surgical clip with the answer alone.
    user        [recording: a token every 20 ms] [frame] [frame] … Answer the spoken question.
    assistant   No, the scope is withdrawing.     learned: this and the end of the turn (--target short_answer: "no")

    make demo SCRIPT=surg_video_vqa                                         # on a CPU, from nothing; or by hand:
    python demo.py surg_video_vqa && python train_surg_video_vqa.py --model runs/demo/surg_video_vqa/model \\
        --audio-model runs/demo/surg_video_vqa/whisper --data runs/demo/surg_video_vqa/data \\
        --out runs/demo/surg_video_vqa/run --tune full --lr 3e-4 --epochs 7 --questions-per-step 8 --pack-tokens 1280 \\
        --frames 4 --eval-frames 4 --target short_answer
    python train_surg_video_vqa.py --model QWEN2_VL --audio-model WHISPER --data DATA --out RUN --check    # the proof
    python train_surg_video_vqa.py --model QWEN2_VL --audio-model WHISPER --data DATA --out RUN            # one GPU
    torchrun --standalone --nproc-per-node 4 train_surg_video_vqa.py --model QWEN2_VL --audio-model WHISPER \\
        --data DATA --out RUN
    python train_surg_video_vqa.py --model QWEN2_VL --data DATA --out RUN        # without Whisper: frames and text

What the demo must reach, and what each figure means, is in README.md.
"""

import json
import math
import random
import shutil
import sys
import time
import unicodedata
import wave
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import common
import runtime
from common import IGNORE, Prompt
from report import audit_scorer, data_gate, print_audit, print_gate, write_report
from runtime import Problem

# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------

SYSTEM = "Answer the question about the surgical clip with the answer alone."
SPOKEN = "Answer the spoken question."  # what is written where the question is heard alone
AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")  # Qwen2-Audio's; the middle one stands for 20 ms
RATE = 16_000  # samples a second, as every Whisper was trained with
SAMPLES = 320  # of one audio position: a spectrum every 160 samples, of which the second convolution keeps every other
# every projection of the language model
LORA_PATTERN = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# what a checkpoint of this script is bound to: its flags, and a fingerprint of the encoder
OWN_SETTINGS = ["question", "target", "frames", "frame_size", "audio_tokens", "audio_weights"]
TRAINED_WITH = OWN_SETTINGS[:-1]  # what a saved model's config.json says of its training
# declared here, so that anybody can object: in the "tolerant" column a member counts as any other of its line
SYNONYMS = [
    {"sigma", "sigmoid", "sigmoid colon"},
    {"NBI", "narrow band imaging", "narrow-band imaging"},
    {"WL", "white light"},
    {"<5", "<5mm", "less than 5 mm", "under 5 mm"},
    {"advancing", "forward", "pushing forward"},
    {"withdrawing", "backward", "pulling back"},
]


def parse_arguments(argv):
    parser = runtime.shared_flags(__doc__, lora_r=64, lora_alpha=16, questions_per_step=4)
    add = parser.add_argument_group("clips and recordings").add_argument
    add("--audio-model", help="Whisper folder or hub ID, whose encoder is grafted on (a merged --model has one)")
    add("--question", choices=["text", "audio", "both"], help="how it is asked (default: audio, without Whisper text)")
    add("--target", choices=["answer", "short_answer"], default="answer", help="the field that is learned")
    add("--frames", type=runtime.positive, default=8, help="frames of a training clip (default: 8)")
    add("--eval-frames", type=runtime.positive, default=6, help="of a clip of val and test (default: 6)")
    add("--frame-size", type=runtime.positive, default=384, help="larger frames are reduced to it (default: 384 px)")
    add(
        "--audio-tokens",
        choices=["auto", "full"],
        default="auto",
        help="positions that the recording covers, or all of Whisper's 30 s window",
    )
    parser.set_defaults(audio_weights=None)
    return runtime.parse_flags(parser, argv)


# ------------------------------------------------------------------------------------------------------------
# Data: files -> rows
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    where: str  # "train.jsonl:17"
    split: str
    id: str
    frames: list[str]
    audio: str | None
    question: str
    answer: str  # the one that is learned
    also_right: list[str]  # the same answer in its other form
    question_type: str
    candidates: list[str] | None
    group: str  # the video

    @property
    def media(self) -> list[str]:
        return [*self.frames, *([self.audio] if self.audio else [])]

    @property
    def shown(self) -> list[str]:
        """What may not be in two splits: the frames. The same question may be asked, and recorded, in several."""
        return self.frames


PUBLISHED = {"train": "train", "val": "eval", "test": "test"}  # split -> SurgViVQA's name for it
FRAME_FILES, AUDIO_FILES = (".jpg", ".jpeg", ".png"), (".wav", ".flac", ".mp3")
FIELDS = {"id", "frames", "audio", "question", "answer", "short_answer", "question_type", "answer_candidates"}
FIELDS |= {"group", "video_id", "frame_numbers", "total_frames"}


def read_data(data: Path, args) -> tuple[list[Row], list[Problem]]:
    """All rows of the folder, canonical or SurgViVQA's, and those that cannot be used."""
    published = {split: data / f"{name}_multivideo.jsonl" for split, name in PUBLISHED.items()}
    files = {split: path for split, path in published.items() if path.is_file()}
    other = [f"{split}.jsonl" for split in PUBLISHED if (data / f"{split}.jsonl").is_file()]
    if files and other:
        raise SystemExit(f"--data {data}: {', '.join(other)} beside SurgViVQA's own files; keep one of the two")
    files = files or runtime.data_files(data)
    read = [row for split, path in files.items() for row in read_file(data, path, split, args)]
    shared = two_questions([row for row in read if isinstance(row, Row)])  # of all, before --limit chooses
    rows, problems = runtime.choose_rows(read, args)
    chosen = {row.where for row in rows}
    return rows, problems + [problem for problem in shared if problem.where in chosen]


def read_file(data: Path, path: Path, split: str | None, args):
    if path.suffix != ".jsonl":
        yield Problem(path.name, None, "not JSON lines; write an object a line into a .jsonl file")
        return
    entries, problems = runtime.read_jsonl(path)
    yield from problems
    for where, entry in entries:
        try:
            yield make_row(data, where, entry, split, args)
        except ValueError as error:
            yield Problem(where, entry.get("id"), str(error))


def make_row(data: Path, where: str, entry: dict, split: str | None, args) -> Row:
    wrong = runtime.misspelt(entry, FIELDS)
    if wrong:
        raise ValueError(wrong)
    video, name, group = (None if entry.get(k) in (None, "") else str(entry[k]) for k in ("video_id", "id", "group"))
    published = is_published(where)
    if published and None in (video, name):
        raise ValueError("no id or no video_id, by which SurgViVQA's files name recordings and frames")
    if (group or video) is None:
        raise ValueError("no video_id and no group: the clips of one video must not be in two splits, so name it")
    # the tokenizer composes accents (NFC): what is learned must equal what is asked for
    composed = {k: unicodedata.normalize("NFC", v) if isinstance(v, str) else v for k, v in entry.items()}
    forms = [composed.get(key) for key in ("answer", "short_answer")]
    forms = [str(form).strip() for form in forms if form is not None and not common.says_nothing(form)]
    if args.target not in composed and forms:
        raise ValueError(f"no {args.target}; give one, or choose the other --target")
    fields = common.question_fields({**composed, "answer": composed.get(args.target)})
    return Row(
        where=where,
        split=split or runtime.split_of(group or video),
        id=f"{video}/{name}" if published else name or where,  # SurgViVQA counts from one in each of its videos
        frames=find_frames(data, entry, published),
        audio=find_recording(data, where, entry, args.question),
        also_right=[form for form in forms if form != fields["answer"]],
        group=group or video,
        **fields,
    )


def find_frames(data: Path, entry: dict, published: bool) -> list[str]:
    names, numbers = entry.get("frames"), entry.get("frame_numbers")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"frames must be a list of files, in the order of time: {names!r}")
    if numbers is not None and (not isinstance(numbers, list) or [type(n) for n in numbers] != [int] * len(names)):
        raise ValueError(f"frame_numbers must be a whole number for each of the {len(names)} frames: {numbers!r}")
    if numbers is not None and numbers != sorted(numbers):
        raise ValueError(f"frame_numbers {numbers} are not in the order of time: motion would be learned wrongly")
    if published:
        names = [find_file(data, f"frames/{entry['video_id']}/{name}", FRAME_FILES) for name in names]
    if any(Path(name).suffix.lower() not in FRAME_FILES for name in names):
        raise ValueError(f"frames must be files ending in {', '.join(FRAME_FILES)}: {names}")
    return names


def find_recording(data: Path, where: str, entry: dict, question: str) -> str | None:
    """The row's recording: "audio", or in SurgViVQA's files audio/SPLIT/ID; None where it has none or needs none."""
    if question == "text":
        return None
    name = entry.get("audio")
    if name in (None, "") and is_published(where):
        file = where.partition(".jsonl")[0]
        folders = [f"audio/{folder}" for folder in (file.partition("_")[0], file)]
        folder = next((folder for folder in folders if (data / folder).is_dir()), folders[0])
        name = find_file(data, f"{folder}/{entry['id']}", AUDIO_FILES)
    if name in (None, ""):
        if question == "audio":
            raise ValueError("no audio, by which --question audio asks; name the recording, or use --question both")
        return None
    if Path(str(name)).suffix.lower() not in AUDIO_FILES:
        raise ValueError(f"audio must be a file ending in {', '.join(AUDIO_FILES)}: {name!r}; convert it to 16-bit WAV")
    return str(name)


def is_published(where: str) -> bool:
    """Is it a row of SurgViVQA's own files?"""
    return "_multivideo.jsonl:" in where


def find_file(data: Path, path: str, suffixes: tuple[str, ...]) -> str:
    """The path with whichever of the suffixes it has on the disk; with the first where there is none."""
    found = [path, *(path + suffix for suffix in (*suffixes, *map(str.upper, suffixes)))]
    with suppress(OSError):  # a name too long for any file
        return next((one for one in found if (data / one).is_file()), found[1])
    return found[1]


def two_questions(rows: list[Row]) -> list[Problem]:
    """Rows whose recording is also that of another question: it can speak only one of them.

    SurgViVQA's recordings are named by IDs that it gives twice in a split: 474 of 2,302 training rows.
    """
    spoken = defaultdict(lambda: defaultdict(list))  # recording -> question -> rows
    for row in rows:
        if row.audio:
            spoken[row.audio][row.question].append(row)
    problems = []
    for audio, questions in spoken.items():
        for row in [row for part in questions.values() for row in part] if len(questions) > 1 else []:
            other = next(part[0] for question, part in questions.items() if question != row.question)
            text = f"{audio} is also the recording of another question, {other.question!r} ({other.where})"
            problems.append(Problem(row.where, row.id, f"{text}; record each, and name it in the row's audio"))
    return problems


# ------------------------------------------------------------------------------------------------------------
# Data: frames and recordings
# ------------------------------------------------------------------------------------------------------------


def measure(data: Path, name: str) -> tuple[int, int] | int:
    """(width, height) of a frame, or the samples of a recording; each decoded completely."""
    if Path(name).suffix.lower() in AUDIO_FILES:
        return len(read_audio(data, name))
    image = runtime.open_image(data, name)
    if max(image.size) > 200 * min(image.size):
        raise ValueError(f"{name}: {image.width} x {image.height} pixels, longer than 200 times its width; crop it")
    return image.size


def reduced(size: tuple[int, int], largest: int) -> tuple[int, int]:
    """(width, height) of a frame whose longer side is at most `largest`; a small one is not enlarged."""
    scale = min(1.0, largest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def choose_frames(frames: list[str], count: int) -> list[str]:
    """`count` of the frames, evenly, in their order, the first and (of two or more) the last among them."""
    if len(frames) <= count:
        return frames
    gap = (len(frames) - 1) / max(1, count - 1)  # 8 frames, 6 chosen: 7 / 5, so 0 1 3 4 6 7
    return [frames[round(i * gap)] for i in range(count)]


def read_audio(data: Path, name: str) -> np.ndarray:
    """A recording as Whisper hears it: (samples,) float32 between -1 and 1, 16 kHz, one channel.

    WAV is read with the standard library, whatever else with soundfile. Raises ValueError naming the file.
    """
    path = runtime.inside(data, name)
    try:
        samples, rate = read_wav(path) if path.suffix.lower() == ".wav" else read_sound(path)  # (samples, channels)
        if not 4_000 <= rate <= 400_000:
            raise ValueError(f"{rate} samples a second; the header is damaged, copy it again")
        if not np.isfinite(samples).all():
            raise ValueError("not all of its samples are numbers; record it again")
        mono = samples.mean(axis=1)
        if not mono.any():  # also of no samples at all
            raise ValueError("it is silent (or its channels cancel each other): nothing is asked; record it again")
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    return resample(mono, rate)


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """((samples, channels) float32, rate) of a PCM file of 8 to 32 bits; other kinds of WAV go to soundfile."""
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, count = file.getparams()[:4]
            size = count * channels * width
            raw = file.readframes(count)
    except EOFError:
        raise ValueError("the file ends within its header; copy it again") from None
    except Exception as error:  # a damaged header makes it raise anything
        if str(error).startswith("unknown"):  # float, compressed
            refuse_cut_off(path)
            return read_sound(path)
        raise ValueError(f"no WAV file ({error})") from None
    if size > PIPED:
        return read_sound(path)
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes instead of {size}: cut off; copy it again")
    pcm = np.frombuffer(raw, np.uint8).reshape(-1, width)
    if width == 1:  # 8 bits are unsigned
        pcm = pcm ^ 0x80
    wide = np.zeros((len(pcm), 4), np.uint8)
    wide[:, 4 - width :] = pcm  # little-endian: its bytes become the upper ones of an int32
    return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32).reshape(-1, channels), rate


PIPED = 2**31 - 2**16  # bytes; more are claimed by a WAV written to a pipe, which had no length to write yet


def refuse_cut_off(path: Path) -> None:
    """Raise ValueError where a WAV's sound is shorter than its header says, which soundfile does not mind."""
    with path.open("rb") as file:
        file.seek(12)  # RIFF, size, WAVE; then chunks: name, size, content
        while len(header := file.read(8)) == 8:
            size, left = int.from_bytes(header[4:], "little"), path.stat().st_size - file.tell()
            if header[:4] == b"data" and left < size < PIPED:
                raise ValueError(f"{left} bytes of sound instead of {size}: cut off; copy it again")
            file.seek(size + size % 2, 1)


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """((samples, channels) float32, rate) of whatever soundfile reads, such as MP3 and FLAC."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: it is there, the library that it wraps is not
        text = f"{path.suffix} needs soundfile: pip install soundfile, or convert the recordings to 16-bit WAV"
        raise ValueError(text) from None
    try:
        with soundfile.SoundFile(path) as file:
            samples = file.read(dtype="float32", always_2d=True)
            expected = file.frames  # an MP3 tells it in its first frame, if at all
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(str(error)) from None
    if len(samples) < expected < 2**31:
        raise ValueError(f"{len(samples)} samples instead of {expected}: cut off; copy it again")
    return samples, file.samplerate


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at `rate` -> (n * 16000 / rate,) at 16 kHz: the spectrum is cut off, or filled up with zeros."""
    if rate == RATE:
        return samples
    unit, ours = rate // math.gcd(rate, RATE), RATE // math.gcd(rate, RATE)  # so many samples last as long as ours
    # a spectrum is of a sound that repeats: a tenth of a second of silence keeps its end from its start
    before = math.ceil(rate / 10 / unit) * unit
    after = before + -len(samples) % unit
    length = (before + len(samples) + after) // unit * ours
    spectrum = np.fft.rfft(np.pad(samples, (before, after)))
    found = np.fft.irfft(spectrum[: length // 2 + 1], length) * (RATE / rate)
    start = before // unit * ours
    return found[start : start + math.ceil(len(samples) * RATE / rate)].astype(np.float32)


# ------------------------------------------------------------------------------------------------------------
# Data: rows -> prompt trees
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """What turns a row into tokens: read from the checkpoint's folder, no weights needed."""

    tokenizer: object
    processor: object  # of images
    extractor: object  # of recordings: spectra of Whisper's window; None for a model without an audio encoder
    image_id: int | None  # None where config.json has it wrong
    audio_id: int | None  # None for a model without an audio encoder
    rope_index: object  # the model's own function: tokens and image grids -> M-RoPE positions
    settings: object  # the flags
    keep_sentinels: bool
    report: dict  # for check.json and results.json: what was found in the checkpoint's files, how a clip is read
    measured: dict = field(default_factory=dict)  # frame -> (width, height), recording -> samples
    branches: dict = field(default_factory=dict)  # what candidate_branches has encoded

    @property
    def media_ids(self) -> list[int]:
        return [self.image_id, self.audio_id]

    def frames(self, row: Row) -> list[str]:
        """The frames of a row that the model sees: fewer of val and test, by default."""
        args = self.settings
        return choose_frames(row.frames, args.frames if row.split == "train" else args.eval_frames)

    def grid(self, frame: str) -> tuple[int, int, int]:
        """(1, rows, columns) of a frame's patches, after it has been reduced to --frame-size."""
        width, height = reduced(self.measured[frame], self.settings.frame_size)
        patch, size = self.processor.patch_size, self.processor.size
        token = patch * self.processor.merge_size  # pixels along a side: 14 * 2 = 28
        high, wide = smart_resize(height, width, token, size["shortest_edge"], size["longest_edge"])
        return 1, high // patch, wide // patch

    def features(self, frame: str) -> int:
        """Tokens of a frame: its patches are merged 2 x 2."""
        return math.prod(self.grid(frame)) // self.processor.merge_size**2

    def audio_positions(self, audio: str | None) -> int:
        """Tokens of a recording: one for each 20 ms that it covers, or for Whisper's whole window."""
        if audio is None:
            return 0
        samples, window = self.measured[audio], self.extractor.n_samples
        if samples > window:
            text = f"{audio} lasts {samples / RATE:.1f} s, longer than the encoder's window of {window / RATE:.0f} s"
            raise ValueError(f"{text}; shorten it")
        return math.ceil((window if self.settings.audio_tokens == "full" else samples) / SAMPLES)

    def positions(self, prefix: list[int], frames: list[str]) -> torch.Tensor:
        """M-RoPE positions (3, P) of a prefix: text and sound count on in all three, a frame in height and width."""
        input_ids = torch.tensor([prefix])
        is_image = (input_ids == self.image_id).int()
        grids = torch.tensor([self.grid(frame) for frame in frames])
        return self.rope_index(input_ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]


def load_text(folder: Path, args) -> tuple[Text, list[Problem]]:
    """Tokenizer, image processor and position function, and the faults of the checkpoint's own files."""
    config = model_config(folder, args)
    choose_question(config, args)
    tokenizer = runtime.tokenizer(folder)
    problems, image_id, audio_id, extractor = [], None, None, None
    try:
        image_id = find_image_token(tokenizer, config)
    except ValueError as error:
        problems.append(Problem("config.json", None, f"{error}; copy image_token_id from the original config.json"))
    try:
        pad_line = f"{folder / 'tokenizer_config.json'}: {common.separate_pad_from_eos(tokenizer)}"
        if config.audio_config:
            audio_id = find_audio_token(tokenizer, config)
            window = config.audio_config["max_source_positions"] * SAMPLES // RATE  # 1,500 positions are 30 s
            extractor = WhisperFeatureExtractor(config.audio_config["num_mel_bins"], chunk_length=window)
    except ValueError as error:
        raise SystemExit(f"--model {folder}: {error}") from None
    print(pad_line)

    vision = config.vision_config
    processor = runtime.image_processor(folder, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    print(f"the question is given as {args.question}; the answer learned is {args.target}")
    if args.frames != args.eval_frames:
        print(f"frames differ: a training clip has up to {args.frames}, one of val and test up to {args.eval_frames}")
    report = {"image_token": image_id, "audio_token": audio_id, "pad": pad_line}
    report |= {name: getattr(args, name) for name in (*TRAINED_WITH, "eval_frames")}
    for name, value in (getattr(config, "trained_with", None) or {}).items():
        if value != report[name]:
            print(f"--model {folder} was trained with {name} {value}; now it is {report[name]}")
    keep, rope_index = args.sentinels == "keep", meta_model(folder, args).model.get_rope_index
    return Text(tokenizer, processor, extractor, image_id, audio_id, rope_index, args, keep, report), problems


def find_image_token(tokenizer, config) -> int:
    """The configuration's image token, which must be the one that the chat template writes for an image."""
    image_id = common.image_token_id(config)
    token = tokenizer.convert_ids_to_tokens(image_id)
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    except Exception as error:  # there is none, or it is made for text alone: a template raises what it likes
        text = f"no chat template that writes images ({error}); copy chat_template.jinja from the original checkpoint"
        raise SystemExit(f"--model {tokenizer.name_or_path}: {text}") from None
    if not token or tokenizer.encode(rendered, add_special_tokens=False).count(image_id) != 1:
        raise ValueError(f"the chat template does not write token {image_id} ({token!r}) for an image but {rendered!r}")
    return image_id


def find_audio_token(tokenizer, config) -> int:
    """The ID of <|AUDIO|>, in config.json once a graft was saved; at first the next that the tokenizer gives.

    Qwen2-VL's embedding has room: 152,064 rows for 151,657 tokens. It never grows, because new rows, drawn at random,
    would differ between training and answering.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS])
    ids = [common.single_token_id(tokenizer, token) for token in AUDIO_TOKENS]
    rows, named = config.text_config.vocab_size, getattr(config, "audio_token_id", None)
    if named not in (None, ids[1]):
        raise ValueError(f"config.json has audio_token_id {named}, but the tokenizer has {AUDIO_TOKENS[1]} as {ids[1]}")
    if max(ids) >= rows:
        raise ValueError(f"the embedding of {rows} rows has no room for {', '.join(AUDIO_TOKENS)} (IDs {ids})")
    return ids[1]


def render(row: Row, text: Text) -> str:
    """The conversation as text, in the checkpoint's own chat template, the answer between sentinels."""
    opening, closing = common.SENTINELS
    heard = [{"type": "text", "text": "".join(AUDIO_TOKENS)}] if row.audio else []
    frames = [{"type": "image"}] * len(text.frames(row))
    asked = SPOKEN if row.audio and text.settings.question == "audio" else f"Question: {row.question}"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [*heard, *frames, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": [{"type": "text", "text": opening + row.answer + closing}]},
    ]
    before, _, after = text.tokenizer.apply_chat_template(messages, tokenize=False).partition(opening)
    return before + opening + after.partition(closing)[0] + closing + text.tokenizer.eos_token


def refuse_tokens(row: Row, text: Text) -> None:
    """Raise ValueError where a text holds what the tokenizer would take for a token such as <|image_pad|>."""
    for part in (row.question, row.answer, *(row.candidates or [])):
        for token in (*common.SENTINELS, *text.tokenizer.get_added_vocab()):
            if token in part:
                raise ValueError(f"the text contains {token!r}, which the model would read as a token; reword {part!r}")


def encode_row(row: Row, text: Text) -> tuple[list[int], list[int], list[int]]:
    """(prefix, input_ids, labels): everything up to the last frame's last placeholder, then the question and answer.

    The recording stands before the frames, as the checkpoints of this recipe were trained: a spoken question is in
    the prefix, a written one in the branch.
    """
    frames = text.frames(row)
    input_ids, labels = common.encode_supervised(text.tokenizer, render(row, text), keep_sentinels=text.keep_sentinels)
    cut = len(input_ids) - input_ids[::-1].index(text.image_id)
    prefix = common.expand_placeholder(input_ids[:cut], text.image_id, [text.features(frame) for frame in frames])
    if row.audio:
        prefix = common.expand_placeholder(prefix, text.audio_id, [text.audio_positions(row.audio)])
    return prefix, input_ids[cut:], labels[cut:]


def prove_row(row: Row, text: Text, prefix: list[int], input_ids: list[int], labels: list[int]) -> None:
    """Raise ValueError unless exactly answer + EOS is learned and placeholders equal features, of image and sound."""
    learned = [label for label in labels if label != IGNORE]
    decoded = text.tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    if decoded != row.answer + text.tokenizer.eos_token:
        raise ValueError(f"learned would be {decoded!r}, not {row.answer + text.tokenizer.eos_token!r}")
    if text.image_id in input_ids or text.audio_id in input_ids:
        raise ValueError("a placeholder after the last frame's own")
    common.check_placeholders(prefix, text.image_id, sum(map(text.features, text.frames(row))))
    if text.audio_id is not None:
        common.check_placeholders(prefix, text.audio_id, text.audio_positions(row.audio), "audio")


def build_prompts(rows: list[Row], text: Text, args) -> tuple[list[Prompt], list[Problem]]:
    """A tree for each clip with all its written questions (or for each spoken question), in order of appearance."""
    trees: dict[object, Prompt] = {}
    problems = []
    for row in rows:
        try:
            refuse_tokens(row, text)
            if text.image_id is None:  # the checkpoint's fault, already listed
                continue
            prefix, input_ids, labels = encode_row(row, text)
            prove_row(row, text, prefix, input_ids, labels)
            if len(prefix) + len(input_ids) > args.pack_tokens:
                raise ValueError(
                    f"{len(prefix) + len(input_ids)} tokens, {prefix.count(text.image_id)} of them its frames', more "
                    f"than --pack-tokens {args.pack_tokens}; lower --frames or --frame-size, or raise --pack-tokens"
                )
        except ValueError as error:
            problems.append(Problem(row.where, row.id, str(error)))
            continue
        media = {"frames": text.frames(row), "audio": row.audio}
        name = (*media["frames"], row.audio) if args.share_prefix else row.id
        if name not in trees:
            trees[name] = Prompt(prefix, [], [], media, text.positions(prefix, media["frames"]))
        assert trees[name].prefix == prefix, f"{row.where}: the questions of {media} begin differently"
        trees[name].branches.append((input_ids, labels))
        trees[name].ids.append(row.id)
    return list(trees.values()), problems


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


class SurgVideo(nn.Module):
    """Qwen2-VL with Whisper's encoder, whose forward takes a packed row and returns (loss sum, learned tokens)."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration, dtype: torch.dtype):
        super().__init__()
        self.vlm = vlm
        self.dtype = dtype
        self.image_id = common.image_token_id(vlm.config)
        self.audio_id = vlm.config.audio_token_id

    def image_features(self, media: dict) -> torch.Tensor:
        """All frames of a row -> (tokens, width of the language model)."""
        with self.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.vlm.model.visual)):
            found = self.vlm.model.get_image_features(media["pixel_values"], media["image_grid_thw"])
            return torch.cat(found.pooler_output)

    def audio_features(self, media: dict) -> torch.Tensor:
        """All recordings of a row -> (audio positions, width of the language model)."""
        tower, spectra = self.vlm.audio_tower, media["input_features"]  # (recordings, mel bins, 3000)
        with self.autocast():
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower)):
                encoded = tower(spectra.to(tower.conv1.weight.dtype)).last_hidden_state  # (recordings, 1500, width)
            heard = [one[:n] for one, n in zip(encoded, media["audio_positions"].tolist(), strict=True)]
            return self.vlm.audio_projector(torch.cat(heard))

    def autocast(self):
        """With bf16, trained parameters stay float32 and are cast where they are used."""
        device = next(self.vlm.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def decoder(self) -> nn.Module:
        return self.vlm.model.language_model

    @torch.no_grad()
    def idle(self) -> None:
        """A pass without a question, for a rank that has none left while others have (runtime.equal_passes)."""
        with self.autocast():
            device, width = self.vlm.lm_head.weight.device, self.vlm.config.text_config.hidden_size
            self.decoder(inputs_embeds=torch.zeros(1, 1, width, device=device, dtype=self.dtype), use_cache=False)

    def hidden(self, input_ids, position_ids, mask, cache=None, media: dict | None = None) -> torch.Tensor:
        """Last hidden states (1, T, width) of tokens (1, T) at positions (3, 1, T) under a mask (1, 1, T, keys)."""
        with self.autocast():
            embeds = self.vlm.get_input_embeddings()(input_ids)  # (1, T, width)
            if media is not None:
                embeds = put(embeds, input_ids, self.image_id, self.image_features(media), "image")
                if "input_features" in media:  # a row may hold written questions alone
                    embeds = put(embeds, input_ids, self.audio_id, self.audio_features(media), "audio")
            return self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.vlm.lm_head(hidden)

    def forward(self, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        mask = common.visible(row["document"], row["branch"])
        hidden = self.hidden(row["input_ids"], row["position_ids"], mask, None, media=row)
        return common.supervised_loss(hidden, self.lm_head, row["labels"])

    def train(self, mode: bool = True):
        super().train(mode)
        for tower in (self.vlm.model.visual, getattr(self.vlm, "audio_tower", None)):
            if tower is not None:
                tower.train(mode and trains(tower))  # no dropout in a frozen tower
        return self


def put(embeds, input_ids, token_id: int, features: torch.Tensor, what: str) -> torch.Tensor:
    """The embeddings (1, T, width) of tokens (1, T), with features (n, width) at the n placeholders."""
    common.check_placeholders(input_ids, token_id, len(features), what)
    return embeds.masked_scatter((input_ids == token_id).unsqueeze(-1), features.to(embeds.dtype))


def trains(module: nn.Module) -> bool:
    """Is any of it trained? A frozen tower keeps no activations."""
    return any(p.requires_grad for p in module.parameters())


def model_config(folder: Path, args):
    """The configuration, with that of --audio-model's encoder as audio_config."""
    config = read_config("--model", folder, "qwen2_vl")
    config.audio_config = getattr(config, "audio_config", None)  # a dictionary, where a graft was saved
    if args.audio_model and config.audio_config:
        raise SystemExit(f"--audio-model {args.audio_model}: {folder} already has an audio encoder; leave the flag out")
    if args.audio_model:
        config.audio_config = read_config("--audio-model", Path(args.audio_model), "whisper").to_dict()
    return config


def read_config(flag: str, folder: Path, kind: str):
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != kind:
        raise SystemExit(f"{flag} {folder}: model_type {found!r}, not {kind}")
    return AutoConfig.from_pretrained(folder)


def choose_question(config, args) -> None:
    """Settle how questions are asked where no flag says it."""
    args.question = args.question or ("audio" if config.audio_config else "text")
    if args.question != "text" and not config.audio_config:
        raise SystemExit(f"--question {args.question}: the model has no audio encoder; give one with --audio-model")
    if args.question == "text" and args.audio_model:
        raise SystemExit("--audio-model with --question text: nothing would be heard; leave one of them out")


def graft(vlm: Qwen2VLForConditionalGeneration, config) -> None:
    """Add the audio encoder and the projector from its width to the language model's, as config.audio_config says."""
    if config.audio_config:
        audio = WhisperConfig(**config.audio_config)
        vlm.audio_tower = WhisperEncoder(audio)
        vlm.audio_projector = nn.Linear(audio.d_model, config.text_config.hidden_size, bias=False)


def prepare(vlm: Qwen2VLForConditionalGeneration, args) -> None:
    """Choose what is trained; whatever is, is float32, because bfloat16 loses small updates."""
    if args.tune == "full":
        common.train_only(vlm, r"(?!audio_tower\.embed_positions).*")  # Whisper's positions are a fixed sine
    elif args.question == "text":
        vlm.requires_grad_(False)
    else:
        common.train_only(vlm, r"audio_projector\.weight")
    if args.tune == "lora":
        common.add_lora(vlm, LORA_PATTERN, args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.grad_checkpoint:  # not reentrant: the inputs of a frozen base need no gradient
        vlm.gradient_checkpointing_enable({"use_reentrant": False})


def meta_model(folder: Path, args) -> Qwen2VLForConditionalGeneration:
    """The model from its configuration alone, without weights."""
    config = model_config(folder, args)
    with torch.device("meta"):
        vlm = Qwen2VLForConditionalGeneration(config)
        graft(vlm, config)
    return vlm


def load_model(folder: Path, args, text: Text, dtype) -> SurgVideo:
    """The model with what is trained chosen, still on the CPU: runtime.place puts it on the device."""
    config = model_config(folder, args)
    ours = ("audio_tower.", "audio_projector.") if config.audio_config else ()
    remedy = "a grafted encoder must be audio_tower.*, with audio_projector.weight and audio_config in config.json"
    vlm = runtime.open_model(Qwen2VLForConditionalGeneration, folder, config, dtype, ours, remedy=remedy)
    window = vlm.config.text_config.sliding_window  # None where the configuration does not use it
    if window is not None and window < args.pack_tokens:
        raise SystemExit(f"--pack-tokens {args.pack_tokens} is longer than the model's sliding window {window}")
    common.separate_pad_from_eos(text.tokenizer, vlm)
    graft(vlm, config)
    vlm.config.audio_token_id = text.audio_id
    vlm.config.trained_with = {name: text.report[name] for name in TRAINED_WITH}  # for whoever goes on from it
    if config.audio_config:
        nn.init.normal_(vlm.audio_projector.weight, std=vlm.config.text_config.initializer_range)
        if args.audio_model:
            runtime.load_part(Path(args.audio_model), ("model.encoder.", "encoder."), vlm.audio_tower)
        else:
            runtime.load_part(folder, ("audio_tower.",), vlm.audio_tower)
            runtime.load_part(folder, ("audio_projector.",), vlm.audio_projector)
        vlm.audio_tower.to(dtype)
        vlm.audio_projector.to(dtype)
    prepare(vlm, args)
    if args.compile:
        vlm.model.language_model.compile(dynamic=True)
    return SurgVideo(vlm, dtype)


@torch.no_grad()
def verify_first_batch(model: SurgVideo, trees: list[Prompt], run) -> None:
    """Before step 0: the placeholders of the real first batch against the features of the real model."""
    images, positions = [], []
    for row in packed_rows(trees, run):
        common.check_placeholders(row["input_ids"], model.image_id, len(model.image_features(row)))
        images += [tree.prefix.count(model.image_id) for tree in row["prompts"]]
        if "input_features" in row:
            common.check_placeholders(row["input_ids"], model.audio_id, len(model.audio_features(row)), "audio")
            positions += row["audio_positions"].tolist()
    print(f"image tokens: {min(images)} to {max(images)} per clip, ID {model.image_id} — verified")
    if positions:
        print(f"audio tokens: {min(positions)} to {max(positions)} a recording, ID {model.audio_id} — verified")


def answer_limit(row: Row, args) -> int:
    """The most tokens of a free answer."""
    return args.max_answer_tokens


def score(prediction: str | None, row: Row) -> dict[str, bool]:
    """exact: equal to the answer, in one of its two forms. tolerant: or to a declared synonym of one."""
    forms = [common.score_answer(prediction, form, row.question_type) for form in (row.answer, *row.also_right)]
    right, said = {common.normalise(form) for form in (row.answer, *row.also_right)}, common.normalise(prediction)
    lines = [{common.normalise(word) for word in line} for line in SYNONYMS]
    same = any(said in line and line & right for line in lines)
    return {"exact": any(f["exact"] for f in forms), "tolerant": same or any(f["tolerant"] for f in forms)}


def own_figures(model, prompts: list[Prompt], records: list[dict], run) -> dict:
    """Figures of this script alone, for results.json: none."""
    return {}


def media_kind(row: Row) -> tuple:
    """Rows that agree in this can be asked about each other's media."""
    return ()


def show(row: Row, other: Row) -> Row:
    """The row, asked about the other's frames; a question that is heard stays its own."""
    return replace(row, frames=other.frames)


def blank(media: dict) -> dict:
    """What read_images gives, with nothing to see in it: all pixels 0, the processor's mean colour; sound stays."""
    return {**media, "pixel_values": torch.zeros_like(media["pixel_values"])}


def read_images(data: Path, text: Text, prompts: list[Prompt]) -> dict:
    """The frames and recordings of prompt trees in the order of the row.

    pixel_values is flat, (patches of all frames, channels * 2 frames * patch * patch); image_grid_thw (frames, 3);
    and where something is heard input_features (recordings, mel bins, 3000) and audio_positions (recordings,).
    """
    frames = [name for prompt in prompts for name in prompt.media["frames"]]
    images = [runtime.open_image(data, name) for name in frames]
    images = [image.resize(reduced(image.size, text.settings.frame_size), Image.Resampling.BICUBIC) for image in images]
    read = text.processor(images, return_tensors="pt")
    for name, grid in zip(frames, read["image_grid_thw"].tolist(), strict=True):
        if tuple(grid) != text.grid(name):
            raise ValueError(f"{name} has another size than when it was checked; start again")
    media = {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"]}
    recordings = [prompt.media["audio"] for prompt in prompts if prompt.media["audio"]]
    if recordings:
        sounds = [read_audio(data, name) for name in recordings]
        for name, samples in zip(recordings, sounds, strict=True):
            if len(samples) != text.measured[name]:
                raise ValueError(f"{name} has another length than when it was checked; start again")
        media["input_features"] = text.extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        media["audio_positions"] = torch.tensor([text.audio_positions(name) for name in recordings])
    return media


# ------------------------------------------------------------------------------------------------------------
# Training loop: the same text in every script (BEGIN)
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What stays the same from the first step to the last answer."""

    args: object
    folder: Path
    device: torch.device
    stop: runtime.StopSignal
    text: object  # the script's own: tokenizer and what belongs to it
    read_media: object  # prompt trees of a row -> {"pixel_values": …}


class Steps(Dataset):
    """An item is this rank's part of an optimizer step: its packed rows, each with its media.

    Where a file can no longer be read, the item is the ValueError that says so: the loop saves before it stops.
    """

    def __init__(self, plan: list[list[Prompt]], pack_tokens: int, read_media, rank: int = 0, ranks: int = 1):
        self.plan, self.pack_tokens, self.read_media = plan, pack_tokens, read_media
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[dict] | ValueError:
        rows = common.pack(self.plan[index], self.pack_tokens, self.ranks)[self.rank :: self.ranks]
        try:
            return [{**row, **self.read_media(row["prompts"])} for row in rows]
        except ValueError as error:
            return error


def start_loader(steps: Steps, workers: int) -> DataLoader:
    return DataLoader(steps, None, num_workers=workers, worker_init_fn=runtime.ignore_signals)


def make_plan(prompts: list[Prompt], args) -> list[list[Prompt]]:
    """The optimizer steps of the whole run; a function of the seed alone, so that any step can be gone back to."""
    plan = []
    for epoch in range(args.epochs):
        plan += common.plan_steps(prompts, args.questions_per_step, args.seed, epoch)
        if args.max_steps and len(plan) >= args.max_steps:
            return plan[: args.max_steps]
    return plan


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up, then half a cosine towards zero; step counts from 1."""
    warmup = max(1, round(args.warmup * steps))
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def to_device(row: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in row.items()}


def train(model, optimizer, plan, start: int, validate, save, run: Run) -> float:
    """Steps start+1 … len(plan); returns the last step's loss. validate() gives a loss, save(step) a checkpoint."""
    args, device, rank = run.args, run.device, runtime.rank()
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = Steps(plan[start:], args.pack_tokens, run.read_media, rank, runtime.ranks())
    metrics = runtime.Metrics(run.folder, start, len(plan), args)
    if validate and metrics.validated < start and (start == len(plan) or start % args.eval_every == 0):
        metrics.write(step=start, val_loss=validate())  # the run was stopped before it came to that
    model.train()
    run.stop.wait()
    loss, bad, saved, begun = math.nan, 0, start, time.monotonic()
    for step, rows in enumerate(start_loader(steps, args.workers), start=start + 1):
        # ---- one optimizer step: trees are those of all ranks, rows are this rank's ----
        if runtime.any_rank(isinstance(rows, ValueError)):
            faults = [fault for fault in runtime.gather(str(rows) if isinstance(rows, ValueError) else "") if fault]
            if saved < step - 1:
                save(step - 1)
            raise SystemExit(f"step {step}: {'; '.join(faults)}. The steps before are saved: mend it and start again")
        trees = plan[step - 1]
        learned = sum(tree.learned() for tree in trees)
        # dropout draws from (seed, step, rank): a step that is taken again after a stop draws the same
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
        loss_sum = torch.zeros((), device=device)
        for row in rows:
            row_loss, _ = model(to_device(row, device))
            (row_loss / learned).backward()  # the mean over the whole step's tokens, not a mean of means
            loss_sum += row_loss.detach()
        runtime.sum_gradients(parameters)
        loss = float(runtime.sum_over_ranks(loss_sum)) / learned
        grad_norm = runtime.clip_gradients(parameters, args.clip)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:  # or the step changes nothing, neither parameters nor the optimizer's moments
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(plan), args)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- what it was like ----
        ids = [name for tree in trees for name in tree.ids]
        tokens = sum(len(tree) for tree in trees)
        seconds, begun = time.monotonic() - begun, time.monotonic()
        if finite:
            metrics.write(
                step=step,
                epoch=round(step / len(plan) * args.epochs, 3),
                loss=loss,
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
                trees=len(trees),
                questions=len(ids),
                tokens=tokens,
                tokens_per_s=tokens / seconds,
                questions_per_s=len(ids) / seconds,
                peak_memory_mb=runtime.peak_memory_mb(device),
                ids=ids,
            )
        else:
            metrics.write_bad(step, loss, grad_norm, ids)
        bad = 0 if finite else bad + 1
        if bad == 3:
            metrics.say(f"three such steps in a row: stopped; replay them with --only-ids {metrics.bad_steps}")
            metrics.close()
            runtime.end_ranks()
            raise SystemExit(runtime.EXIT_NOT_FINITE)
        # ---- save first, then evaluate: a crash there must not cost the steps ----
        stopped = runtime.any_rank(run.stop.received is not None)
        last = step == len(plan)
        due = validate and (last or step % args.eval_every == 0)
        if last or due or stopped or step % args.save_every == 0:
            save(step)
            saved, begun = step, time.monotonic()
        if stopped:
            signalled = run.stop.received or "a signal to another rank"
            again = "the same command" if args.resume == "auto" else "the same command with --resume auto"
            metrics.say(f"stopped by {signalled} after step {step}; {again} goes on from there")
            metrics.close()
            runtime.end_ranks()
            raise SystemExit(runtime.EXIT_STOPPED)
        if due:
            run.stop.act()
            metrics.write(step=step, val_loss=validate())
            run.stop.wait()
            model.train()
            begun = time.monotonic()
    run.stop.act()
    metrics.close()
    return loss


# ------------------------------------------------------------------------------------------------------------
# Training loop: the same text in every script (END)
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# Checking, answering and scoring: the same text in every script (BEGIN)
# ------------------------------------------------------------------------------------------------------------


def check_data(data: Path, args, text, fatal: list[Problem]):
    """The proof that stands before every run: each row built and decoded again, each file opened.

    Returns the rows and the trees by split. Faults end the program, listed all at once, before weights are read.
    """
    if args.sentinels == "keep" and args.decode != "free":
        raise SystemExit("--sentinels keep: where an answer ends is not learned there; only --decode free is possible")
    # ---- the files, and the scorer on the data's own answers ----
    rows, faults = read_data(data, args)
    found, text.measured, digests = runtime.check_media(data, rows, measure)
    faults += found
    shared = runtime.overlaps(rows, digests)
    runtime.print_overlaps(shared)
    scorer = runtime.on_first_rank(lambda: audit_scorer(lambda said, row: score(said, row)["exact"], rows))
    print_audit(scorer)
    fatal = fatal + [Problem("scorer", None, f"{failure}; mend `score`") for failure in scorer["failures"]]
    # ---- the rows ----
    splits, trees, counts = {}, {}, {}
    for split in ("train", "val", "test"):
        bad = {p.where for p in faults}
        part = [row for row in rows if row.split == split and row.where not in bad]
        trees[split], found = build_prompts(part, text, args)
        faults += found
        bad = {p.where for p in found}
        splits[split] = [row for row in part if row.where not in bad]
        counts[split] = {
            "questions": len(splits[split]),
            "files": len({name for row in splits[split] for name in row.media}),
            "tokens": sum(len(tree) for tree in trees[split]),
            "learned_tokens": sum(tree.learned() for tree in trees[split]),
            "question_types": dict(Counter(row.question_type for row in splits[split])),
            "not_among_candidates": sum(not common.answerable(vars(row)) for row in splits[split]),
            "longer_than_limit": longer_than_limit(splits[split], trees[split], args),
        }
        print(f"{split}: " + ", ".join(f"{n} {name}" for name, n in counts[split].items() if isinstance(n, int)))
    for tree in (trees["train"] or trees[args.eval_split])[:5]:
        runtime.print_learned(text.tokenizer, tree.ids[0], tree.prefix, *tree.branches[0])
    # ---- check.json: what was found, what the splits share, how the first row is learned ----
    proof = {"splits": counts, "shared_with_earlier_splits": shared, **text.report}
    first = next((tree for part in trees.values() for tree in part), None)
    if first:
        tokens = runtime.row_tokens(text.tokenizer, first.prefix, *first.branches[0], text.media_ids)
        proof |= {"row": {"id": first.ids[0], "tokens": tokens}}
    proof |= {"scorer": scorer, "gate": runtime.on_first_rank(lambda: data_gate(data, rows, digests))}
    print_gate(proof["gate"])
    place = Path(args.out, "blind", args.blind) if args.blind else Path(args.out)
    runtime.report_check(place / "check.json", proof, fatal, faults, args.skip_bad)
    if not (splits["train"] or args.eval_only or args.check):
        raise SystemExit(f"--data {data}: no training rows")
    if args.check:
        if not first:
            raise SystemExit("no row is left")
        runtime.print_row(**proof["row"])
        print("check passed")
    return splits, trees


def longer_than_limit(rows: list[Row], prompts: list[Prompt], args) -> int:
    """How many answers are too long for answer_limit, EOS not counted: given freely they cannot be right."""
    learned = {
        name: sum(label != IGNORE for label in b[1]) for t in prompts for name, b in zip(t.ids, t.branches, strict=True)
    }
    return sum(learned[row.id] - 1 > answer_limit(row, args) for row in rows if row.id in learned)


def write_model(source: Path, checkpoint: Path, target: Path, args, text, dtype) -> None:
    """A plain model folder that from_pretrained opens: merged weights beside the checkpoint's own small files."""
    vlm = load_model(source, args, text, dtype).vlm
    common.load_trained(vlm, checkpoint)
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in path.name:
            shutil.copy(path, target)
    common.merge_lora(vlm).to(dtype).save_pretrained(target)
    text.tokenizer.save_pretrained(target)
    if text.processor is not None:  # volumes have none
        runtime.save_image_processor(text.processor, target)


def write_final(source: Path, checkpoint: Path, run, dtype) -> None:
    """RUN/adapter, or where there are no adapters RUN/model, from the last checkpoint."""
    adapter = list(checkpoint.glob("adapter_*"))
    with runtime.replacing(run.folder / ("adapter" if adapter else "model")) as target:
        if not adapter:
            write_model(source, checkpoint, target, run.args, run.text, dtype)
        for path in adapter:
            shutil.copy(path, target)


@torch.no_grad()
def mean_loss(model, prompts: list[Prompt], run: Run) -> float:
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, learned tokens
    with runtime.equal_passes(model.decoder, model.idle):
        for row in packed_rows(prompts[runtime.rank() :: runtime.ranks()], run):
            sums += torch.stack(model(row)).cpu()
    total, tokens = runtime.sum_over_ranks(sums).tolist()
    return total / tokens


def packed_rows(prompts: list[Prompt], run: Run):
    """Packed rows on the device, a few trees at a time: memory does not grow with the number of questions."""
    # a candidate may be longer than any answer, which all fit
    longest = max((len(tree.prefix) + len(ids) for tree in prompts for ids, _ in tree.branches), default=0)
    size = max(run.args.pack_tokens, longest)
    few = max(1, 2 * size * len(prompts) // max(1, sum(map(len, prompts))))  # trees of about two rows, with their media
    few = Steps([prompts[i : i + few] for i in range(0, len(prompts), few)], size, run.read_media)
    for rows in start_loader(few, run.args.workers):
        if isinstance(rows, ValueError):
            raise SystemExit(f"{rows}. Mend the file and start again")
        yield from (to_device(row, run.device) for row in rows)


@torch.no_grad()
def answer(model, prompts: list[Prompt], rows: dict[str, Row], run: Run) -> dict[str, dict]:
    """{row ID: {"prediction": text, "probabilities": {…} where candidates were scored}}"""
    model.eval()
    mode, tokenizer = run.args.decode, run.text.tokenizer
    scored = score_candidates(model, prompts, rows, run) if mode in ("score", "both") else {}
    found = scored if mode == "score" else {}
    left = [tree.part(i for i, name in enumerate(tree.ids) if name not in found) for tree in prompts]
    left = [common.answering_prompt(tree) for tree in left if tree.ids]
    count = sum(len(tree.ids) for tree in left)
    shown = runtime.progress(total=count, desc="answering", unit="question")
    for packed in packed_rows(left, run):
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        tries = [allowed_answers(rows[name], run.text) if mode == "trie" else None for name in ids]

        def read(input_ids, position_ids, mask, cache, media=packed):
            # media belong to the first reading; afterwards they are in the cache
            return model.hidden(input_ids, position_ids, mask, cache, None if cache.get_seq_length() else media)

        limits = [answer_limit(rows[name], run.args) for name in ids]
        answers = common.decode(read, model.lm_head, packed, tokenizer.eos_token_id, limits, tries)
        for name, tokens in zip(ids, answers, strict=True):
            text, ended = tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] == tokenizer.eos_token_id
            found[name] = {**scored.get(name, {}), "prediction": text.strip(), "ended": ended}
        shown.update(len(ids))
    shown.close()
    return found


def candidate_branches(row: Row, text: Text) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the row's branch for each answer that is allowed; none where any text is."""
    if not row.candidates:
        return []
    key = render(replace(row, answer=""), text), *row.candidates  # of many images the same is asked
    if key not in text.branches:
        text.branches[key] = [encode_row(replace(row, answer=candidate), text)[1:] for candidate in row.candidates]
    return text.branches[key]


def allowed_answers(row: Row, text: Text) -> dict | None:
    """The trie of the answers that are allowed, EOS included."""
    learned = [[t for t in labels if t != IGNORE] for _, labels in candidate_branches(row, text)]
    return common.build_trie(learned) or None


def score_candidates(model, prompts: list[Prompt], rows: dict[str, Row], run: Run) -> dict[str, dict]:
    """Every allowed answer as a branch of its own: the exact argmax, with probabilities."""
    trees = []
    for tree in prompts:
        pairs = [(name, candidate) for name in tree.ids for candidate in rows[name].candidates or []]
        branches = [branch for name in tree.ids for branch in candidate_branches(rows[name], run.text)]
        if pairs:
            trees.append(replace(tree, branches=branches, ids=pairs))
    scores = defaultdict(dict)
    for (name, candidate), log_prob in log_probabilities(model, trees, run).items():
        scores[name][candidate] = log_prob
    found = {}
    for name, by_candidate in scores.items():
        chances = torch.tensor(list(by_candidate.values()), dtype=torch.float64).softmax(0).tolist()
        probabilities = dict(zip(by_candidate, chances, strict=True))
        found[name] = {"prediction": max(probabilities, key=probabilities.get), "probabilities": probabilities}
    return found


@torch.no_grad()
def log_probabilities(model, prompts: list[Prompt], run: Run) -> dict:
    """{branch ID: the log-probability of all that is learned in it}"""
    model.eval()
    found = {}
    for packed in packed_rows(prompts, run):
        mask = common.visible(packed["document"], packed["branch"])
        hidden = model.hidden(packed["input_ids"], packed["position_ids"], mask, None, media=packed)
        ids = [name for tree in packed["prompts"] for name in tree.ids]
        found |= dict(zip(ids, common.branch_log_probs(hidden, model.lm_head, packed).tolist(), strict=True))
    return found


def evaluate(model, prompts: list[Prompt], rows: list[Row], train_rows: list[Row], run: Run) -> dict:
    """Answer, score, write predictions.jsonl, results.json and the report, print the table."""
    if run.args.blind:
        prompts, rows, run = blinded(prompts, rows, run)
    begun, found = time.monotonic(), {}
    with runtime.equal_passes(model.decoder, model.idle):
        mine = answer(model, prompts[runtime.rank() :: runtime.ranks()], {row.id: row for row in rows}, run)
    for part in runtime.gather(mine):
        found.update(part)
    seconds = time.monotonic() - begun
    training = [(row.question_type, row.question, [row.answer, *other_forms(row)]) for row in train_rows]
    blind = common.blind_answers(training, [(row.question_type, row.question) for row in rows])
    records = []
    for row, said in zip(rows, blind, strict=True):  # every row, answered or not
        answered = found.get(row.id, {"prediction": None})
        scored = score(answered["prediction"], row)
        known = {"id": row.id, "group": row.group, "media": row.media, "question_type": row.question_type}
        known |= {"question": row.question, "answer": row.answer, **answered}
        known |= {"candidates": row.candidates} if row.candidates else {}
        known |= {"also_right": other_forms(row)} if other_forms(row) else {}
        floors = {name: score(text, row)["exact"] for name, text in said.items()}
        records.append({**known, "correct": scored["exact"], "tolerant": scored["tolerant"], "floors": floors})
    results = common.summarise(records)
    cut = sum(not record.get("ended", True) for record in records)  # by --max-answer-tokens, before EOS
    results |= {"split": run.args.eval_split, "decode": run.args.decode, "cut_off": cut, **run.text.report}
    results |= {"data": str(run.args.data), "max_answer_tokens": run.args.max_answer_tokens, "limit": run.args.limit}
    results |= {"questions_per_s": len(rows) / seconds}
    runtime.write_jsonl(run.folder / "predictions.jsonl", records)
    print(common.results_table(results))
    if not run.args.blind:
        results |= own_figures(model, prompts, records, run)
    runtime.write_json(run.folder / "results.json", results)
    print(
        f"answered {len(rows)} questions in {seconds:.1f} s, {cut} cut off before EOS, listed in "
        f"{run.folder / 'predictions.jsonl'}"
    )
    if run.args.report and not run.args.blind:
        runtime.on_first_rank(lambda: write_report(run.folder))
    return results


def blinded(prompts: list[Prompt], rows: list[Row], run: Run):
    """What `evaluate` needs to answer without seeing, for a folder of its own: RUN/blind/blank or RUN/blind/shuffled.

    blank: the same questions, and nothing to see in their media. shuffled: each with the media of another group.
    """
    mode = run.args.blind
    run = replace(run, folder=run.folder / "blind" / mode)
    if mode == "blank":
        return prompts, rows, replace(run, read_media=lambda trees: blank(run.read_media(trees)))
    rows = exchange(rows)
    prompts, problems = build_prompts(rows, run.text, run.args)
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    return prompts, rows, run


def exchange(rows: list[Row]) -> list[Row]:
    """Each row with the media of another: of another group, unless one group has more than half of them.

    Within each kind (`media_kind`) media are put in order of their groups and passed on by as many places as the
    largest group has. Rows that share theirs get the same others: an image is still read once for all its questions.
    Where a kind has one only, its rows are left out.
    """
    kinds = defaultdict(dict)  # kind -> media -> a row that shows them
    for row in rows:
        if runtime.shown(row):  # a text alone stays one
            kinds[media_kind(row)].setdefault(tuple(runtime.shown(row)), row)
    other = {}
    for by_media in kinds.values():
        owners = list(by_media.values())
        if len(owners) == 1:  # nothing else of its kind could be shown
            print(f"--blind shuffled: questions about {owners[0].media[0]} are left out, the only one of its kind")
            continue
        sizes = Counter(row.group for row in owners)
        order = random.Random(0).sample(list(sizes), len(sizes))
        owners.sort(key=lambda row: order.index(row.group))
        places = max(sizes.values()) % len(owners) or len(owners) // 2
        moved = owners[places:] + owners[:places]
        other |= {tuple(runtime.shown(row)): new for row, new in zip(owners, moved, strict=True)}
    kept = [row for row in rows if not runtime.shown(row) or tuple(runtime.shown(row)) in other]
    if not other:
        raise SystemExit("--blind shuffled: there are no two media to exchange")
    return [show(row, other[tuple(runtime.shown(row))]) if runtime.shown(row) else row for row in kept]


def other_forms(row: Row) -> list[str]:
    """Of the answer, which are right, too, in a script whose rows have them."""
    return getattr(row, "also_right", [])


def train_and_answer(folder: Path, splits: dict, trees: dict, dtype, argv, run: Run) -> None:
    args, text = run.args, run.text
    if args.overfit:
        splits = dict.fromkeys(splits, splits["train"][: args.overfit])
        trees = {s: build_prompts(rows, text, args)[0] for s, rows in splits.items()}
        runtime.on_first_rank(lambda: shutil.rmtree(run.folder / "checkpoints", ignore_errors=True))

    # ---- the plan, and the place to go on from ----
    plan = make_plan(trees["train"], args)
    same = {name: getattr(args, name) for name in runtime.SAME_SETTINGS}  # or it would be another run
    same |= {name: getattr(args, name) for name in OWN_SETTINGS}
    same |= {"dtype": str(dtype), "steps": len(plan), "model": runtime.model_fingerprint(folder)}
    same |= {"rows": runtime.fingerprint((t.ids, t.media, t.branches) for t in trees["train"])}
    checkpoint = runtime.find_checkpoint(run.folder, args.resume)
    if args.only_ids and args.resume != "auto":  # a replay in a folder of its own, with the weights of a checkpoint
        runtime.find_checkpoint(run.folder, "none")
        start = 0
    else:
        start = runtime.first_step(checkpoint, same, args.resume_anyway)
    runtime.go_back(run.folder, start)

    # ---- model and optimizer ----
    torch.manual_seed(args.seed)
    model = load_model(folder, args, text, dtype)
    if checkpoint:
        common.load_trained(model.vlm, checkpoint)
    runtime.place(model, model.decoder, run.device, dtype, args.parallel)
    trained = {n: p for n, p in model.vlm.named_parameters() if p.requires_grad}
    number, everything = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    runtime.print_trained(model.vlm)
    print(f"{run.device.type}, {dtype}; {number:,} parameters trained ({number / everything:.2%})")
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=args.weight_decay)
    if start:
        runtime.load_optimizer(checkpoint / "optimizer.safetensors", optimizer, trained)
    if not start or args.resume_anyway:
        runtime.write_json(run.folder / "config.json", {**runtime.describe_run(__file__, args, argv), "same": same})

    def save(step):
        weights = {} if common.lora_layers(model.vlm) else runtime.whole(trained)  # adapters are whole on every rank
        moments = runtime.whole(runtime.optimizer_tensors(optimizer, trained))

        def write(target):
            common.save_trained(model.vlm, target, weights)
            save_file(moments, target / "optimizer.safetensors")

        runtime.save_checkpoint(run.folder, step, write, {"step": step, "same": same}, args.keep)

    def validate():
        return mean_loss(model, trees["val"], run)

    # ---- train ----
    print(f"{len(plan)} steps of at most {args.questions_per_step} questions, from step {start}")
    verify_first_batch(model, plan[0], run)
    if start == 0 and trees["val"]:  # a broken evaluation fails now, not after an epoch
        print(f"loss before training: {mean_loss(model, trees['val'][:2], run):.4f}")
    loss = train(model, optimizer, plan, start, validate if trees["val"] else None, save, run)
    newest = runtime.checkpoint_folder(run.folder, len(plan))
    runtime.on_first_rank(lambda: write_final(folder, newest, run, dtype))

    # ---- answer ----
    if splits[args.eval_split]:
        results = evaluate(model, trees[args.eval_split], splits[args.eval_split], splits["train"], run)
    if args.overfit:
        wrong = round((1 - results["all"]["exact"]) * results["all"]["n"])
        print(f"overfit: loss {loss:.4f} (must be below {args.overfit_loss}), {wrong} answers wrong (must be none)")
        if wrong or not loss < args.overfit_loss:
            raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------------
# Checking, answering and scoring: the same text in every script (END)
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------


def audio_folder(args, weights: bool) -> str | None:
    return str(runtime.model_folder(args.audio_model, weights, flag="--audio-model")) if args.audio_model else None


def encoder_fingerprint(folder: Path) -> str:
    return runtime.model_fingerprint(folder, [folder / "config.json", *runtime.weight_files(folder)])[:12]


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if args.count_params:
        with torch.device("meta"):
            args.audio_model = audio_folder(args, weights=False)
            vlm = meta_model(runtime.model_folder(args.model, weights=False), args)
            choose_question(vlm.config, args)
            prepare(vlm, args)
        runtime.print_parameters(vlm)
        return
    with runtime.program(args, own=not (args.check or args.merge)) as (device, dtype, stop):
        checkpoint = None
        replay = args.only_ids and args.resume not in ("auto", "none")
        if args.eval_only or args.merge or replay:
            checkpoint = runtime.find_checkpoint(Path(args.out or ""), args.resume)
            if checkpoint is None:
                raise SystemExit(
                    "no checkpoint to answer with or to merge: give its run with --out, or --resume FOLDER"
                )
            runtime.adopt_settings(checkpoint, args, OWN_SETTINGS)

        # ---- the data is proved before any weights are read ----
        folder = Path(runtime.on_first_rank(lambda: str(runtime.model_folder(args.model, weights=not args.check))))
        args.audio_model = runtime.on_first_rank(lambda: audio_folder(args, weights=not args.check))
        weights = encoder_fingerprint(Path(args.audio_model)) if args.audio_model else None
        if args.audio_weights and weights is None:
            raise SystemExit(f"{checkpoint} hears: give the encoder that it was trained with by --audio-model")
        if args.audio_weights not in (None, weights):
            raise SystemExit(f"--audio-model {args.audio_model}: {checkpoint} was trained with another encoder")
        args.audio_weights = weights
        text, faults = load_text(folder, args)
        if args.merge:
            if faults:
                raise SystemExit("\n".join(map(str, faults)))
            if runtime.rank() == 0:
                with runtime.writing(Path(args.merge)):
                    small = torch.bfloat16 if args.dtype == "auto" else dtype
                    write_model(folder, checkpoint, Path(args.merge), args, text, small)
            print(f"wrote {args.merge}")
            return
        splits, trees = check_data(Path(args.data), args, text, faults)
        if args.check:
            return
        run = Run(args, Path(args.out), device, stop, text, partial(read_images, Path(args.data), text))
        if args.eval_only:
            if not splits[args.eval_split]:
                raise SystemExit(f"--eval-split {args.eval_split}: the data has no such rows")
            model = load_model(folder, args, text, dtype)
            common.load_trained(model.vlm, checkpoint)
            runtime.place(model, model.decoder, device, dtype, args.parallel)
            evaluate(model, trees[args.eval_split], splits[args.eval_split], splits["train"], run)
        else:
            train_and_answer(folder, splits, trees, dtype, argv, run)


if __name__ == "__main__":
    main()
