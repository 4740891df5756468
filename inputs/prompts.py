"""The prompt that an example is trained with against the one that transformers writes for the same conversation."""

import copy
from itertools import groupby

from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

import common
from inputs.task import MARK, Example, Task


def add_flag(parser, default: str = "") -> None:
    """--system, of a script that asks in a chat template."""
    text = f"system text of examples without one of their own (default: {repr(default) if default else 'none'})"
    parser.add_argument_group("the prompt").add_argument("--system", metavar="TEXT", default=default, help=text)


def conversation(tokenizer, messages: list[dict], answer: str, image_id: int) -> str:
    """common.conversation, in which each text stands where the messages have it: behind so many images, none left out.

    Raises ValueError where the chat template does not write it so: many put images first, some know no system text.
    """
    texts = [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]
    if wrong := next((text for text in [*texts, answer] if MARK in text), None):
        raise ValueError(f"{MARK} shows nothing in {wrong!r}; it may stand in questions alone, once for each image")
    try:
        text = common.conversation(tokenizer, messages, answer)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}; write it otherwise") from None
    pieces, shown = text.split(tokenizer.convert_ids_to_tokens(image_id)), 0
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image":
                shown += 1
            elif part["text"].strip() not in "".join(pieces[shown : shown + 1]):
                where, remedy = f"behind {shown} images", "leave the marks of images out, so that these come first"
                if turn["role"] == "system":
                    where, remedy = "as a system text", "write it into the question"
                raise ValueError(f"the chat template does not write {part['text']!r} {where}; {remedy}")
    return text


def prove(task: Task, example: Example, tree: common.Prompt) -> str:
    """A line that says they are equal, token for token, or what has to be added; ends the program where they differ.

    The first question is compared. A run of placeholders counts once: building.check_example checks their number.
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
