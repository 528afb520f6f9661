"""``attnkit cache``: what was tuned, to look at and to carry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnkit.cli.options import json_flag

if TYPE_CHECKING:
    from attnkit.tune.entry import Entry
    from attnkit.tune.store import Folder, Place

_PLACE = click.Path(exists=True, path_type=Path)
_store = click.option(
    "--store", type=click.Path(path_type=Path), metavar="DIR|PACK",
    help="Look here, and not into your own folder: a folder, or a pack (.jsonl).",
)  # fmt: skip


@click.group()
def cache() -> None:
    """Show, check and carry what was tuned.

    Entries are looked for in three layers: your folder (ATTNKIT_TUNE_STORE, or attnkit/tune in the cache folder), the
    project's (ATTNKIT_TUNE_PROJECT), and the packs that come with attnkit. Every command takes --json.

    \b
    Examples:
      attnkit cache ls
      attnkit cache show 3f2a
      attnkit cache verify
      attnkit cache export mine.jsonl
      attnkit cache import theirs.jsonl
      attnkit cache merge out/rank0 out/rank1
      attnkit cache diff mine.jsonl theirs.jsonl
      attnkit cache gc --stale
    """


@cache.command()
@_store
@json_flag
def ls(store: Path | None, as_json: bool) -> None:
    """List the entries: what each is about, what it chooses, and by how much that is faster than the default.

    \b
    Examples:
      attnkit cache ls
      attnkit cache ls --store autotune/packs/mine.jsonl --json
    """
    from attnkit.bench import console, records
    from attnkit.tune import shelf

    rows = [
        {"layer": place.name, **_facts(entry)} for place in _places(store) for entry in shelf.whole(place)
    ]
    if as_json:
        click.echo(records.dumps(rows), nl=False)
        return
    from rich import box
    from rich.table import Table

    table = Table(
        "layer", "key", "problem", "q x kv", "configs", "chosen", "gain", box=box.SIMPLE, pad_edge=False
    )
    for row in rows:
        table.add_row(
            row["layer"], row["digest"][:8], row["problem"], row["bucket"], str(row["measured"]), row["chosen"],
            f"{row['gain']['median']:.2f}x" if row["gain"] else "-",
        )  # fmt: skip
    console.data().print(table)


@cache.command()
@click.argument("digest")
@_store
@json_flag
def show(digest: str, store: Path | None, as_json: bool) -> None:
    """Show one entry: the first digits of its key are enough.

    \b
    Examples:
      attnkit cache show 3f2a
      attnkit cache show 3f2a --json | jq .measured
    """
    from attnkit.bench import console, records
    from attnkit.tune import shelf

    found = [e for place in _places(store) for e in shelf.whole(place) if e.key.digest.startswith(digest)]
    different = {e.key.digest for e in found}
    if len(different) != 1:
        raise click.ClickException(f"{len(different) or 'no'} entries begin with {digest}")
    entry = found[0]
    if as_json:
        click.echo(records.dumps(entry.to_dict()), nl=False)
        return
    out = console.data()
    facts = _facts(entry)
    for name in ("digest", "problem", "bucket", "chosen", "noise"):
        out.print(f"{name:8} {facts[name]}", markup=False)
    for name, value in (*entry.key.device, *entry.key.toolchain):
        out.print(f"{name:8} {value}", markup=False)
    for line in entry.key.program.splitlines():
        out.print(f"  | {line}", markup=False)
    out.print(_measurements(entry))


@cache.command()
@click.argument("digests", nargs=-1, metavar="[DIGEST]...")
@_store
@json_flag
def verify(digests: tuple[str, ...], store: Path | None, as_json: bool) -> None:
    """Measure again: is every tuned choice still right, and not slower than the default?

    Exits with 1 if one is not, or if there is damage.

    \b
    Examples:
      attnkit cache verify
      attnkit cache verify 3f2a --json
    """
    from dataclasses import asdict

    from attnkit.bench import console, records
    from attnkit.tune import shelf

    place = _places(store)[0]
    entries = [e for e in shelf.whole(place) if not digests or e.key.digest.startswith(digests)]
    for digest in digests:
        if not any(e.key.digest.startswith(digest) for e in entries):
            raise click.ClickException(f"no entries begin with {digest}")
    verdicts, damaged = list(shelf.verify(entries, place.path)), shelf.damaged(place)
    if as_json:
        rows = [
            {"digest": v.entry.key.digest, "config": v.config, "holds": v.holds, "problem": v.problem,
             "ratio": v.ratio and asdict(v.ratio)}
            for v in verdicts
        ]  # fmt: skip
        click.echo(records.dumps({"entries": rows, "damaged": [d._asdict() for d in damaged]}), nl=False)
    else:
        for v in verdicts:
            r = v.ratio
            said = v.problem or (
                "the default" if r is None else f"{1 / r.median:.2f}x [{1 / r.hi:.2f}, {1 / r.lo:.2f}]"
            )
            style = "" if v.holds else "red"
            console.data().print(
                f"{v.entry.key.digest[:8]} {_facts(v.entry)['problem']}: {said}", style=style, markup=False
            )
        for each in damaged:
            console.data().print(f"damaged: {each.where}: {each.reason}", style="red", markup=False)
    sys.exit(0 if all(v.holds for v in verdicts) and not damaged else 1)


@cache.command()
@click.argument("places", nargs=-1, required=True, type=_PLACE, metavar="DIR|PACK...")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Merge into this folder.  [default: yours]")  # fmt: skip
@json_flag
def merge(places: tuple[Path, ...], into: Path | None, as_json: bool) -> None:
    """Bring entries of several places together: of two measurements of a config the better known one stays.

    The order of places does not matter, and merging twice changes nothing.

    \b
    Examples:
      attnkit cache merge out/rank0 out/rank1 out/rank2
      attnkit cache merge theirs.jsonl --into project/tuned
    """
    _bring(places, into, as_json)


@cache.command()
@click.argument("a", type=_PLACE, metavar="A")
@click.argument("b", type=_PLACE, metavar="B")
@json_flag
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Which entries of two places (folders or packs) choose differently, and whether noise covers it.

    Exits with 1 if there are differences that noise does not cover.

    \b
    Examples:
      attnkit cache diff monday.jsonl tuesday.jsonl
      attnkit cache diff ~/.cache/attnkit/tune theirs.jsonl --json
    """
    from attnkit.bench import console, records
    from attnkit.tune import shelf

    keys, found = shelf.differences(shelf.place(a), shelf.place(b))
    if as_json:
        rows = [{"digest": d.key.digest, "a": d.a, "b": d.b, "covered": d.covered} for d in found]
        click.echo(records.dumps({"keys": keys, "differences": rows}), nl=False)
    else:
        for d in found:
            told = "covered by noise" if d.covered else "not covered by noise"
            console.data().print(f"{d.key.digest[:8]} {_words(d.a)} | {_words(d.b)}: {told}", markup=False)
        console.talk().print(f"{len(found)} of {keys} entries differ")
    sys.exit(0 if all(d.covered for d in found) else 1)


