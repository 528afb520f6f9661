"""Shared by the tests of illegal programs."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from attnkit.errors import AttnkitError


def _code_of(check: Callable[[Any], object], case: Any) -> str:
    try:
        check(case)
    except AttnkitError as exc:
        return exc.code
    except Exception as exc:  # a crash is a finding like any other
        return repr(exc)
    return "legal"


@pytest.fixture
def misjudged() -> Callable[[Callable[[Any], object], Iterable[tuple[str, Any]]], list[str]]:
    """``misjudged(check, cases)``: those of the cases ``(code, what)`` that ``check`` does not refuse with their code."""

    def find(check: Callable[[Any], object], cases: Iterable[tuple[str, Any]]) -> list[str]:
        judged = [(_code_of(check, what), code, what) for code, what in cases]
        return [f"{given}, not {code}: {what}" for given, code, what in judged if given != code]

    return find
