"""The intermediate representation: what an attention variant is. Standard library and numpy only."""

from attnkit.ir.mods import (
    alibi as alibi,
    bias as bias,
    causal as causal,
    document as document,
    prefix as prefix,
    selective as selective,
    sigmoid as sigmoid,
    signed_softmax as signed_softmax,
    softcap as softcap,
    softmax as softmax,
    softmax_over_queries as softmax_over_queries,
    window as window,
)
from attnkit.ir.program import Program as Program
from attnkit.ir.text import parse as parse, print_program as print_program
from attnkit.ir.trace import Param as Param, param as param
from attnkit.ir.verify import verify as verify
