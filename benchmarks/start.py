"""The startup time of a program that uses the library, and the memory for moving an image."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.bench import IMAGE, STATES, Bench, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed

IMPORT = Limit(Unit.TIME, 0.1)
HELP = Limit(Unit.TIME, 0.25)
MEMORY = 64 << 20
"""The most bytes of memory in addition to the interpreter with the library."""

_HEAVY = ("asyncio", "click", "paramiko", "qemu", "rich")

_MEMORY = """
import json, sys, statepool
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
cache, pool, image, state, working = sys.argv[1:]
disk = statepool.StatePool(cache=cache, sources=[pool]).image(image)
begin = peak()
disk.get(state)
got = peak()
disk.set("new", source=working)
print(json.dumps([got - begin, peak() - begin]))
"""


def table(bench: Bench) -> Table:
    """:returns: the cost before any work"""

    def program(*arguments: str) -> float:
        command = [sys.executable, *arguments]
        return timed(
            lambda: subprocess.run(
                command, env=bench.environment, stdout=subprocess.DEVNULL, check=True
            )
        )

    works = (
        ("-c", "import statepool"),
        ("-m", "statepool", "--help"),
        ("-c", "pass"),
        ("-c", "import attrs"),
    )
    for arguments in works:
        program(*arguments)  # compiles the modules, as an installation does
    count = bench.scale.quick_pairs
    imported, helped, bare, attrs = rounds(
        [lambda arguments=arguments: program(*arguments) for arguments in works], count
    )  # type: ignore[misc]
    figures = [
        Figure("python -c 'import statepool'", "python -c pass", imported, bare, IMPORT),
        Figure("python -c 'import statepool'", "python -c 'import attrs'", imported, attrs),
        Figure("python -m statepool --help", "python -c pass", helped, bare, HELP),
    ]
    loaded = bench.python(
        "-c", f"import sys, statepool; print(*(name for name in {_HEAVY!r} if name in sys.modules))"
    ).split()
    facts = [
        Fact(
            "what import statepool loads of " + ", ".join(_HEAVY),
            ", ".join(loaded) or "nothing",
            "nothing",
            not loaded,
        ),
        *_memory(bench),
    ]
    return Table(
        "start: import, --help and memory",
        figures,
        facts,
        notes=("Whole processes: the bare interpreter is part of all.",),
    )


def _memory(bench: Bench) -> list[Fact]:
    with bench.directory() as place:
        working = place / "working.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(working), str(bench.scale.virtual))
        bench.write(working, 0, bench.scale.root)
        arguments = (str(place / "cache"), str(bench.pool), IMAGE, STATES[0], str(working))
        got, stored = json.loads(bench.python("-c", _MEMORY, *arguments))
    size = f"of {bench.scale.root >> 20} MiB, in MiB beyond import statepool"
    return [
        Fact(
            f"peak memory of a get {size}",
            f"{got / (1 << 20):.1f}",
            f"at most {MEMORY >> 20}",
            got <= MEMORY,
        ),
        Fact(
            f"peak memory of that, and a set {size}",
            f"{stored / (1 << 20):.1f}",
            f"at most {MEMORY >> 20}",
            stored <= MEMORY,
        ),
    ]
