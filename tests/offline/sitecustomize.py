"""Imported by every Python that a test starts with this folder on PYTHONPATH: no connection leaves the machine.

A library may swallow the refusal, so attempts are also written to the file that CONNECTIONS names.
"""

import os
import socket


def _refuse(self, address, *args):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        if "CONNECTIONS" in os.environ:
            with open(os.environ["CONNECTIONS"], "a") as log:
                log.write(f"{address}\n")
        raise AssertionError(f"a test tried to connect to {address}")
    return _connect(self, address, *args)


_connect = socket.socket.connect
socket.socket.connect = _refuse
socket.socket.connect_ex = _refuse
