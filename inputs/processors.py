"""The checkpoint's own image processor: the one way from an RGB picture to what the vision tower sees.

How it brings pictures of all proportions to one size, what that crops away, and --image-fit, which changes it.
"""

from pathlib import Path

import transformers

from inputs.texts import read_json


def load(folder: Path, **expected):
    """The checkpoint's image processor, always through Pillow: the same pixels whether torchvision is there or not.

    `expected` are its attributes that must be the vision tower's own. Ends where they are not, or there is none.
    """
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        config = read_json(path) if path.is_file() else {}
        kind = config.get("image_processor", config).get("image_processor_type")
        if kind:
            break
    else:
        raise SystemExit(f"--model {folder}: no preprocessor_config.json that names an image_processor_type")
    kind = kind.removesuffix("Fast").removesuffix("Pil") + "Pil"
    found = getattr(transformers, kind, None)
    if found is None:
        raise SystemExit(f"--model {folder}: transformers has no {kind} ({path.name}: image_processor_type)")
    found = found.from_pretrained(folder)
    for key, value in expected.items():
        if getattr(found, key) != value:
            text = f"{key} {getattr(found, key)}, the vision tower has {value} (config.json)"
            raise SystemExit(f"--model {folder}: preprocessor_config.json has {text}; copy the checkpoint's own")
    return found


def counting(config) -> dict:
    """What transformers' processor for a LLaVA counts the tokens of an image from; {} for other models."""
    if not hasattr(config, "vision_feature_select_strategy"):
        return {}
    class_token = int(config.vision_config.model_type == "clip_vision_model")
    counted = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": class_token}
    return counted | {"vision_feature_select_strategy": config.vision_feature_select_strategy}


def add_flag(parser) -> None:
    """--image-fit, of a script whose vision tower takes images of one size."""
    text = "crop the centre, pad to a square, or squash, to the tower's size (default: the checkpoint's own)"
    parser.add_argument_group("images").add_argument("--image-fit", choices=["crop", "pad", "squash"], help=text)


def fit_of(processor) -> str | None:
    """How it brings images to one size, as --image-fit calls it; None where they keep theirs, or by ways of its own."""
    if isinstance(processor, transformers.LlavaImageProcessorPil) and processor.do_pad:
        return "pad"  # centred on a square of its mean colour
    if getattr(processor, "do_center_crop", False):
        return "crop"
    same = getattr(processor, "do_resize", True) and processor.size.get("height") and processor.size.get("width")
    return "squash" if same else None


def fitted(folder: Path, args):
    """The checkpoint's image processor, changed as --image-fit says: so it is saved, and transformers does the same.

    args.image_fit becomes the checkpoint's own where it was not given. Ends where the processor cannot do it.
    """
    found = load(folder)
    own, kind = fit_of(found), type(found)
    fit = args.image_fit = args.image_fit or own
    if fit == own:
        return found
    known = transformers.CLIPImageProcessorPil, transformers.LlavaImageProcessorPil  # those of most towers, and LLaVA's
    size = found.crop_size if own == "crop" else found.size
    sides = {size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge")}
    if kind._preprocess not in [one._preprocess for one in known] or len(sides) > 1 or None in sides:
        raise SystemExit(f"--image-fit {fit}: {kind.__name__} has ways of its own to fit an image; leave it out")
    side = sides.pop()
    square = {"height": side, "width": side}
    settings = found.to_dict() | {"do_resize": True, "do_pad": fit == "pad", "do_center_crop": fit == "crop"}
    settings |= {"size": {"shortest_edge": side} if fit == "crop" else square, "crop_size": square}
    settings.pop("image_processor_type")
    return (known[1] if fit == "pad" else kind)(**settings)


def size_of(processor) -> tuple[int, int]:
    """(height, width) in pixels of what the vision tower sees, the same of every image. Ends where they differ."""
    if fit_of(processor) is None:
        text = "images would differ in size; give it a crop, or a height and width, or choose --image-fit"
        raise SystemExit(f"preprocessor_config.json: {text}")
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"]


def cropped_away(processor, width: int, height: int) -> float:
    """The share of an image that is lost where the centre is cropped: of 16:9 DINOv2's 256 and 224 pixels lose 57 %."""
    size, crop, resized = processor.size, processor.crop_size, (width, height)
    if getattr(processor, "do_resize", True):
        scale = (size.get("shortest_edge") or min(resized)) / min(resized)
        resized = size.get("width") or scale * width, size.get("height") or scale * height
    return 1 - min(1.0, crop["width"] / resized[0]) * min(1.0, crop["height"] / resized[1])


def patches(processor, patch: int) -> tuple[int, int]:
    """(rows, columns) of an image's patches, printed. Ends where a patch would be cut."""
    height, width = size_of(processor)
    if height % patch or width % patch:
        text = f"{height} x {width} pixels are not divisible into {patch} px patches"
        raise SystemExit(f"preprocessor_config.json: {text}")
    print(f"a frame is {height} x {width} pixels, {height // patch} x {width // patch} patches")
    return height // patch, width // patch
