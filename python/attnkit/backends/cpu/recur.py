"""Recurrences on the CPU engine: csrc/cpu/recur.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from attnkit.backends.cpu.engine import FAULTS, engine
from attnkit.errors import error
from attnkit.plan.recurrence import ROLES, recurrence
from attnkit.plan.spec import Config, KernelSpec

_NORMS = ("none", "l2", "layer")
_FEATURE_MAPS = ("identity", "elu1")
# As csrc/bind/recur.cc counts them.
_TENSORS = (
    "q", "k", "v", "o", *ROLES, "state", "norm", "d_o", "d_state", "d_norm", "dq", "dk", "dv",
    *(f"gradient of {role}" for role in ROLES),
)  # fmt: skip
MOST_CHANNELS = 256  # of polynomials of order 2


def reasons(spec: KernelSpec) -> tuple[str, ...]:
    """Why the engine cannot run this recurrence; empty if it can."""
    found = recurrence(spec.program)
    if found is None:
        return (
            "the program is more than one recurrence over q, k, v with a norm and a feature map of its own",
        )
    if found.op.coefficients is None:
        return ()
    if not found.op.normalize:
        return ("polynomials without a normaliser have no kernel",)
    if len(found.op.coefficients) == 3 and spec.head_dim > MOST_CHANNELS:
        return (f"head_dim is {spec.head_dim}, above {MOST_CHANNELS}: a state would have too many rows",)
    return ()


class RecurKernel:
    """One recurrence on the engine. Calling it writes tensors in place; it allocates nothing of their size."""

    def __init__(self, spec: KernelSpec, config: Config) -> None:
        found = recurrence(spec.program)
        assert found is not None
        self.spec, self.config, self.recurrence = spec, config, found
        op = found.op
        places = [found.roles.index(role) if role in found.roles else -1 for role in ROLES]
        self._in_turn: Any = itemgetter(*places)  # of others and a None
        self._coefficients = list(op.coefficients or ())
        scale = spec.head_dim**-0.5 if op.scale is None else op.scale
        self._form = (
            _NORMS.index(found.norm), _FEATURE_MAPS.index(found.feature_map), scale, op.causal, op.normalize, op.epsilon,
        )  # fmt: skip

    def tokens(self, chunk: int) -> int:
        """How many tokens are computed together where ``chunk`` are asked for: csrc/cpu/recur.h."""
        kinds = dict(zip(self.recurrence.roles, self.recurrence.kinds, strict=True))
        by_channel = kinds.get("gate") in ("bhsd", "packed") or "bonus" in kinds
        most: int = engine().most_tokens(self.spec.head_dim, by_channel, bool(self._coefficients))
        return min(chunk, most)

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        others: Sequence[Any],
        sequences: list[tuple[int, int, int]] | None,
        o: Any,
        state: Any,
        norm: Any | None,
        chunk: int,
        threads: int,
    ) -> None:
        """Compute o, the last state and (normalised) its norm in place; ``others`` are float32, in the order of the program's roles.

        Raises:
            AttnkitError: AK502, sizes beyond the engine's; AK603, out of memory; AK606, AK607, a tensor without memory
                or not aligned.
        """
        form = (*self._form, chunk, self._coefficients)
        beside = self._in_turn((*others, None))
        _run(engine().recur, q, k, v, o, beside, state, norm, sequences, form, threads)

    def backward(
        self,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        others: Sequence[Any],
        state: Any,
        norm: Any | None,
        sequences: list[tuple[int, int, int]] | None,
        chunk: int,
        d_o: Any,
        d_state: Any | None,
        d_norm: Any | None,
        dq: Any,
        dk: Any,
        dv: Any,
        d_others: Sequence[Any],
        threads: int,
    ) -> None:
        """Compute the gradients in place, from a call's inputs and results and the cotangents of these.

        ``dq`` has a head for each of o and ``dk`` one for each of v. Of ``d_others``, in the order of ``others``, those of gate and beta are for
        every token, that of the bonus for every sequence; o is read where it is normalised, the state where it is not causal.

        Raises:
            AttnkitError: as the call.
        """
        form = (*self._form, chunk, self._coefficients)
        _run(
            engine().recur_backward, q, k, v, o, self._in_turn((*others, None)), state, norm, sequences, form, d_o,
            d_state, d_norm, dq, dk, dv, self._in_turn((*d_others, None)), threads,
        )  # fmt: skip


def _run(entry: Callable[..., tuple[int, int]], *arguments: Any) -> None:
    try:
        fault, about = entry(*arguments)
    except ValueError as exc:
        raise error("AK502", where="backend cpu", given=str(exc)) from exc
    if fault:
        raise error(FAULTS[fault], where="backend cpu" if about < 0 else _TENSORS[about])
