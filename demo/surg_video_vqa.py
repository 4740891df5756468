"""A tiny Qwen2-VL, a tiny Whisper, and clips with spoken questions as in SurgViVQA's files."""

import json

import numpy as np

from demo.clips import CLIP_LENGTH, CLIP_QUESTIONS, CLIP_STEP, clip_frame, clip_scene, random_clip
from demo.qwen2vl_sentinel import AROUND, write_qwen2vl
from demo.recordings import SPOKEN, speak, write_wav, write_whisper
from demo.scenes import random_patient


def write_model(folder, seed):
    texts = [form for _, _, values in CLIP_QUESTIONS.values() for answer in values.values() for form in answer]
    texts += [question for question, _, _ in CLIP_QUESTIONS.values()]
    prompts = ["Answer the question about the surgical clip with the answer alone.", "Answer the spoken question."]
    write_qwen2vl(folder, seed, [*texts, *AROUND, *prompts, "Question: "], "surg_video_vqa")
    write_whisper(folder.with_name("whisper"), seed)


def clip_row(clip, kind, video, numbers, index):
    question, depends_on, values = CLIP_QUESTIONS[kind]
    answer, short = values[clip[depends_on]]
    return {
        "id": f"qa_{index:06d}",
        "video_id": video,
        "frames": [f"{video}_{number}" for number in numbers],
        "frame_numbers": numbers,
        "question": question,
        "question_type": kind,
        "answer": answer,
        "short_answer": short,
    }


def write_data(folder, clips, seed):
    """Videos have one to five clips, all in the same split; each clip is asked three spoken questions."""
    rng = np.random.default_rng([seed, 0])
    index = videos = asked = 0
    for split, end in [("train", round(0.7 * clips)), ("eval", round(0.8 * clips)), ("test", clips)]:
        rows = []
        while index < end:
            video, patient, start = f"{videos // 4 + 1:03d}-{videos % 4 + 1:03d}", random_patient(rng, videos), 0
            videos += 1
            (folder / "frames" / video).mkdir(parents=True, exist_ok=True)
            for _ in range(min(end - index, rng.integers(1, 6))):
                start += int(rng.integers(50, 5000))
                numbers = [start + CLIP_STEP * i for i in range(CLIP_LENGTH)]
                start = numbers[-1]
                clip = random_clip(rng, patient)
                for i, number in enumerate(numbers):
                    frame = clip_frame(clip_scene(clip, i / (CLIP_LENGTH - 1)))
                    frame.save(folder / "frames" / video / f"{video}_{number}.jpg", quality=90)
                for kind in rng.permutation(list(CLIP_QUESTIONS))[:3].tolist():
                    rows.append(clip_row(clip, kind, video, numbers, asked))
                    rate, channels = int(rng.choice([16_000, 22_050, 24_000])), int(rng.integers(1, 3))
                    samples, _ = speak(rng, SPOKEN[kind], rate)
                    write_wav(folder / "audio" / split / f"{rows[-1]['id']}.wav", samples, rate, channels)
                    asked += 1
                index += 1
        (folder / f"{split}_multivideo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / split}_multivideo.jsonl: {len(rows)} questions")
