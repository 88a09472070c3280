"""`encode_weights`: every tensor entropy-coded without loss (docs/FORMAT.md), and the way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from compress import codec
from compress.checkpoint import (
    FLOATS,
    QUANT_METHOD,
    Checkpoint,
    Digest,
    NewTensor,
    TensorInfo,
    dense_config,
    names_sha256,
    rewrite,
)
from compress.errors import BadInput, Corrupt
from compress.hf import COMPRESSED_TENSORS, count_weights
from compress.progress import SILENT, Progress
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Estimate,
    StageConfig,
    StageReport,
    Workspace,
    register,
)


class EncodeWeightsConfig(StageConfig):
    """No options: the canonical encoder decides, so that equal weights give equal files."""


@register
class EncodeWeights:
    """Huffman-code all tensors under their own names; nothing is built, nothing is lost.

    Of a compressed-tensors checkpoint these are codes, packed or not, scales and zero points; what
    they do not compress by is stored as it is, with checksums.
    """

    name: ClassVar[str] = "encode_weights"
    Config: ClassVar[type[StageConfig]] = EncodeWeightsConfig
    lossless: ClassVar[bool] = True

    def plan(
        self,
        checkpoint: CheckpointView,
        config: EncodeWeightsConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The exact size of the coded tensors from histograms, one pass of reading; or that of now.

        Raises `BadInput` for a checkpoint that is coded already, or quantized otherwise than by
        compressed-tensors.
        """
        _original_quantization(checkpoint)
        infos = checkpoint.tensor_infos().values()
        nbytes = sum(
            codec.predict(info.dtype, checkpoint.chunks(info.name), info.shape)
            if exact
            else info.nbytes
            for info in infos
        )
        return Estimate(nbytes, [f"{len(infos)} tensors coded losslessly"])

    def run(
        self, checkpoint: Checkpoint, config: EncodeWeightsConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Code into ``workspace.directory``; every block is decoded and compared on the way."""
        quantized = _original_quantization(checkpoint)
        infos = checkpoint.tensor_infos()

        def code(info: TensorInfo) -> Iterator[NewTensor]:
            original = Digest(checkpoint.chunks(info.name))
            coded = codec.encode(info.name, info.dtype, info.shape, original, workspace.threads)
            yield NewTensor(info.name, "U8", None, coded, lambda: _record(info, original))

        coded, records = rewrite(
            checkpoint,
            workspace.directory,
            code,
            config={
                **checkpoint.config,
                "quantization_config": quantization_config(infos.values(), quantized),
            },
            metadata={"format": "pt", QUANT_METHOD: str(codec.FORMAT_VERSION)},
            progress=workspace.progress,
            label="encoding",
        )
        metrics = size_table(coded)
        summary = (
            f"{metrics['bytes_in']:,} → {metrics['bytes_out']:,} bytes, "
            f"{metrics['bits_per_weight']} bits per weight"
        )
        report = StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=summary,
            metrics=metrics,
            tensors=records,
        )
        return coded, report


def quantization_config(
    infos: Collection[TensorInfo], quantized: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What ``config.json`` says of a coded checkpoint with these tensors.

    ``quantized``: what it said of quantization before they were coded; kept, word for word.
    ``dtype`` is for models whose config names none: transformers would look at the stored bytes. It
    takes the first floating-point dtype of the first shard, by name, and so does this.
    """
    names = [info.name for info in infos]
    first = sorted((info.file, info.name, info.dtype) for info in infos)
    floats = (FLOATS[dtype] for _, _, dtype in first if dtype in FLOATS)
    ours = {
        "quant_method": QUANT_METHOD,
        "format_version": codec.FORMAT_VERSION,
        "min_reader": codec.MIN_READER,
        "tensors": len(names),
        "names_sha256": names_sha256(names),
        "dtype": next(floats, None),
    }
    return ours if quantized is None else {**ours, "quantization_config": quantized}


def size_table(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes before and after coding, in all and by dtype, and stored bits per weight.

    Weights are those that codes stand for (`compress.hf.count_weights`); scales are none.
    """
    weights = count_weights(checkpoint)
    dtypes: dict[str, dict[str, int]] = defaultdict(
        lambda: {"tensors": 0, "weights": 0, "bytes_in": 0, "bytes_out": 0}
    )
    for info in checkpoint.tensor_infos().values():
        row = dtypes[info.dtype]
        row["tensors"] += 1
        row["weights"] += weights[info.name]
        row["bytes_in"] += info.nbytes
        row["bytes_out"] += info.stored_nbytes
    total = {
        key: sum(row[key] for row in dtypes.values())
        for key in ("tensors", "weights", "bytes_in", "bytes_out")
    }
    bits = round(8 * total["bytes_out"] / max(1, total["weights"]), 3)
    return {**total, "bits_per_weight": bits, "dtypes": dict(sorted(dtypes.items()))}


def decode(coded: Checkpoint, directory: Path, progress: Progress = SILENT) -> Checkpoint:
    """The dense checkpoint again, written into ``directory``; the inverse of `encode_weights`.

    A checkpoint that `save_pretrained` wrote has no manifest; its names and checksums are all that
    is held against it. Raises `BadInput` if there is nothing to decode, `Corrupt` when a block
    checksum or the sha256 that the manifest holds of a tensor is not met.
    """
    if not coded.coded:
        raise BadInput("is not compressed by entropress", where=coded.path)
    expected = None if coded.manifest is None else coded.manifest["tensors"]
    if expected is None:
        progress.note("no manifest: names and checksums are checked, but no sha256")

    def plain(info: TensorInfo) -> Iterator[NewTensor]:
        chunks = Digest(coded.chunks(info.name))
        yield NewTensor(info.name, info.dtype, info.shape, chunks, lambda: check(info, chunks))

    def check(info: TensorInfo, chunks: Digest) -> dict[str, Any]:
        record = _record(info, chunks)
        known = expected is None or expected.get(info.name, {}).get("sha256") == record["sha256"]
        if not known:
            raise Corrupt("has another sha256 than the manifest", where=f"{info.file}: {info.name}")
        return record

    dense, _ = rewrite(
        coded,
        directory,
        plain,
        config=dense_config(coded.config),
        metadata={"format": "pt"},
        progress=progress,
        label="decoding",
    )
    return dense


def _record(info: TensorInfo, digest: Digest) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": list(info.shape), "sha256": digest.hexdigest()}


def _original_quantization(checkpoint: CheckpointView) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint that can be coded; None for a dense one."""
    if checkpoint.coded:
        raise BadInput(
            "already compressed by entropress", where=checkpoint.path, mend="decompress it first"
        )
    stated = dense_config(checkpoint.config).get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if stated and method != COMPRESSED_TENSORS:
        raise BadInput(
            f"already quantized by {method}, which encode_weights cannot take in",
            where=checkpoint.path,
            expected=f"a dense model or one quantized by {COMPRESSED_TENSORS}",
            mend="pass the model it was made from",
        )
    return stated
