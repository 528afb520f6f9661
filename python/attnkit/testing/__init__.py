"""What attnkit tests itself with, shipped so that you can test variants of your own.

`oracle` computes attention in float64 from the equation, `tolerances` decides whether a result is close enough to
it, `inputs` makes problems that are hard in different ways, `gradients` differentiates by finite differences, and
`strategies` (needs hypothesis) draws random programs. Everything but `strategies` needs numpy alone; torch tensors
are converted by the caller.
"""

from attnkit.testing.gradients import agree, differences
from attnkit.testing.inputs import DISTRIBUTIONS, Dims, qkv
from attnkit.testing.oracle import Expected, Pairs, attention
from attnkit.testing.tolerances import KAPPA, Kappa, Measured, check, measure

__all__ = [
    "DISTRIBUTIONS",
    "KAPPA",
    "Dims",
    "Expected",
    "Kappa",
    "Measured",
    "Pairs",
    "agree",
    "attention",
    "check",
    "differences",
    "measure",
    "qkv",
]
