"""Typed functions over `torch.ops.vista.*`: one file per op, holding its docstring, fake kernel and autograd."""

from vista_ext.ops.cache_rows import cache_scatter_

__all__ = ["cache_scatter_"]
