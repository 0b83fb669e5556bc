"""Naive formulas of the ops, in plain torch: any float dtype, differentiable, written to be read."""

from vista_ext.reference.cross_attn import cached_cross_attn, cross_attn_by_mask, cross_attn_by_rows
from vista_ext.reference.qla import qla_by_rows, qla_by_state

__all__ = ["cached_cross_attn", "cross_attn_by_mask", "cross_attn_by_rows", "qla_by_rows", "qla_by_state"]
