"""Compares the registers and the memory of a wheel's kernels with csrc/cuda/resources.txt.

    python .ci/resources.py WHEEL            # fails where a kernel differs
    python .ci/resources.py WHEEL --write    # takes the wheel's over

Another nvcc gives other registers: with one, only the stack, where local memory and spills are, is
compared.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "resources.txt"
ARCH = "sm_90"
FIELDS = ("REG", "STACK", "SHARED")
TITLE = "# registers, bytes of stack, bytes of shared memory; sm_90, nvcc {}\n"


def cuobjdump() -> str:
    """The one of the pip package, or on PATH."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia"
    for found in (*sorted(folder.glob("*/bin/cuobjdump")), shutil.which("cuobjdump")):
        if found:
            return str(found)
    raise SystemExit("error: there is no cuobjdump: pip install nvidia-cuda-cuobjdump")


def resources(wheel: Path) -> dict[str, tuple[int, ...]]:
    """Of each kernel, by its file and name."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            (module,) = [name for name in archive.namelist() if name.endswith(".so")]
            path = archive.extract(module, folder)
        command = [cuobjdump(), "--dump-resource-usage", "-arch", ARCH, path]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mangled, usages = zip(*re.findall(r"Function (\S+):\n(.*)", output), strict=True)
    found = {}
    for file, name, usage in zip(map(file_of, mangled), demangled(mangled), usages, strict=True):
        values = dict(re.findall(r"(\w+):(\d+)", usage))
        found[f"{file} {plain(name)}"] = tuple(int(values[field]) for field in FIELDS)
    return dict(sorted(found.items()))


def file_of(mangled: str) -> str:
    """Of a kernel in a namespace without a name, which is that of its file."""
    return re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", mangled)[1]


def demangled(names: tuple[str, ...]) -> list[str]:
    output = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return output.splitlines()


def plain(name: str) -> str:
    """Without namespaces and parameters."""
    name = re.sub(r"facelt::|cuda::|\(anonymous namespace\)::|^void ", "", name)
    depth, end = 0, len(name)
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = position
            break
    return name[:end]


def nvcc_version() -> str:
    output = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release ([\d.]+)", output.stdout)[1]


def read_table() -> tuple[str, dict[str, tuple[int, ...]]]:
    title, *lines = TABLE.read_text().splitlines()
    rows = [line.split(maxsplit=len(FIELDS)) for line in lines]
    return title, {name: tuple(map(int, values)) for *values, name in rows}


def write_table(found: dict[str, tuple[int, ...]]) -> None:
    rows = [
        f"{''.join(f'{value:6}' for value in values)}  {name}" for name, values in found.items()
    ]
    TABLE.write_text(TITLE.format(nvcc_version()) + "\n".join(rows) + "\n")


def differences(found: dict[str, tuple[int, ...]]) -> list[str]:
    title, expected = read_table()
    compared = slice(None) if title + "\n" == TITLE.format(nvcc_version()) else slice(1, 2)
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        before, now = (each[name][compared] if name in each else None for each in (expected, found))
        if before != now:
            lines.append(f"{name}: {', '.join(FIELDS[compared])} was {before}, is {now}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--write", action="store_true", help="take the wheel's over")
    options = parser.parse_args()
    found = resources(options.wheel)
    if options.write:
        write_table(found)
    elif lines := differences(found):
        raise SystemExit(
            "error: kernels differ from csrc/cuda/resources.txt; where that is meant, "
            f"python .ci/resources.py {options.wheel} --write\n  " + "\n  ".join(lines)
        )
    print(f"{len(found)} kernels, {sum(stack > 0 for _, stack, _ in found.values())} with a stack")


if __name__ == "__main__":
    main()
