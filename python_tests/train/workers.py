"""Training as one process of several does it."""

import torch
from torch.nn.parallel import DistributedDataParallel

from vista_ext.config import load_config
from vista_ext.data.dataset import EventDataset
from vista_ext.models import build_model
from vista_ext.processes import Processes
from vista_ext.train.loss import Objective
from vista_ext.train.sharded import shard, whole
from vista_ext.train.trainer import train


def train_share(folder):
    config, processes = load_config(f"{folder}/run.yaml"), Processes.from_environment()
    with processes.joined():
        train(config, EventDataset(config.data.path), processes=processes)


def gradients_of(config, dataset, processes, batches):
    """Of the first batches: the loss with its parts, and the gradients by name, of each."""
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, dataset.schema, config.vista(), dataset.item_features).train()
    objective = Objective(model, config.train, processes)
    wrapped = objective
    if processes.size > 1 and config.train.parallel == "fsdp":
        shard(wrapped, torch.device("cpu"), processes.size)
    elif processes.size > 1:
        wrapped = DistributedDataParallel(objective)
    found = []
    for batch in dataset.batches(
        "train",
        requests_per_batch=config.train.requests_per_batch,
        max_history=config.data.max_history,
        share_window=config.train.share_window,
        shuffle_seed=7,
        part=(processes.rank, processes.size),
    ):
        model.zero_grad()
        share, told = wrapped(batch)
        share.backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        found.append((told, gradients))
        if len(found) == batches:
            return found
    return found


def gradients_of_share(configs, batches, path):
    processes = Processes.from_environment()
    dataset = EventDataset(configs[0].data.path)
    with processes.joined():
        found = [gradients_of(config, dataset, processes, batches) for config in configs]
    if not processes.rank:
        torch.save(found, path)
