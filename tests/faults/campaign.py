"""
Anything at all, done to a lab by processes that are stopped and killed; and what must be true
whatever became of them.

``campaign.py work CACHE``, in the lab's directory: a nursery. It answers each line, which is a JSON
list: ``["begin", SEED, SLOT, CALL]`` with the id of a process that works from now on, forked, or
under strace(1) which kills it at the ``CALL``; ``["signal", PID, NUMBER]``, and waits where that
was SIGKILL; ``["gc"]``. What the processes are about to do, and what they were told is done, is in
``said`` in their order.

``campaign.py see IMAGE``: what a guest sees in it, as one word.

``campaign.py check``: what is not as it must be, a line each. ``campaign.py check clean`` also says
what is left over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import statepool
from statepool.cache.cache import Cache
from statepool.errors import StatePoolError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, StateId
from statepool.pools import layout
from statepool.pools.pool import Pool

# so that nothing is imported late: a fork begins with all of it
from statepool.testing import faults  # noqa: F401
from statepool.transports.copying import hash_file
from statepool.transports.registry import open_transport

CACHES = ("here", "there")
IMAGES = ("a", "b")
KEPT, ROUGH, MACHINE, FOREIGN = "vm1/disk", "vm2/disk", "vm3", "vm4/disk"
"""
Objects: one of which nothing is removed with what stands on it, one of which anything is, a
machine, and one that another tool has put there.
"""

NAMES = ("one", "two", "three")
SETTINGS = statepool.Settings(lock_timeout=3, fresh=0)
QUIET = (statepool.NotFound, statepool.RefusedError, statepool.LockTimeout, statepool.BuildFailed)
"""What may well be said to one of many who do anything at all."""


def qemu(*command: str | Path, good: Sequence[int] = (0,)) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        # what strace was to do to this process, it has done to a child of it
        os.kill(os.getpid(), signal.SIGKILL)
    if done.returncode not in good:
        raise AssertionError(
            f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr}"
        )


def seen_in(image: Path) -> str:
    """:returns: what a guest sees in an image, as one word"""
    raw = Path(f"raw-{os.getpid()}")
    try:
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        return Digest.of(raw.read_bytes()).hex[:16]
    finally:
        raw.unlink(missing_ok=True)


def say(*words: Any) -> None:
    descriptor = os.open("said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(words).encode() + b"\n")
    os.close(descriptor)


class Worker:
    """
    Does anything at all.

    :param cache: the name of its cache
    :param place: the directory of its working images
    """

    def __init__(self, seed: int, cache: str, place: Path) -> None:
        self._seed, self._chance, self._cache, self._place = seed, random.Random(seed), cache, place
        self._count = 0

    def work(self) -> None:
        deeds: list[Callable[[], None]] = (
            [self._set] * 6
            + [self._get] * 5
            + [self._unset] * 2
            + [self._push, self._pop, self._squash, self._gc]
        )
        deeds += [
            self._sync,
            self._verify,
            self._ensure,
            self._machine_set,
            self._machine_get,
            self._machine_unset,
            self._adopt,
            self._write,
        ]
        while True:
            self._count += 1
            try:
                self._chance.choice(deeds)()
            except QUIET:
                continue

    def _pool(self) -> statepool.StatePool:
        return statepool.StatePool(self._cache, ["pool"], settings=SETTINGS)

    def _name(self) -> str:
        return self._chance.choice((*NAMES, f"s{self._seed}-{self._count}"))

    def _subject(self) -> str:
        return self._chance.choice((KEPT, KEPT, ROUGH))

    def _changing(
        self, what: str, *keys: tuple[str, str], seen: Sequence[str] = (), certain: bool = True
    ) -> Callable[..., None]:
        """Say that states are about to be changed. :returns: to be told what is promised then"""
        number = f"{self._seed}-{self._count}-{self._chance.random()}"
        say("begin", number, what, keys, seen)

        def done(digests: Sequence[str] = ()) -> None:
            if certain:
                say("done", number, digests)

        return done

    def _image(self, subject: str) -> Path:
        """:returns: a working image of ours; a new one if there is none"""
        image = self._place / f"{subject.replace('/', '-')}.qcow2"
        if not image.exists():
            shutil.copy("base.qcow2", f"{image}.new")
            os.replace(f"{image}.new", image)
            say("image", str(image), seen_in(image))
        return image

    def _write(self, subject: str = "") -> tuple[Path, str]:
        """Write something to a working image, as a guest would. :returns: it, and what is in it"""
        image = self._image(subject or self._subject())
        say("image", str(image), None)
        offset, value = self._chance.randrange(16) << 16, self._chance.randrange(1, 256)
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {value} {offset} 65536", image)
        seen = seen_in(image)
        say("image", str(image), seen)
        return image, seen

    def _set(self) -> None:
        subject, state = self._subject(), self._name()
        image, seen = self._write(subject)
        done = self._changing("set", (subject, state), seen=[seen])
        stored = (
            self._pool()
            .image(subject)
            .set(state, source=image, replace=self._chance.random() < 0.5)
        )
        done([stored.digest] if stored.complete else [])

    def _squash(self) -> None:
        subject, state = self._subject(), self._chance.choice(NAMES)
        self._get_over(subject, state)
        image, seen = self._write(subject)
        done = self._changing("squash", (subject, state), seen=[seen])
        stored = self._pool().image(subject).set(state, source=image, squash=True)
        done([stored.digest] if stored.complete else [])

    def _get(self) -> None:
        subject, state = self._subject(), self._chance.choice(NAMES)
        if self._chance.random() < 0.3:
            self._pool().image(subject).get(state)
        else:
            self._get_over(subject, state)

    def _get_over(self, subject: str, state: str) -> None:
        image = self._image(subject)
        say("image", str(image), "or", subject, state)
        self._pool().image(subject).get(state, to=image, overwrite=True)
        say("image", str(image), "got", subject, state)

    def _unset(self) -> None:
        subject, state = self._subject(), self._chance.choice(NAMES)
        cascade = subject == ROUGH
        done = self._changing("unset", (subject, "*" if cascade else state))
        self._pool().image(subject).unset(
            state, cascade=cascade, scope=self._chance.choice(("all", "own"))
        )
        done()

    def _item(self, subject: str, state: str, image: Path) -> Any:
        from statepool.policy import Item

        return Item(statepool.Image(*subject.split("/")), state, {"disk": image})

    def _push(self) -> None:
        state = self._chance.choice(NAMES)
        image, seen = self._write(ROUGH)
        done = self._changing("push", (ROUGH, state), seen=[seen])
        self._pool().policy().push(
            [self._item(ROUGH, state, image)], mode=self._chance.choice(("af", "rf", "ff"))
        )
        done()

    def _pop(self) -> None:
        from statepool.backends.base import Options

        state, image = self._chance.choice(NAMES), self._image(ROUGH)
        done = self._changing("pop", (ROUGH, state))
        say("image", str(image), "or", ROUGH, state)
        self._pool().policy().pop(
            [self._item(ROUGH, state, image)], options=Options(overwrite=True)
        )
        done()

    def _gc(self) -> None:
        self._pool().gc(everywhere=self._chance.random() < 0.5)

    def _sync(self) -> None:
        subject = self._subject()
        both = [self._cache, "pool"]
        self._chance.shuffle(both)
        delete = subject == ROUGH and self._chance.random() < 0.3
        done = self._changing("sync", *([(subject, "*")] if delete else []))
        statepool.sync(*both, subject, delete=delete, settings=SETTINGS)
        done()

    def _verify(self) -> None:
        wrong = [
            checked
            for checked in self._pool().verify(self._subject())
            if checked.problem is not None
        ]
        assert all(
            "not there" in str(checked.problem) or "gone" in str(checked.problem)
            for checked in wrong
        ), wrong

    def _ensure(self) -> None:
        subject = self._subject()

        def build(image: str | os.PathLike[str]) -> None:
            qemu(
                "qemu-io",
                "-f",
                "qcow2",
                "-c",
                f"write -P {self._chance.randrange(256)} 0 65536",
                Path(image),
            )
            say("built", subject, seen_in(Path(image)))

        self._pool().image(subject).ensure(
            "built",
            build,
            parent=self._chance.choice(NAMES),
            key=str(self._chance.randrange(3)),
            timeout=60,
        )

    def _machine(self) -> statepool.MachineHandle:
        return self._pool().machine(MACHINE, IMAGES)

    def _members(self, state: str) -> list[tuple[str, str]]:
        return [(f"{MACHINE}/{image}", state) for image in IMAGES]

    def _machine_set(self) -> None:
        state = self._name()
        written = [self._write(f"{MACHINE}/{image}") for image in IMAGES]
        done = self._changing("set", *self._members(state), seen=[seen for _, seen in written])
        working = {image: path for image, (path, _) in zip(IMAGES, written, strict=True)}
        stored = self._machine().set(state, source=working, replace=self._chance.random() < 0.5)
        done(["whatever" for _ in IMAGES] if stored.complete else [])

    def _machine_get(self) -> None:
        state = self._chance.choice(NAMES)
        working = {image: self._image(f"{MACHINE}/{image}") for image in IMAGES}
        for image, path in working.items():
            say("image", str(path), "or", f"{MACHINE}/{image}", state)
        self._machine().get(state, to=working, overwrite=True)
        for image, path in working.items():
            say("image", str(path), "got", f"{MACHINE}/{image}", state)

    def _machine_unset(self) -> None:
        state = self._chance.choice(NAMES)
        done = self._changing("unset", *self._members(state))
        self._machine().unset(state, scope=self._chance.choice(("all", "own")))
        done()

    def _adopt(self) -> None:
        state = f"s{self._seed}-{self._count}"
        place = Path("pool", FOREIGN)
        place.mkdir(parents=True, exist_ok=True)
        foreign = Path(f"foreign-{self._seed}.qcow2")
        shutil.copy("base.qcow2", foreign)
        seen = seen_in(foreign)
        done = self._changing("adopt", (FOREIGN, state), seen=[seen])
        os.replace(foreign, place / f"{state}.qcow2")
        adopted = {one.state: one for one in statepool.adopt("pool", settings=SETTINGS)}
        done(["whatever"] if state in adopted else [])


# -- a nursery -------------------------------------------------------------------------------------


def run(seed: int, cache: str, slot: str) -> None:
    place = Path(f"work-{slot}")
    place.mkdir(exist_ok=True)
    try:
        Worker(seed, cache, place).work()
    except BaseException:  # noqa: BLE001  whatever it is, the test must hear of it
        Path(f"failed-{seed}").write_text(traceback.format_exc())
    os._exit(1)


_TRACED: list[subprocess.Popen[bytes]] = []
"""Kept, since those that are forgotten are waited for by the next one."""


def begin(seed: int, slot: str, call: str | None, cache: str) -> int:
    if call is not None:
        name, _, _ = call.partition(":")
        command = [
            "strace",
            "-f",
            "-qq",
            "-o",
            os.devnull,
            "-e",
            f"trace=?{name}",
            "-e",
            f"inject={call}",
        ]
        command += [sys.executable, "-B", __file__, "run", str(seed), cache, slot]
        _TRACED.append(
            subprocess.Popen(
                command,
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return _TRACED[-1].pid
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        run(seed, cache, slot)
    os.setpgid(pid, pid)  # by both, so that it is one in any case when we are asked to signal it
    return pid


def nursery(cache: str) -> None:
    for line in sys.stdin:
        what, *words = json.loads(line)
        answer: Any = None
        if what == "begin":
            answer = begin(*words, cache)
        elif what == "signal":
            pid, number = words
            os.killpg(pid, number)
            if number == signal.SIGKILL:
                os.waitpid(pid, 0)
        else:
            answer = collect(cache)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def collect(cache: str) -> str | None:
    """
    Put in order what others have left; in a process of its own, since it is to know nothing of
    before.
    """
    code = f"import statepool; statepool.StatePool({cache!r}, ['pool']).gc(everywhere=True)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return None if done.returncode == 0 else done.stderr


# -- what must be true -----------------------------------------------------------------------------


def check(*, clean: bool) -> Iterator[str]:
    yield from (f"{path} says: {path.read_text()}" for path in Path().glob("failed-*"))
    for name in ("pool", *CACHES):
        root = Path(name)
        if not (root / layout.POOL_FILE).exists():
            continue
        pool = Pool(open_transport(Location("file", str(root.absolute()))))
        yield from torn(root)
        yield from dangling(root, pool)
        if clean:
            yield from left_over(root, pool, name)
    yield from History().wrong(clean=clean)
    if clean:
        yield from (f"{path} is left over" for path in Path().rglob(".statepool-*"))
        for cache in CACHES:
            state_pool = statepool.StatePool(cache, ["pool"])
            yield from (
                f"verify says {checked}"
                for checked in state_pool.verify()
                if checked.problem is not None
            )


def torn(root: Path) -> Iterator[str]:
    for path in (root / layout.DATA).glob("*[0-9a-f]"):
        if digest_of(path) != Digest.from_file_name(path.name):
            yield f"{path} is torn"


def digest_of(path: Path) -> Digest:
    with open(path, "rb") as file:
        return hash_file(file.fileno(), os.fstat(file.fileno()).st_size)


def dangling(root: Path, pool: Pool) -> Iterator[str]:
    there = {Digest.from_file_name(path.name) for path in (root / layout.DATA).glob("*[0-9a-f]")}
    there |= {layout.trashed(path.name) for path in (root / layout.TRASH).iterdir()}
    for machine in pool.machines():
        fold = pool.fold(machine)
        for manifest in fold.manifests:
            yield from (
                f"{root}: the bytes of {link.id} are gone"
                for link in fold.chain(manifest)
                if link.digest and link.digest not in there
            )
            if manifest.parent is not None and fold.parent_of(manifest) is None:
                yield f"{root}: {manifest.id} has lost its parent"


def left_over(root: Path, pool: Pool, name: str) -> Iterator[str]:
    left = [
        path
        for directory in (layout.INCOMING, layout.TRASH)
        for path in (root / directory).iterdir()
    ]
    left += [
        path
        for pattern in ("chains/.gone-*", "**/*tmp*")
        for path in root.glob(f"{layout.OURS}/{pattern}")
    ]
    yield from (f"{path} is left over: {path.read_text(errors='replace')[:300]}" for path in left)
    held = (
        Cache.open(pool, statepool.Settings()).chains.gc_roots()
        if name != "pool"
        else frozenset[Digest]()
    )
    there = {Digest.from_file_name(path.name) for path in (root / layout.DATA).glob("*[0-9a-f]")}
    needed = pool.needed() | held
    if there != needed:
        yield (
            f"{root}: needless are {sorted(map(str, there - needed))}, missing are"
            f" {sorted(map(str, needed - there))}"
        )


class History:
    """What was said, and what follows from it."""

    def __init__(self) -> None:
        said = (
            [json.loads(line) for line in Path("said").read_text().splitlines()]
            if Path("said").exists()
            else []
        )
        self._begun: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._keys: dict[str, list[tuple[str, str]]] = {}
        self._promised: list[tuple[str, list[str]]] = []
        self.seen: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.images: dict[str, list[tuple[str, ...]] | None] = {}
        for at, (what, *words) in enumerate(said):
            if what == "begin":
                number, _, keys, seen = words
                self._begun[number], self._keys[number] = (
                    at,
                    [(subject, state) for subject, state in keys],
                )
                for key, content in zip(self._keys[number], seen, strict=False):
                    self.seen[key].add(content)
            elif what == "done":
                self._ended[words[0]] = at
                self._promised.append((words[0], words[1]))
            elif what == "built":
                self.seen[words[0], "built"].add(words[1])
            else:
                self._take_image(*words)

    def _take_image(self, image: str, word: str | None, *more: str) -> None:
        before = self.images.get(image)
        if word is None:
            self.images[image] = None
        elif word == "or":
            self.images[image] = [*before, more] if before is not None else None
        elif word == "got":
            self.images[image] = [more]
        else:
            self.images[image] = [(word,)]

    def wrong(self, *, clean: bool) -> Iterator[str]:
        pool = Pool(open_transport(Location("file", str(Path("pool").absolute()))))
        for (subject, state), digest in self._certain():
            found = pool.fold(subject.partition("/")[0]).states.get(
                StateId(subject, state, Kind.IMAGE)
            )
            if found is None or digest not in ("whatever", str(found.digest)):
                yield (
                    f"{subject} {state} was set for certain as {digest}, and is"
                    f" {found and found.digest}: {self._about(subject, state)}"
                )
        for image in self.images:
            if not Path(image).is_file():
                yield f"{image} is gone"
        if clean:
            yield from self._unlike(pool)

    def _certain(self) -> Iterator[tuple[tuple[str, str], str]]:
        """
        What was promised, and has not been under the hands of another one at the same time, or
        afterwards.
        """
        by_key: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for number, keys in self._keys.items():
            for key in keys:
                by_key[key].append(number)
        for number, digests in self._promised:
            for key, digest in zip(self._keys[number], digests, strict=False):
                others = [other for other in by_key[key] + by_key[key[0], "*"] if other != number]
                if all(self._ended.get(other, 1 << 62) < self._begun[number] for other in others):
                    yield key, digest

    def _about(self, subject: str, state: str) -> list[Any]:
        return [
            (self._begun[number], number, keys)
            for number, keys in self._keys.items()
            if {(subject, state), (subject, "*")} & set(keys)
        ]

    def _unlike(self, pool: Pool) -> Iterator[str]:
        """States and working images in which a guest sees what nobody has put there."""
        for machine in pool.machines():
            for manifest in pool.fold(machine).states.values():
                if manifest.id.kind is not Kind.IMAGE:
                    continue
                view = Path("pool", manifest.object, f"{manifest.state}.qcow2")
                if (content := seen_in(view)) not in self._put(manifest.object, manifest.state):
                    yield (
                        f"in {view} is {content}, not one of"
                        f" {self._put(manifest.object, manifest.state)}"
                    )
        for image, choices in self.images.items():
            # 3: a guest was killed while it wrote, and a cluster is unused
            qemu("qemu-img", "check", "-q", "-f", "qcow2", image, good=(0, 3))
            good = {
                content
                for choice in choices or ()
                for content in (choice if len(choice) == 1 else self._put(*choice))
            }
            if choices is not None and seen_in(Path(image)) not in good:
                yield f"in {image} is {seen_in(Path(image))}, not one of {good} ({choices})"

    def _put(self, subject: str, state: str) -> set[str]:
        return self.seen[subject, state.partition("--")[0]]


def main(what: str, *words: str) -> int:
    if what == "work":
        nursery(*words)
    elif what == "see":
        sys.stdout.write(seen_in(Path(*words)))
    elif what == "run":
        run(int(words[0]), *words[1:])
    else:
        wrong = False
        for line in check(clean="clean" in words):  # each at once: the next look may come to grief
            wrong = True
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        return wrong
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except StatePoolError:
        traceback.print_exc()
        sys.exit(2)
