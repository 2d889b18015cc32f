"""The errors a caller may want to tell apart.

SlipstreamError
├── ModelError        a model cannot be loaded or served; the user can mend it
│   └── MisfitError       … and is not damaged: it is for another model, or of a newer version of Slipstream
├── SupersededError   a later decision came before this one took effect
├── RequestError      a request asks for what cannot be computed, and would again
├── ConfigError       an option is wrong; the user can mend it
└── EngineDiedError   the engine process is gone
    └── EngineLostError   … and is not started again; requests cannot be served any more
"""


class SlipstreamError(Exception):
    """Base of every error this project raises on purpose."""


class ModelError(SlipstreamError):
    """A model file is missing, broken, too large or of a kind that cannot be served."""


class MisfitError(ModelError):
    """A model file is sound, but not for what it would be used with here."""


class SupersededError(SlipstreamError):
    """What was decided is not done any more, because something else was decided since."""


class RequestError(SlipstreamError):
    """What a request asks for cannot be computed; the same would fail again."""


class ConfigError(SlipstreamError):
    """A configuration value is wrong or does not fit the others."""


class EngineDiedError(SlipstreamError):
    """The engine process ended while it was needed."""


class EngineLostError(EngineDiedError):
    """The engine process ended too often, or could not be started again."""
