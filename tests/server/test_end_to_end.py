"""Nothing faked: a tiny NF4 base, adapters of the real peft, the engine, gRPC over a socket."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_runtime.adapters.files.folder import TENSORS_FILE
from lora_runtime.adapters.parity import PARITY_FILE
from lora_runtime.errors import (
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceRefused,
    AdapterTooLarge,
    BaseMismatch,
    InvalidRequest,
    ParityFailed,
)
from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import make_tokenizer, ragged_data, run
from tests.peft_adapters import write_adapter
from tests.server.tiny_server import NUM_ADAPTERS, running, write_folder
from tests.tiny import tiny_base, tiny_model

NUM_STREAMS = 200
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served"))


async def collect(client, index: int, adapter: str | None = None, **options) -> tuple[int, ...]:
    """One stream's tokens; it must end with exactly one terminal message, the last."""
    stream = client.generate(f"number {index}", adapter=adapter, **options, **GREEDY)
    events = [event async for event in stream]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.count("finished") == 1 and kinds[-1] == "finished" and kinds[0] == "started"
    return tuple(token for event in events for token in event.delta.token_ids)


async def test_200_streams_over_8_adapters_while_others_come_and_go(folder) -> None:
    names = [None, *(f"a{index}" for index in range(NUM_ADAPTERS))]
    async with running(folder) as (client, engine):
        for name in names[1:]:
            await client.load_adapter(name, name)
        alone = {name: await collect(client, 7, name) for name in names}
        assert len(set(alone.values())) == len(names), "every adapter must act"

        async def churn() -> int:
            for count in range(6):
                await client.load_adapter("guest", "a3")
                await collect(client, 7, "guest")
                await client.unload_adapter("guest", wait=count % 2 == 0)
                with pytest.raises(AdapterNotFound):
                    await collect(client, 7, "guest")
            return count

        jobs = [collect(client, 7, names[i % len(names)]) for i in range(NUM_STREAMS)]
        *streams, _ = await asyncio.gather(*jobs, churn())
        for index, tokens in enumerate(streams):
            assert tokens == alone[names[index % len(names)]]
        in_flight = asyncio.create_task(collect(client, 7, "a5"))
        await asyncio.sleep(0.02)
        await client.unload_adapter("a5")
        with pytest.raises(AdapterNotFound):
            await collect(client, 7, "a5")
        assert await in_flight == alone["a5"]


async def test_compositions_and_salts_in_one_batch(folder) -> None:
    """Parts of one adapter add up to it, and salts change who shares work, never a result."""
    async with running(folder) as (client, engine):
        for name, source in (("x", "a1"), ("twin", "a1"), ("y", "a6")):
            await client.load_adapter(name, source)
        alone = {name: await collect(client, 3, name) for name in ("x", "y", None)}
        expected = [
            ({"x": 0.25, "twin": 0.75}, alone["x"]),
            ({"x": 0.0}, alone[None]),
            ({"x": 0.0, "y": 1.0}, alone["y"]),
            ({"y": 2.0, "x": 1.0}, await collect(client, 3, adapters={"x": 1.0, "y": 2.0})),
        ]
        streams = await asyncio.gather(
            *(
                collect(client, 3, adapters=weights, cache_salt=salt)
                for weights, _ in expected
                for salt in ("", "tenant a", "tenant b")
            )
        )
        assert streams == [tokens for _, tokens in expected for _ in range(3)]
        assert expected[-1][1] not in alone.values()
        await client.unload_adapter("twin")
        with pytest.raises(AdapterNotFound) as caught:
            await collect(client, 3, adapters={"x": 1.0, "twin": 1.0})
        assert caught.value.field == "adapters[1].name"


