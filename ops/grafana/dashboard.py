#!/usr/bin/env python3
"""Writes spindle.json, the Grafana dashboard, beside this file.

  dashboard.py           write it
  dashboard.py --check   only say whether it is current (exit code 1 if not)

README.md says what each row answers. Panels read what /metrics exports, not recorded series, so that
they work without our rules; the lines "bound" and the alerts come from the rules.
"""
import json
import pathlib
import sys

from panels import (datasource_variable, event, graph, heatmap, label_variable, layout, quantiles, stat,
                    table)

OUTPUT = pathlib.Path(__file__).with_name("spindle.json")
RATE = "[$__rate_interval]"
STAGE_LEGEND = "{{instance}} stage {{stage}}"
TOKENS_PER_SECOND = "suffix: tok/s"

OVERVIEW = [
    stat("Clusters answering", "Targets of the job spindle that Prometheus can read.", "none",
         'sum(up{job="spindle", HTTP})', thresholds=[]),
    stat("Running", "Requests in execution.", "none", "sum(spindle_num_requests_running{CLUSTER})"),
    stat("Waiting", "Requests queued for their first step. Above 0 for minutes: the cluster is too small "
         "for its load.", "none", "sum(spindle_num_requests_waiting{CLUSTER})", thresholds=[(1, "orange")]),
    stat("First token, p95", "Arrival of a request to its first token.", "s",
         f"histogram_quantile(0.95, sum by (le) (rate(spindle_time_to_first_token_seconds_bucket{{CLUSTER}}{RATE})))"),
    stat("Between tokens, p95", "Between two tokens of one answer.", "s",
         f"histogram_quantile(0.95, sum by (le) (rate(spindle_inter_token_latency_seconds_bucket{{CLUSTER}}{RATE})))"),
    stat("Output", "Tokens generated per second.", TOKENS_PER_SECOND,
         f"sum(rate(spindle_generation_tokens_total{{CLUSTER}}{RATE}))", decimals=0),
    stat("KV pressure", "Bytes promised to requests, of the pool, on the fullest stage. New requests wait "
         "near 100 %.", "percentunit", "max(spindle_kv_pressure_ratio{CLUSTER})",
         thresholds=[(0.8, "orange"), (0.95, "red")]),
    stat("Alerts", "Alerts of our rules that fire now.", "none",
         'count(ALERTS{alertname=~"Spindle.+", alertstate="firing"}) or vector(0)', thresholds=[(1, "red")]),
]

LATENCY = [
    quantiles("Time to first token", "Arrival (before tokenising) to the first token. The line is the bound of "
              "the alert.", "spindle_time_to_first_token_seconds",
              bound="slo:spindle_time_to_first_token_seconds:p95"),
    quantiles("Between tokens", "Between two tokens of one choice. The line is the bound of the alert.",
              "spindle_inter_token_latency_seconds", bound="slo:spindle_inter_token_latency_seconds:p95"),
    quantiles("Whole request", "Submit to end, of requests that finished.", "spindle_e2e_request_latency_seconds"),
    quantiles("Queue", "Submit to first step. High: not enough KV or too many requests.",
              "spindle_request_queue_time_seconds"),
    quantiles("Prefill", "First step to first token.", "spindle_request_prefill_time_seconds"),
    quantiles("Decode", "First token to last token.", "spindle_request_decode_time_seconds"),
    quantiles("Inference", "First step to last token: prefill and decode.", "spindle_request_inference_time_seconds"),
    quantiles("Time per output token", "Decode time of a request divided by its tokens after the first.",
              "spindle_request_time_per_output_token_seconds"),
    heatmap("Time to first token, distribution", "How many requests fell into each bucket. Two bands are two "
            "kinds of prompts.", "spindle_time_to_first_token_seconds", "s"),
    heatmap("Between tokens, distribution", "How many gaps fell into each bucket. A second band above is "
            "prefill of others between the tokens.", "spindle_inter_token_latency_seconds", "s", width=12),
    heatmap("Whole request, distribution", "How many requests fell into each bucket.",
            "spindle_e2e_request_latency_seconds", "s", width=12),
]