@cache.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_store
@json_flag
def export(file: Path, store: Path | None, as_json: bool) -> None:
    """Write every entry into a pack: a line of JSON each, sorted.

    \b
    Examples:
      attnkit cache export mine.jsonl
      attnkit cache export autotune/packs/mine.jsonl --store project/tuned
    """
    from attnkit.tune import shelf
    from attnkit.tune.store import write_pack

    entries = shelf.whole(_places(store)[0])
    write_pack(file, entries)
    _told({"entries": len(entries), "file": str(file)}, as_json)


@cache.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Import into this folder.  [default: yours]")  # fmt: skip
@json_flag
def import_(file: Path, into: Path | None, as_json: bool) -> None:
    """Take over the entries of a pack.

    Exits with 1 if a line of it is damaged; the others are imported.

    \b
    Examples:
      attnkit cache import theirs.jsonl
    """
    _bring((file,), into, as_json)


@cache.command()
@click.option("--stale", is_flag=True, help="Also entries of other kernels of attnkit or another compiler.")
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Tidy this folder.  [default: yours]",
)
@json_flag
def gc(stale: bool, store: Path | None, as_json: bool) -> None:
    """Remove what is damaged, and what writers that were killed left behind.

    \b
    Examples:
      attnkit cache gc
      attnkit cache gc --stale
    """
    from attnkit.tune import shelf

    gone = shelf.collect(_folder(store), stale=stale)
    _told({"removed": [str(path) for path in gone]}, as_json)


