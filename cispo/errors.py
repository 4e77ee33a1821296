"""Every error a user can meet. Each says what is wrong, the value, and what to do.

Errors cross process borders inside Ray, so each keeps the plain constructor of its base and stays picklable.
"""


class CispoError(Exception):
    """Base of every error that a person caused or can mend; the command line prints it as one line."""


class RecipeError(CispoError, ValueError):
    """A recipe, an override or a file that the recipe names is wrong; may hold several lines, one a mistake."""


class DataError(CispoError, ValueError):
    """A data set is missing, unreadable, empty, or lacks a column."""


class CheckpointError(CispoError, ValueError):
    """A policy folder or checkpoint is missing, damaged or does not fit the model."""


class RewardError(CispoError, ValueError):
    """A reward function cannot be found, raised, or returned something that is no finite number or Score."""


class SandboxError(CispoError, RuntimeError):
    """The sandbox itself failed or is not available; never the fault of the program under test."""


class SandboxLostError(SandboxError):
    """Somebody outside killed a program, or what watches over it; the message says what. Trying again is of use."""


class SandboxClosedError(SandboxError):
    """The sandbox was closed before, so trying again is of no use."""


class RunFolderError(CispoError, RuntimeError):
    """The run folder exists already, is missing, or belongs to another recipe."""


class BroadcastError(CispoError, RuntimeError):
    """A worker does not hold the weights that the learner sent."""


class DeadlineError(CispoError, TimeoutError):
    """A wait passed its deadline; the message names what was waited for."""


class ActorLostError(CispoError, RuntimeError):
    """A process of the run is gone: killed, out of memory, or its machine left; the message says which."""


class LearnerLostError(ActorLostError):
    """The learner's process is gone, and with it all that it learnt since its last checkpoint."""


class UnsupportedError(CispoError, NotImplementedError):
    """A feature that this version does not have; the message names it and what there is instead."""
