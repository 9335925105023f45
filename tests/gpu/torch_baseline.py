#!/usr/bin/env python3
"""What PyTorch reaches on this GPU, for docs/performance.md: one JSON object a line.

torch_baseline.py [--model-decode] : scaled_dot_product_attention at the shapes of our attention
benchmarks with every backend that takes them, and with --model-decode a plain transformers Llama of
the 8B shape with random weights, decoding at batch 1 and 16. Needs torch and transformers.
"""
import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def median_us(run, n_runs=20, n_warm_up=4):
    for i in range(n_warm_up):
        run(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(n_runs)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        run(n_warm_up + i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1000


def attention(name, queries, causal, batch, tokens, backends):
    # Several inputs in turn, so that the cache does not hold them.
    size = 2 * batch * tokens * KV_HEADS * DIM * 2
    n_sets = max(1, min(8, (1 << 30) // size))
    make = lambda heads, length: [torch.randn(batch, heads, length, DIM, device="cuda",
                                              dtype=torch.bfloat16) for _ in range(n_sets)]
    q, k, v = make(HEADS, queries), make(KV_HEADS, tokens), make(KV_HEADS, tokens)
    best = None
    for backend in backends:
        def run(i):
            s = i % n_sets
            torch.nn.functional.scaled_dot_product_attention(q[s], k[s], v[s], is_causal=causal,
                                                             enable_gqa=True)
        try:
            with sdpa_kernel(BACKENDS[backend]):
                us = median_us(run)
        except RuntimeError:
            continue
        if best is None or us < best[1]:
            best = (backend, us)
    if best:
        print(json.dumps({"name": name, "parameters": {"batch": batch, "tokens": tokens},
                          "backend": best[0], "median_us": round(best[1], 2)}), flush=True)


def model_decode():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
                         vocab_size=128256, max_position_embeddings=8192,
                         attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        # Buffers on the meta device have no content either.
        rotary = model.model.rotary_emb
        inv_freq = 1.0 / (500000.0 ** (torch.arange(0, DIM, 2, device="cuda",
                                                    dtype=torch.float32) / DIM))
        rotary.inv_freq = inv_freq
        rotary.original_inv_freq = inv_freq
        for batch in (1, 16):
            ids = torch.randint(0, 128256, (batch, 128), device="cuda")
            out = model(ids, use_cache=True)
            cache = out.past_key_values
            token = ids[:, :1]

            def run(_):
                model(token, past_key_values=cache, use_cache=True)
            us = median_us(run, n_runs=32)
            print(json.dumps({"name": "torch_model_decode", "parameters": {"batch": batch},
                              "median_us": round(us, 1),
                              "tokens_per_s": round(batch / us * 1e6, 1)}), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-decode", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"name": "torch", "version": torch.__version__,
                      "gpu": torch.cuda.get_device_name()}), flush=True)
    with torch.no_grad():
        for batch in (1, 16, 32):
            for tokens in (4096, 16384, 32768):
                attention("torch_decode_attention", 1, False, batch, tokens,
                          ("cudnn", "flash", "efficient"))
        for tokens in (2048, 8192, 32768):
            attention("torch_prefill_attention", tokens, True, 1, tokens, ("cudnn", "flash"))
        if arguments.model_decode:
            model_decode()


if __name__ == "__main__":
    main()
