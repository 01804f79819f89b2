"""A pytest that has imported torch and Dynamo: forks a run for each line of arguments, and answers with its exit code.

For ``mutation_check.py``. It reads JSON lines ``[arguments, file for the output, seconds]``; what takes longer is ended
by SIGALRM.
"""

import json
import os
import signal
import sys

import before_torch  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401 - and nothing of this package, which the runs import as it then is


def run(arguments: list[str], output: str, seconds: int) -> None:
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(target, stream)
    signal.alarm(seconds)
    code = int(pytest.main(arguments))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
