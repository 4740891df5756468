"""LLaVA-Med as it is published, in the layout of LLaVA's own code: it trains and is merged as transformers' model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
import transformers
from helpers import llava_logits, metrics_of, read_lines, read_tensors, refused, run, same
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from runtime import original_llava

# config.json of microsoft/llava-med-v1.5-mistral-7b, every field
PUBLISHED = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["LlavaMistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "feature_outs": "encoder+decoder",
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "img_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 1024,
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "proj_vis_to_txt_tokens": False,
    "prompt_segtok_w_instruct": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "segtok_posembed": "sincos",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "tune_mm_mlp_adapter": False,
    "tune_vision_tokenizer": "none",
    "use_cache": True,
    "use_mm_proj": True,
    "vision_backbone": "convnextlarge",
    "vision_tokenizer_lr": None,
    "vocab_size": 32000,
}
# preprocessor_config.json of its tower, in the words of 2022
PREPARED = {
    **{"crop_size": 72, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 72},
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
FEW = ["--max-steps", 3, "--questions-per-step", 8, "--max-answer-tokens", 2, "--lora-dropout", 0]
IMAGE = 600  # rows of words; the image's token is the next


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where translated folders are written."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/original_llava"


def original_name(name: str) -> str:
    """What LLaVA's own code calls a weight of transformers' LLaVA."""
    for end, begin in [
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ]:
        if name.startswith(end):
            return begin + name.removeprefix(end)
    raise AssertionError(name)


def publish(demo_folder, folder, with_tower: bool, **changes):
    """The demo's model and data as LLaVA-Med is published: FOLDER/model, the tower's files in FOLDER/tower."""
    theirs = transformers.LlavaConfig.from_pretrained(demo_folder / "model")
    model, tower, weights = folder / "model", folder / "tower", {}
    shutil.copytree(demo_folder / "model", model)
    (folder / "data").symlink_to(demo_folder / "data")
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        (model / name).unlink(missing_ok=True)
    for name, weight in load_file(model / "model.safetensors").items():
        rows = IMAGE if "embed_tokens" in name or "lm_head" in name else None  # without those of <image> and of padding
        weights[original_name(name)] = weight[:rows].contiguous()
    own = {name: weight for name, weight in weights.items() if with_tower or ".vision_tower." not in name}
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(own)}
    for file in set(shards.values()):
        save_file({name: own[name] for name in own if shards[name] == file}, model / file, {"format": "pt"})
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    text = theirs.text_config.to_dict() | {"rope_theta": 10000.0, "vocab_size": IMAGE}
    sizes = {name: text[name] for name in text.keys() & PUBLISHED.keys() - {"architectures", "model_type"}}
    named = {"mm_hidden_size": theirs.vision_config.hidden_size, "mm_vision_tower": str(tower)}
    (model / "config.json").write_text(json.dumps(PUBLISHED | sizes | named | changes))
    # the tower is part of a CLIP, with its other half, which is not read
    config = transformers.CLIPConfig(
        vision_config=theirs.vision_config.to_dict(),
        text_config={"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 8},
    )
    config.save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    if not with_tower:
        before = "model.vision_tower.vision_tower."
        clip = {name.removeprefix(before): weight for name, weight in weights.items() if name.startswith(before)}
        clip |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(())}
        save_file(clip, tower / "model.safetensors", {"format": "pt"})
    return folder


def change(folder, **fields):
    """Other fields in the model's config.json."""
    path = folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(params=[True, False], ids=["tower inside", "tower beside"])
def published(request, demo_folder, tmp_path):
    return publish(demo_folder, tmp_path / "published", request.param)


