"""lm-eval's tasks on a checkpoint: the same every time, quiet, and never lost half-way."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint import Checkpoint, room_needed
from compress.errors import BadInput, EntropressError
from compress.evaluate.identity import model_identity
from compress.evaluate.quiet import quiet
from compress.evaluate.tasks import check_sees, load_tasks
from compress.paths import cache_dir
from compress.progress import SILENT, Progress

_RESAMPLES = 1000  # for the standard errors of lm-eval's tables that have no formula


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate and how.

    ``tasks``, ``include_path``: as for `load_tasks`. ``limit``: documents a task, below 1 a share
    of them. ``num_fewshot``: examples in a prompt, by default as many as the task says. ``dtype``,
    ``device``: as `Checkpoint.load_model`. ``max_length``: tokens, by default what the model takes.
    ``seed`` is added to lm-eval's own seeds, so that 0 gives lm-eval's own results.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    apply_chat_template: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limit = 1 if self.limit is None else self.limit
        if not 0 < limit < math.inf or (limit > 1 and limit % 1):
            raise BadInput(
                "no such number of documents", got=self.limit, expected="a count or a share below 1"
            )
        if self.batch_size < 1:
            raise BadInput("no such batch size", got=self.batch_size, expected="1 or more")


@dataclass(frozen=True)
class Evaluation:
    """What came out. ``model``: its id; ``results``: lm-eval's, with every document in ``samples``.

    ``asked``: by each name as asked for, the tasks or the group that it stands for;
    ``aggregations``: by task and metric, how scores of documents become one.
    """

    model: str
    results: dict[str, Any]
    asked: dict[str, list[str]] = field(default_factory=dict)
    aggregations: dict[str, dict[str, Callable[[list[Any]], float]]] = field(default_factory=dict)


def run_tasks(
    checkpoint: Checkpoint, options: EvalOptions, journal: Path, *, progress: Progress = SILENT
) -> Evaluation:
    """Evaluate a checkpoint with `lm_eval.simple_evaluate`.

    Answers are kept in the directory ``journal`` (`JournaledLM`): a run that was interrupted
    continues there to the same bits, and the model is not even loaded when no answer is missing.
    Raises as `load_tasks`, `check_sees` and `EntropressLM` (`EntropressVLM` where tasks show
    images), and `BadInput` for what lm-eval refuses.
    """
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    from compress.evaluate.journal import JournaledLM
    from compress.evaluate.lm import EntropressLM
    from compress.evaluate.vlm import EntropressVLM

    tasks = load_tasks(options.tasks, options.include_path)
    check_sees(tasks, checkpoint)
    tokenizer = _chat_tokenizer(checkpoint) if options.apply_chat_template else None
    settings = _settings(checkpoint, options, progress)
    if tasks.with_images:
        settings |= _image_packages()
    model = checkpoint.source.id

    def make() -> EntropressLM:
        return (EntropressVLM if tasks.with_images else EntropressLM)(
            checkpoint,
            dtype=options.dtype,
            device=options.device,
            batch_size=options.batch_size,
            max_length=options.max_length,
        )

    lm = JournaledLM(
        make,
        journal,
        settings,
        tokenizer=tokenizer,
        progress=progress,
        label=f"lm-eval, {model}",
        images=bool(tasks.with_images),
    )
    other = DEFAULT_OTHER_SEED + options.seed
    with quiet(), _single_process():
        try:
            results = lm_eval.simple_evaluate(
                lm,
                tasks=tasks.built,
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                device=options.device,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                bootstrap_iters=_RESAMPLES,
                task_manager=TaskManager(include_defaults=False),
                random_seed=DEFAULT_RANDOM_SEED + options.seed,
                numpy_random_seed=other,
                torch_random_seed=other,
                fewshot_random_seed=other,
            )
        except EntropressError:
            raise
        except (Exception, SystemExit) as error:  # a task's own functions may do anything
            reason = f"lm-eval cannot run it: {type(error).__name__}: {error}"
            raise BadInput(reason, where=", ".join(options.tasks)) from error
    if lm.truncated:
        progress.note(f"{model}: {lm.truncated} requests were cut from the left to fit")
    for task in tasks.with_images:
        for sample in results["samples"][task]:
            sample["doc_hash"] = _doc_hash(sample["doc"])
    results["config"].update(model="entropress", model_args={"pretrained": model})
    aggregations = {name: dict(task.aggregation()) for name, task in tasks.leaves.items()}
    return Evaluation(model, results, tasks.asked, aggregations)


def reference_journal(checkpoint: Checkpoint, progress: Progress = SILENT) -> Path:
    """Where the answers of a model that others are compared with are kept for good."""
    return cache_dir() / "baselines" / model_identity(checkpoint, progress)


def save(evaluation: Evaluation, directory: Path, *, log_samples: bool) -> list[Path]:
    """Write an evaluation as lm-eval does; returns the files.

    ``DIRECTORY/MODEL/results_DATE.json``, and with ``log_samples`` a ``samples_TASK_DATE.jsonl`` a
    task. Raises `BadInput` or `Missing` where that cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    if directory.suffix == ".json":
        raise BadInput("lm-eval takes it for a file", where=directory, mend="name a directory")
    tracker = EvaluationTracker(output_path=str(directory))
    tracker.general_config_tracker.log_experiment_args(
        "entropress", {"pretrained": evaluation.model}, None, None, True
    )
    # It changes what it is given, and keeps its troubles to itself.
    results = copy.deepcopy(evaluation.results)
    samples = results.pop("samples")
    folder = directory / str(tracker.general_config_tracker.model_name_sanitized)
    try:
        with room_needed(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot be made: {error.strerror}", where=folder) from error
    with quiet():
        tracker.save_results_aggregated(results, samples)
        files = [folder / f"results_{tracker.date_id}.json"]
        for task in samples if log_samples else ():
            tracker.save_results_samples(task, samples[task])
            files.append(folder / f"samples_{task}_{tracker.date_id}.jsonl")
    for file in files:
        if not file.is_file():
            raise BadInput("lm-eval could not write it", where=file)
    return files


def check_device(device: str) -> Any:
    """The torch device that a model will run on first; `BadInput` where there is no such here."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        found = torch.device(device if device != "auto" else "cuda" if cuda else "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput("there is no such device here", got=device) from None
    if found.type == "meta":
        raise BadInput("nothing can be computed there", got=device)
    return found


def _settings(checkpoint: Checkpoint, options: EvalOptions, progress: Progress) -> dict[str, Any]:
    """All that answers depend on, down to the last bit, beside the requests."""
    import lm_eval
    import tokenizers
    import torch
    import transformers

    device = check_device(options.device)
    return {
        "model_identity": model_identity(checkpoint, progress),
        "dtype": options.dtype,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": torch.cuda.device_count() if options.device == "auto" else 1,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "apply_chat_template": options.apply_chat_template,
        "seed": options.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "lm_eval": lm_eval.__version__,
        "entropress": __version__,
    }


def _image_packages() -> dict[str, Any]:
    """The versions of what reads and resizes images, as far as there is any."""
    found: dict[str, Any] = dict.fromkeys(("pillow", "torchvision"))
    for name in found:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _doc_hash(doc: Any) -> str:
    """lm-eval's, of images' contents: its own is of where in memory they were."""
    from lm_eval.utils import handle_non_serializable, hash_dict_images, hash_string

    plain = hash_dict_images(doc)
    return hash_string(
        json.dumps(plain, indent=2, default=handle_non_serializable, ensure_ascii=False)
    )


def _chat_tokenizer(checkpoint: Checkpoint) -> Any:
    tokenizer = checkpoint.tokenizer()
    if not tokenizer.chat_template:
        raise BadInput("its tokenizer has no chat template", where=checkpoint.path)
    return tokenizer


@contextmanager
def _single_process() -> Iterator[None]:
    """Keep lm-eval from forking for its standard errors: torch's threads would not survive it."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
