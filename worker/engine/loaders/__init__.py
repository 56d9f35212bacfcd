"""Loaders of checkpoints that are not in transformers' own format, one format a file.

Each builds transformers' native modules and fills them with the checkpoint's weights. Code that
comes with a checkpoint is never executed.
"""