@pytest.fixture
def twin(demo_folder, tmp_path):
    """The same weights in transformers' layout; rows past the words are their mean."""
    folder = tmp_path / "twin"
    shutil.copytree(demo_folder / "model", folder / "model")
    (folder / "data").symlink_to(demo_folder / "data")
    weights = load_file(folder / "model/model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name][IMAGE:] = weights[name][:IMAGE].mean(0)
    save_file(weights, folder / "model/model.safetensors", {"format": "pt"})
    return folder


def opened(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()


def test_it_trains_and_is_merged_as_the_same_weights_in_transformers_layout(published, twin, tmp_path, capsys):
    every = [*FEW, "--tune", "full"]  # no adapters, which are drawn
    run(published, tmp_path / "run", *every)
    run(published, tmp_path / "run", "--merge", tmp_path / "merged")
    log = capsys.readouterr().out
    assert "<image> is ID 600, the first past the words; with it 640 rows" in log and "padded to a square" in log
    run(twin, tmp_path / "theirs", *every, "--image-fit", "pad")
    run(twin, tmp_path / "theirs", "--merge", tmp_path / "their_merged")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "theirs")
    assert read_lines(tmp_path / "run/predictions.jsonl") == read_lines(tmp_path / "theirs/predictions.jsonl")
    ours, theirs, base = (
        llava_logits(opened(f)) for f in (tmp_path / "merged", tmp_path / "their_merged", twin / "model")
    )
    assert same(ours, theirs) and not same(ours, base)
    weights, others = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "their_merged")
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in others)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["model_type"] == "llava" and not any(name.startswith("mm_") for name in config)
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (IMAGE, 640)


def test_the_merged_folder_prepares_images_and_questions_as_transformers_processor(published, twin, tmp_path):
    run(published, tmp_path / "run", *FEW)
    run(published, tmp_path / "run", "--merge", tmp_path / "merged")
    image = Image.effect_noise((150, 90), 60).convert("RGB")
    asked = AutoProcessor.from_pretrained(tmp_path / "merged")(
        text="<image> What is it?", images=image, return_tensors="pt"
    )
    assert asked["input_ids"][0].tolist().count(IMAGE) == 64
    square = Image.new("RGB", (150, 150), tuple(int(255 * x) for x in PREPARED["image_mean"]))  # as LLaVA's code does
    square.paste(image, (0, 30))
    tower = transformers.CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 72, "width": 72})
    assert torch.equal(asked["pixel_values"], tower(square, return_tensors="pt")["pixel_values"])


def test_every_field_of_the_published_configuration_is_read_or_known_to_be_without_effect(tmp_path):
    fields = original_llava.text_config(PUBLISHED, "--model it")
    text = transformers.MistralConfig(**fields)
    assert {
        name: getattr(text, name)
        for name in fields.keys() & PUBLISHED.keys() - {"model_type", "vocab_size", "rope_theta"}
    } == {
        name: PUBLISHED[name] for name in fields.keys() & PUBLISHED.keys() - {"model_type", "vocab_size", "rope_theta"}
    }
    assert text.vocab_size == 32064 and text.rope_parameters["rope_theta"] == 1e6
    left = PUBLISHED.keys() - fields.keys() - {*original_llava.NEEDED} - original_llava.KNOWN.keys()
    off = {name for name in left if not name.startswith(original_llava.WITHOUT_EFFECT)}
    assert off and {PUBLISHED[name] for name in off} == {False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_use_im_start_end": True}, "config.json has mm_use_im_start_end True; such a model is not read here"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls'"),
        ({"model_type": "llava_llama"}, "model_type 'llava_llama'"),
        ({"mm_of_tomorrow": 3}, "mm_of_tomorrow 3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"mm_vision_tower": "no/such/folder"}, "no such folder"),
        ({"unfreeze_mm_vision_tower": True}, "unfreeze_mm_vision_tower True"),
    ],
)
def test_what_is_another_model_is_refused(demo_folder, tmp_path, changes, words):
    folder = publish(demo_folder, tmp_path / "published", with_tower=False, **changes)
    assert words in refused(folder, tmp_path / "run", "--check")


