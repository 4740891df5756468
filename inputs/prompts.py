"""The prompt that an example is trained with against the one that transformers writes for the same conversation."""

import copy
from itertools import groupby

from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

import common
from inputs.task import Example, Task


def prove(task: Task, example: Example, tree: common.Prompt) -> str:
    """A line that says they are equal, token for token, or what has to be added; ends the program where they differ.

    Compared is the prompt of the tree's first question. A run of placeholders counts once: that there are as many as
    features is checked elsewhere.
    """
    if task.messages(example) is None:
        return "a text without a chat template"
    (branch, *_) = common.answering_prompt(tree).branches
    media = set(task.placeholders(example))
    ours = once(tree.prefix + branch[0], media)
    by, theirs = deployed(task, task.messages(example))
    name, theirs = type(by).__name__, once(theirs, media)
    added = task.tokenizer.decode(ours[len(theirs) :])
    if ours[: len(theirs)] == theirs:
        more = f"; whoever asks must add {added!r}" if added else ""
        return f"{len(ours)} tokens, those of transformers' {name} with add_generation_prompt{more}"
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    ours, theirs = (task.tokenizer.decode(tokens[max(0, at - 5) : at + 10]) for tokens in (ours, theirs))
    text = f"trained would be a prompt with {ours!r} (at token {at}), but transformers' {name} asks with {theirs!r}"
    if by is task.tokenizer:  # which does not know what a processor writes around an image
        return text
    raise SystemExit(f"--model {task.args.model}: {text}; copy the original checkpoint's tokenizer and chat template")


def deployed(task: Task, messages: list[dict]) -> tuple[object, list[int]]:
    """Who writes the prompt where the model is used, the folder's processor or its tokenizer alone, and its tokens."""
    tokenizer, asked = task.tokenizer, {"add_generation_prompt": True}
    try:
        processor = AutoProcessor.from_pretrained(tokenizer.name_or_path, trust_remote_code=False)
        if not isinstance(processor, ProcessorMixin):  # of a language model it is the tokenizer
            raise TypeError
        processor.tokenizer, processor.image_processor = tokenizer, task.processor
        shown = copy.deepcopy(messages)
        for part in (part for turn in shown for part in turn["content"] if part["type"] == "image"):
            part["image"] = Image.new("RGB", (64, 64))
        settings = {"chat_template": processor.chat_template or tokenizer.chat_template}
        settings |= {"tokenize": True, "return_dict": True}
        return processor, processor.apply_chat_template(shown, **settings, **asked)["input_ids"][0]
    except Exception:  # it raises what it likes
        pass  # it needs torchvision, as Qwen2-VL's, or settings that the folder lacks; or there is none, as for volumes
    text = tokenizer.apply_chat_template(messages, tokenize=False, **asked)
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # then a processor adds no second one
    return tokenizer, tokenizer(text, add_special_tokens=not begun).input_ids


def once(tokens: list[int], media: set[int]) -> list[int]:
    """The tokens with each run of a placeholder shortened to one."""
    return [token for key, run in groupby(tokens) for token in ([key] if key in media else run)]
