"""
``ssh://``: a pool on another host, by SFTP.

SFTP alone is enough. A durable and exclusive publication needs extensions that OpenSSH has (fsync,
hard links). If a server lacks one, a weaker substitute is used; :attr:`SSHTransport.capabilities`
and ``docs/design.rst`` describe the consequences. A shell is used if the account has one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial

from attrs import evolve

from statepool.errors import StatePoolError, TransportError
from statepool.model.digest import Digest, new_hasher
from statepool.model.location import Location
from statepool.model.outcomes import Finding
from statepool.model.settings import Settings
from statepool.transports.base import Capabilities, Moved, Transfer, Transport
from statepool.transports.copying import data_extents
from statepool.transports.failures import Subject, require_few_holes, wrong_length
from statepool.transports.flushing import STEP, FlushBehind
from statepool.transports.reading import Extent, are_in_order, within
from statepool.transports.retry import Retrying
from statepool.transports.ssh import batches
from statepool.transports.ssh.carrier import Endpoint
from statepool.transports.ssh.compressed import PackedDownload, PackedUpload, Packer, packer
from statepool.transports.ssh.connection import release
from statepool.transports.ssh.failures import is_lost
from statepool.transports.ssh.files import NEW, SSHFiles, granted
from statepool.transports.ssh.moving import MOST_EXTENTS, Download, Job, Upload, cut
from statepool.transports.ssh.packets import (
    FSYNC,
    Flag,
    Kind,
    attributes,
    attributes_in,
    extension,
    string,
)
from statepool.transports.ssh.sftp import Sftp
from statepool.transports.ssh.shell import shell_of
from statepool.transports.ssh.survey import survey
from statepool.transports.ssh.unheard import UnheardFlushes

_unheard = UnheardFlushes()
"""Shared by all transports: a retry may use another transport."""


class SSHTransport(SSHFiles):
    """
    The transport for files of another host.

    :param location: with a host
    :param settings: how to connect, and how long to wait
    """

    def __init__(self, location: Location, settings: Settings | None = None) -> None:
        super().__init__(location, settings)
        self._compress = (settings or Settings()).compress

    @classmethod
    def open(cls, location: Location, settings: Settings) -> Transport:
        """:returns: a transport that retries transient failures, as the settings say"""
        transport = cls(location, settings)
        return (
            Retrying(transport, retries=settings.retries, pause=settings.retry_pause)
            if settings.retries
            else transport
        )

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities; durable if the server can flush files and directories."""
        with self._at("look at", "") as sftp:
            server = self._look(sftp)
        return Capabilities(symlinks=server.has_links, durable=server.has(FSYNC), resumes=True)

    # -- bytes -------------------------------------------------------------------------------------

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """
        Fetch a file. Only the ``extents`` are requested: if the file has data elsewhere, the digest
        is not that of the file there.
        """
        return self._fetch(path, target, transfer)

    def fetch_part(self, path: str, target: int, transfer: Transfer, part: Extent) -> Moved:
        """Fetch a part of a file, as :meth:`fetch`."""
        return self._fetch(path, target, transfer, part)

    def _fetch(
        self, path: str, target: int, transfer: Transfer, part: Extent | None = None
    ) -> Moved:
        job = self._job(target, path, transfer, part)
        with self._at("read", path) as sftp:
            received = self._download(sftp, path, job, transfer.extents, keep=True)
        return Moved(Digest(transfer.algorithm, job.hasher.hexdigest()), "stream", received)

    def digest(self, path: str, transfer: Transfer) -> Digest:
        """
        Make the digest of a file. It is hashed on the far side if the account has a shell and the
        programs for it; otherwise the whole file is read from here.
        """
        with self._at("read", path) as sftp:
            self._require_file(sftp, path, transfer.size)
        found = shell_of(self._connection).digest(
            self._seen(path), transfer.size, transfer.algorithm, transfer.pieces
        )
        if found is not None:
            transfer.progress.advance(transfer.size)
            return found
        job = self._job(-1, path, evolve(transfer, done=0))
        with self._at("read", path) as sftp:
            self._download(sftp, path, job, (), keep=False)
        return Digest(transfer.algorithm, job.hasher.hexdigest())

    @property
    def far_algorithm(self) -> str | None:
        """The algorithm of a program there that hashes; None if the account has no shell for it."""
        return shell_of(self._connection).quick_algorithm

    def far_digests(self, files: Mapping[str, int]) -> list[Digest | None]:
        return shell_of(self._connection).digests(
            {self._seen(path): size for path, size in files.items()}
        )

    def _job(self, local: int, path: str, transfer: Transfer, part: Extent | None = None) -> Job:
        done = transfer.done if part is None else 0
        return Job(
            local,
            transfer.size,
            new_hasher(transfer.algorithm, pieces=transfer.pieces, done=done),
            transfer.progress,
            self._subject(path),
            done if part is None else part[0],
            part=part,
        )

    def _download(
        self, sftp: Sftp, path: str, job: Job, extents: tuple[tuple[int, int], ...], *, keep: bool
    ) -> int:
        full = self._full(path)
        self._require_file(sftp, path, job.size)
        if extents:
            require_few_holes(job.size - sum(length for _, length in extents), self._subject(path))
        whole = ((0, job.size),) if job.size else ()
        with self._opened(sftp, full, Flag.READ) as handle:
            wanted = extents if extents and are_in_order(extents) else whole
            if job.part is not None:
                wanted = tuple(within(wanted, job.begin, job.end))
            packer = self._packer(path, job) if keep else None
            arguments = sftp, handle, job, self._look(sftp).limits, wanted
            received = (
                PackedDownload(packer, *arguments) if packer else Download(*arguments, keep=keep)
            ).run()
            found = attributes_in(sftp.ask(Kind.FSTAT, string(handle)))
            if found.size != job.size:
                raise wrong_length(self._subject(path), job.size, found.size)
        return received

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """
        Store a file. Its data is where the local file system says, whatever ``extents`` says.

        If the connection breaks, or the user interrupts the transfer, the bytes that have arrived
        stay there, and the length of the file tells how many: there are no missing bytes before the
        end.
        """
        subject, size, done = self._subject(path), transfer.size, transfer.done
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise wrong_length(
                Subject(f"the local file for {subject.text}", subject.pool, path),
                size,
                found.st_size,
            )
        begun = done
        try:
            with self._at("write", path, needed=size) as sftp:
                begun = done if done and self._can_go_on(sftp, path) else 0
                job = self._job(source, path, evolve(transfer, done=begun))
                sent = self._upload(sftp, path, job)
        except BaseException as error:
            # After the channel was released, and after the free space was read: the file itself may
            # occupy the space that the disk there lacks.
            if not _can_be_resumed(error):
                self._discard(path)
            raise
        if os.fstat(source).st_size != size:
            self._discard(path)
            raise wrong_length(
                Subject(f"the local file for {subject.text}", subject.pool, path),
                size,
                os.fstat(source).st_size,
            )
        again = sum(
            length
            for _, length in cut(data_extents(source, size, limit=MOST_EXTENTS), begun, done, size)
        )
        return Moved(Digest(transfer.algorithm, job.hasher.hexdigest()), "stream", sent, again)

    def _can_go_on(self, sftp: Sftp, path: str) -> bool:
        """
        Return whether the transfer can resume from what an earlier attempt left there. If the
        answer to a flush of the file was lost, another flush would not report an error: the bytes
        have to be written again. For a file of another process the mode tells this: it is read-only
        before the last flush.
        """
        found = batches.look(sftp, [self._full(path)])[0]
        return (
            found is not None
            and bool(found.mode & stat.S_IWUSR)
            and self._file(path) not in _unheard
        )

    def _upload(self, sftp: Sftp, path: str, job: Job) -> int:
        full, server = self._full(path), self._look(sftp)
        if not job.done:
            sftp.ask_all([(Kind.REMOVE, string(full))])
            _unheard.forget(self._file(path))
        with self._opened(sftp, full, Flag.WRITE if job.done else NEW, mode=0o600) as handle:
            # the file there may have more bytes, and wrong ones; a hole here would not overwrite
            # them
            if job.done:
                sftp.ask(Kind.FSETSTAT, string(handle) + attributes(size=job.done))
            packer = self._packer(path, job)
            with self._flushing(path, job) as job:
                sent = (
                    PackedUpload(packer, sftp, handle, job, server.limits)
                    if packer
                    else Upload(sftp, handle, job, server.limits)
                ).run()
            requests: list[tuple[int, bytes]] = [
                (Kind.FSETSTAT, string(handle) + attributes(mode=0o444)),
                (Kind.FSTAT, string(handle)),
            ]
            if server.has(FSYNC):
                requests.append(extension(FSYNC, string(handle)))
            with _unheard.asking(self._file(path)):
                found = [granted(answer) for answer in sftp.ask_all(requests)][1]
            if attributes_in(found).size != job.size:
                raise wrong_length(self._subject(path), job.size, attributes_in(found).size)
        return sent

    @contextmanager
    def _flushing(self, path: str, job: Job) -> Iterator[Job]:
        """
        Flush what is written on the far side meanwhile, by a second channel if there is one: the
        first channel is full of data.

        :returns: the job whose writes are flushed
        """
        with ExitStack() as stack:
            other = (
                stack.enter_context(self._channels.spared()) if job.size - job.done > STEP else None
            )
            if other is not None and self._look(other).has(FSYNC):
                handle = stack.enter_context(self._opened(other, self._full(path), Flag.WRITE))
                flushing = stack.enter_context(
                    FlushBehind(lambda: partial(self._flush_file, other, path, handle))
                )
                job = evolve(job, wrote=flushing.wrote)
            yield job

    def _flush_file(self, sftp: Sftp, path: str, handle: bytes) -> None:
        with _unheard.asking(self._file(path)):
            sftp.extended(FSYNC, string(handle))

    def _file(self, path: str) -> tuple[Endpoint, bytes]:
        """:returns: a key for a file, the same in all of this process"""
        return self._connection.endpoint, self._full(path)

    def _packer(self, path: str, job: Job) -> Packer | None:
        return packer(
            shell_of(self._connection), self._seen(path), self._compress, job.end - job.done
        )

    def _discard(self, path: str) -> None:
        """Remove a file that will not be completed, if possible: otherwise a collector finds it."""
        with suppress(StatePoolError):
            self.remove(path)

    # -- names -------------------------------------------------------------------------------------

    def rename(self, source: str, target: str) -> None:
        _unheard.rename(self._file(source), self._file(target))
        super().rename(source, target)
        _unheard.forget(self._file(source))

    def remove(self, path: str) -> bool:
        removed = super().remove(path)
        _unheard.forget(self._file(path))
        return removed

    # -- the rest ----------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        with self._at("ask for the free space at", "") as sftp:
            return self._free(sftp)

    def survey(self) -> list[Finding]:
        with self._at("look at", "") as sftp:
            server = self._look(sftp)
        return list(
            survey(
                str(self.location),
                self._connection,
                server,
                shell_of(self._connection),
                lambda: self.stat(""),
            )
        )

    def hold(self, path: str, timeout: float) -> AbstractContextManager[None] | None:
        """Hold a lock on the far side, if the account has a shell."""
        return shell_of(self._connection).hold(self._seen(path), timeout)

    def close(self) -> None:
        """
        Close idle channels. The connection stays open for other pools on that host, unless no other
        user could use it.
        """
        self._channels.close()
        release(self._connection, self)


def _can_be_resumed(error: BaseException) -> bool:
    """Return whether an upload was only interrupted, by the link or by the user."""
    return (
        is_lost(error)
        or isinstance(error, TimeoutError | KeyboardInterrupt)
        or (isinstance(error, TransportError) and error.transient)
    )