@pytest.mark.parametrize("field", ["vocab_size", "mm_vision_select_layer"])
def test_a_field_that_is_missing_is_named(demo_folder, tmp_path, field):
    folder = publish(demo_folder, tmp_path / "published", with_tower=True)
    path = folder / "model/config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != field}))
    assert f"config.json has no {field}" in refused(folder, tmp_path / "run", "--check")


def test_a_tower_that_is_published_pickled_is_refused_with_the_remedy_which_helps(demo_folder, twin, tmp_path):
    folder = publish(demo_folder, tmp_path / "published", with_tower=False)
    tower, saved = folder / "tower", folder / "saved"
    clip = transformers.CLIPVisionModel.from_pretrained(tower)
    (tower / "model.safetensors").rename(tower / "pytorch_model.bin")
    run(folder, tmp_path / "run", *FEW, "--check")  # which reads no weights
    text = refused(folder, tmp_path / "run", *FEW)
    assert "model.safetensors is missing (pytorch_model.bin found; pickled weights are never read)" in text
    assert "write it with save_pretrained of CLIPVisionModel and of CLIPImageProcessor, and name that folder" in text
    clip.save_pretrained(saved)  # with a config.json of the tower alone, and names without vision_model.
    change(folder, mm_vision_tower=str(saved))
    assert "preprocessor_config.json" in refused(folder, tmp_path / "run", *FEW)
    transformers.CLIPImageProcessorPil.from_pretrained(tower).save_pretrained(saved)
    run(folder, tmp_path / "run", *FEW, "--tune", "full")
    run(twin, tmp_path / "theirs", *FEW, "--tune", "full", "--image-fit", "pad")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "theirs")


@pytest.mark.parametrize("what", ["weights of one file", "tower"])
def test_a_file_that_is_cut_off_ends_the_check_which_needs_no_weights_in_words(demo_folder, tmp_path, what):
    folder = publish(demo_folder, tmp_path / "published", with_tower=what != "tower")
    path = folder / what / "model.safetensors"
    if what != "tower":
        path = folder / "model/model.safetensors"
        (folder / "model/model-00001-of-00002.safetensors").rename(path)
        (folder / "model/model.safetensors.index.json").unlink()
    path.write_bytes(path.read_bytes()[:9000])
    assert "Error while deserializing header" in refused(folder, tmp_path / "run", "--check")


def test_a_tower_s_sizes_far_beyond_its_weights_are_refused_before_memory_is_full(demo_folder, tmp_path):
    folder = publish(demo_folder, tmp_path / "published", with_tower=True)
    path = folder / "tower/config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["num_hidden_layers"] = 10**7
    path.write_text(json.dumps(config))
    assert "num_hidden_layers cannot be as it stands there" in refused(folder, tmp_path / "run")


def test_what_a_clean_up_has_taken_from_the_cache_is_written_again_by_several_jobs_at_once(published, monkeypatch):
    found = original_llava.find(str(published / "model"))
    before = {path.name: path.read_bytes() for path in found.iterdir()}
    for path in [found / "config.json", *found.glob("*.safetensors")]:
        path.unlink()
    with ThreadPoolExecutor(8) as jobs:
        assert set(jobs.map(lambda _: original_llava.find(str(published / "model")), range(8))) == {found}
    assert before == {path.name: path.read_bytes() for path in found.iterdir()}
    assert [path.name for path in found.parent.iterdir()] == ["model"]  # nothing else is left
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)  # a job need not be allowed to write what is there
    assert original_llava.find(str(published / "model") + "/") == found


