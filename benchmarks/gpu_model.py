"""A whole model at batch 1, dense and packed, for `gpu.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_bench import CAPTURED, METHODS, Bench, Row, TimeIsUp
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from compress.hf import packed

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
EAGER, GRAPH = "model, eager", "model, CUDA graph"
_CONTEXT = 2048
_STEPS = 400  # that are timed of a measurement; twice as many are run, and 1600 fit the context
_SECONDS = 2.0
_SPARE = 3 << 30  # bytes
_WHILE_PACKING = 1.15  # of the dense model's bytes


def models(bench: Bench, shapes: dict[str, Any] = LLAMA_8B) -> Iterator[Row]:
    """Tokens a second, eager and from a CUDA graph; bytes of weights; peak memory of decoding."""
    config = fitting(LlamaConfig(**shapes), bench.device)
    bench = replace(bench, seconds=_SECONDS if bench.device.type == "cuda" else 0.0)
    case = f"Llama of {config.num_hidden_layers} layers of {config.hidden_size}"
    base: dict[str, float] = {}
    for method in METHODS:
        try:
            found = list(_measure(bench, config, method))
        except TimeIsUp:
            found = [(EAGER, None, "the time was up")]
        except torch.cuda.OutOfMemoryError:
            found = [(EAGER, None, "out of memory")]
        release()
        for what, value, unit in found:
            if value is None:
                yield Row(what, case, method, None, note=unit)
                continue
            against = value / base.setdefault(what, value)
            note = "" if method == "bf16" else f"{against:.2f}×"
            yield Row(what, case, method, value, unit, note)


def fitting(config: LlamaConfig, device: torch.device) -> LlamaConfig:
    """The same with as many layers as there is room for while they are packed."""
    if device.type != "cuda":
        return config
    free, _ = torch.cuda.mem_get_info(device)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = 2 * config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * hidden + heads + 3 * inner)
    ends = 2 * config.vocab_size * hidden
    room = (free - _SPARE) / (2 * _WHILE_PACKING) - ends
    config.num_hidden_layers = max(1, min(config.num_hidden_layers, int(room / layer)))
    return config


def _measure(
    bench: Bench, config: LlamaConfig, method: str
) -> Iterator[tuple[str, float | None, str]]:
    bench.check()
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        if method != "bf16":
            pack(model, method)
        release()
        nbytes = sum(t.nbytes for t in _storages(model))
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = stepping(model, config, bench.device)
        time = bench.milliseconds([step], graph=False, most=_STEPS)
        yield EAGER, 1e3 / time, "tokens/s"
        if bench.device.type == "cuda":
            yield from _graphed(bench, step)
            yield "model, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB"
        yield "model, weights", nbytes / 1e9, "GB"


def _graphed(bench: Bench, step: Callable[[], object]) -> Iterator[tuple[str, float | None, str]]:
    try:
        time = bench.milliseconds([step], most=_STEPS // CAPTURED)
        yield GRAPH, 1e3 / time, "tokens/s"
    except RuntimeError as error:
        yield GRAPH, None, " ".join(str(error).split())[:200]


def pack(model: nn.Module, layout: str) -> None:
    """Every Linear and Embedding, in place, fused; q, k, v and gate, up merged."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            made = packed.pack(module.weight.detach(), layout, name)
            if made is not None:
                packed.adopt(module, *made, "weights")
    packed.merge(model)


def stepping(model: Any, config: LlamaConfig, device: torch.device) -> Callable[[], object]:
    """A function that decodes the next token; the state stays on the device."""
    cache = StaticCache(config=config, max_cache_len=_CONTEXT)
    prompt = torch.arange(1, 17, device=device)[None] % config.vocab_size
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _storages(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, those that modules share once."""
    seen = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    yield from seen.values()
