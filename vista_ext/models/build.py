"""Models by name: VISTA and the baselines, with everything around the encoder equal."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vista_ext.data.batch import FeatureSchema
from vista_ext.models.config import VistaConfig
from vista_ext.models.encoders import DIN, Encoder, MeanPooling
from vista_ext.models.ranker import Ranker
from vista_ext.models.vista import Vista

ENCODERS: dict[str, Callable[[VistaConfig], Encoder]] = {encoder.name: encoder for encoder in (MeanPooling, DIN)}


def build_model(name: str, schema: FeatureSchema, config: VistaConfig, item_features: Tensor | None = None) -> Ranker:
    """A model by name: "vista", or a baseline of `ENCODERS` with everything around the encoder equal.

    Raises:
        ValueError: if there is no such model.
    """
    if name == "vista":
        return Vista(schema, config, item_features)
    if name not in ENCODERS:
        raise ValueError(f"model must be one of {', '.join(['vista', *ENCODERS])}, found {name!r}")
    return Ranker(schema, config, ENCODERS[name](config), item_features)
