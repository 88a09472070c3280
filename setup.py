"""Puts the compiled codec into wheels; everything else is declared in pyproject.toml.

Without a compiler the wheel is still built and works on the numpy fallback. An editable install
compiles nothing here: the library is built at first use.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compress.codec import native


class BuildNative(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "compress", "codec", native.LIBRARY)
        try:
            native.compile_library(native.compiler() or ["c++"], target)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"native codec not built, the wheel will use the numpy fallback: {error}")


class Wheel(bdist_wheel):
    def get_tag(self):
        """One wheel serves every Python and torch version: the library has a plain C interface."""
        python, abi, platform = super().get_tag()
        if not list(Path(self.bdist_dir or ".").rglob(native.LIBRARY)):
            return python, abi, platform
        return "py3", "none", self.plat_name.replace("-", "_").replace(".", "_")


setup(cmdclass={"build_py": BuildNative, "bdist_wheel": Wheel})
