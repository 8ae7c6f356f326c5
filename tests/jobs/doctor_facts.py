"""Facts for tests of the doctor, and what they may ask of its findings."""

from __future__ import annotations

import copy

from jobs import doctor

GIB = 1 << 30


def healthy(**changes):
    """A node that nothing is wrong with."""
    pins = {"ray": "2.60.0", "torch": "2.9.0"}
    node = {
        "node": "a", "python": "3.11.7", "pins": pins, "packages": dict(pins), "torch_cuda": "13.0", "driver": None, "gpus": 0,
        "memory": 32 * GIB, "memory_free": 16 * GIB, "disk": {"path": "/tmp", "total": 100 * GIB, "free": 50 * GIB},
        "shm": {"path": "/dev/shm", "total": 8 * GIB, "free": 8 * GIB}, "open_files": 65536,
        "open_files_most": 65536, "cloud": None, "processes": -1, "auth_mode": "token", "web_identity": None,
        "public_addresses": [], "open_ports": [], "object_store": GIB, "clock_offset": 0.01, "clock_error": 0.02,
    }  # fmt: skip
    return {**copy.deepcopy(node), **changes}


def faults(found):
    return [one for one in doctor.judge(found) if one.state == "fault"]


def the_fault(found, what, value, remedy):
    """The one fault, of which the rule and the remedy are told."""
    (one,) = faults(found)
    assert one.what == what
    assert value in f"{one.where}: {one.value}", one
    assert remedy in one.remedy, one
    assert one.rule
    return one
