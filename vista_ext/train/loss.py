"""What a step minimizes: the tasks' cross entropy and the losses of the encoder, over a batch that processes share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vista_ext.config import TrainConfig
from vista_ext.data.batch import Batch
from vista_ext.models import Ranker
from vista_ext.processes import Processes
from vista_ext.train.precision import PRECISIONS, call_in


class Objective(nn.Module):
    """A model and what it is trained for.

    A mean over a batch is the sum over it by the number of its terms, and both are sums over the processes, however
    many terms each has: a mean of the processes' means would be another thing. All of them must call this together.

    Args:
        model: to train.
        choice: `main_task_weight`, `precision`, `loss_weighting`.
        processes: that share each batch.
    """

    def __init__(self, model: Ranker, choice: TrainConfig, processes: Processes) -> None:
        super().__init__()
        self.model, self.choice, self.processes = model, choice, processes

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, of which this process has a part.

        Returns:
            What this process has of it, to differentiate: its gradients are to be averaged over the processes. And
            "loss", that of the whole batch, with its parts by name, the same in all processes.
        """
        choice, tasks = self.choice, self.model.schema.tasks
        output = call_in(self.model, PRECISIONS[choice.precision], batch.histories, batch.candidates, batch.kv_index)
        weights = candidate_weights(batch, choice.loss_weighting)
        entropy = functional.binary_cross_entropy_with_logits(output.logits.float(), batch.labels, reduction="none")
        names, one = [*tasks, *output.losses], weights.new_ones(())
        counts = torch.stack([weights.sum()] * len(tasks) + [output.counts.get(n, one).to(one) for n in output.losses])
        added = [loss * count for loss, count in zip(output.losses.values(), counts[len(tasks) :], strict=True)]
        sums = torch.cat([(entropy * weights[:, None]).sum(0), *(loss[None] for loss in added)])
        together, terms = self.processes.sum(torch.stack([sums.detach(), counts])).unbind()
        terms = terms.clamp(min=1e-9)

        of_tasks = torch.ones(len(tasks), device=sums.device)
        of_tasks[0] = choice.main_task_weight
        shares = torch.cat([of_tasks / of_tasks.sum().clamp(min=1e-9), sums.new_ones(len(added))]) / terms
        # One transfer for all that is told of a step.
        told = torch.cat([(together * shares).sum()[None], together / terms]).tolist()
        keys = ["loss", *(f"loss/{name}" for name in names)]
        return (sums * shares).sum() * self.processes.size, dict(zip(keys, told, strict=True))


def candidate_weights(batch: Batch, weighting: str) -> Tensor:
    """What each candidate counts in the loss, float32 `[m]`; the loss is the weighted mean.

    Args:
        batch: of requests.
        weighting: "candidate": all alike. "request": all requests alike, each the mean of its candidates. "history":
            all histories alike, each the mean over the candidates of the requests that share it.
    """
    total = batch.labels.shape[0]
    if weighting == "candidate":
        return torch.ones(total, device=batch.labels.device)
    lengths = batch.candidates.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    if weighting == "history":
        owner = batch.kv_index[owner]
    sizes = torch.bincount(owner, minlength=1)
    return 1.0 / sizes[owner].to(torch.float32)
