"""What a person sees of a command: what the tables of all studies have in common, and a terminal to see them on."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

from hvae import cli

COLUMNS = 100


def check_what_is_seen(hvae, out, capsys):
    """Of a finished run, which the command and ``hvae report`` show alike; returns the table's lines."""
    capsys.readouterr()
    seen = {}
    for quiet in ((), ("--quiet",)):
        assert hvae(out, "--resume", *quiet) == 0
        ran = capsys.readouterr()
        assert cli.main(["report", str(out), *quiet]) == 0
        told = capsys.readouterr()
        assert (told.out, told.err) == (ran.out, "")
        line = rf"hvae \w+: (\d+) jobs?, \1 finished before; results go to {re.escape(str(out))}\n"
        assert re.fullmatch("" if quiet else line, ran.err)
        seen[quiet] = ran.out
    report, figures = out / "report.md", len(list(out.glob("*.png")))
    lie = f"{figures} figure{'s lie' if figures > 1 else ' lies'} beside it"
    assert seen[()] == seen["--quiet",] + f"\nReport: {report}; {lie}.\n"
    check_table(seen["--quiet",])
    return seen["--quiet",].splitlines()


def check_table(text):
    """Plain, and as wide as promised."""
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert not re.search(r"!\[|\||\033", text)


def terminal():
    """A new one's two ends, the person's and the program's."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    return ours, theirs


def written_in_terminal(command, cwd=None, **environment):
    """All that a command writes to stdout and stderr there, until it ends well."""
    ours, theirs = terminal()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=cwd, env=env | environment)
        os.close(theirs)
        written = bytearray()
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                written += part
        assert process.wait() == 0, written.decode()
    return written.decode()


def pictures(written):
    """The lines of a terminal after each thing written there; a line that is too long fails."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token == "\x1b[A":
            row -= 1
        elif not token.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
            assert column <= COLUMNS
        yield [line.rstrip() for line in lines]
