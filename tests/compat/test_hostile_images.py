"""
Images that must not be opened by anything but our own header reader: refused by the name of a
check, wherever they come from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import StatePoolError, UnsafeImage
from statepool.model.manifest import Parent, StateId
from statepool.pools import layout
from statepool.qcow2.header import read_header_file
from statepool.testing.trees import photograph
from tests.support.images import CHILD, HOSTILE, hostile_images

# What a working image may be differs from what a state may be: who sets one looks where an absolute
# backing name leads.
LEADS_OUTSIDE = {
    "backing-absolute": "backing-outside-cache",
    "backing-absolute-image": "backing-outside-cache",
}
BY_NAME = {name for name in HOSTILE if name.startswith("backing-")}

FILES = ["fifo", "directory", "link", "link-outside", "link-dead", "link-device"]
CHAINS = [
    "loop-self",
    "loop-a",
    "loop-b",
    "into-loop",
    "orphan",
    "child-of-raw",
    "child-of-dirty",
    "child-of-fifo",
    "child-of-link",
    "chain-0",
]


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be run."""
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of another tool in which nothing is as it should be."""
    return make_gallery(tmp_path_factory.mktemp("gallery"))


def make_gallery(root: Path) -> Path:
    (root / "vm1/disk").mkdir(parents=True)
    assert sorted(image.name for image in hostile_images(root / "vm1/disk")) == sorted(
        [*HOSTILE, *FILES, *CHAINS]
    )
    return root


def hostile_check(name: str) -> str:
    if name in FILES:
        return "regular-file"
    special = {
        "orphan": "missing-parent",
        "child-of-raw": "magic",
        "child-of-dirty": "dirty",
        "chain-0": "depth",
    }
    special |= {"child-of-fifo": "regular-file", "child-of-link": "regular-file"}
    return HOSTILE[name][1] if name in HOSTILE else special.get(name, "loop")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [*HOSTILE, *FILES, "loop-self", "orphan", "child-of-raw", "chain-0"]
)
def test_a_hostile_working_image(empty: Any, gallery: Path, no_tools: None, name: str) -> None:
    source = gallery / f"vm1/disk/{name}.qcow2"
    before = photograph(empty.root, gallery)
    with pytest.raises(UnsafeImage) as caught:
        statepool.StatePool(empty.cache, [empty.pool]).image("vm1/disk").set("new", source=source)
    assert photograph(empty.root, gallery) == before
    if name in BY_NAME or name in CHAINS:
        allowed = {
            hostile_check(name),
            "backing-relative",
            *([LEADS_OUTSIDE[name]] if name in LEADS_OUTSIDE else []),
        }
        assert caught.value.check in allowed
    elif name in HOSTILE and b"parent.qcow2" in HOSTILE[name][0]()[:512]:
        assert caught.value.check in {hostile_check(name), "backing-relative"}
    else:
        assert caught.value.check == hostile_check(name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*HOSTILE, *FILES, *CHAINS])
def test_a_hostile_file_in_a_pool_of_another_tool(
    empty: Any, gallery: Path, no_tools: None, name: str
) -> None:
    before = photograph(empty.root, gallery)
    disk = statepool.StatePool(empty.cache, [gallery]).image("vm1/disk")
    # The directory of an absolute backing name means nothing there, so that such an image is one
    # that stands on its sibling.
    if name == "backing-absolute-image":
        assert disk.get(name, dry_run=True).chain == (name, "parent")
    else:
        with pytest.raises(UnsafeImage) as caught:
            disk.get(name)
        check = {"backing-absolute": "backing-sibling"}.get(name, hostile_check(name))
        assert caught.value.check == check
        with pytest.raises(UnsafeImage):
            disk.check(name)
    assert photograph(empty.root, gallery) == before


def test_showing_a_pool_full_of_hostile_files(empty: Any, gallery: Path, no_tools: None) -> None:
    before = photograph(empty.root, gallery)
    shown = {
        listed.manifest.state: listed
        for listed in statepool.StatePool(empty.cache, [gallery]).show("vm1/disk")
    }
    for name in [*HOSTILE, *CHAINS]:
        if name != "backing-absolute-image":
            assert shown[name].problem, name
    assert not set(FILES) & set(shown)
    assert shown["parent"].problem is None
    assert shown["child"].problem is None
    assert photograph(empty.root, gallery) == before


def test_adopting_hostile_files(empty: Any, gallery: Path, no_tools: None, tmp_path: Path) -> None:
    pool = tmp_path / "gallery"
    shutil.copytree(gallery, pool, symlinks=True, copy_function=lambda *names: None)
    for path in (gallery / "vm1/disk").iterdir():
        copy = pool / "vm1/disk" / path.name
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, copy)
        elif path.is_fifo():
            os.mkfifo(copy)
    statepool.init(pool)
    kept = photograph(pool / "vm1")
    adopted = {adopted.state: adopted for adopted in statepool.adopt(pool, relocate=True)}
    good = {
        "parent",
        "child",
        "backing-absolute-image",
        *(f"chain-{number}" for number in range(300)),
    }
    for name in [*HOSTILE, *CHAINS]:
        if name not in good:
            assert adopted[name].problem, name
            assert adopted[name].digest is None
    assert adopted["child"].digest is not None
    for path, described in photograph(pool / "vm1").items():
        if Path(path).stem not in good:
            assert described == kept[path]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*HOSTILE, *FILES])
def test_a_hostile_image_that_a_record_vouches_for(
    empty: Any, gallery: Path, no_tools: None, name: str
) -> None:
    parent = empty.forge(empty.pool, "parent", (gallery / "vm1/disk/parent.qcow2").read_bytes())
    source = gallery / f"vm1/disk/{name}.qcow2"
    content = HOSTILE[name][0]() if name in HOSTILE else CHILD.build()
    backed = b"backing" in name.encode() or b"parent.qcow2" in content[:1024] or name not in HOSTILE
    digest = empty.forge(
        empty.pool, "hostile", content, parent=Parent("parent", parent) if backed else None
    )
    if name in FILES:
        (empty.pool / layout.data(digest)).unlink()
        if name == "fifo":
            os.mkfifo(empty.pool / layout.data(digest))
        elif name == "directory":
            (empty.pool / layout.data(digest)).mkdir()
        else:
            os.symlink(os.readlink(source), empty.pool / layout.data(digest))
    for place in (empty.pool, f"link://{empty.pool}"):
        cache = empty.root / f"cache-{'link' if str(place).startswith('link') else 'copy'}"
        disk = statepool.StatePool(cache, [place]).image("vm1/disk")
        disk.get("parent")
        before = photograph(empty.root)
        if name == "backing-absolute-image":
            # as in an adopted pool: the directory means nothing, and goes
            disk.get("hostile")
            assert (
                read_header_file(empty.data_file(cache, "hostile")).backing_name == b"parent.qcow2"
            )
            continue
        with pytest.raises(UnsafeImage) as caught:
            disk.get("hostile", to=empty.root / "work.qcow2")
        assert photograph(empty.root) == before
        expected = {"backing-absolute": {"backing-sibling"}}.get(name, {hostile_check(name)})
        assert caught.value.check in expected | ({"parent"} if not backed else set())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_not_passed_on(
    empty: Any, gallery: Path, no_tools: None, name: str
) -> None:
    """Pools that are only copied are read by others, and by other tools."""
    parent = empty.forge(empty.pool, "parent", (gallery / "vm1/disk/parent.qcow2").read_bytes())
    content = HOSTILE[name][0]()
    backed = b"backing" in name.encode() or b"parent.qcow2" in content[:1024]
    empty.forge(empty.pool, "hostile", content, parent=Parent("parent", parent) if backed else None)
    statepool.init(empty.root / "copy")
    states = {
        state.state: state for state in statepool.sync(empty.pool, empty.root / "copy").states
    }
    assert str(states["parent"].action) == "copied"
    if name == "backing-absolute-image":  # as in an adopted pool: the directory means nothing
        assert str(states["hostile"].action) == "copied"
        return
    assert str(states["hostile"].action) == "failed"
    assert not os.path.lexists(empty.root / "copy/vm1/disk/hostile.qcow2")
    assert len(list((empty.root / "copy" / layout.DATA).iterdir())) == 1


def test_bytes_that_are_there_for_another_reason_are_checked(
    empty: Any, gallery: Path, no_tools: None
) -> None:
    parent = empty.forge(empty.pool, "parent", (gallery / "vm1/disk/parent.qcow2").read_bytes())
    child = CHILD.build()
    good = empty.forge(empty.pool, "child", child, parent=Parent("parent", parent))
    statepool.init(empty.root / "copy")
    assert statepool.sync(empty.pool, empty.root / "copy").complete
    assert empty.forge(empty.pool, "alone", child) == good
    (alone,) = [
        state
        for state in statepool.sync(empty.pool, empty.root / "copy").states
        if state.state == "alone"
    ]
    assert (str(alone.action), "alone" in str(alone.error)) == ("failed", True)


TRACED = """
import os, sys
import statepool
from statepool.errors import StatePoolError
root, gallery = sys.argv[1:]
names = sorted(name.removesuffix(".qcow2") for name in os.listdir(gallery + "/vm1/disk"))
done = 0
for cache, source in ((root + "/cache", gallery), (root + "/cache", "link://" + gallery)):
    pool = statepool.StatePool(cache, [source])
    disk = pool.image("vm1/disk")
    pool.show()
    pool.verify()
    for name in names:
        file = f"{gallery}/vm1/disk/{name}.qcow2"
        for act in (lambda: disk.get(name), lambda: disk.set("new", source=file, dry_run=True)):
            try:
                act()
            except StatePoolError:
                done += 1
