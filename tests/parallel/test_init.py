"""Start-up of a rank."""

import subprocess
import sys


def test_a_job_may_have_as_many_files_open_as_the_system_allows() -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
from megagate.parallel.init import allow_open_files
allow_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(512, 512)", done.stderr
