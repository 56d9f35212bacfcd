"""The files of batches: reading items, and writing results."""

from visq.batch_files.names import OutputNames, has_known_ending, output_names

__all__ = ["OutputNames", "has_known_ending", "output_names"]
