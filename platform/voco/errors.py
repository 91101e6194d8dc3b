"""The three ways a job ends other than well. The command line turns each into one line and an exit code."""


class Refused(Exception):
    """The job cannot start as asked: one line that names the place and says what to change. Exit code 2."""


class JobFailed(Exception):
    """The job ran and failed for a reason that the user must know in one line. Exit code 1."""


class Stopped(Exception):
    """The job was asked to stop and ended cleanly; sent again, it continues. Exit code 130."""
