#!/usr/bin/env python
"""The command of xlearner_d2/commands/report.py, from a checkout."""

from xlearner_d2.commands import start

if __name__ == "__main__":
    start("report")
