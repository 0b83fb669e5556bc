"""The command line `vista`: a thin shell over `data`, `train`, `serve`, `delivery` and `report`."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from vista_ext._extras import MissingExtraError, require

try:
    typer = require("typer", extra="run")
    from vista_ext.delivery.commands import register as register_delivery
    from vista_ext.serve.commands import register as register_serving
except MissingExtraError as error:
    sys.exit(str(error))

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Lifelong histories in ranking."
)
data_app = typer.Typer(no_args_is_help=True, help="Turn a public data set, or your own log, into the event format.")
app.add_typer(data_app, name="import")
register_delivery(app)
register_serving(app)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as train.epochs=3", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="folder of a trained run")]


def _usable(device: str) -> str:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an assertion is how torch says that it was built without CUDA
        found = f"{device!r}: {str(error).splitlines()[0]}"
        raise ValueError(f"--device must be a torch device that can be used here, found {found}") from error
    return device


Device = Annotated[str, typer.Option(help="torch device", callback=_usable)]


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        app()
    except (ImportError, ValueError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
        # The package's own errors are of these kinds and say what was expected; the traceback of a bug shows
        # when Python runs with -X dev.
        if sys.flags.dev_mode:
            raise
        sys.exit(f"vista: {error}")


@app.command()
def info() -> None:
    """What was built, for which architectures, against what."""
    from vista_ext.info import collect

    print(json.dumps(collect(), indent=2))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None, device: Device = "cpu"
) -> None:
    """Train a model, or go on with a run that was cut off. Under torchrun processes share each batch."""
    from vista_ext.config import load_config
    from vista_ext.data.dataset import EventDataset
    from vista_ext.processes import Processes
    from vista_ext.train.trainer import train as run_training

    run, processes = load_config(config, overrides or ()), Processes.from_environment()
    dataset, own = EventDataset(run.data.path), processes.device(device)
    with processes.joined(own):
        run_training(run, dataset, device=own, processes=processes)
    if not processes.rank:
        print(f"trained: {run.folder}")


@app.command()
def summarize(
    run: RunFolder,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="stop reading each user at the first sample of this split")] = "",
    redis: Annotated[str, typer.Option(help="prefix of a store on VISTA_REDIS_URL to write instead")] = "",
    device: Device = "cpu",
) -> None:
    """Summarize all users into the run's store, quantized. Under torchrun processes share the users; what was cut off
    goes on where it was."""
    from vista_ext.processes import Processes
    from vista_ext.runs import Run
    from vista_ext.serve.job import summarize_all
    from vista_ext.serve.summarize import first_moments, open_for_writing, open_on_server
    from vista_ext.store import RedisConfig, SummaryStore

    processes = Processes.from_environment()
    opened = Run.open(run, overrides or (), processes.device(device))
    opened.note_users()
    before = first_moments(opened.dataset, split) if split else None
    choice = opened.config.store
    path = opened.split_store_path(split) if split else opened.store_path
    target: SummaryStore
    if redis:
        server = RedisConfig.from_environment(prefix=redis)
        where, journal = server.where, path.with_name(f"{path.name}-{redis}.job")
        target = open_on_server(server, opened.store_spec())
    else:
        where, journal = str(path), path / "job"
        target = open_for_writing(path, opened.store_spec())
    with target as store, processes.joined(opened.device):
        done = summarize_all(
            opened.vista,
            opened.dataset,
            store,
            journal,
            before=before,
            max_history=choice.max_history,
            users_per_batch=choice.users_per_batch,
            users_per_shard=choice.users_per_shard,
            processes=processes,
        )
        if not processes.rank:
            print(f"{done}, {len(store)} in {where} ({choice.scheme})")


@app.command()
def refresh(
    run: RunFolder,
    overrides: Overrides = None,
    min_events: Annotated[int, typer.Option(help="due with so many events that the summary lacks; 0: everybody")] = 1,
    max_wait: Annotated[int | None, typer.Option(help="or so many seconds after the first of them")] = None,
    max_history: Annotated[int, typer.Option(help="newest events read of each user; 0 for all")] = 0,
    now: Annotated[int | None, typer.Option(help="seconds; the end of each user's events by default")] = None,
    states: Annotated[bool, typer.Option("--states", help="keep states, and add new events to them")] = False,
    recompute_after: Annotated[int, typer.Option(help="updates of a state until all is read again")] = 20,
    device: Device = "cpu",
) -> None:
    """Summarize the users whose summary in the run's store is due: by new events, or by time. Under torchrun processes
    share the users."""
    from vista_ext.processes import Processes
    from vista_ext.runs import Run
    from vista_ext.serve.incremental import RefreshPolicy, refresh_due
    from vista_ext.serve.summarize import open_for_writing
    from vista_ext.store.states import StateStore

    policy, processes = RefreshPolicy(min_events, max_wait, max_history, recompute_after), Processes.from_environment()
    opened = Run.open(run, overrides or (), processes.device(device))
    opened.note_users()
    with (
        open_for_writing(opened.store_path, opened.store_spec()) as store,
        StateStore.open(opened.states_path, opened.state_spec()) if states else nullcontext() as kept,
        processes.joined(opened.device),
    ):
        done = refresh_due(
            opened.vista,
            opened.dataset,
            store,
            policy,
            states=kept,
            now=now,
            users_per_batch=opened.config.store.users_per_batch,
            processes=processes,
        )
        if not processes.rank:
            print(done)


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="what to score")] = "test",
    staleness: Annotated[
        str, typer.Option(help="ages of summaries at a request: events they miss, or time such as 2h")
    ] = "0,1,5,20,100,1h,2h,1d",
    beside: Annotated[
        list[Path] | None, typer.Option(help="another run on this data, such as another seed; repeat for more")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="draw pictures into the run's folder")] = False,
    page: Annotated[Path | None, typer.Option(help="Markdown page to put tables and curves of delivery into")] = None,
    device: Device = "cpu",
) -> None:
    """Quality beside the floors: from histories, from the store, by precision, age of summaries and history length."""
    from vista_ext.models import Vista
    from vista_ext.report.evaluation import delivery, draw, evaluation, write_page
    from vista_ext.report.tables import save_tables
    from vista_ext.runs import Run

    ages = _ages("--staleness", staleness)
    runs = [Run.open(run, overrides or (), device), *(Run.open(folder, (), device) for folder in beside or ())]
    tables, files = evaluation(runs[0], split), []
    if isinstance(runs[0].model, Vista):
        measured, under_delivery = delivery(runs, split, ages)
        tables += under_delivery
        files += write_page(page, runs, measured, under_delivery) if page and under_delivery else []
    for table in tables:
        table.show()
    save_tables(run / "evaluation.json", tables)
    for file in [*files, *(draw(runs[0]) if pictures else ())]:
        print(file)


@app.command()
def score(
    run: RunFolder,
    user: Annotated[str, typer.Option(help="user id, as in the source of the data")] = "",
    items: Annotated[str, typer.Option(help="candidate ids, comma-separated")] = "",
    requests: Annotated[Path | None, typer.Option(help="CSV with user,item and context columns instead")] = None,
    output: Annotated[Path | None, typer.Option(help="CSV to write; the terminal by default")] = None,
    overrides: Overrides = None,
    device: Device = "cpu",
) -> None:
    """Score candidates from the store: user and candidate ids in, probabilities out."""
    from vista_ext.runs import Run
    from vista_ext.serve.requests import read_requests, score_requests, write_scores

    opened = Run.open(run, overrides or (), device)
    if requests is None and not (user and items):
        raise ValueError("score: expected --user and --items, or --requests, found neither")
    rows = read_requests(requests, opened.dataset) if requests else [(user, item, {}) for item in items.split(",")]
    write_scores(score_requests(opened, rows), opened.dataset.schema.tasks, output)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    models: Annotated[str, typer.Option(help="comma-separated")] = "vista,din,mean",
    seeds: Annotated[str, typer.Option(help="of weights, order and dropout; comma-separated")] = "0,1,2",
    seed_counts: Annotated[str, typer.Option(help="numbers of summary rows for vista, such as 2,8,32; drawn too")] = "",
) -> None:
    """Train several models with several seeds, everything else equal; prints the table as Markdown too."""
    from vista_ext.config import load_config
    from vista_ext.report.study import study as run_study
    from vista_ext.report.tables import markdown

    counts = _integers("--seed-counts", seed_counts) if seed_counts else []
    base = load_config(config, overrides or ())
    table = run_study(base, models.split(","), _integers("--seeds", seeds), seed_counts=counts)
    table.show()
    print(markdown(table))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    users: Annotated[int, typer.Option(help="users of the synthetic data")] = 2000,
    epochs: Annotated[int, typer.Option(help="passes over the training data")] = 6,
    seed: Annotated[int, typer.Option(help="of data and models")] = 0,
) -> None:
    """The whole job on synthetic data: train, summarize, store, score from the store in another process, report."""
    from vista_ext.demo import run_demo

    run_demo(folder, users=users, epochs=epochs, seed=seed)


@app.command()
def synth(
    target: Annotated[Path, typer.Argument(help="folder to make")],
    users: Annotated[int, typer.Option()] = 2000,
    items: Annotated[int, typer.Option()] = 1000,
    events_per_user: Annotated[int, typer.Option()] = 400,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make synthetic data whose labels depend on events long past; prints the AUC that can be reached."""
    from vista_ext.data.synthetic import make_synthetic

    print(make_synthetic(target, users=users, items=items, events_per_user=events_per_user, seed=seed))


