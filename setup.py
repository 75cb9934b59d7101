"""The build: the wheel holds the profiles and dvc.yaml, too, from which a project is made."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("dvc.yaml", "profiles/*.yaml")


class Build(build_py):
    """Copies `FILES` into pipelines/templates; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the packages."""
        super().run()
        if not self.editable_mode:
            for path in (path for pattern in FILES for path in Path().glob(pattern)):
                target = Path(self.build_lib, "pipelines/templates", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": Build})
