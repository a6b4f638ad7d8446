"""
The house rules of CONTRIBUTING.rst, kept by reading the source of every module.

Each rule is a function from a module's path and source to what it breaks. Each of them is first
shown an example that breaks it, so that none can become one that always passes.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS: list[set[str]] = [
    {"errors", "version", "leases", "beneath"},
    {"model"},
    {"qcow2", "transports"},
    {"pools", "machine"},
    {"cache", "sources"},
    {"copying"},
    {"capture"},
    {"care"},
    {"backends"},
    {"bundles"},
    {"policy", "ensure", "config", "handles"},
    {"api"},
    {"archive", "carts", "staging"},
    {"cli", "testing"},
]
"""From the cellar up. A room may import those on lower floors, never one on its own floor."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

BACKENDS = {
    "base": 0,
    "registry": 0,
    "sourced": 2,
    "transfer": 2,
    "external": 3,
    "internal": 3,
    "live": 4,
    "machines": 4,
    "ramfile": 5,
    "running": 6,
}
"""Within the backends: those that are not listed help those above the base, and stand at 1."""

ONLY_IN: dict[str, str] = {
    "asyncio": r"statepool/machine/",
    "qemu": r"statepool/machine/",
    "paramiko": r"statepool/transports/ssh",
    "zstandard": r"statepool/(transports/ssh|machine/|bundles/|archive/|capture/unpacking\.py$)",
    "msgspec": r"statepool/model/",
    "click": r"statepool/cli/",
    "rich": r"statepool/cli/",
    "celery": r"statepool/carts/",
    "cheroot": r"statepool/carts/|statepool/cli/serve\.py$",
    "flask": r"statepool/carts/|statepool/cli/serve\.py$",
    "peewee": r"statepool/carts/|statepool/cli/serve\.py$",
    "playhouse": r"statepool/carts/",
    "prometheus_client": r"statepool/carts/|statepool/cli/serve\.py$",
    "subprocess": (
        r"statepool/(qcow2|machine)/|statepool/cli/ensure\.py$|statepool/transports/ssh/program\.py$"
        r"|statepool/archive/external\.py$|statepool/staging/copy_command\.py$"
    ),
}
"""
Where a library may be imported: its exceptions are translated there, and nobody else waits for it
to load.
"""

ENVIRONMENT_IN = (
    r"statepool/(config\.py$|config/|cli/|transports/ssh/(program|login)\.py$)|plugins/"
)

LONGEST = 720
"""Lines. A longer file is two rooms not yet told apart."""

Rule = Callable[[str, str], Iterator[str]]


# -- reading ---------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """
    :returns: line and dotted name of everything that is imported; ``from a import b`` imports
        ``a.b``, which may be a module
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}")
                for alias in node.names
            )
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in ("import_module", "__import__") and isinstance(
                node.args[0].value, str
            ):
                yield node.lineno, node.args[0].value


def room_of(path: str) -> str:
    """
    :returns: the room that a file of the package is in; ``""`` for the front door: ``__init__`` and
        ``__main__``
    """
    name = PurePosixPath(path).relative_to("statepool").parts[0].removesuffix(".py")
    return "" if name in ("__init__", "__main__") else name


# -- the rules -------------------------------------------------------------------------------------


def imports_point_down(path: str, source: str) -> Iterator[str]:
    room = room_of(path)
    if room and room not in FLOOR:
        yield f"{path}: the room {room!r} is on no floor: give it one in the table"
        return
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            yield f"{path}:{line}: {name} hides the floor: import it by its full name"
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first != "statepool" or not room or target == room:
            continue
        if target not in FLOOR:
            if room not in ("carts", "cli", "testing"):
                yield (
                    f"{path}:{line}: {room} comes in by the front door: it must import {name} from"
                    " where it is"
                )
        elif FLOOR[target] >= FLOOR[room]:
            yield f"{path}:{line}: {room} imports {target}, which is not below it"


