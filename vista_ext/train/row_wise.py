"""A table of embeddings cut by rows over the processes; look-ups are exchanged by TorchRec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from vista_ext._extras import require
from vista_ext.train.sharded import cut

# Not an extra: what TorchRec requires is any CUDA build of FBGEMM, for whatever torch, and an old torchmetrics.
INSTALL = (
    "pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 && pip install tensordict pyre-extensions (for torch "
    "2.13; on GPUs fbgemm-gpu instead of fbgemm-gpu-cpu)"
)


class RowWiseEmbedding(nn.Embedding):
    """What a table gives, with ceil(rows / processes) of its rows in each process, the first rows in the first one.

    The weight is a `DTensor`, like a parameter under `fully_shard`, and has ordinary gradients: whatever trains and
    saves the one does the other. Gradients come as the average over the processes, as `DistributedDataParallel` gives
    them. All processes must look up together, each ids of its own.

    TorchRec moves ids to who has their rows, and rows back. Its own look-up is not used: the dense one pools on a CPU
    where it should not (FBGEMM issue 4586), and fused ones train by other rules than the optimizer of whole tables.

    Args:
        table: the whole, the same in all processes.
        mesh: of the processes.

    Raises:
        MissingExtraError: without TorchRec, with the command that installs it.
    """

    weight: DTensor

    def __init__(self, table: nn.Embedding, mesh: DeviceMesh) -> None:
        dist: Any = require("torchrec.distributed.dist_data", command=INSTALL)
        sharding: Any = require("torchrec.distributed.sharding.rw_sharding", command=INSTALL)
        sparse: Any = require("torchrec.sparse.jagged_tensor", command=INSTALL)
        weight = cut(table.weight.detach(), mesh)
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=weight, _freeze=False)
        self._keyed, group = sparse.KeyedJaggedTensor, mesh.get_group()
        rows, self._processes = table.num_embeddings, mesh.size()
        ask = sharding.RwSparseFeaturesDist(group, 1, [rows], device=weight.device, is_sequence=True)
        answer = dist.SequenceEmbeddingsAllToAll(group, [1] * self._processes, weight.device)
        self._exchange = ask, answer  # in a tuple they are no modules of this one, whose state is its weight alone

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[..., dim]` of int32 or int64 ids; each distinct one is asked for once."""
        ask, answer = self._exchange
        distinct, at = torch.unique(ids.long(), return_inverse=True)
        count = distinct.new_tensor([distinct.shape[0]])
        asked = ask(self._keyed(keys=["rows"], values=distinct, lengths=count)).wait().wait()
        block = -(-self.num_embeddings // self._processes)
        answered = answer(
            functional.embedding(asked.values(), self.weight.to_local()),
            lengths=asked.lengths().view(1, -1),
            input_splits=torch.bincount(distinct // block, minlength=self._processes).tolist(),
            output_splits=asked.lengths().tolist(),
            unbucketize_permute_tensor=None,  # distinct ids are in the order of their rows, so answers are too
        )
        return functional.embedding(at, answered.wait())
