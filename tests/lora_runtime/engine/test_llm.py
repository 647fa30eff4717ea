"""The front door in this process: what it gives is the engine's, and mistakes name their field."""

import asyncio
import json
import math
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from lora_runtime.config import (
    AdapterConfig,
    BaseConfig,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from lora_runtime.core import FinishReason, SamplingParams, StructuredOutput, StructureKind
from lora_runtime.engine.llm import LLM
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    ConfigError,
    InvalidRequest,
    PromptTooLong,
    Unavailable,
)
from lora_runtime.text.tokenizer import Tokenizer
from tests.driver import greedy, run, tiny_engine
from tests.peft_adapters import write_adapter
from tests.tiny import lengthen, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer
from tests.tool_templates import QWEN3

PROMPTS = ["The quick brown fox", "What is the name of the ship", "the sun"]
NAMES = ["a", "b", None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    write_tokenizer(tiny_checkpoint(folder / "base"))
    for seed, name in enumerate("ab"):
        write_adapter(tiny_model("llama"), folder / name, seed=seed, scale=3.0)
    shutil.copytree(folder / "a", folder / "own-template")
    template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    (folder / "own-template" / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    config = EngineConfig(
        base=BaseConfig(model=str(folder / "base"), dtype="float32"),
        cache=CacheConfig(block_size=4, num_blocks=200),
        adapters=AdapterConfig(pool_bytes=8 << 20),
    )
    with LLM(adapters={name: folder / name for name in "ab"}, config=config) as llm:
        yield llm


def test_a_mixed_batch_gives_what_the_engine_gives_each_alone(llm, folder):
    answers = llm.generate(PROMPTS, adapter=NAMES, max_tokens=12, temperature=0.0, ignore_eos=True)
    tokenizer = Tokenizer.load(folder / "base")
    for prompt, name, answer in zip(PROMPTS, NAMES, answers, strict=True):
        engine = tiny_engine(llm._engine.base, poison=False)
        digest = name and engine.load_adapter(folder / name).digest
        trace = run(engine, [greedy("1", tokenizer.encode(prompt), digest, 12)])["1"]
        assert list(answer.token_ids) == trace.token_ids
        assert answer.text == tokenizer.decode(trace.token_ids)
        assert answer.finish_reason is FinishReason.LENGTH and answer.error is None
    assert len({answer.token_ids for answer in answers}) == 3


def test_a_mistake_is_raised_before_anything_runs(llm):
    for field, arguments in [
        ("prompts", {"prompts": "one text"}),
        ("adapter", {"prompts": PROMPTS, "adapter": ["a"]}),
        ("sampling.temperature", {"prompts": PROMPTS, "temperature": -1.0}),
        ("prompts", {"prompts": [["neither", "of", "both"]]}),
        ("prompts", {"prompts": [[1] * 900]}),
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            llm.generate(**arguments)
        assert refusal.value.field == field
    with pytest.raises(AdapterNotFound, match="'c' is not loaded; loaded: 'a', 'b'"):
        llm.generate(PROMPTS, adapter="c")
    assert llm._engine.is_idle


def test_what_a_server_refuses_is_refused_here_too(llm):
    nine = {f"n{index}": 0.1 for index in range(9)}
    for field, arguments in [
        ("adapters", {"adapter": nine}),
        ("adapters[0].weight", {"adapter": {"a": 1e9}}),
        ("adapters[0].weight", {"adapter": {"a": float("nan")}}),
        ("adapters[0].weight", {"adapter": {"a": "0.5"}}),
        ("adapters[0].weight", {"adapter": {"a": True}}),
        ("adapter", {"adapter": 5}),
        ("adapter", {"adapter": [["a"]] * 3}),
        ("stop", {"stop": "zq"}),
        ("stop", {"stop": None}),
        ("sampling.stop[0]", {"stop": [""]}),
        ("sampling.stop[1]", {"stop": ["x", 5]}),
        ("sampling.stop[0]", {"stop": ["x" * 257]}),
        ("sampling.stop", {"stop": ["x"] * 17}),
        ("ignore_eos", {"ignore_eos": "no"}),
        ("sampling.presence_penalty", {"presence_penalty": 3.0}),
        ("sampling.repetition_penalty", {"repetition_penalty": "much"}),
        ("sampling.logit_bias", {"logit_bias": [5]}),
        ("sampling.logit_bias", {"logit_bias": {"5": 1.0}}),
        ("sampling.logit_bias", {"logit_bias": {5: "1"}}),
        ("sampling.logit_bias", {"logit_bias": {10**9: 1.0}}),
        ("sampling.prompt_logprobs", {"num_prompt_logprobs": 21}),
        ("sampling.n", {"n": 0}),
        ("sampling.n", {"n": 129}),
        ("sampling.n", {"n": True}),
        ("sampling.n", {"n": "2"}),
        ("logprobs", {"logprobs": 2}),
        ("sampling.max_tokens", {"max_tokens": 2.5}),
        ("sampling.max_tokens", {"max_tokens": True}),
        ("sampling.max_tokens", {"max_tokens": None}),
        ("sampling.temperature", {"temperature": "hot"}),
        ("sampling.top_k", {"top_k": 2.5}),
        ("sampling.seed", {"seed": 1.5}),
        ("sampling.logprobs", {"num_logprobs": 1.5}),
        ("sampling.stop_token_ids", {"stop_token_ids": [5.5]}),
        ("sampling.stop_token_ids", {"stop_token_ids": 5}),
        ("prompts", {"prompts": {"a": 1}}),
        ("prompts", {"prompts": [1, 2, 3]}),
        ("prompts", {"prompts": None}),
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            llm.generate(**{"prompts": PROMPTS, **arguments})
        assert refusal.value.field == field, arguments
    assert llm._engine.is_idle


def test_two_sources_of_one_setting_are_refused(folder):
    config = EngineConfig(base=BaseConfig(model=str(folder / "base")))
    for name, value in [("base", "x"), ("quantization", "int8"), ("dtype", "bfloat16"),
                        ("device", "cpu")]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name} stands beside config") as refusal:
            LLM(**{name: value}, config=config)
        assert refusal.value.field == name
    with pytest.raises(ConfigError, match="device is 'gpu'; it must be auto, cpu"):
        LLM(folder / "base", device="gpu")


def test_the_first_of_several_outputs_is_that_of_one(llm):
    """And the others are repeated by the seed, and differ."""
    options = dict(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    one, several, again = (
        llm.generate(PROMPTS, adapter=NAMES, n=n, **options) for n in (1, 16, 16)
    )
    assert several == again
    for alone, first in zip(one, several, strict=True):
        assert first.token_ids == alone.token_ids and alone.others == ()
        everyone = {first.token_ids, *(other.token_ids for other in first.others)}
        assert len(first.others) == 15 and len(everyone) == 16
        assert all(len(other.text) > 0 and other.error is None for other in first.others)
    assert llm._engine.is_idle


def test_penalties_biases_and_prompt_logprobs_come_through(llm):
    options = dict(max_tokens=8, temperature=0.0, ignore_eos=True)
    (banned,) = llm.generate(PROMPTS[:1], logit_bias={9: 100}, num_prompt_logprobs=1, **options)
    assert banned.token_ids == (9,) * 8
    num_tokens = len(llm._tokenizer.encode(PROMPTS[0]))
    assert [len(entry.top) for entry in banned.prompt_logprobs] == [1] * (num_tokens - 1)
    (varied,) = llm.generate(
        PROMPTS[:1], logit_bias={9: 2}, repetition_penalty=100.0, presence_penalty=2.0, **options
    )
    assert len(set(varied.token_ids)) > 4


def test_outputs_keep_to_a_form(llm):
    form = {"regex": "[a-c]{2,4}!"}
    answers = llm.generate(
        ["The quick"] * 3, adapter=["a", "b", None], structured_output=form, seed=1, n=2
    )
    texts = [one.text for answer in answers for one in (answer, *answer.others)]
    assert len(texts) == 6 and all(re.fullmatch(form["regex"], text) for text in texts)
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["a"], structured_output={"regex": "(?=a)"})
    assert caught.value.field == "sampling.structured_output.regex"


def test_each_prompt_may_have_a_form_of_its_own(llm):
    options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    digits = StructuredOutput(StructureKind.REGEX, "[0-9]{3}")
    forms = (None, {"regex": "[a-c]{2}!"}, digits, {"choice": ["yes", "no"]})
    prompts, adapters = ["The quick"] * 4, ["a", "b", None, "a"]
    answers = llm.generate(prompts, adapter=adapters, structured_output=forms, **options)
    (free,) = llm.generate(prompts[:1], adapter="a", **options)
    assert answers[0] == free
    for answer, text in zip(answers[1:], ("[a-c]{2}!", "[0-9]{3}", "yes|no"), strict=True):
        assert re.fullmatch(text, answer.text), answer.text


def test_a_prompt_s_wrong_form_is_that_prompt_s_alone(llm):
    prompts = ["a", "b", "c"]
    forms = [{"regex": "x"}, {"regx": "x"}, "x"]
    answers = llm.generate(prompts, structured_output=forms, max_tokens=4, return_errors=True)
    assert [answer.text for answer in answers] == ["x", "", ""]
    for answer, told in zip(answers[1:], ("has regx", "is 'x'; it must be"), strict=True):
        assert isinstance(answer.error, InvalidRequest) and told in answer.error.message
        assert answer.error.field == "sampling.structured_output"
    with pytest.raises(InvalidRequest, match="has regx") as caught:
        llm.generate(prompts, structured_output=forms)
    assert caught.value.__notes__ == ["prompts[1]"]
    for wrong in (forms[:2], [], "x", b"x", {"regx": "x"}, 3):
        with pytest.raises(InvalidRequest) as caught:  # of all prompts
            llm.generate(prompts, structured_output=wrong, return_errors=True)
        assert caught.value.field == "sampling.structured_output"


def test_prompts_may_come_one_by_one(llm):
    options = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
    assert llm.generate(iter(PROMPTS), **options) == llm.generate(PROMPTS, **options)


def test_any_number_of_prompts_may_come_at_once(folder):
    """More than the queue has places, of which one caller may hold three quarters."""
    config = EngineConfig(
        base=BaseConfig(model=str(folder / "base"), quantization="none"),
        scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_queued_requests=4),
    )
    with LLM(config=config) as few:
        answers = few.generate(["abc"] * 13, max_tokens=3, temperature=0.0)
    assert len({answer.token_ids for answer in answers}) == 1 and len(answers) == 13


def test_names_may_be_looked_at_while_another_thread_loads_one(llm, folder):
    seen, is_over = [], threading.Event()

    def look():
        while not is_over.is_set():
            seen.append(set(llm.adapters))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the threads take turns often, and neither waits long for its own
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for _ in range(30):
                llm.load("late", folder / "a")
                llm.unload("late")
        finally:
            is_over.set()
            sys.setswitchinterval(interval)
        looking.result()
    assert all(names - {"late"} == {"a", "b"} for names in seen)


def test_an_adapter_that_is_not_invoked_is_said(folder, llm):
    write_adapter(tiny_model("llama"), folder / "alora", seed=7, alora_invocation_tokens=[7, 8])
    llm.load("alora", folder / "alora")
    try:
        prompts = [[5, 7, 8, 6], [5, 6]]
        invoked, not_invoked = llm.generate(prompts, adapter="alora", max_tokens=1)
    finally:
        llm.unload("alora")
    assert invoked.notes == ()
    assert "'alora' was not invoked" in not_invoked.notes[0]


def test_a_bad_prompt_disturbs_nobody_in_its_batch(llm):
    options = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    alone = llm.generate(PROMPTS, adapter=NAMES, **options)
    vocab_size = llm.info.base.vocab_size
    batch = [PROMPTS[0], [vocab_size], PROMPTS[1], "", [1] * 900, PROMPTS[2], "x"]
    names = ["a", None, "b", "a", None, None, "nobody"]
    odd = [None, 5, b"bytes", [True], [2**70], [-1], [1.0], {"role": "user"}, [{"role": []}]]
    batch, names = batch + odd, names + [None] * len(odd)
    batch, names = [*batch, "x", "x"], [*names, 7, {"a": "much"}]
    found = llm.generate(batch, adapter=names, return_errors=True, **options)
    assert [found[index] for index in (0, 2, 5)] == alone
    bad = [found[index] for index in (1, 3, 4, 6)]
    assert all(one.finish_reason is FinishReason.ERROR and not one.token_ids for one in bad)
    kinds = [InvalidRequest, InvalidRequest, PromptTooLong, AdapterNotFound]
    assert [type(one.error) for one in bad] == kinds
    assert all(isinstance(one.error, InvalidRequest) for one in found[7:])
    llm._engine.check_integrity()


def test_an_adapters_own_template_makes_its_prompt(llm, folder):
    chat = [{"role": "user", "content": "the fox"}]
    options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    llm.load("own", folder / "own-template")
    try:
        own, base_text = llm.generate([chat, chat], adapter=["own", "a"], **options)
        (upper,) = llm.generate(["THE FOX"], adapter="a", **options)
        assert own == upper != base_text

        async def in_an_event_loop():
            return llm.generate([chat], adapter="own", **options)

        assert asyncio.run(in_an_event_loop()) == [upper]
        with pytest.raises(InvalidRequest, match="bring different text"):
            llm.generate([chat], adapter={"own": 0.5, "b": 0.5})
    finally:
        llm.unload("own")


def test_weights_and_stop_texts(llm):
    options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    base, none, whole = llm.generate(
        [PROMPTS[0]] * 3, adapter=[None, {"a": 0.0}, {"a": 1.0}], **options
    )
    assert none == base != whole
    stop = whole.text[4:7]
    (stopped,) = llm.generate([PROMPTS[0]], adapter="a", stop=[stop], **options)
    assert stopped.text == whole.text.partition(stop)[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert llm._engine.is_idle


def test_names(llm, folder, tmp_path):
    with pytest.raises(AdapterExists):
        llm.load("a", folder / "b")
    shutil.copytree(folder / "a", tmp_path / "broken")
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps({**config, "new": 1}))
    with pytest.raises(AdapterRefused) as refusal:
        llm.load("broken", tmp_path / "broken")
    assert refusal.value.field == "new" and set(llm.adapters) == {"a", "b"}
    digest = llm.load("again", folder / "a").digest
    llm.unload("again")
    assert llm.adapters["a"].digest == digest and llm.generate(["x"], adapter="a", max_tokens=1)
    with pytest.raises(AdapterNotFound):
        llm.unload("again")


def test_a_closed_one_says_so(folder):
    config = EngineConfig(
        base=BaseConfig(model=str(folder / "base")), cache=CacheConfig(num_blocks=16)
    )
    with LLM(config=config) as closed:
        pass
    with pytest.raises(Unavailable, match="closed"):
        closed.generate(["x"])


def test_an_option_that_is_none_is_named_with_the_nearest(llm):
    for given, meant in [("max_new_tokens", "max_tokens"), ("temprature", "temperature")]:
        with pytest.raises(InvalidRequest, match=f"{given} is no option .*'{meant}'") as caught:
            llm.generate(PROMPTS, **{given: 1})
        assert caught.value.field == given


def test_adapters_without_names_are_refused_before_the_base_is_loaded(folder):
    with pytest.raises(ConfigError, match="mapping of names to folders"):
        LLM("no such base", adapters=[folder / "a"])


ABSURD = [10**30, 2**63, -1, 1e308, math.nan, "4", None, True, [1], 1 << 20_000]
SERVED = [
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "num_logprobs",
    "num_prompt_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "stop_token_ids", "structured_output",
]  # fmt: skip


def test_absurd_values_of_a_request_are_refused_by_name_or_answered(llm):
    assert set(SERVED) == set(SamplingParams.__dataclass_fields__)
    for name in SERVED:
        for value in ABSURD:
            given = {"max_tokens": 2} | {name: value}
            try:
                (answer,) = llm.generate(["x"], **given)
            except InvalidRequest as error:
                assert error.field and name.removeprefix("num_") in error.field, (name, value)
                assert len(str(error)) < 500
            else:
                assert len(answer.token_ids) <= 512
    for weight in ABSURD:
        try:
            llm.generate(["x"], adapter={"a": weight}, max_tokens=1)
        except InvalidRequest as error:
            assert "weight" in error.field
    for token_ids in [[10**30], [2**63], [-1], [1 << 20_000]]:
        with pytest.raises(InvalidRequest):
            llm.generate([token_ids], max_tokens=1)


@pytest.mark.parametrize("path", [None, 3, "", b"a", ["a"]])
def test_what_is_no_path_is_named(llm, path):
    with pytest.raises(InvalidRequest, match="path of the adapter's folder") as caught:
        llm.load("new", path)
    assert caught.value.field == "folder" and "new" not in llm.adapters


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_conversations_call_tools_and_think(tmp_path):
    tags = ("<think>", "</think>")
    write_tokenizer(tiny_checkpoint(tmp_path / "base"), chat_template=QWEN3, more_special=tags)
    lengthen(tmp_path / "base")
    config = EngineConfig(
        base=BaseConfig(model=str(tmp_path / "base"), dtype="float32"),
        cache=CacheConfig(block_size=16, num_blocks=200),
    )
    user = {"role": "user", "content": "What is the weather?"}
    begin, end = range(3, 5)
    with LLM(config=config) as llm:
        straight = {"template_variables": {"enable_thinking": False}}
        options = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 400, **straight}
        (answer,) = llm.generate([[user]], **options, n=2, parallel_tool_calls=False, seed=1)
        for one in (answer, *answer.others):
            (call,) = one.tool_calls
            jsonschema.validate(json.loads(call.arguments), TOOL["function"]["parameters"])
            assert one.finish_reason is FinishReason.TOOL_CALLS
            assert not one.text.strip() and not one.reasoning
        turn = {"role": "assistant", "tool_calls": [call.as_message()]}
        reply = {"role": "tool", "content": "12 degrees", "tool_call_id": call.id}
        llm.generate([[user, turn, reply]], tools=[TOOL], max_tokens=1)

        form = {"structured_output": {"choice": ["yes", "no"]}, "max_tokens": 100, "seed": 1}
        (thinks,) = llm.generate([[user]], **form, logit_bias={begin: 100, end: 4})
        (none,) = llm.generate([[user]], **form, **straight)
        assert thinks.reasoning and {thinks.text, none.text} <= {"yes", "no"} and not none.reasoning

        for wrong, field in [
            ({"tools": ["weather"]}, "tools"),
            ({"tools": [TOOL], "tool_choice": "clock"}, "messages.tool_choice"),
            ({"tool_choice": "required"}, "messages.tool_choice"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                llm.generate([[user]], **wrong)
            assert caught.value.field == field
        with pytest.raises(InvalidRequest, match="no conversation"):
            llm.generate(["The"], tools=[TOOL])
