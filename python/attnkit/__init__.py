"""attnkit: say which attention you want once; run it as a fast kernel on what you have.

Importing this package is cheap: it imports no torch, triton, cupy or numpy. A public name is imported from its
home when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnkit._version import __version__

if TYPE_CHECKING:  # for type checkers and editors; a test keeps it in step with _HOMES
    from attnkit.errors import (
        AttnkitError as AttnkitError,
        AttnkitNotImplementedError as AttnkitNotImplementedError,
        AttnkitTypeError as AttnkitTypeError,
        AttnkitValueError as AttnkitValueError,
    )
    from attnkit.ir import (
        alibi as alibi,
        bias as bias,
        causal as causal,
        document as document,
        parse as parse,
        prefix as prefix,
        selective as selective,
        sigmoid as sigmoid,
        signed_softmax as signed_softmax,
        softcap as softcap,
        softmax as softmax,
        softmax_over_queries as softmax_over_queries,
        window as window,
    )
    from attnkit.ops import (
        BlockMask as BlockMask,
        KVCache as KVCache,
        SpargeThresholds as SpargeThresholds,
        aaren_attention as aaren_attention,
        additive_attention as additive_attention,
        as_block_mask as as_block_mask,
        attention as attention,
        block_mask as block_mask,
        block_sparse_attention as block_sparse_attention,
        dense_attention as dense_attention,
        explain as explain,
        factorizable_attention as factorizable_attention,
        flex_attention as flex_attention,
        groups as groups,
        install as install,
        installed as installed,
        installed_report as installed_report,
        linear_attention as linear_attention,
        merge as merge,
        param as param,
        quantized_kv_attention as quantized_kv_attention,
        readout as readout,
        routing as routing,
        routing_attention as routing_attention,
        scaled_dot_product_attention as scaled_dot_product_attention,
        selective_attention as selective_attention,
        selective_memory as selective_memory,
        sparge as sparge,
        sparge_attention as sparge_attention,
        top_k_blocks as top_k_blocks,
        trace as trace,
        tree as tree,
        tune_sparge as tune_sparge,
        uninstall as uninstall,
        window_bias as window_bias,
    )

_NAMES = {
    "attnkit.errors": "AttnkitError AttnkitNotImplementedError AttnkitTypeError AttnkitValueError",
    "attnkit.ir": """
        alibi bias causal document parse prefix selective sigmoid signed_softmax softcap softmax
        softmax_over_queries window
    """,
    "attnkit.ops": """
        BlockMask KVCache SpargeThresholds aaren_attention additive_attention as_block_mask attention
        block_mask block_sparse_attention dense_attention explain factorizable_attention flex_attention
        groups install installed installed_report linear_attention merge param quantized_kv_attention readout routing
        routing_attention scaled_dot_product_attention selective_attention selective_memory sparge
        sparge_attention top_k_blocks trace tree tune_sparge uninstall window_bias
    """,
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 -- the keys are the public names


def __getattr__(name: str) -> Any:
    """Import a public name from its home and keep it.

    Raises:
        AttributeError: there is no such public name.
        ModuleNotFoundError: the name needs PyTorch, which is not installed.
        AttnkitNotImplementedError: AK501, it needs PyTorch, and the one that is installed does not work.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'attnkit' has no attribute {name!r}")
    try:
        value = getattr(import_module(home), name)
    except Exception as exc:
        if home != "attnkit.ops":
            raise
        if isinstance(exc, ModuleNotFoundError) and exc.name == "torch":
            hint = f"attnkit.{name} needs PyTorch, which is not installed: pip install 'attnkit[torch]'"
            raise ModuleNotFoundError(hint, name="torch") from exc
        from attnkit.errors import error

        what, given = "PyTorch does not work here", f"{type(exc).__name__}: {exc}"
        raise error(
            "AK501", where=f"attnkit.{name}", what=what, given=given, hint="see `attnkit doctor`"
        ) from exc
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
