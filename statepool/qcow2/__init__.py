"""
What an image file is.

Images come from pools and users, and are hostile until they have been checked. So our own header
reader goes first, then the named safety checks; only what has passed them is shown to ``qemu-img``.

- :mod:`~statepool.qcow2.files`: opening nothing but regular files
- :mod:`~statepool.qcow2.header`: the reader of headers, through whatever can read bytes, and the
  patch that gives an image another backing name
- :mod:`~statepool.qcow2.checks`: the named safety checks
- :mod:`~statepool.qcow2.clusters`: whether the file is as long as its own tables say
- :mod:`~statepool.qcow2.chain`: the walk from a state down to its root
- :mod:`~statepool.qcow2.overlay`: new working images, written without qemu-img
- :mod:`~statepool.qcow2.tool`: the one caller of qemu-img
- :mod:`~statepool.qcow2.opened`: who has a file open

The format is described in ``docs/interop/qcow2.txt`` of QEMU, the limits beyond it are those of
QEMU's own driver (``block/qcow2.h``).
"""