print(done)
"""


def test_nothing_outside_is_opened_or_run(empty: Any, tmp_path: Path) -> None:
    gallery = make_gallery(tmp_path / "gallery")
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (Debian: strace)")
    for path in (gallery / "vm1/disk").glob("chain-*"):
        path.unlink()  # each look at them reads hundreds of headers, which tracing makes slow
    trace = empty.root / "trace"
    watched = "trace=open,openat,openat2,execve,connect,socket"
    command = [
        "strace",
        "-f",
        "-qq",
        "-e",
        watched,
        "-o",
        trace,
        sys.executable,
        "-c",
        TRACED,
        empty.root,
        gallery,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2 * len(HOSTILE)
    traced = trace.read_text()
    assert str(gallery) in traced
    assert traced.count("execve(") == 1
    for forbidden in (
        "/etc/hostname",
        "/etc/shadow",
        "/dev/zero",
        "connect(",
        "AF_INET",
        "qemu-img",
        "secret/",
    ):
        assert forbidden not in traced, forbidden


def test_errors_survive_a_process_boundary(empty: Any) -> None:
    """What a worker of a test runner sends to its master."""
    import pickle

    with pytest.raises(StatePoolError) as caught:
        statepool.StatePool(empty.cache, [empty.pool]).image("vm1/disk").get("nothing")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.object, copy.state) == (
        type(caught.value),
        str(caught.value),
        "vm1/disk",
        "nothing",
    )
    assert StateId("vm1/disk", "nothing").state in str(copy)
