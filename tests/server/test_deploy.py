"""The files of deploy/: what they ask for is there, under the names that they use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.errors import LoramuxError
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
    import asyncio

    folder = tmp_path_factory.mktemp("served")
    write_tokenizer(folder)
    (folder / "a").mkdir()
    (folder / "a" / "adapter_config.json").write_text("{}")
    (folder / "a" / "adapter_model.safetensors").write_text("content")

    async def scrape() -> str:
        engine = LocalEngine(folder)
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
