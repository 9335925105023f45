"""What the files for Prometheus and Grafana contain, for the tests in this folder and in ../grafana.

The rules are read by their own two keywords and not as YAML: Python's standard library has no reader
for it, and promtool says whether they are valid.
"""
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROMETHEUS = ROOT / "ops" / "prometheus"
GRAFANA = ROOT / "ops" / "grafana"
CONFIG = PROMETHEUS / "prometheus.yml"
RULES = (PROMETHEUS / "recording.rules.yml", PROMETHEUS / "alerts.rules.yml")
DASHBOARD = GRAFANA / "spindle.json"
UNIT_TESTS = sorted(pathlib.Path(__file__).parent.glob("*.test.yml"))

# A metric of ours, or a series that our rules record.
NAME = re.compile(r"(?<![\w:])(?:[a-z_]+:)?spindle_[a-z0-9_]+(?::[a-z0-9_]+)*")


def declared(keyword):
    """Names of all alerts ("alert") or recorded series ("record")."""
    pattern = re.compile(rf"^\s*- {keyword}: (\S+)$", re.MULTILINE)
    return [name for path in RULES for name in pattern.findall(path.read_text())]


def names_in(expression):
    """Metrics and recorded series of a PromQL expression."""
    return set(NAME.findall(re.sub(r'"[^"]*"', '""', expression)))


def read_dashboard():
    return json.loads(DASHBOARD.read_text())


def panels_of(dashboard):
    """All panels but rows, with those that rows fold in."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def expressions_of(dashboard):
    """(where, expression) of every panel and annotation."""
    for panel in panels_of(dashboard):
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]


def expand(expression, interval="1m"):
    """The expression as Grafana sends it when every variable is "All"."""
    for name in ("$__rate_interval", "$__interval"):
        expression = expression.replace(name, interval)
    return re.sub(r'"\$\w+"', '".*"', expression)
