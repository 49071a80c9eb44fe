"""Find the parts of a base model: `embedded`, a folder, a hub id or a file, resolved to paths and hashed.

Layer 3: finds files. It opens them only to hash them and to recognise our own.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from posecrafter_rt.atomic import means_full, sha256_files, sha256_json
from posecrafter_rt.errors import DiskFull, ModelError, first_line
from posecrafter_rt.models.settings import SETTINGS_FILE, BaseSettings

SD15_FOLDER = Path(__file__).parent / "sd15"  # configuration and tokenizer files for single files, which have none
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / "base"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The forms that a network's weights may have, as names of its whole file. The first that exists is used.
_DIFFUSERS_FORMS = (
    ("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model.fp16", "safetensors"),
    ("diffusion_pytorch_model", "bin"), ("diffusion_pytorch_model.fp16", "bin"),
)  # fmt: skip
_CLIP_FORMS = (
    ("model", "safetensors"), ("model.fp16", "safetensors"), ("pytorch_model", "bin"), ("pytorch_model.fp16", "bin"),
)  # fmt: skip
_COMPLETE = "it must be a complete Stable Diffusion 1.5 model in diffusers' or the original layout"
_BROKEN = (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError, UnpicklingError)
PARTS = ("unet", "controlnet", "vae", "text_encoder")


@dataclass(frozen=True)
class Component:
    """The weight files of one network and the folder with its config.json.

    location: the network's folder or single file, for messages.
    """

    role: str
    files: tuple[Path, ...]
    location: Path
    config_folder: Path

    @property
    def is_single_file(self) -> bool:
        """Whether it was given as a file, which may be in the original layout."""
        return self.files == (self.location,)


@dataclass(frozen=True)
class Base:
    """A located base: a folder with one subfolder per network, or one file that holds several.

    is_hub: whether the folder is a copy of a hub's, which has no weights until `component` fetches them.
    """

    base_id: str
    folder: Path | None
    file: Path | None
    configs: Path
    is_hub: bool = False

    def settings(self) -> BaseSettings:
        """Return the base's settings; a single file has none, so it takes the defaults. Raises: ModelError."""
        return BaseSettings() if self.folder is None else BaseSettings.load(self.folder)

    def has(self, role: str) -> bool:
        """Return whether a folder has this network; always False for a single file, which has no ControlNet."""
        return self.folder is not None and (self.folder / role / "config.json").is_file()

    def config_folder(self, role: str) -> Path:
        """Return the folder with the config.json of one network. Raises: ModelError if a base's folder lacks it."""
        if self.folder is not None and not self.has(role):
            message = f"{self.folder} has no {role}/config.json"
            raise ModelError(message, hint="a base folder holds unet, vae, text_encoder, tokenizer and scheduler")
        return self.configs / role

    def component(self, role: str) -> Component:
        """Return the files of one network; a hub's are fetched now. Raises: ModelError if they are not there."""
        config_folder = self.config_folder(role)
        if self.file is not None:
            return Component(role, (self.file,), self.file, config_folder)
        if self.is_hub:
            config_folder = _download(self.base_id, {role: role}, "base model") / role
        return _folder_component(role, config_folder)


def locate_base(base: str) -> Base:
    """Find a base; of a hub's, fetch all but the weights.

    Raises: ModelError if it is not there or already tuned, or the hub lacks it or cannot be reached; DiskFull.
    """
    if base == "embedded":
        if not EMBEDDED_FOLDER.is_dir():
            message = "the embedded base is not part of this installation"
            raise ModelError(message, hint=f"train it: python -m posecrafter_rt.embedded.train {EMBEDDED_FOLDER}")
        return Base(base, EMBEDDED_FOLDER, None, EMBEDDED_FOLDER)
    path = _path(base)
    if _is_ours(path):
        raise ModelError(f"{path} was tuned on a base; it is none itself",
                         f"give that one: posecrafter-rt inspect {shlex.quote(str(path))} names it")  # fmt: skip
    if path.is_dir():
        return Base(lasting_id(base), path, None, path)
    if path.is_file():
        _check_suffix(path)
        return Base(lasting_id(base), None, path, SD15_FOLDER)
    folder = _download(base, {role: role for role in PARTS}, "base model", with_weights=False)
    return Base(base, folder, None, folder, is_hub=True)


