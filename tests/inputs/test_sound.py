"""Recordings: WAV, FLAC and MP3 read as one channel at 16 kHz; what cannot be heard is refused by name."""

import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_compressed_recordings_are_read(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", tone(24_000, 1.0, 440), 24_000)
    found = sound.read(tmp_path, f"a.{suffix}")
    loudest = np.abs(np.fft.rfft(found)).argmax() * 16_000 / len(found)
    assert loudest == pytest.approx(440, abs=3) and len(found) == pytest.approx(16_000, abs=2000)


def test_recordings_that_cannot_be_heard_are_refused_by_name(tmp_path):
    """Cut off, damaged, of nothing, of nothing but zeros: never silence in place of a question."""
    wave = tone(16_000, 0.5, 440)
    for name in ("full.wav", "full.mp3", "full.flac"):
        soundfile.write(tmp_path / name, wave, 16_000)
    wav, mp3, flac = ((tmp_path / f"full.{suffix}").read_bytes() for suffix in ("wav", "mp3", "flac"))
    kinds = {
        "float": ("WAV", "FLOAT"),
        "extended": ("WAVEX", "PCM_24"),
        "law": ("WAV", "ULAW"),
        "ima": ("WAV", "IMA_ADPCM"),
    }
    for name, (form, subtype) in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, format=form, subtype=subtype)
        assert len(sound.read(tmp_path, f"{name}.wav")) == pytest.approx(8000, abs=500)
    no_rate = wav[:24] + bytes(4) + wav[28:]
    cut = {f"cut_{name}.wav": (tmp_path / f"{name}.wav").read_bytes()[:3000] for name in kinds}
    files = {
        **{name: (content, "cut off; copy it again") for name, content in cut.items()},
        "cut.wav": (wav[:1000], "cut off; copy it again"),
        "cut.mp3": (mp3[: len(mp3) // 2], "cut off; copy it again"),
        "cut.flac": (flac[: len(flac) // 2], ""),
        "header.wav": (wav[:20], "the file ends within its header"),
        "rate.wav": (no_rate, "0 samples a second"),
        "format.wav": (wav[:16] + b"\xff\xff" + wav[18:], "no WAV file"),
        "text.wav": (b"no sound at all" * 10, "no WAV file"),
        "empty.wav": (b"", "the file ends within its header"),
        "text.mp3": (b"no sound at all" * 10, ""),
    }
    for name, (content, why) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{why}"):
            sound.read(tmp_path, name)
    for name, samples in {
        "none.wav": np.zeros(0),
        "zeros.wav": np.zeros(1000),
        "cancel.wav": np.stack([wave, -wave], axis=1),
    }.items():
        soundfile.write(tmp_path / name, samples, 16_000, subtype="FLOAT")
        with pytest.raises(ValueError, match=f"{name} cannot be read: it is silent .* record it again"):
            sound.read(tmp_path, name)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan.wav cannot be read: not all of its samples are numbers"):
        sound.read(tmp_path, "nan.wav")
    with pytest.raises(ValueError, match=r"missing.wav is missing"):
        sound.read(tmp_path, "missing.wav")


def test_unusual_wav_headers_are_read(tmp_path):
    """Written to a pipe, which has no length to write; WAVE_FORMAT_EXTENSIBLE; with chunks that are no sound."""
    wave = tone(16_000, 0.2, 440)
    soundfile.write(tmp_path / "full.wav", wave, 16_000)
    expected, full = sound.read(tmp_path, "full.wav"), (tmp_path / "full.wav").read_bytes()
    at = full.index(b"data") + 4
    endless = full[:4] + b"\xff" * 4 + full[8:at] + b"\xff" * 4 + full[at + 4 :]
    (tmp_path / "pipe.wav").write_bytes(endless)
    (tmp_path / "more.wav").write_bytes(full + b"LIST\x04\x00\x00\x00abcd")
    soundfile.write(tmp_path / "extended.wav", wave, 16_000, format="WAVEX")
    for name in ("pipe.wav", "more.wav", "extended.wav"):
        np.testing.assert_array_equal(sound.read(tmp_path, name), expected)


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
    with pytest.raises(ValueError, match=r"ending in .wav, .flac, .mp3: 'a.m4a'; convert it"):
        sound.recording({"audio": "a.m4a"}, required=False)


def test_a_recording_speaks_one_question():
    asked = [
        ("a.wav", "Is it on?"),
        ("a.wav", "Is it on?"),
        ("b.wav", "Is it on?"),
        ("b.wav", "Where?"),
        (None, "Why?"),
    ]
    examples = [
        SimpleNamespace(where=f"train.jsonl:{i}", id=str(i), question=question, audio=[name] if name else [])
        for i, (name, question) in enumerate(asked, start=1)
    ]
    first, second = map(str, sound.two_questions(examples))
    assert first.startswith("train.jsonl:3 (id 3): b.wav is also the recording of another question, 'Where?'")
    assert second.startswith("train.jsonl:4 (id 4): b.wav is also") and "(train.jsonl:3)" in second