THROUGHPUT = [
    graph("Tokens", "Prompt tokens read and tokens generated.", TOKENS_PER_SECOND,
          [(f"sum(rate(spindle_prompt_tokens_total{{CLUSTER}}{RATE}))", "prompt"),
           (f"sum(rate(spindle_generation_tokens_total{{CLUSTER}}{RATE}))", "generated")]),
    graph("Requests", "Accepted, and how they ended.", "reqps",
          [(f"sum(rate(spindle_requests_{what}_total{{CLUSTER}}{RATE}))", what)
           for what in ("accepted", "finished", "failed", "cancelled")]),
    graph("Reasons to finish", "Choices by the reason they ended. More abort: clients give up.", "cps",
          [(f"sum by (finished_reason) (rate(spindle_request_success_total{{CLUSTER}}{RATE}))",
            "{{finished_reason}}")], stack=True),
    graph("Steps", "Steps of the engine; one is one micro-batch through all stages.", "ops",
          [(f"sum by (instance) (rate(spindle_engine_steps_total{{CLUSTER}}{RATE}))", "{{instance}}")]),
    heatmap("Tokens per step", "Prompt and output tokens that one step computed. Few: decode alone, many: "
            "prefill.", "spindle_iteration_tokens", "short"),
    quantiles("Tokens asked for", "max_tokens of requests.", "spindle_request_params_max_tokens", "short"),
    heatmap("Prompt length", "Tokens of the prompts of requests that finished.", "spindle_request_prompt_tokens",
            "short"),
    heatmap("Output length", "Tokens generated by requests that finished, over all choices.",
            "spindle_request_generation_tokens", "short"),
    graph("Choices", "Choices per request (n), and the longest of them, on average.", "short",
          [(f"sum(rate(spindle_request_params_n_sum{{CLUSTER}}{RATE}))"
            f" / sum(rate(spindle_request_params_n_count{{CLUSTER}}{RATE}))", "choices"),
           (f"sum(rate(spindle_request_max_num_generation_tokens_sum{{CLUSTER}}{RATE}))"
            f" / sum(rate(spindle_request_max_num_generation_tokens_count{{CLUSTER}}{RATE}))",
            "tokens of the longest")]),
]

QUEUE = [
    graph("Requests in the engine", "Running and waiting, and how many sequences may run at most. Running at that "
          "line with KV to spare: raise scheduler.max_num_seqs.", "short",
          [("sum(spindle_num_requests_running{CLUSTER})", "running"),
           ("sum(spindle_num_requests_waiting{CLUSTER})", "waiting"),
           ("sum(spindle_max_num_seqs{CLUSTER})", "limit")]),
    graph("Prompt tokens waiting", "Prompt tokens of the queued requests: the work that is due.", "short",
          [("sum by (instance) (spindle_num_prompt_tokens_waiting{CLUSTER})", "{{instance}}")]),
    graph("Refused", "Requests turned away before they ran. invalid is the client's fault, queue_full and "
          "unavailable are ours.", "reqps",
          [(f"sum by (reason) (rate(spindle_requests_refused_total{{CLUSTER}}{RATE}))", "{{reason}}")]),
    graph("Failed and expired", "Requests the engine could not finish, those of them whose time was up, and "
          "those that clients cancelled.", "reqps",
          [(f"sum(rate(spindle_requests_{what}_total{{CLUSTER}}{RATE}))", what)
           for what in ("failed", "expired", "cancelled")]),
    graph("Preemptions", "Times that a running request gave its KV to another and waited again.", "cps",
          [(f"sum by (instance) (rate(spindle_num_preemptions_total{{CLUSTER}}{RATE}))", "{{instance}}")]),
    graph("Recomputed", "Tokens that preempted requests had to compute again.", TOKENS_PER_SECOND,
          [(f"sum by (instance) (rate(spindle_recomputed_tokens_total{{CLUSTER}}{RATE}))", "{{instance}}")]),
    graph("HTTP responses", "By class of status.", "reqps",
          [(f"sum by (status) (rate(spindle_http_requests_total{{HTTP}}{RATE}))", "{{status}}")], width=12),
    graph("HTTP duration, p95", "From request to the end of the response, streams included.", "s",
          [(f"histogram_quantile(0.95, sum by (le, handler) "
            f"(rate(spindle_http_request_duration_seconds_bucket{{HTTP}}{RATE})))", "{{handler}}")], width=12),
]

