"""Every error this project raises on purpose.

SparseAttnError
├── StrategyNotFoundError   (KeyError)             no strategy, preset or adapter of that name
├── PluginConflictError     (ValueError)           two plugins claim one name
├── ParameterError          (ValueError)           a strategy parameter is unknown or out of range
├── LayoutError             (ValueError)           tensors, mask and layout do not describe one sequence
├── InstallError            (RuntimeError)         a strategy cannot be put into this model
├── UnsupportedCallError    (NotImplementedError)  a call outside what the operator or strategy declares
└── NonFiniteOutputError    (FloatingPointError)   an attention output holds NaN or infinity

A message states what was expected, what came, and what to do.
"""


class SparseAttnError(Exception):
    """Base of every error of this project."""

    def __str__(self) -> str:
        # KeyError would otherwise print the repr of its message.
        return str(self.args[0]) if self.args else ""


class StrategyNotFoundError(SparseAttnError, KeyError):
    """No strategy, preset or model adapter of that name is registered."""


class PluginConflictError(SparseAttnError, ValueError):
    """Two plugins register the same name."""


class ParameterError(SparseAttnError, ValueError):
    """A strategy parameter is unknown, of the wrong type or out of its range."""


class LayoutError(SparseAttnError, ValueError):
    """Tensors, block mask and token layout do not describe the same sequence."""


class InstallError(SparseAttnError, RuntimeError):
    """A strategy cannot be installed into, or is not any more in, this model."""


class UnsupportedCallError(SparseAttnError, NotImplementedError):
    """The call is outside what the operator or the strategy declares to support."""


class NonFiniteOutputError(SparseAttnError, FloatingPointError):
    """An attention output holds NaN or infinity."""
