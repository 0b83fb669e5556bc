"""Sizes and choices of the model. Policy lives here, never in an op."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from vista_ext.ops.qla import Activation

ACTIVATIONS = get_args(Activation)
MOST_LAYERS = 1000  # a damaged file that asks for more would be built for hours


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")


def _at_least(least: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")


@dataclass(frozen=True)
class EmbeddingConfig:
    """How ids become vectors.

    Args:
        items: "table", a row for each item, or "hash", the sum of two rows of a table of `hash_rows`.
        hash_rows: rows of the hashed table.
        time_buckets: powers of two of an event's age in seconds that are told apart; 0 leaves time out.
        dropout: on the embedded rows of events and candidates.
    """

    items: str = "table"
    hash_rows: int = 1_000_000
    time_buckets: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _one_of("embedding.items", self.items, ("table", "hash"))
        _at_least(1, {"embedding.hash_rows": self.hash_rows})
        _at_least(0, {"embedding.time_buckets": self.time_buckets})
        _fraction("embedding.dropout", self.dropout)


def _fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), found {value!r}")


@dataclass(frozen=True)
class VistaConfig:
    """Sizes of a model. The baselines read the same fields where they apply.

    Args:
        dim: of embeddings, summary rows and candidates.
        num_seeds: summary rows of a user (k in the paper).
        heads, head_dim: of both attentions; `head_dim` a multiple of 8 from 16 to 256.
        summary_layers: QLA layers of stage 1.
        target_layers: softmax layers of stage 2.
        hidden: width of SGLU and of stage 2's MLP.
        mlp: hidden widths of the head.
        seeds: "source" (seeds and history see each other) or "target" (seeds read the history, which never sees them).
        scale: "mean" divides a state by its number of source rows, "sum" does not.
        length_buckets: powers of two of a history's length that the seeds are told; 0 leaves it out. "mean" and the
            norms take the length away, and how much somebody does says something about what they will do.
        activation, state_activation: phi1 and phi2 of QLA.
        dropout: in layers and head.
        reconstruction_weight: of the reconstruction loss; 0 leaves the decoder out.
        reconstruction_window: events, the newest of a history, that the decoder predicts.
        reconstruct_constants: treat the predicted embeddings as constants; else shrinking them lowers the loss.
        recent_events: newest raw events attended beside the summary, against staleness; 0 for none.
        embedding: how ids become vectors.
    """

    dim: int = 64
    num_seeds: int = 16
    heads: int = 4
    head_dim: int = 16
    summary_layers: int = 1
    target_layers: int = 1
    hidden: int = 128
    mlp: tuple[int, ...] = (128, 64)
    seeds: str = "source"
    scale: str = "mean"
    length_buckets: int = 20
    activation: Activation = "silu"
    state_activation: Activation = "silu"
    dropout: float = 0.0
    reconstruction_weight: float = 1.0
    reconstruction_window: int = 32
    reconstruct_constants: bool = True
    recent_events: int = 0
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def __post_init__(self) -> None:
        names = ("dim", "num_seeds", "heads", "head_dim", "summary_layers", "target_layers", "hidden")
        _at_least(1, {name: getattr(self, name) for name in names})
        _at_least(0, {"recent_events": self.recent_events, "length_buckets": self.length_buckets})
        for name in ("summary_layers", "target_layers"):
            if getattr(self, name) > MOST_LAYERS:
                raise ValueError(f"{name} must be at most {MOST_LAYERS}, found {getattr(self, name)}")
        _at_least(2, {"reconstruction_window": self.reconstruction_window})
        if self.head_dim % 8 or not 16 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 from 16 to 256, found {self.head_dim}")
        if not isinstance(self.mlp, list | tuple):
            raise ValueError(f"mlp must be a list of widths, found {self.mlp!r}")
        object.__setattr__(self, "mlp", tuple(self.mlp))
        _at_least(1, {f"mlp[{i}]": width for i, width in enumerate(self.mlp)})
        _one_of("seeds", self.seeds, ("source", "target"))
        _one_of("scale", self.scale, ("mean", "sum"))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("state_activation", self.state_activation, ACTIVATIONS)
        _fraction("dropout", self.dropout)
        weight = self.reconstruction_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"reconstruction_weight must be a finite number of at least 0, found {weight!r}")
        if not isinstance(self.embedding, EmbeddingConfig):
            raise ValueError(f"embedding must be an EmbeddingConfig, found {type(self.embedding).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        embedding = {f.name: getattr(self.embedding, f.name) for f in fields(self.embedding)}
        return values | {"mlp": list(self.mlp), "embedding": embedding}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VistaConfig:
        """The inverse of `to_dict`; an unknown key is a ValueError that names it."""
        nested = dict(values.get("embedding", {}))
        for known, found, where in ((cls, values, ""), (EmbeddingConfig, nested, "embedding.")):
            names = {f.name for f in fields(known)}
            if unknown := sorted(set(found) - names):
                raise ValueError(f"{where}{unknown[0]} is not a field of the model, expected one of {sorted(names)}")
        return cls(**{**values, "embedding": EmbeddingConfig(**nested)})


# Section 5 of the spec: the paper's production model and its two public set-ups. Head dims: the paper gives heads and
# dim only; where dim / heads falls below what the kernels take, the smallest head is used.
PRESETS: dict[str, VistaConfig] = {
    "production": VistaConfig(
        dim=256,
        num_seeds=128,
        heads=4,
        head_dim=64,
        summary_layers=3,
        target_layers=3,
        hidden=512,
        mlp=(1024, 512, 256),
    ),
    "amazon": VistaConfig(dim=64, heads=4, head_dim=16, hidden=128, mlp=(1024, 512, 256)),
    "kuairand": VistaConfig(dim=32, heads=4, head_dim=16, hidden=64, mlp=(512, 128, 64)),
    "tiny": VistaConfig(dim=32, num_seeds=8, heads=2, head_dim=16, hidden=64, mlp=(64,)),
}
