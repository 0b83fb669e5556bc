"""What a model is given: every part that does not fit is named, and nothing is read that need not be."""

from dataclasses import replace

import pytest
import torch

from python_tests.models.conftest import make_histories
from vista_ext.models import SummaryRanker, Vista, VistaConfig, build_model
from vista_ext.report import latency


@pytest.fixture
def model(world):
    torch.manual_seed(0)
    return Vista(world.schema, VistaConfig(recent_events=4), world.item_features).eval()


def test_bad_input_names_the_argument(world, model):
    summaries = model.summarize(world.histories)
    with pytest.raises(ValueError, match=r"summaries must be \[n, \d+, 64\], found \[5, 3, 64\]"):
        model.score(summaries[:, :3], world.candidates, world.kv_index, recent=world.histories)
    with pytest.raises(IndexError, match=r"kv_index must be in \[0, 4\], found 8"):
        model.score(summaries, world.candidates, world.kv_index + 4, recent=world.histories)
    with pytest.raises(ValueError, match="chunk must be at least 1, found 0"):
        model.encoder.summarizer.stream_(torch.zeros(0, 64), torch.tensor([0, 0]), 0)
    with pytest.raises(ValueError, match="chunk must be at least 1, found 0"):
        model.summarize(world.histories, chunk=0)
    with pytest.raises(ValueError, match="item_features must be int64"):
        Vista(world.schema, VistaConfig(), world.item_features[:5])
    with pytest.raises(ValueError, match=r"author must be in \[0, 7\), found 0 to 7"):
        Vista(world.schema, VistaConfig(), torch.arange(101)[:, None] % 8)
    with pytest.raises(ValueError, match="model must be one of vista, mean, din, found 'sasrec'"):
        build_model("sasrec", world.schema, VistaConfig())


def test_recent_events_must_be_given(world):
    model = Vista(world.schema, VistaConfig(recent_events=3), world.item_features).eval()
    with pytest.raises(ValueError, match="recent must be histories"):
        model.score(model.summarize(world.histories), world.candidates, world.kv_index)


HISTORIES = {
    "short actions": ({"actions": lambda x: x[:-1]}, r"histories\.actions must be integers \[346\], found .*\[345\]"),
    "float timestamps": ({"timestamps": torch.Tensor.float}, r"timestamps must be integers \[346\], found .*32"),
    "short now": ({"now": lambda x: x[:4]}, r"histories\.now must be integers \[5\], found torch.int64 \[4\]"),
    "an event beyond": ({"seq_offsets": lambda x: x - (x == 346).long()}, r"offsets must go from 0 to 346, .* to 345"),
    "a late start": ({"seq_offsets": lambda x: x.clamp(min=2)}, r"offsets must go from 0 to 346, .* 2 to 346"),
    "a step back": ({"seq_offsets": lambda x: x[[0, 2, 1, 4, 3, 5]]}, r"offsets must not decrease, found a step of -3"),
    "no offsets": ({"seq_offsets": lambda x: x[:0]}, r"seq_offsets must be integers \[n \+ 1\], found \[0\]"),
    "longer than said": ({"max_seq_len": lambda x: 299}, r"max_seq_len must be at least the longest, 300, found 299"),
    "an action": ({"actions": lambda x: x + (torch.arange(346) == 9).long() * 9}, r"actions must be in \[0, 2\]"),
    "an item": ({"items": lambda x: x - 101}, r"items must be in \[0, 100\], found -"),
}  # fmt: skip
CANDIDATES = {
    "a candidate beyond": ({"offsets": lambda x: x.clamp(max=14)}, r"offsets must go from 0 to 15, .* 0 to 14"),
    "longer than said": ({"max_len": lambda x: 4}, r"candidates\.max_len must be at least the longest, 5, found 4"),
    "short context": ({"context": lambda x: x[1:]}, r"candidates\.context must be integers \[15, 1\], .*\[14, 1\]"),
    "no columns": ({"context": lambda x: x[:, :0]}, r"candidates\.context must have 1 columns, found 0"),
    "a context": ({"context": lambda x: x + 3}, r"candidates\.context: tab must be in \[0, 2\], found [345]"),
    "an item": ({"items": lambda x: x + 100}, r"items must be in \[0, 100\], found"),
}  # fmt: skip


