"""Naive formulas of the ops, in plain torch: any float dtype, differentiable, written to be read."""

from vista_ext.reference.qla import qla_by_rows, qla_by_state

__all__ = ["qla_by_rows", "qla_by_state"]
