"""Recordings: WAV, FLAC, MP3 and Ogg read as one channel at 16 kHz; what cannot be heard is refused by name."""

import struct
import sys

import numpy as np
import pytest
import soundfile

from inputs import sound


def tone(rate: int, seconds: float, frequency: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000])
def test_resampling_keeps_a_tone_and_drops_what_16_khz_cannot_hold(rate):
    found = sound.resample(tone(rate, 0.7, 440).astype(np.float32), rate)
    assert len(found) == -(-(round(0.7 * rate) * 16_000) // rate) and found.dtype == np.float32
    expected = tone(16_000, 0.7, 440)[: len(found)]
    assert np.abs(found[800:-800] - expected[800 : len(expected) - 800]).max() < 2e-3
    if rate > 20_000:
        assert np.abs(sound.resample(tone(rate, 0.7, 10_000), rate)[800:-800]).max() < 2e-3


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_of_every_depth_is_read_as_soundfile_reads_it(tmp_path, subtype):
    wave = np.stack([tone(16_000, 0.1, 440), tone(16_000, 0.1, 1000)], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype=subtype)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(sound.read(tmp_path, "a.wav"), expected.mean(axis=1), atol=1e-6)


def test_wav_needs_no_other_package_and_the_rest_names_the_one_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    soundfile.write(tmp_path / "a.wav", tone(24_000, 0.3, 440), 24_000)
    soundfile.write(tmp_path / "a.flac", tone(24_000, 0.3, 440), 24_000)
    assert len(sound.read(tmp_path, "a.wav")) == 4800
    with pytest.raises(ValueError, match=r"a.flac cannot be read: .flac needs soundfile: pip install soundfile, or"):
        sound.read(tmp_path, "a.flac")


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg", "opus"])
def test_compressed_recordings_are_read(tmp_path, suffix):
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(tmp_path / f"a.{suffix}", tone(24_000, 1.0, 440), 24_000, **kind)
    found = sound.read(tmp_path, f"a.{suffix}")
    loudest = np.abs(np.fft.rfft(found)).argmax() * 16_000 / len(found)
    assert loudest == pytest.approx(440, abs=3) and len(found) == pytest.approx(16_000, abs=2000)


def test_recordings_that_cannot_be_heard_are_refused_by_name(tmp_path):
    """Cut off, damaged, of no kind that is read: never silence in place of a question."""
    wave = tone(16_000, 0.5, 440)
    for name in ("full.wav", "full.mp3", "full.flac", "full.ogg"):
        soundfile.write(tmp_path / name, wave, 16_000)
    wav, mp3, flac, ogg = ((tmp_path / f"full.{suffix}").read_bytes() for suffix in ("wav", "mp3", "flac", "ogg"))
    kinds = {
        "float": ("WAV", "FLOAT"),
        "extended": ("WAVEX", "PCM_24"),
        "law": ("WAV", "ULAW"),
        "ima": ("WAV", "IMA_ADPCM"),
    }
    for name, (form, subtype) in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, format=form, subtype=subtype)
        assert len(sound.read(tmp_path, f"{name}.wav")) == pytest.approx(8000, abs=500)
    cut = {f"cut_{name}.wav": (tmp_path / f"{name}.wav").read_bytes()[:3000] for name in kinds}
    unknown = "copy it again, or convert it: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"
    files = {
        **{name: (content, "'data' has .* cut off or damaged; copy it again") for name, content in cut.items()},
        "cut.wav": (wav[:1000], "'data' has 956 bytes instead of 16,000: cut off or damaged; copy it again"),
        "cut.mp3": (mp3[: len(mp3) // 2], "not all of its frames are complete: cut off or damaged; copy it again"),
        "cut_frames.mp3": (mp3[: sound.mp3_frame(mp3[:4]) * 2], "cut off or damaged; copy it again"),
        "cut.flac": (flac[: len(flac) // 2], f"decoder lost sync: damaged, cut off, .*{unknown}"),
        "cut.ogg": (ogg[: len(ogg) // 2], "its last page is missing: cut off"),
        "cut.opus": (ogg[:-1], "its last page is missing: cut off"),
        "piped.flac": (
            flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:],
            "does not say how long it is: .*ffmpeg",
        ),
        "claims.flac": (flac[:21] + bytes([flac[21] | 0x0F]) + flac[22:], "does not say how long it is: .*copy"),
        "header.wav": (wav[:20], "'fmt ' has 0 bytes instead of 16: cut off or damaged"),
        "no_data.wav": (wav[:36], "the file ends within its header"),
        "rate.wav": (wav[:24] + bytes(8) + wav[32:], "0 samples a second"),
        "format.wav": (wav[:16] + b"\xff\xff" + wav[18:], "'fmt ' has .* bytes instead of 65,535: cut off or damaged"),
        "text.wav": (b"no sound at all" * 10, f"no WAV file: it begins with b'no s'; {unknown}"),
        "empty.wav": (b"", "no WAV file: it begins with b''"),
        "text.mp3": (b"no sound at all" * 10, f"Format not recognised: .*{unknown}"),
        "a.m4a": (b"\0\0\0\x20ftypM4A " + bytes(300), f"Format not recognised: .*{unknown}"),
        "a.webm": (b"\x1aE\xdf\xa3" + bytes(300), f"Format not recognised: .*{unknown}"),
    }
    for name, (content, why) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{why}"):
            sound.read(tmp_path, name)
    soundfile.write(tmp_path / "nan.wav", np.full(1600, np.nan), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan.wav cannot be read: not all of its samples are numbers"):
        sound.read(tmp_path, "nan.wav")
    with pytest.raises(ValueError, match=r"missing.wav is missing"):
        sound.read(tmp_path, "missing.wav")


def test_what_is_silent_is_decided_by_a_level_about_the_mean(tmp_path):
    """Zeros, the noise of the last bit, an offset, channels that cancel each other, a click; speech may be quiet."""
    draw, loud = np.random.default_rng(0), tone(16_000, 1.0, 440)
    integers = np.round(9000 * np.sin(np.arange(16_000) / 9)).astype(np.int16)
    click, hum = np.zeros(16_000), np.zeros(16_000)
    click[8000], hum[8000:] = 0.9, 0.1  # the second is an offset that sets in
    silent = {
        "none": (np.zeros(0), "FLOAT", "it holds less than a tenth of a second"),
        "zeros": (np.zeros(16_000), "PCM_16", ""),
        "last_bit": (draw.integers(-1, 2, 16_000).astype(np.int16), "PCM_16", ""),
        "three_steps": (draw.integers(-3, 4, 16_000).astype(np.int16), "PCM_16", ""),
        "eight_bit_127": (np.full(16_000, -1 / 128), "PCM_U8", ""),
        "offset": (np.full(16_000, 3000, np.int16), "PCM_16", ""),
        "inverted": (np.stack([integers, ~integers], axis=1), "PCM_16", ""),
        "cancel": (np.stack([loud, -loud], axis=1), "FLOAT", ""),
        "click": (click, "PCM_16", ""),
        "hum": (hum, "PCM_16", ""),
        "tiny": (loud * 1e-6, "FLOAT", ""),
    }
    for name, (samples, subtype, why) in silent.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000, subtype=subtype)
        why = why or "it is silent .* record it again"
        with pytest.raises(ValueError, match=f"{name}.wav cannot be read: {why}"):
            sound.read(tmp_path, f"{name}.wav")
    for factor, subtype in [(1e-3, "PCM_16"), (1e-3, "FLOAT"), (0.1, "PCM_U8"), (0.02, "ULAW")]:
        soundfile.write(tmp_path / "a.wav", loud * factor + 0.1, 16_000, subtype=subtype)
        assert len(sound.read(tmp_path, "a.wav")) == 16_000
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(10 * 16_000), loud[:8000]]), 16_000)
    assert sound.measure(tmp_path, "a.wav")[0][1] == pytest.approx(-9, abs=0.1)  # a pause does not count


def test_quiet_recordings_are_listed_and_no_faults(tmp_path, capsys):
    for name, factor in [("loud.wav", 1), ("quiet.wav", 0.004), ("quieter.wav", 0.002)]:
        soundfile.write(tmp_path / name, tone(16_000, 1.0, 440) * factor, 16_000)
    measured = {name: sound.measure(tmp_path, name)[0] for name in ("loud.wav", "quiet.wav", "quieter.wav")}
    measured |= {"frame.jpg": (8, -90), "refused.wav": None}
    assert measured["loud.wav"] == (16_000, -9.0)
    assert sound.list_quiet(measured) == {"quiet_recordings": {"quiet.wav": -57.0, "quieter.wav": -63.0}}
    said = "recordings quieter than -50 dBFS: 2, such as quieter.wav at -63.0; listen to some\n"
    assert capsys.readouterr().out == said
    assert sound.list_quiet({"loud.wav": (16_000, -9.0)}) == {"quiet_recordings": {}}
    assert capsys.readouterr().out == ""


def test_floats_in_the_scale_of_integers_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.5, 440) * 32_767, 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a sample of 16,383.*: integers written as floats; divide them by"):
        sound.read(tmp_path, "a.wav")
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.5, 440) * 3, 16_000, subtype="FLOAT")
    assert np.abs(sound.read(tmp_path, "a.wav")).max() > 1.4  # as clipping overshoots it


