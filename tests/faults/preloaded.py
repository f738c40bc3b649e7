"""Imports of a ``bidm`` process, made once for all that are forked from it."""

# ruff: noqa: F401
import bidm_cli.cli.compress
import bidm_cli.cli.sample
import bidm_cli.distill.compress
import bidm_cli.packed.model
import bidm_cli.parallel.launch
import bidm_cli.parallel.processes
import bidm_cli.report.opening
import bidm_cli.sampling.folder
