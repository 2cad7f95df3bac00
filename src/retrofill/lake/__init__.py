"""What is sealed: the whole history as Parquet files in a DuckLake, for readers and for the commit loop."""

from retrofill.lake.ducklake import Lake, Snapshot, Swap

__all__ = ["Lake", "Snapshot", "Swap"]
