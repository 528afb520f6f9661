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
        meaning="the instruction set it uses, of those that `attnkit doctor` lists: `scalar`, `avx2`, `avx512`, `avx512bf16`, `avx512amx`",
        unset="the strongest of them",
        error="AK401",
    ),
    "ATTNKIT_KERNEL_CACHE": Variable(
        reader="the Triton backend, when it compiles a kernel or looks for a compiled one",
        meaning="the folder of compiled GPU kernels, which only you may write to",
        unset="`attnkit/kernels` in `$XDG_CACHE_HOME`, or in `~/.cache`",
        error="AK401",
    ),
    "ATTNKIT_PIN_NUMERICS": Variable(
        reader="the tuner, when a kernel is prepared",
        meaning="`1`: tuned configs may not change a bit of a result; fields that order sums keep their defaults",
        unset="`0`",
        error="AK401",
    ),
    "ATTNKIT_TEST_SEED": Variable(
        reader="the tests, when they start",
        meaning="the seed of their random numbers, which the first lines of a run print",
        unset="`20240229`",
    ),
    "ATTNKIT_TUNE": Variable(
        reader="the tuner, when a kernel is prepared",
        meaning="`replay`: what was measured, else the default; `off`: the default; `tune-missing`, `retune`: measure at a first call",
        unset="`replay`, which never measures",
        error="AK401",
    ),
    "ATTNKIT_TUNE_PROJECT": Variable(
        reader="the tuner, when a kernel is prepared",
        meaning="a project's folder of tuned configs (an absolute path), or the `pyproject.toml` whose `[tool.attnkit] tune-store` names it",
        unset="there is none; it is never taken from the working directory",
        error="AK401",
    ),
    "ATTNKIT_TUNE_STORE": Variable(
        reader="the tuner, when a kernel is prepared, and `attnkit tune` and `attnkit cache`",
        meaning="your folder of tuned configs, an absolute path",
        unset="`attnkit/tune` in `$XDG_CACHE_HOME`, or in `~/.cache`",
        error="AK401",
    ),
}
