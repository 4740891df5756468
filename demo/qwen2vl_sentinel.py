"""A tiny Qwen2-VL, and frames and questions as in Kvasir-VQA's files, a third of them wide."""

import copy
import json
import math

import torch
import transformers

from demo.questions import QUESTIONS, question_rows, texts_asked_and_answered, write_questions
from demo.scenes import recorded_frame
from demo.sizes import INITIALIZER_RANGE, QWEN2VL_VISION, TEXT
from demo.tokenizers import build_qwen2_tokenizer
from demo.towers import pretrain_tower, qwen2vl_processor


def write_model(folder, seed):
    prompts = ["Question type: \nQuestion:", "Answer the question about the medical image with the answer alone."]
    prompts = [*(kind for kind, _ in QUESTIONS.values()), *prompts]
    write_qwen2vl(folder, seed, [*texts_asked_and_answered(), *AROUND, *prompts], "qwen2vl_sentinel")


# What stands around questions: the real one has pieces for these words, as for all common ones.
AROUND = ["You are a helpful assistant.", "system\nuser\nassistant"]


def write_qwen2vl(folder, seed, texts, lesson):
    """A Qwen2-VL checkpoint: all files that a script reads of a real one, config.json flat as in the real one."""
    tokenizer = build_qwen2_tokenizer(texts)
    tokenizer.save_pretrained(folder)

    qwen2vl_processor().save_pretrained(folder)

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = {
        **TEXT,
        "vocab_size": math.ceil((len(tokenizer) + 4) / 64) * 64,  # room for a pad token and three for sound
        "initializer_range": INITIALIZER_RANGE,
        # of the 16 frequencies of a head, how many turn with time, height and width: 16, 24, 24 in the real one
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": pad,  # never used: the tokenizer has no BOS
        "eos_token_id": eos,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()},
        "vision_config": {
            **QWEN2VL_VISION,
            "hidden_size": TEXT["hidden_size"],
            "initializer_range": INITIALIZER_RANGE,
        },
    }
    torch.manual_seed(seed)
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**copy.deepcopy(config)))
    # A real one samples unless told otherwise, and ends at either of two tokens.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=pad,
        pad_token_id=pad,
        eos_token_id=[eos, pad],
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.001,
    )
    pretrain_tower(model.model.visual, seed, lesson)
    model.save_pretrained(folder)
    named = {"architectures": [type(model).__name__], "model_type": "qwen2_vl", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(named | config, indent=2) + "\n")
    print(f"{folder}: Qwen2-VL, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def kvasir_rows(rng, scene, index):
    """The same questions in Kvasir-VQA's columns. Every other row is enriched: it states its type."""
    rows = []
    for number, row in enumerate(question_rows(rng, scene, index)):
        kept = {key: row[key] for key in ("question", "answer", "group")}
        rows.append({"image_id": f"{index:05d}", "image_filename": f"{index:05d}.jpg", **kept})
        if (index + number) % 2:
            rows[-1]["question_type"] = row["question_type"]
    return rows


def write_data(folder, images, seed):
    write_questions(folder, images, seed, recorded_frame, kvasir_rows)
