"""Where entries are kept: folders with a file for each, and packs with a line for each.

A file is named by the digest of its entry's key. It is written beside its place and renamed, so that whoever reads it finds the
old one or the new one, also where the writer is killed. Whatever is not exactly an entry of that key is a miss. Nothing here
raises: tuning is no reason for a call to fail. What goes wrong is said once for each place.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from attnkit.tune.entry import MAX_LINE, Entry, merge, parse
from attnkit.tune.key import Key

_SUFFIX, _PARTIAL = ".json", ".partial-"
_ABANDONED_S = 3600.0  # nobody takes so long to write a file
_warned: set[str] = set()  # places


class Layer(Protocol):
    """A place where entries are found. ``name`` is what `explain` calls it."""

    name: str

    def get(self, key: Key) -> Entry | None:
        """The entry of a key, None where there is none that is whole."""

    def exists(self) -> bool:
        """Whether there is anything to look at."""


class Damaged(NamedTuple):
    """A file, or a line of one, that is not an entry."""

    where: str
    reason: str


class Folder:
    """A folder that entries are read from and written to."""

    def __init__(self, path: Path | None, name: str = "user") -> None:
        self.path = path
        self.name = name

    def exists(self) -> bool:
        """Whether there is such a folder; one that may not be looked at is, and reading it says so."""
        return self.path is not None and _is_there(self.path, Path.is_dir)

    def get(self, key: Key) -> Entry | None:
        """The entry of a key, None where there is none that is whole."""
        if self.path is None:
            return None
        path = self._place(key)
        try:
            found = _read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as exc:
            _warn(self.path, "is damaged or cannot be read", f"{path.name}: {exc}")
            return None
        return found if found.key == key else None

    def put(self, entry: Entry, *, replace: bool = False) -> bool:
        """Keep an entry, together with what the folder has of its key unless it is to ``replace`` that.

        False where it cannot be written.
        """
        if self.path is None:
            _warn(Path("~"), "is not there", "no home folder: what was measured is not kept")
            return False
        known = None if replace else self.get(entry.key)
        path, line = self._place(entry.key), (merge(known, entry) if known else entry).line
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, line.encode("ascii"))
        except OSError as exc:
            _warn(self.path, "cannot be written", f"{exc.strerror or exc}: what was measured is not kept")
            return False
        return True

    def entries(self) -> Iterator[Entry | Damaged]:
        """Every entry, in the order of their names, and what is none."""
        for path in self._files():
            try:
                found = _read(path)
                if path.name != found.key.digest + _SUFFIX:
                    raise ValueError("is the entry of another key")
                yield found
            except FileNotFoundError:
                continue  # collected meanwhile
            except (OSError, ValueError) as exc:
                yield Damaged(str(path), str(exc))

    def remove(self, key: Key) -> None:
        """Forget an entry."""
        if self.path is not None:
            self._place(key).unlink(missing_ok=True)

    def partial(self, older_than: float = _ABANDONED_S) -> list[Path]:
        """What writers that were killed have left behind."""
        if self.path is None or not self.path.is_dir():
            return []
        before = time.time() - older_than
        return [p for p in sorted(self.path.glob(_PARTIAL + "*")) if p.stat().st_mtime < before]

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*" + _SUFFIX)) if self.path is not None and self.path.is_dir() else []

    def _place(self, key: Key) -> Path:
        assert self.path is not None
        return self.path / (key.digest + _SUFFIX)


class Pack:
    """A file with an entry on each line, read when it is first asked."""

    def __init__(self, path: Path, name: str = "pack") -> None:
        self.path = path
        self.name = name
        self._found: dict[Key, Entry] | None = None

    def exists(self) -> bool:
        """Whether there is such a file; one that may not be looked at is, and reading it says so."""
        return _is_there(self.path, Path.is_file)

    def get(self, key: Key) -> Entry | None:
        """The entry of a key, None where there is none that is whole."""
        if self._found is None:
            self._found = {}
            for found in self.entries():
                if isinstance(found, Damaged):
                    _warn(self.path, "is damaged or cannot be read", f"{found.where}: {found.reason}")
                else:
                    self._found[found.key] = found
        return self._found.get(key)

    def entries(self) -> Iterator[Entry | Damaged]:
        """Every entry, in the order of lines, and what is none."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as exc:
            yield Damaged(str(self.path), str(exc))
            return
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                yield parse(line)
            except ValueError as exc:
                yield Damaged(f"{self.path}:{number}", str(exc))


Place = Folder | Pack


def write_pack(path: Path, entries: list[Entry]) -> None:
    """A pack of these entries: a line each, sorted by what they are about, so that packs can be compared as text.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = sorted(entries, key=lambda e: e.line)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(e.line + "\n" for e in ordered).encode("ascii"), mode=0o644)


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:
        return True


def _read(path: Path) -> Entry:
    with path.open("rb") as file:
        return parse(file.read(MAX_LINE + 1))


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Whole or not at all. What is lost with the power was measured, and can be again: nothing is flushed."""
    handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _warn(place: Path, what: str, detail: str) -> None:
    """Once for each place."""
    if str(place) not in _warned:
        _warned.add(str(place))
        warnings.warn(f"attnkit: tuning store {place} {what} ({detail})", RuntimeWarning, stacklevel=2)
