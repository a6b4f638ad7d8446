"""
A running machine: a synchronous face over QEMU's monitor protocol, and QEMU processes of our own.

The only room that knows asyncio and qemu.qmp. Everything here blocks its caller and nobody else:
one event loop, in a thread of its own, serves all monitors of a process, so that it works from any
thread, from pytest, and from programs with an event loop of their own, which call it by
``loop.run_in_executor``.
"""
