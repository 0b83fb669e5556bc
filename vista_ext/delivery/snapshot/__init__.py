"""Columnar snapshots of whole stores: written at once or not at all, read whole or in part, compared by their keys."""

from vista_ext.delivery.snapshot.diff import Changes, diff, erased_since
from vista_ext.delivery.snapshot.reader import Snapshot, import_snapshot
from vista_ext.delivery.snapshot.writer import export_snapshot

__all__ = ["Changes", "Snapshot", "diff", "erased_since", "export_snapshot", "import_snapshot"]
