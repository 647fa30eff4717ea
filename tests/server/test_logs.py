from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from loramux.server.logs import setup_logging


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def logged(log_format: str, level: str = "info") -> str:
    stream = io.StringIO()
    setup_logging(level=level, log_format=log_format, stream=stream)
    ours = structlog.get_logger("loramux.part")
    ours.info("ready", port=7)
    ours.debug("detail")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("a library's %s", "warning")
    try:
        prompt = "the secret prompt"
        raise ValueError(f"of {len(prompt)} letters")
    except ValueError:
        ours.exception("failed")
    return stream.getvalue()


def test_json_is_one_object_a_line_from_us_and_from_libraries():
    events = [json.loads(line) for line in logged("json").splitlines()]
    assert [event["event"] for event in events] == ["ready", "a library's warning", "failed"]
    assert events[0]["port"] == 7 and events[0]["level"] == "info"
    assert events[0]["logger"] == "loramux.part" and "timestamp" in events[0]
    assert "ValueError: of 17 letters" in events[2]["exception"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_values_of_variables(log_format):
    text = logged(log_format)
    assert "ValueError: of 17 letters" in text
    assert "the secret prompt" not in text


def test_no_value_of_a_client_acts_on_a_terminal():
    stream = io.StringIO()
    setup_logging(level="info", log_format="console", stream=stream)
    structlog.get_logger("loramux.part").info(
        "adapter refused", source="a\x1b]0;pwned\x07\x9b2J\u202eb"
    )
    logging.getLogger("some.library").warning("of \x1b[2J")
    text = stream.getvalue()
    assert "a\\x1b]0;pwned\\x07\\x9b2J\\u202eb" in text.replace("\\\\", "\\")
    assert all(c.isprintable() or c in "\n\t" for c in text), repr(text)


def test_auto_is_json_where_there_is_no_terminal():
    assert logged("auto").startswith("{")
    assert not logged("console").startswith("{")


def test_levels():
    assert "ready" not in logged("json", level="warning")
    assert "chatter" not in logged("json") and "detail" not in logged("json")
    debugged = logged("json", level="debug")
    assert "chatter" in debugged and "detail" in debugged


@pytest.mark.parametrize("name", ["httpx2", "botocore.auth", "gcsfs.credentials", "urllib3.x"])
def test_what_fetches_adapters_tells_no_secrets_at_any_level(name):
    stream = io.StringIO()
    setup_logging(level="debug", log_format="json", stream=stream)
    logging.getLogger(name).info("GET https://host/x?X-Amz-Signature=secret")
    logging.getLogger("another.library").debug("heard")
    assert "heard" in stream.getvalue() and "secret" not in stream.getvalue()
