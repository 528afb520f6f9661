"""attnkit for PyTorch: functions, ops, and the drop-in for torch's own attention."""

from attnkit.ops import batching as batching  # the ops' rules under torch.vmap
from attnkit.ops.block_choice import top_k_blocks
from attnkit.ops.block_masks import BlockMask, as_block_mask, block_mask
from attnkit.ops.block_sparse import block_sparse_attention
from attnkit.ops.dense import dense_attention, quantized_kv_attention
from attnkit.ops.drop_in import InstalledReport, install, installed, installed_report, uninstall
from attnkit.ops.factorizable import factorizable_attention
from attnkit.ops.flex import flex_attention
from attnkit.ops.functional import attention, trace
from attnkit.ops.kv_cache import KVCache
from attnkit.ops.linear import linear_attention
from attnkit.ops.merging import merge
from attnkit.ops.readouts import Readout, TopK, readout
from attnkit.ops.report import Report, explain
from attnkit.ops.routed import groups, routing, routing_attention, window_bias
from attnkit.ops.scan import aaren_attention, additive_attention
from attnkit.ops.sdpa import scaled_dot_product_attention
from attnkit.ops.selective import selective_attention, selective_memory
from attnkit.ops.sparge_family import sparge, sparge_attention
from attnkit.ops.sparge_search import SpargeThresholds, tune_sparge
from attnkit.ops.tracing import param
from attnkit.ops.trees import tree

__all__ = [
    "BlockMask",
    "InstalledReport",
    "KVCache",
    "Readout",
    "Report",
    "SpargeThresholds",
    "TopK",
    "aaren_attention",
    "additive_attention",
    "as_block_mask",
    "attention",
    "block_mask",
    "block_sparse_attention",
    "dense_attention",
    "explain",
    "factorizable_attention",
    "flex_attention",
    "groups",
    "install",
    "installed",
    "installed_report",
    "linear_attention",
    "merge",
    "param",
    "quantized_kv_attention",
    "readout",
    "routing",
    "routing_attention",
    "scaled_dot_product_attention",
    "selective_attention",
    "selective_memory",
    "sparge",
    "sparge_attention",
    "top_k_blocks",
    "trace",
    "tree",
    "tune_sparge",
    "uninstall",
    "window_bias",
]
