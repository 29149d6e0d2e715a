"""Builds the C++ extension against the torch that is already installed; without one, installs pure Python."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """emr_kernels/_build.py by its path: the package itself imports torch, which build isolation hides."""
    spec = importlib.util.spec_from_file_location("emr_build", ROOT / "emr_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = load_build_module()
OPS = "emr_kernels." + builder.OPS_LIBRARY.removesuffix(".so")
FACTS = "emr_kernels._C"


class BuildExtension(build_ext):
    """Compiles both libraries in one run of ninja. EMR_BUILD: 0 builds nothing, 1 fails where others would skip."""

    def run(self):
        try:
            if os.environ.get("EMR_BUILD") == "0":
                raise builder.BuildError("EMR_BUILD is 0")
            self.tools = builder.find_toolchain()
            print(f"emr-kernels: compiling with {self.tools.compiler} against torch {self.tools.torch_version}")
            work = Path(self.build_temp).resolve()
            builder.build(self.tools, work, work / "out", self.distribution.get_version())
        except builder.BuildError as error:
            if os.environ.get("EMR_BUILD") == "1":
                raise SystemExit(f"emr-kernels: the extension was not built: {error}") from error
            print(f"emr-kernels: WARNING: pure Python install, no extension: {error}", file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(self.build_temp).resolve() / "out" / target.name, target)

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] == OPS.rpartition(".")[2]:
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


class BuildPython(build_py):
    """Ships the C++ sources inside the package, for the build on first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "emr_kernels" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension(OPS, sources=[]), Extension(FACTS, sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
