"""Memory and speed of a model packed on the CPU: `python benchmarks/packed.py`.

Two models: demo:smollm2-135m, and a Llama of the size asked for with random weights that are
distributed as trained ones are, Gaussian with a scale for each row. Each way to load is a process
of its own; "peak" is the most that was resident beyond what the imports took, "held" what is
resident after the passes. A step is a pass of one token over a cache of 64, a prompt has 64 tokens;
medians. All logits are compared with the dense model's, bit for bit. "Passive" is with
OMP_WAIT_POLICY=passive: else torch's threads, waiting for its next product, take the processor from
those that decode.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = "demo:smollm2-135m"
HEADER = """\
| model | loaded | weights MB | peak MB | held MB | load s | prompt ms | step ms | logits |
|---|---|---|---|---|---|---|---|---|"""

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
layers, hidden = int(sys.argv[2]), 2048
config = LlamaConfig(
    vocab_size=32000, hidden_size=hidden, intermediate_size=5632, num_hidden_layers=layers,
    num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=True,
)
torch.manual_seed(0)
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16()
model = model.to_empty(device="cpu")
for weight in model.parameters():
    if weight.dim() > 1:
        scale = torch.empty(len(weight), 1).log_normal_(-4, 0.3)
        weight.data.normal_().mul_(scale)
    else:
        weight.data.normal_(1, 0.1)
model.tie_weights()
model.save_pretrained(sys.argv[1])
"""

LOAD = """
import hashlib, json, resource, statistics, sys, time
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from compress.hf.quantizer import EntropressConfig
import compress.hf.packed.loading, compress.hf.skipping, compress.tokens
packed, threads, steps = json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

def seconds(work, *given, **options):
    start = time.perf_counter()
    result = work(*given, **options)
    return time.perf_counter() - start, result

before = resident()
config = EntropressConfig(packed=packed, tokens=False)
load, model = seconds(
    AutoModelForCausalLM.from_pretrained, sys.argv[1], dtype="bfloat16", quantization_config=config
)
tokens = torch.arange(65)[None] * 37 % model.config.vocab_size
digest = hashlib.sha256()
times = {"prompt": [], "step": []}
with torch.no_grad():
    for turn in range(steps + 1):
        prompt, out = seconds(model, tokens[:, :64], use_cache=True)
        step, last = seconds(model, tokens[:, 64:], past_key_values=out.past_key_values)
        if turn:  # the first does not count
            times["prompt"].append(prompt)
            times["step"].append(step)
for logits in (out.logits, last.logits):
    digest.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
print(json.dumps({
    "weights": model.get_memory_footprint(),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    "held": resident() - before,
    "load": load,
    "logits": digest.hexdigest(),
    **{name: statistics.median(taken) for name, taken in times.items()},
}))
"""


def run(code: str, *arguments: object, **environment: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | quiet | environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return done.stdout


def compress(source: object, output: Path) -> None:
    recipe = ["--recipe", "lossless.yaml", "--output-dir", output]
    command = [sys.executable, ROOT / "cli.py", "compress", *recipe, source]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)


def rows(name: str, coded: Path, options: argparse.Namespace) -> None:
    """Print what was measured of one model, dense first."""
    expected = None
    passive = {"OMP_WAIT_POLICY": "passive"}
    kinds = ("dense", False, {}), ("packed", "stored", {}), ("packed, passive", "stored", passive)
    for title, packed, environment in kinds:
        given = json.dumps(packed), options.threads, options.steps
        found: dict[str, Any] = json.loads(run(LOAD, coded, *given, **environment))
        expected = expected or found["logits"]
        cells = [name, title]
        cells += [f"{found[what] / 1e6:.0f}" for what in ("weights", "peak", "held")]
        cells += [f"{found['load']:.1f}"]
        cells += [f"{1e3 * found[what]:.0f}" for what in ("prompt", "step")]
        cells += ["equal" if found["logits"] == expected else "DIFFER"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the random Llama, 90 MB each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=5, help="passes that are timed")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    options = parser.parse_args()
    print(f"{options.threads} threads\n\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        source, large, small = (Path(work, name) for name in ("source", "large", "small"))
        compress(DEMO, small)
        rows("SmolLM2-135M", small, options)
        run(MAKE, source, options.layers)
        compress(source, large)
        rows(f"Llama, {options.layers} layers of 2048", large, options)


if __name__ == "__main__":
    main()
