"""Every environment variable of attnkit's own, in one table; docs/env.md is made from it.

A test holds the sources to it: what Python, C++, CMake or the Makefile reads is here, and what is here is read.
"""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """``reader``: who reads it and when; ``unset``: what holds without it; ``error``: the code of a bad value."""

    reader: str
    meaning: str
    unset: str
    error: str = ""


VARIABLES = {
    "ATTNKIT_ISA": Variable(
        reader="the CPU engine, once, when it is first used",
        meaning="the instruction set it uses, of those that `attnkit doctor` lists: `scalar`, `avx2`, `avx512`",
        unset="the strongest of them",
        error="AK401",
    ),
    "ATTNKIT_KERNEL_CACHE": Variable(
        reader="the Triton backend, when it compiles a kernel or looks for a compiled one",
        meaning="the folder of compiled GPU kernels, which only you may write to",
        unset="`attnkit/kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`",
        error="AK401",
    ),
    "ATTNKIT_TEST_SEED": Variable(
        reader="the tests, when they start",
        meaning="the seed of their random numbers, which the first lines of a run print",
        unset="`20240229`",
    ),
}
