"""The service without its processes: answers, degradation, limits, overload, metrics."""

import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from python_tests.servers import RedisServer
from vista_ext import ops
from vista_ext._extras import MissingExtraError
from vista_ext.models import Candidates, FeatureSchema, Vista, VistaConfig
from vista_ext.runs import Run
from vista_ext.serve import worker
from vista_ext.serve.export import LiveModel
from vista_ext.serve.requests import score_requests
from vista_ext.serve.service import Service, create_app, serve
from vista_ext.serve.settings import load_service_config, open_store, store_address
from vista_ext.serve.worker import LateStore, Settings
from vista_ext.store import LmdbStore, RedisConfig, RedisStore, StoreError, StoreSpec
from vista_ext.yaml_config import ConfigError

UNKNOWN = 10**12
VALID = {"requests": [{"user": 3, "items": [1, 2, 50]}, {"user": UNKNOWN, "items": [4]}]}


class Held(ThreadPoolExecutor):
    """An executor whose calls wait until they are let go."""

    let_go = threading.Event()

    def submit(self, function, *arguments):
        def later():
            if function is worker.work:
                self.let_go.wait(20)
            return function(*arguments)

        return super().submit(later)


@pytest.fixture
def start(trained, stored):
    """Starts a service in this process; gives its application."""
    services, workers = [], []

    def starting(*overrides, store=stored, executor=ThreadPoolExecutor):
        config = load_service_config(None, ["limits.timeout=20", *overrides])
        settings = Settings(str(trained), str(store), config)
        service = Service(config, lambda: executor(1, initializer=worker.configure, initargs=(settings,)))
        services.append(service)
        service.start()
        workers.append(worker._worker)
        return create_app(service)

    yield starting
    for service in services:
        service.stop()
    for made in workers:
        made.store.close()