def locate_component(source: str, role: str) -> Component:
    """Find a single network: a folder (or its subfolder `role`), a file, or a hub id.

    A file that bears a diffusers folder's name has the configuration beside it, and any other Stable Diffusion 1.5's.
    Raises: as `locate_base`.
    """
    path, config_folder = _path(source), _config_folder(source, role)
    return Component(role, (path,), path, config_folder) if path.is_file() else _folder_component(role, config_folder)


def _config_folder(source: str, role: str, *, with_weights: bool = True) -> Path:
    """Return the folder with the config.json of a single network; see `locate_component` and `_download`."""
    path = _path(source)
    if path.is_file():
        _check_suffix(path)
        is_of_folder = path.name.startswith("diffusion_pytorch_model") and (path.parent / "config.json").is_file()
        return path.parent if is_of_folder else SD15_FOLDER / role
    roles = {"": role, role: role}
    folder = path if path.is_dir() else _download(source, roles, role, with_weights=with_weights)
    candidates = [candidate for candidate in (folder, folder / role) if (candidate / "config.json").is_file()]
    if not candidates:
        message = f"{source} has no config.json, so it is no {role}"
        raise ModelError(message, hint=f"give the folder that holds the {role}")
    return candidates[0]


def hash_files(parts: Mapping[str, tuple[Path, ...]]) -> str:
    """Return the SHA-256 over the contents of every network's weight files, whatever their names."""
    known = sha256_files(path for paths in parts.values() for path in paths)
    return sha256_json({role: [known[path] for path in paths] for role, paths in parts.items()})


def config_folders(base: Base, given: Mapping[str, str | None]) -> dict[str, Path]:
    """Return the folder with each network's config.json; the hub's weights stay there.

    given: by role, the source of a network that is used instead of the base's own.
    Raises: as `locate_base`.
    """
    folders = {role: _config_folder(source, role, with_weights=False) for role, source in given.items() if source}
    return {role: folders.get(role) or base.config_folder(role) for role in PARTS}


