"""Compiles the CPU kernel into a wheel where there is a compiler; pyproject.toml has all the rest of the build.

Without a compiler the wheel is for every platform and the kernel is compiled at first use. So it is in an editable
installation always: a library compiled now would be older than the sources soon (`taq_kernels.cpu_build`).
"""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# By path: a package can't be imported before it is installed, and this one needs torch.
cpu_build = runpy.run_path(str(Path(__file__).parent / "kernels" / "taq_kernels" / "cpu_build.py"))


class BuildLibrary(build_py):
    """Copies the modules, then compiles the library beside them."""

    library: Path | None = None

    def run(self) -> None:
        """Leave `library` None where nothing was compiled."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "taq_kernels", cpu_build["packaged"]().name)
        for outdated in target.parent.glob("lowbit-*.so"):
            outdated.unlink()
        try:
            cpu_build["check_machine"]()
            cpu_build["compile_to"](target)
        except cpu_build["BuildError"] as error:
            self.warn(f"the wheel will hold no CPU kernel, which is compiled at first use instead: {error}")
        else:
            self.library = target


class PlatformWheel(bdist_wheel):
    """A wheel with the library is for one platform, but for every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform; called when all files are in place and before their list is written."""
        if self.get_finalized_command("build_py").library is None:
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel})
