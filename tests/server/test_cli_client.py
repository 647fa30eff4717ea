"""`loramux generate` and `loramux adapters` against a server whose words are hostile."""

from __future__ import annotations

import asyncio

import pytest
from typer.testing import CliRunner

from loramux.server.cli import app
from tests.server.world import World

HOSTILE = "\x1b]0;pwned\x07\x9b2J\u202e"
SHOWN = "\\x1b]0;pwned\\x07\\x9b2J\\u202e"
WIDE = {"COLUMNS": "400"}


async def ask(world: World, *arguments: str):
    run = CliRunner().invoke
    flags = ["--address", world.target]
    return await asyncio.to_thread(run, app, [*arguments, *flags], env=WIDE)


async def test_what_an_adapter_brings_is_shown_and_not_obeyed(serve) -> None:
    facts = {"notes": [f"note {HOSTILE}"], "honoured": {"k" + HOSTILE: HOSTILE}}
    async with serve() as world:
        await world.load("x", "a", **facts)
        world.registry.get("x").error = f"template: {HOSTILE}"
        for arguments in (("adapters", "list"), ("adapters", "show", "x")):
            result = await ask(world, *arguments)
            assert result.exit_code == 0, result.output
            assert f"template: {SHOWN}" in result.output
            assert not set("\x1b\x07\x9b\u202e") & set(result.output)
        assert f"note {SHOWN}" in result.output and f"honoured k{SHOWN}" in result.output
        loaded = await ask(world, "adapters", "load", "x", world.registry.get("x").source)
        assert loaded.exit_code == 0 and f"note: note {SHOWN}" in loaded.stderr


async def test_errors_and_notes_of_a_server_are_shown_and_not_obeyed(serve, monkeypatch) -> None:
    async with serve() as world:
        source = world.write_adapter("bad", "!AdapterRefused")
        result = await ask(world, "adapters", "load", "x", source + HOSTILE)
        assert result.exit_code == 1 and "error:" in result.stderr
        assert not set("\x1b\x07\x9b\u202e") & set(result.stderr)
        monkeypatch.setattr(
            "loramux.server.generation.generation.request_notes", lambda *_: [f"note {HOSTILE}"]
        )
        result = await ask(world, "generate", "hi", "--max-tokens", "1")
        assert f"note {SHOWN}" in result.stderr


@pytest.mark.parametrize("has_own", [False, True])
async def test_a_base_without_a_template_gets_text(serve, has_own) -> None:
    async with serve() as world:
        world.service.prompts._tokenizer.has_chat_template = False
        source = world.write_adapter("a", "a")
        if has_own:
            (world.root / source / "chat_template.jinja").write_text("<{content}>")
            world.engine.load_adapter = with_template(world, "<{content}>")
        await world.client.load_adapter("x", source)
        prompts = {}
        for who, flags in {"base": (), "x": ("--adapter", "x")}.items():
            result = await ask(world, "generate", "hi", "--max-tokens", "1", *flags)
            assert result.exit_code == 0, result.output
            prompts[who] = bytes(world.engine.seen[-1].prompt_token_ids).decode()
            assert ("--text" in result.stderr) == (prompts[who] == "hi")
        assert prompts == {"base": "hi", "x": "<hi>" if has_own else "hi"}
        result = await ask(world, "generate", "hi", "--system", "be kind")
        assert result.exit_code == 2 and "--system" in result.output


def with_template(world: World, template: str):
    """The engine's load, giving the folder's chat template as the real one does."""
    from dataclasses import replace

    load = type(world.engine).load_adapter

    async def load_adapter(folder, rules):
        loaded = await load(world.engine, folder, rules)
        return replace(loaded, text_files={"chat_template.jinja": template.encode()})

    return load_adapter
