"""lm-eval tasks by name: those that ship, those of a directory, and lm-eval's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import BadInput, EntropressError, Missing, did_you_mean
from compress.evaluate.quiet import quiet

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SUITE = Path(__file__).parent / "suite"


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks. ``asked``: by each name as asked for, the tasks or the one group that it stands
    for; ``built``: those as objects; ``leaves``: every single task by name."""

    asked: dict[str, list[str]]
    built: list[Task | Group]
    leaves: dict[str, Task]

    @property
    def with_images(self) -> list[str]:
        """The tasks whose requests show images."""
        return [name for name, task in self.leaves.items() if _is_multimodal(task)]


def load_tasks(names: Sequence[str], include_path: str | None = None) -> Tasks:
    """Load tasks with their documents.

    ``names``: tasks, groups and tags, looked for in `SUITE` and the directory ``include_path``, and
    only where one is not there among lm-eval's own, since reading those takes seconds. Functions
    that task files name are run. Raises `BadInput` for unknown names, files that are missing, tasks
    asked for twice, without documents, or of a kind that we do not run; `Missing` for those that
    need a network or a package which is not there.
    """
    import lm_eval.tasks  # noqa: F401  what it logs when first imported is not for `quiet` to undo

    names = list(dict.fromkeys(names))
    with quiet():
        manager = _manager(names, include_path)
        tasks = Tasks({}, [], {})
        for name in names:
            with _explained(name):
                loaded = manager.load([name])
            group = loaded["groups"].get(name)
            leaves = loaded["tasks"]
            for leaf, task in leaves.items():
                _check(leaf, task)
                if leaf in tasks.leaves:
                    raise BadInput(f"task '{leaf}' is asked for twice", where=", ".join(names))
            tasks.asked[name] = [name] if group else list(leaves)
            tasks.built.extend([group] if group else leaves.values())
            tasks.leaves.update(leaves)
    return tasks


def check_metric(tasks: Tasks, metric: str | None) -> None:
    """Raise `BadInput` where a task has no ``metric``, as ``acc_norm`` or ``acc_norm,none``."""
    for name, task in tasks.leaves.items():
        known = list(task.aggregation())
        if metric is not None and metric.partition(",")[0] not in known:
            raise BadInput(f"no metric '{metric}'", where=name, mend=did_you_mean(metric, known))


def check_sees(tasks: Tasks, checkpoint: Checkpoint) -> None:
    """Raise `BadInput` where a task shows images and the model is none of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    classes = checkpoint.config.get("architectures") or ["no architecture"]
    if tasks.with_images and classes[0] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        raise BadInput(
            f"does not see, and {tasks.with_images[0]} shows images",
            where=checkpoint.path,
            got=classes[0],
            expected="a model of images and text, such as LlavaForConditionalGeneration",
        )


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """A task manager that knows all names."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise BadInput("no tasks given")
    if include_path is not None and not Path(include_path).is_dir():
        raise BadInput("no such directory of task files", where=include_path)
    places = [str(SUITE), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=places, include_defaults=False)
    own = manager.task_index
    if not all(_is_whole(name, own) for name in names):
        manager = TaskManager(include_path=places)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(own)}"
            raise BadInput(f"unknown task '{name}'", mend=hint)
    return manager


def _is_whole(name: Any, index: Mapping[str, Any]) -> bool:
    """Whether a name is known, and of a group all that it is made of."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    names = [m.get("group", m.get("task")) if isinstance(m, dict) else m for m in members]
    return all(_is_whole(member, index) for member in names)


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise BadInput("would run code that the model writes", where=name)
    if not _is_multimodal(task):
        return
    if task.config.doc_to_audio:
        raise BadInput("needs more than text and images", where=name)
    if task.OUTPUT_TYPE != "generate_until":
        raise BadInput(
            "shows images, and lm-eval can only generate from those",
            where=name,
            got=f"output_type {task.OUTPUT_TYPE}",
            expected="generate_until",
        )


def _is_multimodal(task: Task) -> bool:
    return bool(getattr(task, "MULTIMODAL", False))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Tell apart what can go wrong in a task's files and functions, which may raise anything."""
    try:
        yield
    except EntropressError:
        raise
    except ConnectionError as error:
        raise Missing(
            "its documents are on the hub, which cannot be reached",
            where=name,
            got=error,
            mend="check the network and HF_HUB_OFFLINE, or bring them here once",
        ) from error
    except ImportError as error:
        raise Missing(f"needs a package that is not there: {error}", where=name) from error
    except FileNotFoundError as error:
        raise BadInput(f"a file that it needs is missing: {error}", where=name) from error
    except Exception as error:
        if isinstance(error, IndexError) and "size 0" in str(error):  # of the first document
            raise BadInput("has no documents", where=name) from error
        kind = type(error).__name__
        raise BadInput(f"lm-eval cannot load it: {kind}: {error}", where=name) from error
