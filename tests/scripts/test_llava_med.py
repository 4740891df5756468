"""train_llava_med on a tiny LLaVA in the real format: what is its own beside the code that all scripts share."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import load_demo, refused, run
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

import common
import train_llava_med as script
from common import IGNORE, SENTINELS
from inputs import images, layouts


@pytest.fixture(scope="module")
def data(demo_folder):
    return load_demo(demo_folder)


@pytest.fixture
def copy(demo_folder, tmp_path):
    return shutil.copytree(demo_folder, tmp_path / "demo")


def change(path, **values):
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def task_of(folder) -> script.LlavaTask:
    argv = ["--model", folder / "model", "--data", folder / "data", "--out", "never written"]
    return script.LlavaTask(folder / "model", script.parse_arguments([str(argument) for argument in argv]))


# --- the prompt ------------------------------------------------------------------------------------------------


def test_where_a_checkpoint_has_no_template_it_is_mistral_s_and_said(copy, capsys):
    (copy / "model/chat_template.jinja").unlink()
    task = task_of(copy)
    assert "chat template: none in the checkpoint; Mistral's, as LLaVA-Med v1.5 was trained" in capsys.readouterr().out
    example = load_demo(copy).examples[0]
    text = common.conversation(task.tokenizer, task.messages(example), "yes")
    opening, closing = SENTINELS
    assert text == f"<s>[INST] <image>\n{example.question} [/INST]{opening} yes{closing}</s>"


@pytest.mark.parametrize("space", ["", " "])
def test_a_template_s_space_before_the_answer_is_the_answer_s(data, space):
    """The prompt then ends as the template's own generation prompt does, and the answer's pieces are the usual ones."""
    task, example = data.task, data.examples[0]
    before = task.tokenizer.chat_template
    task.tokenizer.chat_template = script.CHAT_TEMPLATE.replace("{% else %} {{", "{% else %}" + space + "{{")
    opening, closing = SENTINELS
    text = common.conversation(task.tokenizer, task.messages(example), "yes")
    assert text.endswith(f"[/INST]{opening}{space}yes{closing}</s>")
    _, input_ids, labels = task.encode(example, "yes")
    task.tokenizer.chat_template = before
    asked = task.tokenizer.decode([i for i, label in zip(input_ids, labels, strict=True) if label == IGNORE])
    assert asked.endswith("[/INST]") and [label for label in labels if label != IGNORE][-1] == 2


def test_the_prompt_begins_with_one_bos_also_where_the_template_writes_it(data):
    task, example = data.task, data.examples[0]
    template = task.tokenizer.chat_template
    for task.tokenizer.chat_template in ("{{ bos_token }}" + template, template):
        prefix, input_ids, _ = task.encode(example, "yes")
        assert prefix[0] == 1 and (prefix + input_ids).count(1) == 1
        text = common.conversation(task.tokenizer, task.messages(example), "yes")
        text = text.replace(SENTINELS[0], "").replace(SENTINELS[1], "")
        as_transformers = task.tokenizer(text, add_special_tokens=not text.startswith("<s>")).input_ids
        assert [token for token in prefix if token != 600] + input_ids == [t for t in as_transformers if t != 600]


def test_an_earlier_turn_is_read_and_not_supervised(data):
    example = replace(data.examples[0], history=[("Is there a polyp?", "no")], question="Is it so?", answer="yes")
    prefix, input_ids, labels = data.task.encode(example, "yes")
    text = data.task.tokenizer.decode(prefix + input_ids)
    assert text.index("Is there a polyp?") < text.index("Is it so?") and text.count("</s>") == 2
    supervised = [label for label in labels if label != IGNORE]
    assert data.task.tokenizer.decode(supervised).strip() == "yes</s>"
    assert labels[-len(supervised) :] == supervised


# --- tokens and IDs of the image -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, size, patch, strategy, expected",
    [
        ("clip_vision_model", 336, 14, "default", 576),
        ("clip_vision_model", 336, 14, "full", 577),
        ("siglip_vision_model", 384, 14, "full", 729),
    ],
)
def test_an_image_stands_for_as_many_tokens_as_the_tower_gives_features(model_type, size, patch, strategy, expected):
    vision = {"model_type": model_type, "image_size": size, "patch_size": patch}
    config = LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy)
    assert script.tokens_per_image(config) == expected


@pytest.mark.parametrize("layers, strategy", [(-2, "default"), (1, "full"), ([-3, -2], "default"), ([-1], "full")])
def test_features_are_those_of_transformers_own_forward(layers, strategy, data):
    config = LlavaConfig.from_pretrained(data.folder / "model")
    config.vision_feature_layer, config.vision_feature_select_strategy = layers, strategy
    torch.manual_seed(0)
    model = script.LlavaMed(LlavaForConditionalGeneration(config)).eval()
    pixel_values = data.read_media(data.trees[:2])["pixel_values"]
    with torch.no_grad():
        found = model.image_features(pixel_values)
        expected = torch.cat(list(model.vlm.model.get_image_features(pixel_values).pooler_output))
    assert found.shape[0] == 2 * script.tokens_per_image(config)
    torch.testing.assert_close(found, expected)


def test_another_number_of_features_than_placeholders_is_an_error(data):
    model = script.LlavaMed(LlavaForConditionalGeneration.from_pretrained(data.folder / "model"))
    (batch,) = common.pack(data.trees[:2], 4096)
    media = data.read_media(data.trees[:1])
    with pytest.raises(ValueError, match="tokens: 128, features: 64"):
        model({**batch, **media})


def test_a_new_pad_does_not_take_the_id_of_the_image(copy, capsys):
    """Neither <image> nor PAD is in the tokenizer: added first, PAD would take the ID that config.json names."""
    change(copy / "model/tokenizer_config.json", pad_token=None)
    tokenizer = AutoTokenizer.from_pretrained(copy / "model")
    assert len(tokenizer) == 600 and tokenizer.pad_token is None
    task = task_of(copy)
    assert task.faults == [] and task.image_id == 600
    assert task.tokenizer.convert_ids_to_tokens(600) == "<image>" and task.tokenizer.pad_token_id == 601
    assert task.tokenizer.pad_token_id != task.tokenizer.eos_token_id


def test_nothing_is_answered_or_merged_with_a_wrong_image_token(copy, tmp_path):
    run(copy, tmp_path / "out", "--limit", 4, "--max-steps", 1, "--epochs", 1, "--max-answer-tokens", 2)
    change(copy / "model/config.json", image_token_index=599)
    for mode in (["--eval-only"], ["--merge", tmp_path / "merged"]):
        refused(copy, tmp_path / "out", "--limit", 4, *mode)
    assert not (tmp_path / "merged").exists()


# --- how images are fitted -------------------------------------------------------------------------------------


@pytest.fixture
def wide(copy):
    """The demo, whose first image is twice as wide as high."""
    lines = (copy / "data/train.jsonl").read_text().split("\n")
    name = json.loads(lines[0])["image"]
    Image.open(copy / "data" / name).resize((144, 72)).save(copy / "data" / name)
    return copy, name


def test_what_is_cropped_away_is_said_of_the_data_s_own_images(wide, tmp_path, capsys):
    folder, name = wide
    run(folder, tmp_path, "--check")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["image_fit"] == "crop"
    assert found["pictures"]["cropped_away"]["most"] == 0.5 and found["pictures"]["cropped_away"]["file"] == name
    assert 0 < found["pictures"]["cropped_away"]["mean"] < 0.5
    assert f"at most 50% ({name}); --image-fit pad or squash shows all" in capsys.readouterr().out


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_checkpoint_is_bound_to_how_images_were_fitted_and_so_is_what_is_exported(wide, tmp_path, capsys, fit):
    folder, name = wide
    little = ["--limit", 4, "--max-answer-tokens", 2]
    run(folder, tmp_path / "out", *little, "--max-steps", 1, "--image-fit", fit)
    assert "cropped away" not in capsys.readouterr().out
    assert "image_fit was " in refused(folder, tmp_path / "out", *little, "--max-steps", 1)  # not resumed with a crop
    run(folder, tmp_path / "out", *little, "--eval-only")
    assert f"image_fit {fit} (from " in capsys.readouterr().out
    run(folder, tmp_path / "out", "--merge", tmp_path / "merged")
    picture = images.open_image(folder / "data", name)
    trained = load_demo(folder, script, "--image-fit", fit).task.processor([picture], return_tensors="pt")
    for saved in ("merged", "out/adapter"):  # opened by transformers
        seen = AutoImageProcessor.from_pretrained(tmp_path / saved)([picture], return_tensors="pt")
        assert torch.equal(seen["pixel_values"], trained["pixel_values"])
    shutil.copytree(folder / "data", tmp_path / "again/data")
    shutil.copytree(tmp_path / "merged", tmp_path / "again/model")
    assert load_demo(tmp_path / "again").args.image_fit == fit  # opened by the script


def test_images_that_would_differ_in_size_are_found_before_training(copy, tmp_path):
    change(copy / "model/preprocessor_config.json", do_center_crop=False)
    assert "images would differ in size; give it a crop" in refused(copy, tmp_path, "--check")
    run(copy, tmp_path, "--check", "--image-fit", "squash")


# --- what is trained -------------------------------------------------------------------------------------------


def test_adapters_stay_out_of_the_tower_whose_layers_have_the_same_names(data):
    vlm = LlavaForConditionalGeneration.from_pretrained(data.folder / "model")
    script.choose_trained(vlm, SimpleNamespace(**{**vars(data.args), "tune": "lora"}))
    adapters = common.lora_layers(vlm)
    assert adapters and all(name.startswith("model.language_model.layers.") for name in adapters)
    trained = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert {name for name in trained if "lora_" not in name} == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


def test_new_adapters_are_drawn_from_the_seed_alone(data):
    """However many numbers were drawn before, by the data check say: --seed stands directly before the model."""
    drawn = []
    for before in (0, 1000):
        torch.rand(before)
        torch.manual_seed(data.args.seed)
        model = script.load_model(data.folder / "model", data.task, torch.float32)
        drawn.append({name: layer.lora_A.clone() for name, layer in common.lora_layers(model.vlm).items()})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


# --- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["image", "image_filename", "image_id", "img_id"])
def test_an_image_is_found_under_each_of_its_usual_names(data, field):
    entry = {field: "nowhere.jpg", "question": "Is it?", "answer": "yes"}
    example = script.make_example(data.folder / "data", "train.jsonl:1", "train", entry)
    assert (example.media, example.group, example.id) == (["nowhere.jpg"], "nowhere.jpg", "train.jsonl:1")


def test_an_example_without_an_image_says_which_fields_are_read(data):
    for entry in ({}, {"image": ""}, {"image": None}):
        with pytest.raises(ValueError, match="no image; give one of image, image_path, image_file"):
            script.make_example(data.folder / "data", "x", None, {**entry, "question": "Is it?", "answer": "yes"})


def test_endovis_is_one_flag(data, tmp_path, capsys):
    assert set(layouts.ENDOVIS) == {"paper", "sequence", "paper:Sentence", "sequence:Sentence"}
    argv = ["--model", "m", "--data", "d", "--out", "o"]
    assert [script.parse_arguments([*argv, "--endovis", c]).endovis for c in layouts.ENDOVIS] == list(layouts.ENDOVIS)
    assert script.parse_arguments(argv).endovis is None
    with pytest.raises(SystemExit):
        script.parse_arguments([*argv, "--endovis", "frames"])
    assert "--endovis" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% for m in messages %}{{ '[INST] ' + m['content'] }}{% endfor %}", "copy the original checkpoint's"),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content[0].text }}{% endfor %}",
            "does not write <image> (ID 600) once for an image but",
        ),
    ],
)
def test_a_template_that_writes_no_image_is_refused(copy, tmp_path, template, text):
    (copy / "model/chat_template.jinja").write_text(template)
    assert text in refused(copy, tmp_path / "out", "--check")


def test_an_empty_history_is_none(copy, tmp_path):
    """As exporters write a missing field."""
    path = copy / "data/train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "history": None}) + "\n" for line in lines))
    run(copy, tmp_path / "out", "--check")
