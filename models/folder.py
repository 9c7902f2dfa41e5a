"""Model folders: the diffusers layout, which plain `WanPipeline.from_pretrained` reads, plus `shotloom.json`.

model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/  shotloom.json
conditioner/  a method's own modules, where it has some (FCA); plain diffusers leaves them out
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from models.backbones.wan import WanBackbone
from models.codecs import VideoCodec
from models.methods import get_method
from models.records import RecordError, decode
from models.text import TextEncoder

Part = Literal["backbone", "codec", "text"]
SETTINGS_FILE = "shotloom.json"
INDEX_FILE = "model_index.json"
CONDITIONER_FILE = Path("conditioner") / "model.safetensors"
# the folders of each part, and of what no part owns
PART_FOLDERS: dict[Part, tuple[str, ...]] = {
    "backbone": ("transformer",),
    "codec": ("vae",),
    "text": ("text_encoder", "tokenizer"),
}


@dataclass
class ModelSettings:
    """What the weights were trained for. The defaults are those of a plain Wan 2.1 folder at 480p."""

    method: str = "fvdm"
    method_params: dict[str, Any] = field(default_factory=dict)
    backbone: Literal["wan"] = "wan"
    text_length: int = 512  # tokens of a context
    level_shift: float = 3.0  # timestep shift of the sampling levels
    frames_per_shot: int = 81  # video frames, 4k+1
    height: int = 480
    width: int = 832
    fps: float = 16.0
    train: dict[str, Any] = field(default_factory=dict)  # how the weights came about; read by people


class Model:
    """The loaded parts of a model folder; reading a part that was not loaded raises AttributeError."""

    def __init__(
        self,
        backbone: WanBackbone | None,
        codec: VideoCodec | None,
        text: TextEncoder | None,
        settings: ModelSettings,
    ) -> None:
        self._parts: dict[str, Any] = {"backbone": backbone, "codec": codec, "text": text}
        self.settings = settings

    @property
    def backbone(self) -> WanBackbone:
        return self._part("backbone")

    @property
    def codec(self) -> VideoCodec:
        return self._part("codec")

    @property
    def text(self) -> TextEncoder:
        return self._part("text")

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def has(self, part: Part) -> bool:
        return self._parts[part] is not None

    def _part(self, part: Part) -> Any:
        if not self.has(part):
            raise AttributeError(f"this model was loaded without its {part}; add it to load_model(parts=...)")
        return self._parts[part]


def load_model(
    path: Path | str,
    parts: Sequence[Part] = get_args(Part),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Open a model folder. The codec is always float32; `dtype` is for backbone and text encoder.

    Raises FileNotFoundError or RecordError naming the file for a folder that is not one.
    """
    path = Path(path)
    settings = load_settings(path)
    for part in parts:
        for name in PART_FOLDERS[part]:
            if not (path / name).is_dir():
                raise FileNotFoundError(f"{path / name} is missing: the {part} of a model folder lies there")
    backbone, codec, text = None, None, None
    if "backbone" in parts:
        if (path / "transformer_2").is_dir():
            raise ValueError(f"{path}: two-expert Wan 2.2 models are not supported; use Wan 2.1 or a one-expert model")
        # from_pretrained, not .to(dtype): it keeps the time embedding in float32
        loaded: Any = WanTransformer3DModel.from_pretrained(
            path / "transformer", torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
        backbone = WanBackbone(loaded.to(device)).eval()
        if (path / CONDITIONER_FILE).is_file():
            _load_conditioner(backbone, path / CONDITIONER_FILE, settings, device, dtype)
    if "codec" in parts:
        codec = VideoCodec.from_folder(path, device)
    if "text" in parts:
        text = TextEncoder.from_folder(path, settings.text_length, device, dtype)
    return Model(backbone, codec, text, settings)


def _load_conditioner(
    backbone: WanBackbone, file: Path, settings: ModelSettings, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give the backbone the modules of the folder's method with the weights of `file`."""
    get_method(settings.method, **settings.method_params).attach(backbone)
    if backbone.conditioner is None:
        raise ValueError(f"{file}: weights of conditioning modules, but method {settings.method!r} has none")
    try:
        backbone.conditioner.load_state_dict(load_file(file))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{file} does not fit the method_params of {SETTINGS_FILE}: {first}") from error
    backbone.conditioner.to(device, dtype).eval()


def load_settings(path: Path | str) -> ModelSettings:
    """`shotloom.json` of a model folder; the defaults for a plain diffusers Wan folder, which has none."""
    path = Path(path)
    index = path / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: {path} is not a model folder")
    if (kind := json.loads(index.read_text()).get("_class_name")) != "WanPipeline":
        raise RecordError(f"{index}: _class_name is {kind!r}, supported is 'WanPipeline'")
    file = path / SETTINGS_FILE
    return decode(ModelSettings, json.loads(file.read_text()), str(file)) if file.is_file() else ModelSettings()


def save_model(
    path: Path | str, model: Model, settings: ModelSettings, copy_parts_from: Path | str | None = None
) -> None:
    """Write a model folder, whole or not at all; an older model folder at `path` is replaced.

    Parts that `model` does not hold are copied from the folder `copy_parts_from`. Raises ValueError when a part is
    nowhere to be had, when LoRA is still injected, or when `path` holds something else.
    """
    path = Path(path)
    if path.exists() and not (path / INDEX_FILE).is_file() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not a model folder; choose another place or remove it")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "transformer_2": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    if model.has("backbone"):
        transformer: Any = model.backbone.transformer
        if getattr(transformer, "peft_config", None):
            raise ValueError("the backbone still has LoRA layers: merge_lora it first, or save_lora them on their own")
        transformer.save_pretrained(temporary / "transformer")
        index["transformer"] = ["diffusers", "WanTransformer3DModel"]
        if model.backbone.conditioner is not None:
            weights = {name: w.contiguous() for name, w in model.backbone.conditioner.state_dict().items()}
            (temporary / CONDITIONER_FILE).parent.mkdir()
            save_file(weights, temporary / CONDITIONER_FILE)
    if model.has("codec"):
        model.codec.vae.save_pretrained(temporary / "vae")
        index["vae"] = ["diffusers", "AutoencoderKLWan"]
    if model.has("text"):
        text_model: Any = model.text.model
        text_model.save_pretrained(temporary / "text_encoder")
        model.text.tokenizer.save_pretrained(temporary / "tokenizer")
        index["text_encoder"] = ["transformers", type(model.text.model).__name__]
        index["tokenizer"] = ["transformers", type(model.text.tokenizer).__name__]
    for part in get_args(Part):
        if not model.has(part):
            if copy_parts_from is None:
                raise ValueError(f"cannot write {path}: the model holds no {part}; load it, or give copy_parts_from")
            source = Path(copy_parts_from)
            source_index = json.loads((source / INDEX_FILE).read_text())
            for name in PART_FOLDERS[part]:
                shutil.copytree(source / name, temporary / name)
                index[name] = source_index[name]
            if part == "backbone" and (source / CONDITIONER_FILE).is_file():
                shutil.copytree(source / CONDITIONER_FILE.parent, temporary / CONDITIONER_FILE.parent)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=settings.level_shift)
    scheduler.save_pretrained(temporary / "scheduler")
    (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (temporary / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2, sort_keys=True) + "\n")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)
