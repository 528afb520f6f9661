"""Triton as a backend: a program becomes the text of a kernel, which Triton compiles for the GPU at hand."""

from __future__ import annotations

import importlib.util
from itertools import cycle
from pathlib import Path

from attnkit.backends import Kernel, refused
from attnkit.backends.triton import launch
from attnkit.backends.triton.admission import admitted
from attnkit.backends.triton.kernel import TritonKernel
from attnkit.backends.triton.schedule import SCHEDULES, schedule, with_room
from attnkit.backends.triton.words import BITS, STRETCH
from attnkit.ir.program import Codec
from attnkit.plan.normalizers import is_unnormalized
from attnkit.plan.ranges import stretch
from attnkit.plan.space import Config, Direction, Field, FieldKind, Space
from attnkit.plan.spec import KernelSpec

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEVICES = (
    "/dev/nvidiactl",
    "/dev/dxg",
)  # asked of the file system: a driver that was started would not survive a fork
_CODECS = (Codec("int8", "token", 0), Codec("fp8", "head", 0))
_LAYOUTS = ("bhsd", "packed", "padded", "paged")
_FIELDS: dict[str, tuple[FieldKind, tuple[int, ...]]] = {
    "tile_q": ("schedule", (16, 32, 64, 128)), "tile_kv": ("numeric", (16, 32, 64, 128)), "warps": ("schedule", (1, 2, 4, 8)),
    "stages": ("schedule", (1, 2, 3, 4)),
}  # fmt: skip
_ARCH = 90  # whose numbers are the defaults until a device is known


class TritonBackend:
    """See `attnkit.backends.Backend`."""

    name = "triton"

    def available(self) -> str | None:
        """None if Triton is installed and the machine has an NVIDIA GPU. Imports neither Triton nor a driver."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install attnkit[triton])"
        if not any(Path(device).exists() for device in _DEVICES):
            return "there is no NVIDIA GPU here"
        return None

    def supports(self, spec: KernelSpec) -> tuple[str, ...]:
        """Float32, bfloat16 and float16 tensors on an NVIDIA GPU; heads of 1 to 256 channels."""
        of_program = () if is_unnormalized(spec.program) else None
        reasons = refused(
            spec, device="cuda", dtypes=_DTYPES, channels=256, where="an NVIDIA GPU", of_program=of_program
        )
        inputs = spec.program.inputs
        if any(layout.kind not in _LAYOUTS for layout in inputs):
            reasons += (f"an input is laid out otherwise than {', '.join(_LAYOUTS)}",)
        q, *kv = (layout.codec for layout in inputs)
        known = all(
            codec in (None, *_CODECS) or _is_of_words(codec, axis)
            for codec, axis in zip(kv, cycle(("channel", "token")), strict=False)
        )
        if q is not None or not known:
            reasons += ("an input is quantised otherwise than k or v of a cache",)
        if any(codec and codec.name in BITS for codec in kv) and inputs[1].kind not in ("padded", "paged"):
            reasons += ("int4 and int2 without lengths",)
        return reasons

    def space(self, spec: KernelSpec) -> Space:
        """Tiles, warps and stages of each kernel, for the device at hand."""
        return space(spec, _ARCH if self.available() else launch.architecture())

    def build(self, spec: KernelSpec, config: Config) -> Kernel:
        """The kernels of a program, printed and compiled at the first call of each kind, then asked for right numbers."""
        return TritonKernel(spec, config, None if launch.interpreted() else admitted)


def _is_of_words(codec: Codec, axis: str) -> bool:
    return codec.name in BITS and codec.axis == axis and codec.group > 0 and codec.group % STRETCH == 0


def space(spec: KernelSpec, arch: int) -> Space:
    """The fields of an architecture, with the defaults that were found by compiling for it."""
    size, width = _DTYPES.get(spec.dtype, 4), max(spec.head_dim, spec.v_head_dim)
    fields: Space = {}
    attend = spec.program.attend
    dropout, lists = attend.dropout is not None, stretch(attend.mask, "kv_idx") is None
    codecs = {codec.name for layout in spec.program.inputs if (codec := layout.codec)}
    wide, words = min(codecs, default="") if width > 128 else "", size == 2 and not codecs.isdisjoint(BITS)
    for kind, table in SCHEDULES.items():
        rows = schedule(table, arch, size, width)
        direction: Direction = "forward" if kind in ("", "decode_") else "backward"
        found = with_room(rows, kind, arch, dropout=dropout, lists=lists, wide_codes=wide, words=words)
        for name, default in found._asdict().items():
            fields[kind + name] = Field(_FIELDS[name][0], default, _FIELDS[name][1], direction)
    fields["split_kv"] = Field("numeric", 512, (256, 512, 1024, 2048))
    return fields


backend = TritonBackend()
