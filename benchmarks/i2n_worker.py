"""
avocado-i2n as a peer: this module runs in a separate environment, in which avocado-i2n is installed
and statepool is not.

Reads one request per line, ``{"do": "get" or "set", "state": ..., "pool": ..., "cache": ...,
"work": ...}``, and answers each with the seconds that it took. Everything is imported before the
first request, so that only the work is measured.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def parameters(request: dict[str, str]) -> Any:
    """:returns: the parameters of avocado-i2n, in its own form"""
    from virttest.utils_params import Params  # type: ignore[import-not-found]

    do, state = request["do"], request["state"]
    locations = {
        f"{name}_location": ":" + request["pool"] for name in ("show", "get", "set", "unset")
    }
    values = {
        "vms": "vm1",
        "images": "disk",
        "object_type": "nets/vms/images",
        "object_id": "vm1",
        "swarm_pool": request["cache"],
        "shared_pool": request["pool"],
        "vms_base_dir": request["work"],
        "images_base_dir": request["work"],
        "image_name": "disk",
        "image_format": "qcow2",
        "qemu_img_binary": "qemu-img",
        "update_pool_timeout": "300",
        "nets_host": "",
        "nets_gateway": "",
        # Only operations that move data: working images have a separate figure.
        "pool_scope": "swarm cluster shared" if do == "get" else "own swarm cluster shared",
        f"{do}_state": state,
        **locations,
    }
    return Params(values)


def main() -> None:
    """Serve requests until there are no more."""
    from avocado_i2n.states.qcow2 import QCOW2ExtBackend  # type: ignore[import-not-found]

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        wanted = parameters(request)
        operation = {"get": QCOW2ExtBackend.get, "set": QCOW2ExtBackend.set}[request["do"]]
        begin = time.perf_counter()
        operation(wanted)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
