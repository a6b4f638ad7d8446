"""
Named states of QCOW2 VM images, kept in pools and brought to any test worker: quickly, whole, and
once per host.

Begin with :class:`StatePool`; ``docs/howto.rst`` shows how. Backends and transports of other
authors derive from :class:`StateBackend` and :class:`Transport`; ``statepool.testing`` has test
suites for them.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from statepool.version import __version__

if TYPE_CHECKING:
    from statepool.api import ImageHandle, StatePool, adopt, from_config, init, sync
    from statepool.backends.base import Context, Options, StateBackend, Target
    from statepool.backends.external import QCOW2ExtBackend
    from statepool.backends.sourced import SourcedStateBackend
    from statepool.config import Config
    from statepool.errors import (
        AccessDenied,
        BadRecord,
        BuildFailed,
        ConfigError,
        Conflict,
        DigestMismatch,
        FileExists,
        FileInTheWay,
        HasDependants,
        Incompatible,
        IntegrityError,
        InUse,
        InvalidLocation,
        InvalidName,
        LockTimeout,
        MachineError,
        MissingFile,
        NoSpace,
        NotAPool,
        NotFound,
        ReadOnlyPool,
        RefusedError,
        StatePoolError,
        ToolError,
        TransportError,
        UnsafeImage,
        UnsupportedFormat,
        UsageError,
    )
    from statepool.handles import MachineHandle
    from statepool.machine.description import MachineConfig
    from statepool.machine.running import RunningMachine
    from statepool.model.carried import Exported, Imported
    from statepool.model.digest import Digest
    from statepool.model.location import Location
    from statepool.model.manifest import Kind, Manifest, Parent, StateId
    from statepool.model.names import check_state_name
    from statepool.model.objects import Image, Machine, parse_object
    from statepool.model.outcomes import (
        Adopted,
        Checked,
        Collected,
        Collection,
        Ensured,
        Finding,
        GetResult,
        Kept,
        Level,
        Listed,
        Listing,
        Logged,
        Presence,
        Removed,
        SetResult,
        SourceStatus,
        StoredAt,
        SyncAction,
        Synced,
        SyncedState,
        Verified,
        WaitFor,
    )
    from statepool.model.progress import Progress
    from statepool.model.scope import Scope
    from statepool.model.secrets import GivenSecrets, SecretKind
    from statepool.model.settings import Compress, Settings
    from statepool.model.trees import TreeNode, arrange
    from statepool.policy import Item, ItemOutcome, Outcome, Policy, items_of
    from statepool.transports.base import (
        Capabilities,
        Entry,
        FileKind,
        Moved,
        Stat,
        Transfer,
        Transport,
    )
    from statepool.transports.local import LocalTransport

# Most to least important.
__all__ = [
    # asking
    "StatePool",
    "from_config",
    "init",
    "adopt",
    "sync",
    "ImageHandle",
    "MachineHandle",
    "MachineConfig",
    "RunningMachine",
    "Config",
    "Settings",
    "Policy",
    "Item",
    "items_of",
    "Compress",
    "SecretKind",
    "GivenSecrets",
    "Progress",
    # what has states, and where
    "Image",
    "Machine",
    "parse_object",
    "check_state_name",
    "Location",
    "Scope",
    "Digest",
    "Manifest",
    "Parent",
    "StateId",
    "Kind",
    # answers
    "GetResult",
    "SetResult",
    "StoredAt",
    "Ensured",
    "Exported",
    "Imported",
    "Removed",
    "Outcome",
    "ItemOutcome",
    "Listed",
    "Listing",
    "TreeNode",
    "arrange",
    "SourceStatus",
    "Checked",
    "Adopted",
    "Collection",
    "Collected",
    "Kept",
    "Logged",
    "Finding",
    "Level",
    "Presence",
    "Verified",
    "WaitFor",
    "Synced",
    "SyncedState",
    "SyncAction",
    # for authors of backends and transports
    "StateBackend",
    "SourcedStateBackend",
    "QCOW2ExtBackend",
    "Context",
    "Target",
    "Options",
    "Transport",
    "LocalTransport",
    "Capabilities",
    "Entry",
    "FileKind",
    "Stat",
    "Transfer",
    "Moved",
    # errors, as in the tree of statepool.errors
    "StatePoolError",
    "UsageError",
    "InvalidName",
    "InvalidLocation",
    "ConfigError",
    "NotFound",
    "RefusedError",
    "Conflict",
    "HasDependants",
    "InUse",
    "Incompatible",
    "FileInTheWay",
    "ReadOnlyPool",
    "IntegrityError",
    "DigestMismatch",
    "UnsafeImage",
    "BadRecord",
    "UnsupportedFormat",
    "LockTimeout",
    "TransportError",
    "NotAPool",
    "MissingFile",
    "FileExists",
    "AccessDenied",
    "NoSpace",
    "ToolError",
    "MachineError",
    "BuildFailed",
    "__version__",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

_ROOMS = {
    "api": ("ImageHandle", "StatePool", "adopt", "from_config", "init", "sync"),
    "backends.base": ("Context", "Options", "StateBackend", "Target"),
    "backends.external": ("QCOW2ExtBackend",),
    "backends.sourced": ("SourcedStateBackend",),
    "config": ("Config",),
    "errors": (
        "AccessDenied",
        "BadRecord",
        "BuildFailed",
        "ConfigError",
        "Conflict",
        "DigestMismatch",
        "FileExists",
        "FileInTheWay",
        "HasDependants",
        "IntegrityError",
        "InUse",
        "Incompatible",
        "InvalidLocation",
        "InvalidName",
        "LockTimeout",
        "MachineError",
        "MissingFile",
        "NoSpace",
        "NotAPool",
        "NotFound",
        "ReadOnlyPool",
        "RefusedError",
        "StatePoolError",
        "ToolError",
        "TransportError",
        "UnsafeImage",
        "UnsupportedFormat",
        "UsageError",
    ),
    "handles": ("MachineHandle",),
    "machine.description": ("MachineConfig",),
    "machine.running": ("RunningMachine",),
    "model.carried": ("Exported", "Imported"),
    "model.digest": ("Digest",),
    "model.location": ("Location",),
    "model.manifest": ("Kind", "Manifest", "Parent", "StateId"),
    "model.names": ("check_state_name",),
    "model.objects": ("Image", "Machine", "parse_object"),
    "model.outcomes": (
        "Adopted",
        "Checked",
        "Collected",
        "Collection",
        "Ensured",
        "Finding",
        "GetResult",
        "Kept",
        "Level",
        "Listed",
        "Listing",
        "Logged",
        "Presence",
        "Removed",
        "SetResult",
        "SourceStatus",
        "StoredAt",
        "SyncAction",
        "Synced",
        "SyncedState",
        "Verified",
        "WaitFor",
    ),
    "model.progress": ("Progress",),
    "model.scope": ("Scope",),
    "model.secrets": ("GivenSecrets", "SecretKind"),
    "model.settings": ("Compress", "Settings"),
    "model.trees": ("TreeNode", "arrange"),
    "policy": ("Item", "ItemOutcome", "Outcome", "Policy", "items_of"),
    "transports.base": (
        "Capabilities",
        "Entry",
        "FileKind",
        "Moved",
        "Stat",
        "Transfer",
        "Transport",
    ),
    "transports.local": ("LocalTransport",),
}
"""
The module of each public name. A name is imported when it is first used, so that ``import
statepool`` costs next to nothing.
"""

_HOMES = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """:returns: a public name, imported from its module"""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """:returns: the public names too, imported or not"""
    return sorted({*globals(), *__all__})
