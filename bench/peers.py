"""Fetches and builds what the benchmarks compare with, outside the repository's own environment.

    python -m bench.peers [--cache .bench]

llama.cpp is compiled from the source tree inside the llama-cpp-python package, for this machine's
own instructions; that takes ten minutes or more. AirLLM is unpacked beside it. Both are pinned and
hashed in requirements/. What is there already is left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DEFAULT_CACHE: Final = ROOT / ".bench"
_TARGETS: Final = ("llama-batched-bench", "llama-server", "llama-quantize")
_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_CUDA=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def llama_program(cache: Path, name: str) -> Path:
    """One of llama.cpp's programs. Raises FileNotFoundError that says how to get it."""
    return _found(cache / "llama-build" / "bin" / name)


def airllm_folder(cache: Path) -> Path:
    """What to put on the import path. Raises FileNotFoundError that says how to get it."""
    return _found(cache / "airllm")


def _found(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `make bench-peers`")
    return path


def build_llama(cache: Path, jobs: int) -> None:
    build = cache / "llama-build"
    if all((build / "bin" / name).exists() for name in _TARGETS):
        return
    fetched = cache / "download"
    shutil.rmtree(fetched, ignore_errors=True)
    lock = ROOT / "requirements" / "bench-llama.lock"
    _pip(
        *("download", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes"),
        *("-r", str(lock), "--dest", str(fetched)),
    )
    (archive,) = fetched.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(fetched, filter="data")
    (tree,) = fetched.glob("*/vendor/llama.cpp")
    _run("cmake", "-S", str(tree), "-B", str(build), *_OPTIONS)
    _run("cmake", "--build", str(build), "--parallel", str(jobs), "--target", *_TARGETS)
    shutil.rmtree(fetched)


def unpack_airllm(cache: Path) -> None:
    """Without its dependencies: all that it imports is in the repository's own environment."""
    folder = cache / "airllm"
    if folder.exists():
        return
    lock = ROOT / "requirements" / "bench-airllm.lock"
    _pip("install", "--no-deps", "--require-hashes", "-r", str(lock), "--target", str(folder))


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def absolute(text: str) -> Path:
    """For the command line: legs run in another folder than the one a path was given in."""
    return Path(text).absolute()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    unpack_airllm(arguments.cache)
    build_llama(arguments.cache, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
