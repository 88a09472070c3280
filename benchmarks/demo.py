"""`make demo`: a real language model pruned by entropy, coded without loss, checked against claims,
verified, reported on, and loaded by plain transformers in a fresh process."""

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
# Generous limits: a model of 135M parameters pays dearly for two of its thirty blocks.
GATES = """[
  {perplexity: {documents: 12, max_ratio: 3, dtype: float32}},
  {lm_eval: {tasks: [entropress_facts], max_drop: 0.5, dtype: float32}}]"""

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
    recipe = ("--recipe", "entropy_prune.yaml", "--set", f"gates={' '.join(GATES.split())}")
    command("compress", *recipe, "--overwrite", "--output-dir", OUTPUT, MODEL)
    command("verify", "--against", MODEL, OUTPUT)
    command("report", OUTPUT)

    sys.path.insert(0, str(ROOT))
    from compress import checkpoint
    from compress.evaluate import inspect

    original = checkpoint.resolve(MODEL).path
    gates = {gate["gate"]: gate["rows"][0] for gate in checkpoint.read_manifest(OUTPUT)["gates"]}
    rows = []
    for title, side, path in (("before", "reference", original), ("after", "candidate", OUTPUT)):
        print(f"\n{title}, with plain transformers:\n  {generate(path)}")
        found = inspect(path, entropy=False)
        scores = gates["perplexity"][side], gates["lm_eval"][side]
        rows.append((title, found.file_nbytes, found.total.bits_per_weight, *scores))
    print(f"\n{'':8}{'MB':>8}{'bits/weight':>13}{'perplexity':>12}{'accuracy':>10}")
    for title, nbytes, bits, perplexity, accuracy in rows:
        print(f"{title:8}{nbytes / 1e6:8.1f}{bits:13.2f}{perplexity:12.2f}{accuracy:10.2f}")
    print("(perplexity on 12 documents of builtin:heldout, accuracy on entropress_facts, float32)")


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


if __name__ == "__main__":
    main()
