"""Pieces of a Grafana dashboard as plain dictionaries: panels, rows, variables, and their places.

dashboard.py says what is shown; this file knows how Grafana writes it down.
"""
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# In expressions CLUSTER, STAGE and HTTP stand for the label matchers of the variables.
MATCHERS = {
    "CLUSTER": 'instance=~"$instance", model_name=~"$model_name"',
    "STAGE": 'instance=~"$instance", model_name=~"$model_name", stage=~"$stage"',
    "HTTP": 'instance=~"$instance"',
}


def expand(expression):
    for word, matchers in MATCHERS.items():
        expression = expression.replace(word, matchers)
    return expression


def targets(queries, **fields):
    """queries: (expression, legend) each, or one expression."""
    if isinstance(queries, str):
        queries = [(queries, "")]
    return [{"datasource": DATASOURCE, "editorMode": "code", "expr": expand(expression),
             "legendFormat": legend, "range": True, "refId": chr(ord("A") + index), **fields}
            for index, (expression, legend) in enumerate(queries)]


def panel(kind, title, description, unit, width, height, queries, options, *, custom=None,
          minimum=None, maximum=None, thresholds=(), decimals=None, mappings=()):
    """One panel without an id and a place; layout() gives it both."""
    steps = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for value, color in thresholds]
    defaults = {"unit": unit, "color": {"mode": "thresholds" if thresholds else "palette-classic"},
                "thresholds": {"mode": "absolute", "steps": steps}, "mappings": list(mappings),
                "custom": custom or {}}
    for name, value in (("min", minimum), ("max", maximum), ("decimals", decimals)):
        if value is not None:
            defaults[name] = value
    return {"type": kind, "title": title, "description": description, "datasource": DATASOURCE,
            "gridPos": {"w": width, "h": height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options, "targets": queries}


def graph(title, description, unit, queries, *, width=8, stack=False, minimum=0, maximum=None):
    """Lines over time; stack: areas on top of each other."""
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 40 if stack else 8,
              "showPoints": "never", "spanNulls": False, "axisSoftMin": 0,
              "stacking": {"mode": "normal" if stack else "none", "group": "A"}}
    options = {"legend": {"displayMode": "table", "placement": "bottom", "showLegend": True,
                          "calcs": ["lastNotNull", "max"]},
               "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, description, unit, width, 8, targets(queries), options,
                 custom=custom, minimum=minimum, maximum=maximum)


def quantiles(title, description, metric, unit="s", *, bound=None, width=8):
    """p50, p95 and p99 of a histogram over the chosen clusters; bound: a recorded limit to draw."""
    queries = [(f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{CLUSTER}}[$__rate_interval])))",
                name) for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))]
    if bound:
        queries.append((bound, "bound"))
    return graph(title, description, unit, queries, width=width)


def heatmap(title, description, metric, unit, *, width=8):
    """The distribution of a histogram over time, one row for each bucket."""
    queries = targets([(f"sum by (le) (increase({metric}_bucket{{CLUSTER}}[$__rate_interval]))", "{{le}}")],
                      format="heatmap")
    options = {"calculate": False, "cellGap": 1, "cellValues": {"unit": "short"},
               "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "reverse": False,
                         "exponent": 0.5, "scale": "exponential", "fill": "dark-orange"},
               "filterValues": {"le": 1e-9}, "exemplars": {"color": "rgba(255,0,255,0.7)"},
               "legend": {"show": True}, "showValue": "never", "rowsFrame": {"layout": "auto"},
               "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
               "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit}}
    return panel("heatmap", title, description, unit, width, 8, queries, options)


def stat(title, description, unit, expression, *, width=3, thresholds=(), decimals=None, mappings=()):
    """One large figure: the present value."""
    options = {"colorMode": "value" if thresholds else "none", "graphMode": "area", "justifyMode": "auto",
               "orientation": "auto", "textMode": "auto", "wideLayout": True,
               "showPercentChange": False, "percentChangeColorMode": "standard",
               "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return panel("stat", title, description, unit, width, 4, targets(expression), options,
                 thresholds=thresholds, decimals=decimals, mappings=mappings)


def table(title, description, unit, expression, columns, *, width=12, height=6):
    """The present labels of a series; columns: {label or Value: heading}, everything else is hidden."""
    options = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0}
    result = panel("table", title, description, unit, width, height,
                   targets(expression, format="table", instant=True), options)
    result["targets"][0]["range"] = False
    result["transformations"] = [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {"id": "organize", "options": {
            "renameByName": columns, "excludeByName": {},
            "indexByName": {name: index for index, name in enumerate(columns)}}}]
    return result


def layout(rows):
    """rows: (title, panels) each. Gives every panel an id and a place, from left to right."""
    placed, top = [], 0
    for title, panels in rows:
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}})
        top += 1
        left = height = 0
        for item in panels:
            place = item["gridPos"]
            if left + place["w"] > COLUMNS:
                top, left, height = top + height, 0, 0
            place.update(x=left, y=top)
            left += place["w"]
            height = max(height, place["h"])
            placed.append(item)
        top += height
    for number, item in enumerate(placed, start=1):
        item["id"] = number
    return placed


def label_variable(name, label, metric):
    """A variable with the values of a label, several of which can be chosen."""
    query = f"label_values({expand(metric)}, {name})"
    return {"name": name, "label": label, "type": "query", "datasource": DATASOURCE,
            "definition": query, "query": {"qryType": 1, "query": query, "refId": "labels"},
            "refresh": 2, "sort": 3, "regex": "", "hide": 0, "multi": True, "includeAll": True,
            "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "options": []}


def datasource_variable():
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
            "refresh": 1, "regex": "", "hide": 0, "multi": False, "includeAll": False,
            "current": {"text": "default", "value": "default"}, "options": []}


def event(name, expression, color, text):
    """Marks on all graphs where the expression has a value."""
    return {"name": name, "datasource": DATASOURCE, "enable": True, "hide": False, "iconColor": color,
            "expr": expand(expression), "step": "", "titleFormat": name, "textFormat": text,
            "useValueForTime": False}
