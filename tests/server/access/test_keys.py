"""The file of keys: what it must hold, what it means, and how it changes under a running server."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta

import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lora_runtime.errors import ConfigError, Unauthenticated
from loramux.server.access.caller import ANONYMOUS, Caller, Limits, Role
from loramux.server.access.gate import OPEN_GATE, Gate
from loramux.server.access.keys import Keys, new_key, table_of
from loramux.server.cli import app
from tests.server.access.keyring import ACME, OPERATOR, TEXT, WRONG, write_keys

SHA = "a" * 64
GOOD = {
    "tenants": {"acme": {}},
    "keys": [{"id": "k", "tenant": "acme", "role": "user", "adapters": ["a*"], "sha256": SHA}],
}


def with_key(**changes):
    key = {**GOOD["keys"][0], **changes}
    return {**GOOD, "keys": [{k: v for k, v in key.items() if v is not ...}]}


BAD_FILES = {
    "tenants is a list": ({**GOOD, "tenants": ["acme"]}, "tenants"),
    "unknown section": ({**GOOD, "users": {}}, "users"),
    "unknown limit": ({**GOOD, "tenants": {"acme": {"max_request": 1}}}, "max_request"),
    "limit 0": ({**GOOD, "tenants": {"acme": {"tokens_per_s": 0}}}, "tenants.acme.tokens_per_s"),
    "limit true": ({**GOOD, "tenants": {"acme": {"max_requests": True}}}, "max_requests"),
    "limit huge": ({**GOOD, "tenants": {"acme": {"weight": 1e9}}}, "tenants.acme.weight"),
    "weight 0": ({**GOOD, "tenants": {"acme": {"weight": 0}}}, "tenants.acme.weight"),
    "tenant with a slash": ({**GOOD, "tenants": {"a/b": {}}}, "tenants"),
    "unknown tenant": (with_key(tenant="acmee"), "keys[0].tenant"),
    "unknown role": (with_key(role="admin"), "'user' or 'operator'"),
    "no adapters": (with_key(adapters=...), "keys[0].adapters"),
    "adapters as text": (with_key(adapters="a*"), "keys[0].adapters"),
    "a key, not its hash": (with_key(sha256="lmx_secret"), "keys[0].sha256"),
    "upper case": (with_key(sha256="A" * 64), "keys[0].sha256"),
    "neither": (with_key(sha256=...), "sha256 or certificate"),
    "both": (with_key(certificate="box"), "sha256 or certificate"),
    "a user's sources": (with_key(sources=["*"]), "keys[0].sources"),
    "no date": (with_key(expires="soon"), "keys[0].expires"),
    "a number as date": (with_key(expires=20270131), "keys[0].expires"),
    "same id": ({**GOOD, "keys": GOOD["keys"] * 2}, "keys[1].id"),
    "same hash": (
        {**GOOD, "keys": [*GOOD["keys"], {**GOOD["keys"][0], "id": "other"}]},
        "keys[1].sha256",
    ),
    "a list": ([GOOD], "tenants:"),
    "text": ("{", "YAML"),
    "a key twice": ("tenants: {}\ntenants: {}\n", "twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name_and_shows_no_key(tmp_path, name):
    content, said = BAD_FILES[name]
    text = content if isinstance(content, str) else json.dumps(content)
    file = write_keys(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        Keys(file)
    assert said in caught.value.message and str(file) in caught.value.message
    assert caught.value.field == "keys"


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        Keys(tmp_path / "none.yaml")


def test_a_file_may_be_json_and_says_who_calls(tmp_path):
    text = json.dumps({**GOOD, "tenants": {"acme": {"max_requests": 3, "weight": 2}}})
    caller = table_of(text.encode(), tmp_path)
    (known,) = caller.by_prefix[SHA[:8]]
    assert known.caller == Caller(
        key_id="k",
        tenant="acme",
        role=Role.USER,
        adapters=("a*",),
        limits=Limits(max_requests=3, weight=2.0),
    )


@pytest.mark.parametrize(
    ("adapters", "given", "sources"),
    [(["*"], None, ("*",)), (["a*"], None, ()), (["a*"], ["a/*"], ("a/*",)), (["*"], [], ())],
)
def test_an_operator_of_some_adapters_loads_from_nowhere_unless_it_is_written(
    tmp_path, adapters, given, sources
):
    key = with_key(role="operator", adapters=adapters, sources=... if given is None else given)
    (known,) = table_of(json.dumps(key).encode(), tmp_path).by_prefix[SHA[:8]]
    assert known.caller.sources == sources


@pytest.mark.parametrize(
    ("expires", "is_over"),
    [
        (datetime.now(UTC) + timedelta(hours=5), False),
        (datetime.now(UTC) - timedelta(minutes=5), True),
        ((datetime.now(UTC) + timedelta(days=2)).date(), False),
        (datetime.now(UTC).date(), True),
        ((datetime.now(UTC) + timedelta(hours=5)).replace(tzinfo=None), False),
    ],
)
@pytest.mark.parametrize("write", [yaml.safe_dump, lambda v: json.dumps(v, default=str)])
def test_a_key_ends_at_its_time(tmp_path, expires, is_over, write):
    key = new_key()
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    table = Keys(write_keys(tmp_path, write(with_key(sha256=sha256, expires=expires)))).table
    if is_over:
        with pytest.raises(Unauthenticated, match="'k' expired at"):
            table.of_key(key)
    else:
        assert table.of_key(key).key_id == "k"


def test_a_changed_file_is_taken_and_a_broken_one_changes_nothing(tmp_path):
    file = write_keys(tmp_path)
    keys = Keys(file)
    gate = Gate(keys)
    ask = lambda key: gate.caller([f"Bearer {key}"], (), "here").key_id  # noqa: E731
    assert ask(ACME) == "acme"
    keys.reload()
    with structlog.testing.capture_logs() as logs:
        for broken in (TEXT.replace("role: user", "role: usr"), "", "{"):
            file.write_text(broken)
            for _ in range(3):
                keys.reload()
            assert ask(ACME) == "acme"
        file.unlink()
        keys.reload()
        assert ask(OPERATOR) == "operator"
    assert [log["log_level"] for log in logs] == ["error"] * 4, "each is told once"
    times = file.parent.stat()
    file.write_text(TEXT.replace("id: acme,", "id: ACME,"))
    os.utime(file, (times.st_atime, 0))
    keys.reload()
    assert ask(ACME) == "ACME", "found by its content, whatever time the file has"
    file.write_text("tenants: {}\nkeys: []\n")
    keys.reload()
    with pytest.raises(Unauthenticated):
        ask(ACME)


def test_without_keys_everybody_is_an_operator():
    caller = OPEN_GATE.caller(["Bearer x"], (), "peer")
    assert caller.is_over_all and caller.peer == "peer"
    assert caller.cache_salt("s") == ANONYMOUS.cache_salt("s") == "s"
    assert ANONYMOUS.client("", "ipv4:1.2.3.4") == "ipv4:1.2.3.4"
    assert ANONYMOUS.client("x", "ipv4:1.2.3.4") == "tenant:x"


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)
SALTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)


@given(st.tuples(NAMES, SALTS), st.tuples(NAMES, SALTS))
def test_salts_are_equal_only_for_one_tenant_and_one_salt(one, other):
    salts = [Caller(key_id="k", tenant=t).cache_salt(s) for t, s in (one, other)]
    assert (salts[0] == salts[1]) == (one == other)


def test_a_pattern_is_of_whole_names_in_their_very_letters():
    caller = Caller(adapters=("acme-*", "shared", "org/*@v1"))
    assert all(map(caller.sees, ("acme-", "acme-x", "shared", "org/name@v1")))
    assert not any(map(caller.sees, ("xacme-", "ACME-x", "shared2", "", "org/name@v2", "*")))
    assert not Caller().sees("anything")


def test_keys_new_makes_a_key_that_works_and_keeps_what_people_wrote(tmp_path):
    file = tmp_path / "keys.yaml"

    def make(*arguments):
        return CliRunner().invoke(app, ["keys", "new", "--file", str(file), *arguments])

    first = make("--tenant", "acme", "--adapter", "acme-*", "--adapter", "shared")
    assert first.exit_code == 0, first.output
    assert file.stat().st_mode & 0o777 == 0o600
    assert first.stdout.strip() not in file.read_text()
    file.write_text(file.read_text().replace("acme: {}", "acme:\n    weight: 2  # they pay twice"))
    file.chmod(0o640)
    second = make("--tenant", "house", "--role", "operator", "--adapter", "*",
                  "--id", "boss", "--expires", "2999-12-31")  # fmt: skip
    assert second.exit_code == 0, second.output
    assert "# they pay twice" in file.read_text() and file.stat().st_mode & 0o777 == 0o640
    table = Keys(file).table
    acme, boss = table.of_key(first.stdout.strip()), table.of_key(second.stdout.strip())
    assert acme.adapters == ("acme-*", "shared") and acme.limits.weight == 2.0
    assert boss.is_over_all and boss.key_id == "boss"
    before = file.read_bytes()
    for wrong in (("--id", "boss"), ("--expires", "never"), ("--adapter", "a b")):
        refused = make("--tenant", "house", "--adapter", "x", *wrong)
        assert refused.exit_code == 1 and "error: keys:" in refused.stderr
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_keys_new_writes_into_files_of_any_style(tmp_path):
    for number, text in enumerate((TEXT, json.dumps(GOOD), yaml.safe_dump(GOOD), "keys: []\n", "")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        options = ["--tenant", "new", "--adapter", "*"]
        made = CliRunner().invoke(app, ["keys", "new", "--file", str(file), *options])
        assert made.exit_code == 0, made.output
        table = Keys(file).table
        assert table.of_key(made.stdout.strip()).tenant == "new"
        num_keys = sum(map(len, table.by_prefix.values()))
        assert num_keys == 1 + len((yaml.safe_load(text) or {}).get("keys", []))
        with pytest.raises(Unauthenticated):
            table.of_key(WRONG)


def test_no_content_ends_the_reading(tmp_path):
    """What nests without end is a file that cannot be used, as any other."""
    file = write_keys(tmp_path)
    keys = Keys(file)
    before = keys.table
    for content in (b"[" * 5000, b"{a: " * 5000, b"\xff", b""):
        file.write_bytes(content)
        keys.reload()
        assert keys.table is before


COMMENTED = f"""\
# Ours.
tenants: {{acme: {{}}}}
keys:  # all of them
  # the first
  - id: one
    tenant: acme
    role: user
    adapters:
      - "a*"  # a pattern
      - b
    sha256: {"a" * 64}
  # the second, of Ann
  - {{id: two, tenant: acme, role: operator, adapters: ["*"],
     expires: 2031-02-03, sha256: {"b" * 64}}}  # till Ann goes

  # the third
  - id: three
    tenant: acme
    sha256: {"c" * 64}
    role: user
    adapters: []

