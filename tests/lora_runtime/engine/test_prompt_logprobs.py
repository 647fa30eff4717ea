"""Log probabilities of prompts against one plain forward of transformers and peft, however the
engine cuts the prompt up.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import MAX_PROMPT_LOGPROBS, AdapterUse, Request, SamplingParams
from lora_runtime.engine import batch
from lora_runtime.errors import AdapterFailed, InvalidRequest
from tests.driver import greedy, run
from tests.lora_runtime.engine.mixed_batch import prompt, with_adapters
from tests.peft_adapters import four_adapters, load_in_peft, write_adapter
from tests.tiny import dense_twin, tiny_base

TOLERANCE = 2e-4
LENGTHS = [1, 2, 9, 40, 61, 17, 33]
NUM_TOP = [0, 20, 3, None, 5, 1, 0]


class Setting:
    """A base whose output layer is adapted too, and what every request must be told."""

    def __init__(self, folder):
        self.base = tiny_base("qwen3")
        twin = dense_twin(self.base, "qwen3")
        folders = four_adapters(twin, folder)[1:3]
        folders.append(
            write_adapter(twin, folder / "head", seed=9, target_modules=["lm_head", "q_proj"])
        )
        self.forms = [load_adapter(f, self.base.spec, self.base.weights) for f in folders]
        models = [twin, *(load_in_peft(twin, f) for f in folders)]
        self.owners = [index % len(models) for index in range(len(LENGTHS))]
        self.expected = {}
        for request, owner in zip(self.requests(), self.owners, strict=True):
            ids = torch.tensor([request.prompt_token_ids])
            with torch.no_grad():
                logits = models[owner](ids, use_cache=False).logits[0].double()
            self.expected[request.request_id] = logits.log_softmax(1)

    def requests(self):
        """Some rows ask for them, others stand beside."""
        digests = [None, *(form.digest for form in self.forms)]
        found = []
        for index, (length, num_top) in enumerate(zip(LENGTHS, NUM_TOP, strict=True)):
            tokens = prompt(length, seed=index)
            request = greedy(str(index), tokens, digests[self.owners[index]], 12)
            sampling = replace(request.sampling, num_prompt_logprobs=num_top)
            found.append(replace(request, sampling=sampling))
        return found

    def check(self, traces):
        for request in self.requests():
            given = traces[request.request_id].prompt_logprobs
            num_top = request.sampling.num_prompt_logprobs
            if num_top is None:
                assert given == []
                continue
            (entries,) = given
            expected = self.expected[request.request_id]
            assert len(entries) == len(request.prompt_token_ids) - 1
            for position, entry in enumerate(entries):
                row, token = expected[position], request.prompt_token_ids[position + 1]
                assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
                assert len(entry.top) == num_top
                values = [value for _, value in entry.top]
                largest = row.topk(num_top).values.tolist()
                assert values == pytest.approx(largest, abs=TOLERANCE)
                own = [float(row[token_id]) for token_id, _ in entry.top]
                assert own == pytest.approx(values, abs=TOLERANCE)
                assert len({token_id for token_id, _ in entry.top}) == num_top


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    ("num_tokens", "max_scored", "num_blocks"), [(7, 3, 400), (32, 5, 50), (600, 128, 400)]
)
def test_they_are_those_of_one_plain_forward(
    setting, monkeypatch, steps_ahead, num_tokens, max_scored, num_blocks
):
    """In odd chunks, beside other rows, with a warm prefix cache, and after preemption."""
    monkeypatch.setattr(batch, "MAX_SCORED", max_scored)
    engine = with_adapters(
        setting.base,
        setting.forms,
        steps_ahead=steps_ahead,
        max_num_seqs=len(LENGTHS),
        max_num_batched_tokens=num_tokens,
        num_blocks=num_blocks,
    )
    plain = [
        replace(r, sampling=replace(r.sampling, num_prompt_logprobs=None))
        for r in setting.requests()
    ]
    expected = {key: trace.token_ids for key, trace in run(engine, plain).items()}
    hits = engine.blocks.num_prefix_hits
    traces = run(engine, setting.requests())
    setting.check(traces)
    assert {key: trace.token_ids for key, trace in traces.items()} == expected
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 50)
    if num_blocks == 400:  # only the row that asks for none begins behind what is cached
        assert engine.blocks.num_prefix_hits - hits == 36
        hits = engine.blocks.num_prefix_hits
        run(engine, plain)
        assert engine.blocks.num_prefix_hits - hits > 100, "their blocks are offered to others"


def test_each_group_of_scored_tokens_is_bounded(setting, monkeypatch):
    """Whatever the prompt's length, logits of few positions are there at a time."""
    sizes, logits = [], type(setting.base).logits

    def recorded(base, states):
        sizes.append(len(states))
        return logits(base, states)

    monkeypatch.setattr(type(setting.base), "logits", recorded)
    sampling = SamplingParams(max_tokens=1, num_prompt_logprobs=0)
    long = Request(request_id="r", prompt_token_ids=tuple(prompt(500)), sampling=sampling)
    engine = with_adapters(setting.base, [], max_num_batched_tokens=512)
    assert len(run(engine, [long])["r"].prompt_logprobs[0]) == 499
    assert sizes == [1, 128, 128, 128, 115]


def test_a_prompt_whose_logits_are_not_finite_fails_its_own_row(setting):
    uses = (AdapterUse(digest=setting.forms[0].digest, weight=1e30),)
    request = setting.requests()[4]
    bad = replace(request, request_id="bad", adapters=uses)
    engine = with_adapters(setting.base, setting.forms, max_num_batched_tokens=20)
    traces = run(engine, [bad, *setting.requests()])
    assert isinstance(traces["bad"].error, AdapterFailed) and not traces["bad"].prompt_logprobs
    setting.check(traces)


def test_more_than_a_message_holds_is_refused(setting):
    sampling = SamplingParams(max_tokens=1, num_prompt_logprobs=20)
    request = Request(request_id="r", prompt_token_ids=(5,) * 400, sampling=sampling)
    engine = with_adapters(setting.base, [])
    engine.add_request(request)
    assert MAX_PROMPT_LOGPROBS > 400 * 21
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_runtime.engine.engine.MAX_PROMPT_LOGPROBS", 400 * 21 - 1)
        with pytest.raises(InvalidRequest, match="at most 19 are") as caught:
            engine.add_request(replace(request, request_id="s"))
    assert caught.value.field == "sampling.prompt_logprobs"