def services_come_in_by_the_front_door(path: str, source: str) -> Iterator[str]:
    if not path.startswith("statepool/carts/"):
        return
    for line, name in imports(ast.parse(source)):
        if (
            name.startswith("statepool.")
            and name.split(".")[1] in FLOOR
            and not name.startswith("statepool.carts")
        ):
            yield (
                f"{path}:{line}: a service imports {name}, which is not a public name of statepool"
            )


def descriptors_are_kept(path: str, source: str) -> Iterator[str]:
    """
    A descriptor to which nothing refers is closed, and its number may be another file's by the time
    it is used.
    """
    for node in ast.walk(ast.parse(source)):
        if not (
            isinstance(node, ast.Attribute)
            and node.attr == "number"
            and isinstance(node.value, ast.Call)
        ):
            continue
        if ast.unparse(node.value.func).rpartition(".")[2] in (
            "top",
            "open",
            "open_at",
            "lent",
            "open_regular",
            "Descriptor",
        ):
            yield (
                f"{path}:{node.lineno}: keep the descriptor in a variable while its number is used"
            )


def backends_stand_on_each_other(path: str, source: str) -> Iterator[str]:
    if not path.startswith("statepool/backends/") or path.endswith("__init__.py"):
        return
    here = PurePosixPath(path).stem
    for line, name in imports(ast.parse(source)):
        if not name.startswith("statepool.backends."):
            continue
        there = name.split(".")[2]
        below = BACKENDS.get(there, 1) < BACKENDS.get(here, 1)
        alike = BACKENDS.get(there, 1) == BACKENDS.get(here, 1) <= 1
        if there != here and not below and not alike:
            yield f"{path}:{line}: the backend {here} imports {there}, which is not below it"


def libraries_have_their_place(path: str, source: str) -> Iterator[str]:
    for line, name in imports(ast.parse(source)):
        library = name.partition(".")[0]
        if library in ONLY_IN and not re.match(ONLY_IN[library], path):
            yield f"{path}:{line}: {library} is imported outside {ONLY_IN[library]}"


def programs_have_their_place(path: str, source: str) -> Iterator[str]:
    if re.match(ONLY_IN["subprocess"], path):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.fullmatch(
            r"os\.(system|popen|exec.*|spawn.*|posix_spawnp?)", ast.unparse(node)
        ):
            yield f"{path}:{node.lineno}: {ast.unparse(node)} runs a program, which only qcow2 does"


def ssh_is_run_by_its_room(path: str, source: str) -> Iterator[str]:
    if re.match(r"statepool/transports/ssh/", path):
        return
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.List | ast.Tuple)
            and node.elts
            and ast.unparse(node.elts[0]) in ("'ssh'", "'scp'", "'sftp'")
        ):
            yield (
                f"{path}:{node.lineno}: runs {ast.unparse(node.elts[0])}, which only"
                " transports/ssh/ does"
            )


PATHS_IN = (
    r"statepool/(pools/(?!writer)|transports/(local|link)\.py$"
    r"|cache/(cache|chains|check_cached|gc_roots|lookup_cache|trust)\.py$|sources/source_stats\.py$|copying/(resume|sync)\.py$"
    r"|capture/scratch\.py$|care/(gc|verify)\.py$)"
)
"""
Rooms that have to do with what is in pools and caches only. Others also have to do with files of
the user, which have paths.
"""

BY_NAME = re.compile(
    r"os\.(open|stat|lstat|listdir|scandir|walk|unlink|remove|rename|replace|link|symlink|readlink|mkdir|makedirs|rmdir|chmod|chown|utime|truncate)"
    r"|os\.path\.(exists|lexists|isfile|isdir|islink|getsize|getmtime|samefile)|shutil\.\w+|open|\w+(\.\w+)*\.(exists|lstat|unlink|iterdir|glob|rglob|"
    r"is_file|is_dir|is_symlink|read_bytes|read_text|write_bytes|write_text|rmdir|mkdir|touch|hardlink_to|symlink_to)"
)
"""Calls that take a path, as far as they have no descriptor of a directory beside it."""

