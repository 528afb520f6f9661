"""Expressions: interning, typed builders, and long chains without recursion."""

import gc
import math
import threading
from typing import Any

import pytest

from attnkit.errors import AttnkitTypeError, AttnkitValueError
from attnkit.ir import expr as ex
from attnkit.ir.expr import const, load, make, param, topological, var


def test_equal_expressions_are_one_object() -> None:
    def build() -> Any:
        return make("add", make("mul", var("s"), const(2.0)), load(0, var("h")))

    assert build() is build()
    assert make("add", var("s"), param(0)) is not make("add", param(0), var("s"))


def test_constants_are_told_apart_by_type_and_bits() -> None:
    values = [const(1), const(1.0), const(True), const(0.0), const(-0.0), const(0), const(math.inf)]
    assert len(set(values)) == len(values)
    assert const(math.nan) is const(-math.nan)


def test_implicit_casts() -> None:
    assert make("add", var("s"), const(2)) is make("add", var("s"), const(2.0))
    product = make("mul", var("s"), var("h"))
    assert product.dtype == "float"
    assert product.args[1] is make("float", var("h"))
    assert make("float", var("s")) is var("s")
    assert make("int", var("h")) is var("h")
    assert make("add", const(True), const(True)) is make("add", const(1), const(1))
    assert make("div", var("h"), var("b")).dtype == "float"


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: make("frobnicate", var("s")), "AK202"),
        (lambda: make("exp", var("s"), var("s")), "AK202"),
        (lambda: make("and", var("s"), const(True)), "AK201"),
        (lambda: make("where", var("h"), var("s"), var("s")), "AK201"),
        (lambda: var("nobody"), "AK108"),
        (lambda: const(2**63), "AK107"),
        (lambda: const("3"), "AK202"),
    ],
)
def test_builders_refuse(build: Any, code: str) -> None:
    with pytest.raises((AttnkitTypeError, AttnkitValueError)) as caught:
        build()
    assert caught.value.code == code


def test_topological_puts_operands_first_and_each_node_once() -> None:
    shared = make("mul", var("s"), var("s"))
    root = make("add", shared, make("exp", shared))
    order = topological([root, shared])
    assert len(order) == len(set(order)) == 4
    position = {node: i for i, node in enumerate(order)}
    assert all(position[arg] < position[node] for node in order for arg in node.args)


def test_long_chains_do_not_recurse_and_are_freed() -> None:
    before = len(ex._interned)
    node = var("s")
    for _ in range(20_000):
        node = make("neg", node)
    assert len(topological([node])) == 20_001
    del node
    gc.collect()
    assert len(ex._interned) <= before + 1


def test_interning_holds_across_threads() -> None:
    def build() -> None:
        node = var("s")
        for i in range(300):
            node = make("add", node, const(float(i)))
        results.append(node)

    results: list[ex.Expr] = []
    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1


def test_repr_is_readable() -> None:
    assert repr(make("add", var("s"), const(1.0))) == "<float s + 1.0>"