KV = [
    graph("Pressure", "Bytes that the ledger has promised to requests and sessions, of the pool. Requests wait "
          "when a stage cannot promise more.", "percentunit",
          [("spindle_kv_pressure_ratio{STAGE}", STAGE_LEGEND)]),
    graph("Used", "Bytes really held, of the pool.", "percentunit",
          [("spindle_kv_used_bytes{STAGE} / (spindle_kv_capacity_bytes{STAGE} > 0)", STAGE_LEGEND)]),
    graph("Kept, of uncompressed", "Bytes held, of what the same tokens take in 16 bit: the compression. "
          "20 % is five times smaller; a little above 100 %: not compressed yet, and pages that are not full.",
          "percentunit",
          [("sum without (repr) (spindle_kv_stored_bytes{STAGE}) / (spindle_kv_full_bytes{STAGE} > 0)",
            STAGE_LEGEND)]),
    graph("Bytes of the stages", "Sum over the chosen stages: pool, promised, held, most ever held, and what "
          "the held tokens would take uncompressed.", "bytes",
          [(f"sum(spindle_kv_{what}_bytes{{STAGE}})", what)
           for what in ("capacity", "committed", "used", "peak", "full")]),
    graph("Budget", "Bytes that the balancer plans for the requests that should run together, at the "
          "stage's present level. Without a balancer the pool's size.", "bytes",
          [("spindle_kv_budget_bytes{STAGE}", STAGE_LEGEND)]),
    graph("Representations", "Bytes held, by the form they are held in.", "bytes",
          [("sum by (repr) (spindle_kv_stored_bytes{STAGE})", "{{repr}}")], stack=True),
    graph("Tokens kept", "Tokens that are still held in any form, of the tokens that were seen.", "percentunit",
          [('sum without (kind) (spindle_kv_tokens{STAGE, kind="retained"})'
            ' / (sum without (kind) (spindle_kv_tokens{STAGE, kind="logical"}) > 0)', STAGE_LEGEND)]),
    graph("Level", "Share of the uncompressed bytes that the stage's layers are planned for where a request "
          "asked for no size. Lower is stronger compression.", "percentunit",
          [("spindle_kv_level_ratio{STAGE}", STAGE_LEGEND)]),
    graph("Price", "Expected error that one more byte on this stage would save. 0 where memory does not bind.",
          "sci", [("spindle_kv_price{STAGE}", STAGE_LEGEND)]),
]

POLICIES = [
    graph("Layers by policy", "Layers of the chosen stages, by the plan that most of their KV has; none: they hold "
          "nothing.", "short",
          [("sum by (policy) (spindle_kv_layers{STAGE})", "{{policy}}")], stack=True, width=12),
    table("Layers by stage and policy, now", "The same by stage. Single layers are in /v1/spindle/state and in "
          "the built-in dashboard.", "none", "spindle_kv_layers{STAGE} > 0",
          {"instance": "Cluster", "stage": "Stage", "device": "Device", "policy": "Policy", "Value": "Layers"},
          height=8),
]

BALANCE = [
    graph("Requests wanted and fitting", "How many requests should run together, and how many fit at the "
          "present levels. Wanted above fitting: the balancer compresses harder.", "short",
          [("sum by (instance) (spindle_kv_balancer_wanted_requests{CLUSTER})", "{{instance}} wanted"),
           ("sum by (instance) (spindle_kv_balancer_fitting_requests{CLUSTER})", "{{instance}} fitting")]),
    graph("Imbalance", "The fullest stage's pressure, of the mean of all stages. 1 is even; the alert is "
          "at 1.25.", "none",
          [("max by (instance) (spindle_kv_pressure_ratio{CLUSTER})"
            " / (avg by (instance) (spindle_kv_pressure_ratio{CLUSTER}) > 0)", "{{instance}}")]),
    graph("Moves", "Changes of a stage's level within the last 5 minutes.", "short",
          [("sum by (instance, stage, direction) (increase(spindle_kv_budget_moves_total{STAGE}[5m]))",
            STAGE_LEGEND + " {{direction}}")]),
    graph("Plans", "Decisions of the balancer that moved a level.", "cps",
          [(f"sum by (instance) (rate(spindle_kv_budget_plans_total{{CLUSTER}}{RATE}))", "{{instance}}")],
          width=12),
    graph("Time of the balancer", "Share of a second that rank 0 spends on these decisions.", "percentunit",
          [(f"sum by (instance) (rate(spindle_kv_balancer_seconds_total{{CLUSTER}}{RATE}))", "{{instance}}")],
          width=12),
]

