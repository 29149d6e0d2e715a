"""Builds the C++ extension against the torch that is already installed; without one, installs pure Python."""

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """emr_kernels/_build.py without emr_kernels: the package itself imports torch, which build isolation hides."""
    package = types.ModuleType("emr_build")
    package.__path__ = [str(ROOT / "emr_kernels")]
    sys.modules[package.__name__] = package
    return importlib.import_module("emr_build._build")


builder = load_build_module()
OPS = "emr_kernels." + builder.OPS_LIBRARY.removesuffix(".so")
CUDA = "emr_kernels." + builder.CUDA_LIBRARY.removesuffix(".so")
FACTS = "emr_kernels._C"


class BuildExtension(build_ext):
    """Compiles all libraries in one run of ninja. EMR_BUILD: 0 builds nothing, 1 fails where others would skip.

    EMR_CUDA: 0 leaves the CUDA kernels out, 1 fails without them.
    """

    def run(self):
        try:
            if os.environ.get("EMR_BUILD") == "0":
                raise builder.BuildError("EMR_BUILD is 0")
            tools = builder.find_toolchain()
            print(f"emr-kernels: compiling with {tools.compiler} against torch {tools.torch_version}")
            if tools.nvcc:
                names = " ".join(tools.nvcc.architectures)
                print(f"emr-kernels: compiling with {tools.nvcc.path} {tools.nvcc.version} for {names}", flush=True)
            # setuptools gives an editable install a new folder every time, and everything would be compiled again.
            work = (ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)).resolve()
            self.built = work / "out"
            done = builder.build(tools, work, self.built, self.distribution.get_version())
        except builder.BuildError as error:
            if "1" in (os.environ.get("EMR_BUILD"), os.environ.get("EMR_CUDA")):
                raise SystemExit(f"emr-kernels: the extension was not built: {error}") from error
            print(f"emr-kernels: WARNING: pure Python install, no extension: {error}", file=sys.stderr)
            self.extensions = []
        else:
            if done.nvcc is None:
                print(f"emr-kernels: no CUDA kernels: {done.no_cuda}", file=sys.stderr)
                # Left by an earlier install.
                folder = ROOT / "emr_kernels" if self.editable_mode else Path(self.get_ext_fullpath(CUDA)).parent
                (folder / builder.CUDA_LIBRARY).unlink(missing_ok=True)
                self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.built / target.name, target)
        shutil.copy2(self.built / builder.CUDA_REPORT, target.with_name(builder.CUDA_REPORT))

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if self.extensions:
            shutil.copy2(self.built / builder.CUDA_REPORT, ROOT / "emr_kernels")

    def get_outputs(self):
        outputs = super().get_outputs()
        return [*outputs, str(Path(outputs[0]).with_name(builder.CUDA_REPORT))] if outputs else outputs

    def get_ext_filename(self, fullname):
        name = fullname.rpartition(".")[2]
        if any(name == library.rpartition(".")[2] for library in (OPS, CUDA)):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


class BuildPython(build_py):
    """Ships the C++ sources inside the package, for the build on first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "emr_kernels" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension(name, sources=[]) for name in (OPS, CUDA, FACTS)],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
