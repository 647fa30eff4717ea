"""An adapter's own text is what transformers makes of its folder, or is refused by name.

Oracle: AutoTokenizer of the adapter's folder, with everything of the base's that it lacks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_runtime.errors import AdapterRefused, InvalidRequest
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

ROWS = VOCAB_SIZE + 20
"""The base's embedding is longer than its tokenizer, as those of real models are."""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who is the CAPTAIN? 🦊 é <|tool|> <|im_end|>"},
]
TEXTS = ["", "The Fox\tjumps  over <|tool|>the dog. é 狐狸", " <|im_start|>x<|pad|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}|{{ pad_token }}]{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return folder


@pytest.fixture(scope="module")
def workers(base: Path) -> Iterator[TextWorkers]:
    workers = TextWorkers(base, ROWS)
    yield workers
    workers.close()


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A folder with the base's own tokenizer, as trainers save it beside an adapter."""
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(workers: TextWorkers, folder: Path) -> tuple[TextSide | None, tuple[str, ...]]:
    return asyncio.run(workers.read(files_of(folder)))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


async def tokens(
    workers: TextWorkers, side: TextSide, ours: Tokenizer, prompt: str | list[dict[str, str]]
) -> list[int]:
    """What a server sends for a prompt."""
    if isinstance(prompt, str):
        return ours.encode(prompt) if side.tokenizer is None else await workers.encode(side, prompt)
    rendered = await workers.render(side, prompt)
    return ours.encode_rendered(rendered) if isinstance(rendered, str) else rendered


def assert_same(
    workers: TextWorkers, side: TextSide, base: Path, theirs: PreTrainedTokenizerBase
) -> None:
    ours = Tokenizer.load(base)
    for text in TEXTS:
        found = asyncio.run(tokens(workers, side, ours, text))
        assert found == theirs.encode(text), text
        decoder = ours.with_added(side.added)
        assert decoder.decode(found) == theirs.decode(found, skip_special_tokens=True)
    if theirs.chat_template:
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert asyncio.run(tokens(workers, side, ours, CHAT)) == expected
    assert theirs.eos_token_id in side.eos_token_ids


def set_tokens(**tokens: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for role, token in tokens.items():
            setattr(tokenizer, role, token)
        tokenizer.save_pretrained(folder)

    return change


def in_tokenizer(**parts: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", lambda content: content.update(parts))


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens(["dog."])
    tokenizer.save_pretrained(folder)


def own_pad(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)


def template_in_settings(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    edit(folder / "tokenizer_config.json", lambda content: content.update(chat_template=named))


def bos_in_front(folder: Path) -> None:
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}]  # fmt: skip
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    in_tokenizer(post_processor=post)(folder)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OWN: dict[str, Callable[[Path], object]] = {
    "end token": set_tokens(eos_token="<|endoftext|>"),
    "first token": set_tokens(bos_token="<|endoftext|>"),
    "pad token": set_tokens(pad_token="<|im_end|>"),
    "pad token of its own": own_pad,
    "added tokens": add_tokens,
    "template": lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATE),
    "template in the settings": template_in_settings,
    "normaliser": in_tokenizer(normalizer={"type": "Lowercase"}),
    "pre-tokeniser": in_tokenizer(pre_tokenizer={
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": "h"}, "behavior": "Isolated", "invert": False},
            BYTES,
        ],
    }),
    "prefix space": in_tokenizer(pre_tokenizer={**BYTES, "add_prefix_space": True}),
    "post-processor": bos_in_front,
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_it_is_what_transformers_makes_of_the_folder(
    kind: str, base: Path, adapter: Path, workers: TextWorkers
) -> None:
    OWN[kind](adapter)
    side, _ = read(workers, adapter)
    assert side is not None
    theirs = AutoTokenizer.from_pretrained(adapter)
    if kind == "template in the settings":
        theirs.chat_template = TEMPLATE
    assert_same(workers, side, base, theirs)
    ours = AutoTokenizer.from_pretrained(base)
    chats = (t.apply_chat_template(CHAT, return_dict=False) for t in (ours, theirs))
    is_seen = len(set(map(tuple, chats))) == 2 or any(
        ours.encode(text) != theirs.encode(text) for text in TEXTS
    )
    assert is_seen or kind in ("end token", "first token", "pad token"), "it must be seen at all"


def test_several_at_once(base: Path, adapter: Path, workers: TextWorkers) -> None:
    for kind in ("added tokens", "pad token of its own", "template", "normaliser", "end token"):
        OWN[kind](adapter)
    side, _ = read(workers, adapter)
    assert_same(workers, side, base, AutoTokenizer.from_pretrained(adapter))


def test_the_bases_own_tokenizer_is_no_text_side(adapter: Path, workers: TextWorkers) -> None:
    assert read(workers, adapter) == (None, ())
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(adapter)
    assert read(workers, adapter) == (None, ())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "tokenizer.json"])
