"""What this host and its pools have and lack."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence

from statepool.beneath import Beneath, Tree
from statepool.cache.cache import KINDS, Cache
from statepool.errors import AccessDenied, BadRecord, NoSpace, StatePoolError
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Finding, Level
from statepool.pools import layout
from statepool.pools.json_files import ACCOUNTS, is_private, names_in, read_json
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker
from statepool.qcow2.overlay import matches_installed
from statepool.qcow2.tool import QemuImg
from statepool.transports.copying import can_share_blocks
from statepool.transports.local import LocalTransport

QEMU = "qemu-system-x86_64"
"""The program that runs machines, unless a description names another one."""

CLOCK_TOLERANCE = 5.0
"""
The difference of clocks, in seconds, that is not reported; servers give times in whole seconds.
"""

_TRIAL = 4096
"""
Size in bytes of a trial file that shows whether files can be made: large enough to need a block
where none may be left.
"""


def survey_host(cache: Cache, tool: QemuImg) -> list[Finding]:
    """:returns: what was found on this host and in its cache"""
    return [*_tools(tool), *_cache(cache)]


def _tools(tool: QemuImg) -> Iterator[Finding]:
    try:
        yield Finding(Level.OK, "this host", f"qemu-img {tool.version()}")
        if not matches_installed(tool):
            yield Finding(
                Level.NOTE,
                "this host",
                "this qemu-img writes empty overlays otherwise than we do; both work",
            )
    except StatePoolError as error:
        yield Finding(Level.ERROR, "this host", error.message, error.hint)
    if shutil.which(QEMU) is None:
        what = (
            f"{QEMU} is not installed: states can be kept, but no machine can be run from them here"
        )
        yield Finding(Level.NOTE, "this host", what, "install qemu-system-x86")
    elif shutil.which("setpriv") is None:
        yield Finding(
            Level.NOTE,
            "this host",
            "setpriv is not installed: no machine and no builder can be started here",
            "install util-linux",
        )


def survey_copies(cache: Cache, sources: Sequence[Pool]) -> Iterator[Finding]:
    """
    :returns: the states of which the cache has the only copy, as far as these sources answer: a
        user who deletes the cache, because it is only a cache, loses them
    """
    try:
        if not cache.pool.is_managed:
            return
        own = {
            (manifest.id, manifest.digest)
            for manifest in _states(cache.pool)
            if manifest.digest is not None
        }
        first = next((str(pool) for pool in sources if pool.is_managed), None)
        there = {
            (manifest.id, one)
            for pool in sources
            for manifest in _states(pool)
            for one in (manifest.digest, manifest.origin)
        }
    except StatePoolError:
        return  # problems of a pool are reported by its own survey
    lost = sorted(
        str(state) for state in {state for state, digest in own if (state, digest) not in there}
    )
    is_passing = ".cache" in cache.root.parts
    if lost:
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        cure = (
            f"statepool sync {cache.pool.location} {first}"
            if first is not None
            else "make a pool elsewhere, and sync them to it"
        )
        risk = ", and what is in this directory may be deleted at any time" if is_passing else ""
        what = f"no source has {some}: the cache has the only copy{risk}"
        yield Finding(Level.WARNING if is_passing else Level.NOTE, str(cache.pool), what, cure)


def _states(pool: Pool) -> Iterator[Manifest]:
    for fold in pool.folds(pool.logged_machines()).values():
        yield from fold.states.values()


def _cache(cache: Cache) -> Iterator[Finding]:
    where = str(cache.pool)
    if not os.path.lexists(cache.root):
        yield from _cache_to_be(cache)
        return
    if not cache.root.is_dir():
        yield Finding(
            Level.ERROR, where, f"{cache.root} is not a directory", "choose another with --cache"
        )
        return
    if (shut := _shut(cache.tree, os.W_OK)) is not None:
        what = "the cache cannot be written" + (f": {shut}" if shut else "")
        yield Finding(
            Level.ERROR, where, what, "change its permissions, or choose another with --cache"
        )
        return
    found = survey_pool(cache.pool)
    if not any(finding.level is Level.ERROR for finding in found):
        sharing = can_share_blocks(cache.root)
        yield Finding(
            Level.OK,
            where,
            (
                "the file system shares blocks: copies within it are free"
                if sharing
                else "the file system cannot share blocks: copies take room"
            ),
        )
        yield from _links(where, cache.pool)
        yield from _other_accounts(cache)
    yield from _room(cache)
    yield from found


def _cache_to_be(cache: Cache) -> Iterator[Finding]:
    """
    Check whether the first command can make the cache. The trial is made beside it, in a place
    where no program looks for files.
    """
    where, above = (
        str(cache.pool),
        next(place for place in cache.root.parents if os.path.lexists(place)),
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".statepool-", dir=above) as place:
            trial = Pool(LocalTransport(Location("file", place)))
            trial.create()
            found = [*_links(where, trial)]
    except StatePoolError as error:
        yield Finding(Level.ERROR, where, f"the cache cannot be made: {error.message}", error.hint)
    except OSError as error:
        yield Finding(
            Level.ERROR,
            where,
            f"the cache cannot be made: {above}: {error.strerror}",
            "choose another with --cache",
        )
    else:
        yield from found or [
            Finding(
                Level.NOTE,
                where,
                "the cache is not there yet",
                "it is made by the first get or set",
            )
        ]


def _links(where: str, pool: Pool) -> Iterator[Finding]:
    """Check whether a cache can have symbolic links, which QEMU needs."""
    path = f"{layout.INCOMING}/{pool.nonce()}-link"
    try:
        pool.transport.symlink("../data/none", path)
        pool.transport.remove(path)
    except StatePoolError as error:
        yield Finding(Level.ERROR, where, error.message, error.hint)


def _room(cache: Cache) -> Iterator[Finding]:
    there = os.statvfs(cache.root)
    free, most, wanted = (
        there.f_bavail * there.f_frsize,
        there.f_blocks * there.f_frsize,
        cache.settings.min_free,
    )
    if free < wanted:
        what = (
            f"{free} of {most} bytes are free, less than min-free, {wanted}: nothing can be fetched"
            " unless states can be evicted for it"
        )
        yield Finding(
            Level.WARNING if wanted < most else Level.ERROR,
            str(cache.pool),
            what,
            "remove states that nobody needs, or lower min-free",
        )


def _other_accounts(cache: Cache) -> Iterator[Finding]:
    """Report what other accounts left in a cache that they share: only they can end it."""
    where = str(cache.pool)
    own = cache.file(f"{ACCOUNTS}/{os.geteuid()}")
    status = own.stat()
    if status is not None and not is_private(status):
        cure = (
            "nothing is remembered for this account: remove it, and look who may write to"
            f" {cache.root}"
        )
        yield Finding(Level.WARNING, where, f"{own} is not this account's own", cure)
    for name in names_in(cache.tree, layout.INCOMING):
        status = cache.file(f"{layout.INCOMING}/{name}").stat()
        if (
            name.endswith(".json")
            and status is not None
            and _is_left_behind(cache, name)
            and cache.marker(name.removesuffix(".json")) is None
        ):
            cure = (
                "it is ended by the next command of that account, if that wrote it; otherwise"
                " remove the file and those beside it"
            )
            yield Finding(
                Level.WARNING,
                where,
                f"{layout.INCOMING}/{name} is an unfinished set or get of the account"
                f" {status.st_uid}",
                cure,
            )


def _is_left_behind(cache: Cache, name: str) -> bool:
    try:
        marker = Marker.from_bytes(
            name, json.dumps(read_json(cache.tree, f"{layout.INCOMING}/{name}")[0]).encode(), name
        )
    except (FileNotFoundError, ValueError, BadRecord):
        return False
    return bool(marker.facts) and marker.writer.is_dead


def survey_pool(pool: Pool) -> list[Finding]:
    """:returns: what was found in a pool"""
    try:
        return list(_pool(pool))
    except StatePoolError as error:
        return [Finding(Level.ERROR, str(pool), error.message, error.hint)]


def _pool(pool: Pool) -> Iterator[Finding]:
    where = str(pool)
    pool.require()
    yield from pool.transport.survey()
    yield from _trial(pool)
    free = pool.transport.free_space()
    if free is not None:
        yield Finding(Level.OK, where, f"{free} bytes are free")
    if not pool.transport.capabilities.symlinks:
        yield Finding(Level.NOTE, where, "no symbolic links here: the pool goes without a view")
    if not pool.is_managed:
        yield Finding(
            Level.NOTE,
            where,
            "a pool of another tool: it can be read",
            f"to write to it: statepool init {pool.location}",
        )
    for machine in pool.machines():
        yield from _machine(pool, machine)
    for file in pool.view.misnamed():
        yield Finding(
            Level.NOTE,
            where,
            f"a file of {file.object} is no state: {file.error.message}",
            "give it another name, if it should be one",
        )
    here = pool.transport.beneath("")
    if here is not None:
        yield from _rights(where, here.tree)
        yield from _permissions(where, here.tree)


def _trial(pool: Pool) -> Iterator[Finding]:
    """
    Check whether a file can be made in a pool, by making one. Its time also shows the clock of
    another host, which is compared only here.
    """
    if not pool.is_managed:
        return
    where, path = str(pool), f"{layout.INCOMING}/{pool.nonce()}-trial"
    before = time.time()
    try:
        pool.transport.create(path, bytes(_TRIAL), flush=False)
    except AccessDenied:
        if not pool.transport.capabilities.local:  # for a local pool the kernel is asked
            yield Finding(
                Level.NOTE,
                where,
                "this account cannot write there: states can only be fetched",
                "give it write permission, if it should",
            )
        return
    except NoSpace as error:
        yield Finding(Level.ERROR, where, f"nothing more fits there: {error.message}", error.hint)
        return
    except StatePoolError as error:
        yield Finding(Level.ERROR, where, error.message, error.hint)
        return
    found = pool.transport.stat(path)
    after = time.time()
    pool.transport.remove(path)
    if found is None or pool.transport.capabilities.local:
        return
    there = found.mtime_ns / 1e9
    ahead = there - after if there > after else there - before
    if abs(ahead) > CLOCK_TOLERANCE:
        what = (
            f"its clock is about {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'}"
            " ours"
        )
        cure = (
            "nothing here depends on it, but the times in show and log do; set it, for example"
            " by NTP"
        )
        yield Finding(Level.WARNING, where, what, cure)


def _machine(pool: Pool, machine: str) -> Iterator[Finding]:
    try:
        fold = pool.fold(machine)
        unmanaged = pool.unmanaged(machine)
    except StatePoolError as error:
        yield Finding(Level.ERROR, str(pool), error.message, error.hint)
        return
    if unmanaged and pool.is_managed:
        yield Finding(
            Level.NOTE,
            str(pool),
            f"{len(unmanaged)} states of {machine} are unmanaged",
            f"statepool adopt {pool.location}",
        )
    for digest in sorted(fold.digests):
        # otherwise it was removed meanwhile
        if not pool.has_bytes(digest) and digest in pool.fold(machine).digests:
            names = ", ".join(
                str(manifest.id) for manifest in fold.manifests if manifest.digest == digest
            )
            yield Finding(
                Level.ERROR,
                str(pool),
                f"the bytes of {names} are gone",
                "get or sync it from a pool that has it; else unset it, and set it again",
            )


def _rights(where: str, tree: Tree) -> Iterator[Finding]:
    """Report what this account can do in a pool of this host, according to the kernel."""
    if (shut := _shut(tree, os.R_OK | os.X_OK)) is not None:
        yield Finding(
            Level.ERROR,
            where,
            f"this account may not look into {shut or 'it'}",
            "give it read permission",
        )
    elif (shut := _shut(tree, os.W_OK)) is not None:
        what = f"this account cannot write to {shut or 'it'}: states can only be fetched from here"
        yield Finding(Level.NOTE, where, what, "give it write permission, if it should")


def _shut(tree: Tree, mode: int) -> str | None:
    """
    :returns: a directory of a pool in which this account lacks this kind of access, as for
        :func:`os.access`
    """
    for path in ("", layout.OURS, layout.LOG, layout.DATA, layout.INCOMING, layout.LOCKS):
        try:
            with tree.open(path, os.O_PATH | os.O_DIRECTORY) as directory:
                if not os.access(".", mode, dir_fd=directory, effective_ids=True):
                    return path
        except FileNotFoundError:
            continue
        except PermissionError:
            return path
    return None


def _permissions(where: str, tree: Tree) -> Iterator[Finding]:
    """
    Check that every member of a group that shares a pool can write everywhere, also in directories
    of other members.
    """
    mode = tree.stat("").st_mode
    if not mode & stat.S_IWGRP:
        return
    if not mode & stat.S_ISGID:
        yield Finding(
            Level.WARNING,
            where,
            "the directory is writable for its group, but not setgid",
            f"chmod g+s {shlex.quote(str(tree))}",
        )
    yield from _closed_to_group(where, tree, layout.OURS)


_OF_ONE_ACCOUNT = {f"{layout.OURS}/{kind}" for kind in KINDS} | {ACCOUNTS}
"""
Directories of a cache to which not every member of the group needs to write: each member has its
own.
"""


def _closed_to_group(where: str, tree: Tree, path: str) -> Iterator[Finding]:
    if path in _OF_ONE_ACCOUNT:
        return
    if not tree.stat(path).st_mode & stat.S_IWGRP:
        cure = f"find {shlex.quote(str(Beneath(tree, path)))} -type d -exec chmod g+ws {{}} +"
        yield Finding(
            Level.WARNING, where, f"{path} is not writable for the group of the pool", cure
        )
        return  # the remedy covers everything below
    for name in names_in(tree, path):
        if stat.S_ISDIR(tree.stat(f"{path}/{name}").st_mode):
            yield from _closed_to_group(where, tree, f"{path}/{name}")
