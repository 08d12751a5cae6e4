"""What is planned: the components of a diffusion pipeline, read from a name, a folder, or a class and a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmecompile.errors import OptionError, TargetError
from fmecompile.offline.named import NAMED

UNKNOWN_PIPELINE_SIZE = (16, 512, 512)


@dataclass(frozen=True)
class Size:
    """Of a clip: its frames, and the height and width of each in pixels."""

    frames: int
    height: int
    width: int

    @property
    def volume(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames} frame{'s' if self.frames != 1 else ''} of {self.height}x{self.width}"


@dataclass(frozen=True)
class Component:
    """One model of a diffusion pipeline: the attribute it is there, its class, and its configuration as JSON text.

    ``parameters`` is a stored count for what is never built.
    """

    name: str
    class_name: str
    config: str = "{}"
    library: str = "diffusers"
    parameters: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.config)


@dataclass(frozen=True)
class Model:
    """A diffusion pipeline, or a component on its own (``pipeline_class`` is empty). ``size`` is its usual one."""

    name: str
    pipeline_class: str
    components: tuple[Component, ...]
    size: Size


def named_model(name: str) -> Model:
    """A model of the table in ``named``. Raises OptionError when there is none of this name."""
    if name not in NAMED:
        raise OptionError(
            f"{name!r} is neither a known model nor a folder",
            next_step=f"give one of {', '.join(NAMED)}, the path of a diffusers folder, or --class and --config",
        )
    known = NAMED[name]
    components = (
        Component(key, part["class"], json.dumps(part.get("config", {})), parameters=part.get("parameters"))
        for key, part in known["components"].items()
    )
    return Model(name, known["pipeline"], tuple(components), Size(*known["size"]))


def folder_model(folder: Path) -> Model:
    """A saved diffusion pipeline (``model_index.json``) or a saved component (``config.json``); weights are not read.

    Raises:
        OptionError: there is no such folder, or it is neither.
    """
    if not folder.is_dir():
        raise OptionError(
            f"there is no folder {str(folder)!r}",
            next_step=f"give a diffusers folder, or one of {', '.join(NAMED)}",
        )
    if (folder / "model_index.json").is_file():
        return _pipeline(folder)
    if (folder / "config.json").is_file():
        return class_model(None, folder / "config.json")
    raise OptionError(
        f"{str(folder)!r} has neither model_index.json nor config.json",
        next_step="give a folder that save_pretrained wrote",
    )


def class_model(class_name: str | None, config: Path) -> Model:
    """One diffusers model; without ``class_name`` the file has to name it (``_class_name``).

    Raises:
        OptionError: the file is missing or no JSON object, or the class is not known.
    """
    settings = read_json(config)
    found = class_name or settings.get("_class_name")
    if not isinstance(found, str):
        raise OptionError(f"{str(config)!r} names no class", next_step="give it with --class")
    require_diffusers_class(found)
    return Model(found, "", (Component(found, found, json.dumps(settings)),), Size(*UNKNOWN_PIPELINE_SIZE))


def _pipeline(folder: Path) -> Model:
    """Components that have a ``config.json`` are models; samplers, tokenizers and image processors have none."""
    index = read_json(folder / "model_index.json")
    components = []
    for name, entry in index.items():
        if not (folder / name / "config.json").is_file() or not isinstance(entry, list) or len(entry) != 2:
            continue
        library, class_name = entry
        if library == "diffusers":
            require_diffusers_class(class_name)
        config = json.dumps(read_json(folder / name / "config.json"))
        components.append(Component(name, str(class_name), config, str(library)))
    if not components:
        raise OptionError(
            f"{str(folder)!r} has no component with a config.json", next_step="give a folder that save_pretrained wrote"
        )
    return Model(folder.resolve().name, str(index.get("_class_name", "")), tuple(components), _usual_size(index))


def _usual_size(index: dict[str, Any]) -> Size:
    same = (known["size"] for known in NAMED.values() if known["pipeline"] == index.get("_class_name"))
    return Size(*next(same, UNKNOWN_PIPELINE_SIZE))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OptionError when the file is missing, unreadable or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read {str(path)!r}: {error.strerror}", next_step="give an existing file") from error
    except ValueError as error:
        raise OptionError(
            f"{str(path)!r} is not JSON: {error}", next_step="give the config.json of a diffusers model"
        ) from error
    if not isinstance(found, dict):
        raise OptionError(f"{str(path)!r} holds no JSON object", next_step="give the config.json of a diffusers model")
    return found


def require_diffusers_class(name: str) -> type:
    """The diffusers model class ``name``. Raises TargetError when diffusers has none."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise TargetError(
            f"diffusers has no model class {name!r}",
            next_step="give a class such as UNetSpatioTemporalConditionModel, UNetMotionModel or AutoencoderKL",
        )
    return found
