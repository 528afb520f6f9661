"""From a program text and a pair of tensors to a kernel that can be called, found again with one lookup."""

from attnkit.runtime.prepare import Prepared, choose, clear, prepare, when_cleared

__all__ = ["Prepared", "choose", "clear", "prepare", "when_cleared"]
