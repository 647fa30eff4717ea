"""The real openai and langchain-openai packages against a tiny base and two adapters, all in one
batch; what they get is what gRPC gives.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as LangChainOpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.server.http_api import serving_http
from tests.server.tiny_server import running_service, serving_grpc, write_folder

MODELS = ("tiny", "a0", "org/a1@v1")
PROMPT = "The quick brown fox"
MESSAGES = [
    {"role": "system", "content": "What is the name of the ship?"},
    {"role": "user", "content": "Hé"},
]
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served"))


@asynccontextmanager
async def server(folder, **base_options):
    """HTTP's API, a client of gRPC, and two adapters."""
    async with (
        running_service(folder, **base_options) as (service, _),
        serving_grpc(service) as grpc,
        serving_http(service) as api,
    ):
        for name, source in zip(MODELS[1:], ("a0", "a1"), strict=True):
            body = {"lora_name": name, "lora_path": source}
            assert (await api.post("/v1/load_lora_adapter", **body)).is_success
        yield api, grpc


def by_name(model: str) -> dict[str, dict[str, float]]:
    return {} if model == "tiny" else {"adapters": {model: 1.0}}


async def expected(grpc, **prompt) -> list[str]:
    given = GREEDY | {"ignore_eos": True}
    texts = (grpc.generate(**prompt, **given, **by_name(model)).text() for model in MODELS)
    return await asyncio.gather(*texts)


async def test_text_is_what_grpc_gives_whoever_asks(folder) -> None:
    async with server(folder) as (api, grpc):
        texts = await expected(grpc, text=PROMPT)
        chats = await expected(grpc, messages=MESSAGES)
        assert len({*texts, *chats}) == 6
        given = GREEDY | {"extra_body": {"ignore_eos": True}}
        url = f"{api.url}/v1"

        async def streamed(model: str) -> str:
            stream = await api.client.chat.completions.create(
                model=model, messages=MESSAGES, stream=True, **given
            )
            return "".join([part.choices[0].delta.content or "" async for part in stream])

        async def continued(model: str) -> str:
            found = await api.client.completions.create(model=model, prompt=PROMPT, **given)
            return found.choices[0].text

        async def responded(model: str) -> str:
            text = ""
            extra = {"extra_body": {"top_k": 0}, "temperature": 0, "max_output_tokens": 12}
            stream = await api.client.responses.create(
                model=model, input=MESSAGES[1:], instructions=MESSAGES[0]["content"], stream=True,
                **extra,
            )  # fmt: skip
            async for event in stream:
                text += event.delta if event.type == "response.output_text.delta" else ""
            assert event.type in ("response.completed", "response.incomplete")
            assert event.response.output_text == text
            return text

        def plain(model: str) -> str:
            with openai.OpenAI(base_url=url, api_key="none") as client:
                found = client.chat.completions.create(model=model, messages=MESSAGES, **given)
                return found.choices[0].message.content

        def lang_chat(model: str) -> str:
            chain = ChatOpenAI(base_url=url, api_key="none", model=model, **given)
            assert "".join(part.text for part in chain.stream(MESSAGES)) == (
                answer := chain.invoke(MESSAGES).text
            )
            return answer

        def lang_text(model: str) -> str:
            chain = LangChainOpenAI(base_url=url, api_key="none", model=model, **given)
            first, second = chain.batch([PROMPT, PROMPT])
            assert first == second == "".join(chain.stream(PROMPT))
            return first

        ways = [(streamed, chats), (continued, texts)]
        blocking = [(plain, chats), (lang_chat, chats), (lang_text, texts)]
        calls = [way(model) for way, _ in ways for model in MODELS]
        calls += [asyncio.to_thread(way, model) for way, _ in blocking for model in MODELS]
        found = await asyncio.gather(*calls)
        wanted = [text for _, each in [*ways, *blocking] for text in each]
        assert found == wanted
        stopping = [grpc.generate(messages=MESSAGES, **GREEDY, **by_name(m)).text() for m in MODELS]
        assert [await responded(m) for m in MODELS] == await asyncio.gather(*stopping)


async def test_an_answer_ends_before_a_stop_text(folder) -> None:
    async with server(folder) as (api, grpc):
        (text, *_) = await expected(grpc, text=PROMPT)
        stop = text[3:5]
        found = await api.client.completions.create(
            model="tiny", prompt=PROMPT, stop=[stop, "never"], **GREEDY
        )
        assert found.choices[0].text == text[: text.index(stop)]
        assert found.choices[0].finish_reason == "stop"


async def test_log_probabilities_are_those_of_transformers(folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    async with server(folder, quantization="none") as (api, _):
        given = {"model": "tiny", **GREEDY}
        text = await api.client.completions.create(prompt=PROMPT, logprobs=3, **given)
        chat = await api.client.chat.completions.create(
            messages=MESSAGES, logprobs=True, top_logprobs=3, **given
        )
        found = text.choices[0].logprobs
        prompt = tokenizer(PROMPT).input_ids
        wanted = greedy(model, prompt, 12)
        assert found.token_logprobs == pytest.approx([own for _, own, _ in wanted], abs=2e-4)
        for position, (token_id, _, top) in enumerate(wanted):
            named = {shown(tokenizer, other): value for other, value in top}
            assert found.top_logprobs[position] == pytest.approx(named, abs=2e-4)
            assert found.tokens[position] == shown(tokenizer, token_id)
        content = chat.choices[0].logprobs.content
        prompt = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=False
        )
        wanted = greedy(model, prompt, len(content))
        assert [each.logprob for each in content] == pytest.approx([w[1] for w in wanted], abs=2e-4)
        for each, (token_id, _, top) in zip(content, wanted, strict=True):
            assert each.token == shown(tokenizer, token_id)
            values = [other.logprob for other in each.top_logprobs]
            assert values == pytest.approx([value for _, value in top], abs=2e-4)
        joined = b"".join(bytes(each.bytes) for each in content)
        answer = chat.choices[0].message.content
        assert joined.removesuffix(b"<|im_end|>").decode(errors="replace") == answer


