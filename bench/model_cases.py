"""Cases of the whole model: a training step, a stage-1 layer, summarizing a long history, a scoring request.

The peer is `bench.torch_model`, the same function of the same parameters. Gradients are sums over users, so float64 is
asked for a few users at a time, whatever the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from bench import costs
from bench.cases import Case, Problem, differentiable
from bench.peers import Peer
from bench.torch_model import TorchVista, qla_layer, with_norms_of_torch
from vista_ext.data.batch import Candidates, FeatureSchema, Histories
from vista_ext.models import PRESETS, Vista, VistaConfig
from vista_ext.nn import QlaBlock
from vista_ext.train.precision import call_in

SCHEMA = FeatureSchema(num_items=100_000, num_actions=4)
PRODUCTION = PRESETS["production"]
NOW = 1_700_000_000
SMOKE: dict[str, Any] = {"peers": ("eager",), "why_missing": "a minute of compilation"}
CHECKED_ROWS = 16_000  # events that float64 is asked for at a time


@dataclass(frozen=True)
class Request:
    """What a model is called with: as many events of each user, as many candidates of each."""

    histories: Histories
    candidates: Candidates

    @property
    def users(self) -> Tensor:
        return torch.arange(len(self.histories), device=self.candidates.items.device)

    def some(self, begin: int, end: int) -> Request:
        each = self.candidates.max_len
        rows = slice(begin * each, end * each)
        offsets = self.candidates.offsets[: end - begin + 1]
        candidates = Candidates(offsets, each, self.candidates.items[rows], self.candidates.context[rows])
        return Request(self.histories.rows(begin, end), candidates)


def make_request(users: int, events: int, candidates: int, device: str) -> Request:
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=device)

    total, each = users * events, torch.arange(users + 1, device=device)
    times = NOW - draw(total, 10_000_000)
    now = torch.full((users,), NOW, device=device)
    ids, actions = draw(total, SCHEMA.num_items) + 1, draw(total, SCHEMA.num_actions)
    histories = Histories(each * events, events, ids, actions, times, now)
    items = draw(users * candidates, SCHEMA.num_items) + 1
    context = torch.zeros((users * candidates, 0), dtype=torch.int64, device=device)
    return Request(histories, Candidates(each * candidates, candidates, items, context))


def make_models(config: VistaConfig, device: str) -> tuple[Vista, TorchVista]:
    """Ours and the peer, with the same parameters, items far enough from each other to tell."""
    torch.manual_seed(0)
    ours, theirs = Vista(SCHEMA, config), TorchVista(SCHEMA, config)
    nn.init.normal_(ours.items.rows.weight)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def training_case(
    shape: str,
    users: int,
    events: int,
    candidates: int,
    config: VistaConfig,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    **options: Any,
) -> Case:
    """The losses and the gradients of all parameters, layers in `dtype`; the optimizer's step is the same for all.

    Args:
        compiled: compile what of ours is not ops of ours.
    """

    def make(device: str) -> Problem:
        ours, theirs = make_models(config, device)
        whole = make_request(users, events, candidates, device)

        def exact() -> Sequence[Tensor]:
            model = make_models(config, device)[1].double()
            inputs = [p.detach().requires_grad_() for p in model.parameters()]
            step, parts = max(1, CHECKED_ROWS // events), []
            for begin in range(0, users, step):
                part = whole.some(begin, min(begin + step, users))
                found = differentiable(_of_parameters(_Losses(model, part, torch.float64)), inputs, True)
                parts.append([len(part.histories) / users * x.detach() for x in found])
            losses, *grads = zip(*parts, strict=True)
            of_candidates = torch.cat([x[:-1] for x in losses])
            return values([torch.cat([of_candidates, sum(x[-1:] for x in losses)]), *map(sum, grads)])

        def values(result: Sequence[Tensor]) -> Sequence[Tensor]:
            # A single number may be right by luck: compared are the candidates' losses, and the gradients of a module.
            grads: dict[str, list[Tensor]] = {}
            for name, grad in zip(names, result[1:], strict=True):
                grads.setdefault(name.rpartition(".")[0], []).append(grad.detach().flatten())
            return [result[0].detach()[:-1], *map(torch.cat, grads.values())]

        names, inputs = zip(*ours.named_parameters(), strict=True)
        losses, in_torch = (_of_parameters(_Losses(model, whole, dtype)) for model in (ours, theirs))
        return Problem(
            inputs=inputs,
            ours=torch.compile(losses, dynamic=False, fullgraph=True) if compiled else losses,
            composition=in_torch,
            exact=exact,
            reference=lambda: values(differentiable(in_torch, inputs, True)),
            values=values,
            foreign=lambda: _compiled(losses) if device == "cpu" else {},
        )

    parts = costs.training_step(users, events, candidates, config, dtype.itemsize)
    return _case("training_step", shape, dtype, parts, make, backward=True, capturable=False, **options)


class _Losses(nn.Module):
    """The losses of a request, which add up to its loss: of each candidate (labels made up), and of the reconstruction.
    The layers are in `dtype`."""

    def __init__(self, model: Vista, request: Request, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.request, self.dtype = model, request, dtype
        self.labels = (request.candidates.items % 2)[:, None]

    def forward(self) -> Tensor:
        asked = self.request
        output = call_in(self.model, self.dtype, asked.histories, asked.candidates, asked.users)
        logits = output.logits.to(torch.promote_types(self.dtype, torch.float32))
        losses = binary_cross_entropy_with_logits(logits, self.labels.to(logits.dtype), reduction="none").flatten()
        return torch.cat([losses / len(losses), output.losses["reconstruction"][None]])


def _compiled(ours: Callable[..., Tensor]) -> Mapping[str, Peer | str]:
    """Our own model as a user compiles it: what of it is not ops of ours is the compiler's."""
    run = torch.compile(ours, dynamic=False, fullgraph=True)
    return {"ours_compiled": Peer(run, "ours, compiled: below 1, that is faster than ours as it is")}


