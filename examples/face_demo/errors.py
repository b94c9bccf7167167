"""The error that users see without a traceback."""


class DataError(Exception):
    """The images cannot serve; the message says why."""

    def __str__(self) -> str:
        """Without the traceback that a worker of a DataLoader puts before the message."""
        text = super().__str__()
        if not text.startswith("Caught DataError in DataLoader worker"):
            return text
        return text.rpartition(f"{__name__}.DataError: ")[2].strip()
