"""Triton kernels printed from the program, for NVIDIA GPUs."""

from attnkit.backends.triton.backend import backend

__all__ = ["backend"]
