"""What is trained as a prompt is what transformers asks with, token for token, in any chat template."""

import json
import shutil
from types import SimpleNamespace

import pytest
from helpers import load_demo, refused, run
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaProcessor

import common
import train_qwen2vl_sentinel
from inputs import prompts
from inputs.building import build_trees

# as published: the parts of a turn, and what it is asked with
IMAGES = "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
TEXT = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
EACH, ASKED = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
NEWLINE = EACH + "{{ '<|im_start|>' + m['role'] + '\n' }}" + IMAGES + "{{ '\n' }}" + TEXT + "{{ '<|im_end|>' }}" + ASKED
NEWLINE += "{{ '<|im_start|>assistant\n' }}{% endif %}"  # llava-interleave's: a newline more before an answer
SPACE = NEWLINE.replace("m['role'] + '\n'", "m['role'] + ' '")  # LLaVA-OneVision's: "assistant \n", and "assistant\n"
COLON = EACH + "{{ m['role'].upper() + ': ' }}" + IMAGES + TEXT + "{{ ' ' }}" + ASKED + "{{ 'ASSISTANT:' }}{% endif %}"
MISTRAL = EACH + "{% if m['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES + "{{ '\n' }}" + TEXT + "{{ ' [/INST]' }}"
MISTRAL += "{% else %}{{ ' ' }}" + TEXT + "{{ eos_token }}{% endif %}{% endfor %}"
TEMPLATES = {
    "newline": (NEWLINE, ""),
    "space and newline": (SPACE, ""),
    "colon": (COLON, " "),
    "Mistral's": (MISTRAL, " "),
    "Mistral's, with BOS": ("{{ bos_token }}" + MISTRAL, " "),
}


@pytest.fixture
def data(demo_folder):
    return load_demo(demo_folder)


def with_template(data, template: str):
    data.task.tokenizer.chat_template = template
    example = data.examples[0]
    (tree,), faults = build_trees([example], data.task)
    assert not faults
    return example, tree


def with_processor(folder, tmp_path):
    """A copy whose model has a processor and a tokenizer that knows <image>, as published ones do."""
    copy = shutil.copytree(folder, tmp_path / "published")
    load_demo(folder).task.tokenizer.save_pretrained(copy / "model")
    settings = {"processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default"}
    settings |= {"num_additional_image_tokens": 1}
    (copy / "model/processor_config.json").write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_prompt_is_that_of_transformers_processor(data, name):
    template, space = TEMPLATES[name]
    example, tree = with_template(data, template)
    patch = LlavaConfig.from_pretrained(data.folder / "model").vision_config.patch_size
    processor = LlavaProcessor(data.task.processor, data.task.tokenizer, patch, "default", chat_template=template)
    processor.num_additional_image_tokens = 1
    image = {"type": "image", "image": Image.new("RGB", (64, 64))}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": example.question}]}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template(messages, **settings)["input_ids"][0]
    (branch, *_) = common.answering_prompt(tree).branches
    assert tree.prefix + branch[0] == expected
    supervised = common.supervised_tokens(tree.branches[0][1])
    assert data.task.tokenizer.decode(supervised) in (f"{space}{example.answer}</s>", f"{example.answer}</s>")
    assert "with add_generation_prompt" in prompts.prove(data.task, example, tree)


@pytest.mark.parametrize(
    "template",
    [NEWLINE.replace("{{ '<|im_start|>assistant\n' }}", ""), COLON.replace("'ASSISTANT:'", "'ASSISTANT: Sure,'")],
)
def test_a_template_that_asks_otherwise_than_it_answers_is_refused(demo_folder, tmp_path, template):
    copy = shutil.copytree(demo_folder, tmp_path / "demo")
    (copy / "model/chat_template.jinja").write_text(template)
    assert "what is trained would not be what is asked" in refused(copy, tmp_path / "out", "--check")


def test_a_prompt_that_is_not_transformers_ends_the_check(data, tmp_path):
    """As of a script that leaves out what the template writes, or writes something of its own."""
    example, tree = with_template(data, MISTRAL)
    data.task.tokenizer.name_or_path = str(with_processor(data.folder, tmp_path) / "model")
    asked = data.task.messages(example)
    asked[0]["content"][1]["text"] += " Answer briefly."
    data.task.messages = lambda example: asked
    with pytest.raises(SystemExit, match=r"trained would be a prompt with .* but transformers' .* asks with .*Answer"):
        prompts.prove(data.task, example, tree)


def test_the_check_says_what_the_prompt_was_compared_with(demo_folder, tmp_path, capsys):
    for folder, name in ((demo_folder, "TokenizersBackend"), (with_processor(demo_folder, tmp_path), "LlavaProcessor")):
        run(folder, tmp_path / "out", "--check", "--limit", "4")
        assert f" tokens, those of transformers' {name} with add_generation_prompt\n" in capsys.readouterr().out


def test_a_language_model_has_no_processor_but_its_tokenizer(data, tmp_path):
    """AutoProcessor opens it as the tokenizer, whose tokens are no list of lists."""
    example, tree = with_template(data, MISTRAL)
    LlamaConfig().save_pretrained(tmp_path)
    data.task.tokenizer.save_pretrained(tmp_path)
    data.task.tokenizer.name_or_path = str(tmp_path)
    found = prompts.prove(data.task, example, tree)
    assert found.endswith(f"those of transformers' {type(data.task.tokenizer).__name__} with add_generation_prompt")


def test_a_processor_that_fails_in_its_own_way_leaves_the_tokenizer(data, monkeypatch):
    def fail(*_, **__):
        raise KeyError("shortest_edge")

    monkeypatch.setattr(prompts.AutoProcessor, "from_pretrained", fail)
    example, tree = with_template(data, MISTRAL)
    assert type(data.task.tokenizer).__name__ in prompts.prove(data.task, example, tree)


def test_what_whoever_asks_must_add_is_said(qwen_folder):
    """--sentinels keep: <ANS> stands in the prompt, and no template writes it."""
    data = load_demo(qwen_folder, train_qwen2vl_sentinel)
    args = SimpleNamespace(**{**vars(data.args), "sentinels": "keep", "decode": "greedy"})
    task = train_qwen2vl_sentinel.QwenTask(data.folder / "model", args)
    task.measured = data.task.measured
    (tree,), _ = build_trees(data.examples[:1], task)
    assert prompts.prove(task, data.examples[0], tree).endswith("; whoever asks must add '<ANS>'")


def test_a_question_is_rendered_once_for_all_images_and_anew_in_another_template(data, monkeypatch):
    tokenizer, rendered = data.task.tokenizer, []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(a) or render(*a, **k))
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    found = [common.conversation(tokenizer, asked, answer) for answer in ("yes", "no", "yes")]
    assert len(rendered) == 2 and found[0] == found[2] == found[1].replace("no", "yes")  # the prompt, and answered
    tokenizer.chat_template = COLON
    assert common.conversation(tokenizer, asked, "no") == "USER: <image>Is it? ASSISTANT:<ANS> no</ANS></s>"
    tokenizer.eos_token = "<unk>"
    assert common.conversation(tokenizer, asked, "no").endswith("</ANS><unk>")
    tokenizer.chat_template = "{{ pad_token }}" + COLON
    for pad in ("<unk>", "</s>"):  # any token that a template writes
        tokenizer.pad_token = pad
        assert common.conversation(tokenizer, asked, "no").startswith(f"{pad}USER")
    asked[0]["content"][1]["text"] = "Was it?"
    assert "Was it?" in common.conversation(tokenizer, asked, "no")
