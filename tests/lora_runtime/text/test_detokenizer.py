"""Streamed text equals the text of all tokens at once, however the tokens arrive."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from lora_runtime.text.detokenizer import Detokenizer
from lora_runtime.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import write_tokenizer

EMOJI = ["👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "é", "狐狸", "\u200d", "\ufffd"]
TEXT = st.lists(st.one_of(st.text(), st.sampled_from(EMOJI), st.just("The quick "))).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like vocabulary: words with a leading ▁, single bytes for all else."""
    pieces = ["<unk>", "▁Hello", "▁world", "ly", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def stream(detokenizer: Detokenizer, chunks: list[list[int]]) -> str:
    return "".join([*map(detokenizer.push, chunks), detokenizer.flush()])


@settings(max_examples=200)
@given(text=TEXT, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_stream_equals_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    chunks = split(tokenizer.encode(text), cuts)
    assert stream(Detokenizer(tokenizer, tokenizer.encode("user\n")), chunks) == text


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 299), max_size=120), cuts=st.lists(st.integers(0, 10_000)))
def test_any_tokens_stream_to_their_decoding(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    assert stream(Detokenizer(tokenizer, []), split(ids, cuts)) == tokenizer.decode(ids)


@settings(max_examples=100)
@given(text=TEXT, stop=st.text(min_size=1, max_size=4), cuts=st.lists(st.integers(0, 10_000)))
def test_stop_string_cuts_wherever_it_lies(
    tokenizer: Tokenizer, text: str, stop: str, cuts: list[int]
) -> None:
    whole = text + stop + text
    detokenizer = Detokenizer(tokenizer, [], (stop,))
    assert stream(detokenizer, split(tokenizer.encode(whole), cuts)) == whole[: whole.find(stop)]
    assert detokenizer.stopped


@settings(max_examples=100)
@given(ids=st.lists(st.integers(3, 299), max_size=60), cuts=st.lists(st.integers(0, 10_000)))
def test_split_does_not_matter_with_several_stops(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    stops = ("e", "th", "abc", "\ufffd\ufffd")
    one_by_one, in_chunks = (Detokenizer(tokenizer, [], stops) for _ in range(2))
    assert stream(one_by_one, [[i] for i in ids]) == stream(in_chunks, split(ids, cuts))
    assert one_by_one.stopped == in_chunks.stopped


def test_nothing_unsafe_is_given_out_early(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], ("STOP",))
    given_out = [detokenizer.push([i]) for i in tokenizer.encode("a🙂ST🙂STOP after")]
    assert not any("\ufffd" in piece for piece in given_out)
    assert "".join(given_out) == "a🙂ST🙂" and detokenizer.stopped
    assert detokenizer.push(tokenizer.encode("more")) == detokenizer.flush() == ""


def test_unfinished_stop_and_character_come_with_the_flush(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], ("STOP",))
    ids = tokenizer.encode("aSTO") + tokenizer.encode("🙂")[:-1]
    assert detokenizer.push(ids[:4]) == "a"
    assert detokenizer.push(ids[4:]) + detokenizer.flush() == "STO\ufffd"
    assert not detokenizer.stopped


def test_space_of_the_first_word_is_kept(byte_fallback: Tokenizer) -> None:
    assert byte_fallback.decode([1, 2]) == "Hello world"
    assert stream(Detokenizer(byte_fallback, [1]), [[2], [3], [2]]) == " worldly world"


@settings(max_examples=50)
@given(text=st.lists(st.sampled_from([*EMOJI[:-1], " Hello", " world"]), max_size=30).map("".join))
def test_byte_fallback_streams_whole_characters(byte_fallback: Tokenizer, text: str) -> None:
    ids: list[int] = []
    for piece in text.replace(" Hello", "\0H").replace(" world", "\0w").split("\0"):
        head = {"H": [1], "w": [2]}.get(piece[:1], [])
        ids += head + [4 + byte for byte in (piece[1:] if head else piece).encode()]
    assert stream(Detokenizer(byte_fallback, [1]), [[i] for i in ids]) == text


@pytest.mark.parametrize("text", ["The quick brown fox. ", "🙂", "\ufffd"])
def test_cost_is_linear(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text * 4000)[:8000]
    if text == "🙂":
        ids = [ids[-1]] * 8000  # continuation bytes that never become a character

    def cpu_seconds(num_tokens: int) -> float:
        detokenizer, start = Detokenizer(tokenizer, []), time.process_time()
        stream(detokenizer, [[i] for i in ids[:num_tokens]])
        return time.process_time() - start

    cpu_seconds(100)
    assert min(cpu_seconds(8000) for _ in range(3)) < 16 * max(cpu_seconds(2000) for _ in range(3))
