"""The samples of a recording's file as they stand in it: WAV, and what soundfile reads, such as MP3, FLAC and Ogg.

soundfile reads what a header declares and passes over the rest: a recording that is cut off, or has another behind it.
So each kind of file is looked through first, whatever kind its name says it is.
"""

import io
import re
import struct

import numpy as np

CONVERT = "convert it: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"
PLACEHOLDER = 1_900_000_000  # bytes; a WAV that claims more was written to a pipe
AFTER = re.compile(rb"(?!RIFF|data|fmt )[ -~]{4}|\x00{4}")  # chunks that may stand behind a WAV's sound
MORE = "more follows where its sound ends, and would not be heard: another recording, a wrong length, or damage"
MORE = f"{MORE}; take recordings apart, or write it anew"
BEGINS = {b"OggS": rb"OggS\x00[\x02\x03\x06]", b"fLaC": rb"fLaC[\x00\x80]\x00\x00\x22"}  # a recording


def samples(file: bytes, suffix: str) -> tuple[np.ndarray, int]:
    """((n, channels) float32, samples a second) of a file. Raises ValueError where it cannot be read to its end."""
    if suffix == ".wav" and not file.startswith((b"RIFF", b"ID3", b"\xff", b"OggS", b"fLaC")):
        raise ValueError(f"no WAV file: it begins with {file[:4]!r}; copy it again, or {CONVERT}")
    if file.startswith(b"RIFF") and file[8:12] == b"WAVE":
        return wav(file)
    if file.startswith((b"ID3", b"\xff")):
        check_mp3(file)
    if file.startswith(b"OggS"):
        check_ogg(file)
    if len(re.findall(BEGINS.get(file[:4], b"$"), file)) > 1:
        raise ValueError(MORE)
    return decode(file, suffix)