Source = Annotated[Path, typer.Argument(help="folder as it was published")]
Target = Annotated[Path, typer.Argument(help="folder to make")]


@data_app.command()
def kuairand(source: Source, target: Target, valid_fraction: float = 0.1) -> None:
    """KuaiRand-Pure, the official CSV release or prepared Parquet splits."""
    from vista_ext.data.importers import import_kuairand

    import_kuairand(source, target, valid_fraction=valid_fraction)


@data_app.command()
def movielens(
    source: Source,
    target: Target,
    positive_rating: float = 4.0,
    test_fraction: float = 0.2,
    valid_fraction: float = 0.1,
) -> None:
    """MovieLens: the last ratings of each user are for testing."""
    from vista_ext.data.importers import import_movielens

    import_movielens(
        source,
        target,
        positive_rating=positive_rating,
        test_fraction=test_fraction,
        valid_fraction=valid_fraction,
    )


@data_app.command()
def amazon(source: Source, target: Target, name: str = "*", seed: int = 0) -> None:
    """Amazon reviews and metadata in DIN's form."""
    from vista_ext.data.importers import import_amazon

    import_amazon(source, target, name=name, seed=seed)


@data_app.command()
def generic(
    source: Annotated[Path, typer.Argument(help="a CSV or Parquet file")],
    target: Target,
    user: Annotated[str, typer.Option(help="column of the user id")],
    item: Annotated[str, typer.Option(help="column of the item id")],
    timestamp: Annotated[str, typer.Option(help="column of the time")],
    label: Annotated[list[str], typer.Option(help="task=column; repeat for more")],
    action: Annotated[str, typer.Option(help="column of the action")] = "",
    item_feature: Annotated[list[str] | None, typer.Option(help="name=column; repeat for more")] = None,
    context: Annotated[list[str] | None, typer.Option(help="name=column; repeat for more")] = None,
    split: Annotated[str, typer.Option(help="column of train, valid, test; by time per user without it")] = "",
    timestamp_unit: Annotated[str, typer.Option(help="s, ms, us or ns")] = "s",
    update: Annotated[
        bool, typer.Option("--update", help="replace the data set that is there; what it knows keeps its row numbers")
    ] = False,
) -> None:
    """Any log in one file, by the names of its columns."""
    from vista_ext.data.importers import import_generic

    import_generic(
        source,
        target,
        user=user,
        item=item,
        timestamp=timestamp,
        labels=_pairs("--label", label),
        action=action or None,
        item_features=_pairs("--item-feature", item_feature),
        context=_pairs("--context", context),
        split=split or None,
        timestamp_unit=timestamp_unit,
        update=update,
    )


def _pairs(option: str, values: list[str] | None) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or ()]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"{option} must look like name=column, found {name + equals + column!r}")
    return {name: column for name, _, column in pairs}


def _ages(option: str, text: str) -> list[Any]:
    from vista_ext.serve.staleness import Age

    try:
        return list(dict.fromkeys(map(Age.parse, text.split(","))))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _integers(option: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be integers, comma-separated, found {text!r}") from error
    if min(values) < 0:
        raise ValueError(f"{option} must be at least 0, found {min(values)}")
    return values


if __name__ == "__main__":
    main()
