"""What the command line refuses by itself; shown without a traceback, exit status EX_CONFIG (78).

FreightError (jobs.errors)
└── StartError             something that must run cannot be started: missing, taken, died
"""

from jobs.errors import FreightError


class StartError(FreightError):
    """Something that must run cannot be started."""
