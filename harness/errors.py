"""Errors of the harness, each one line that says what was expected, what came and what to do.

BenchError             bad input or an environment that cannot run the benchmark (exit code 2)
└── ResultsError       a results file cannot be read
"""


class BenchError(Exception):
    """The benchmark cannot start or go on; the message is one line for the user."""


class ResultsError(BenchError):
    """A results file holds a line that is not a result row."""
