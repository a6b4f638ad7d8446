"""Make a state with RAM, in which the machine has booted."""

from conftest import booted

import statepool

pool = statepool.from_config()
pool.image("vm1/disk").get("install", to="booted.qcow2")
with booted({"disk": "booted.qcow2"}) as (machine, _):
    pool.machine("vm1", images=["disk"]).set_running("booted", machine)