async def test_variants_say_what_they_are_and_what_they_did(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    adapters, model = tmp_path / "adapters", tiny_model("llama")
    write_adapter(model, adapters / "alora", seed=1, alora_invocation_tokens=[11, 12, 13])
    write_adapter(model, adapters / "deep", seed=2, layer_replication=[[0, 2], [1, 3]])
    shutil.copytree(adapters / "a0", adapters / "shouts")
    template = "{% for m in messages %}{{ m['content'] | upper }}!{% endfor %}"
    (adapters / "shouts" / "chat_template.jinja").write_text(template)
    async with running(tmp_path) as (client, engine):
        for name in ("alora", "deep", "shouts", "a0"):
            await client.load_adapter(name, name)
        alora, deep = await client.get_adapter("alora"), await client.get_adapter("deep")
        assert list(alora.invocation_tokens) == [11, 12, 13] and alora.num_layers == 0
        assert deep.num_layers == 4 and not deep.has_chat_template

        async def ask(prompt: list[int], **options) -> tuple[list[str], list[int]]:
            stream = client.generate(token_ids=prompt, **options, **GREEDY)
            events = [event async for event in stream]
            tokens = [token for event in events for token in event.delta.token_ids]
            return list(events[0].started.notes), tokens

        plain, invoked = [5, 6, 7, 8], [5, 6, 7, 11, 12, 13, 8]
        (note,), tokens = await ask(plain, adapter="alora")
        assert "'alora' was not invoked" in note and tokens == (await ask(plain))[1]
        notes, tokens = await ask(invoked, adapter="alora")
        assert notes == [] and tokens != (await ask(invoked))[1]
        with pytest.raises(InvalidRequest) as caught:
            await ask(plain, adapters={"deep": 1, "a0": 1})
        assert caught.value.field == "adapters"
        chat = [{"role": "user", "content": "ahoy"}]
        rendered = {
            name: await client.generate(messages=chat, adapter=name, **GREEDY).text()
            for name in ("shouts", "a0")
        }
        assert rendered["shouts"] == await client.generate("AHOY!", adapter="a0", **GREEDY).text()
        assert rendered["shouts"] != rendered["a0"]


async def test_what_our_trainer_made_is_uploaded_behind_the_parity_gate(folder, tmp_path) -> None:
    """Uploading acts as loading does; a changed effect is refused and nothing of it is kept."""
    unit = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4), max_steps=6,
                      learning_rate=2e-2)  # fmt: skip
    base = tiny_base("llama")
    (result,) = run(base, make_tokenizer(tmp_path), tmp_path / "out", [unit])
    assert (result.folder / PARITY_FILE).exists()
    weaker = shutil.copytree(result.folder, tmp_path / "weaker")
    tensors = load_file(weaker / TENSORS_FILE)
    with safe_open(weaker / TENSORS_FILE, framework="pt") as opened:
        facts = opened.metadata()
    halved = {k: t / 2 if "lora_B" in k else t for k, t in tensors.items()}
    save_file(halved, weaker / TENSORS_FILE, metadata=facts)
    shutil.copytree(result.folder, folder / "adapters" / "by-path")
    kept = folder / "store" / "adapters"
    async with running(folder) as (client, _):
        with pytest.raises(ParityFailed):
            await client.upload_adapter("u", weaker)
        assert list(kept.iterdir()) == [] == list((folder / "store" / "incoming").iterdir())
        info, other, *_ = await asyncio.gather(
            client.upload_adapter("u", result.folder),
            client.upload_adapter("a", folder / "adapters" / "a0"),
            *(collect(client, index) for index in range(8)),
        )
        by_path = (await client.load_adapter("v", "by-path")).adapter
        assert info.digest == by_path.digest != other.digest and len(list(kept.iterdir())) == 2
        assert await collect(client, 1, "u") == await collect(client, 1, "v")
        assert await collect(client, 1, "u") != await collect(client, 1)
        replaced = await client.upload_adapter("u", folder / "adapters" / "a1", replace=True)
        assert (await client.rollback_adapter("u")).digest == info.digest != replaced.digest
        assert await collect(client, 1, "u") == await collect(client, 1, "v")


