"""Layers: modules that hold the parameters of one block each, over packed rows and `vista_ext.ops`."""

from vista_ext.nn.causal import causal_attention
from vista_ext.nn.jagged import last_rows, owners, packed_suffix, spread
from vista_ext.nn.linear import Linear
from vista_ext.nn.linear_silu import LinearSiLU, silu_mlp
from vista_ext.nn.qla_block import QlaBlock
from vista_ext.nn.rms_norm import RMSNorm
from vista_ext.nn.sglu import SGLU
from vista_ext.nn.target_block import TargetBlock

__all__ = [
    "SGLU",
    "Linear",
    "LinearSiLU",
    "QlaBlock",
    "RMSNorm",
    "TargetBlock",
    "causal_attention",
    "last_rows",
    "owners",
    "packed_suffix",
    "silu_mlp",
    "spread",
]
