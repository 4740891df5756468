"""LLaVA-Med as LLaVA's own code saves it (llava_mistral): read as transformers' llava, its files left as they are.

Its config.json is Mistral's, with fields mm_* for the rest; its weights have other names; it has no token for an image;
and its vision tower, a CLIP, is configured in a folder of its own.
"""

import copy
import hashlib
import json
import tempfile
from pathlib import Path

import huggingface_hub
from transformers import AutoTokenizer, LlamaTokenizer, MistralConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available

import common
from runtime import folders
from runtime.files import writing
from runtime.folders import read_json, readable

INDEX = "model.safetensors.index.json"
NAMES = {  # of weights: how they begin, and how in transformers; the last are those of a tower in its own folder
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "model.language_model.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.": "model.vision_tower.",
    r"^(?=vision_model\.|embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)": "model.vision_tower.",
}
NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # in a CLIP's own folder

# ---- fields of config.json beside Mistral's: those needed, what others must say, those without effect ----

NEEDED = ("mm_vision_tower", "mm_vision_select_layer", "vocab_size")
KNOWN = {
    "model_type": ["llava_mistral"],
    "mm_projector_type": ["mlp2x_gelu"],
    "mm_vision_select_feature": ["patch", "cls_patch"],
    "image_aspect_ratio": ["square", "pad", None],
    "mm_patch_merge_type": ["flat"],
    "tie_word_embeddings": [False],
}
WITHOUT_EFFECT = (  # so begins what says how it was trained or saved, what the weights say, what LLaVA does not read
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "max_length", "tokenizer_"),
    *("freeze_", "tune_", "pretrain_", "mm_tunable_parts", "mm_projector_lr", "mm_vision_tower_lr", "mm_hidden_size"),
    *("mm_use_im_patch_token", "use_mm_proj", "max_sequence_length", "image_grid_pinpoints"),
    *("feature_outs", "img_size", "segtok_posembed", "vision_backbone", "vision_tokenizer_lr"),
)


def find(name: str, weights: bool = True, flag: str = "--model") -> Path:
    """folders.find; of such a model a folder in the cache, in transformers' format, with links to the weights."""
    folder = folders.find(name, weights, flag=flag)
    given = read_json(folder / "config.json")
    if "mm_vision_tower" not in given:
        return folder
    with readable(f"{flag} {name}"):
        laid = translated(folder, given, weights, f"{flag} {name}")
    return folders.find(str(laid), weights, flag=flag)


def translated(folder: Path, given: dict, weights: bool, what: str) -> Path:
    """The folder that says the same in transformers' format; what is read from where is printed."""
    fields, stored = text_config(given, what), stored_in(folder)
    inside = not stored or any(".vision_tower." in name for name in stored)  # none: they are not downloaded yet
    try:
        tower = folders.find(given["mm_vision_tower"], weights and not inside, flag=f"{what}: mm_vision_tower")
    except SystemExit as error:
        text = "where it is pickled, write it with save_pretrained of CLIPVisionModel and of CLIPImageProcessor"
        raise SystemExit(f"{error}\n{text}, and name that folder as mm_vision_tower in config.json") from None
    vision = read_json(tower / "config.json")
    vision = vision.get("vision_config", vision)  # of a complete CLIP
    if vision.get("model_type") != "clip_vision_model":
        raise SystemExit(f"{what}: {tower / 'config.json'} is not of a CLIP; give the tower that it was trained with")
    config = {
        "model_type": "llava",
        "text_config": fields,
        "vision_config": vision,
        "image_token_index": given["vocab_size"],  # the first ID past the words
        "vision_feature_layer": given["mm_vision_select_layer"],
        "vision_feature_select_strategy": "full" if given.get("mm_vision_select_feature") == "cls_patch" else "default",
    }
    prepared = read_json(tower / "preprocessor_config.json") | {"image_processor_type": "CLIPImageProcessor"}
    if given.get("image_aspect_ratio") == "pad":  # to a square, of the mean colour
        prepared |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    files, links, index = {"config.json": config, "preprocessor_config.json": prepared}, {}, {}
    if (folder / "tokenizer_config.json").is_file():  # its chat template is Mistral's, which knows no image
        files["tokenizer_config.json"] = read_json(folder / "tokenizer_config.json") | {"chat_template": None}
    sources = {folder: "llava"} if inside else {folder: "llava", tower: "tower"}
    for source, kind in sources.items():
        index |= {name: f"{kind}-{file}" for name, file in stored_in(source).items()}
        links |= {f"{kind}-{path.name}": path for path in folders.weight_files(source) if path.is_file()}
    files[INDEX] = {"metadata": {}, "weight_map": index}
    small = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt", ".md")]
    links |= {path.name: path for path in small if path.name not in files}
    fit = "padded to a square" if "do_pad" in prepared else "as the tower prepares them"
    print(f"{what}: LLaVA's own format, read as transformers' llava; its weights from {', '.join(map(str, sources))}")
    print(f"  vision tower {given['mm_vision_tower']}, layer {config['vision_feature_layer']}; images {fit}")
    print(f"  <image> is ID {given['vocab_size']}, the first past the words; with it {fields['vocab_size']} rows")
    return lay_out(files, links, folder)


