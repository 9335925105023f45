#!/usr/bin/env python3
"""Tables and plots of the capacity study (docs/scale.md), from what spindle_scale measured.

    ops/bench/scale_report.py docs/scale.md scale-8b.json scale-70b.json ...

Replaces what stands between the two `figures` comments of the report, and writes
plots/scale-*.svg beside it. Several files are put together; their loads may differ in the policy, the
balancing and the number of requests only.
"""
import json
import math
import pathlib
import sys

KEYS = ("model", "memories", "n_stages", "policy", "balances")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 72, 190, 44, 52


def read_cells(paths):
    cells = []
    for path in paths:
        data = json.loads(pathlib.Path(path).read_text())
        for cell in data["cells"]:
            cell["policy"] = data["load"]["policy"]
            cell["balances"] = data["load"]["balances"]
            cell["requests"] = data["load"]["requests"]
            cells.append(cell)
    # Of cells that were run twice the one with more requests counts.
    best = {}
    for cell in sorted(cells, key=lambda c: c["requests"]):
        best[tuple(cell[key] for key in KEYS)] = cell
    return sorted(best.values(), key=lambda c: (c["model"] != "llama-3-8b", c["memories"],
                                                c["n_stages"]))


def ticks(high):
    raw = high / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= raw)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def number(value):
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def text(x, y, anchor, content, more=""):
    content = content.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{content}</text>\n'


def line(x1, y1, x2, y2, colour, more=""):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{colour}"{more}/>\n')


def begin_chart(title, y_label, y_ticks):
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    out = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" '
           f'fill="#333">\n<title>{title}</title>\n'
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n')
    out += text(LEFT, 24, "start", title, ' font-size="15" font-weight="bold"')
    out += text(16, middle, "middle", y_label, f' transform="rotate(-90 16 {middle:.1f})"')
    for tick in y_ticks:
        y = y_at(tick, y_ticks)
        out += line(LEFT, y, WIDTH - RIGHT, y, "#e4e4e4")
        out += text(LEFT - 6, y + 4, "end", number(tick))
    return out


def y_at(value, y_ticks):
    return HEIGHT - BOTTOM - value / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)


def line_chart(title, y_label, series):
    """series: {name: [(stages, value)]}; stages on a logarithmic axis."""
    points = [p for values in series.values() for p in values]
    y_ticks = ticks(max(y for _, y in points))
    stages = sorted({x for x, _ in points})
    low, high = math.log2(stages[0]) - 0.2, math.log2(stages[-1]) + 0.2

    def x_at(n):
        return LEFT + (math.log2(n) - low) / (high - low) * (WIDTH - RIGHT - LEFT)

    out = begin_chart(title, y_label, y_ticks)
    for n in stages:
        out += line(x_at(n), TOP, x_at(n), HEIGHT - BOTTOM, "#e4e4e4")
        out += text(x_at(n), HEIGHT - BOTTOM + 18, "middle", str(n))
    out += text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "middle", "stages")
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y, y_ticks):.1f}" for x, y in sorted(values))
        out += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n'
        for x, y in values:
            out += (f'<circle cx="{x_at(x):.1f}" cy="{y_at(y, y_ticks):.1f}" r="3" '
                    f'fill="{colour}"/>\n')
        y = TOP + 10 + 18 * i
        out += line(WIDTH - RIGHT + 10, y, WIDTH - RIGHT + 30, y, colour, ' stroke-width="2"')
        out += text(WIDTH - RIGHT + 36, y + 4, "start", name)
    return out + "</svg>\n"


def bar_chart(title, y_label, values, x_label):
    y_ticks = ticks(max(max(values), 1e-9))
    out = begin_chart(title, y_label, y_ticks)
    room = (WIDTH - RIGHT - LEFT) / len(values)
    every = max(1, math.ceil(24 / room))
    for i, value in enumerate(values):
        left, y = LEFT + room * i, y_at(value, y_ticks)
        out += (f'<rect x="{left + 0.1 * room:.1f}" y="{y:.1f}" width="{0.8 * room:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{COLOURS[0]}"/>\n')
        if i % every == 0:
            out += text(left + room / 2, HEIGHT - BOTTOM + 18, "middle", str(i))
    out += text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "middle", x_label)
    return out + "</svg>\n"


def bubbles(cell):
    return [max(0, 100 * (1 - stage["busy_share"])) for stage in cell["stages"]]


def tightest(cell):
    return max(cell["stages"], key=lambda s: s["used_share"] + s["reserved_share"])


