"""Imports of a ``bidm`` process, made once for all that are forked from it."""
