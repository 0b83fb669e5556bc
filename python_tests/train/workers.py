"""Training as one process of several does it."""

import torch

from vista_ext.config import load_config
from vista_ext.data.dataset import EventDataset
from vista_ext.models import build_model
from vista_ext.processes import Processes
from vista_ext.train.checkpoint import open_checkpoint, save_checkpoint
from vista_ext.train.evaluate import predict
from vista_ext.train.loss import Objective
from vista_ext.train.parallel import parallelize
from vista_ext.train.sharded import whole
from vista_ext.train.trainer import train


def train_share(folder):
    config, processes = load_config(f"{folder}/run.yaml"), Processes.from_environment()
    with processes.joined():
        train(config, EventDataset(config.data.path), processes=processes)


def gradients_of(config, dataset, processes, batches):
    """Of the first batches, a step between: the loss with its parts, and the gradients by name, of each."""
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, dataset.schema, config.vista(), dataset.item_features).train()
    objective = Objective(model, config.train, processes)
    wrapped = parallelize(objective, torch.device("cpu"), processes)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.01), []
    for batch in dataset.batches(
        "train",
        requests_per_batch=config.train.requests_per_batch,
        max_history=config.data.max_history,
        share_window=config.train.share_window,
        shuffle_seed=7,
        part=(processes.rank, processes.size),
    ):
        optimizer.zero_grad()
        share, told = wrapped(batch)
        share.backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
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


def score_and_save_share(config, checkpoint, folder):
    """The logits of "valid" by a model that is cut, and the same model saved."""
    processes, dataset = Processes.from_environment(), EventDataset(config.data.path)
    model = open_checkpoint(checkpoint).model()
    with processes.joined():
        parallelize(Objective(model, config.train, processes), torch.device("cpu"), processes)
        own = model.items.rows.weight.to_local().detach()
        rows, size = (processes.gather(torch.tensor(n)) for n in (own.shape[0], own.untyped_storage().nbytes()))
        logits = predict(model, dataset, "valid", config.data).logits
        save_checkpoint(folder / "saved", model, None, {}, write=not processes.rank)
    if not processes.rank:
        torch.save(
            {"rows": [int(n) for n in rows], "bytes": [int(n) for n in size], "logits": logits}, folder / "found"
        )
