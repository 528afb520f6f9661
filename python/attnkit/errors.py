"""Every error attnkit raises: one table of codes, three classes, one function.

A code never changes its meaning. ``docs/errors.md`` is generated from `CODES`, and each code has a test
that provokes it. Ranges: AK1xx text form, AK2xx program (verifier), AK3xx tracing, AK4xx arguments,
AK5xx capability (not built, not available, not supported), AK6xx run time.
"""

from __future__ import annotations

from typing import NamedTuple


class AttnkitError(Exception):
    """Base of all attnkit errors.

    Attributes: ``code`` (such as ``"AK201"``), ``what`` went wrong, ``where`` (argument, op, line of text or
    the user's file and line), what was ``given``, what is ``allowed``, and a ``hint``. Empty strings mean
    that there is nothing to say.
    """

    def __init__(
        self, code: str, what: str = "", where: str = "", given: str = "", allowed: str = "", hint: str = ""
    ) -> None:
        self.code = code
        self.what = what
        self.where = where
        self.given = given
        self.allowed = allowed
        self.hint = hint

    def __str__(self) -> str:
        details = [
            ("where", self.where),
            ("given", self.given),
            ("allowed", self.allowed),
            ("hint", self.hint),
        ]
        return "\n".join([f"{self.code}: {self.what}"] + [f"  {k}: {v}" for k, v in details if v])


class AttnkitValueError(AttnkitError, ValueError):
    """A value that attnkit cannot accept."""


class AttnkitTypeError(AttnkitError, TypeError):
    """An object or dtype of the wrong kind."""


class AttnkitNotImplementedError(AttnkitError, NotImplementedError):
    """Something meaningful that this build, backend or version cannot do."""


class Code(NamedTuple):
    """One row of `CODES`: the class raised, a one-line summary, and the hint given when no better one is."""

    error: type[AttnkitError]
    summary: str
    hint: str = ""


_VALUE, _TYPE, _MISSING = AttnkitValueError, AttnkitTypeError, AttnkitNotImplementedError

