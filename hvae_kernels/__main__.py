"""``python -m hvae_kernels``: what runs where, and why not otherwise; ``bench OP``: whether it is faster for you."""

from __future__ import annotations

import argparse
import os
import sys

from hvae_kernels import bench, show_config


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m hvae_kernels", description="Versions, and what runs where.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    timing = commands.add_parser("bench", help="time one op at your sizes", description=bench.__doc__)
    bench.add_options(timing)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return bench.main(timing, options)
    show_config()
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
