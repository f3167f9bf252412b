"""The command line program `peft-zoo`."""