# --- what they share ----------------------------------------------------------------------------------------


def _folder(path: Path | None) -> Folder:
    from attnkit.tune import lookup
    from attnkit.tune.store import Folder

    return lookup.user() if path is None else Folder(path, str(path))


def _places(store: Path | None) -> list[Place]:
    """The place that was named, or all layers of this machine, the user's first."""
    from attnkit import backends
    from attnkit.tune import lookup, shelf

    if store is not None:
        return [shelf.place(store)]
    prints = lookup.fingerprint(backends.get("cpu"))
    assert prints is not None
    return list(lookup.layers(prints))


def _bring(places: tuple[Path, ...], into: Path | None, as_json: bool) -> None:
    from attnkit.tune import shelf

    folder, sources = _folder(into), [shelf.place(path) for path in places]
    entries = shelf.merged(sources)
    if not all(folder.put(entry) for entry in entries):
        raise click.ClickException("not everything could be written")
    damaged = [found for source in sources for found in shelf.damaged(source)]
    facts = {"entries": len(entries), "folder": str(folder.path), "damaged": [d._asdict() for d in damaged]}
    _told(facts, as_json)
    sys.exit(1 if damaged else 0)


def _told(facts: dict[str, Any], as_json: bool) -> None:
    from attnkit.bench import console, records

    if as_json:
        click.echo(records.dumps(facts), nl=False)
        return
    for name, value in facts.items():
        for each in value if isinstance(value, list) else [value]:
            console.data().print(f"{name}: {each}", markup=False)


def _facts(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict

    from attnkit.tune import shelf

    key, found, problem = entry.key, shelf.summary(entry), dict(entry.problem)
    dims = str(key.head_dim) if key.head_dim == key.v_head_dim else f"{key.head_dim}/{key.v_head_dim}"
    name = problem.get("variant") or "program"
    lengths = " x ".join(str(n) if n else "any" for n in (key.q_bucket, key.kv_bucket))
    return {
        "digest": key.digest, "backend": key.backend, "problem": f"{name} {key.dtype} d{dims} {key.direction}",
        "bucket": lengths, "measured": found.measured, "config": found.config,
        "chosen": _words(found.changed) if found.changed else "default", "gain": found.gain and asdict(found.gain),
        "noise": round(found.noise, 4), "measured_on": problem,
    }  # fmt: skip


def _words(config: dict[str, int] | None) -> str:
    return "nothing" if config is None else ", ".join(f"{name}={value}" for name, value in config.items())


def _measurements(entry: Entry) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        "config", "time over the default's", "interval", "rounds", "ms", box=box.SIMPLE, pad_edge=False
    )
    ordered = sorted(entry.measurements, key=lambda m: m.ratio.median if m.ratio else float("inf"))
    for m in ordered:
        config, r = _words(dict(m.config)), m.ratio
        if r is None or m.seconds is None:
            table.add_row(config, m.wrong, "", "", "")
        else:
            cells = f"{r.median:.3f}", f"[{r.lo:.3f}, {r.hi:.3f}]", str(r.n), f"{1e3 * m.seconds:.3g}"
            table.add_row(config, *cells)
    return table
