"""Import before torch: waiting threads soon sleep, as in the ``bidm`` command (bidm_cli/cli/threads.py)."""

from bidm_cli.cli.threads import settle_openmp

settle_openmp()