def hash_configs(base: Base, given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the SHA-256 over each network's config.json, and over the tokenizer's files. As `config_folders`."""
    hashes = {}
    for role, folder in config_folders(base, given).items():
        with reading(folder):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            hashes[role] = sha256_json({name: value for name, value in config.items() if not is_of_writer(name)})
    tokenizer = base.configs / "tokenizer"
    with reading(tokenizer):
        known = sha256_files(path for path in tokenizer.glob("*") if path.suffix in (".json", ".txt"))
    return {**hashes, "tokenizer": sha256_json({path.name: digest for path, digest in known.items()})}


def is_of_writer(name: str) -> bool:
    """Whether an entry of a config.json says only who wrote it, such as the version of diffusers, and from what."""
    return name.startswith("_") or name in ("transformers_version", "architectures", "dtype", "torch_dtype")


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn the errors that libraries raise on broken files into a ModelError of one line."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{source} has no {error}", hint=_COMPLETE) from error
    except _BROKEN as error:
        raise ModelError(f"{source} cannot be loaded: {first_line(error)}", hint=_COMPLETE) from error


def lasting_id(source: str) -> str:
    """Return an id that works from any working directory: a path made absolute, or any other name unchanged."""
    path = _path(source)
    # Not what it links to: a file of the hub's cache links to one without a suffix, and without a configuration beside it.
    return str(path.absolute()) if source != "embedded" and path.exists() else source


def _path(source: str) -> Path:
    """Return a source as a path; `~name` stays unchanged if there is no such user."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _is_ours(path: Path) -> bool:
    """Return whether a path is an engine's folder or a tuned checkpoint, which begins with a mark of ours."""
    if path.is_dir():
        return (path / "manifest.json").is_file() and (path / "networks").is_dir()
    if not path.is_file():
        return False
    with reading(path), path.open("rb") as file:
        return b'"posecrafter"' in file.read(64)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(f"{path} is no weight file: its suffix is {path.suffix!r}",
                         hint=f"give a folder, or a file ending in {', '.join(WEIGHT_SUFFIXES)}")  # fmt: skip


def _folder_component(role: str, folder: Path) -> Component:
    if files := _weight_files(role, folder):
        return Component(role, files, folder, folder)
    whole, _ = _patterns(role)[0]
    raise ModelError(f"{folder} has no {whole}, nor its fp16 or .bin form, whole or in shards",
                     hint=f"put the weights of the {role} there; of a hub's model, check the connection, too")  # fmt: skip


def _patterns(role: str) -> list[tuple[str, str]]:
    """Return, for each form, the name of the whole file and a pattern of the shards' names."""
    forms = _CLIP_FORMS if role == "text_encoder" else _DIFFUSERS_FORMS
    return [(f"{stem}.{suffix}", f"{stem}-?????-of-?????.{suffix}") for stem, suffix in forms]


def _weight_files(role: str, folder: Path) -> tuple[Path, ...]:
    """Return the files of the first form that exists; empty if none does."""
    for pattern in (pattern for form in _patterns(role) for pattern in form):
        if files := tuple(sorted(folder.glob(pattern))):
            return files
    return ()


def _download(repo_id: str, roles: Mapping[str, str], kind: str, *, with_weights: bool = True) -> Path:
    """Download from the hub what is needed and not yet cached: of each network, the first form of weights that exists.

    Args:
        roles: maps each folder of the repository to the network to look for there; "" is the repository itself.
        with_weights: else only what is small is fetched.
    """
    if not _HUB_ID.fullmatch(repo_id) or Path(repo_id).suffix in WEIGHT_SUFFIXES:
        raise ModelError(f"there is no {kind} at {repo_id}", hint=f"say where it is: {_usage(kind)}")
    places = {f"{subfolder}/" if subfolder else "": role for subfolder, role in roles.items()}
    small = [f"{place}config.json" for place in places] + ["tokenizer/*", "scheduler/*.json", SETTINGS_FILE]
    if not with_weights:
        return _fetch(repo_id, small, kind)
    for number in range(len(_DIFFUSERS_FORMS)):
        weights = [f"{place}{name}" for place, role in places.items() for name in _patterns(role)[number]]
        folder = _fetch(repo_id, [*small, *weights], kind)
        places = {
            place: role for place, role in places.items()
            if (folder / place / "config.json").is_file() and not _weight_files(role, folder / place)
        }  # fmt: skip
        if not places:
            break
    return folder


def _fetch(repo_id: str, patterns: list[str], kind: str) -> Path:
    """Return the hub's cached copy of a repository, with these files if it has them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except MemoryError:
        raise
    except Exception as error:  # also those of what it downloads with: httpx has types of its own, Xet RuntimeError
        if means_full(error):
            raise DiskFull(f"the disk is full: {kind} {repo_id} could not be fetched",
                           hint="free some space, or set HF_HOME to a folder where there is more") from error  # fmt: skip
        raise ModelError(f"the hub gave no {kind} {repo_id}: {first_line(error)}",
                         hint=f"check the name and the connection; {_usage(kind)}") from error  # fmt: skip


def _usage(kind: str) -> str:
    """Return the option that takes such a model, and the forms that it takes, for hints."""
    if kind == "base model":
        return '--base takes "embedded", a diffusers folder, a weight file, or a hub id: owner/name'
    forms = "a diffusers folder" if kind == "small_decoder" else "a diffusers folder, a weight file"
    return f"--{kind.replace('_', '-')} takes {forms}, or a hub id: owner/name"
