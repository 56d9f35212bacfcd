"""A disk that a test can fill."""

from __future__ import annotations

import subprocess
from pathlib import Path


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.mount(f"size={size}")

    @classmethod
    def mounted(cls, folder: Path, size: int) -> SmallDisk | None:
        """One of `size` bytes at `folder`; ``None`` where mounting is not allowed."""
        try:
            return cls(folder, size)
        except (OSError, subprocess.CalledProcessError):
            return None

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.folder / "ballast").open("wb", buffering=0) as ballast:
            for piece in (1 << 16, 1 << 12, 1):
                try:
                    while ballast.write(b"\0" * piece):
                        pass
                except OSError:
                    continue

    def make_room(self) -> None:
        """Take back what `fill` wrote."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)
