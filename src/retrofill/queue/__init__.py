"""Between the edge and the worker: requests that wait for their commit, in order of arrival."""

from retrofill.queue.inside import Queue

__all__ = ["Queue"]
