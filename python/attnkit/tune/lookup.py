"""From a problem to the config that runs it: the layers in their order, and the mode.

Nothing here measures. A kernel is prepared once for each bucket of lengths, and so looked up once; a warm call never comes here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from attnkit.backends import Backend, Fingerprint
from attnkit.errors import error
from attnkit.plan.space import DIRECTIONS, Config, Direction, default_config, of_direction, pinned
from attnkit.plan.spec import KernelSpec
from attnkit.tune.choose import choose
from attnkit.tune.entry import Entry
from attnkit.tune.key import ANY, Key, Lengths, buckets, key_of
from attnkit.tune.store import Folder, Layer, Pack, Place

Mode = Literal["off", "replay", "tune-missing", "retune"]
COST_MODEL = "cost model"  # the layer of what was not measured
_HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """A config, and for each direction the layer that it comes from; ``lengths`` is the bucket that was asked."""

    config: Config
    layers: dict[Direction, str] = field(default_factory=dict)
    lengths: Lengths = ANY


def serve(backend: Backend, spec: KernelSpec, lengths: Lengths = ANY) -> Served:
    """The config of a problem whose call has so many queries and keys (`ANY` if that is not known).

    Raises:
        AttnkitValueError: AK401, a variable of the environment has a bad value.
    """
    space = backend.space(spec)
    if not space:
        return Served({})
    if is_pinned():
        space = pinned(space)
    default = Served(default_config(space), dict.fromkeys(DIRECTIONS, COST_MODEL), buckets(spec, lengths))
    if mode() == "off" or lengths == ANY:
        return default
    prints = fingerprint(backend)
    there = [layer for layer in layers(prints) if layer.exists()] if prints is not None else []
    if prints is None or not there:
        return default
    config: Config = {}
    names: dict[Direction, str] = {}
    for direction in DIRECTIONS:
        part = of_direction(space, direction)
        key = key_of(backend.name, spec, direction, default.lengths, *prints)
        found = find(there, key)
        names[direction] = COST_MODEL if found is None else found[0]
        config |= choose(part, None if found is None else found[1])
    return Served({name: config[name] for name in space}, names, default.lengths)


def find(layers: Sequence[Layer], key: Key) -> tuple[str, Entry] | None:
    """The first entry of a key, and the name of its layer."""
    for layer in layers:
        if (entry := layer.get(key)) is not None:
            return layer.name, entry
    return None


def is_pinned() -> bool:
    """Whether numeric fields keep their defaults, because the user wants the bits of an untuned kernel.

    Raises:
        AttnkitValueError: AK401, ``ATTNKIT_PIN_NUMERICS`` is neither 0 nor 1.
    """
    value = os.environ.get("ATTNKIT_PIN_NUMERICS", "0")
    if value not in ("0", "1"):
        raise error(
            "AK401", where="environment variable ATTNKIT_PIN_NUMERICS", given=repr(value), allowed="0, 1"
        )
    return value == "1"


def mode() -> Mode:
    """What ``ATTNKIT_TUNE`` says.

    Raises:
        AttnkitValueError: AK401, it is none of the modes.
    """
    value = os.environ.get("ATTNKIT_TUNE", "replay")
    if value not in get_args(Mode):
        allowed = ", ".join(get_args(Mode))
        raise error("AK401", where="environment variable ATTNKIT_TUNE", given=repr(value), allowed=allowed)
    return value  # type: ignore[return-value]


def fingerprint(backend: Backend) -> Fingerprint | None:
    """What the backend's times depend on; None: it takes no part in tuning."""
    asked = getattr(backend, "fingerprint", None)
    return None if asked is None else asked()


# --- the layers ---------------------------------------------------------------------------------------------


def layers(prints: Fingerprint) -> tuple[Place, ...]:
    """Where entries are looked for, in this order: the user's folder, the project's, the packs of this device."""
    found: list[Place] = [user()]
    if (named := project()) is not None:
        found.append(named)
    return (*found, shipped(slug(prints)))


def user() -> Folder:
    """The user's folder: where everything that is measured goes.

    Raises:
        AttnkitValueError: AK401, ``ATTNKIT_TUNE_STORE`` is not an absolute path.
    """
    if (given := _path("ATTNKIT_TUNE_STORE", os.environ.get("ATTNKIT_TUNE_STORE"))) is not None:
        return Folder(given)
    cache_home = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(cache_home) if cache_home else Path.home() / ".cache"
    except RuntimeError:  # nobody has a home
        return Folder(None)
    return Folder(base / "attnkit" / "tune")


def project() -> Folder | None:
    """The folder that ``ATTNKIT_TUNE_PROJECT`` names, itself or through a ``pyproject.toml``; None: it names nothing.

    Never the working directory by itself: a folder that one happens to stand in decides nothing.

    Raises:
        AttnkitValueError: AK401, it is not an absolute path, or the ``pyproject.toml`` names no folder.
    """
    path = _path("ATTNKIT_TUNE_PROJECT", os.environ.get("ATTNKIT_TUNE_PROJECT"))
    if path is None:
        return None
    return Folder(_folder_of(path) if path.suffix == ".toml" else path, "project")


def _path(variable: str, given: str | None) -> Path | None:
    if given is None:
        return None
    if not Path(given).is_absolute():
        where = f"environment variable {variable}"
        raise error("AK401", where=where, given=repr(given), allowed="an absolute path")
    return Path(given)


@cache
def _folder_of(pyproject: Path) -> Path:
    import tomllib  # a quarter of the time that importing attnkit would take

    where = f"[tool.attnkit] tune-store of {pyproject}"
    try:
        with pyproject.open("rb") as file:
            named = tomllib.load(file).get("tool", {}).get("attnkit", {}).get("tune-store")
    except (OSError, ValueError) as exc:
        raise error("AK401", where=where, given=str(exc), allowed="a TOML file") from exc
    if not isinstance(named, str) or not named:
        raise error(
            "AK401", where=where, given=repr(named), allowed="the path of a folder, from the file's own"
        )
    return pyproject.parent / named


@cache
def shipped(name: str) -> Pack:
    """The pack of a device that came with attnkit."""
    # In an installation beside the modules; in a source tree, from which it is installed as editable, at its root.
    folder = next((p for p in (_HERE / "autotune", _HERE.parents[1] / "autotune") if p.is_dir()), _HERE)
    return Pack(folder / "packs" / f"{name}.jsonl")


def slug(prints: Fingerprint) -> str:
    """The name of a device's pack: what tells it apart, as one word."""
    words = " ".join(prints.device[name] for name in sorted(prints.device, reverse=True))
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())