def _of_parameters(module: nn.Module, inputs: int = 0) -> Callable[..., Tensor]:
    """A function of the module's so many inputs and, behind them, its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def run(*tensors: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, tensors[inputs:], strict=True)), tensors[:inputs])

    return run


def _case(
    op: str, shape: str, dtype: torch.dtype, parts: Sequence[costs.Part], make: Callable[[str], Problem], **options: Any
) -> Case:
    return Case(op, shape, dtype, *costs.total(parts), make, parts=tuple(parts), **options)


class _Layer(nn.Module):
    """A stage-1 layer over histories of one length: the rows after it."""

    def __init__(self, config: VistaConfig, events: int) -> None:
        super().__init__()
        self.block = QlaBlock(config.dim, config.heads, config.head_dim, config.hidden)
        self.events = events

    def forward(self, x: Tensor) -> Tensor:
        users = x.shape[0] // self.events
        offsets = torch.arange(users + 1, device=x.device) * self.events
        scale = torch.full((users,), 1 / self.events, device=x.device)
        state = self.block.state(x, offsets, self.events)
        return self.block.read(x, state, scale, offsets, self.events)


class _TorchLayer(_Layer):
    def __init__(self, config: VistaConfig, events: int) -> None:
        super().__init__(config, events)
        with_norms_of_torch(self)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, self.events, x.shape[1])
        return qla_layer(self.block, rows, None, 1 / self.events, self.events).view(x.shape)


def layer_case(
    shape: str, users: int, events: int, config: VistaConfig, dtype: torch.dtype, backward: bool, **options: Any
) -> Case:
    def make(device: str) -> Problem:
        torch.manual_seed(0)
        layer, in_torch = _Layer(config, events), _TorchLayer(config, events)
        in_torch.load_state_dict(layer.state_dict())
        x = torch.randn(users * events, config.dim, device=device)
        inputs = [p.detach().to(device, dtype).requires_grad_() for p in (x, *layer.parameters())]
        ours, composition = _of_parameters(layer, 1), _of_parameters(in_torch, 1)

        def exact() -> Sequence[Tensor]:
            parameters = [p.detach().double().requires_grad_() for p in inputs[1:]]
            outs, sums = [], None
            for rows in inputs[0].detach().split(max(1, CHECKED_ROWS // events) * events):
                found = differentiable(composition, [rows.double().requires_grad_(), *parameters], backward)
                by_row, of_parameters = found[: 1 + backward], found[2:]
                outs.append([y.detach() for y in by_row])
                sums = of_parameters if sums is None else [s + y for s, y in zip(sums, of_parameters, strict=True)]
            return [*map(torch.cat, zip(*outs, strict=True)), *(sums or [])]

        return Problem(
            inputs=tuple(inputs),
            ours=ours,
            composition=composition,
            exact=exact,
            reference=lambda: [y.detach() for y in differentiable(composition, inputs, backward)],
            values=lambda result: [y.detach() for y in result],
            foreign=lambda: _compiled(ours) if device == "cpu" else {},
        )

    parts = costs.layer(users, events, config, dtype.itemsize, backward=backward)
    return _case("layer", shape, dtype, parts, make, backward=backward, **options)


def summarize_case(
    shape: str, users: int, events: int, config: VistaConfig, dtype: torch.dtype, chunk: int, **options: Any
) -> Case:
    """End to end: ids, actions and times to summaries."""

    def make(device: str) -> Problem:
        ours, theirs = (model.eval().to(dtype) for model in make_models(config, device))
        histories = make_request(users, events, 0, device).histories

        def whole(model: TorchVista) -> Tensor:
            with torch.no_grad():
                return model.summarize_whole(histories)

        def exact() -> Sequence[Tensor]:
            model = TorchVista(SCHEMA, config)
            model.load_state_dict(theirs.state_dict())
            return [whole(model.to(device, torch.float64).eval())]

        return Problem(
            inputs=(),
            ours=lambda: ours.summarize(histories, chunk=chunk),
            composition=lambda: whole(theirs),
            exact=exact,
            reference=lambda: [whole(theirs)],
            values=lambda result: [result],
        )

    parts = costs.summarize(users, events, config, dtype.itemsize)
    return _case("summarize", shape, dtype, parts, make, capturable=False, **options)


def scoring_case(
    shape: str, users: int, candidates: int, config: VistaConfig, dtype: torch.dtype, **options: Any
) -> Case:
    """A request: summaries in `dtype`, candidates' ids; logits come out."""

    def make(device: str) -> Problem:
        ours, theirs = (model.eval().to(dtype) for model in make_models(config, device))
        asked = make_request(users, 0, candidates, device)
        summaries = torch.randn(users, config.num_seeds, config.dim, device=device).to(dtype)

        def whole(model: TorchVista, summaries: Tensor, candidates: Candidates) -> Tensor:
            with torch.no_grad():
                return model.score_whole(summaries, candidates)

        def score() -> Tensor:
            with torch.no_grad():
                return ours.score(summaries, asked.candidates, asked.users)

        def exact() -> Sequence[Tensor]:
            model = TorchVista(SCHEMA, config)
            model.load_state_dict(theirs.state_dict())
            model.to(device, torch.float64).eval()
            parts = [asked.some(i, min(i + 16, users)).candidates for i in range(0, users, 16)]
            pairs = zip(summaries.double().split(16), parts, strict=True)
            return [torch.cat([whole(model, *pair) for pair in pairs])]

        return Problem(
            inputs=(),
            ours=score,
            composition=lambda: whole(theirs, summaries, asked.candidates),
            exact=exact,
            reference=lambda: [whole(theirs, summaries, asked.candidates)],
            values=lambda result: [result],
        )

    parts = costs.scoring_request(users, candidates, config, dtype.itemsize)
    return _case("score", shape, dtype, parts, make, **options)
