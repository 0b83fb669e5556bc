"""Messages whose rows tell user and generation in every byte, and processes that are killed while they move them."""

import threading

import torch

from vista_ext.delivery import FeedConsumer, FeedProducer, deliver, encode
from vista_ext.store import LmdbStore, StoreSpec, Summaries

SPEC = StoreSpec("int8", 4, 128, model_version=3)


def rows_of(users, generations, spec=SPEC):
    users, generations = torch.as_tensor(users), torch.as_tensor(generations)
    pattern = torch.stack([users % 251, users // 251 % 251, generations % 251, generations // 251 % 251], 1)
    return pattern.to(torch.uint8).repeat(1, spec.row_bytes // 4)


def summaries_of(users, generation, version=SPEC.model_version, spec=SPEC):
    """Summaries with the generation as their event time."""
    users = torch.as_tensor(users, dtype=torch.int64)
    times = torch.full_like(users, generation)
    return Summaries(users, rows_of(users, times, spec), times, torch.full_like(users, version))


def messages_of(users, generation, version=SPEC.model_version, spec=SPEC):
    return encode(spec, summaries_of(users, generation, version, spec))


def content(store):
    """All of a store as {(user, version): event time}, each row checked against what it must be."""
    found = {}
    for batch in store:
        assert torch.equal(batch.rows, rows_of(batch.user_ids, batch.event_times, store.spec))
        columns = (batch.user_ids.tolist(), batch.versions.tolist(), batch.event_times.tolist())
        found |= {(user, version): when for user, version, when in zip(*columns, strict=True)}
    return found


def publish_for_ever(make_producer, report, first, shared, batch):
    """Publish users that come once and users that come in every generation; tell what was acknowledged."""
    with make_producer() as producer:
        for generation in range(first, first + 10**6):
            own = range(shared + generation * batch, shared + (generation + 1) * batch)
            report.send(("trying", generation))
            producer.publish(messages_of([*range(shared), *own], generation))
            report.send(("acknowledged", generation))


def consume_for_ever(make_consumer, path, working):
    with LmdbStore.open(path, readonly=False) as store, make_consumer() as consumer:
        deliver(consumer, SPEC, store, on_batch=lambda done, messages: working.set())


def from_feed(path, group):
    return FeedConsumer(LmdbStore.open(path, readonly=False), group, owns=True)


def into_feed(path):
    return FeedProducer(LmdbStore.open(path, readonly=False), owns=True)


def drain(consumer, store, idle=1.0):
    """Move what there is into a store."""
    return deliver(consumer, SPEC, store, idle_seconds=idle, stop=threading.Event())