BY_NAME_ALL_THE_SAME = {
    "os.makedirs(self.tree.root, exist_ok=True)": "the pool's own directory, which its owner names",
    "os.stat(self.tree.root)": "likewise",
    "os.open(f'/proc/self/fd/{pinned}', _READ & ~os.O_NONBLOCK)": "a descriptor, opened beneath",
    "os.path.isdir('/proc/self/fd')": "of this process",
    "os.path.lexists(working)": "an image of the user",
    "os.path.lexists(use.temporary)": "likewise",
    "os.path.lexists(use.working)": "likewise",
    "os.path.isdir(os.path.dirname(use.working))": "a directory of the user",
    "os.path.lexists(os.path.join(os.path.dirname(use.working), _temporary(use.record)))": (
        "likewise"
    ),
    "_ROUTES.read_text()": "of the kernel",
    "self._notes.touch(DIRECTORY, [f'{digest.file_name}.json' for digest in digests])": (
        "notes, by their own room"
    ),
    "entry.is_file(follow_symlinks=False)": "an entry of a directory that is open",
    "entry.is_dir(follow_symlinks=False)": "likewise",
    "entry.is_symlink()": "likewise",
    "os.listdir(directory)": "a descriptor",
    "os.scandir(fd)": "a descriptor",
    "os.utime(f'/proc/self/fd/{descriptor}', ns=(stat.st_atime_ns, time.time_ns() - _BACK_NS))": (
        "a descriptor"
    ),
}


def pools_are_opened_beneath(path: str, source: str) -> Iterator[str]:
    if not re.match(PATHS_IN, path):
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not BY_NAME.fullmatch(ast.unparse(node.func)):
            continue
        if {keyword.arg for keyword in node.keywords} & {"dir_fd", "src_dir_fd"} or ast.unparse(
            node
        ) in BY_NAME_ALL_THE_SAME:
            continue
        yield (
            f"{path}:{node.lineno}: {ast.unparse(node)} goes by a name: what is in a pool is opened"
            " through beneath.py"
        )


def environment_has_its_place(path: str, source: str) -> Iterator[str]:
    if re.match(ENVIRONMENT_IN, path):
        return
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(
            r"os\.(environb?|getenvb?|putenv|unsetenv)|os\.path\.expandvars", ast.unparse(node)
        ):
            yield (
                f"{path}:{node.lineno}: {ast.unparse(node)}: only the configuration, the command"
                " line and the plugins look at the environment"
            )
    for line, name in imports(tree):
        if re.fullmatch(r"os\.(environb?|getenvb?|putenv|unsetenv)|os\.path\.expandvars", name):
            yield (
                f"{path}:{line}: {name}: only the configuration, the command line and the plugins"
                " look at the environment"
            )


def errors_are_not_swallowed(path: str, source: str) -> Iterator[str]:
    if path == "statepool/cli/main.py":
        return  # the last one to see a fault of ours shows it in one line
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else ""
        inside = [inner for statement in node.body for inner in ast.walk(statement)]
        # A future gives it to whoever asks for the result.
        handed_on = any(
            isinstance(inner, ast.Call) and ast.unparse(inner.func).endswith(".set_exception")
            for inner in inside
        )
        reraised = handed_on or any(isinstance(inner, ast.Raise) for inner in inside)
        if caught in ("", "Exception", "BaseException") and not reraised:
            yield f"{path}:{node.lineno}: catches {caught or 'everything'} and keeps it"


def modules_say_what_they_are(path: str, source: str) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(source)):
        yield f"{path}: has no docstring"


