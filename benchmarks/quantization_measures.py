"""What `quantization.py` measures: a model whose weights are quantized, beside itself as it was."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from compress import codec
from compress.checkpoint import FLOATS, Checkpoint, dump_json, write_atomic
from compress.evaluate import (
    Documents,
    Interval,
    bootstrap_interval,
    divergence,
    perplexity,
    perplexity_ratio,
)
from compress.quant import (
    QTensor,
    Rate,
    Scheme,
    export_quantized,
    fit_rate,
    fitting_group,
    linear_names,
    measure_fisher,
    quantize_ecsq,
    quantize_rtn,
    quantized_inputs,
    row_steps,
    sqnr,
)
from compress.signals import load_float32

Found = dict[str, Any]


class Kept:
    """Results in files of a directory, found again by what they are of and depend on."""

    def __init__(self, directory: Path, settings: object) -> None:
        self.directory, self._settings = directory, settings

    def path(self, name: str, depends: object) -> Path:
        stated = json.dumps([name, self._settings, depends], default=str)
        digest = hashlib.sha256(stated.encode()).hexdigest()[:12]
        return self.directory / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{digest}"

    def __call__(self, name: str, depends: object, work: Callable[[], Any]) -> Any:
        path = Path(f"{self.path(name, depends)}.json")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, dump_json(work()))
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Row:
    """Rounding to nearest by a ``scheme``, or ECSQ: at a ``rate``, or else at ``share`` of what its
    ``rival`` takes as it is ``counted``, of a fixed width or coded too."""

    scheme: Scheme | None = None
    rate: float | None = None
    rival: str = ""
    share: float = 1.0
    counted: Literal["fixed", "coded"] = "fixed"
    sensitivities: bool = False


class Subject:
    """Two copies of a model in float32, of which one is quantized and restored."""

    head: str
    compared: str
    texts: object  # what `measure` reads, in so far as it may differ between two runs

    def __init__(
        self, opened: Checkpoint, rows: Mapping[str, Row], kept: Kept, calibration: torch.Tensor
    ) -> None:
        self.opened, self.rows, self.kept, self.calibration = opened, rows, kept, calibration
        self.whole, self.model = load_float32(opened), load_float32(opened)
        self.names = linear_names(opened).weights
        [own] = {getattr(torch, FLOATS[opened.tensor_infos()[name].dtype]) for name in self.names}
        self.scale_dtype = torch.float16 if own == torch.float32 else own

    def measure(self) -> Found:
        """The quantized copy beside the other, by document or sentence."""
        raise NotImplementedError

    def quality(self, found: Found) -> str:
        """The cells under ``head``."""
        raise NotImplementedError

    def against(self, found: Found, rival: Found) -> str:
        """The cells under ``compared``."""
        raise NotImplementedError

    def cost(self, name: str) -> Found:
        """Bits per weight: ``fixed`` wide, as classical formats store them; ``coded``, scales and
        zero points in full width (`QTensor.rate`); ``exported``: all that the compressed-tensors
        checkpoint holds of them once `encode_weights` has coded it."""
        row = self.rows[name]
        return self.kept(f"cost {name}", self._depends(row), lambda: self._cost(row))

    def result(self, name: str) -> Found:
        """What `measure` finds of a row."""
        row = self.rows[name]
        quantized = self._quantizer(row, self.cost(name)["c"])

        def work() -> Found:
            with self.holding(quantized):
                return self.measure()

        return self.kept(f"quality {name}", [*self._depends(row), self.texts], work)

    @contextmanager
    def holding(
        self, quantized: Callable[[str], QTensor], activations: int | None = None
    ) -> Iterator[None]:
        """While it lasts, the one copy has quantized weights, and its linear layers inputs."""
        with ExitStack() as stack:
            for name in self.names:
                weight = self.model.get_parameter(name).data
                stack.callback(weight.copy_, self.whole.get_parameter(name).data)
                weight.copy_(quantized(name).dense(torch.float32))
            if activations:
                stack.enter_context(quantized_inputs(self.model, self.names, activations))
            yield

    def _depends(self, row: Row) -> list[object]:
        return [asdict(row), list(self.calibration.shape) if row.sensitivities else None]

    def _cost(self, row: Row) -> Found:
        c = None if row.scheme else self._fit(row)
        quantized = self._quantizer(row, c)
        total, fixed, noise, codes, schemes = Rate(), 0, [], {}, {}
        for name in self.names:
            found = quantized(name)
            rate = found.rate()
            schemes[name], codes[name] = found.scheme, rate.codes
            fixed += rate.weights * found.scheme.bits + rate.scales + rate.zeros
            noise.append(sqnr(self.opened.read(name), found))
            total += rate
        return {
            "weights": total.weights,
            "fixed": fixed / total.weights,
            "coded": total.bits_per_weight,
            "exported": self._exported(schemes, quantized, codes) / total.weights,
            "sqnr": statistics.fmean(noise),
            "c": c,
        }

    def _exported(
        self,
        schemes: Mapping[str, Scheme],
        quantized: Callable[[str], QTensor],
        codes: Mapping[str, int],
    ) -> int:
        """Bits of the coded export. Codes that it holds as whole bytes must take ``codes``."""
        total = 0
        with tempfile.TemporaryDirectory() as directory:
            done, origins = export_quantized(
                self.opened, schemes, quantized, Path(directory), scale_dtype=self.scale_dtype
            )
            for part, info in done.tensor_infos().items():
                if part not in origins:
                    continue
                bits = 8 * codec.predict(info.dtype, done.chunks(part), info.shape)
                if part == origins[part] and bits != codes[part]:
                    raise SystemExit(f"{part}: {bits} bits as exported, not {codes[part]}")
                total += bits
        return total

    def _fit(self, row: Row) -> dict[str, float]:
        target = row.rate or row.share * self.cost(row.rival)[row.counted]
        fisher = self.fisher if row.sensitivities else {}
        found = fit_rate(
            self.opened.read,
            self.names,
            target,
            self.scale_dtype,
            sensitivities={name: float(f.mean()) for name, f in fisher.items()} or None,
            rows=self._rows(row),
        )
        return dict(found.c)

    @cached_property
    def fisher(self) -> dict[str, torch.Tensor]:
        return measure_fisher(self.whole, self.calibration, self.names)

    def _rows(self, row: Row) -> dict[str, torch.Tensor]:
        fisher = self.fisher if row.sensitivities else {}
        return {name: row_steps(self.opened.read(name), f, name) for name, f in fisher.items()}

    def _quantizer(self, row: Row, c: Mapping[str, float] | None) -> Callable[[str], QTensor]:
        rows = self._rows(row)

        def quantized(name: str) -> QTensor:
            weight = self.opened.read(name)
            if row.scheme is None:
                assert c is not None
                own = rows.get(name)
                return quantize_ecsq(weight, c[name], self.scale_dtype, rows=own, name=name)
            group = row.scheme.group and fitting_group(weight.shape[1], row.scheme.group)
            scheme = Scheme(row.scheme.bits, group, row.scheme.symmetric)
            return quantize_rtn(weight, scheme, self.scale_dtype, name=name)

        return quantized


class Decoder(Subject):
    """A causal language model on held-out documents."""

    head = "perplexity | ratio to the whole model | KL, nats a token"
    compared = "perplexity ratio | KL less KL, nats a token"

    def __init__(self, *subject: Any, documents: Documents) -> None:
        super().__init__(*subject)
        self.documents = documents
        self.texts = [documents.count, documents.tokens, len(documents.windows)]

    def measure(self) -> Found:
        sums = divergence(self.whole, self.model, self.documents).sums
        return {name: sums[name].tolist() for name in ("tokens", "nll_reference", "nll", "kl")}

    def quality(self, found: Found) -> str:
        own = _scored(found, "nll")
        ratio = perplexity_ratio(_scored(found, "nll_reference"), own)
        kl = _share(found["kl"], found["tokens"])
        return f"{perplexity(own):.2f} | {_shown(ratio)} | {_shown(kl, 4)}"

    def against(self, found: Found, rival: Found) -> str:
        ratio = perplexity_ratio(_scored(rival, "nll"), _scored(found, "nll"))
        added = np.array(found["kl"]) - np.array(rival["kl"])
        return f"{_shown(ratio)} | {_shown(_share(added, found['tokens']), 4)}"


class Encoder(Subject):
    """A sentence encoder: mean-pooled embeddings beside those of the whole model."""

    head = "1 − cosine, thousandths"
    compared = "ratio of 1 − cosine"

    def __init__(self, *subject: Any, sentences: Sequence[str]) -> None:
        super().__init__(*subject)
        self.texts = sentences
        tokenizer = self.opened.tokenizer()
        self._inputs = [tokenizer(text, return_tensors="pt") for text in sentences]

    def measure(self) -> Found:
        pairs = zip(self._embedded(self.whole), self._embedded(self.model), strict=True)
        return {"distance": [float(1 - torch.cosine_similarity(a, b, 0)) for a, b in pairs]}

    def quality(self, found: Found) -> str:
        mean = bootstrap_interval(np.mean, [1000 * np.array(found["distance"])])
        return _shown(mean)

    def against(self, found: Found, rival: Found) -> str:
        columns = [np.array(each["distance"]) for each in (found, rival)]
        return _shown(bootstrap_interval(lambda a, b, axis: a.mean(axis) / b.mean(axis), columns))

    def _embedded(self, model: Any) -> Iterator[torch.Tensor]:
        """float64 [d] of each sentence, which runs by itself, so that nothing is padded."""
        with torch.inference_mode():
            for given in self._inputs:
                yield model(**given).last_hidden_state[0].double().mean(0)


def _shown(found: Interval, digits: int = 3) -> str:
    estimate, low, high = (f"{x:.{digits}f}" for x in (found.estimate, found.low, found.high))
    return f"{estimate} [{low}, {high}]"


def _scored(found: Found, nll: str) -> np.ndarray:
    return np.stack([np.array(found[nll]), np.array(found["tokens"])], axis=1)


def _share(part: Sequence[float] | np.ndarray, tokens: Sequence[float]) -> Interval:
    columns = [np.asarray(part), np.asarray(tokens)]
    return bootstrap_interval(lambda a, b, axis: a.sum(axis) / b.sum(axis), columns)
