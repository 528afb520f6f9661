"""The engine on groups of tokens: csrc/cpu/groups.h. Lists are int32 ``[B or 1, Hkv or 1, groups, most]``, filled up with -1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attnkit.backends.cpu.backend import CpuKernel
from attnkit.backends.cpu.engine import FAULTS, engine
from attnkit.errors import error

NORMS = ("none", "l2", "layer")


class ListFacts(NamedTuple):
    """Lists ascend and name tokens there are; some token is in several of a head's; each token is in one of them."""

    valid: bool
    shared: bool
    complete: bool


class Way(NamedTuple):
    """What o is: of each token; ``rows``: float32, with a row for each entry of a list, ``[B, Hq, groups * most, Dv]``, and lse
    likewise; or the mean over a token's groups, without lse."""

    rows: bool = False
    mean: bool = False


def look_at(lists: Any, tokens: int) -> ListFacts:
    """What holds of lists of ``tokens`` tokens.

    Raises:
        AttnkitError: AK502, they are no such lists, or have no memory.
    """
    return (
        ListFacts(*_run(engine().look_at_lists, lists, tokens))
        if lists.numel() > 0
        else ListFacts(True, False, False)
    )


def attend(
    kernel: CpuKernel, q: Any, k: Any, v: Any, o: Any, lse: Any | None, queries: Any, keys: Any, way: Way,
    buffers: list[Any], params: list[float], threads: int,
) -> None:  # fmt: skip
    """Compute ``o`` (and ``lse``) in place, within groups whose lists are valid.

    Raises:
        AttnkitError: as `CpuKernel`.
    """
    fault, about = _run(
        engine().attend_groups, kernel.program, q, k, v, o, lse, kernel.scale, queries, keys, *way, buffers, params, threads,
        *kernel.sizes,
    )  # fmt: skip
    if fault:
        raise kernel.error(FAULTS[fault], about, kernel.bytecode, len(buffers))


def backward(
    kernel: CpuKernel, q: Any, k: Any, v: Any, o: Any, lse: Any, queries: Any, keys: Any, rows: bool, kv_rows: bool,
    buffers: list[Any], params: list[float], d_o: Any, d_lse: Any | None, dq: Any, dk: Any, dv: Any,
    d_buffers: list[Any | None], threads: int,
) -> None:  # fmt: skip
    """Compute the gradients in place, as `CpuKernel.backward`. ``kv_rows``: dk and dv are float32, with a row for each entry
    of a list of keys; with ``rows``, dq has one for each of queries.

    Raises:
        AttnkitError: as `CpuKernel`.
    """
    bytecode, program = kernel.backward_program(d_buffers)
    fault, about = _run(
        engine().attend_groups_backward, program, q, k, v, o, lse, kernel.scale, queries, keys, rows, kv_rows, buffers, params,
        d_o, d_lse, dq, dk, dv, d_buffers, threads, kernel.config["backward_tile_q"], kernel.config["backward_tile_kv"],
    )  # fmt: skip
    if fault:
        raise kernel.error(FAULTS[fault], about, bytecode, len(buffers))


def sum_rows(rows: Any, lists: Any, to: Any, mean: bool, lse: Any | None, threads: int) -> None:
    """``to [B, H, S, D]`` from ``rows [B, H, groups * most, D]``: the sum (mean) of each token's, in the order of groups.

    The lse of each row is raised by the logarithm of how many its token has.
    """
    _run(engine().sum_rows, rows, lists, to, mean, lse, threads)


def route(x: Any, centroids: Any, norm: str, lists: Any, threads: int) -> None:
    """``lists [B, H, C, w]``: the w tokens of largest affinity to each centroid.

    Raises:
        AttnkitError: AK603, out of memory.
    """
    _checked(_run(engine().route, x, centroids, NORMS.index(norm), lists, threads))


def route_prefix(
    q: Any, k: Any, centroids: Any, norm: str, w: int, block: int, queries: Any, keys: Any, threads: int
) -> None:
    """A group for each block of positions and each centroid: see csrc/cpu/groups.h.

    Raises:
        AttnkitError: AK603, out of memory.
    """
    _checked(
        _run(engine().route_prefix, q, k, centroids, NORMS.index(norm), w, block, queries, keys, threads)
    )


def _run(entry: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return entry(*arguments)
    except ValueError as exc:
        raise error("AK502", where="backend cpu", given=str(exc)) from exc


def _checked(fault: int) -> None:
    if fault:
        raise error(FAULTS[fault], where="affinities")