def wav(size: int, riff: int = 0, before: bytes = b"", after: bytes = b"", **fmt) -> bytes:
    """A second of 16-bit samples whose header claims `size` bytes of them."""
    data = np.round(9000 * np.sin(np.arange(16_000) / 9)).astype("<i2").tobytes()
    if fmt.get("bits") == 32:
        data = (np.frombuffer(data, "<i2") / np.float32(2**15)).tobytes()
    bits, kind = fmt.get("bits", 16), fmt.get("kind", 1)
    header = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, 1, 16_000, 2000 * bits, bits // 8, bits)
    return (
        struct.pack("<4sI4s", b"RIFF", riff, b"WAVE")
        + header
        + before
        + struct.pack("<4sI", b"data", size)
        + data
        + after
    )


def test_lengths_that_a_header_leaves_open_reach_to_the_end(tmp_path):
    """Zero and placeholders, as pipes leave them; chunks beside the sound, of odd length padded or not; extensible."""
    odd = struct.pack("<4sI5s", b"LIST", 5, b"INFOx")
    files = {
        **{f"{size:x}": wav(size, size) for size in (0, 2_000_000_000, 2**31 - 1, 2**32 - 1, 2**31 - 2**16)},
        **{f"float {size:x}": wav(size, size, bits=32, kind=3) for size in (0, 2_000_000_000, 2**32 - 1)},
        "odd": wav(32_000, before=odd),
        "padded": wav(32_000, before=odd + b"\0"),
        "padded otherwise": wav(32_000, before=odd + b"x"),
        "float odd": wav(64_000, before=odd, bits=32, kind=3),
        "behind": wav(32_000, after=struct.pack("<4sI4s", b"LIST", 4, b"abcd")),
        "odd behind": wav(32_000, after=odd),
        "zeros behind": wav(32_000, after=bytes(100)),
        "half a sample": wav(2**32 - 1, after=b"\1"),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
        assert len(sound.read(tmp_path, f"{name}.wav")) == 16_000, name
    wave = tone(16_000, 0.5, 440)
    soundfile.write(tmp_path / "plain.wav", wave, 16_000)
    for subtype in ("PCM_16", "PCM_24"):
        soundfile.write(tmp_path / "extended.wav", wave, 16_000, subtype=subtype, format="WAVEX")
        found = sound.read(tmp_path, "extended.wav")
        np.testing.assert_allclose(found, sound.read(tmp_path, "plain.wav"), atol=2**-15)


MORE = "more follows where its sound ends, .*: another recording, a wrong length, or damage; take recordings apart, or"


def test_sound_behind_a_declared_end_is_a_fault(tmp_path):
    files = {
        "half.wav": (wav(16_000), MORE),
        "two.wav": (wav(32_000, after=wav(32_000)), MORE),
        "again.wav": (wav(32_000, after=struct.pack("<4sI", b"data", 4) + bytes(4)), MORE),
        "float.wav": (wav(16_000, bits=32, kind=3), MORE),
        "nothing.wav": (wav(0)[:44] + struct.pack("<4sI4s", b"LIST", 4, b"abcd"), "it holds less than a tenth"),
    }
    for name, (content, why) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: {why}"):
            sound.read(tmp_path, name)


def compressed(tmp_path, suffix: str, seconds: float) -> bytes:
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(tmp_path / f"part.{suffix}", tone(24_000, seconds, 440), 24_000, **kind)
    return (tmp_path / f"part.{suffix}").read_bytes()


TAG = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg", "opus"])
def test_two_recordings_joined_in_one_file_are_a_fault(tmp_path, suffix):
    """soundfile reads the first alone."""
    first, second = compressed(tmp_path, suffix, 1.0), compressed(tmp_path, suffix, 1.5)
    for between in (b"", TAG, b"TAG" + bytes(125)) if suffix == "mp3" else (b"",):
        (tmp_path / f"a.{suffix}").write_bytes(first + between + second)
        with pytest.raises(ValueError, match=MORE):
            sound.read(tmp_path, f"a.{suffix}")


def mp3(tmp_path, mode: str) -> bytes:
    """An MP3 without the first frame that says how many follow."""
    soundfile.write(tmp_path / "part.mp3", tone(24_000, 1.0, 440), 24_000, bitrate_mode=mode, compression_level=0.5)
    file = (tmp_path / "part.mp3").read_bytes()
    return file[sound.mp3_frame(file[:4]) :]


def test_an_mp3_that_does_not_say_its_length_is_read_where_its_frames_are_of_one_size(tmp_path):
    """As speech synthesis writes them. Of others soundfile reads a part. Tags are no sound."""
    bare = mp3(tmp_path, "CONSTANT")
    one = sound.mp3_frame(bare[:4])
    for content, seconds in [
        (bare, 1.06),  # with the silence that encoders put before
        (TAG + bare + b"TAG" + bytes(125), 1.06),
        (bare + bytes(50), 1.06),
        (bare + bare, 2.11),  # nothing in it tells that these are two: heard as one
    ]:
        for name in ("a.mp3", "called.wav"):
            (tmp_path / name).write_bytes(content)
            assert len(sound.read(tmp_path, name)) / 16_000 == pytest.approx(seconds, abs=0.02)
    for content, why in [
        (bare[:-20], "not all of its frames are complete: cut off or damaged; copy it again"),
        (bare[:one] + b"xy" + bare[one:], MORE),
        (mp3(tmp_path, "VARIABLE"), "its frames differ in size, and none says how many there are; convert it: ffmpeg"),
    ]:
        (tmp_path / "a.mp3").write_bytes(content)
        with pytest.raises(ValueError, match=why):
            sound.read(tmp_path, "a.mp3")


def test_the_length_must_be_that_of_the_check(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.5, 440), 16_000)
    assert len(sound.read(tmp_path, "a.wav", samples=8000)) == 8000
    with pytest.raises(ValueError, match=r"a.wav has another length than when it was checked; start again"):
        sound.read(tmp_path, "a.wav", samples=7999)


def test_which_file_asks_and_what_is_no_recording():
    assert sound.recording({"audio": "a.WAV"}, required=True) == ["a.WAV"]
    assert sound.recording({"audio": ""}, required=False) == sound.recording({}, required=False) == []
    with pytest.raises(ValueError, match="no audio, by which --question audio asks"):
        sound.recording({"audio": None}, required=True)
    assert sound.recording({"audio": "a.m4a"}, required=True) == ["a.m4a"]  # whether it can be read is seen then
    with pytest.raises(ValueError, match=r"ending in .wav, .flac, .mp3, .*: 'a.wma'; convert it: ffmpeg"):
        sound.recording({"audio": "a.wma"}, required=False)
