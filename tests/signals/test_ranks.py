from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Run by every process: RANK WORLD DIRECTORY NAME
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from compress.errors import BadInput
from compress.signals import collect

rank, world, directory, name = sys.argv[1:]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)).eval()
model.model.embed_tokens.weight.data[96] = float("nan")
tokens = torch.randint(96, (5, 60), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(tokens)
mask[1, 55:] = 0
broken = tokens.clone()
broken[-1, 5] = 96
if int(world) > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=int(rank), world_size=int(world))
found = []
for arguments in ((tokens, mask), (tokens[:1],), (broken,)):
    try:
        table = collect(model, *arguments)
        found.append([table.values, table.sinks])
    except BadInput as error:
        found.append(str(error))
with open(f"{directory}/{name}.json", "w") as file:
    json.dump(found, file)
if int(world) > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, [rank, world, tmp_path, name])])
        for name, rank, world in (("alone", 0, 1), ("first", 0, 2), ("second", 1, 2))
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * 3
    alone, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "first", "second")
    )
    assert first == second == alone
    (values, _), (_, sinks), error = alone
    assert len(values["cosine"][0]) == 5
    assert len(sinks[0]) == 1  # the first process has no sequence of its own
    assert error == "block 0: activations are not finite, got NaN or infinity"
