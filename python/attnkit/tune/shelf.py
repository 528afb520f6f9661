"""What people do with entries beside tuning: compare, merge, verify, carry to another machine, tidy up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attnkit import backends
from attnkit.errors import AttnkitError, error
from attnkit.ir.text import parse as parse_program
from attnkit.plan.space import Config, Space, default_config, of_direction
from attnkit.plan.spec import KernelSpec
from attnkit.tune import lookup
from attnkit.tune.choose import TIE, choose, noise
from attnkit.tune.entry import Entry, merge
from attnkit.tune.key import Key
from attnkit.tune.problem import recalled
from attnkit.tune.search import ROUNDS
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Damaged, Folder, Pack, Place
from attnkit.tune.tuner import Measure, key_of_problem


@dataclass(frozen=True)
class Summary:
    """An entry in numbers. ``changed`` are the chosen fields that are not the default; ``gain`` the default's time over theirs."""

    entry: Entry
    config: Config
    changed: Config
    gain: Interval | None
    noise: float

    @property
    def measured(self) -> int:
        """How many configs were measured."""
        return len(self.entry.measurements)


def place(path: Path) -> Place:
    """A folder of entries, or a pack (a file).

    Raises:
        AttnkitValueError: AK401, there is neither.
    """
    if path.is_dir():
        return Folder(path, str(path))
    if path.is_file():
        return Pack(path, str(path))
    raise error("AK401", where="store", given=str(path), allowed="a folder of entries or a .jsonl pack")


def spec_of(key: Key) -> KernelSpec:
    """The problem that a key was made from.

    Raises:
        AttnkitError: AK1xx or AK2xx, its text is no program of this version.
    """
    device = "cpu" if key.backend == "cpu" else "cuda"
    return KernelSpec(
        parse_program(key.program), key.dtype, key.head_dim, key.v_head_dim, device, key.precision
    )


def space_of(key: Key) -> Space:
    """The fields that a key's entry chooses from.

    Raises:
        AttnkitError: AK501, there is no such backend; AK1xx or AK2xx, its text is no program of this version.
    """
    return of_direction(backends.get(key.backend).space(spec_of(key)), key.direction)


def summary(entry: Entry) -> Summary:
    """What an entry chooses, and by how much it is better; nothing where this version cannot read its program."""
    try:
        space = space_of(entry.key)
    except AttnkitError:
        space = {}
    config, default = choose(space, entry), default_config(space)
    known = entry.measured(config)
    changed = {name: value for name, value in config.items() if value != default[name]}
    gain = None
    if changed and known is not None and known.ratio is not None:
        r = known.ratio
        gain = Interval(1 / r.median, 1 / r.hi, 1 / r.lo, r.n)
    return Summary(entry, config, changed, gain, noise(entry, default))


def whole(place: Place) -> list[Entry]:
    """The entries of a place that are whole."""
    return [found for found in place.entries() if isinstance(found, Entry)]


def damaged(place: Place) -> list[Damaged]:
    """What is not."""
    return [found for found in place.entries() if isinstance(found, Damaged)]


def merged(places: Iterable[Place]) -> list[Entry]:
    """What places know together: of two measurements of a config the one that is better known. The order does not matter."""
    together: dict[Key, Entry] = {}
    for each in places:
        for found in whole(each):
            known = together.get(found.key)
            together[found.key] = found if known is None else merge(known, found)
    return list(together.values())


@dataclass(frozen=True)
class Difference:
    """A key that two places choose differently for. ``covered``: noise covers what lies between them."""

    key: Key
    a: Config | None
    b: Config | None
    covered: bool


def differences(a: Place, b: Place) -> tuple[int, list[Difference]]:
    """How many keys there are, and those for which the places choose differently (None: one has no entry)."""
    first, second = ({e.key: summary(e) for e in whole(each)} for each in (a, b))
    keys = sorted(first.keys() | second.keys(), key=lambda key: key.digest)
    found = []
    for key in keys:
        one, other = first.get(key), second.get(key)
        if one is None or other is None:
            mine, theirs = (None if each is None else each.config for each in (one, other))
            found.append(Difference(key, mine, theirs, covered=False))
        elif one.config != other.config:
            found.append(Difference(key, one.config, other.config, _is_covered(one, other)))
    return len(keys), found


def _is_covered(a: Summary, b: Summary) -> bool:
    """Whether neither place saw the other's choice slower than its own by more than noise."""
    margin = 2 * TIE + max(a.noise, b.noise)
    for mine, theirs in ((a, b), (b, a)):
        own, other = mine.entry.measured(mine.config), mine.entry.measured(theirs.config)
        if other is None or other.ratio is None or own is None or own.ratio is None:
            return False
        if other.ratio.lo > own.ratio.hi * (1 + margin):
            return False
    return True


@dataclass(frozen=True)
class Verdict:
    """What an entry's choice does today. ``ratio`` is its time over the default's; ``problem`` says why there is none."""

    entry: Entry
    config: Config
    ratio: Interval | None
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is not slower than the default, beyond noise."""
        return self.problem == "" and (self.ratio is None or self.ratio.lo <= 1 + TIE)


def verify(entries: Iterable[Entry], clock: Path | None) -> Iterator[Verdict]:
    """Measure again what entries choose, beside the default, and check its results. A default needs no measuring."""
    for each in entries:
        found = summary(each)
        try:
            asked = recalled(spec_of(each.key), each.key.direction, dict(each.problem))
            if asked is None:
                yield Verdict(each, found.config, None, "it was tuned with tensors that are not kept")
            elif key_of_problem(asked, each.key.backend) != each.key:
                yield Verdict(each, found.config, None, "it is of another device or other kernels")
            elif not found.changed:
                yield Verdict(each, found.config, None)
            else:
                measure = Measure(asked, space_of(each.key), clock, each.key.backend)
                again = measure((found.config, len(ROUNDS) - 1))
                yield Verdict(each, found.config, again.ratio, again.wrong)
        except AttnkitError as exc:
            yield Verdict(each, found.config, None, " ".join(str(exc).split()))


def collect(folder: Folder, *, stale: bool = False) -> list[Path]:
    """Remove what is damaged and what killed writers left; ``stale``: also entries of other kernels of attnkit or another compiler.

    Raises:
        OSError: a file cannot be removed.
    """
    gone = [Path(found.where) for found in damaged(folder)] + folder.partial()
    if stale and folder.path is not None:
        for each in whole(folder):
            prints = lookup.fingerprint(backends.get(each.key.backend))
            if prints is None or dict(each.key.toolchain) != prints.toolchain:
                gone.append(folder.path / f"{each.key.digest}.json")
    for path in gone:
        path.unlink(missing_ok=True)
    return gone
