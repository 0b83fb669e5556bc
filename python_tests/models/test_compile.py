"""A user compiles the model: one graph, in training too, and no more of them for batches of other lengths."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import binary_cross_entropy_with_logits

from python_tests.models.conftest import make_candidates, make_histories
from vista_ext.models import Vista, VistaConfig


def losses(model, histories, candidates, kv_index):
    output = model(histories, candidates, kv_index)
    labels = (candidates.items % 2)[:, None].to(output.logits.dtype).expand_as(output.logits)
    return binary_cross_entropy_with_logits(output.logits, labels) + sum(output.losses.values())


def gradients(step, model, *batch):
    return torch.autograd.grad(step(model, *batch), list(model.parameters()))


# Other users, lengths, longest histories and numbers of candidates in each batch.
BATCHES = [
    ([5, 0, 1, 300, 40], [3, 8, 4, 1, 2]),
    ([7, 90, 7], [2, 2, 9]),
    ([30, 2, 2, 1000, 9, 60, 1], [1, 5, 3, 2, 2, 2, 2]),
    ([2, 4], [20, 1]),
]


def test_a_training_step_is_one_graph_for_all_batches(world):
    torch.manual_seed(0)
    # Enough for products of our own on a processor that has them.
    wide = {"dim": 128, "heads": 4, "head_dim": 32, "hidden": 128}
    config = VistaConfig(num_seeds=4, summary_layers=2, target_layers=2, reconstruction_window=16, **wide)
    model = Vista(world.schema, config, world.item_features).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    for number, (lengths, counts) in enumerate(BATCHES):
        batch = make_histories(lengths), make_candidates(counts), torch.arange(len(lengths))
        found, expected = gradients(compiled, model, *batch), gradients(losses, model, *batch)
        for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, (number, name)
    # The first batch has sizes of its own; what differs in the second is a variable from then on.
    assert counter.frame_count <= 2
