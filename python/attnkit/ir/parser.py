"""The parser of the text form: one regular expression, then recursive descent with a depth limit.

It only builds: whether the program is legal is for `ir.verify` to say. Time is linear in the text, and nothing
in the text is ever evaluated as Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from attnkit.errors import AttnkitError, error
from attnkit.ir.expr import Expr, const, load, make, param, var
from attnkit.ir.optable import CALLS, COMPARISON, INFIX, PREFIXES, VARIABLES
from attnkit.ir.program import (
    CODECS,
    ELEMENT,
    LAYOUT_BUFFERS,
    NORMALIZERS,
    OPERATIONS,
    Buffer,
    BufferDType,
    Codec,
    Layout,
    LayoutKind,
    Normalizer,
    Operation,
    Program,
    Return,
    attributes,
)

MAX_TEXT = 256 * 1024
MAX_NESTING = 64
MAX_SLOTS = 64  # buffers, and params

_TOKEN = re.compile(
    r"(?P<skip>\s+|\#[^\n]*)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<symbol><=|>=|==|!=|//|[-+*/%<>&|^~()\[\]{},:=])"
    r"|(?P<bad>.)",
    re.ASCII | re.DOTALL,
)
_CONSTANTS: dict[str, bool | float] = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}
_BODY = frozenset(
    f.name for op in OPERATIONS.values() for f in attributes(op) if f.metadata["kind"] in op.BODY
)
_RESERVED = frozenset([*VARIABLES, *CALLS, *_CONSTANTS, *_BODY])

_T = TypeVar("_T")


class _Token(NamedTuple):
    kind: str
    text: str
    offset: int


class Parser:
    """One pass over one text; `program` gives the result."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise error("AK402", where="text", given=type(text).__name__, allowed="a str")
        self._text = text
        if len(text) > MAX_TEXT:
            raise error(
                "AK101", where="text", given=f"{len(text)} characters", allowed=f"{MAX_TEXT} characters"
            )
        self._tokens = [
            _Token(match.lastgroup or "", match.group(), match.start())
            for match in _TOKEN.finditer(text)
            if match.lastgroup != "skip"
        ]
        self._tokens.append(_Token("end", "end of text", len(text)))
        self._position = 0
        self._depth = 0
        self._values: dict[str, int] = {}
        self._buffers: dict[str, tuple[int, Buffer]] = {}
        self._params: dict[str, Expr] = {}
        self._scalars: dict[str, Expr] = {}  # in a body: params and temporaries

    # --- tokens ---------------------------------------------------------------------------------------

    @property
    def _next(self) -> _Token:
        return self._tokens[self._position]

    def _fail(self, code: str, token: _Token, what: str = "", allowed: str = "", hint: str = "") -> NoReturn:
        if token.kind == "bad":
            code, what, allowed, hint = "AK102", "", "", ""
        line = self._text.count("\n", 0, token.offset) + 1
        column = token.offset - self._text.rfind("\n", 0, token.offset)
        where = f"line {line}, column {column}"
        raise error(code, what=what, where=where, given=token.text[:40], allowed=allowed, hint=hint)

    def _advance(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._position += 1
        return token

    def _accept(self, text: str) -> bool:
        if self._next.text != text or self._next.kind == "end":
            return False
        self._position += 1
        return True

    def _expect(self, *texts: str) -> str:
        """The next token's text, which must be one of ``texts``."""
        token = self._advance()
        if token.text not in texts or token.kind == "end":
            self._fail("AK103", token, allowed=" or ".join(texts))
        return token.text

    def _name(self, what: str) -> _Token:
        token = self._advance()
        if token.kind != "name":
            self._fail("AK103", token, allowed=what)
        return token

    def _list(self, item: Callable[[], _T], close: str) -> list[_T]:
        """Items separated by commas, up to the closing bracket."""
        items: list[_T] = []
        if not self._accept(close):
            items.append(item())
            while self._expect(",", close) == ",":
                items.append(item())
        return items

    def _number(self, negative: bool = False) -> int | float:
        token = self._advance()
        if token.text in ("inf", "nan"):
            value: int | float = float(token.text)
        elif token.kind != "number":
            self._fail("AK103", token, allowed="a number")
        elif len(token.text) > 400:  # an exact float may be long, but converting digits is not linear
            self._fail("AK107", token)
        else:
            value = int(token.text) if token.text.isdigit() else float(token.text)
            if value == math.inf:
                self._fail("AK107", token)
        value = -value if negative else value
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._fail("AK107", token)
        return value

    def _lookup(self, table: dict[str, _T], token: _Token, kind: str) -> _T:
        if token.text not in table:
            known = list(table)
            allowed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            self._fail("AK108", token, what=f"unknown {kind}", allowed=allowed)
        return table[token.text]

    def _define(self, table: dict[str, _T], token: _Token, value: _T) -> None:
        if token.text in table or (table is not self._values and self._taken(token.text)):
            self._fail("AK109", token)
        table[token.text] = value

    def _taken(self, name: str) -> bool:
        return name in _RESERVED or name in self._buffers or name in self._params or name in self._scalars

    # --- programs -------------------------------------------------------------------------------------

    def program(self) -> Program:
        """Parse the whole text."""
        self._expect("attnkit")
        version = self._advance()
        if version.text != "1":
            self._fail("AK105", version, allowed="1")
        self._expect("program")
        self._expect("(")
        inputs = self._list(self._input, ")")
        if self._accept("buffers"):
            self._expect("(")
            self._list(self._buffer, ")")
        if self._accept("params"):
            self._expect("(")
            self._list(self._param, ")")
        self._expect("{")
        ops: list[Operation] = []
        while not self._accept("}"):
            ops.append(self._return() if self._accept("return") else self._operation())
        if self._next.kind != "end":
            self._fail("AK103", self._next, allowed="end of text")
        layouts = tuple(self._layout(*parts) for parts in inputs)
        buffers = tuple(buffer for _, buffer in self._buffers.values())
        return Program(layouts, buffers, len(self._params), tuple(ops))

    def _input(self) -> tuple[_Token, list[_Token], Codec | None]:
        self._define(self._values, self._name("a name"), len(self._values))
        self._expect(":")
        kind = self._next
        self._expect(*LAYOUT_BUFFERS)
        names = []
        if self._accept("["):  # buffers are declared later: the names are looked up at the end
            names = self._list(lambda: self._name("the name of a buffer"), "]")
        return kind, names, self._codec() if self._next.text in CODECS else None

    def _layout(self, token: _Token, names: list[_Token], codec: Codec | None) -> Layout:
        kind: LayoutKind = token.text  # type: ignore[assignment]  # _input has checked it
        held = [self._lookup(self._buffers, name, "buffer")[0] for name in names]
        if len(held) > 2:
            self._fail("AK103", names[2], allowed="at most two buffers")
        return Layout(kind, held[-1] if held else None, held[0] if len(held) == 2 else None, codec)

    def _choice(self, table: dict[str, _T]) -> _T:
        return table[self._expect(*table)]

    def _buffer(self) -> None:
        token = self._name("a name")
        self._expect(":")
        dtypes: dict[str, BufferDType] = {name: name for name in ELEMENT}
        dtype = self._choice(dtypes)
        self._expect("[")
        rank = self._number()
        self._expect("]")
        if len(self._buffers) == MAX_SLOTS or not isinstance(rank, int):
            self._fail("AK106" if isinstance(rank, int) else "AK103", token, allowed=f"{MAX_SLOTS} buffers")
        self._define(self._buffers, token, (len(self._buffers), Buffer(dtype, rank)))

    def _param(self) -> None:
        token = self._name("a name")
        self._expect(":")
        self._expect("f32")
        if len(self._params) == MAX_SLOTS:
            self._fail("AK106", token, allowed=f"{MAX_SLOTS} params")
        self._define(self._params, token, param(len(self._params)))

    def _buffer_index(self, token: _Token) -> int:
        return self._lookup(self._buffers, token, "buffer")[0]

    def _read_value(self) -> int:
        return self._lookup(self._values, self._name("a value"), "value")

    def _return(self) -> Return:
        values = [self._read_value()]
        while self._accept(","):
            values.append(self._read_value())
        return Return(tuple(values))

    # --- operations -----------------------------------------------------------------------------------

    def _operation(self) -> Operation:
        results = [self._name("a result, return or }")]
        while self._accept(","):
            results.append(self._name("a result"))
        self._expect("=")
        operation = self._lookup(OPERATIONS, self._name("an operation"), "operation")
        kinds = {f.name: f.metadata for f in attributes(operation)}
        self._expect("(")
        operands: list[int] = []
        given: dict[str, Any] = {}
        self._scalars = dict(self._params)

        def argument() -> None:
            token = self._name("a value or a keyword")
            if not self._accept("="):
                if given:
                    self._fail("AK103", token, what="values come before keywords")
                operands.append(self._lookup(self._values, token, "value"))
                return
            written = {name: kind for name, kind in kinds.items() if kind["kind"] not in operation.BODY}
            kind = self._lookup(written, token, "keyword")
            if token.text in given:
                self._fail("AK109", token, what="given twice")
            given[token.text] = self._attribute(kind["kind"], kind["choices"])

        self._list(argument, ")")
        if any(kind["kind"] in operation.BODY for kind in kinds.values()) and self._accept("{"):
            given.update(self._body(operation))
        op = operation(tuple(operands), **given)
        if len(results) != len(op.results):
            allowed = f"{', '.join(op.results)} = {operation.NAME}(...)"
            self._fail("AK103", results[-1], what="wrong number of results", allowed=allowed)
        for token in results:
            self._define(self._values, token, len(self._values))
        return op

    def _attribute(self, kind: str, choices: tuple[str, ...]) -> Any:
        """The value of a keyword. Numbers stand for themselves, names are looked up."""
        if kind == "number":
            return self._expression()
        if kind == "scale" and self._accept("default"):
            return None
        if kind in ("scale", "float"):
            return self._signed()
        if kind == "bool":
            return self._choice({"true": True, "false": False})
        if kind == "word":
            return self._expect(*choices)
        if kind == "codec":
            return self._codec()
        if kind == "value":
            return self._read_value()
        if kind == "int":
            token = self._next
            value = self._number()
            if not isinstance(value, int):
                self._fail("AK103", token, allowed="an integer")
            return value
        item: dict[str, Callable[[], Any]] = {
            "floats": self._signed, "pair": self._read_value, "words": lambda: self._expect(*choices),
        }  # fmt: skip
        self._expect("(")
        return tuple(self._list(item[kind], ")"))

    def _signed(self) -> float:
        return float(self._number(negative=self._accept("-")))

    def _codec(self) -> Codec:
        name = self._expect(*CODECS)
        self._expect("(")
        axis = self._name("what shares a scale").text
        self._expect(",")
        group = self._attribute("int", ())
        self._expect(")")
        return Codec(name, axis, group)

    def _body(self, operation: type[Operation]) -> dict[str, Any]:
        roots = {
            f.name: f.metadata["kind"] for f in attributes(operation) if f.metadata["kind"] in operation.BODY
        }
        given: dict[str, Any] = {}
        while not self._accept("}"):
            token = self._name("a name or }")
            self._expect("=")
            if token.text in given:
                self._fail("AK109", token, what="defined twice")
            if token.text in roots:
                is_expr = roots[token.text] == "expr"
                given[token.text] = self._expression() if is_expr else self._normalizer()
            else:
                self._define(self._scalars, token, self._expression())
        return given

    def _normalizer(self) -> Normalizer:
        kind = self._expect(*NORMALIZERS)
        sink = epsilon = None
        if self._accept("("):
            if self._expect("sink", "epsilon") == "sink":
                self._expect("=")
                sink = self._buffer_index(self._name("the name of a buffer"))
            else:
                self._expect("=")
                epsilon = self._signed()
            self._expect(")")
        return Normalizer(kind, sink, epsilon)

    # --- expressions ----------------------------------------------------------------------------------

    def expression(self) -> Expr:
        """Parse the whole text as one expression."""
        node = self._expression()
        if self._next.kind != "end":
            self._fail("AK103", self._next, allowed="end of text")
        return node

    def _expression(self, binding: int = 0) -> Expr:
        """An expression of operators that bind tighter than ``binding``."""
        self._depth += 1
        if self._depth > MAX_NESTING:
            self._fail("AK104", self._next, allowed=f"{MAX_NESTING} levels")
        left = self._operand()
        while (info := INFIX.get(self._next.text)) is not None and info.precedence > binding:
            token = self._advance()
            left = self._make(token, info.name, left, self._expression(info.precedence))
            following = INFIX.get(self._next.text)
            if info.precedence == COMPARISON and following and following.precedence == COMPARISON:
                self._fail("AK110", self._next)
        self._depth -= 1
        return left

    def _operand(self) -> Expr:
        prefixes: list[_Token] = []
        while self._next.text in PREFIXES:
            prefixes.append(self._advance())
        if self._next.kind == "number" or self._next.text in ("inf", "nan"):
            negative = bool(prefixes) and prefixes[-1].text == "-"
            node = const(self._number(negative))
            prefixes = prefixes[:-1] if negative else prefixes
        else:
            node = self._atom()
        for token in reversed(prefixes):
            node = self._make(token, PREFIXES[token.text].name, node)
        return node

    def _atom(self) -> Expr:
        token = self._advance()
        if token.text == "(":
            node = self._expression()
            self._expect(")")
            return node
        if token.kind != "name" or token.text in _BODY:
            self._fail("AK103", token, allowed="an expression")
        if token.text in _CONSTANTS:
            return const(_CONSTANTS[token.text])
        if token.text in VARIABLES:
            return var(token.text)
        if token.text in CALLS:
            self._expect("(")
            return self._make(token, CALLS[token.text].name, *self._list(self._expression, ")"))
        if token.text in self._buffers:
            index, buffer = self._buffers[token.text]
            self._expect("[")
            return load(index, *self._list(self._expression, "]"), dtype=ELEMENT[buffer.dtype])
        return self._lookup(self._scalars, token, "name")

    def _make(self, token: _Token, op: str, *args: Expr) -> Expr:
        try:
            return make(op, *args)
        except AttnkitError as exc:
            self._fail(exc.code, token, what=f"{exc.what} ({exc.given})", allowed=exc.allowed, hint=exc.hint)