PIPELINE = [
    graph("Busy", "Share of its time that a stage computes. The highest is the stage that limits the others.",
          "percentunit", [(f"rate(spindle_stage_busy_seconds_total{{STAGE}}{RATE})", STAGE_LEGEND)]),
    graph("Bubbles by cause", "Share of time that a stage cannot compute although the cluster has requests, mean of "
          "the chosen stages. empty: it has no step; upstream: it waits for activations; downstream: the next stage "
          "does not take its activations.", "percentunit",
          [(f"avg by (cause) (rate(spindle_stage_bubble_seconds_total{{STAGE}}{RATE}))", "{{cause}}")], stack=True),
    graph("Bubbles", "The same by stage, all causes.", "percentunit",
          [(f"sum without (cause) (rate(spindle_stage_bubble_seconds_total{{STAGE}}{RATE}))", STAGE_LEGEND)]),
    graph("Transfer", "Share of time in sending and receiving activations, once both sides are there.", "percentunit",
          [(f"rate(spindle_stage_transfer_seconds_total{{STAGE}}{RATE})", STAGE_LEGEND + " {{op}}")]),
    graph("Compression", "Share of time in compressing KV at boundaries.", "percentunit",
          [(f"rate(spindle_stage_compress_seconds_total{{STAGE}}{RATE})", STAGE_LEGEND)]),
    graph("Micro-batches in flight", "Steps that are somewhere in the pipeline. Fewer than stages: some stage "
          "has nothing.", "short",
          [("sum by (instance) (spindle_micro_batches_in_flight{CLUSTER})", "{{instance}}")]),
    graph("Steps of the stages", "Steps per second that each stage ran.", "ops",
          [(f"rate(spindle_stage_steps_total{{STAGE}}{RATE})", STAGE_LEGEND)], width=12),
    graph("Age of the newest report", "Since each stage last reported a step. It grows while there is nothing to do.", "s",
          [("spindle_worker_last_report_seconds{STAGE}", STAGE_LEGEND)], width=12),
]

PROCESS = [
    stat("Uptime", "Since the youngest of the chosen clusters started.", "s",
         "min(time() - spindle_process_start_time_seconds{CLUSTER})", width=4),
    stat("Draining", "Clusters that refuse new requests in order to stop.", "none",
         "sum(spindle_draining{CLUSTER})", width=4, thresholds=[(1, "orange")]),
    stat("Weights", "Bytes of the weights of the chosen stages.", "bytes", "sum(spindle_weight_bytes{STAGE})",
         width=4),
    table("Version", "What runs where.", "none", "spindle_build_info{HTTP}",
          {"instance": "Cluster", "version": "Version"}, height=4),
    table("KV configuration", "How the cache was configured.", "none", "spindle_cache_config_info{CLUSTER}",
          {"instance": "Cluster", "policy": "Policy", "ratio": "Ratio", "cache_dtype": "Type", "sinks": "Sinks",
           "recent": "Recent", "balance": "Balance", "max_sessions": "Sessions"}, height=8),
    graph("HTTP sizes, mean", "Bytes of bodies.", "bytes",
          [(f"sum(rate(spindle_http_{what}_size_bytes_sum{{HTTP}}{RATE}))"
            f" / sum(rate(spindle_http_{what}_size_bytes_count{{HTTP}}{RATE}))", what)
           for what in ("request", "response")], width=6),
    graph("Scrapes", "How long Prometheus takes to read /metrics.", "s",
          [('scrape_duration_seconds{job="spindle", HTTP}', "{{instance}}")], width=6),
]

ROWS = [("Overview", OVERVIEW), ("Latency", LATENCY), ("Throughput", THROUGHPUT),
        ("Queue and admission", QUEUE), ("KV of the stages", KV), ("Policies of the layers", POLICIES),
        ("Balance", BALANCE), ("Pipeline", PIPELINE), ("Process", PROCESS)]

VARIABLES = [datasource_variable(),
             label_variable("instance", "Cluster", "spindle_num_requests_running"),
             label_variable("model_name", "Model", "spindle_num_requests_running{HTTP}"),
             label_variable("stage", "Stage", "spindle_kv_capacity_bytes{CLUSTER}")]

EVENTS = [event("Start", "changes(spindle_process_start_time_seconds{CLUSTER}[1m]) > 0", "blue", "{{instance}}"),
          event("Drain", "spindle_draining{CLUSTER} > 0", "orange", "{{instance}}"),
          event("Alert", 'ALERTS{alertname=~"Spindle.+", alertstate="firing", HTTP}', "red", "{{alertname}}")]


def dashboard():
    return {
        "uid": "spindle", "title": "Spindle", "description": "A Spindle cluster: latency, load, and the KV cache, "
        "balance and pipeline of its stages.", "tags": ["spindle", "llm"], "id": None, "version": 1,
        "schemaVersion": 41, "editable": True, "graphTooltip": 1, "fiscalYearStartMonth": 0, "links": [],
        "liveNow": False, "weekStart": "", "timezone": "browser", "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "timepicker": {},
        "templating": {"list": VARIABLES}, "annotations": {"list": EVENTS}, "panels": layout(ROWS),
    }


def main():
    text = json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not OUTPUT.is_file() or OUTPUT.read_text() != text:
            sys.exit(f"{OUTPUT.name} is not what dashboard.py writes: run it")
        return
    if sys.argv[1:]:
        sys.exit(__doc__)
    OUTPUT.write_text(text)


if __name__ == "__main__":
    main()
