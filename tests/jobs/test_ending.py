"""How a job ends that somebody ends."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_a_job_that_is_ended_leaves_no_trace_of_a_crash():
    """SIGTERM is how the Jobs API ends a job; Ray's core would print machine addresses."""
    code = "from jobs import cli; cli.connect(); import time; print('up', flush=True); time.sleep(600)"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "up\n"
        job.terminate()
        out, err = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" not in out + err
    assert "Traceback" not in err