@asynccontextmanager
async def client(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        yield http


def call(app, *bodies, path="/score"):
    """The answers to bodies that are sent together."""

    async def calls():
        async with client(app) as http:
            posts = [http.post(path, content=b if isinstance(b, bytes) else json.dumps(b)) for b in bodies]
            return await asyncio.gather(*posts)

    return asyncio.run(calls())


def get(app, path):
    async def getting():
        async with client(app) as http:
            return await http.get(path)

    return asyncio.run(getting())


def metrics(app):
    families = text_string_to_metric_families(get(app, "/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_scores(start, trained, stored):
    run = Run.open(trained)
    items = [run.dataset.item_sources[i - 1] for i in (1, 2, 50)]
    run.config.store.path = str(stored)
    expected = score_requests(run, [(run.dataset.user_sources[3], item, {}) for item in items])
    (answer,) = call(start(), VALID)
    assert answer.status_code == 200
    found = answer.json()
    known, unknown = found["results"]
    assert torch.allclose(torch.tensor(known["scores"]), torch.tensor([row for _, _, row in expected]), atol=1e-6)
    assert known["event_time"] == int(run.dataset.end_of_events(3)) and not known["degraded"]
    assert unknown["degraded"] and unknown["reason"] == "unknown_user" and unknown["event_time"] is None
    assert len(unknown["scores"]) == 1 and 0 < unknown["scores"][0][0] < 1
    assert found["model_version"] == run.store_spec().model_version and found["tasks"] == list(run.dataset.schema.tasks)


def test_health_ready_and_schema(start):
    app = start()
    assert get(app, "/health").json() == {"alive": True}
    assert get(app, "/ready").json()["ready"] is True
    assert (
        "requests"
        in get(app, "/openapi.json").json()["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]["properties"]
    )


def test_what_is_no_route_is_an_error_like_others(start):
    app = start()
    for path, status, message in (("/nope", 404, "Not Found"), ("/score", 405, "Method Not Allowed")):
        answer = get(app, path)
        assert answer.status_code == status and answer.json() == {"error": message}
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("user", [-(2**63), 2**63 - 1])
def test_extreme_ids_and_no_candidates(start, user):
    (answer,) = call(start(), {"requests": [{"user": user, "items": []}, {"user": 1, "items": []}]})
    assert [result["scores"] for result in answer.json()["results"]] == [[], []]


BAD = {
    "malformed": (b'{"requests": [', 422, "Invalid JSON"),
    "not UTF-8": (b"\xff\xfe", 422, "Invalid JSON"),
    "empty": (b"", 422, "Invalid JSON"),
    "a list": (b"[]", 422, "body: Input should be an object"),
    "no requests": ({"requests": []}, 422, "requests: List should have at least 1 item"),
    "no items": ({"requests": [{"user": 1}]}, 422, "requests.0.items: Field required"),
    "a float": ({"requests": [{"user": 1.0, "items": [1]}]}, 422, "requests.0.user: Input should be a valid integer"),
    "a string": ({"requests": [{"user": "1", "items": [1]}]}, 422, "requests.0.user: Input should be a valid integer"),
    "a bool": ({"requests": [{"user": 1, "items": [True]}]}, 422, "requests.0.items.0: Input should be a valid int"),
    "65 bits": ({"requests": [{"user": 2**63, "items": [1]}]}, 422, "requests.0.user: Input should be less than"),
    "huge": (b'{"requests": [{"user": 1' + b"0" * 400 + b', "items": []}]}', 422, "requests.0.user: Input should be"),
    "item": (
        {"requests": [{"user": 1, "items": [1, 51]}]},
        422,
        "requests.0.items: expected ids from 0 to 50, found 51",
    ),
    "negative": (
        {"requests": [{"user": 1, "items": [-1]}]},
        422,
        "requests.0.items: expected ids from 0 to 50, found -1",
    ),
    "key": ({"requests": [{"user": 1, "items": [1], "age": 3}]}, 422, "requests.0.age: Extra inputs"),
    "context": ({"requests": [{"user": 1, "items": [1], "context": {"hour": 1}}]}, 422, "found 'hour'"),
    "too many": ({"requests": [{"user": 1, "items": [1] * 600}] * 2}, 413, "candidates of a call must be at most 1000"),
    "too many users": (
        {"requests": [{"user": 1, "items": []}] * 9},
        413,
        "requests of a call must be at most 8, found 9",
    ),
    "too large": (b" " * 20_001, 413, "the body must be at most 20000 bytes"),
}


@pytest.fixture
def limited(start):
    return start("limits.candidates=1000", "limits.requests=8", "limits.body_bytes=20000")


def test_bad_calls_are_named(limited):
    for body, status, message in BAD.values():
        (answer,) = call(limited, body)
        assert answer.status_code == status and message in answer.json()["error"], (body, answer.text)
    assert call(limited, VALID)[0].status_code == 200


def test_an_unknown_user_can_be_an_error(start):
    (answer,) = call(start("policy.unknown_user=raise"), VALID)
    assert answer.status_code == 404 and answer.json()["error"] == f"unknown_user: 1 users, such as {UNKNOWN}"


def make_store(path, spec, times, versions=None):
    """A store with the users from 0 on, of given event times."""
    rows = ops.quantize_rows(torch.randn(len(times), spec.tokens, spec.dim), scheme=spec.scheme)
    with LmdbStore.create(path, spec) as store:
        store.insert(torch.arange(len(times)), rows, torch.tensor(times))


@pytest.mark.parametrize("choice", ["accept", "default", "raise"])
def test_old_and_other_summaries(start, trained, tmp_path, choice):
    spec = Run.open(trained).store_spec()
    now = int(time.time())
    make_store(tmp_path / "old", spec, [now - 10, now - 5000])
    make_store(tmp_path / "other", StoreSpec(spec.scheme, spec.tokens, spec.dim, spec.group, 5), [now])
    body = {"requests": [{"user": 0, "items": [1]}, {"user": 1, "items": [1]}]}
    (answer,) = call(start(f"policy.expired={choice}", "policy.max_age=3600", store=tmp_path / "old"), body)
    if choice == "raise":
        assert answer.status_code == 503 and "expired: 1 users, such as 1" in answer.text
    else:
        new, old = answer.json()["results"]
        assert not new["degraded"] and new["event_time"] == now - 10
        assert old["reason"] == "expired" and old["event_time"] == (now - 5000 if choice == "accept" else None)
    (answer,) = call(start(f"policy.other_version={choice}", store=tmp_path / "other"), body)
    if choice == "raise":
        assert answer.status_code == 503 and "other_version: 1 users, such as 0" in answer.text
    else:
        (other, unknown) = answer.json()["results"]
        assert other["reason"] == "other_version" and unknown["reason"] == "unknown_user"
        assert other["event_time"] == (now if choice == "accept" else None)
        assert (other["scores"] == unknown["scores"]) == (choice == "default")


@pytest.fixture
def contextual(tmp_path):
    """A model with context features and two tasks, and a worker that serves it to user 0."""
    torch.manual_seed(0)
    model = Vista(FeatureSchema(50, 3, {}, {"tab": 3, "hour": 24}, ("click", "like")), VistaConfig()).eval()
    spec = StoreSpec("int4", model.config.num_seeds, model.config.dim, model_version=3)
    live = LiveModel(SimpleNamespace(vista=model, store_spec=lambda: spec, device="cpu"))
    make_store(tmp_path / "store", spec, [1000])
    config = load_service_config()
    store = LateStore(spec, lambda: open_store(str(tmp_path / "store"), spec, config.redis))
    yield model, worker.Worker(live, store, config)
    store.close()


def test_context(contextual):
    model, serving = contextual
    one = {"user": 0, "items": [7, 8], "context": {"hour": [5, 23], "tab": 2}}
    reply = serving.answer(
        json.dumps({"requests": [one, {"user": 0, "items": [9]}, {"user": 1, "items": []}]}).encode()
    )
    found = [torch.tensor(result["scores"]) for result in json.loads(reply.body)["results"]]
    rows = serving.cache.find(torch.tensor([0])).rows
    spec = serving.manifest.spec
    summaries = ops.dequantize_rows(rows, spec.tokens, spec.dim, scheme=spec.scheme)
    context = torch.tensor([[2, 5], [2, 23], [0, 0]])
    candidates = Candidates(torch.tensor([0, 2, 3]), 2, torch.tensor([7, 8, 9]), context)
    with torch.no_grad():
        expected = model.score(summaries, candidates, torch.tensor([0, 0])).sigmoid()
    assert torch.allclose(torch.cat(found[:2]), expected, atol=1e-6) and len(found[2]) == 0
    assert reply.candidates == 3 and reply.reasons == {"unknown_user": 1}


@pytest.mark.parametrize(
    "context, message",
    {
        "minute": ({"minute": 1}, r"requests.0.context: expected ['tab', 'hour'], found 'minute'"),
        "kind": ({"tab": "1"}, "requests.0.context.tab: expected an integer, or one for each item"),
        "bool": ({"tab": True}, "requests.0.context.tab: expected an integer, or one for each item"),
        "length": ({"tab": [1]}, "requests.0.context.tab: expected an integer, or one for each item"),
        "range": ({"tab": [0, 3]}, "requests.0.context.tab: expected ids from 0 to 2, found 3"),
        "huge": ({"hour": 10**300}, "requests.0.context.hour: expected ids from 0 to 23"),
    }.values(),
)
def test_bad_context_is_named(contextual, context, message):
    reply = contextual[1].answer(json.dumps({"requests": [{"user": 0, "items": [1, 2], "context": context}]}).encode())
    assert reply.status == 422 and json.loads(reply.body)["error"].startswith(message)


def test_a_megabyte_of_mistakes_is_soon_refused(contextual):
    """Not one error for each, which would keep a worker busy for seconds."""
    begin = time.process_time()
    for body in (
        b'{"requests": [' + b"1," * 400_000 + b"1]}",
        b'{"requests": [{"user": 1, "items": [' + b'"",' * 300_000 + b"1]}]}",
        json.dumps({"requests": [{"user": 1, "items": [], "context": {f"{i}": "" for i in range(80_000)}}]}).encode(),
        b"[" * 1_000_000,
        b'{"requests": [{"user": ' + b"9" * 1_000_000 + b"}]}",
    ):
        assert contextual[1].answer(body).status == 422
    assert time.process_time() - begin < 2


def test_broken_bytes_of_a_call_are_an_answer(contextual):
    call, draw = {"user": -12345, "items": [7, 8], "context": {"hour": [5, 23], "tab": 2}}, random.Random(0)
    text, statuses = json.dumps({"requests": [call, {"user": 0, "items": [9]}]}).encode(), Counter()
    for _ in range(500):
        broken = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(broken))
            broken[at] = draw.choice([broken[at] ^ (1 << draw.randrange(8)), draw.choice(b'0-9e[]{},:"\x00\xff')])
        reply = contextual[1].answer(bytes(broken)[: draw.choice([None, None, draw.randrange(len(text))])])
        statuses[reply.status] += 1
        assert reply.status in (200, 422), broken
        json.loads(reply.body)
    assert statuses[200] > 3 and statuses[422] > 200


def test_a_score_that_is_not_finite_is_an_error(contextual):
    serving = contextual[1]
    serving.stage2.program.ranker.head.mlp[-1].bias.fill_(float("nan"))
    assert serving.answer(b'{"requests": [{"user": 0, "items": [1]}]}').status == 500


@pytest.fixture
def redis(tmp_path):
    server = RedisServer(tmp_path / "redis")
    yield server
    server.stop()


def test_the_store_goes_down_and_comes_back(start, trained, redis):
    spec, now = Run.open(trained).store_spec(), int(time.time())
    rows = ops.quantize_rows(torch.randn(2, spec.tokens, spec.dim), scheme=spec.scheme)
    with RedisStore.create(RedisConfig(redis.url), spec) as store:
        store.insert(torch.tensor([1, 2]), rows, torch.tensor([now, now]))
    app = start("cache.refresh_after=0", "cache.retry_after=0", store=redis.url)

    def reasons():
        (answer,) = call(app, {"requests": [{"user": 1, "items": [1, 2]}, {"user": 2 + reasons.up, "items": [3]}]})
        assert answer.status_code == 200
        return [result["reason"] for result in answer.json()["results"]]

    reasons.up = 1
    assert reasons() == [None, "unknown_user"]
    redis.stop()
    reasons.up = 0
    assert reasons() == ["stale", "store_unavailable"]  # of which the cache has the first
    redis.start()
    with RedisStore.create(RedisConfig(redis.url), spec) as store:
        store.insert(torch.tensor([1, 2]), rows, torch.tensor([now, now]))
    assert reasons() == [None, None]
    counted = metrics(app)
    assert counted["vista_cache_failures_total",] == 1 and counted["vista_cache_stale_total",] == 1
    assert counted["vista_degraded_users_total", "store_unavailable"] == 1


def test_a_service_without_a_store_does_not_start(start, tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        start(store=tmp_path / "nowhere")


def test_a_store_that_is_down_from_the_beginning(start, trained, redis):
    redis.stop()
    body = {"requests": [{"user": 1, "items": [1]}]}
    (answer,) = call(start(store=redis.url), body)
    assert answer.status_code == 200 and answer.json()["results"][0]["reason"] == "store_unavailable"
    (answer,) = call(start("policy.store_unavailable=raise", store=redis.url), body)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"


def test_overload_is_refused_at_once(start):
    Held.let_go.clear()
    app = start("limits.waiting=2", executor=Held)
    threading.Timer(1.5, Held.let_go.set).start()
    answers = call(app, *[VALID] * 20)
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) == 3 and codes.count(429) == 17
    assert all(answer.headers["Retry-After"] == "1" for answer in answers if answer.status_code == 429)
    counted = metrics(app)
    assert counted["vista_rejected_total", "overload"] == 17 and counted["vista_open_calls",] == 0


def test_a_call_that_would_be_answered_too_late_is_refused(start):
    app, quick = start("limits.timeout=1"), worker._worker.stage2

    def slow(*arguments):
        time.sleep(0.2)
        return quick(*arguments)

    worker._worker.stage2 = slow
    call(app, VALID)
    codes = Counter(answer.status_code for answer in call(app, *[VALID] * 15))
    assert codes[503] <= 1 and 2 <= codes[200] <= 5 and codes[429] >= 10


def test_a_call_that_takes_too_long_is_given_up(start):
    Held.let_go.clear()
    app = start("limits.timeout=0.2", "limits.waiting=2", executor=Held)
    begin = time.monotonic()
    answers = call(app, VALID, VALID)
    assert time.monotonic() - begin < 5
    for answer in answers:
        assert answer.status_code == 503 and answer.json()["error"] == "no answer within 0.2 seconds"
        assert answer.headers["Retry-After"] == "1"
    assert get(app, "/health").status_code == 200
    Held.let_go.set()
    while metrics(app)["vista_open_calls",]:
        time.sleep(0.01)
    counted = metrics(app)
    assert counted["vista_rejected_total", "timeout"] == 2 and counted["vista_candidates_total",] == 0


def test_metrics(start):
    app = start()
    for _ in range(3):
        call(app, VALID)
    call(app, b"")
    counted = metrics(app)
    assert counted["vista_calls_total", "200"] == 3 and counted["vista_calls_total", "422"] == 1
    assert counted["vista_candidates_total",] == 12 and counted["vista_degraded_users_total", "unknown_user"] == 3
    assert counted["vista_cache_hits_total",] == 2 and counted["vista_cache_misses_total",] == 4
    assert counted["vista_cache_evictions_total",] == 0 and counted["vista_cache_users",] == 1
    assert counted["vista_cache_read_seconds_count",] == 3 and counted["vista_cache_read_seconds_bucket", "+Inf"] == 3
    assert counted["vista_call_seconds_count",] == 4 and counted["vista_work_seconds_count",] == 4
    assert counted["vista_ready",] == 1


BAD_CONFIGS = {
    "workers=0": "workers must be a finite number above 0, found 0",
    "limits.timeout=.nan": "limits.timeout must be a finite number above 0, found nan",
    "limits.waiting=-1": "limits.waiting must be a finite number at least 0",
    "port=65536": "port must be at most 65535, found 65536",
    "cache.slots=10": "limits.requests must be at most 10, found 64",
    "policy.unknown_user=accept": "policy.unknown_user must be one of raise, default, found 'accept'",
    "policy.surprise=1": "policy.surprise",
}


@pytest.mark.parametrize("override", BAD_CONFIGS)
def test_bad_configurations_are_named(override):
    with pytest.raises(ConfigError, match=BAD_CONFIGS[override].replace(".", r"\.")):
        load_service_config(None, [override])


def test_the_extra_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"'uvicorn' is needed here .*pip install '\.\[serve\]'"):
        serve(Settings(str(trained), "", load_service_config()))


def test_where_a_store_is(tmp_path, monkeypatch):
    config, spec = load_service_config().redis, StoreSpec("int8", 2, 8)
    with pytest.raises(ValueError, match="credentials belong into the environment") as caught:
        open_store("redis://me:secret@host:1/0", spec, config)
    assert "secret" not in str(caught.value)
    with pytest.raises(StoreError, match="nowhere"):
        open_store(str(tmp_path / "nowhere"), spec, config)
    monkeypatch.delenv("VISTA_REDIS_URL", raising=False)
    with pytest.raises(ValueError, match="expected a folder or a URL"):
        store_address("", None)
    assert store_address("", tmp_path) == str(tmp_path) and store_address("a", tmp_path) == "a"
    monkeypatch.setenv("VISTA_REDIS_URL", "redis://127.0.0.1:1/0")
    assert store_address("", None) == ""