def text_config(given: dict, what: str) -> dict:
    """The language model's fields. Ends the program where one is missing, must be another, or is not known and on."""
    mistral = {*MistralConfig().to_dict(), "rope_theta", "rope_scaling"}
    left = {name: value for name, value in given.items() if not name.startswith(WITHOUT_EFFECT)}
    others = [f"no {name}" for name in NEEDED if given.get(name) is None]
    for name, value in left.items():
        if value not in KNOWN.get(name, [value] if name in {*mistral, *NEEDED} else [False, None]):
            others.append(f"{name} {value!r}")
    if others:
        text = "such a model is not read here, use one that has been converted"
        raise SystemExit(f"{what}: config.json has {', '.join(others)}; {text}")
    rows = (given["vocab_size"] // 64 + 1) * 64  # at least one more than words, for the image's token
    fields = {name: value for name, value in left.items() if name in mistral}
    return fields | {"model_type": "mistral", "vocab_size": rows}


def lay_out(files: dict[str, dict], links: dict[str, Path], folder: Path) -> Path:
    """JSON files and links as a folder of the cache, named by what it holds; what it lacks is written."""
    links = {name: str(path.resolve()) for name, path in sorted(links.items())}
    digest = hashlib.sha256(json.dumps([files, links]).encode()).hexdigest()[:16]
    laid = Path(huggingface_hub.constants.HF_HOME, "original_llava", digest)
    laid = laid / folder.resolve().parent.name / folder.resolve().name  # of a download snapshots/COMMIT, as it was
    if not all((laid / name).is_file() for name in [*files, *links]):
        with writing(laid):
            laid.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=laid.parent) as own:  # another job may write the same
                for name, value in files.items():
                    Path(own, name).write_text(json.dumps(value, indent=2), encoding="utf-8")
                for name, path in links.items():
                    Path(own, name).symlink_to(path)
                for name in [*files, *links]:
                    Path(own, name).replace(laid / name)
    return laid


def stored_in(folder: Path) -> dict[str, str]:
    """{name of a weight: its file}; empty where there are none."""
    if (folder / INDEX).is_file():
        return read_json(folder / INDEX)["weight_map"]
    return {name: path.name for path in folders.weight_files(folder) for name in folders.header(path)}


def is_one(folder: Path) -> bool:
    """Whether its weights have the names of LLaVA's own code, which transformers cannot load."""
    return "model.mm_projector.0.weight" in stored_in(folder)


def from_pretrained(kind, folder: Path, config, **settings):
    """kind.from_pretrained with output_loading_info; of such a model under its names, with rows added to its words."""
    if not is_one(folder):
        return kind.from_pretrained(folder, config=config, **settings, output_loading_info=True)
    rows, config = config.text_config.vocab_size, copy.deepcopy(config)
    config.text_config.vocab_size = config.image_token_index
    settings |= {"config": config, "key_mapping": NAMES}
    model, found = kind.from_pretrained(folder, **settings, output_loading_info=True)
    found["unexpected_keys"] = {n for n in found["unexpected_keys"] if not n.startswith(NOT_THE_TOWER)}
    common.grow_embeddings(model, rows)  # by their mean, which is never read: nothing is drawn
    del model._weight_conversions  # with them it would be saved under the names it had
    return model, found


def tokenizer(folder: Path, config):
    """AutoTokenizer's; of SentencePiece's file alone LlamaTokenizer, for that leaves out the space before a text."""
    named = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / "tokenizer.json").is_file() or not (named.get("tokenizer_class") or "").startswith("LlamaTokenizer"):
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError("tokenizer.model needs two packages: pip install sentencepiece protobuf")
    return LlamaTokenizer.from_pretrained(folder)
