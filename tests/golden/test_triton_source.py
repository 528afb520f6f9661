"""Four kernels as they are printed, for a person to read. `python tests/golden/test_triton_source.py` writes them anew."""

from pathlib import Path

import pytest

from attnkit.backends.triton import check
from attnkit.backends.triton.check import Case
from attnkit.backends.triton.pairs import Pairs

FOLDER = Path(__file__).parent / "triton"
GOLDEN = {
    "forward_softcap": Case("forward", "softcap", "bfloat16", 128, 128, 90),
    "decode_packed": Case("decode", "packed", "bfloat16", 128, 128, 90),
    "dkv_alibi": Case("dkv", "alibi", "bfloat16", 128, 128, 90),
    "blocks_document": Case("blocks", "document", "bfloat16", 128, 128, 90),
}


def source(case: Case) -> str:
    kernel = check.kernel_of(case)
    return check.KERNELS[case.kernel](kernel, Pairs(kernel.program))[1]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    assert source(GOLDEN[name]) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", list(check.cases((90,))), ids=str)
def test_what_is_printed_is_readable(case: Case) -> None:
    """Lines of a width that one can read, names of our own, and no hole left."""
    text = source(case)
    compile(text, case.kernel, "exec")
    assert max(map(len, text.splitlines())) <= 130
    assert "$" not in text
    assert "#if" not in text
    assert "#end" not in text


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, case in GOLDEN.items():
        (FOLDER / f"{name}.txt").write_text(source(case), encoding="utf-8")
