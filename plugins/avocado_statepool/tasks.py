"""
The tasks before and after a test: the dependencies of kind ``vm-state`` become one task before the
test, and one after it.
"""

from __future__ import annotations

import json
from typing import Any

from avocado.core.extension_manager import PluginPriority
from avocado.core.nrunner.runnable import Runnable
from avocado.core.plugin_interfaces import PostTest, PreTest

from avocado_statepool.runner import WISHES
from avocado_statepool.wishes import KIND, split

_AFTER = ("pass", "fail", "error", "skip", "warn", "cancel", "interrupted")
"""The results of a test after which its working images are removed: all results."""

_ASKING: set[str] = set()
"""The log directories of the tests that ask for states."""


class StatepoolBefore(PreTest):
    """
    The plugin that makes one task of all dependencies of kind ``vm-state`` of a test.

    They are withheld from avocado's own resolver. It would give them the same name, so that only
    the first is run and the test waits forever; or, if they have names, it would remember them as
    done for all later jobs.
    """

    name = "statepool"
    description = "Provides the states of virtual machines that tests ask for"
    is_cacheable = False
    priority = PluginPriority.HIGH  # run before avocado's own resolver

    @staticmethod
    def pre_test_runnables(test_runnable: Any, suite_config: Any = None) -> list[Any]:
        """:returns: the task that makes the working images"""
        ours, others = split(test_runnable.dependencies)
        if not ours:
            return []
        test_runnable.dependencies = others
        _ASKING.add(test_runnable.output_dir)
        first = str(ours[0].get("uri")).replace("/", "-")
        return [_task(test_runnable, suite_config, first, ours)]


class StatepoolAfter(PostTest):
    """The plugin that removes working images after a test."""

    name = "statepool"
    description = "Takes working images away after a test"

    @staticmethod
    def post_test_runnables(test_runnable: Any, suite_config: Any = None) -> list[Any]:
        """:returns: the task that removes the working images"""
        if test_runnable.output_dir not in _ASKING:
            return []
        _ASKING.remove(test_runnable.output_dir)
        return [(_task(test_runnable, suite_config, "release", []), list(_AFTER))]


def _task(test_runnable: Any, suite_config: Any, name: str, wishes: list[dict[str, Any]]) -> Any:
    config = Runnable.filter_runnable_config(KIND, suite_config or {})
    arguments = {
        "name": name,
        "logdir": test_runnable.output_dir,
        "test": test_runnable.identifier,
        WISHES: json.dumps(wishes),
    }
    return Runnable(KIND, wishes[0].get("uri") if wishes else None, config=config, **arguments)
