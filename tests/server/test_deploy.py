"""The files of deploy/: what they ask for is there, under the names that they use."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator
from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.engine.client import StateStats
from lora_runtime.errors import LoramuxError
from loramux.server.config import OTHER_VARIABLES, SETTINGS
from tests.server.test_app import LocalEngine, running
from tests.tiny_tokenizer import write_tokenizer

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/loramux.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
SELECTOR = re.compile(r"([a-zA-Z_][\w:]*)\s*(?:\{([^}]*)\}|(?=\[))|\b(\w+:\w+)\b")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
BY = re.compile(r"by \(([^)]*)\)")
OF_PROMETHEUS = {"job", "instance"}
"""Labels that a scrape adds."""


def expressions() -> list[tuple[str, str]]:
    panels = [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]
    variables = [
        (variable["name"], match[1])
        for variable in DASHBOARD["templating"]["list"]
        if (match := re.fullmatch(r"label_values\((.*), \w+\)", variable.get("definition", "")))
    ]
    return [*panels, *variables, *((rule["alert"], rule["expr"]) for rule in RULES)]


def selected(expression: str) -> dict[str, set[str]]:
    """Metric → labels it is selected or grouped by."""
    grouped = {name.strip() for names in BY.findall(expression) for name in names.split(",")}
    found: dict[str, set[str]] = {}
    for name, labels, bare in SELECTOR.findall(expression):
        found.setdefault(name or bare, set()).update(LABEL.findall(labels), grouped)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, set[str]]:
    """Metric → its labels, of a server that has answered a bit of everything."""
    folder = tmp_path_factory.mktemp("served")
    write_tokenizer(folder)
    (folder / "a").mkdir()
    (folder / "a" / "adapter_config.json").write_text("{}")
    (folder / "a" / "adapter_model.safetensors").write_text("content")

    async def scrape() -> str:
        engine = LocalEngine(folder)
        engine.states = StateStats(**{field.name: 0 for field in fields(StateStats)})
        async with running(engine, adapter=[f"pirate={folder / 'a'}"]) as server:
            for adapter in (None, "pirate"):
                await server.client.generate(token_ids=[5], adapter=adapter, max_tokens=3).text()
            with pytest.raises(LoramuxError):
                await server.client.load_adapter("ghost", "nowhere")
            await server.status("/healthz")
            return (await server.http.get("/metrics")).text

    labels: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(asyncio.run(scrape())):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_this_test_finds_what_expressions_ask_for():
    found = selected(
        'sum by (le, job) (rate(vllm:a_bucket{job=~"$job",x!="y"}[5m])) / rate(b_total[1m]) > 0.5 '
        "and loramux:c == 1"
    )
    assert found == {
        "vllm:a_bucket": {"le", "job", "x"},
        "b_total": {"le", "job"},
        "loramux:c": {"le", "job"},
    }


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_every_metric_and_label_of_a_panel_or_alert_is_on_the_page(page, title, expression):
    wanted = selected(expression)
    assert wanted
    for name, labels in wanted.items():
        assert name in page, f"{title}: {name} is not on the page"
        assert labels - OF_PROMETHEUS <= page[name], f"{title}: {name}"


def test_every_series_that_is_ours_is_in_a_panel_or_alert(page):
    shown = {name for _, expression in expressions() for name in selected(expression)}
    suffix = re.compile(r"_(bucket|sum|count)$")
    families = {suffix.sub("", name) for name in shown}
    ours = {suffix.sub("", name) for name in page if ":" in name}
    assert ours - families == {"vllm:cache_config_info"}


def test_the_dashboard_has_what_grafana_wants():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["targets"]
    assert {v["name"] for v in DASHBOARD["templating"]["list"]} == {"datasource", "job", "instance"}


def test_every_alert_says_what_happened_and_what_to_do():
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["for"] and set(rule["annotations"]) == {"summary", "description"}
    tested = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yaml").read_text())["tests"]
    assert {test["name"] for test in tested} == {rule["alert"] for rule in RULES}


CHART = DEPLOY / "helm"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))


def test_the_charts_values_are_what_its_schema_allows():
    SCHEMA.check_schema(SCHEMA.schema)
    SCHEMA.validate(VALUES)
    assert set(SCHEMA.schema["properties"]) - {"global"} == set(VALUES)
    for name, part in SCHEMA.schema["properties"].items():
        if part.get("additionalProperties") is False:
            missing = set(part["properties"]) - set(VALUES[name])
            assert missing <= {"claims"}, f"{name} has no default for {missing}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 3},
        {"drainSeconds": "60"},
        {"service": {**VALUES["service"], "grpcPort": 0}},
        {"settings": {"grpc_address": "0.0.0.0:1"}},
        {"settings": {"Max-Seqs": 1}},
        {"access": {"keysSecret": True, "insecure": False}},
        {"cache": {**VALUES["cache"], "size": "100 GB"}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_would_be_ignored_or_fail_later(wrong):
    assert not SCHEMA.is_valid({**VALUES, **wrong})


def test_templates_use_values_that_there_are():
    for path in CHART.glob("templates/*"):
        for keys in re.findall(r"\.Values((?:\.\w+)+)", path.read_text()):
            found = VALUES
            for key in keys.strip(".").split("."):
                assert key in found, f"{path.name}: .Values{keys}"
                found = found[key]


def test_every_variable_of_the_server_in_a_deployment_is_a_setting():
    files = [
        DEPLOY.parent / "Dockerfile",
        *DEPLOY.glob("*/*.yaml"),
        *CHART.glob("templates/*.yaml"),
    ]
    known = {name.upper() for name in SETTINGS} | set(OTHER_VARIABLES)
    used = {
        (path.name, name)
        for path in [*files, DEPLOY / "systemd/loramux.service"]
        for name in re.findall(r"LORAMUX_([A-Z_]+)", path.read_text())
    }
    assert len(used) > 20
    assert [(path, name) for path, name in used if name not in known] == []


def test_the_images_health_check_asks_the_server_by_http_or_tls(monkeypatch):
    text = (DEPLOY.parent / "Dockerfile").read_text()
    (command,) = re.findall(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", text)
    program, flag, code = json.loads(command)
    assert (program, flag) == ("python", "-c")
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, **how: asked.append((url, how)))
    for variable in ("OTHER", "LORAMUX_TLS_CERT"):
        monkeypatch.setenv(variable, "x")
        exec(code, {})
    (plain, how), (encrypted, how_encrypted) = asked
    assert plain == "http://127.0.0.1:8080/healthz" and how["context"] is None
    assert encrypted == "https://127.0.0.1:8080/healthz" and how_encrypted["context"] is not None


def test_compose_files_and_their_parts_are_there():
    for name in ("compose.yaml", "gpu.yaml"):
        compose = yaml.safe_load((DEPLOY / "compose" / name).read_text())
        target = compose["services"]["loramux"]["build"]["target"]
        assert re.search(rf"(?m)^FROM \w+ AS {target}$", (DEPLOY.parent / "Dockerfile").read_text())
        for part in compose.get("configs", {}).values():
            assert "content" in part or (DEPLOY / "compose" / part["file"]).is_file()
