"""A sample that cannot be learnt from."""

REASONS = ("conversation", "picture", "masks", "depth", "codes", "length")  # why a sample can be unusable


class SampleError(ValueError):
    """A sample that cannot be learnt from; `reason` is one of `REASONS`."""

    def __init__(self, message: str, reason: str = "conversation"):
        super().__init__(message)
        self.reason = reason
