"""The CPU engine's face (csrc/bind/module.cc)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = Sequence[int]
# A tensor on the CPU of a library that speaks DLPack's C exchange API, or (address, dtype number of csrc/cpu/problem.h,
# sizes, strides in elements).
Tensor = Any

compiler: str
kernels: str

class Program:
    """A verified tile-bytecode program; the only thing the engine runs. ValueError says why code is refused."""

    def __init__(
        self, code: npt.NDArray[np.int32], score: int, mask: int, num_buffers: int, num_params: int
    ) -> None: ...
    @property
    def num_instructions(self) -> int: ...
    @property
    def ranks(self) -> list[int]: ...

def opcodes() -> dict[str, int]: ...
def attend(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
    sink: Tensor | None,
    sequences: Sequence[tuple[int, int, int, int, int]] | None,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    dropout: tuple[int, int, float] | None,
    threads: int,
    tile_q: int,
    tile_kv: int,
    split_kv: int,
    page_table: Tensor | None = None,
    encoding: tuple[int, int, bool] | None = None,
    skip: float = 0.0,
    /,
) -> tuple[int, int]: ...
def readout(
    program: Program,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    sequences: Sequence[tuple[int, int, int, int, int]] | None,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    results: Sequence[Tensor | None],
    threads: int,
    tile_kv: int,
    page_table: Tensor | None,
    /,
) -> tuple[int, int]: ...

class Launch:
    """`attend` of a program that needs nothing but tensors."""

    def __init__(self, program: Program, scale: float, tile_q: int, tile_kv: int, split_kv: int) -> None: ...
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, threads: int, /
    ) -> tuple[int, int]: ...

class LaunchBackward:
    """`attend_backward` of a program that needs nothing but tensors."""

    def __init__(self, program: Program, scale: float, tile_q: int, tile_kv: int) -> None: ...
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None,
        dq: Tensor, dk: Tensor, dv: Tensor, threads: int, /,
    ) -> tuple[int, int]: ...  # fmt: skip

class Seen:
    """What is kept for a text and three tensors of the CPU, by their shapes and dtypes. Tensors are of the two types given."""

    def __init__(self, tensor: type, parameter: type, most: int) -> None: ...
    def find(self, text: str, q: Any, k: Any, v: Any, /, *others: Any) -> Any: ...
    def keep(self, text: str, q: Any, k: Any, v: Any, what: Any, /) -> None: ...
    def plain(self, tensors: tuple[Any, ...], /) -> bool: ...

_Sequences = Sequence[tuple[int, int, int, int, int]] | None
_Carry = tuple[int, int, Tensor, Tensor | None]

of_carry: int

def attend_carried(
    program: Program,
    carry: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
    sink: Tensor | None,
    sequences: _Sequences,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    what: _Carry,
    threads: int,
    tile_q: int,
    tile_kv: int,
    split_kv: int,
    page_table: Tensor | None,
    /,
) -> tuple[int, int]: ...
def attend_carried_backward(
    program: Program,
    carry: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    sequences: _Sequences,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    what: _Carry,
    d_o: Tensor,
    d_lse: Tensor | None,
    d_carry: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_initial: Tensor | None,
    threads: int,
    tile_q: int,
    tile_kv: int,
    /,
) -> tuple[int, int]: ...

_Others = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Form = tuple[int, int, float, bool, bool, float, int, list[float]]

def select(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    form: tuple[int, int, float, bool, float | None, int, float, bool, bool],
    mask: Program | None,
    force: Program | None,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    threads: int,
) -> tuple[int, int]: ...
def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    others: _Others,
    state: Tensor,
    norm: Tensor | None,
    sequences: Sequence[tuple[int, int, int]] | None,
    form: _Form,
    threads: int,
    /,
) -> tuple[int, int]: ...
def recur_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    others: _Others,
    state: Tensor,
    norm: Tensor | None,
    sequences: Sequence[tuple[int, int, int]] | None,
    form: _Form,
    d_o: Tensor,
    d_state: Tensor | None,
    d_norm: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    gradients: _Others,
    threads: int,
    /,
) -> tuple[int, int]: ...
def look_at_lists(lists: Tensor, tokens: int, /) -> tuple[bool, bool, bool]: ...
def attend_groups(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
    queries: Tensor,
    keys: Tensor,
    q_rows: bool,
    mean: bool,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    threads: int,
    tile_q: int,
    tile_kv: int,
    split_kv: int,
    /,
) -> tuple[int, int]: ...
def attend_groups_backward(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
    queries: Tensor,
    keys: Tensor,
    q_rows: bool,
    kv_rows: bool,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    d_o: Tensor,
    d_lse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_buffers: Sequence[Tensor | None],
    threads: int,
    tile_q: int,
    tile_kv: int,
    /,
) -> tuple[int, int]: ...
def sum_rows(
    rows: Tensor, lists: Tensor, to: Tensor, mean: bool, lse: Tensor | None, threads: int, /
) -> None: ...
def route(x: Tensor, centroids: Tensor, norm: int, lists: Tensor, threads: int, /) -> int: ...
def route_prefix(
    q: Tensor,
    k: Tensor,
    centroids: Tensor,
    norm: int,
    w: int,
    block: int,
    queries: Tensor,
    keys: Tensor,
    threads: int,
    /,
) -> int: ...
def block_runs(
    program: Program,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    /,
) -> tuple[int, int, int, int, npt.NDArray[np.int64], npt.NDArray[np.int32]]: ...
def gathered_tiles(
    program: Program,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    tile_q: int,
    tile_kv: int,
    buffers: Sequence[Tensor],
    params: Sequence[float],
    /,
) -> tuple[int, int] | None: ...
def evaluate(opcode: str, args: Sequence[npt.NDArray[np.float32]], /) -> npt.NDArray[np.float32]: ...
def isa_levels() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def most_tokens(head_dim: int, by_channel: bool, polynomial: bool, /) -> int: ...
def last_isa() -> str: ...
def set_poison(on: bool, /) -> None: ...
def cores() -> int: ...
def fma_gflops(threads: int, rounds: int = ...) -> float: ...
def bf16_gflops(threads: int, rounds: int = ...) -> float | None: ...
def read_gbytes_per_s(threads: int, memory: npt.NDArray[np.float32]) -> float: ...
