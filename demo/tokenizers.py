"""Tokenizers that split as the real ones do, with their chat templates."""

import json
import string

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.sizes import GPT2, TEXT

# 3 special + 256 bytes + 95 characters + 246 merges. <image> is ID 600, past them, as Mistral's is 32000.
VOCABULARY = 600
# Mistral's instruction format, as LLaVA-NeXT-Mistral renders it: the system text and the images come first in
# the user turn. <s> is missing on purpose: the tokenizer adds it.
MISTRAL_CHAT_TEMPLATE = """\
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set images, text = "", message.content -%}
{%- else -%}
{%- set images = "<image>\\n" * (message.content | selectattr("type", "equalto", "image") | list | length) -%}
{%- set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join -%}
{%- endif -%}
{%- if message.role == "system" -%}
{%- set ns.system = text + "\\n\\n" -%}
{%- elif message.role == "user" -%}
{{- "[INST] " + ns.system + images + text + " [/INST]" -}}
{%- set ns.system = "" -%}
{%- else -%}
{{- " " + text + "</s>" -}}
{%- endif -%}
{%- endfor -%}
"""


def build_mistral_tokenizer(texts):
    """Like Mistral's: SentencePiece BPE that falls back to bytes, with <unk>, <s>, </s> and no pad token."""
    special = ["<unk>", "<s>", "</s>"]
    # Trained with word boundaries, so that no piece spans two words, and without merging digits.
    trainee = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits])
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, "▁"]
    size = VOCABULARY - len(special) - 256
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=characters, show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    learnt = json.loads(trainee.to_str())["model"]

    # The byte pieces are added afterwards: as the trainer's special tokens, decoding would drop them.
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=MISTRAL_CHAT_TEMPLATE,
    )


# Right behind the BPE vocabulary, in this order, as 151643 to 151656.
QWEN2VL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2VL_SPECIAL += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN2VL_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# The real vocabulary has learned them from markup and code. Because of them, <ANS>Pink</ANS> has no piece
# that says where the answer begins: <, ANS, >P, ink, </, ANS, >.
MARKUP_MERGES = [*((">", letter) for letter in string.ascii_letters), (">", "("), ("<", "/"), ("]", "</")]
MARKUP_MERGES += [("N", "S"), ("A", "NS")]
# Qwen2-VL's, over several lines. add_vision_id and add_generation_prompt are arguments of apply_chat_template.
QWEN2VL_CHAT_TEMPLATE = """\
{%- set count = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != "system" -%}
{{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" or "image" in part or "image_url" in part -%}
{%- set count.images = count.images + 1 -%}
{{- "Picture " ~ count.images ~ ": " if add_vision_id else "" -}}
{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
{%- elif part.type == "video" or "video" in part -%}
{%- set count.videos = count.videos + 1 -%}
{{- "Video " ~ count.videos ~ ": " if add_vision_id else "" -}}
{{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
{%- elif "text" in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\\n" if add_generation_prompt else "" -}}
"""


def build_qwen2_tokenizer(texts, special=QWEN2VL_SPECIAL, chat_template=QWEN2VL_CHAT_TEMPLATE):
    """Like Qwen2's: byte-level BPE, split by its regular expression, with PAD <|endoftext|>, EOS <|im_end|>, no BOS."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes
    trainee.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    learnt = json.loads(trainee.to_str())["model"]

    markup = [first + second for first, second in MARKUP_MERGES]
    pieces = dict.fromkeys([*list(learnt["vocab"])[:256], *markup, *list(learnt["vocab"])[256:]])
    merges = dict.fromkeys([*MARKUP_MERGES, *map(tuple, learnt["merges"])])
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=list(merges),
        unk_token=None,
        add_prefix_space=False,
        padding_side="left",
        model_max_length=TEXT["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.eos_token = "<|im_end|>"  # only now, because the constructor gives EOS the first ID
    return tokenizer


INTERLEAVE_TEXT = TEXT | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 160}
INTERLEAVE_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
# llava-interleave-qwen's: all images of a turn, then its text.
INTERLEAVE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# then text #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GPT2_MERGES = 80  # few: words with accents and apostrophes are several pieces, and a caption is 9 to 15


def build_gpt2_tokenizer(texts):
    """Like GPT-2's: byte-level BPE, <|endoftext|> as the last ID for BOS, EOS and UNK, no pad token."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes
    size = len(alphabet) + GPT2_MERGES
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(texts, trainer)
    learnt = json.loads(trainee.to_str())["model"]
    return transformers.GPT2Tokenizer(
        vocab={piece: index for index, piece in enumerate([*learnt["vocab"], "<|endoftext|>"])},
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=GPT2["n_positions"],
        clean_up_tokenization_spaces=False,
    )
