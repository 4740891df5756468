"""A tiny LLaVA and endoscopy frames with questions."""

import math

import torch
import transformers

from demo.questions import question_rows, texts_asked_and_answered, write_questions
from demo.scenes import GRID, draw_frame
from demo.sizes import CLIP, INITIALIZER_RANGE, TEXT
from demo.tokenizers import build_mistral_tokenizer
from demo.towers import clip_processor, pretrain_tower


def write_model(folder, seed):
    """A LLaVA checkpoint: all files that a real one has."""
    tokenizer = build_mistral_tokenizer([*texts_asked_and_answered(), "[INST] [/INST]"])
    tokenizer.save_pretrained(folder)

    clip_processor().save_pretrained(folder)

    # The image token is the first ID past the tokenizer's end. The embedding is padded to a multiple of 64
    # beyond it (32000 pieces -> 32064 rows), with room for two more tokens, such as a pad token.
    image_token = len(tokenizer)
    rows = math.ceil((image_token + 3) / 64) * 64
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**TEXT, vocab_size=rows, initializer_range=INITIALIZER_RANGE),
        vision_config=transformers.CLIPVisionConfig(**CLIP, initializer_range=INITIALIZER_RANGE),
        image_token_index=image_token,
        image_seq_length=GRID**2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    pretrain_tower(model.model.vision_tower, seed, "llava_med")
    model.save_pretrained(folder)
    print(f"{folder}: LLaVA, {model.num_parameters():,} parameters, {len(tokenizer)} word pieces")


def write_data(folder, images, seed):
    write_questions(folder, images, seed, draw_frame, question_rows)