def files_are_short(path: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LONGEST:
        yield f"{path}: has {lines} lines, more than {LONGEST}"


def paths_are_nobodys(path: str, source: str) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        found = re.search(r"(?<![\w.~:/])/(?:home/\w|root/|work/|Users/\w|tmp/\w+/bin)", line)
        if found:
            yield f"{path}:{number}: {found[0]!r} is a path on somebody's machine"


def plugins_come_in_by_the_front_door(path: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    top = {
        line
        for line, _ in imports(
            ast.Module(
                [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
            )
        )
    }
    for line, name in imports(tree):
        if name.partition(".")[0] != "statepool":
            continue
        if line in top:
            yield f"{path}:{line}: a plugin imports {name} before anybody uses it"
        if name.startswith("statepool.") and name.split(".")[1] in FLOOR:
            yield f"{path}:{line}: a plugin imports {name}, which is not a public name of statepool"


# -- what the rules are about ----------------------------------------------------------------------


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.is_file()
    ]
    return sorted(
        str(path.relative_to(ROOT))
        for path in found
        if "_build" not in path.parts and not any(part.endswith(".egg-info") for part in path.parts)
    )


PACKAGE = files("statepool")
PLUGINS = files("plugins")
OURS = PACKAGE + PLUGINS
CODE = OURS + files("tests", "benchmarks", "examples", "docs", "tools")
TEXTS = [
    *files("docs", "changelog.d", "plugins", "examples", suffixes=(".rst", ".md", ".toml")),
    "README.rst",
    "CONTRIBUTING.rst",
    "FILES.rst",
]

EXAMPLES: list[tuple[Rule, list[str], str, str]] = [
    (imports_point_down, PACKAGE, "statepool/model/x.py", "from statepool.pools.log import Log"),
    (
        imports_point_down,
        PACKAGE,
        "statepool/model/x.py",
        "def f():\n    from statepool import api",
    ),
    (imports_point_down, PACKAGE, "statepool/qcow2/x.py", "import statepool.transports.base"),
    (
        imports_point_down,
        PACKAGE,
        "statepool/cache/x.py",
        "from statepool.sources.ranking import rank",
    ),
    (
        imports_point_down,
        PACKAGE,
        "statepool/sources/x.py",
        "from statepool.cache.cache import Cache",
    ),
    (
        imports_point_down,
        PACKAGE,
        "statepool/copying/x.py",
        "from statepool.care.verify import verify",
    ),
    (imports_point_down, PACKAGE, "statepool/config/places.py", "from statepool import policy"),
    (imports_point_down, PACKAGE, "statepool/pools/x.py", "import statepool"),
    (imports_point_down, PACKAGE, "statepool/pools/x.py", "from statepool import StatePool"),
    (imports_point_down, PACKAGE, "statepool/pools/x.py", "from . import log"),
    (
        imports_point_down,
        PACKAGE,
        "statepool/pools/x.py",
        "importlib.import_module('statepool.backends.base')",
    ),
    (
        imports_point_down,
        PACKAGE,
        "statepool/errors.py",
        "from statepool.model.names import is_name",
    ),
    (imports_point_down, PACKAGE, "statepool/cupboard/x.py", ""),
    (
        services_come_in_by_the_front_door,
        PACKAGE,
        "statepool/carts/x.py",
        "from statepool.errors import NotFound",
    ),
    (services_come_in_by_the_front_door, PACKAGE, "statepool/carts/x.py", "import statepool.api"),
    (imports_point_down, PACKAGE, "statepool/api.py", "from statepool.carts import settings"),
    (
        backends_stand_on_each_other,
        PACKAGE,
        "statepool/backends/base.py",
        "from statepool.backends import transfer",
    ),
    (
        backends_stand_on_each_other,
        PACKAGE,
        "statepool/backends/sourced.py",
        "from statepool.backends.transfer import QCOW2ImageTransfer",
    ),
    (
        backends_stand_on_each_other,
        PACKAGE,
        "statepool/backends/external.py",
        "import statepool.backends.internal",
    ),
    (
        backends_stand_on_each_other,
        PACKAGE,
        "statepool/backends/cupboard.py",
        "import statepool.backends.external",
    ),
    (libraries_have_their_place, OURS, "statepool/pools/x.py", "import asyncio"),
    (
        libraries_have_their_place,
        OURS,
        "statepool/backends/live.py",
        "from qemu.qmp import QMPClient",
    ),
    (
        libraries_have_their_place,
        OURS,
        "statepool/transports/local.py",
        "def f():\n    import paramiko",
    ),
    (libraries_have_their_place, OURS, "statepool/pools/records.py", "from msgspec import Meta"),
    (libraries_have_their_place, OURS, "statepool/api.py", "import click"),
    (
        libraries_have_their_place,
        OURS,
        "statepool/copying/x.py",
        "from rich.progress import Progress",
    ),
    (libraries_have_their_place, OURS, "statepool/backends/external.py", "import subprocess"),
    (
        programs_have_their_place,
        OURS,
        "statepool/backends/external.py",
        "os.system('qemu-img check x')",
    ),
    (programs_have_their_place, OURS, "statepool/cli/x.py", "os.execvp('qemu-img', [])"),
    (
        ssh_is_run_by_its_room,
        OURS,
        "statepool/machine/x.py",
        "subprocess.run(['ssh', 'store', 'true'])",
    ),
    (pools_are_opened_beneath, OURS, "statepool/pools/x.py", "os.unlink(root + path)"),
    (pools_are_opened_beneath, OURS, "statepool/cache/cache.py", "path.exists()"),
    (pools_are_opened_beneath, OURS, "statepool/transports/local.py", "open(path, 'rb')"),
    (descriptors_are_kept, OURS, "statepool/pools/x.py", "os.fstat(tree.top().number)"),
    (environment_has_its_place, OURS, "statepool/pools/x.py", "os.environ.get('STATEPOOL_CACHE')"),
    (environment_has_its_place, OURS, "statepool/qcow2/x.py", "os.getenv('PATH')"),
    (environment_has_its_place, OURS, "statepool/api.py", "from os import environ"),
    (
        errors_are_not_swallowed,
        OURS,
        "statepool/pools/x.py",
        "try:\n    f()\nexcept Exception:\n    pass",
    ),
    (errors_are_not_swallowed, OURS, "statepool/pools/x.py", "try:\n    f()\nexcept:\n    g()"),
    (modules_say_what_they_are, OURS, "statepool/pools/x.py", "import os"),
    (files_are_short, CODE, "tests/x.py", "pass\n" * (LONGEST + 1)),
    (paths_are_nobodys, CODE + TEXTS, "docs/x.rst", "see /home" + "/kim/pool"),
    (paths_are_nobodys, CODE + TEXTS, "tests/x.py", "'/ro" + "ot/pool'"),
    (plugins_come_in_by_the_front_door, PLUGINS, "plugins/x.py", "import statepool"),
    (
        plugins_come_in_by_the_front_door,
        PLUGINS,
        "plugins/x.py",
        "def f():\n    from statepool.pools import Pool",
    ),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (
        imports_point_down,
        "statepool/pools/log.py",
        (
            "from statepool.pools.fold import fold\nfrom statepool.model.digest import"
            " Digest\nimport os"
        ),
    ),
    (imports_point_down, "statepool/__init__.py", "from statepool.api import StatePool"),
    (imports_point_down, "statepool/cli/x.py", "import statepool"),
    (
        backends_stand_on_each_other,
        "statepool/backends/external.py",
        "from statepool.backends.transfer import QCOW2ImageTransfer",
    ),
    (libraries_have_their_place, "statepool/transports/ssh_files.py", "import paramiko"),
    (ssh_is_run_by_its_room, "statepool/transports/ssh/x.py", "words = ['ssh', 'store']"),
    (
        descriptors_are_kept,
        "statepool/pools/x.py",
        "top = tree.top()\nos.fstat(top.number)\nfold().number",
    ),
    (environment_has_its_place, "statepool/config/places.py", "os.environ"),
    (
        errors_are_not_swallowed,
        "statepool/pools/x.py",
        "try:\n    f()\nexcept BaseException:\n    g()\n    raise",
    ),
    (
        errors_are_not_swallowed,
        "statepool/pools/x.py",
        "try:\n    f()\nexcept BaseException as error:\n    future.set_exception(error)",
    ),
    (
        paths_are_nobodys,
        "docs/x.rst",
        (
            "ssh://lab@store/work/pool and file:///srv/pool and /tmp/pool and"
            " https://example.org/home/x"
        ),
    ),
    (
        plugins_come_in_by_the_front_door,
        "plugins/x.py",
        "def f():\n    import statepool\n    from statepool import StatePool",
    ),
]

RULES = list({rule: subjects for rule, subjects, _, _ in EXAMPLES}.items())


@pytest.mark.parametrize(
    ("rule", "path", "source"), [(rule, path, source) for rule, _, path, source in EXAMPLES]
)
def test_rule_catches(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, source))


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_rule_lets_pass(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, source)) == []


