"""`make demo`: a real language model pruned by entropy, coded without loss, verified, and loaded
by plain transformers in a fresh process; its words, size and perplexity before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "demo"
MODEL = "demo:smollm2-135m"
PROMPT = "The capital of France is"

# What a user writes: nothing here knows of this project.
USE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokens = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=24, do_sample=False)[0]))
"""


def main() -> None:
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    command(
        "compress", "--recipe", "entropy_prune.yaml", "--overwrite", "--output-dir", OUTPUT, MODEL
    )
    command("verify", "--against", MODEL, OUTPUT)

    sys.path.insert(0, str(ROOT))
    from compress import checkpoint
    from compress.evaluate import inspect

    original = checkpoint.resolve(MODEL).path
    rows = []
    for title, path in (("before", original), ("after", OUTPUT)):
        print(f"\n{title}, with plain transformers:\n  {generate(path)}")
        found = inspect(path, entropy=False)
        rows.append((title, found.file_nbytes, found.total.bits_per_weight, perplexity(path)))
    print(f"\n{'':8}{'MB':>8}{'bits/weight':>13}{'perplexity':>12}")
    for title, nbytes, bits, value in rows:
        print(f"{title:8}{nbytes / 1e6:8.1f}{bits:13.2f}{value:12.2f}")
    print("(perplexity on builtin:heldout, 16 windows of 256 tokens, float32)")


def command(*args: object) -> None:
    shown = (os.path.relpath(a, ROOT) if isinstance(a, Path) else a for a in args)
    print("\n$ python cli.py", *shown, flush=True)
    subprocess.run([sys.executable, ROOT / "cli.py", *map(str, args)], check=True, cwd=ROOT)


def generate(path: Path) -> str:
    """What the model says, from a process that imports transformers only."""
    done = subprocess.run(
        [sys.executable, "-c", USE, path, PROMPT],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    return json.dumps(done.stdout.strip(), ensure_ascii=False)


def perplexity(path: Path) -> float:
    import compress.hf  # noqa: F401  here the package need not be installed
    from compress import checkpoint
    from compress.evaluate import perplexity
    from compress.signals import windows

    model = checkpoint.open(path)
    tokens = windows("builtin:heldout", model.tokenizer(), 16, 256, 0)
    return perplexity(model.load_model(dtype="float32"), tokens)


if __name__ == "__main__":
    main()
