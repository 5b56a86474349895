"""What can go wrong, by kind. Every message says what was expected, what came, and what to do."""


class PluginError(Exception):
    """Base of the errors a user can mend. The command line prints the message and exits with status 2."""


class OptionError(PluginError, ValueError):
    """An option file or command-line argument is wrong."""


class DataError(PluginError, ValueError):
    """A picture, a folder or a list of pairs cannot be used."""


class CheckpointError(PluginError, RuntimeError):
    """A weights file cannot be read, is unsafe, or belongs to another network."""


class TrainingError(PluginError, RuntimeError):
    """Training cannot go on as it is: its numbers are no longer finite."""


class ShapeError(PluginError, ValueError):
    """A tensor does not have the shape that the called function documents."""


class BackendUnavailable(PluginError, RuntimeError):
    """A backend asked for by name cannot run here."""
