"""The precompiled SIMD engine (csrc/): any program, on any x86-64 CPU, without a compiler."""

from attnkit.backends.cpu.backend import backend

__all__ = ["backend"]
