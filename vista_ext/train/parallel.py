"""How the processes of a job train one model together."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vista_ext.processes import Processes
from vista_ext.train.loss import Objective
from vista_ext.train.row_wise import RowWiseEmbedding
from vista_ext.train.sharded import shard


def parallelize(objective: Objective, device: torch.device, processes: Processes) -> nn.Module:
    """An objective on the device, its model cut or copied over the processes as `train.parallel` says.

    Args:
        objective: with the same model in each process, in the host's memory: a table that is cut is never whole on a
            device. A process alone has all of it.

    Raises:
        ValueError: "torchrec" in a process alone.
        MissingExtraError: "torchrec" without TorchRec.
    """
    parallel = objective.choice.parallel
    if parallel == "torchrec":
        if processes.size == 1:
            raise ValueError(
                "train.parallel: torchrec cuts a table over the processes of torchrun, expected at least 2 "
                "(WORLD_SIZE), found 1: start more, or choose ddp"
            )
        items = objective.model.items
        items.rows = RowWiseEmbedding(items.rows, init_device_mesh(device.type, (processes.size,)))
    objective.to(device)
    if processes.size == 1:
        return objective
    if parallel == "fsdp":
        shard(objective, device, processes.size)
        return objective
    cut = [name for name, parameter in objective.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, cut)
    return DistributedDataParallel(objective, broadcast_buffers=False)
