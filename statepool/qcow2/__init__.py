"""
Image files: their format, and the checks of their safety.

Images come from pools and users, and count as hostile until they are checked. So our own header
reader comes first, then the named safety checks. ``qemu-img`` only gets images that have passed
them.

- :mod:`~statepool.qcow2.files`: opening of regular files, and nothing else
- :mod:`~statepool.qcow2.header`: the reader of headers, from any function that reads bytes, and the
  patch that gives an image another backing name
- :mod:`~statepool.qcow2.checks`: the named safety checks
- :mod:`~statepool.qcow2.clusters`: whether the file is as long as its own tables say
- :mod:`~statepool.qcow2.chain`: the walk from a state down to its root
- :mod:`~statepool.qcow2.overlay`: new working images, written without qemu-img
- :mod:`~statepool.qcow2.tool`: the one caller of qemu-img
- :mod:`~statepool.qcow2.opened`: the processes that have a file open

The format is described in ``docs/interop/qcow2.txt`` of QEMU, the limits beyond it are those of
QEMU's own driver (``block/qcow2.h``).
"""
