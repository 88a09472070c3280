from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from compress.errors import BadInput
from compress.quant.qat import QatSettings, TokenBits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "qat.steps: makes no training, got 0, expected 1 or more"),
        ({"batch": 0}, "qat.batch: makes no training"),
        ({"watch": 0}, "qat.watch: makes no training"),
        ({"every": 0}, "qat.every: makes no training"),
        ({"learning_rate": 0.0}, "qat.learning_rate: makes no training, got 0.0, expected a pos"),
        ({"temperature": float("nan")}, "qat.temperature: makes no training, got nan"),
        ({"step_rate": -1.0}, "qat.step_rate: makes no training"),
        ({"attention": float("inf")}, "qat.attention: makes no training"),
        ({"entropy": -0.1}, "qat.entropy: makes no training"),
        ({"rate": float("nan")}, "qat.rate: makes no training"),
        ({"soft": 1.1}, "qat.soft: makes no training, got 1.1, expected a share, 0 to 1"),
        ({"anneal": -0.1}, "qat.anneal: makes no training"),
        ({"anneal_range": 0.0}, "qat.anneal_range: makes no training"),
        ({"kv_bits": 1}, "qat.kv_bits: makes no training, got 1, expected 2 to 8"),
        ({"scale": "lsqq"}, "qat.scale: makes no training, got lsqq, expected one of lsq, statsq"),
        ({"scale_dtype": "int8"}, "qat.scale_dtype: makes no training"),
    ],
)
def test_bad_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        QatSettings(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_rates_rise_and_fall_and_every_sequence_has_its_turn() -> None:
    settings = QatSettings(steps=40, batch=3)
    paces = [settings.pace(step) for step in range(40)]
    assert paces[0] == 0.5
    assert paces[1:] == sorted(paces[1:], reverse=True)
    assert 0.99 < paces[1] < 1
    assert 0 < paces[-1] < 0.01
    places = [row for step in range(40) for row in settings.rows(step, 5)]
    turns = [places[at : at + 5] for at in range(0, 120, 5)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 10


def test_annealing_is_the_last_share_of_the_steps() -> None:
    settings = QatSettings(steps=10, anneal=0.3, anneal_range=0.02)
    assert [settings.within(step) for step in range(10)] == [None] * 7 + [0.02] * 3
    assert all(QatSettings(steps=10, anneal=0).within(step) is None for step in range(10))
    assert QatSettings(steps=1, anneal=1).within(0) is not None


def test_what_is_only_simulated_is_said() -> None:
    assert QatSettings().simulated == ()
    assert QatSettings(kv_bits=4, token_bits=TokenBits()).simulated == ("kv_bits", "token_bits")


def test_the_package_opens_without_what_is_heavy() -> None:
    heavy = "{'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    script = f"import sys, compress.quant.qat; assert not {heavy}, {heavy}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
