"""Packs what a run on a GPU machine without a network needs: `make gpu-bundle`.

    python tools/gpu_bundle.py [GROUP ...] [--find-links FOLDER]

For each group of tools/gpu_bundle.txt it installs the wheels for Python 3.12 into a folder, removes the files and the
device code that a Hopper GPU never loads, and writes build/gpu-bundle/GROUP.tar.xz. `trainer` is all that the actor
and the head need. SGLang needs `engine` and `cute` (NVIDIA's CuTe DSL, which its dense MLP and two of the head's peers
import). On the GPU machine, one archive after the other:

    python3 -m tarfile -e build/gpu-bundle/trainer.tar.xz site
    export PYTHONPATH=$PWD/site:$PWD/site/nvidia_cutlass_dsl/dsl_packages

Transformer Engine's torch extension is published as source only. It is compiled once, in an environment with the
torch of the GPU machine (about 25 minutes on two cores), and kept in build/gpu-bundle/wheels; `--find-links` names a
folder that holds a wheel of it already.
"""

from __future__ import annotations

import argparse
import fnmatch
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from slim_library import slim

ROOT = Path(__file__).parents[1]
PACKAGES = Path(__file__).with_suffix(".txt")
OUT = ROOT / "build" / "gpu-bundle"
HOPPER = 90
PYTHON, TORCH = "3.12", "2.11.0"
"""Of the GPU machine."""
GROUPS = ("trainer", "engine", "cute")
PLATFORMS = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34", "2_35")
COMPILED = "transformer-engine-torch"
UNUSED = (
    "*/wheel_lib/nccl_ep/*",
    "*/wheel_lib/libnccl_ep.so",
    "transformer_engine/jax/*",
    "sgl_kernel/flash_ops*",
    "sgl_kernel/flashmla_ops*",
    "sgl_kernel/infllm_ops*",
    "sgl_kernel/sm100/*",
    "sglang/multimodal_gen/test/*",
    "sglang/srt/rust_extensions/_server.*",
    "sglang/srt/rust_extensions/_bench.*",
    "sglang/srt/rust_extensions/_grpc.*",
    "xgrammar/lib/*",
    "*.a",
    "*/stubs/*",
)
"""Files that dense Qwen3 models on one Hopper GPU never load: other architectures, servers that we do not start."""


def packages(group: str) -> list[str]:
    """The requirements of a group."""
    lines = [line.split() for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    found = [requirement for name, *requirements in lines for requirement in requirements if name == group]
    if not found:
        raise SystemExit(
            f"error: no group {group!r} in {PACKAGES}; there are {', '.join(sorted({line[0] for line in lines}))}"
        )
    return found


def install(requirements: list[str], target: Path, links: list[Path]) -> None:
    """Installs wheels for the GPU machine's Python into `target`, whatever Python runs this."""
    tag = [f"manylinux_{version}_x86_64" for version in PLATFORMS] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    options = ["--only-binary=:all:", "--no-deps", "--no-compile", "--implementation", "cp", "--python-version", PYTHON]
    options += [f"--platform={platform}" for platform in tag] + ["--platform=linux_x86_64"]
    options += [f"--find-links={link}" for link in links]
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *options, *requirements]
    subprocess.run(command, check=True)


def compile_extension(requirement: str, wheels: Path, work: Path) -> None:
    """Builds Transformer Engine's torch extension against the GPU machine's torch, unless `wheels` holds it."""
    if any(wheels.glob(f"{COMPILED.replace('-', '_')}-*cp312*.whl")):
        return
    python = work / "bin" / "python"
    subprocess.run([f"python{PYTHON}", "-m", "venv", str(work)], check=True)
    pip = [str(python), "-m", "pip"]
    subprocess.run(
        [*pip, "install", "-q", f"torch=={TORCH}", "setuptools<81", "wheel", "packaging", "ninja", "pybind11"],
        check=True,
    )
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    includes = os.pathsep.join(map(str, Path(found).glob("nvidia/*/include")))
    # torch 2.11 brings NCCL 2.28; Transformer Engine's expert-parallel part needs a newer one.
    environment = {**os.environ, "CPATH": includes, "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0"}
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), requirement]
    subprocess.run(build, check=True, env=environment)


def shrink(folder: Path) -> None:
    """Removes unused files and foreign device code, and says how much the latter was."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in UNUSED):
            path.unlink()
        elif path.name.endswith(".so") or ".so." in path.name:
            blanked = slim(path, HOPPER)
            if blanked:
                print(f"  {name}: {blanked / 2**20:.0f} MiB of code for other architectures blanked")


def unmet(folder: Path, provided: Iterable[str]) -> dict[str, list[str]]:
    """What the packages in `folder` require and nobody provides, each with the packages that require it."""
    found: dict[str, list[str]] = {}
    known = {canonicalize_name(name) for name in provided}
    target = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    for package in distributions(path=[str(folder)]):
        for text in package.requires or ():
            requirement = Requirement(text)
            asked = requirement.marker is None or requirement.marker.evaluate(target)
            if asked and canonicalize_name(requirement.name) not in known:
                found.setdefault(canonicalize_name(requirement.name), []).append(package.metadata["Name"])
    return found


def provided() -> list[str]:
    """Names of all packages that are packed, on the machine already, or known not to be needed."""
    return [text.split("==")[0] for group in (*GROUPS, "machine", "unused") for text in packages(group)]


def pack(folder: Path, archive: Path) -> None:
    """Writes the folder's contents as a .tar.xz."""
    with lzma.open(archive, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def bundle(group: str, links: list[Path]) -> Path:
    """One group, from its requirements to its archive."""
    requirements, wheels, target = packages(group), OUT / "wheels", OUT / group
    wheels.mkdir(parents=True, exist_ok=True)
    for link in links:
        for wheel in link.glob(f"{COMPILED.replace('-', '_')}-*.whl"):
            shutil.copy(wheel, wheels)
    for requirement in requirements:
        if requirement.startswith(f"{COMPILED}=="):
            compile_extension(requirement, wheels, OUT / "build-environment")
    shutil.rmtree(target, ignore_errors=True)
    install(requirements, target, [wheels, *links])
    if lacking := unmet(target, provided()):
        lines = [f"{name} (required by {', '.join(by)})" for name, by in sorted(lacking.items())]
        raise SystemExit(f"error: add to group {group}, `machine` or `unused` of {PACKAGES}: {'; '.join(lines)}")
    shrink(target)
    archive = OUT / f"{group}.tar.xz"
    pack(target, archive)
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=GROUPS, help=" | ".join(GROUPS))
    parser.add_argument("--find-links", type=Path, action="append", default=[], help="folder of wheels to use first")
    chosen = parser.parse_args()
    sizes = {group: bundle(group, chosen.find_links).stat().st_size for group in chosen.groups}
    for group, size in sizes.items():
        print(f"{OUT / f'{group}.tar.xz'}: {size / 2**20:.1f} MiB")
    print(f"together {sum(sizes.values()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
