"""Installs a version of torch to be run on a CPU alone, whatever its wheel was built for.

    python .ci/torch_on_cpu.py 2.15.0

A wheel built for CUDA asks for libraries of several gigabytes and does not import without them.
Here it gets libraries of the same names that hold functions of the same names, each of which says
that there is no device; and its metadata no longer ask for the packages that hold the real ones.
For tests of a version, on Linux with gcc and binutils; not for use.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE


def shown(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def install(version: str, packages: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", f"torch=={version}"]
    subprocess.run(pip, check=True)
    (metadata,) = packages.glob("torch-*.dist-info/METADATA")
    asked = re.compile(r"^Requires-Dist: (nvidia|cuda|triton).*\n", re.MULTILINE)
    metadata.write_text(asked.sub("", metadata.read_text()))


def stand_in(libraries: Path) -> None:
    """Writes the libraries that those of torch ask for beside them, where they look first."""
    asked: set[str] = set()  # names of libraries
    functions: defaultdict[str, set[str]] = defaultdict(set)  # by version of their symbols
    versions: defaultdict[str, set[str]] = defaultdict(set)  # by library
    for library in libraries.glob("*.so*"):
        needed = shown("readelf", "-d", library)
        asked |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)\w*\.so\.\d+)\]", needed))
        groups = shown("readelf", "-V", "-W", library)
        for name, own in re.findall(r"File: (\S+)  Cnt: \d+\n((?:.*Name: .*\n)+)", groups):
            versions[name] |= set(re.findall(r"Name: (\S+)", own))
        for line in shown("nm", "-D", "--undefined-only", library).splitlines():
            name, _, version = line.split()[-1].partition("@")
            functions[version.lstrip("@")].add(name)
    plain = {name for name in functions[""] if re.fullmatch(r"(cu|nv|nccl)\w*", name)}
    for library in sorted(asked):
        names = set[str]().union(*(functions[version] for version in versions[library]))
        if library.startswith("libcudart"):  # those of no version are looked for everywhere
            names |= plain
        script = "".join(
            f"{version} {{ global: {'; '.join(sorted(functions[version]))}; }};\n"
            for version in sorted(versions[library])
        )
        compile_(libraries / library, sorted(names), script)


def compile_(library: Path, names: list[str], script: str) -> None:
    code = [
        f'char *{name}(void) {{ return ""; }}'
        if re.search("Error(String|Name)", name)
        else f"long {name}(void) {{ return {NO_DEVICE}; }}"
        for name in names
    ]
    source, versions = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("\n".join(code) or "int nothing;")
    versions.write_text(script)
    flags = [f"-Wl,--version-script={versions}"] if script else []
    gcc = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", str(source)]
    subprocess.run([*gcc, f"-Wl,-soname,{library.name}", "-o", library, *flags], check=True)
    source.unlink()
    versions.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} VERSION")
    packages = Path(sysconfig.get_path("platlib"))
    install(sys.argv[1], packages)
    stand_in(packages / "torch" / "lib")
