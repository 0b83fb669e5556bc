"""Public data sets and own logs, turned into the event data set of `vista_ext.data.dataset`."""

from vista_ext.data.importers.amazon import import_amazon
from vista_ext.data.importers.generic import import_generic
from vista_ext.data.importers.kuairand import import_kuairand
from vista_ext.data.importers.movielens import import_movielens

__all__ = ["import_amazon", "import_generic", "import_kuairand", "import_movielens"]
