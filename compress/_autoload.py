"""Registers the quantizer when transformers needs it, and the model type with lm-eval.

torch calls `autoload` through the entry point group ``torch.backends`` when it is imported
(``_entropress_autoload`` stands between), and so does ``import compress``. All it does is to put a
finder in front of the import system, which waits for transformers' table of quantizers and for
lm-eval's of model types, and adds ours at no cost until then. ``ENTROPRESS_AUTOLOAD=0`` switches
that off; importing ``compress.hf`` registers all the same. Nothing in here may fail: it runs inside
other libraries.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPT_OUT = "ENTROPRESS_AUTOLOAD"
_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "compress.hf.quantizer"
# Not lm_eval.api.registry: lm-eval adds its own model types only to an empty table.
_MODELS = "lm_eval.models"
_MODEL = "compress.evaluate.lm:EntropressLM"


def autoload() -> None:
    """The entry point for torch: `install`, unless ``ENTROPRESS_AUTOLOAD`` is 0."""
    if os.environ.get(OPT_OUT) != "0":
        install()


def install() -> None:
    """Register now what has its table, the rest as soon as there is one."""
    ready = [table for table in _REGISTER if _is_ready(table)]
    for table in ready:
        _REGISTER[table]()
    known = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    if len(ready) < len(_REGISTER) and not known:
        sys.meta_path.insert(0, _Finder())


def _is_ready(name: str) -> bool:
    table = sys.modules.get(name)
    return table is not None and not getattr(table.__spec__, "_initializing", False)


@functools.cache
def _register_quantizer() -> None:
    """Import the module whose decorators register, once."""
    try:
        __import__(_QUANTIZER)
    except Exception as error:
        # transformers works on; a coded checkpoint then fails to load with wrong shapes.
        logging.getLogger("entropress").warning("cannot register with transformers: %s", error)


@functools.cache
def _register_model() -> None:
    """Name the class, which lm-eval imports when its model type is asked for."""
    try:
        registry = sys.modules["lm_eval.api.registry"].model_registry
        registry.register("entropress", target=_MODEL)
    except Exception as error:
        logging.getLogger("entropress").warning("cannot register with lm-eval: %s", error)


_REGISTER: dict[str, Callable[[], None]] = {_TABLE: _register_quantizer, _MODELS: _register_model}


class _Finder(MetaPathFinder):
    """Finds nothing itself: asks the other finders for a table's module and follows its loading.

    It stays in ``sys.meta_path`` for good, since removing it could make an import that runs in
    another thread skip the finder after it.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _REGISTER:
            return _followed(_spec_from_others(self, name, path, target), _REGISTER[name])
        # When torch itself is first imported by the table's module, that one is too far on to be
        # followed; any later module of transformers tells that it is ready.
        if name.startswith("transformers.") and _QUANTIZER not in sys.modules and _is_ready(_TABLE):
            _register_quantizer()
        return None


def _spec_from_others(
    finder: MetaPathFinder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for other in list(sys.meta_path):
        find = None if other is finder else getattr(other, "find_spec", None)
        spec: ModuleSpec | None = find and find(name, path, target)
        if spec is not None:
            return spec
    return None


def _followed(spec: ModuleSpec | None, register: Callable[[], None]) -> ModuleSpec | None:
    """The same spec, which calls ``register`` once its module has been executed."""
    if spec is None or spec.loader is None:
        return spec
    loader: Loader = spec.loader
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register()

    # A foreign loader may have slots; then `find_spec` catches up at the next module.
    with contextlib.suppress(AttributeError):
        loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec
