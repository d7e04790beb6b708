"""Text or token files -> tokens in a resumable order; tokenizers; downloads."""


class DataError(ValueError):
    """Data that is missing, unreadable, or does not match what was requested."""
