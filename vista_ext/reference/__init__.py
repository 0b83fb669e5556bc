"""Naive formulas of the ops, in plain torch: any float dtype, differentiable, written to be read."""

from vista_ext.reference.cross_attn import cached_cross_attn, cross_attn_by_mask, cross_attn_by_rows
from vista_ext.reference.linear_silu import linear_silu
from vista_ext.reference.projected_qla import projected_qla_apply, projected_qla_state
from vista_ext.reference.qla import qla_by_rows, qla_by_state
from vista_ext.reference.sglu import sglu_by_columns, sglu_by_products

__all__ = [
    "cached_cross_attn",
    "cross_attn_by_mask",
    "cross_attn_by_rows",
    "linear_silu",
    "projected_qla_apply",
    "projected_qla_state",
    "qla_by_rows",
    "qla_by_state",
    "sglu_by_columns",
    "sglu_by_products",
]
