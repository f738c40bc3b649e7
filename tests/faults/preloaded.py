"""Imports of a ``bidm`` process, made once for all that are forked from it."""

import bidm_cli.cli.compress
import bidm_cli.cli.sample
import bidm_cli.distill.compress
import bidm_cli.packed.model
import bidm_cli.report.opening
import bidm_cli.sampling.folder  # noqa: F401
