"""What the command line refuses by itself; the message is shown and the exit status is 1.

FreightError (jobs.errors)
└── StartError             something that must run cannot be started: missing, taken, died
"""

from jobs.errors import FreightError


class StartError(FreightError):
    """Something that must run cannot be started."""
