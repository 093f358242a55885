"""What `pyproject.toml` cannot say: no build without the linked rooms, and links in the sdist."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
LINKS = {"tokenprune/server": "../server", "tokenprune/kernels/ops": "../../kernels"}

for link in LINKS:
    # git without symbolic links writes text files, and setuptools packs what is left without a word
    if not (ROOT / link).is_dir():
        raise SystemExit(
            f"{link} must lead to a folder, got a checkout without symbolic links; "
            "git config core.symlinks true, then git checkout -- tokenprune"
        )


class LinkedSdist(sdist):
    """Keeps the links, which setuptools would follow."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Put each link in the place of copies of the files that it leads to."""
        super().make_release_tree(base_dir, files)
        for link, target in LINKS.items():
            copies = Path(base_dir, link)
            shutil.rmtree(copies)
            os.symlink(target, copies)


setup(cmdclass={"sdist": LinkedSdist})
