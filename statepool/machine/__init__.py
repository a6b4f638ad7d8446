"""
A running machine: a synchronous interface to QEMU's monitor protocol, and QEMU processes of our
own.

The only room that uses asyncio and qemu.qmp. Every function here blocks only its caller: one event
loop, in a thread of its own, serves all monitors of a process. So the functions work from any
thread, from pytest, and from programs with an event loop of their own, which call them by
``loop.run_in_executor``.
"""