def test_what_a_folder_lacks_is_the_bases(
    name: str, base: Path, adapter: Path, workers: TextWorkers
) -> None:
    for kind in ("template", "end token", "normaliser"):
        OWN[kind](adapter)
    shutil.copytree(base, adapter.parent / "whole")
    shutil.copy(adapter / name, adapter.parent / "whole" / name)
    content = (adapter / name).read_bytes()
    side, _ = asyncio.run(workers.read({name: content}))
    assert_same(workers, side, base, AutoTokenizer.from_pretrained(adapter.parent / "whole"))


def test_end_tokens_of_a_generation_config(base: Path, workers: TextWorkers) -> None:
    for named, expected in ((9, {2, 9}), ([9, 11], {2, 9, 11}), (None, None)):
        content = json.dumps({"eos_token_id": named, "temperature": 0.3}).encode()
        side, notes = asyncio.run(workers.read({"generation_config.json": content}))
        assert (side and set(side.eos_token_ids)) == expected
        assert any("temperature" in note for note in notes)
        assert side is None or not side.is_own_template


def test_the_end_token_of_its_settings_joins_those_of_the_base(
    adapter: Path, workers: TextWorkers
) -> None:
    set_tokens(eos_token="<|endoftext|>")(adapter)
    side, _ = read(workers, adapter)
    assert side.eos_token_ids == (0, 2, 7)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    side, _ = read(workers, adapter)
    assert side.eos_token_ids == (0, 5)


def rename(vocabulary: dict[str, int]) -> None:
    vocabulary["<|new|>"] = vocabulary.pop("the")


def beyond_the_rows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(ROWS - VOCAB_SIZE + 1)])
    tokenizer.save_pretrained(folder)