async def test_echo_scores_texts_as_harnesses_ask_for_it(folder) -> None:
    """lm-eval's way: token ids of several texts, echo, one token more, which it drops."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapters" / "a0")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = [PROMPT, "There was a storm in the night", "Hé 😀"]
    prompts = [tokenizer(text).input_ids for text in texts]
    async with server(folder, quantization="none") as (api, _):
        given = {"model": "a0", "temperature": 0, "echo": True, "logprobs": 1, "seed": 1}
        for prompt, count in ((texts, 1), (prompts, 1), (prompts, 0)):
            found = await api.client.completions.create(prompt=prompt, max_tokens=count, **given)
            for choice, text, ids in zip(found.choices, texts, prompts, strict=True):
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                own = [float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids))]
                assert choice.text.startswith(text)
                first, *rest = choice.logprobs.token_logprobs[: len(choice.logprobs.tokens) - count]
                assert first is None and rest == pytest.approx(own, abs=2e-4)
                best = [max(top.values()) for top in choice.logprobs.top_logprobs[1 : len(ids)]]
                assert best == pytest.approx(logprobs.max(-1).values[:-1].tolist(), abs=2e-4)
                assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
            assert found.usage.completion_tokens == 3 * count
        chat = await api.client.chat.completions.create(
            model="a0", messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 2}
        )
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert chat.prompt_logprobs[0] is None and len(chat.prompt_logprobs) == len(ids)
        for position, found in enumerate(chat.prompt_logprobs[1:]):
            own = found[str(ids[position + 1])]["logprob"]
            assert own == pytest.approx(float(logprobs[position, ids[position + 1]]), abs=2e-4)
            assert {entry["rank"] for entry in found.values()} >= {1, 2}


async def test_usage_tells_the_tokens_found_in_the_prefix_cache(folder) -> None:
    system = {"role": "system", "content": "Answer as the captain of the ship would. " * 6}
    messages = [system, {"role": "user", "content": "Hé"}]
    async with server(folder) as (api, grpc):
        client, given = api.client, {"model": "a0", "max_tokens": 2}
        ask = client.chat.completions.create
        cold = await ask(messages=messages, **given)
        assert cold.usage.prompt_tokens_details.cached_tokens == 0
        warm = await ask(messages=messages, n=3, **given)
        found = warm.usage.prompt_tokens_details.cached_tokens
        assert 0 < cold.usage.prompt_tokens - found <= 16
        for always in (False, True):
            usage = {"include_usage": True, "continuous_usage_stats": always}
            options = {"stream": True, "stream_options": usage}
            parts = [part async for part in await ask(messages=messages, **options, **given)]
            seen = [p.usage.prompt_tokens_details.cached_tokens for p in parts if p.usage]
            assert set(seen) == {found} and len(seen) == (len(parts) if always else 1)
        response = await client.responses.create(model="a0", input=messages, max_output_tokens=16)
        assert response.usage.input_tokens_details.cached_tokens == found
        of_base = await ask(messages=messages, **given | {"model": "tiny"})
        assert of_base.usage.prompt_tokens_details.cached_tokens == 0
        *_, event = [e async for e in grpc.generate(messages=messages, max_tokens=2, adapter="a0")]
        assert event.finished.usage.cached_tokens == found

        text = "There was a storm in the night. " * 8
        two = await client.completions.create(prompt=[text, "hi " + text], **given)
        assert two.usage.prompt_tokens_details.cached_tokens == 0
        two = await client.completions.create(prompt=[text, "hi " + text], **given)
        found = two.usage.prompt_tokens_details.cached_tokens
        assert 0 < two.usage.prompt_tokens - found <= 32
        scored = await client.completions.create(prompt=text, echo=True, logprobs=1, **given)
        assert scored.usage.prompt_tokens_details.cached_tokens == 0, "a scored prompt is computed"


async def test_several_outputs_are_those_of_grpc(folder) -> None:
    async with server(folder) as (api, grpc):
        drawn = {"n": 3, "max_tokens": 8, "seed": 7, "temperature": 0.9}
        wanted = await grpc.generate(text=PROMPT, ignore_eos=True, **drawn, **by_name("a0")).texts()
        given = {"model": "a0", **drawn, "extra_body": {"ignore_eos": True}}
        found = await api.client.completions.create(prompt=[PROMPT, PROMPT], **given)
        assert [choice.text for choice in found.choices] == [*wanted, *wanted]
        assert len(set(wanted)) == 3
        texts = [""] * 3
        async for part in await api.client.completions.create(prompt=PROMPT, stream=True, **given):
            texts[part.choices[0].index] += part.choices[0].text
        assert texts == list(wanted)


def greedy(model, prompt: list[int], count: int) -> list[tuple[int, float, list]]:
    """(token, its log probability, the three best) of each step."""
    steps, ids = [], list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = logprobs.topk(3)
        ids.append(int(logprobs.argmax()))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        steps.append((ids[-1], float(logprobs.max()), top))
    return steps


def shown(tokenizer, token_id: int) -> str:
    """A token's text; of a byte that is no character, its number."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    (written,) = tokenizer.convert_ids_to_tokens([token_id])
    return f"bytes:\\x{BYTE_OF[written]:02x}"


BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