# The end.
"""


def keys_cli(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["keys", *map(str, arguments)])


def test_keys_list_shows_whose_they_are_and_no_hash(tmp_path):
    file = write_keys(tmp_path, COMMENTED)
    listed = keys_cli("list", "--file", file)
    assert listed.exit_code == 0, listed.output
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in listed.stdout.splitlines()
        if line.startswith("│")
    ]
    assert cells == [
        ["one", "acme", "user", "a*, b", "never"],
        ["two", "acme", "operator", "*", "2031-02-03T00:00:00+00:00"],
        ["three", "acme", "user", "", "never"],
    ]
    assert not any(digit * 6 in listed.output for digit in "abc")
    for wrong in (tmp_path / "absent", write_keys(tmp_path, "keys: 3")):
        refused = keys_cli("list", "--file", wrong)
        assert refused.exit_code == 1 and refused.stderr.startswith("error: "), refused.output


def test_keys_revoke_takes_the_entry_s_lines_and_no_others(tmp_path):
    lines = COMMENTED.splitlines(keepends=True)
    for key_id, own in (("one", range(4, 11)), ("two", range(12, 14)), ("three", range(16, 21))):
        file = write_keys(tmp_path, COMMENTED)
        file.chmod(0o640)
        revoked = keys_cli("revoke", key_id, "--file", file)
        assert revoked.exit_code == 0, revoked.output
        left = [line for number, line in enumerate(lines) if number not in own]
        assert file.read_text() == "".join(left)
        assert file.stat().st_mode & 0o777 == 0o640
        table_of(file.read_bytes(), file)
    file.write_text(COMMENTED)
    for wrong in ("four", ""):
        refused = keys_cli("revoke", wrong, "--file", file)
        assert refused.exit_code == 1 and "one, two, three" in refused.stderr
    assert file.read_text() == COMMENTED and list(tmp_path.iterdir()) == [file]
    for key_id in ("two", "one", "three"):
        assert keys_cli("revoke", key_id, "--file", file).exit_code == 0
    kept = [line for line in lines if "#" in line and "pattern" not in line and "till" not in line]
    assert [line for line in file.read_text().splitlines(keepends=True) if "#" in line] == [
        line.replace("keys:", "keys: []") for line in kept
    ]
    assert not Keys(file).table.by_prefix


def test_keys_are_revoked_from_files_of_any_style(tmp_path):
    key = keys_cli(
        "new", "--file", tmp_path / "new", "--tenant", "t", "--adapter", "*", "--id", "k"
    )
    made = (tmp_path / "new").read_text()
    file = tmp_path / "keys.yaml"
    for text in (TEXT, json.dumps(GOOD), json.dumps(GOOD, indent=1), yaml.safe_dump(GOOD), made):
        before = yaml.safe_load(text)
        for entry in before["keys"]:
            file.write_text(text)
            assert keys_cli("revoke", entry["id"], "--file", file).exit_code == 0
            after = yaml.safe_load(file.read_text())
            left = [other for other in before["keys"] if other is not entry]
            assert after == {**before, "keys": left}
    with pytest.raises(Unauthenticated):
        Keys(file).table.of_key(key.stdout.strip())
