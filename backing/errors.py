"""The one error of this package: a broker or a Cassandra could not be had, started or steered.

Its message says what was tried, what to change (a package to install, a variable to set) and, for a
server that did not come up, the last lines of its log.
"""


class BackingError(RuntimeError):
    """A backing service could not be started, reached or steered."""
