"""`loramux chat` over a real socket; JSON for programs; what a shell completes."""

from __future__ import annotations

import asyncio
import builtins
import json
import re

import pytest
from typer.testing import CliRunner

from lora_runtime.errors import RequestFailed
from loramux.server.cli import app, main
from loramux.server.cli.chat import Conversation, converse
from loramux.server.client import Client
from loramux.v1 import generation_pb2


@pytest.fixture
def talk(monkeypatch):
    """Run a command with lines as its input, while the server's loop goes on."""

    async def run(world, *arguments: str, lines: tuple[str, ...] = ()):
        monkeypatch.setenv("LORAMUX_ADDRESS", world.target)
        said = "".join(f"{line}\n" for line in lines)
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), input=said)

    return run


def asked(world) -> list[str]:
    """The prompts that the engine saw."""
    return [bytes(request.prompt_token_ids).decode() for request in world.engine.seen]


async def test_turns_follow_each_other_until_reset(serve, talk):
    async with serve() as world:
        lines = ("Hi", "", "and?", "/reset", "new", "/quit", "never")
        result = await talk(world, "chat", "--max-tokens", "4", "--system", "Be brief", lines=lines)
    assert result.exit_code == 0, result.output
    assert asked(world) == [
        "<system>Be brief<user>Hi",
        "<system>Be brief<user>Hi<assistant><sys<user>and?",
        "<system>Be brief<user>new",
    ]
    assert result.stdout == "<sys\n" * 3 and result.stderr == ""


async def test_adapters_and_system_message_change_in_the_middle(serve, talk):
    async with serve() as world:
        await world.load("pirate", "p")
        await world.load("haiku", "h")
        lines = (
            "one",
            "/adapter pirate haiku=0.5",
            "two",
            "/adapter ghost",
            "/adapter haiku=x",
            "three",
            "/adapter",
            "/system Be kind",
            "four",
            "/nonsense",
            "/help",
        )
        result = await talk(world, "chat", "--max-tokens", "3", lines=lines)
        digests = {a.name: a.digest for a in await world.client.list_adapters()}
    assert result.exit_code == 0, result.output
    used = [{use.digest: use.weight for use in request.adapters} for request in world.engine.seen]
    both = {digests["pirate"]: 1.0, digests["haiku"]: 0.5}
    assert used == [{}, both, both, {}]
    assert asked(world)[2].startswith("<user>one<assistant><us<user>two<assistant>")
    assert asked(world)[3] == "<system>Be kind<user>four"
    assert "ghost" in result.stderr and "the weight must be a number" in result.stderr
    assert "/nonsense is no command" in result.stderr and "/system [TEXT]" in result.stderr


async def test_a_turn_that_fails_leaves_no_trace_and_the_talk_goes_on(serve, talk, monkeypatch):
    async with serve() as world:
        world.engine.failure = RequestFailed("as the test says")
        said = Conversation.say

        def mend(self, text):
            said(self, text)
            world.engine.failure = None

        monkeypatch.setattr(Conversation, "say", mend)
        result = await talk(world, "chat", "--max-tokens", "3", lines=("bad", "good"))
    assert result.exit_code == 0
    assert asked(world)[1] == "<user>good"
    assert result.stderr.startswith("error: ")
    assert result.stdout.endswith("<us\n")


async def test_an_unknown_adapter_or_no_server_ends_it_at_once(serve, talk):
    async with serve() as world:
        result = await talk(world, "chat", "--adapter", "ghost", lines=("Hi",))
        assert result.exit_code == 1 and "ghost" in result.stderr and world.engine.seen == []
    result = await talk(world, "chat", lines=("Hi",))
    assert result.exit_code == 1 and "no server" in result.stderr


async def test_on_a_terminal_ctrl_c_ends_an_answer_and_then_the_talk(serve, monkeypatch, capsys):
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        if len(prompts) == 3:
            raise KeyboardInterrupt
        return f"turn {len(prompts)}"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", typed)
    async with serve() as world:
        await world.load("pirate", "p")

        def body() -> None:
            with Client(world.target) as client:
                talk = Conversation(client, {"max_tokens": 5}, {"pirate": 1.0})
                generate, most = client.generate, iter((3, 100))

                def interrupted(*args, **kwargs):
                    left = next(most)
                    for index, response in enumerate(generate(*args, **kwargs)):
                        if index > left:
                            raise KeyboardInterrupt
                        yield response

                monkeypatch.setattr(client, "generate", interrupted)
                converse(talk)
                assert [turn["content"] for turn in talk.turns] == [
                    "turn 1", "ppp", "turn 2", "ppppp",
                ]  # fmt: skip

        capsys.readouterr()
        await asyncio.to_thread(body)
    assert prompts == ["pirate> "] * 3
    assert capsys.readouterr().out == "ppp\nppppp\n\n"


async def test_tables_show_where_an_adapter_is_and_that_it_is_pinned(serve, talk):
    async with serve() as world:
        pinned = world.write_adapter("pinned", "p")
        await world.client.load_adapter("kept", pinned, pin=True)
        await world.load("free", "f")
        listed = (await talk(world, "adapters", "list")).stdout
        shown = (await talk(world, "adapters", "show", "kept")).stdout
        info = await world.client.get_adapter("free")
    assert "tier" in listed and re.search(r"kept .*│ device, pinned │", listed), listed
    assert re.search(rf"free .*│ {'device' if info.is_resident else 'host'} +│", listed), listed
    assert re.search(r"tier +│ device, pinned", shown)


async def test_lists_are_json_for_programs(serve, talk):
    async with serve() as world:
        await world.load("pirate", "p")
        listed = json.loads((await talk(world, "adapters", "list", "--json")).stdout)
        shown = json.loads((await talk(world, "adapters", "show", "pirate", "--json")).stdout)
        stored = json.loads((await talk(world, "adapters", "stored", "--json")).stdout)
        info = await world.client.get_adapter("pirate")
    assert listed == [shown]
    assert shown["name"] == "pirate" and shown["digest"] == info.digest
    assert shown["state"] == "ADAPTER_STATE_LOADED" and shown["ranks"] == list(info.ranks)
    assert shown["num_bytes"] == info.num_bytes and isinstance(shown["num_bytes"], int)
    assert shown["error"] == "" and shown["num_in_flight"] == 0
    assert stored["stored"] == [] and isinstance(stored["max_bytes"], int)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("loramux ad", {"adapters"}),
        ("loramux adapters un", {"unload"}),
        ("loramux serve --grpc-add", {"--grpc-address"}),
        ("loramux serve --log-format j", {"json"}),
        ("loramux adapters list --j", {"--json"}),
    ],
)
def test_a_shell_completes_commands_flags_and_values(monkeypatch, capsys, words, expected):
    monkeypatch.setenv("_LORAMUX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert set(capsys.readouterr().out.split()) == expected


def test_a_thought_is_shown_before_the_answer_and_not_kept(capsys):
    class Thinking:
        def generate(self, **_):
            for thought, text in (("Hm", ""), (".", "So"), ("", " it is")):
                delta = generation_pb2.Delta(reasoning=thought, text=text)
                yield generation_pb2.GenerateResponse(delta=delta)

    talk = Conversation(Thinking(), {}, {})
    talk.say("Is it?")
    assert capsys.readouterr().out == "Hm.\n\nSo it is\n"
    assert talk.turns[-1] == {"role": "assistant", "content": "So it is"}
