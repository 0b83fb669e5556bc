"""Typed functions over `torch.ops.vista.*`: one file per op, holding its docstring, fake kernel and autograd."""

from vista_ext.ops.cache_rows import cache_gather, cache_scatter_, dequantize_rows, quantize_rows
from vista_ext.ops.cached_cross_attn import cached_cross_attn
from vista_ext.ops.cross_attn import jagged_cross_attn
from vista_ext.ops.linear import linear
from vista_ext.ops.linear_silu import linear_silu
from vista_ext.ops.projected_qla import projected_qla_apply, projected_qla_state
from vista_ext.ops.qla import mean_scale, qla, qla_apply, qla_state
from vista_ext.ops.rms_norm import rms_norm
from vista_ext.ops.sglu import gated_products, sglu, sglu_has_kernel

__all__ = [
    "cache_gather",
    "cache_scatter_",
    "cached_cross_attn",
    "dequantize_rows",
    "gated_products",
    "jagged_cross_attn",
    "linear",
    "linear_silu",
    "mean_scale",
    "projected_qla_apply",
    "projected_qla_state",
    "qla",
    "qla_apply",
    "qla_state",
    "quantize_rows",
    "rms_norm",
    "sglu",
    "sglu_has_kernel",
]
