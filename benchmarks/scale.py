"""Time and memory of a lossless run on a large checkpoint: `python benchmarks/scale.py`.

The checkpoint is synthetic: tensor shapes of an 8B Llama, Gaussian bf16, as many layers as make the
size asked for. Each command runs in a process of its own; its peak resident memory is the kernel's
figure, and that of a Python that has imported the same libraries is taken off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, INTERMEDIATE, KV, VOCABULARY = 4096, 14336, 1024, 128256
SHARD = 1 << 29


def tensors(nbytes: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in order until they fill ``nbytes`` of bf16."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
    }
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    left, index = nbytes - 2 * VOCABULARY * HIDDEN, 0
    while left > 0:
        for name, shape in layer.items():
            found.append((f"model.layers.{index}.{name}.weight", shape))
            left -= 2 * torch.Size(shape).numel()
        index += 1
    return found


def write_checkpoint(directory: Path, nbytes: int) -> int:
    """Shards of about half a gigabyte, an index and a config; returns the size of all tensors."""
    directory.mkdir()
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = total = 0
    for name, shape in tensors(nbytes):
        count = torch.Size(shape).numel()
        start = 7 * len(name)
        repeated = noise[start:].repeat(count // (noise.numel() - start) + 1)[:count]
        if filled and filled + 2 * count > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = repeated.view(shape)
        filled += 2 * count
        total += 2 * count
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return total


# A process's peak counts what it inherited at its start, so a small one stands between.
LAUNCH = """
import resource, subprocess, sys
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
status = subprocess.run([sys.executable, *sys.argv[1:]], **quiet).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run(*command: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python command that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - start, int(done.stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    options = parser.parse_args()
    _, interpreter = run("-c", "import compress.main, compress.pipeline, numpy, rich, pydantic")
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        source, coded, dense = (str(Path(work, name)) for name in ("source", "coded", "dense"))
        total = write_checkpoint(Path(source), int(options.gigabytes * 1e9))
        shards = len(list(Path(source).glob("*.safetensors")))
        print(f"{total / 1e9:.2f} GB of bf16 in {shards} shards\n")
        print("| command | seconds | GB/s | peak memory above the interpreter, MB |")
        print("|---|---|---|---|")
        for name, command in {
            "compress": ("compress", "--recipe", "lossless.yaml", "--output-dir", coded, source),
            "verify": ("verify", coded),
            "verify --against": ("verify", "--against", source, coded),
            "decompress": ("decompress", coded, dense),
        }.items():
            seconds, peak = run("cli.py", *command)
            rate, memory = total / 1e9 / seconds, (peak - interpreter) / 1e6
            print(f"| {name} | {seconds:.1f} | {rate:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
