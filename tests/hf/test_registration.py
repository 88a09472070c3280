"""How plain transformers comes to know the format, and what happens when it does not.

Each case is a fresh interpreter that sees this package only as an installed one would be seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2])
assert model.state_dict().keys() == expected.keys()
assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
"""


@pytest.fixture(scope="module")
def coded(kit, tmp_path_factory):
    """A coded Llama and the state dict to expect of it."""
    import torch

    directory = tmp_path_factory.mktemp("registration")
    model = kit.random_model(kit.llama, torch.float32)
    model.save_pretrained(directory / "dense")
    torch.save(model.state_dict(), directory / "expected.pt")
    return str(kit.encode(directory / "dense", directory / "coded")), str(directory / "expected.pt")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for PYTHONPATH that holds the package and its entry point."""
    site = tmp_path_factory.mktemp("site")
    for name in ("compress", "_entropress_autoload.py"):
        (site / name).symlink_to(REPOSITORY / name)
    info = site / "entropress-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entropress\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nentropress = _entropress_autoload:autoload\n"
    )
    return site


def python(code, *arguments, site=None, cwd=Path(sys.executable).parent, **environment):
    """Run code in a fresh interpreter, away from the repository."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    if site is not None:
        variables["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_plain_transformers_loads_it(coded, installed):
    run = python(LOAD, *coded, site=installed)
    assert run.returncode == 0, run.stderr


def test_switched_off_it_raises_until_imported(coded, installed):
    code = """
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error)
else:
    raise AssertionError("loaded by a transformers that does not know the format")
import compress.hf
"""
    imports, load = LOAD.split("\nmodel = ")
    code = f"{imports}{code}model = {load}"
    run = python(code, *coded, site=installed, ENTROPRESS_AUTOLOAD="0")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("theirs", ["compress.py", "compress/__init__.py"])
def test_somebody_elses_compress_is_left_alone(theirs, installed, tmp_path):
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("print('run')\n")
    code = "import torch, transformers.quantizers.auto; print('torch is there'); import compress"
    run = python(code, site=installed, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "torch is there\nrun\n"


def test_without_the_package_it_raises(coded):
    hidden = "import sys; sys.modules['compress'] = None\n"  # as if it were not installed
    run = python(hidden + LOAD, *coded, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert run.returncode != 0
    assert "ignore_mismatched_sizes" in run.stderr
    assert "AssertionError" not in run.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import compress.hf.quantizer",
        "from transformers.quantizers import AutoHfQuantizer",  # imports torch halfway through
        "import torch; sys.meta_path.insert(0, Curious())",
    ],
)
def test_every_order_of_imports_registers_once(first, coded, installed):
    other_finder = """
import sys
class Curious:
    asked = []
    def find_spec(self, name, path, target=None):
        self.asked.append(name)
"""
    check = """
import compress.hf, compress.hf.quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["entropress"] is compress.hf.quantizer.EntropressQuantizer
assert sum(type(finder).__module__ == "compress._autoload" for finder in sys.meta_path) <= 1
if Curious in map(type, sys.meta_path):
    assert "transformers.quantizers.auto" in Curious.asked
"""
    run = python(other_finder + first + LOAD + check, *coded, site=installed)
    assert run.returncode == 0, run.stderr


def test_importing_torch_stays_as_cheap_as_it_was(installed):
    code = """
import sys, time
import logging, importlib.abc  # torch imports them anyway
start = time.process_time()
from compress._autoload import autoload
autoload()
seconds = time.process_time() - start
import torch
loaded = {"transformers", "compress.hf", "compress.codec", "compress.checkpoint"} & set(sys.modules)
print(seconds, *loaded)
"""
    seconds, *heavy = python(code, site=installed).stdout.split()
    assert not heavy
    assert float(seconds) < 0.005


def test_a_broken_package_breaks_neither_torch_nor_transformers(installed):
    code = """
import sys
sys.modules["compress.hf.quantizer"] = None
import torch, transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "entropress" not in AUTO_QUANTIZER_MAPPING
print("alive")
"""
    run = python(code, site=installed)
    assert run.stdout == "alive\n", run.stderr
    assert run.stderr.count("cannot register") == 1


@pytest.mark.parametrize(
    "first",
    [
        "compress.hf",
        pytest.param("compress.hf.config", marks=pytest.mark.slow),
        pytest.param("compress.evaluate.lm", marks=pytest.mark.slow),
    ],
)
def test_whatever_is_imported_first(first, coded, installed):
    code = f"""
import {first}
from compress.hf import EntropressConfig, skip_sublayers
"""
    run = python(code + LOAD, *coded, site=installed)
    assert run.returncode == 0, run.stderr
    assert "cannot register" not in run.stderr
