"""``python -m bidm_cli``: the ``bidm`` command, for launchers such as torchrun."""

from bidm_cli.cli.main import main

if __name__ == "__main__":
    main()