def write(name: str, content: object) -> Callable[[Path], object]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(text)


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tokens beyond the embedding": ("tokenizer.json", beyond_the_rows),
    "another vocabulary": (
        "tokenizer.json",
        lambda f: edit(f / "tokenizer.json", lambda c: rename(c["model"]["vocab"])),
    ),
    "other merges": (
        "tokenizer.json",
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["merges"].reverse()),
    ),
    "another decoder": ("tokenizer.json", in_tokenizer(decoder={"type": "Fuse"})),
    "an ordinary token's id": ("added_tokens.json", write("added_tokens.json", {"<|new|>": 7})),
    "an id of another token": ("added_tokens.json", write("added_tokens.json", {"<|im_end|>": 0})),
    "an id far beyond": ("added_tokens.json", write("added_tokens.json", {"<|new|>": 10**6})),
    "an id that is none": ("added_tokens.json", write("added_tokens.json", {"<|new|>": "7"})),
    "another sentencepiece": ("tokenizer.model", lambda f: (
        (f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_bytes(b"x"))),
    "not JSON": ("tokenizer_config.json", write("tokenizer_config.json", b"[]")),
    "a key twice": ("tokenizer.json", write("tokenizer.json", b'{"a": 1, "a": 2}')),
    "not UTF-8": ("added_tokens.json", write("added_tokens.json", b"\xff")),
    "a lone surrogate": ("added_tokens.json", write("added_tokens.json", rb'{"\ud800": 1}')),
    "no tokenizer": ("tokenizer.json", write("tokenizer.json", {"model": 3})),
    "an end token beyond": ("generation_config.json", write(
        "generation_config.json", {"eos_token_id": ROWS})),
    "an end token of text": ("generation_config.json", write(
        "generation_config.json", {"eos_token_id": ["</s>"]})),
    "forced tokens": ("generation_config.json", write(
        "generation_config.json", {"forced_bos_token_id": 3})),
    "suppressed tokens": ("generation_config.json", write(
        "generation_config.json", {"suppress_tokens": [3]})),
    "templates without a default": ("tokenizer_config.json", lambda f: (
        (f / "chat_template.jinja").unlink(),
        edit(f / "tokenizer_config.json", lambda c: c.update(
            chat_template=[{"name": "tools", "template": "x"}])))),
    "a template that is not UTF-8": ("chat_template.jinja", write("chat_template.jinja", b"\xff")),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(
    kind: str, adapter: Path, workers: TextWorkers
) -> None:
    field, change = REFUSED[kind]
    change(adapter)
    with pytest.raises(AdapterRefused) as refusal:
        read(workers, adapter)
    assert refusal.value.field == field, refusal.value.message
    assert str(adapter.parent) not in refusal.value.message


def test_settings_lead_to_no_other_file_and_to_no_code(
    base: Path, adapter: Path, workers: TextWorkers
) -> None:
    (adapter.parent / "secret.json").write_text("{}")
    edit(
        adapter / "tokenizer_config.json",
        lambda content: content.update(
            tokenizer_file=str(adapter.parent / "secret.json"),
            auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        ),
    )
    assert read(workers, adapter) == (None, ())


def test_a_pad_token_beyond_the_embedding_is_taken_and_never_sent(
    base: Path, tmp_path: Path
) -> None:
    """PEFT loads such an adapter, because padding reaches no model."""
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    own_pad(tmp_path / "adapter")
    workers = TextWorkers(base, VOCAB_SIZE)
    try:
        side, notes = read(workers, tmp_path / "adapter")
        assert side.variables["pad_token"] == "<|pad|>" and any("pad token" in n for n in notes)
        assert asyncio.run(workers.encode(side, "The dog")) == Tokenizer.load(base).encode(
            "The dog"
        )
        with pytest.raises(InvalidRequest, match=str(VOCAB_SIZE)) as refusal:
            asyncio.run(workers.encode(side, "The <|pad|>"))
        assert refusal.value.field == "text"
    finally:
        workers.close()


def write_metaspace_base(folder: Path) -> None:
    """A tokenizer of the older Llama kind: spaces as characters of their own, bytes as tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!", "▁t", "he", "▁the"]
    bpe = models.BPE(
        {word: index for index, word in enumerate(words)},
        [("▁", "t"), ("h", "e"), ("▁t", "he")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tokenizer = Backend(bpe)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_added_tokens_are_decoded_among_spaces_and_bytes(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_metaspace_base(base)
    shutil.copytree(base, adapter)
    add_tokens(adapter)
    workers = TextWorkers(base, 400)
    try:
        side, _ = read(workers, adapter)
        theirs = AutoTokenizer.from_pretrained(adapter)
        assert_same(workers, side, base, theirs)
        decoder, draw = Tokenizer.load(base).with_added(side.added), random.Random(3)
        for _ in range(300):
            ids = [draw.randrange(len(theirs)) for _ in range(draw.randrange(1, 12))]
            assert decoder.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    finally:
        workers.close()


def test_adapters_of_one_text_share_it(adapter: Path, workers: TextWorkers) -> None:
    OWN["normaliser"](adapter)
    (first, _), (second, _) = read(workers, adapter), read(workers, adapter)
    assert first is second and first.tokenizer is not None


def test_any_change_of_good_files_is_taken_or_refused(adapter: Path, workers: TextWorkers) -> None:
    for kind in ("template", "end token", "added tokens"):
        OWN[kind](adapter)
    good = files_of(adapter) | {"generation_config.json": b'{"eos_token_id": [5, 9]}'}
    outcomes = set()
    for draw in range(60):
        name = sorted(good)[draw % len(good)]
        changed = bytearray(good[name])
        for _ in range(1 + draw % 3):
            place = random.Random(draw).randrange(len(changed))
            changed[place : place + draw % 4] = random.Random(draw + 1).randbytes(draw % 5)
        try:
            side, _ = asyncio.run(workers.read({**good, name: bytes(changed)}))
        except AdapterRefused as refusal:
            outcomes.add("refused")
            assert str(adapter.parent) not in refusal.message
        else:
            outcomes.add("taken")
            assert side is not None
    assert outcomes == {"refused", "taken"}


@pytest.mark.parametrize("kind", ["the base's", "end token", "added tokens"])
def test_files_that_were_read_are_not_read_again(
    kind: str, adapter: Path, workers: TextWorkers
) -> None:
    """Hundreds of adapters come with the same files; a digest stands for what they gave."""
    OWN.get(kind, lambda folder: None)(adapter)
    first = asyncio.run(workers.read(files_of(adapter), kind))
    assert asyncio.run(workers.read({}, kind)) == first
    side = first[0] and dataclasses.replace(first[0])
    del first
    gc.collect()
    if side is not None:  # no adapter has it any more: it is read once more
        assert asyncio.run(workers.read(files_of(adapter), kind))[0] == side