def decode(file: bytes, suffix: str) -> tuple[np.ndarray, int]:
    """((n, channels) float32, rate) of a file that soundfile reads."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: it is there, the library that it wraps is not
        text = f"{suffix} needs soundfile: pip install soundfile, or convert the recordings to 16-bit WAV"
        raise ValueError(text) from None
    try:
        with soundfile.SoundFile(io.BytesIO(file)) as opened:
            expected, rate, kind = opened.frames, opened.samplerate, opened.format
            if expected * opened.channels > 2**30:  # as of a FLAC that was written to a pipe
                raise ValueError("its header does not say how long it is")
            found = opened.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        text = f"{getattr(error, 'error_string', error)}".strip(" .")
        text = f"{text}: damaged, cut off, or of a kind that soundfile does not read; copy it again, or {CONVERT}"
        raise ValueError(text) from None
    if len(found) < expected and kind != "MP3":  # of which it may be a guess, and check_mp3 has looked
        raise ValueError(f"{len(found):,} samples instead of {expected:,}: cut off; copy it again")
    return found, rate


def wav(file: bytes) -> tuple[np.ndarray, int]:
    """16-bit integers need no package; other kinds go to soundfile, as a file of nothing but what they need."""
    chunks = wav_chunks(file)
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
    if (kind, bits) == (1, 16) and channels:
        count = len(chunks[b"data"]) // (2 * channels)
        found = np.frombuffer(chunks[b"data"], "<i2", count * channels) / np.float32(2**15)
        return found.reshape(-1, channels), rate
    parts = [(name, chunks[name]) for name in (b"fmt ", b"fact", b"data") if name in chunks]
    parts = b"".join(name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in parts)
    return decode(b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WAVE" + parts, ".wav of other than 16 bits")


def wav_chunks(file: bytes) -> dict[bytes, bytes]:
    """{name: content} of a WAV's chunks. Raises ValueError where they are cut off, or more than these is in the file.

    A pipe leaves the length of the sound open, 0 or a placeholder: then it reaches to the end. RIFF's own is not read.
    """
    chunks, at = {}, 12
    while at < len(file):
        name, size, at = file[at : at + 4], int.from_bytes(file[at + 4 : at + 8], "little"), at + 8
        left = max(0, len(file) - at)
        if b"data" in chunks and not (size <= left and AFTER.fullmatch(name)):
            raise ValueError(MORE)
        if name == b"data" and (size == 0 or size >= PLACEHOLDER):
            size = left
        if size > left:
            text = f"its chunk {name.decode('latin-1')!r} has {left:,} bytes instead of {size:,}"
            raise ValueError(f"{text}: cut off or damaged; copy it again")
        chunks[name] = file[at : at + size]
        at += size
        at += size % 2 and file[at : at + 4] not in (b"data", b"fmt ", b"LIST", b"fact")  # some leave the padding out
    if b"data" not in chunks or len(chunks.get(b"fmt ", b"")) < 16:
        raise ValueError("the file ends within its header; copy it again")
    return chunks


def check_ogg(file: bytes) -> None:
    """Raise ValueError where no page says, in a bit, that it is the last, or that page is not complete."""
    last = file.rfind(b"OggS")
    count = file[last + 26] if len(file) > last + 26 else 0
    if not (count and file[last + 5] & 4 and last + 27 + count + sum(file[last + 27 : last + 27 + count]) <= len(file)):
        raise ValueError(f"its last page is missing: cut off; copy it again, or {CONVERT}")


# ---- MP3 ----

# a first frame that says how many follow: its flags, then their number
COUNT = rb".{4}(?:\x00{9}|\x00{17}|\x00{32})(?:Xing|Info)\x00\x00\x00[\x01\x03\x05\x07\x09\x0b\x0d\x0f](.{4})"
COUNT = re.compile(COUNT, re.S)
# by a byte of a frame's header: kilobits a second by their index, bytes of a frame at one bit a sample, rates by theirs
LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
MPEG = {
    0xFA: ((0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0), 144_000, (44_100, 48_000, 32_000)),
    0xF2: (LOW, 72_000, (22_050, 24_000, 16_000)),
    0xE2: (LOW, 72_000, (11_025, 12_000, 8_000)),
}


def check_mp3(file: bytes) -> None:
    """Raise ValueError where not all frames are there, or soundfile would not read them all.

    Where the first frame does not say how many follow, it reads as many of that size as the file has room for: all, if
    they are of one size, as speech synthesis writes them. Two such files that were joined are heard as one.
    """
    start, sizes = 0, []
    while file.startswith(b"ID3", start):  # seven bits of each byte are its size
        start += 10 + sum(byte << 7 * i for i, byte in enumerate(reversed(file[start + 6 : start + 10])))
    end = start
    while size := mp3_frame(file[end : end + 4]):
        sizes.append(size)
        end += size
    if not sizes:  # soundfile says what is wrong with it
        return
    counted = COUNT.match(file, start)
    count = int.from_bytes(counted[1]) if counted else len(sizes)
    if end > len(file) or len(sizes) < count:
        raise ValueError("not all of its frames are complete: cut off or damaged; copy it again")
    # the first is counted or not, and some write one more; behind a tag, by chance, bytes are as frames begin
    if len(sizes) > count + 2 or file.count(file[start : start + 2], end) > 2:
        raise ValueError(MORE)
    if not counted and max(sizes) > min(sizes) + 1:  # a byte of padding
        raise ValueError(f"its frames differ in size, and none says how many there are; {CONVERT}")


def mp3_frame(head: bytes) -> int:
    """Bytes of the MP3 frame that begins so; 0 where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xFE not in MPEG or head[2] & 0x0C == 0x0C:
        return 0
    kilobits, scale, rates = MPEG[head[1] & 0xFE]
    size = kilobits[head[2] >> 4] * scale // rates[head[2] >> 2 & 3]
    return size and size + (head[2] >> 1 & 1)  # a byte of padding
