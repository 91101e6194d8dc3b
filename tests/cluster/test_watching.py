"""The Grafana dashboard, the alert rules and the pod monitor: every query parses, and asks for series that are exported.

Prometheus's own `promtool`, where it is on PATH or named by VOCO_PROMTOOL, also runs the rules on series of made-up incidents
(alerts_test.yaml).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from voco.run.prometheus import GAUGES, REASON, TAGS
from voco.train.prometheus import COLUMNS

ROOT = Path(__file__).parents[2]
WATCHING = ROOT / "cluster" / "grafana"
DASHBOARD = json.loads((WATCHING / "voco.json").read_text())
RULES = [rule for group in yaml.safe_load((WATCHING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
PROMTOOL = os.environ.get("VOCO_PROMTOOL") or shutil.which("promtool")

# labels that Ray adds to every series of a process, and those of the scrape
RAY_LABELS = {"SessionName", "WorkerId", "NodeAddress", "JobId", "Component", "Version", "instance", "job"}


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Every series that a query reads. Raises ValueError for one that does not parse, or whose types do not fit."""
    read: list[promql_parser.VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            read.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return read


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that the dashboard and the rules ask."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"][1:]:
        yield f"annotation {annotation['name']}", annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match is not None
            yield f"variable {variable['name']}", f"count by ({match[2]}) ({match[1]})"
    for rule in RULES:
        yield f"alert {rule['alert']}", rule["expr"]


def series_of_ray() -> set[str]:
    """Names that Ray exports: its agent's gauges, and what its own dashboard reads of its C++ parts."""
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    panels, _ = generate_default_grafana_dashboard()
    return {f"ray_{name}" for name in METRICS_GAUGES} | set(re.findall(r"\bray_\w+", panels))


def test_every_query_reads_series_that_are_exported() -> None:
    exported = {f"ray_{name}" for name in GAUGES}
    known = series_of_ray() | exported
    read: set[str] = set()
    for where, query in queries():
        names = {selector.name for selector in selectors(query)}
        assert names, where
        assert names <= known, f"{where}: {names - known}"
        read |= names
    assert exported - read == {"ray_voco_rows_written"}  # everything else that we export is seen or watched
    with pytest.raises(ValueError, match="expected type matrix"):
        selectors("rate(ray_voco_train_step)")


def test_queries_of_our_series_use_labels_that_these_have() -> None:
    for where, query in queries():
        for selector in selectors(query):
            tags = {*TAGS, *GAUGES.get(selector.name.removeprefix("ray_"), ("", ()))[1]}
            if selector.name.startswith("ray_voco_"):
                labels = {matcher.name for matcher in selector.matchers.matchers}
                assert labels <= tags | RAY_LABELS, f"{where}: {labels}"


def test_a_panel_has_its_own_id_and_place() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for first, second in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = first["x"] + first["w"] <= second["x"] or second["x"] + second["w"] <= first["x"]
        apart_y = first["y"] + first["h"] <= second["y"] or second["y"] + second["h"] <= first["y"]
        assert apart_x or apart_y, (first, second)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        targets = panel.get("targets", [])
        assert (panel["type"] == "row") == (not targets)
        assert [target["refId"] for target in targets] == [chr(65 + index) for index in range(len(targets))]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in targets)


def test_variables_that_queries_use_exist() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__all"} == names
    assert DASHBOARD["uid"] == "voco"  # not one of Ray's dashboards, which lie in the same folder


def test_every_column_that_is_exported_is_a_column_and_a_gauge() -> None:
    from voco.store import schemas

    assert set(COLUMNS) <= set(GAUGES)
    assert set(COLUMNS.values()) <= set(schemas.METRICS.names)


def test_the_page_names_every_series_and_alert() -> None:
    section = OPERATIONS.split("\n## Watching\n")[1].split("\n## ")[0]
    described = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.M))
    assert {name: text for name, text in described.items() if name.startswith("ray_")} == {
        f"ray_{name}": meaning for name, (meaning, _) in GAUGES.items()
    }
    assert {name for name in described if not name.startswith("ray_")} == {rule["alert"] for rule in RULES}
    assert all(tags in ((), (REASON,)) for _, tags in GAUGES.values())


def test_rules_have_what_a_person_needs() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}
        labels = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        (first, *_) = re.findall(r"by \(([\w, ]+)\)", rule["expr"])
        assert labels <= set(first.split(", ")), rule["alert"]  # the aggregation keeps what the text names


def shell_line(start: str) -> str:
    """The line of the page's shell blocks that begins so."""
    (line,) = [line for line in OPERATIONS.splitlines() if line.startswith(start)]
    return line


def test_the_pages_commands_make_a_rule_resource_and_a_configuration(tmp_path: Path) -> None:
    command = shell_line("{ printf").replace("kubectl apply -f -", "cat")
    printed = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    resource = yaml.safe_load(printed)
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == yaml.safe_load((WATCHING / "alerts.yaml").read_text())
    from ray.dashboard.modules.metrics.templates import PROMETHEUS_YML_TEMPLATE

    (tmp_path / "metrics.yml").write_text(PROMETHEUS_YML_TEMPLATE.format(prom_metrics_service_discovery_file_path="/d.json"))
    command = shell_line("{ cat /tmp/ray").replace("/tmp/ray/session_latest/metrics/prometheus/prometheus.yml", "metrics.yml")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    configuration = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert configuration["rule_files"] == [f"{tmp_path}/cluster/grafana/alerts.yaml"]
    assert configuration["scrape_configs"][0]["job_name"] == "ray"


def test_the_pod_monitor_selects_pods_of_ray() -> None:
    monitor = yaml.safe_load((WATCHING / "podmonitor.yaml").read_text())
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH: Debian's package prometheus")
def test_alerts_are_raised_when_they_should_be() -> None:
    assert PROMTOOL is not None
    for arguments in (["check", "rules", str(WATCHING / "alerts.yaml")], ["test", "rules", "tests/cluster/alerts_test.yaml"]):
        done = subprocess.run([PROMTOOL, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
