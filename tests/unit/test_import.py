"""`import attnkit` is light, works without the optional packages, and resolves every public name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnkit

HEAVY = ("torch", "triton", "cupy", "numpy", "transformers", "diffusers", "matplotlib", "click", "rich")
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_without(hidden: tuple[str, ...], code: str) -> str:
    return run(HIDE.format(hidden=set(hidden)) + code)


def test_import_is_light() -> None:
    code = f"import sys, attnkit; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import attnkit; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) <= 0.150


def test_core_works_without_optional_packages() -> None:
    code = """
import attnkit, attnkit.analysis, attnkit.backends.reference
program = attnkit.parse('''attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) buffers() params() {
  o, lse = attend(q, k, v, scale = default) {
    normalizer = softmax
  }
  return o, lse
}
''')
print(type(attnkit.causal()).__name__, type(program).__name__)
"""
    assert run_without(("torch", "triton", "cupy", "transformers", "click", "rich", "matplotlib"), code)


def test_torch_names_without_torch_say_what_to_install() -> None:
    code = """
import attnkit
try:
    attnkit.attention
except ModuleNotFoundError as exc:
    print(exc.name, "attnkit[torch]" in str(exc))
"""
    assert run_without(("torch",), code).split() == ["torch", "True"]


def test_public_names_resolve() -> None:
    assert sorted(set(attnkit.__all__)) == sorted(attnkit.__all__)
    assert dir(attnkit) == sorted(attnkit.__all__)
    for name in attnkit.__all__:
        assert getattr(attnkit, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = attnkit.no_such_name


def test_typed_names_are_the_lazy_names() -> None:
    tree = ast.parse(Path(attnkit.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == attnkit._HOMES


def test_attention_adds_little_to_torch() -> None:
    """Nothing that only a compiler or a configuration file needs: sympy alone takes as long as all of attnkit."""
    code = """
import sys, torch
before = set(sys.modules)
import attnkit
attnkit.attention
print({name.partition(".")[0] for name in set(sys.modules) - before} - {"attnkit", "numpy"})
"""
    assert run(code).strip() == "set()"


def test_installing_brings_no_compiler() -> None:
    """Which takes seconds; where there is none, no compiled graph has to be forgotten."""
    code = """
import sys, torch, attnkit
q = torch.randn(1, 2, 8, 16)
with attnkit.installed():
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
print("torch._dynamo" in sys.modules, attnkit.installed_report().attnkit)
"""
    assert run(code).split() == ["False", "1"]
