"""
The command line: one file per command.

``main`` finds the command and maps errors to exit codes; ``session`` holds what all commands share;
``output``, ``forms`` and ``report`` say things as text and as JSON; ``progress`` draws a bar while
something takes long; ``drawing`` is the only module that imports rich.
"""