@pytest.mark.parametrize(("rule", "subjects"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_house_keeps(rule: Rule, subjects: list[str]) -> None:
    broken = [
        complaint
        for path in subjects
        for complaint in rule(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


def circles(sources: Mapping[str, str]) -> list[str]:
    """
    :param sources: modules by their paths
    :returns: those that import each other, if any do: also later, or only for their types
    """
    known = {module_name(path) for path in sources}
    wanted = {
        module_name(path): {
            next((one for one in (name, name.rpartition(".")[0]) if one in known), "")
            for _, name in imports(ast.parse(source))
        }
        for path, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(
            {name: needed - {"", name} for name, needed in wanted.items()}
        ).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_files() -> None:
    there = {
        "statepool/x.py": "from statepool.y import y",
        "statepool/y.py": "def f():\n    import statepool.z",
        "statepool/z.py": "",
    }
    assert circles(there) == []
    assert circles({**there, "statepool/z.py": "from statepool import x"})
    assert circles({path: (ROOT / path).read_text(encoding="utf-8") for path in OURS}) == []


def test_the_picture_shows_these_floors() -> None:
    text = (ROOT / "CONTRIBUTING.rst").read_text(encoding="utf-8")
    picture = re.sub(
        r"inside:.*", "", text.partition("The house in one picture")[2].partition("FILES.rst")[0]
    )
    lines = [
        set(re.findall(r"[a-z_0-9]+", line)) & FLOOR.keys()
        for line in picture.partition("::")[2].splitlines()
        if line.startswith(" ")
    ]
    *floors, lowest = [rooms for rooms in lines if rooms]
    assert floors == FLOORS[:1:-1]
    assert lowest | {"version"} == FLOORS[0] | FLOORS[1]


def test_rules_look_at_all_files() -> None:
    assert {
        "statepool/errors.py",
        "statepool/model/names.py",
        "statepool/transports/base.py",
    } <= set(PACKAGE)
    assert {"tests/unit/test_house.py", "tests/conftest.py"} <= set(CODE)


# -- importing -------------------------------------------------------------------------------------


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", [path for path in PACKAGE if not path.endswith("__main__.py")])
def test_public_names_exist(path: str) -> None:
    module = importlib.import_module(module_name(path))
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names)), f"{path} lists a name twice in __all__"
    assert [name for name in names if not hasattr(module, name)] == []


def loaded_by(code: str) -> set[str]:
    """:returns: the modules that an interpreter of its own has loaded after ``code``"""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"]
    return set(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    "library", ["paramiko", "qemu.qmp", "click", "rich", "asyncio", "msgspec", "flask", "peewee"]
)
def test_importing_the_library_is_light(library: str) -> None:
    assert library in loaded_by(f"import {library}")
    assert library not in loaded_by("import statepool")


@pytest.mark.parametrize(
    "library", ["paramiko", "qemu.qmp", "rich", "asyncio", "msgspec", "flask", "peewee"]
)
def test_the_command_line_loads_what_it_needs(library: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "statepool", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    loaded = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "statepool.cli.main" in loaded
    assert library not in loaded
