"""The two-stage model, its parts, and the baselines that share its embeddings and head."""

from vista_ext.data.batch import Batch, Candidates, FeatureSchema, Histories
from vista_ext.models.build import ENCODERS, build_model
from vista_ext.models.config import PRESETS, EmbeddingConfig, VistaConfig
from vista_ext.models.ranker import Ranker, RankerOutput
from vista_ext.models.vista import SummaryRanker, Vista

__all__ = [
    "ENCODERS",
    "PRESETS",
    "Batch",
    "Candidates",
    "EmbeddingConfig",
    "FeatureSchema",
    "Histories",
    "Ranker",
    "RankerOutput",
    "SummaryRanker",
    "Vista",
    "VistaConfig",
    "build_model",
]
