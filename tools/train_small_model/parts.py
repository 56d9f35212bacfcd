"""Cuts an exported model into parts that are small enough to carry, and puts them together again.

    python -m tools.train_small_model.parts FOLDER --to worker/small_model

A folder of parts holds ``weights.0``, ``weights.1`` and so on, and ``rest.tar`` with all other
files and the checksum of the weights.
"""

import argparse
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

PART_BYTES = 14 * 2**20
WEIGHTS, SUM, REST = "model.safetensors", "model.sha256", "rest.tar"


def cut(folder: Path, to: Path) -> None:
    """Write the parts of the exported model in ``folder`` in place of those in ``to``.

    They are complete before the old ones are moved away.
    """
    new, old = to.with_name(to.name + ".new"), to.with_name(to.name + ".old")
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    new.mkdir(parents=True)
    weights = (folder / WEIGHTS).read_bytes()
    for nth, start in enumerate(range(0, len(weights), PART_BYTES)):
        (new / f"weights.{nth}").write_bytes(weights[start : start + PART_BYTES])
    with tarfile.open(new / REST, "w") as tar:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != WEIGHTS:
                tar.add(file, file.name)
        told = hashlib.sha256(weights).hexdigest().encode()
        entry = tarfile.TarInfo(SUM)
        entry.size = len(told)
        tar.addfile(entry, io.BytesIO(told))
    if to.exists():
        to.rename(old)
    new.rename(to)
    shutil.rmtree(old, ignore_errors=True)


def join(parts: Path, to: Path) -> None:
    """Put a model together; fails if the weights are not those that were cut."""
    to.mkdir(parents=True, exist_ok=True)
    found = sorted(parts.glob("weights.*"), key=lambda file: int(file.suffix[1:]))
    weights = b"".join(file.read_bytes() for file in found)
    with tarfile.open(parts / REST) as tar:
        sum_file = tar.extractfile(SUM)
        assert sum_file is not None
        if hashlib.sha256(weights).hexdigest().encode() != sum_file.read():
            raise ValueError(f"the weights in {parts} are not whole")
        members = [member for member in tar.getmembers() if member.name != SUM]
        tar.extractall(to, members, filter="data")
    (to / WEIGHTS).write_bytes(weights)


def main() -> None:
    """Put a model together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    join(args.parts, args.to)
    (args.to / "heads.pt").unlink(missing_ok=True)  # of use to training alone


if __name__ == "__main__":
    main()