def cell_row(cell):
    lost = bubbles(cell)
    tight = tightest(cell)
    queue = "" if cell["waits"] else " *"
    return (f"| {cell['n_stages']} | {cell['memories']} | {cell['requests']:,} | "
            f"{cell['concurrency']:,.0f}{queue} | "
            f"{cell['output_per_s']:,.0f} | {cell['batch_tokens']:,.0f} | "
            f"{cell['step_us'] / 1000:.2f} | "
            f"{min(lost):.0f} / {sum(lost) / len(lost):.0f} / {max(lost):.0f} | "
            f"{100 * tight['used_share']:.0f} + {100 * tight['reserved_share']:.0f} | "
            f"{cell['preemptions']:,} | {cell['decision_p50_us']:.0f} / "
            f"{cell['decision_mean_us']:.0f} / {cell['decision_p99_us']:.0f} | "
            f"{100 * cell['decision_share']:.1f} |")


HEADER = ("| stages | memories | of requests | running requests | output tokens/s | tokens in a step | step ms | "
          "bubble %, least / mean / most | tightest pool %, used + promised | preemptions | "
          "decision us, p50 / mean / p99 | of the step % |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|---|")


def table(cells):
    return "\n".join([HEADER] + [cell_row(cell) for cell in cells])


def balance_table(pairs):
    rows = ["| stages | balancing | running requests | output tokens/s | tightest pool %, used + "
            "promised | budget plans | levels beyond the policy's own | decision us, mean |",
            "|---|---|---|---|---|---|---|---|"]
    for cell in pairs:
        tight = tightest(cell)
        levels = " ".join(str(level) for level in cell["levels"]) or "-"
        rows.append(f"| {cell['n_stages']} | {'on' if cell['balances'] else 'off'} | "
                    f"{cell['concurrency']:,.0f}{'' if cell['waits'] else ' *'} | "
                    f"{cell['output_per_s']:,.0f} | "
                    f"{100 * tight['used_share']:.0f} + {100 * tight['reserved_share']:.0f} | "
                    f"{cell['budget_plans']} | {levels} | {cell['decision_mean_us']:,.0f} |")
    return "\n".join(rows)


def series_of(cells, value):
    series = {}
    for cell in cells:
        name = f"{cell['model'].removeprefix('llama-3-')}, {cell['memories']}"
        series.setdefault(name, []).append((cell["n_stages"], value(cell)))
    return series


def figures(cells, plots):
    """The Markdown between the comments; writes the plots."""
    plain = [c for c in cells if c["policy"] == "full"]
    other = [c for c in cells if c["policy"] != "full"]
    charts = {
        "concurrency": line_chart("Requests that run together", "requests",
                                  series_of(plain, lambda c: c["concurrency"])),
        "throughput": line_chart("Output", "tokens per second",
                                 series_of(plain, lambda c: c["output_per_s"])),
        "bubble": line_chart("Bubble, mean over the stages", "% of the time",
                             series_of(plain, lambda c: sum(bubbles(c)) / len(bubbles(c)))),
        "decision": line_chart("Rank 0's decisions, median step", "microseconds per step",
                               series_of(plain, lambda c: c["decision_p50_us"])),
    }
    out = []
    for model in dict.fromkeys(c["model"] for c in plain):
        of_model = [c for c in plain if c["model"] == model]
        memory = of_model[0]["memory_gb"]
        out.append(f"### {model}, {memory:g} GB a device, full precision\n\n{table(of_model)}")
        largest = max((c for c in of_model if c["memories"] == "equal"),
                      key=lambda c: c["n_stages"])
        name = f"bubble-{model}"
        charts[name] = bar_chart(f"Bubble of each of {largest['n_stages']} stages, {model}",
                                 "% of the time", bubbles(largest), "stage")
    if other:
        other.sort(key=lambda c: (c["n_stages"], c["balances"]))
        first = other[0]
        out.append(f"### Balancing: {first['model']}, profile `{first['policy']}`, memories "
                   f"{first['memories']}, {first['requests']:,} requests\n\n{balance_table(other)}")
        series = {}
        for cell in other:
            name = "balancing on" if cell["balances"] else "balancing off"
            series.setdefault(name, []).append((cell["n_stages"], cell["concurrency"]))
        charts["balancing"] = line_chart("Requests that run together, with and without balancing",
                                         "requests", series)
    for name, chart in charts.items():
        (plots / f"scale-{name}.svg").write_text(chart)
    out.append("\n".join(f"![{name}](plots/scale-{name}.svg)" for name in charts))
    return "\n\n".join(out)


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: scale_report.py REPORT.md RESULTS.json ...")
    report = pathlib.Path(sys.argv[1])
    plots = report.parent / "plots"
    plots.mkdir(exist_ok=True)
    before, rest = report.read_text().split(BEGIN)
    after = rest.split(END)[1]
    body = figures(read_cells(sys.argv[2:]), plots)
    report.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


if __name__ == "__main__":
    main()