async def test_an_adapters_own_text_is_uploaded_and_acts(folder, tmp_path) -> None:
    """Its end tokens end its outputs, its tokens make its prompts, and mixtures must choose."""
    source = shutil.copytree(folder / "adapters" / "a2", tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.save_pretrained(source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    greedy = {"temperature": 0.0, "max_tokens": 12}

    async def ask(client, **options) -> tuple[int, ...]:
        events = [event async for event in client.generate(**greedy, **options)]
        return tuple(token for event in events for token in event.delta.token_ids)

    async with running(folder) as (client, _):
        await client.load_adapter("plain", "a2")
        plain = await ask(client, token_ids=[5, 6, 7], adapter="plain", ignore_eos=True)
        end = next(token for token in plain[1:] if token != plain[0])
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
        info = await client.upload_adapter("own", source)
        assert info.num_in_flight == 0 and not info.has_chat_template
        ended = await ask(client, token_ids=[5, 6, 7], adapter="own")
        assert ended == plain[: plain.index(end) + 1]
        base_ends = await ask(client, token_ids=[5, 6, 7], adapter="own", base_text=True)
        assert base_ends == await ask(client, token_ids=[5, 6, 7], adapter="plain")
        shouted = await ask(client, text="NUMBER", adapter="own", ignore_eos=True)
        assert shouted == await ask(client, text="number", adapter="plain", ignore_eos=True)
        assert shouted != await ask(client, text="NUMBER", adapter="plain", ignore_eos=True)
        both = {"own": 0.5, "plain": 0.5}
        with pytest.raises(InvalidRequest, match="base_text"):
            await ask(client, text="NUMBER", adapters=both)
        mixed = await ask(client, text="NUMBER", adapters=both, base_text=True)
        assert mixed == await ask(client, text="NUMBER", adapter="plain")


async def test_leaving_a_stream_frees_its_row(folder) -> None:
    async with running(folder) as (client, engine):
        stream = client.generate("endless", temperature=0.0, max_tokens=400, ignore_eos=True)
        async for event in stream:
            if event.delta.token_ids:
                stream.cancel()
                break
        for _ in range(100):
            if not engine.stats().num_running:
                break
            await asyncio.sleep(0.02)
        assert engine.stats().num_running == 0 and engine.stats().kv_blocks_used == 0


BAD_REQUESTS = {
    "unknown adapter": (dict(text="x", adapter="nobody"), AdapterNotFound, None),
    "one of two is unknown": (
        dict(text="x", adapters={"good": 1, "nobody": 1}),
        AdapterNotFound,
        "adapters[1].name",
    ),
    "weight out of range": (
        dict(text="x", adapters={"good": 1e9}),
        InvalidRequest,
        "adapters[0].weight",
    ),
    "salt too long": (dict(text="x", cache_salt="s" * 129), InvalidRequest, "cache_salt"),
    "empty adapter name": (dict(text="x", adapter=""), InvalidRequest, "adapters[0].name"),
    "prompt too long": (dict(token_ids=[5] * 600), InvalidRequest, "token_ids"),
    "empty prompt": (dict(text=""), InvalidRequest, "text"),
    "temperature < 0": (dict(text="x", temperature=-1.0), InvalidRequest, "sampling.temperature"),
    "max_tokens 0": (dict(text="x", max_tokens=0), InvalidRequest, "sampling.max_tokens"),
    "max_tokens too large": (
        dict(text="x", max_tokens=9999),
        InvalidRequest,
        "sampling.max_tokens",
    ),
    "token id outside": (dict(token_ids=[9999]), InvalidRequest, "token_ids"),
    "stop token outside": (
        dict(text="x", min_tokens=1, stop_token_ids=[1_000_000]),
        InvalidRequest,
        "sampling.stop_token_ids",
    ),
    "too many stop tokens": (
        dict(text="x", stop_token_ids=range(5000)),
        InvalidRequest,
        "sampling.stop_token_ids",
    ),
    "min_tokens above max_tokens": (
        dict(text="x", min_tokens=5),
        InvalidRequest,
        "sampling.min_tokens",
    ),
    "top_k beyond 31 bits": (dict(text="x", top_k=2**32 - 1), InvalidRequest, "sampling.top_k"),
    "logprobs 21": (dict(text="x", logprobs=21), InvalidRequest, "sampling.logprobs"),
    "temperature NaN": (
        dict(text="x", temperature=float("nan")),
        InvalidRequest,
        "sampling.temperature",
    ),
}


def edit_config(folder, old: str, new: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(old, new, 1))


def edit_tensors(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def other_base(folder) -> None:
    path = folder / "adapter_model.safetensors"
    metadata = {"format": "pt", "loramux.base_fingerprint": "0" * 64}
    save_file(load_file(path), path, metadata=metadata)


def link_out(folder) -> None:
    shutil.move(folder, folder.parents[1] / "outside")
    folder.symlink_to(folder.parents[1] / "outside")


def enlarge(folder) -> None:
    shutil.rmtree(folder)
    write_adapter(tiny_model("llama"), folder, seed=1, r=200)


BAD_ADAPTERS = {
    "folder missing": (shutil.rmtree, AdapterSourceRefused),
    "truncated safetensors": (truncate, AdapterRefused),
    "wrong shapes": (lambda f: edit_tensors(f, lambda t: t[:, :-1].contiguous()), AdapterRefused),
    "non-finite weights": (lambda f: edit_tensors(f, lambda t: t.fill_(torch.nan)), AdapterRefused),
    "wrong base": (other_base, BaseMismatch),
    "unknown config key": (lambda f: edit_config(f, "{", '{"frobnicate": 3,'), AdapterRefused),
    "a pickle file": (only_pickle, AdapterRefused),
    "a symlink out": (link_out, AdapterSourceRefused),
    "larger than the pool": (enlarge, AdapterTooLarge),
}


async def test_bad_input_is_typed_and_disturbs_nothing_else(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    async with running(tmp_path) as (client, engine):
        await client.load_adapter("good", "a0")
        expected = await collect(client, 7, "good")
        bystander = asyncio.create_task(collect(client, 7, "good"))
        for name, (arguments, error, field) in BAD_REQUESTS.items():
            with pytest.raises(error) as caught:
                await client.generate(**{"max_tokens": 4, **arguments}).text()
            assert field is None or caught.value.field == field, name
        for name, (spoil, error) in BAD_ADAPTERS.items():
            source = tmp_path / "adapters" / "bad"
            shutil.copytree(tmp_path / "adapters" / "a1", source, dirs_exist_ok=True)
            spoil(source)
            with pytest.raises(error) as caught:
                await client.load_adapter("bad", "bad")
            assert str(tmp_path) not in caught.value.message, name
            with pytest.raises(AdapterNotFound):
                await collect(client, 7, "bad")
            source.unlink() if source.is_symlink() else shutil.rmtree(source, ignore_errors=True)
        with pytest.raises(AdapterSourceRefused):
            await client.load_adapter("escape", "../base")
        assert await bystander == expected == await collect(client, 7, "good")
        assert engine.stats().resident_adapters and len(engine.stats().resident_adapters) == 1