def test_a_weight_that_is_missing_or_has_no_place_is_refused(published, tmp_path):
    path = published / "model/model-00001-of-00002.safetensors"
    weights = load_file(path)
    index = published / "model/model.safetensors.index.json"
    for change, words in [(lambda name: name + ".more", "missing"), (lambda name: name, "without a place")]:
        first = next(name for name in weights if ".layers.0." in name)
        changed = {change(name) if name == first else name: weight for name, weight in weights.items()}
        changed |= {} if words == "missing" else {"model.image_newline": torch.ones(8)}
        save_file(changed, path, {"format": "pt"})
        kept = {name: file for name, file in json.loads(index.read_text())["weight_map"].items() if file != path.name}
        index.write_text(json.dumps({"metadata": {}, "weight_map": kept | dict.fromkeys(changed, path.name)}))
        assert words in refused(published, tmp_path / "run", *FEW)


def test_a_run_knows_its_model_where_it_was_moved_and_no_other_tower(demo_folder, tmp_path, cache):
    folder = publish(demo_folder, tmp_path / "published", with_tower=False)
    run(folder, tmp_path / "run", *FEW)
    moved = tmp_path / "moved"
    folder.rename(moved)
    change(moved, mm_vision_tower=str(moved / "tower"))
    shutil.rmtree(cache)
    run(moved, tmp_path / "run", *FEW, "--eval-only")
    weights = load_file(moved / "tower/model.safetensors")
    weights["vision_model.encoder.layers.1.mlp.fc1.weight"][0, 0] += 1
    save_file(weights, moved / "tower/model.safetensors", {"format": "pt"})
    assert "was trained on another model" in refused(moved, tmp_path / "run", *FEW, "--eval-only")
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert "--model tower-model.safetensors" in state["weights"]


def test_the_adapter_s_card_says_that_its_base_needs_the_script(published, tmp_path):
    run(published, tmp_path / "run", *FEW)
    text = (tmp_path / "run/adapter/README.md").read_text()
    assert "Plain transformers does not know its base as it is published, but what --merge writes." in text
    run(published, tmp_path / "run", "--merge", tmp_path / "merged")
    assert "AutoModelForImageTextToText.from_pretrained(FOLDER" in (tmp_path / "merged/README.md").read_text()
    assert set(load_file(tmp_path / "merged/model.safetensors")) > {"language_model.model.norm.weight"}


def test_a_tower_by_its_hub_id_is_fetched_with_the_model(demo_folder, tmp_path, monkeypatch, capsys):
    folder, fetched = publish(demo_folder, tmp_path / "published", True, mm_vision_tower="organisation/clip"), []

    def snapshot_download(name, allow_patterns):
        fetched.append((name, "*.safetensors" in allow_patterns))
        return str(folder / ("tower" if name == "organisation/clip" else "model"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = original_llava.find("microsoft/llava-med")
    assert fetched == [("microsoft/llava-med", True), ("organisation/clip", False)]  # its own files hold the weights
    assert (found.parent.name, found.name) == ("published", "model") and original_llava.is_one(found)
    assert original_llava.find("microsoft/llava-med") == found


def test_sentencepiece_s_words_are_llava_s_own(tmp_path, monkeypatch):
    """AutoTokenizer would leave out the space before a text: other tokens than it was trained with."""
    pytest.importorskip("google.protobuf")
    spm = transformers.convert_slow_tokenizer.import_protobuf()  # sentencepiece's own where that is there
    model, words = (
        spm.ModelProto(),
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "i", "s", "▁i", "▁is"],
    )
    for i, word in enumerate(words):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        model.pieces.add(piece=word, score=-i, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    monkeypatch.setattr(original_llava, "is_sentencepiece_available", lambda: False)
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        original_llava.tokenizer(tmp_path, transformers.LlavaConfig())
    monkeypatch.setattr(original_llava, "is_sentencepiece_available", lambda: True)
    monkeypatch.setattr("transformers.convert_slow_tokenizer.requires_backends", lambda *_: None)
    tokenizer = original_llava.tokenizer(tmp_path, transformers.LlavaConfig())
    assert tokenizer.convert_ids_to_tokens(tokenizer("is is").input_ids) == ["<s>", "▁is", "▁is"]