def changed(value, changes):
    return replace(value, **{name: change(getattr(value, name)) for name, change in changes.items()})


@pytest.mark.parametrize("name", ["vista", "din", "mean"])
@pytest.mark.parametrize("case", HISTORIES)
def test_histories_that_do_not_fit(world, name, case):
    changes, message = HISTORIES[case]
    wrong = changed(world.histories, changes)
    model = build_model(name, world.schema, VistaConfig(recent_events=400), world.item_features).eval()
    with pytest.raises((ValueError, IndexError), match=message):
        model(wrong, world.candidates, world.kv_index)
    if name == "vista":
        with pytest.raises((ValueError, IndexError), match=message):
            model.summarize(wrong)
        for scorer in (model.score, SummaryRanker.from_vista(model)):
            with pytest.raises((ValueError, IndexError), match=message):
                scorer(model.summarize(world.histories), world.candidates, world.kv_index, recent=wrong)


@pytest.mark.parametrize("name", ["vista", "din", "mean"])
@pytest.mark.parametrize("case", CANDIDATES)
def test_candidates_that_do_not_fit(world, name, case):
    changes, message = CANDIDATES[case]
    wrong = changed(world.candidates, changes)
    model = build_model(name, world.schema, VistaConfig(), world.item_features).eval()
    with pytest.raises((ValueError, IndexError), match=message):
        model(world.histories, wrong, world.kv_index)
    if name == "vista":
        summaries = model.summarize(world.histories)
        for scorer in (model.score, SummaryRanker.from_vista(model)):
            with pytest.raises((ValueError, IndexError), match=message):
                scorer(summaries, wrong, world.kv_index)


@pytest.mark.parametrize("name", ["vista", "din", "mean"])
def test_kv_index_that_does_not_fit(world, name):
    model = build_model(name, world.schema, VistaConfig(), world.item_features).eval()
    with pytest.raises(ValueError, match=r"kv_index must be integers \[6\], found torch.int64 \[5\]"):
        model(world.histories, world.candidates, world.kv_index[1:])
    for index, found in ((world.kv_index + 1, 5), (world.kv_index - 1, -1)):
        with pytest.raises(IndexError, match=rf"kv_index must be in \[0, 4\], found {found}"):
            model(world.histories, world.candidates, index)


def test_recent_of_other_users(world, model):
    with pytest.raises(ValueError, match="recent must be histories of 5 users, found 2"):
        model.score(model.summarize(world.histories), world.candidates, world.kv_index, recent=make_histories([3, 4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_summaries_of_another_precision(world, model, dtype):
    summaries = model.summarize(world.histories).to(dtype)
    for scorer in (model.score, SummaryRanker.from_vista(model).eval()):
        found = scorer(summaries, world.candidates, world.kv_index, recent=world.histories)
        expected = scorer(summaries.float(), world.candidates, world.kv_index, recent=world.histories)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_only_the_newest_events_are_embedded(world, model):
    summaries = model.summarize(world.histories)
    for scorer in (model, SummaryRanker.from_vista(model).eval()):
        embedded = []
        scorer.events.register_forward_hook(lambda _module, _inputs, out, to=embedded: to.append(len(out)))
        score = scorer.score if scorer is model else scorer
        found = score(summaries, world.candidates, world.kv_index, recent=world.histories)
        assert embedded == [4 + 0 + 1 + 4 + 4]
        cut = score(summaries, world.candidates, world.kv_index, recent=world.histories.suffix(4))
        assert torch.equal(found, cut)


def test_latency_is_measured_with_what_serving_keeps(model, monkeypatch):
    given = []
    score = latency.score

    def listening(*args):
        given.append(len(args[-1].items))
        return score(*args)

    monkeypatch.setattr(latency, "score", listening)
    latency.measure(model, lengths=(3, 500), candidates=5, repeats=1)
    assert set(given) == {3, 4}