CODES: dict[str, Code] = {
    # text form
    "AK101": Code(_VALUE, "program text is too long", "a program is at most 256 KiB of text"),
    "AK102": Code(_VALUE, "unexpected character in program text", "program text is plain ASCII"),
    "AK103": Code(_VALUE, "syntax error in program text"),
    "AK104": Code(_VALUE, "expression is nested too deeply", "name a part of it: t0 = ..."),
    "AK105": Code(_VALUE, "unsupported version of the text form", "the first line is: attnkit 1"),
    "AK106": Code(_VALUE, "too many buffers or params", "pack several small tensors into one"),
    "AK107": Code(_VALUE, "number does not fit", "integers are 64-bit; write inf for infinity"),
    "AK108": Code(_VALUE, "unknown name"),
    "AK109": Code(_VALUE, "name is already taken or reserved", "choose another name"),
    "AK110": Code(_VALUE, "comparisons do not chain", "write (a < b) & (b < c)"),
    # program
    "AK201": Code(_TYPE, "operand has the wrong type"),
    "AK202": Code(_VALUE, "unknown operator or wrong number of operands"),
    "AK203": Code(_TYPE, "score is not a float", "write float(...) around it"),
    "AK204": Code(_TYPE, "mask is not a bool", "compare with something: ... != 0"),
    "AK205": Code(_VALUE, "mask reads s", "put what depends on s into the score: where(cond, s, -inf)"),
    "AK206": Code(_VALUE, "index of a buffer, param or value is out of range"),
    "AK207": Code(_VALUE, "load does not match its buffer", "give one int index per dimension"),
    "AK208": Code(_TYPE, "index of a load is not an int", "write int(...) around it"),
    "AK209": Code(_VALUE, "sink buffer has the wrong type", "a sink is f32[1], one logit per query head"),
    "AK210": Code(_VALUE, "lengths buffer has the wrong type", "lengths are i32[1]"),
    "AK211": Code(_VALUE, "layouts of q, k and v do not go together"),
    "AK212": Code(_VALUE, "scale is not finite and positive", "leave it out for head_dim ** -0.5"),
    "AK213": Code(_VALUE, "integer constant does not fit 32 bits", "write it as a float"),
    "AK214": Code(_VALUE, "return lists the wrong values", "return results, each once: return o, lse"),
    "AK215": Code(_VALUE, "program is too large", "move constants into a captured tensor"),
    "AK216": Code(_VALUE, "program has the wrong shape", "inputs, operations, and one return at the end"),
    "AK217": Code(_VALUE, "operation has the wrong operands"),
    "AK218": Code(_VALUE, "keyword of an operation has a value that is not allowed"),
    "AK219": Code(_VALUE, "tokens of different sequences or pools do not go together"),
    "AK220": Code(_VALUE, "recurrence cannot combine these", "a state knows sums alone: use attend"),
    "AK221": Code(
        _VALUE, "output does not exist here", "lse and what rests on it belong to softmax over a whole row"
    ),
    "AK222": Code(_VALUE, "sink would be added more than once", "give the sink to one part of a merge"),
    "AK223": Code(_VALUE, "carried sum is used wrongly", "carry = ... in the body, and f in the score"),
    "AK224": Code(_VALUE, "variable has no meaning here"),
    "AK225": Code(_VALUE, "codec is not one of those that exist"),
    "AK226": Code(_VALUE, "normalizer does not allow this"),
    "AK227": Code(
        _VALUE,
        "o and lse of a merge are not of one attention",
        "pair each o with the lse of the attend or merge that gave it; only softmax and signed_softmax have one",
    ),
    # tracing
    "AK301": Code(
        _TYPE,
        "Python needs the value of a traced number, and it has none yet",
        "use torch.where(cond, a, b) for if, and & | ~ for and, or, not",
    ),
    "AK302": Code(
        _MISSING,
        "torch function or method is not supported in score and mask",
        "write it with the operators of docs/ir.md, or compute a table of it outside and index that: table[kv_idx]",
    ),
    "AK303": Code(
        _TYPE, "captured tensor has an unsupported dtype", "convert it once, outside: x.float(), x.int()"
    ),
    "AK304": Code(_VALUE, "captured tensor is indexed in an unsupported way", "give one index per dimension"),
    "AK305": Code(_TYPE, "score or mask returned something that is not a traced number"),
    "AK306": Code(_TYPE, "operand cannot be traced", "use numbers, captured tensors and ak.param"),
    "AK308": Code(
        _TYPE,
        "a score or mask function writes where it must not",
        "traced numbers may be written to by their own kind; captured tensors are read only",
    ),
    "AK309": Code(
        _VALUE,
        "a row of a captured tensor cannot be unrolled",
        "index all but one dimension; compute long rows outside, and load the result",
    ),
    # arguments
    "AK401": Code(_VALUE, "argument has a value that is not allowed"),
    "AK402": Code(_TYPE, "argument has the wrong type"),
    "AK403": Code(_VALUE, "argument has the wrong shape"),
    "AK404": Code(_TYPE, "argument has the wrong dtype"),
    "AK405": Code(_VALUE, "arguments live on different devices"),
    "AK406": Code(
        _TYPE,
        "window is a pair (left, right) of inclusive distances",
        "libraries disagree by one about a bare int: the last n tokens are window=(n - 1, 0)",
    ),
    "AK407": Code(_VALUE, "head counts do not go together", "q heads are a multiple of k and v heads"),
    "AK408": Code(_VALUE, "arguments exclude each other"),
    "AK409": Code(_VALUE, "block mask was built for other lengths", "build it for the lengths of this call"),
    "AK410": Code(_VALUE, "block mask was built for another batch size or number of heads"),
    "AK411": Code(_VALUE, "block structure is not valid"),
    "AK414": Code(_VALUE, "parents do not make a tree", "each node names its parent, roots name -1"),
    "AK416": Code(
        _TYPE,
        "a model computes with its attention mask, which attnkit keeps as a function",
        'load the model with attn_implementation="sdpa" and call it inside attnkit.installed()',
    ),
    # capability
    "AK501": Code(_MISSING, "backend is not available here", "`attnkit doctor` says what there is"),
    "AK502": Code(_MISSING, "no backend supports this problem", "ak.explain says what each backend lacks"),
    "AK503": Code(_MISSING, "gradients are not supported here", "call it under torch.no_grad()"),
    "AK504": Code(_MISSING, "not supported yet"),
    "AK505": Code(
        _MISSING, "kernels compute wrong numbers on this device", "use another backend; please report it"
    ),
    "AK506": Code(
        _MISSING,
        "kernels have not been checked on this device",
        "make the same call once, outside of the capture",
    ),
    # run time
    "AK601": Code(
        _VALUE,
        "load reads outside its buffer",
        "clamp the index, min(max(i, 0), n - 1): one below zero does not count from the end",
    ),
    "AK602": Code(_VALUE, "lengths or pages are not valid"),
    "AK603": Code(_VALUE, "kernel ran out of memory"),
    "AK604": Code(
        _VALUE, "integer of a score or mask may leave 32 bits", "compute it in float, or bound it first"
    ),
    "AK605": Code(_VALUE, "integer divisor may be zero", "bound it away from zero: max(n, 1)"),
    "AK606": Code(
        _VALUE, "tensor has elements but no memory", "a wrapper of another library: unwrap it first"
    ),
    "AK607": Code(_VALUE, "tensor's address is not a multiple of its element size", "copy it: x = x.clone()"),
    "AK608": Code(_VALUE, "lists of groups are not valid", "see ak.groups"),
}


def error(
    code: str, *, what: str = "", where: str = "", given: str = "", allowed: str = "", hint: str = ""
) -> AttnkitError:
    """The exception for ``code``, to be raised: ``raise error("AK201", what=..., given=...)``.

    ``what`` and ``hint`` default to those of the code's row in `CODES`.
    """
    row = CODES[code]
    return row.error(code, what or row.summary, where, given, allowed, hint or row.hint)


def no_page(row: int, column: int, given: int, pages: int) -> AttnkitError:
    """AK602 for a token of a paged cache that the page table gives no page: the entry, and how many pages there are."""
    return error(
        "AK602",
        what="the page table names no page for a token that exists",
        where=f"page_table[{row}, {column}]",
        given=str(given),
        allowed=f"0..{pages - 1}",
    )
