"""Recordings: a question is spoken as three tones, which a tiny Whisper has learned to tell apart."""

import wave

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from demo.clips import CLIP_QUESTIONS

TONES = [400, 700, 1200, 2000]  # Hz
SPOKEN = dict(  # question type -> its tones; each tone of one is heard in others too, elsewhere
    zip(CLIP_QUESTIONS, [(0, 1, 2), (0, 2, 1), (1, 0, 3), (1, 3, 0), (2, 3, 1), (3, 2, 0)], strict=True)
)
WHISPER = {  # the real one: 128 mel bins, 1,500 positions of 20 ms, width 1280, 32 layers
    "num_mel_bins": 40,
    "max_source_positions": 50,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    **{f"{name}_token_id": index for index, name in enumerate(["pad", "bos", "eos", "decoder_start"])},
}


def speak(rng, tones, rate):
    """(samples,) float of about 0.8 s, and (positions of 20 ms,) which tone is heard there, 0 for none."""
    parts, heard = [], []
    for tone in tones:
        for length, number in [(rng.uniform(0.02, 0.06), 0), (rng.uniform(0.16, 0.24), tone + 1)]:
            time = np.arange(round(length * rate)) / rate
            sound = np.sin(2 * np.pi * TONES[number - 1] * rng.uniform(0.98, 1.02) * time) if number else 0 * time
            parts.append(rng.uniform(0.2, 0.6) * sound * np.minimum(1, 100 * np.minimum(time, length - time)))
            heard.append(np.full(len(time), number))
    samples = np.concatenate(parts)
    samples = samples + rng.uniform(0.001, 0.01) * rng.standard_normal(len(samples))
    return samples, np.concatenate(heard)[rate // 100 :: rate // 50]


def write_wav(path, samples, rate, channels):
    """16-bit PCM; of two channels the second is quieter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    louder = np.stack([samples, 0.7 * samples][:channels], axis=1)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes((louder * 32767).astype("<i2").tobytes())


def pretrain_listener(encoder, extractor, seed, steps=200, batch=16):
    """Teach Whisper's encoder which tone is heard when, in recordings that the data set does not hold.

    A real one starts from one that has learned to write down speech. It stays frozen wherever adapters are trained.
    """
    rng = np.random.default_rng([seed, 2])
    head = torch.nn.Linear(WHISPER["d_model"], len(TONES) + 1)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()])
    named = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        spoken = [speak(rng, rng.integers(0, len(TONES), 3), 16_000) for _ in range(batch)]
        labels = torch.full((batch, WHISPER["max_source_positions"]), 0)
        for row, (_, heard) in zip(labels, spoken, strict=True):
            row[: len(heard)] = torch.from_numpy(heard[: len(row)])
        sounds = [samples.astype(np.float32) for samples, _ in spoken]
        features = extractor(sounds, sampling_rate=16_000, return_tensors="pt").input_features
        logits = head(encoder(features).last_hidden_state)  # (batch, positions, tones + 1)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named.append((logits.argmax(-1) == labels).float().mean())
    print(f"audio tower: {torch.stack(named[-20:]).mean():.1%} of the last positions named, after {steps} steps")


def write_whisper(folder, seed):
    """A Whisper checkpoint: configuration, weights of encoder and decoder, feature extractor."""
    window = WHISPER["max_source_positions"] // 50  # seconds
    extractor = transformers.WhisperFeatureExtractor(WHISPER["num_mel_bins"], chunk_length=window)
    extractor.save_pretrained(folder)
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    pretrain_listener(model.model.encoder, extractor, seed)
    model.save_pretrained(folder)
    print(f"{folder}: Whisper, {model.num_parameters():,} parameters")
