"""What another project's image processor does to an image, and whether ours does the same.

Options that a file leaves out have the value of its class in transformers. An option that a tower cannot have is refused: the
pixels, and so every answer, would be others.
"""

from __future__ import annotations

from typing import Any

from voco.errors import Refused
from voco.model.interop.model_files import read_json_file

PREPROCESSOR = "preprocessor_config.json"  # transformers' file of an image processor
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CROPPED = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, **CLIP}
SQUEEZED = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLASSES: dict[str, dict[str, Any]] = {"CLIP": CROPPED, "Siglip": SQUEEZED, "Llava": CROPPED, "LlavaNext": CROPPED}
SUFFIXES = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
BICUBIC, WHITE = 3, 255  # Pillow's number of the filter; the brightest value of a pixel


def image_mean_std(folder: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation for normalising pixels; None where no processor is saved."""
    options = image_options(folder)
    return None if options is None else (tuple(options["image_mean"]), tuple(options["image_std"]))


def image_fit(folder: str) -> str:
    """How images become square for a LLaVA that transformers saved: squeezed if its processor resizes to height and width.

    Else padded: LLaVA-1.5 was trained so, although its first processors in transformers crop.
    """
    options = image_options(folder) or {}
    resizes = "height" in _edges(options.get("size"))
    return "squeeze" if resizes and not options.get("do_pad") and not options.get("do_center_crop") else "pad"


def image_options(folder: str) -> dict[str, Any] | None:
    """The options of a directory's image processor, with the defaults of its class; None where none is saved.

    As transformers does: a processor inside `processor_config.json` comes before `preprocessor_config.json`. Raises Refused
    for a class with other options.
    """
    saved = (read_json_file(folder, "processor_config.json") or {}).get("image_processor") or read_json_file(folder, PREPROCESSOR)
    if saved is None:
        return None
    kind = str(saved.get("image_processor_type") or saved.get("feature_extractor_type") or "CLIPImageProcessor")
    suffix = next((suffix for suffix in SUFFIXES if kind.endswith(suffix)), "")
    if kind.removesuffix(suffix) not in CLASSES:
        raise Refused(f"{folder}: expected an image processor of {', '.join(CLASSES)}, got {kind}")
    return {**CLASSES[kind.removesuffix(suffix)], **{key: value for key, value in saved.items() if value is not None}}


def check_image_options(folder: str, source: str, side: int, pinpoints: list[list[int]] | None = None) -> None:
    """Raises Refused where the saved processor gives a tower of `side` pixels other values than ours.

    `pinpoints` are those of a LLaVA-1.6's config, which counts the tiles that its processor cuts.
    """
    options = image_options(folder)
    if options is None:
        return
    square = {"height": side, "width": side}
    expected: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": BICUBIC}
    got = {key: options.get(key, value) for key, value in expected.items()}
    factor = options.get("rescale_factor", 1 / WHITE)
    if abs(factor * WHITE - 1) > 1e-6:
        expected["rescale_factor"], got["rescale_factor"] = "1/255", factor
    edges = _edges(options["size"])
    if edges not in ({"shortest_edge": side}, square):
        expected["size"], got["size"] = f"{side}, the tower's", options["size"]
    if options["do_center_crop"] and _square(options["crop_size"]) != square:
        expected["crop_size"], got["crop_size"] = f"{side}, the tower's", options["crop_size"]
    if pinpoints is not None and options.get("image_grid_pinpoints", pinpoints) != pinpoints:
        expected["image_grid_pinpoints"] = f"{pinpoints}, as config.json says"
        got["image_grid_pinpoints"] = options["image_grid_pinpoints"]
    for key, value in expected.items():
        if got[key] != value:
            raise Refused(f"{source}: {key} of its image processor: expected {value}, got {got[key]}; its pixels would be others")


def _edges(size: Any) -> dict[str, int]:
    """A size as transformers writes it: old files have one number for the shortest edge. Keys without a value are left out."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {key: value for key, value in (size or {}).items() if value is not None}


def _square(size: Any) -> dict[str, int]:
    """The same for a crop, of which one number is both sides."""
    return {"height": size, "width": size} if isinstance(size, int) else _edges(size)
